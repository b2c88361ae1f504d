"""The survey of a dataset: faults that raise no error but spoil a training.

`survey` looks at a frame table and returns findings, with numbers and the cure. A training runs
this file as a program when it starts and prints the few that would spoil it; `python data.py
--inspect DIR` prints all. survey_numbers.py (scale and rotations), survey_timing.py and
survey_pictures.py hold the other checks.

The central measurement is `round_trip`: an action that is recorded, normalized and encoded as
tokens should come back, to within half a bin, when the tokens are decoded and unnormalized. A
policy cannot give better actions than these.
"""

import json
import sys
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from machinery.files import atomic
from machinery.frames import FrameTable, digest
from machinery.survey_numbers import (
    Finding,
    Sample,
    Signal,
    odd_episodes,
    rotation_findings,
    scale_findings,
    signals,
)
from machinery.survey_pictures import (
    held_out_episodes,
    language_findings,
    picture_findings,
    twin_findings,
)
from machinery.survey_timing import (
    copy_findings,
    delay_findings,
    end_findings,
    idle_findings,
    jump_findings,
    looks_like_targets,
    pace_findings,
)

__all__ = ["Finding", "looks_like_targets", "round_trip", "survey"]

SURVEY_VERSION = 1  # change it when a survey would find something else
MOST = 5  # findings that a training prints

KINDS = {  # in the order in which a training prints them
    "bad_episodes": "episodes that cannot be read",
    "no_camera": "no picture at all, or none in some frames",
    "range": "actions that do not come back from their tokens",
    "target_or_change": "targets that the recipe takes for changes",
    "episode_scale": "episodes in another unit",
    "outliers": "rare values that take the bins of all others",
    "jitter": "dimensions that are constant but for noise",
    "wraps": "angles that wrap",
    "quaternion_sign": "quaternions that change their sign",
    "quaternion_length": "quaternions whose length is not one",
    "rotation_vector": "rotation vectors that change their sign",
    "copies": "actions that equal the state of their frame",
    "delay": "actions that follow the state, or precede it by far",
    "ends": "first or last steps that are filled in",
    "jumps": "positions that jump within an episode",
    "dropped_frames": "steps much larger than those before and after",
    "still_state": "states that never move, by whose deviation they are divided",
    "gripper": "grippers that look inverted",
    "camera_hung": "the same picture while the robot moves",
    "equal_cameras": "two cameras with one picture",
    "blank": "pictures that are black, white, or of one color",
    "held_out_seen": "held-out episodes that are also trained on",
    "episode_twice": "the same episode twice",
    "no_instruction": "frames without an instruction",
    "idle": "frames without motion",
    "camera_slow": "pictures that are repeated",
    "repeated": "states that are repeated",
    "episode_speed": "episodes of another rate",
    "unused_split": "splits that are not used",
    "unlabeled": "episodes without an instruction",
    "one_instruction": "one instruction for all",
    "only_held_out": "instructions that are never trained on",
    "rare_instruction": "instructions of a single episode",
    "misspelled": "instructions that differ by a letter",
}


def survey(table: FrameTable, normalization: str = "bounds_q99", action_chunk: int = 2,
           pictures: bool = True, accept: Collection[str] = ()) -> list[Finding]:
    """Whatever is wrong with a dataset, the worst first.

    normalization: one of TrainConfig.action_normalization; action_chunk: steps that are predicted
    at once; pictures: look at them, too; accept: kinds of findings to leave out
    """
    sample = Sample(table)
    found = table_findings(table)
    if len(sample.rows):
        held_out = held_out_episodes(table, sample.numbers)
        action, *state = signals(sample, table, normalization)
        found += number_findings(sample, table, normalization, action_chunk)
        found += language_findings(table, sample, held_out)
        found += missing_pictures(table, sample)
        if pictures:
            motion = max([action, *state], key=lambda signal: signal.place.any()).motion
            moving = motion[motion > 0]
            moved = motion > 0.2 * np.median(moving) if len(moving) else motion > 0
            found += picture_findings(table, sample, moved)
            found += twin_findings(table, sample, held_out)
    order = [*KINDS]
    found = [finding for finding in found if finding.kind not in accept]
    return sorted(found, key=lambda finding: (finding.severity, order.index(finding.kind)))


def number_findings(sample: Sample, table: FrameTable, normalization: str, action_chunk: int
                    ) -> list[Finding]:
    """The findings about actions and states."""
    found = []
    every = signals(sample, table, normalization)
    for signal in every:
        odd, factor = odd_episodes(sample, signal)
        own = scale_findings(sample, signal, normalization, odd, factor)
        own += rotation_findings(sample, signal)
        signal.leave_out(own)
        found += own
        found += end_findings(sample, signal)
        found += pace_findings(sample, signal, odd.any(1))
    explained = {dim for finding in found for dim in finding.dims
                 if finding.of == "action" and finding.kind not in ("ends", "episode_speed")}
    action, *state = every
    found += jump_findings(sample, state[0] if state else action)
    found += action_findings(sample, action, table, normalization, explained)
    found += idle_findings(sample, action)
    if action_chunk > 1:
        found += target_findings(sample, action, table)
    if state:
        found += copy_findings(sample, action, state[0])
        found += delay_findings(sample, action, state[0])
        if normalization == "normal":
            found += state_findings(table.statistics["proprio"])
    return found


# ---- Actions that do not come back ---------------------------------------------------------------


def round_trip(recorded: np.ndarray, stats: Mapping, kind: str) -> dict[str, np.ndarray]:
    """Actions (N, A) in standard form -> for each of the A dimensions

    half_bin    half the width of a bin, in the dataset's units: the error to expect
    error       the largest error among values that were not clipped
    clipped     the share of values that come back wrong by more than half a bin
    lost        the share of the motion (sum of distances from the median) that does not come back

    stats: "action" of dataset_statistics.json; kind: of normalization
    """
    # here: it imports PyTorch, which a survey that is kept does not need
    from action_tokenizer import ActionTokenizer, normalize, unnormalize

    tokenizer = ActionTokenizer(512)  # any vocabulary: ids are decoded again at once
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


def action_findings(sample: Sample, signal: Signal, table: FrameTable, kind: str,
                    explained: Collection[int]) -> list[Finding]:
    """Dimensions of the actions that do not come back: a finding for each reason. explained: those
    whose range another finding explains."""
    stats = table.statistics["action"]
    actions = signal.values[:: len(signal.values) // 4096 + 1]
    back = round_trip(actions, stats, kind)
    low, high, q01, q99 = (np.array(stats[key]) for key in ("min", "max", "q01", "q99"))
    reasons = {}  # {(kind, severity, cure): [(dimension, text), ...]}
    for d, normalized in enumerate(stats["mask"]):
        span = high[d] - low[d]
        reach = f"ranges from {low[d]:.4g} to {high[d]:.4g}"
        many = len(np.unique(actions[:, d])) > 16
        what = "range"
        severity = "high"
        if d in explained:
            continue
        if span == 0:
            what = "range" if normalized else "gripper"
            severity = "medium" if normalized or table.openvla_rules else "high"
            text = f"never changes (always {low[d]:.4g})"
            cure = "the model learns 0 for it; leave it out of the recipe if that is wrong"
        elif not normalized and max(-low[d], high[d]) > 1.001:
            full = next((n for n in (100, 255, 1000) if high[d] <= n), f"{high[d]:.4g}")
            text = f"is raw, {reach}, and is clipped to -1..1"
            cure = f"divide it in the recipe ('gripper /{full} target raw'), or remove raw"
        elif not normalized and span < 0.51:
            text = f"is raw and {reach}, which is {span * 127.5:.0f} of 256 bins"
            cure = "scale it to 0..1 in the recipe, or remove raw"
        elif not normalized and low[d] < -0.001 and many:
            text = f"is raw and {reach} with many values between, like a position or an angle"
            cure = "remove raw (or `absolute`) from the recipe, so that it is normalized"
        elif normalized and kind == "bounds_q99" and (q01[d] == q99[d] or back["lost"][d] > 0.5):
            text = (f"{reach}, but 98% of it is within {q01[d]:.4g}..{q99[d]:.4g}: the rest is "
                    "clipped, and will never be commanded")
            cure = "action_normalization: bounds"
        elif back["clipped"][d] > 0.05 + 3 / len(actions):  # of a few frames, q99 clips more
            other = "bounds" if kind == "bounds_q99" else "bounds_q99"
            text = f"{reach}; {kind!r} clips {back['clipped'][d]:.0%} of its values"
            cure = f"action_normalization: {other}"
        else:
            continue
        reasons.setdefault((what, severity, cure), []).append((d, text))
    found = []
    for (what, severity, cure), entries in reasons.items():
        dims = [d for d, _ in entries]
        text = f"{signal.name(dims)}: {entries[0][1]}"
        if len(dims) > 1:
            text += f" (dimension {dims[0]})"
        bad = np.zeros(len(signal.values))
        found.append(sample.finding(what, "action", dims, bad, text, cure, severity))
    return found


# ---- Targets, and states that do not move --------------------------------------------------------


def target_findings(sample: Sample, signal: Signal, table: FrameTable) -> list[Finding]:
    """Dimensions that look like targets but are changes, though the recipe does not say so."""
    likely = looks_like_targets(table.frames, table.episodes, table.statistics["action"])
    dims = np.flatnonzero(~table.targets & ~table.declared & likely)
    if not len(dims):
        return []
    text = (f"{signal.name(dims)} look like targets (joint angles, a pose), not like changes: past "
            "the end of an episode, the labels jump to the middle of the range")
    return [sample.finding("target_or_change", "action", dims, np.zeros(len(signal.values)), text,
                           "write `target` after them in the recipe, or `change`")]


def state_findings(stats: Mapping) -> list[Finding]:
    """With the normalization "normal": states without deviation, by which they are divided."""
    still = np.flatnonzero(np.array(stats["min"]) == np.array(stats["max"]))
    if not len(still):
        return []
    numbers = ", ".join(map(str, still))
    text = f"state dimensions {numbers}: never change, so any other value becomes a huge number"
    cure = "leave them out of `state`, or action_normalization: bounds_q99"
    return [Finding("still_state", "high", text, cure, "state", tuple(still.tolist()))]


# ---- Episodes and pictures that are missing ------------------------------------------------------


def table_findings(table: FrameTable) -> list[Finding]:
    """Episodes that are not used."""
    found = []
    if table.bad:
        text = f"{len(table.bad)} bad episodes are left out, the first: {table.bad[0]}"
        found.append(Finding("bad_episodes", "high", text, "record them again if they are many",
                             "episode"))
    unused = sorted({*table.splits} - {"train", "val"})
    if unused:
        text = f"its split {', '.join(unused)} is neither trained nor evaluated on, only counted"
        found.append(Finding("unused_split", "medium", text, "call held-out episodes val",
                             "episode"))
    if not any(table.cameras):
        text = "its recipe has none of the `cameras`, so all its images are black"
        found.append(Finding("no_camera", "high", text,
                             "name one in the recipe, or leave the dataset out"))
    return found


def missing_pictures(table: FrameTable, sample: Sample) -> list[Finding]:
    """Cameras that have no image in some frames."""
    found = []
    for number, key in enumerate(table.cameras):
        empty = sample.frames["length"][:, number] == 0
        if key and empty.any():
            text = (f"{key} has no image in {empty.sum()} of {len(empty)} frames, which are black, "
                    f"{sample.where(empty)}")
            found.append(sample.finding("no_camera", key, (), empty, text,
                                        "data.py --check lists them"))
    return found


# ---- The program that a training starts ----------------------------------------------------------


def cached_survey(table: FrameTable, options: dict) -> list[Finding]:
    """The survey of one dataset, which is kept in the folder of its frame table."""
    file = table.path / f"survey-{digest((SURVEY_VERSION, options))}.json"
    if file.exists():
        return [Finding(**values) for values in json.loads(file.read_text())]
    found = survey(table, **options)
    try:
        with atomic(file) as scratch:
            scratch.write_text(json.dumps([finding._asdict() for finding in found]))
    except OSError:  # not ours to write: it takes as long again next time
        pass
    return found


def gripper_start(table: FrameTable) -> float | None:
    """The mean of the last dimension in the episodes' first frames, if it is a raw gripper."""
    if table.statistics["action"]["mask"][-1]:
        return None
    first = table.first_frames[table.episodes["count"] > 0]
    return float(table.frames["action"][first, -1].mean())


def inverted_grippers(tables: Mapping[str, FrameTable]) -> dict[str, Finding]:
    """{dataset: finding} of those whose gripper begins closed if that of others begins open."""
    starts = {name: gripper_start(table) for name, table in tables.items()}
    starts = {name: start for name, start in starts.items() if start is not None}
    opened = [name for name, start in starts.items() if start > 0.9]
    closed = [name for name, start in starts.items() if start < 0.1]
    if not (opened and closed):
        return {}
    found = {}
    for name in closed:
        text = (f"its gripper begins at {starts[name]:.2g}, that of {opened[0]} at "
                f"{starts[opened[0]]:.2g}: is 1 closed in one of them?")
        found[name] = Finding("gripper", "high", text, "write `invert` in its recipe", "action")
    return found


def mixture_lines(job: dict) -> list[str]:
    """The lines that a training prints about its datasets.

    job: datasets ({name: (frame table, directory)}), options of `survey`, accept
    """
    tables = {name: FrameTable(Path(path), Path(directory))
              for name, (path, directory) in job["datasets"].items()}
    inverted = inverted_grippers(tables)
    found = []  # (dataset, finding)
    for name, table in tables.items():
        every = cached_survey(table, job["options"])
        if name in inverted:
            every.append(inverted[name])
        found += [(name, finding) for finding in every
                  if not {finding.kind, f"{name}.{finding.kind}"} & {*job["accept"]}]
    order = [*KINDS]
    found.sort(key=lambda pair: (pair[1].severity, order.index(pair[1].kind)))
    shown = [pair for pair in found[:MOST] if pair[1].severity == "high"]
    lines = [f"warning: {name}: {finding}" for name, finding in shown]
    for name, count in Counter(name for name, _ in found[len(shown) :]).items():
        lines.append(f"more_findings {count} {name}: python data.py --inspect "
                     f"{tables[name].directory}")
    return lines


def main() -> None:
    """Print the lines of the job in the argument."""
    print("\n".join(mixture_lines(json.loads(sys.argv[1]))))


if __name__ == "__main__":
    main()
