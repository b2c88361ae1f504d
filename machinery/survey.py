"""The survey of a dataset: faults that raise no error but spoil a training.

`survey` looks at a frame table and returns findings, each with the evidence in numbers and the
cure. A training runs this file as a program when it starts and prints the few that would spoil it;
`python data.py --inspect DIR` prints all. KINDS lists them. How to read it: `survey` here calls the
checks, which are short functions of one shape (measure, threshold, finding) in survey_numbers.py
(scale and rotations), survey_timing.py, and survey_pictures.py (pictures, copies, instructions).

The central measurement is `round_trip`: an action that is recorded, normalized and encoded as
tokens should come back, to within half a bin, when the tokens are decoded and unnormalized. A
policy cannot give better actions than these.
"""

import json
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from signal import alarm

import numpy as np

from machinery.config import load_table
from machinery.files import read_json, write_json
from machinery.frames import FrameTable, digest
from machinery.survey_numbers import (
    Finding,
    Sample,
    Signal,
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
    stuck_states,
    target_findings,
)

SURVEY_VERSION = 4  # change it when a survey would find something else
MOST = 5  # findings that a training prints
LONGEST = 300  # seconds: a training waits for it, and its other ranks for 10 minutes at most

KINDS = load_table("findings")  # {kind: fault}, in the order in which a training prints them


def survey(table: FrameTable, normalization: str = "bounds_q99", action_chunk: int = 2
           ) -> list[Finding]:
    """Whatever is wrong with a dataset, the worst first.

    normalization: one of TrainConfig.action_normalization; action_chunk: steps that are predicted
    at once
    """
    sample = Sample(table)
    found = [*table_findings(table)]
    if len(sample.rows):
        held_out = held_out_episodes(table, sample.numbers)
        every = signals(sample, table, normalization)
        motion = (every[0] if every[0].place.any() else every[-1]).motion
        moved = motion > 0.2 * np.median(motion[motion > 0]) if motion.any() else motion > 0
        found += number_findings(every, table, normalization, action_chunk)
        found += language_findings(table, sample, held_out)
        found += missing_pictures(table, sample)
        found += picture_findings(table, sample, moved)
        found += twin_findings(sample, held_out)
    return sorted(found, key=rank)


def rank(finding: Finding) -> tuple[str, int]:
    """Smaller for worse ones."""
    return finding.severity, list(KINDS).index(finding.kind)


def number_findings(every: list[Signal], table: FrameTable, normalization: str, action_chunk: int
                    ) -> list[Finding]:
    """The findings about actions and states (`every`)."""
    found = []
    for signal in every:
        own = [*scale_findings(signal, normalization), *rotation_findings(signal)]
        signal.leave_out(own)
        found += own
    explained = {dim for finding in found for dim in finding.dims if finding.of == "action"}
    action, *states = every
    found += lost_actions(action, table, normalization, explained)
    for signal in every:
        found += end_findings(signal)
    found += jump_findings(every[-1])
    found += idle_findings(action, every[-1].motion)
    found += opposite_grippers(action)
    if action_chunk > 1:
        found += target_findings(action, states, table)
    for state in states:
        found += copy_findings(action, state)
        found += delay_findings(action, state)
        found += stuck_states(action, state)
        if normalization == "normal":
            found += still_states(state)
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
    half_bin = np.where(raw, 1.0, abs(one - zero)) / (tokenizer.n_bins - 1)
    error = abs(returned - recorded)
    rounding = 1e-6 * abs(recorded).max(0, initial=1e-9)
    wrong = error > half_bin * 1.001 + rounding
    motion = abs(recorded - np.median(recorded, axis=0)).sum(0)
    return {
        "half_bin": half_bin,
        "error": np.where(wrong, 0, error).max(0),
        "clipped": wrong.mean(0),
        "lost": np.where(wrong, error, 0).sum(0) / np.maximum(motion, 1e-12),
    }


def lost_actions(action: Signal, table: FrameTable, kind: str, explained: Collection[int]
                 ) -> Iterator[Finding]:
    """Dimensions of the actions that do not come back: a finding for each cure. explained: those
    whose range another finding explains."""
    stats = table.statistics["action"]
    every = len(action.values) // 4096 + 1
    few = action.values[::every]
    back = round_trip(few, stats, kind)
    # a spike of one frame is not motion, and better clipped
    lost = round_trip(action.calm[::every], stats, kind)["lost"]
    raw = action.raw
    low, high, q01, q99 = (np.array(stats[key]) + 0.0 for key in ("min", "max", "q01", "q99"))
    full = np.select([high <= 100, high <= 255, high <= 1000], [100, 255, 1000], high)
    many = np.array([len(np.unique(column)) > 16 for column in few.T])
    facts = {"low": low, "high": high, "q01": q01, "q99": q99, "full": full,
             "bins": (high - low) * 127.5, "clipped": back["clipped"]}
    reach = "ranges from {low:.4g} to {high:.4g}"
    reasons = [  # of which the first counts: which dimensions, why, the cure
        (low == high, "never changes (always {low:.4g})",
         "the model learns 0 for it; leave it out of the recipe if that is wrong"),
        (raw & (np.maximum(-low, high) > 1.001), f"is raw, {reach}, and is clipped to -1..1",
         "divide it in the recipe ('gripper /{full:g} target raw'), or remove raw"),
        (raw & (high - low < 0.51), f"is raw and {reach}, which is {{bins:.0f}} of 256 bins",
         "scale it to 0..1 in the recipe, or remove raw"),
        (raw & (low < -0.001) & many,
         f"is raw and {reach} with many values between, like a position or an angle",
         "remove raw (or `absolute`) from the recipe, so that it is normalized"),
        (~raw & (kind == "bounds_q99") & ((q01 == q99) | (lost > 0.5)),
         f"{reach}, but 98% of it is within {{q01:.4g}}..{{q99:.4g}}: the rest is clipped, and "
         "will never be commanded", "action_normalization: bounds"),
        (back["clipped"] > 0.05 + 3 / len(few),  # of a few frames, q99 clips more
         f"{reach}; {kind!r} clips {{clipped:.0%}} of its values",
         "action_normalization: bounds" + "_q99" * (kind != "bounds_q99"))]
    left = ~np.isin(np.arange(len(raw)), [*explained])
    for which, text, cure in reasons:
        dims = np.flatnonzero(which & left)
        left &= ~which
        if len(dims):
            first = {name: column[dims[0]] for name, column in facts.items()}
            text += f" (dimension {dims[0]})" * (len(dims) > 1)
            yield action.finding("range", dims, None, text.format(**first), cure.format(**first),
                                 "medium" if which is reasons[0][0] else "high")


# ---- States, episodes and pictures that are missing ----------------------------------------------


def still_states(state: Signal) -> Iterator[Finding]:
    """With the normalization "normal": states without deviation, by which they are divided."""
    still = np.ptp(state.values, axis=0) == 0
    if still.any():
        yield state.finding("still_state", still, None,
                            "never change, so any other value becomes a huge number",
                            "leave them out of `state`, or action_normalization: bounds_q99")


def table_findings(table: FrameTable) -> Iterator[Finding]:
    """Episodes that are not used, and no camera."""
    if table.bad:
        text = f"{len(table.bad)} bad episodes are left out, the first: {table.bad[0]}"
        yield Finding("bad_episodes", "high", text, "record them again if they are many", "episode")
    unused = sorted({*table.splits} - {"train", "val"})
    if unused:
        text = f"its split {', '.join(unused)} is neither trained nor evaluated on, only counted"
        yield Finding("unused_split", "medium", text, "call held-out episodes val", "episode")
    if not any(table.cameras):
        text = "its recipe has none of the `cameras`, so all its images are black"
        yield Finding("no_camera", "high", text, "name one in the recipe, or leave the dataset out")


def missing_pictures(table: FrameTable, sample: Sample) -> Iterator[Finding]:
    """Cameras that have no image in some frames."""
    for number, key in enumerate(table.cameras):
        empty = sample.frames["length"][:, number] == 0
        if key and empty.any():
            text = (f"{key} has no image in {empty.sum()} of {len(empty)} frames, which are black, "
                    f"{sample.where(empty)}")
            yield sample.finding("no_camera", key, text, "data.py --check lists them", empty)


# ---- The program that a training starts ----------------------------------------------------------


def cached_survey(table: FrameTable, options: dict) -> list[Finding]:
    """The survey of one dataset, which is kept in the folder of its frame table."""
    file = table.path / f"survey-{digest((SURVEY_VERSION, options))}.json"
    if file.exists():
        return [Finding(**values) for values in read_json(file)]
    found = survey(table, **options)
    try:
        write_json(file, [finding._asdict() for finding in found])
    except OSError:  # not ours to write: it takes as long again next time
        pass
    return found


def inverted_grippers(tables: Mapping[str, FrameTable]) -> Iterator[tuple[str, Finding]]:
    """(dataset, finding) of those whose gripper begins closed if that of others begins open."""
    starts = {}  # {dataset: the mean of the last dimension in the first frames}, of raw grippers
    for name, table in tables.items():
        if not table.statistics["action"]["mask"][-1]:
            first = table.first_frames[table.episodes["count"] > 0]
            starts[name] = float(table.frames["action"][first, -1].mean())
    opened = [name for name, start in starts.items() if start > 0.9]
    for name, start in starts.items():
        if opened and start < 0.1:
            text = (f"its gripper begins at {start:.2g}, that of {opened[0]} at "
                    f"{starts[opened[0]]:.2g}: is 1 closed in one of them?")
            yield name, Finding("gripper", "high", text, "write `invert` in its recipe", "action")


def opposite_grippers(action: Signal) -> Iterator[Finding]:
    """A few episodes whose gripper both begins and ends as the opposite of the others."""
    sample = action.sample
    upper = action.values > (action.values.min(0) + action.values.max(0)) / 2
    edges = np.stack([upper[sample.first], upper[sample.last]])  # (2, E, D)
    # an object in the hand changes the first or the last state, hardly both
    odd = (edges != np.median(edges, axis=1, keepdims=True)).sum(0)  # (E, D), of 2
    dims = action.raw & action.place & ((odd == 0).mean(0) >= 0.8) & (odd == 2).any(0)
    if dims.any():
        bad = (odd[:, dims] == 2).any(1)[sample.episode]
        yield action.finding("gripper", dims, bad, "begins and ends as the opposite of the others "
                             f"{sample.where(bad)}: is 1 closed there?",
                             "invert it in these episodes, or leave them out", "medium")


def mixture_lines(job: dict) -> list[str]:
    """The lines that a training prints about its datasets.

    job: datasets ({name: (frame table, directory)}), options of `survey`, accept
    """
    tables = {name: FrameTable(Path(path), Path(directory))
              for name, (path, directory) in job["datasets"].items()}
    found = [*inverted_grippers(tables)]  # (dataset, finding)
    for name, table in tables.items():
        found += [(name, finding) for finding in cached_survey(table, job["options"])]
    found = [(name, finding) for name, finding in found
             if not {finding.kind, f"{name}.{finding.kind}"} & {*job["accept"]}]
    found.sort(key=lambda pair: rank(pair[1]))
    shown = [pair for pair in found[:MOST] if pair[1].severity == "high"]
    lines = [f"warning: {name}: {finding}" for name, finding in shown]
    for name, count in Counter(name for name, _ in found[len(shown) :]).items():
        lines.append(f"more_findings {count} {name}: python data.py --inspect "
                     f"{tables[name].directory}")
    return lines


def main() -> None:
    """Print the lines of the job in the argument."""
    alarm(LONGEST)  # then the system ends this process
    print("\n".join(mixture_lines(json.loads(sys.argv[1]))))


if __name__ == "__main__":
    main()
