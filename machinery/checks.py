"""What goes wrong with a dataset without any error, found before anything is trained on it.

An action that is recorded, normalised and turned into tokens should come back, to within half a bin, when the
tokens are decoded and un-normalised again: a policy can give no better actions than these. `round_trip` tries
it, for every dimension. Warnings name the dimension, what is lost, and the cure; they are made when a dataset
is indexed (rlds.py), and a training's log says them at its start.
"""

from collections.abc import Mapping

import numpy as np

from action_tokenizer import ActionTokenizer, normalize, unnormalize

SAMPLE = 4096  # frames, and episodes, that are looked at


def round_trip(recorded: np.ndarray, stats: Mapping, kind: str) -> dict[str, np.ndarray]:
    """Actions (N, A) in standard form -> for each of the A dimensions

    half_bin    half the width of a bin, in the dataset's units: as near as it can come
    error       the largest difference of what comes back, among values that were not cut off
    cut         the share of values that come back wrong by more than half a bin
    lost        the share of its motion (sum of distances from the median) that does not come back
    """
    tokenizer, raw = ActionTokenizer(512), ~np.array(stats["mask"])
    returned = unnormalize(tokenizer.decode(tokenizer.encode(normalize(recorded, stats, kind))), stats, kind)
    zero, one = (unnormalize(np.full(len(raw), value), stats, kind) for value in (0.0, 1.0))
    half_bin = np.where(raw, 1.0, np.abs(one - zero)) / (tokenizer.n_bins - 1)
    difference = np.abs(returned - recorded)
    wrong = difference > half_bin * 1.001 + 1e-6 * np.abs(recorded).max(0, initial=1e-9)
    motion = np.abs(recorded - np.median(recorded, axis=0)).sum(0)
    return {"half_bin": half_bin, "error": np.where(wrong, 0, difference).max(0), "cut": wrong.mean(0),
            "lost": np.where(wrong, difference, 0).sum(0) / np.maximum(motion, 1e-12)}


def action_warnings(actions: np.ndarray, stats: Mapping, kind: str) -> list[str]:
    """One line for each dimension of a dataset's actions (N, A) that does not come back. stats: "action" of
    its dataset_statistics.json."""
    actions = actions[np.unique(np.linspace(0, len(actions) - 1, SAMPLE).astype(int))]
    back, found = round_trip(actions, stats, kind), []
    low, high, q01, q99 = (np.array(stats[key]) for key in ("min", "max", "q01", "q99"))
    for d, raw in enumerate(~np.array(stats["mask"])):
        reach, cut = f"goes from {low[d]:.4g} to {high[d]:.4g}", back["cut"][d]
        if low[d] == high[d]:
            problem = f"never changes (always {low[d]:.4g}): it is trained as 0"
        elif raw and max(-low[d], high[d]) > 1.001:
            problem = (f"is raw and {reach}: what lies beyond -1..1 is cut off: divide it in the recipe (as "
                       "in 'gripper /255 target raw'), or remove raw")
        elif raw and high[d] - low[d] < 0.5:
            problem = (f"is raw and {reach}: it uses {(high[d] - low[d]) * 127.5:.0f} of 256 bins: scale it "
                       "to 0..1 in the recipe, or remove raw")
        elif raw and low[d] < -0.001 and len(np.unique(actions[:, d])) > 16:
            problem = (f"is raw and {reach}, with many values between: a position or angle should be "
                       "normalised: remove raw (or `absolute`) in its recipe")
        elif not raw and kind == "bounds_q99" and (q01[d] == q99[d] or back["lost"][d] > 0.5):
            problem = (f"{reach}, but 98 % of it lie within {q01[d]:.4g}..{q99[d]:.4g}: what lies beyond is "
                       "cut off, and will never be commanded: action_normalization: bounds")
        elif cut > 0.05:
            problem = (f"{reach}: {cut:.0%} of its values are cut off by the normalisation {kind!r}: "
                       f"action_normalization: {'bounds' if kind == 'bounds_q99' else 'bounds_q99'}")
        else:
            continue
        found.append(f"action dimension {d} {problem}")
    return found


def looks_like_targets(frames: np.ndarray, episodes: np.ndarray, stats: Mapping) -> np.ndarray:
    """Which dimensions look like places to go to, (A,) bool: never near zero, moving little from frame to
    frame (and not as the state's changes do), or followed by the state. stats: of the actions."""
    episodes = episodes[:: len(episodes) // 256 + 1]
    rows = np.concatenate([np.arange(e["first"], e["first"] + e["count"] - 1) for e in episodes]).astype(int)
    low, high = np.array(stats["q01"]), np.array(stats["q99"])
    if len(rows) < 2:
        return np.zeros(len(low), bool)
    actions, following = frames["action"][rows], frames["action"][rows + 1]
    smooth = np.abs(following - actions).mean(0) < 0.12 * np.maximum(actions.std(0), 1e-9)
    followed = np.zeros_like(smooth)
    if "proprio" in frames.dtype.names:
        state, before = frames["proprio"][rows + 1], frames["proprio"][rows]
        with_place = correlation(actions, state)
        with_change = correlation(actions, state - before).max(1)
        followed = (with_place > 0.98).any(1)
        # a velocity may be smooth, too: but then the state's changes are more like it than the state (by a
        # margin: on a circle, the change of y is like x)
        smooth &= (with_change < 0.7) | (with_change < np.abs(with_place).max(1) + 0.15)
    return (high > low) & ((low > 0) | (high < 0) | smooth | followed)


def correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of each column of (N, A) with each of (N, B) -> (A, B); 0 for a column that is constant."""
    both = np.nan_to_num(np.cov(a.T, b.T))[: a.shape[1], a.shape[1] :]
    return both / np.maximum(a.std(0), 1e-9)[:, None] / np.maximum(b.std(0), 1e-9)


def target_warnings(frames: np.ndarray, episodes: np.ndarray, stats: Mapping, target: np.ndarray
                    ) -> list[str]:
    """One line for the dimensions that are said to be changes, target (A,) bool, and look like places to go
    to: past the end of an episode, their labels jump to the middle of their range."""
    dims = np.flatnonzero(~target & looks_like_targets(frames, episodes, stats))
    one = len(dims) == 1
    return [f"action dimension{'s' * (not one)} {spans(dims)} look{'s' * one} like "
            f"{'a place' if one else 'places'} to go to (a joint's angle, a pose) and not like changes: then "
            "say `target` in the recipe; as a change, a label past the end of an episode is the middle of "
            "its range"] if len(dims) else []


def turn_warnings(actions: np.ndarray, episodes: np.ndarray, target: np.ndarray) -> list[str]:
    """One line for each dimension that goes round: an angle that jumps from pi to -pi, or a difference of
    such angles. Either is then scaled to its jumps, and what moves the robot is left a bin or two."""
    inside = np.ones(len(actions), bool)
    inside[episodes["first"][episodes["count"] > 0]] = False  # no step leads from one episode to the next
    found = []
    for d, values in enumerate(actions.T):
        steps = np.abs(np.diff(values, prepend=values[:1])[inside] if target[d] else values)
        for turn, name in ((2 * np.pi, "2 pi"), (360, "360")):
            far = steps[steps > turn / 2]  # a jump is nearly a whole turn, and nothing is half of one
            rare = 0 < len(far) < 0.1 * len(steps)  # others may go to and fro by as much
            if rare and far.min() > 0.9 * turn and far.max() <= 1.001 * turn:
                found.append(f"action dimension {d} jumps by about {name} in {len(far)} frames, as an angle "
                             "that goes round: record it so that it does not (numpy.unwrap in each episode, "
                             "or counted from where the robot never is)")
    return found


def copy_warnings(frames: np.ndarray, stats: Mapping) -> list[str]:
    """One line where actions are the state of their own frame, as when an arm is led by hand. (A gripper's
    two values may well be.) stats: of the actions."""
    if "proprio" not in frames.dtype.names:
        return []
    frames = frames[np.unique(np.linspace(0, len(frames) - 1, SAMPLE).astype(int))]
    moved = frames["action"] != np.median(frames["action"], axis=0)  # (N, A)
    same = moved[..., None] & (frames["action"][..., None] == frames["proprio"][:, None])  # (N, A, P)
    share = same.sum(0).max(1, initial=0) / np.maximum(moved.sum(0), 1)
    dims = np.flatnonzero((share > 0.99) & stats["mask"])
    return [f"action dimensions {spans(dims)} are the state of the same frame: a policy that has learned it "
            "stays where it is: record what is commanded, or the next frame's state"] if len(dims) else []


def frame_warnings(frames: np.ndarray, episodes: np.ndarray, cameras: list[str | None],
                   instructions: list[str]) -> list[str]:
    """One line for each camera that has no picture in some frames, and for texts that are missing at some
    steps alone."""
    found = []
    for camera, key in enumerate(cameras):
        if key is not None and (empty := int((frames["length"][:, camera] == 0).sum())):
            found.append(f"{key} has no picture in {empty} of {len(frames)} frames: they are shown as black")
    shown = np.repeat(episodes["labeled"], episodes["count"])
    blank = [number for number, text in enumerate(instructions) if not text.strip()]
    if count := int(np.isin(frames["instruction"][shown], blank).sum()):
        found.append(f"{count} frames have no instruction where others of their episode have one: they are "
                     "trained on without words")
    return found


def spans(numbers: np.ndarray) -> str:
    """Ascending numbers in short: 0-2, 7."""
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
    return ", ".join(f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def table_warnings(frames: np.ndarray, episodes: np.ndarray, stats: Mapping, target: np.ndarray
                   ) -> dict[str, list[str]]:
    """All warnings of a frame table's numbers: for each kind of normalisation, and "chunks", what matters
    only where several actions are predicted at once. stats: its statistics; target: (A,) bool."""
    kinds, actions, state = ("bounds_q99", "bounds", "normal"), stats["action"], stats["proprio"]
    more = turn_warnings(frames["action"], episodes, target) + copy_warnings(frames, actions)
    found = {kind: action_warnings(frames["action"], actions, kind) + more for kind in kinds}
    still = np.flatnonzero(np.array(state["min"]) == np.array(state["max"]))
    if "proprio" in frames.dtype.names and len(still):  # it is divided by nearly nothing
        found["normal"].append(f"state dimensions {spans(still)} never change: 'normal' makes huge numbers "
                               "of whatever else they are when it acts: leave them out in `state`, or choose "
                               "action_normalization: bounds_q99")
    return found | {"chunks": target_warnings(frames, episodes, actions, target)}
