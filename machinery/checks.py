"""Findings: faults in a dataset that raise no error but spoil a training.

`findings` looks at a frame table and returns its problems, with numbers and the cure. Training
prints the findings of high severity when it starts, `python data.py --inspect DIR` prints all.

The central measurement is `round_trip`: an action that is recorded, normalized and encoded as
tokens should come back, to within half a bin, when the tokens are decoded and unnormalized. A
policy cannot give better actions than these.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from action_tokenizer import ActionTokenizer, normalize, unnormalize
from machinery.frames import FrameTable

ROWS = 200_000  # frames to look at: all of most datasets; for Open X-Embodiment, it takes a second
FEW_ROWS = 4096  # of these, for what is slower


class Finding(NamedTuple):
    severity: str  # "high": spoils a training, which prints it; "middle": worth knowing
    text: str  # which dimension, camera or episodes, and the evidence in numbers
    cure: str

    def __str__(self) -> str:
        return f"{self.text}: {self.cure}"


def findings(table: FrameTable, normalization: str, action_chunk: int) -> list[Finding]:
    """What is wrong with a dataset, the worst first.

    normalization: one of TrainConfig.action_normalization; action_chunk: steps that are predicted
    at once
    """
    frames, episodes = sample(table)
    few = frames[:: len(frames) // FEW_ROWS + 1]
    stats = table.statistics["action"]
    found = table_findings(table)
    found += image_findings(frames, table.cameras)
    found += text_findings(frames, episodes, table.instructions)
    found += action_findings(few["action"], stats, normalization)
    found += turn_findings(frames["action"], episodes, table.targets)
    found += idle_findings(frames["action"], stats, table.targets)
    if action_chunk > 1:
        found += target_findings(frames, episodes, stats, table.targets)
    if "proprio" in frames.dtype.names:
        found += copy_findings(few, stats)
        if normalization == "normal":
            found += state_findings(table.statistics["proprio"])
    return sorted(found, key=lambda finding: finding.severity)  # "high" < "middle"


def sample(table: FrameTable) -> tuple[np.ndarray, np.ndarray]:
    """Episodes at even distances, about ROWS frames in all, or all -> (frames, episodes). In them,
    `first` counts among these frames."""
    step = -(-len(table.frames) // ROWS)
    episodes = table.episodes[::step].copy()
    frames = np.asarray(table.frames)
    if step > 1:
        ends = episodes["first"] + episodes["count"]
        parts = [frames[first:end] for first, end in zip(episodes["first"], ends, strict=True)]
        frames = np.concatenate(parts)
    episodes["first"] = np.cumsum(episodes["count"]) - episodes["count"]
    return frames, episodes


# ---- Actions that do not come back ---------------------------------------------------------------


def round_trip(recorded: np.ndarray, stats: Mapping, kind: str) -> dict[str, np.ndarray]:
    """Actions (N, A) in standard form -> for each of the A dimensions

    half_bin    half the width of a bin, in the dataset's units: the error to expect
    error       the largest error among values that were not clipped
    clipped     the share of values that come back wrong by more than half a bin
    lost        the share of the motion (sum of distances from the median) that does not come back

    stats: "action" of dataset_statistics.json; kind: of normalization
    """
    tokenizer = ActionTokenizer(512)
    tokens = tokenizer.encode(normalize(recorded, stats, kind))
    returned = unnormalize(tokenizer.decode(tokens), stats, kind)
    raw = ~np.array(stats["mask"])
    zero = unnormalize(np.zeros(len(raw)), stats, kind)
    one = unnormalize(np.ones(len(raw)), stats, kind)
    half_bin = np.where(raw, 1.0, np.abs(one - zero)) / (tokenizer.n_bins - 1)
    error = np.abs(returned - recorded)
    rounding = 1e-6 * np.abs(recorded).max(0, initial=1e-9)
    wrong = error > half_bin * 1.001 + rounding
    motion = np.abs(recorded - np.median(recorded, axis=0)).sum(0)
    return {
        "half_bin": half_bin,
        "error": np.where(wrong, 0, error).max(0),
        "clipped": wrong.mean(0),
        "lost": np.where(wrong, error, 0).sum(0) / np.maximum(motion, 1e-12),
    }


def action_findings(actions: np.ndarray, stats: Mapping, kind: str) -> list[Finding]:
    """One finding for each dimension of the actions (N, A) that does not come back."""
    back = round_trip(actions, stats, kind)
    low, high, q01, q99 = (np.array(stats[key]) for key in ("min", "max", "q01", "q99"))
    found = []
    for d, normalized in enumerate(stats["mask"]):
        span = high[d] - low[d]
        reach = f"goes from {low[d]:.4g} to {high[d]:.4g}"
        if span == 0:
            text = f"never changes (always {low[d]:.4g})"
            cure = "the model learns 0 for it; leave it out of the recipe if that is wrong"
        elif not normalized and max(-low[d], high[d]) > 1.001:
            text = f"is raw, {reach}, and is clipped to -1..1"
            cure = "divide it in the recipe ('gripper /255 target raw'), or remove raw"
        elif not normalized and span < 0.5:
            text = f"is raw and {reach}, which is {span * 127.5:.0f} of 256 bins"
            cure = "scale it to 0..1 in the recipe, or remove raw"
        elif not normalized and low[d] < -0.001 and len(np.unique(actions[:, d])) > 16:
            text = f"is raw and {reach} with many values between, like a position or an angle"
            cure = "remove raw (or `absolute`) from the recipe, so that it is normalized"
        elif normalized and kind == "bounds_q99" and (q01[d] == q99[d] or back["lost"][d] > 0.5):
            text = (f"{reach}, but 98 % of it are within {q01[d]:.4g}..{q99[d]:.4g}: the rest is "
                    "clipped, and will never be commanded")
            cure = "action_normalization: bounds"
        elif back["clipped"][d] > 0.05:
            other = "bounds" if kind == "bounds_q99" else "bounds_q99"
            text = f"{reach}; {kind!r} clips {back['clipped'][d]:.0%} of its values"
            cure = f"action_normalization: {other}"
        else:
            continue
        found.append(Finding("high", f"action dimension {d} {text}", cure))
    return found


# ---- Targets, angles, copies ---------------------------------------------------------------------


def looks_like_targets(frames: np.ndarray, episodes: np.ndarray, stats: Mapping) -> np.ndarray:
    """Which dimensions of the actions look like targets, (A,) bool: they never come near zero, or
    move little from frame to frame, or the state follows them. stats: of the actions."""
    episodes = episodes[:: len(episodes) // 256 + 1]
    parts = [np.arange(e["first"], e["first"] + e["count"] - 1) for e in episodes]
    rows = np.concatenate(parts).astype(int)  # all but the last of each episode
    low, high = np.array(stats["q01"]), np.array(stats["q99"])
    if len(rows) < 2:
        return np.zeros(len(low), bool)
    actions = frames["action"][rows]
    steps = np.abs(frames["action"][rows + 1] - actions)
    smooth = steps.mean(0) < 0.12 * np.maximum(actions.std(0), 1e-9)
    followed = np.zeros_like(smooth)
    if "proprio" in frames.dtype.names:
        state = frames["proprio"][rows + 1]
        change = state - frames["proprio"][rows]
        like_state = correlation(actions, state)
        like_change = correlation(actions, change).max(1)
        followed = (like_state > 0.98).any(1)
        # a velocity may be smooth, too, but then it is more like the state's change than like the
        # state. The margin is for motion on a circle, where the change of y is like x
        smooth &= (like_change < 0.7) | (like_change < np.abs(like_state).max(1) + 0.15)
    return (high > low) & ((low > 0) | (high < 0) | smooth | followed)


def correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of each column of (N, A) with each of (N, B) -> (A, B); 0 for a constant column."""
    covariance = np.nan_to_num(np.cov(a.T, b.T))[: a.shape[1], a.shape[1] :]
    return covariance / np.maximum(a.std(0), 1e-9)[:, None] / np.maximum(b.std(0), 1e-9)


def target_findings(frames: np.ndarray, episodes: np.ndarray, stats: Mapping, target: np.ndarray
                    ) -> list[Finding]:
    """Dimensions that look like targets but are changes in the recipe. target: (A,) bool."""
    dims = np.flatnonzero(~target & looks_like_targets(frames, episodes, stats))
    if not len(dims):
        return []
    text = (f"action dimensions {spans(dims)} look like targets (joint angles, a pose), not like "
            "changes: past the end of an episode, their labels jump to the middle of their range")
    return [Finding("high", text, "write `target` after them in the recipe")]


def turn_findings(actions: np.ndarray, episodes: np.ndarray, target: np.ndarray) -> list[Finding]:
    """Dimensions that wrap: an angle that jumps from pi to -pi, or a difference of such angles. The
    range that is normalized is then that of the jumps, and motion gets a bin or two."""
    inside = np.ones(len(actions), bool)
    inside[episodes["first"][episodes["count"] > 0]] = False  # no steps from episode to episode
    found = []
    for d, values in enumerate(actions.T):
        steps = np.abs(values)
        if target[d]:
            steps = np.abs(np.diff(values, prepend=values[:1]))[inside]
        for turn, name in ((2 * np.pi, "2 pi"), (360, "360")):
            far = steps[steps > turn / 2]  # if it wraps, all of these are nearly a full turn
            rare = 0 < len(far) < 0.1 * len(steps)
            if rare and far.min() > 0.9 * turn and far.max() <= 1.001 * turn:
                text = f"action dimension {d} jumps by about {name} in {len(far)} frames: it wraps"
                cure = "unwrap it before recording (numpy.unwrap in each episode)"
                found.append(Finding("high", text, cure))
    return found


def copy_findings(frames: np.ndarray, stats: Mapping) -> list[Finding]:
    """Actions that equal the state of their own frame, as when an arm is moved by hand. A gripper
    with two values may well do so. stats: of the actions."""
    actions, state = frames["action"], frames["proprio"]  # (N, A), (N, P)
    moved = actions != np.median(actions, axis=0)
    same = moved[..., None] & (actions[..., None] == state[:, None])  # (N, A, P)
    share = same.sum(0).max(1, initial=0) / np.maximum(moved.sum(0), 1)
    dims = np.flatnonzero((share > 0.99) & stats["mask"])
    if not len(dims):
        return []
    text = f"action dimensions {spans(dims)} equal the state of the same frame: a policy stays put"
    return [Finding("high", text, "record the commands, or the next frame's state, as the action")]


# ---- States, images, texts, episodes -------------------------------------------------------------


def state_findings(stats: Mapping) -> list[Finding]:
    """With the normalization "normal": states without deviation, by which they are divided."""
    still = np.flatnonzero(np.array(stats["min"]) == np.array(stats["max"]))
    if not len(still):
        return []
    text = f"state dimensions {spans(still)} never change: any other value becomes a huge number"
    cure = "leave them out of `state`, or action_normalization: bounds_q99"
    return [Finding("high", text, cure)]


def image_findings(frames: np.ndarray, cameras: list[str | None]) -> list[Finding]:
    """Cameras that have no image in some frames, or in all."""
    if not any(cameras):
        text = "its recipe has none of the `cameras`, so all its images are black"
        return [Finding("high", text, "name one in the recipe, or leave the dataset out")]
    found = []
    for number, key in enumerate(cameras):
        empty = int((frames["length"][:, number] == 0).sum())
        if key and empty:
            text = f"{key} has no image in {empty} of {len(frames)} frames, which are black"
            found.append(Finding("high", text, "data.py --check lists them"))
    return found


def text_findings(frames: np.ndarray, episodes: np.ndarray, instructions: list[str]
                  ) -> list[Finding]:
    """Frames without an instruction in episodes that have one in other frames."""
    blank = [number for number, text in enumerate(instructions) if not text.strip()]
    labeled = np.repeat(episodes["labeled"], episodes["count"])
    count = int((labeled & np.isin(frames["instruction"], blank)).sum())
    if not count:
        return []
    text = f"{count} frames have no instruction, but others of their episode have one"
    return [Finding("high", text, "they are trained on without one; repeat it in every step")]


def table_findings(table: FrameTable) -> list[Finding]:
    """Episodes that are not used."""
    found = []
    if table.bad:
        text = f"{len(table.bad)} bad episodes are left out, the first: {table.bad[0]}"
        found.append(Finding("high", text, "record them again if they are many"))
    unused = sorted({*table.splits} - {"train", "val"})
    if unused:
        text = f"its split {', '.join(unused)} is neither trained nor evaluated on, only counted"
        found.append(Finding("middle", text, "call held-out episodes val"))
    unlabeled = int((~table.episodes["labeled"] & (table.episodes["count"] > 0)).sum())
    if unlabeled:
        text = f"{unlabeled} of {len(table.episodes)} episodes have no instruction"
        found.append(Finding("middle", text, "they are left out; write one into every step"))
    return found


def idle_findings(actions: np.ndarray, stats: Mapping, target: np.ndarray) -> list[Finding]:
    """Many frames without motion."""
    spread = np.array(stats["q99"]) - np.array(stats["q01"])
    moving = spread > 0
    motion = np.where(target, np.diff(actions, axis=0, prepend=actions[:1]), actions)
    still = np.abs(motion[:, moving]) < 1e-3 * spread[moving]
    idle = still.all(1).mean() if moving.any() else 0.0
    if idle <= 0.05:
        return []
    return [Finding("middle", f"{idle:.0%} of all frames command no motion, and policies copy such "
                    "pauses", "remove them")]


def spans(numbers: np.ndarray) -> str:
    """Ascending numbers in short: 0-2, 7."""
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
    return ", ".join(f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
