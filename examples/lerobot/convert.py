"""Convert a LeRobot dataset, v2.1 or v3.0, to RLDS for training.

    python examples/lerobot/convert.py --source ~/lerobot/my_robot --out datasets --name my_robot --fps 10

First checks all numbers and counts, and reads every video's packets, so that damage is reported
before anything is written. Then encodes each episode's images as JPEGs on all cores, one file per
episode in OUT/.NAME.episodes: an interrupted command continues where it stopped. Finally prints the
lines for the YAML and the warnings of `data.py --inspect`.

Read convert. lerobot_format.py reads the files, and machinery/guess.py interprets actions.
"""

import argparse
import functools
import hashlib
import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's modules

from machinery.config import UserError, exit_with_one_line  # first: it names a missing package

# isort: split

import msgpack
import numpy as np
import simplejpeg
from lerobot_format import Episode, LeRobotSet, open_set, read_numbers, rlds_name
from lerobot_images import as_array, check_video, read_pictures
from resample import lost_commands, resample
from tqdm import tqdm

from machinery.convention import number_labels
from machinery.fields import write_recipe
from machinery.frames import end_with_parent
from machinery.guess import Dimension, assumptions, field_list, guess_kinds
from machinery.host import cores
from machinery.inspect_data import TO_TRAIN, Subject, as_yaml, guess_recipe, write_yaml
from machinery.rlds import EPISODE, DataError, write_rlds
from machinery.survey import survey
from machinery.survey_timing import looks_like_targets

JPEG_QUALITY = 95


def convert(source: Path, out: Path, name: str, image_size: int, fps: float | None, episodes: str | None,
            override: str | None, workers: int, yaml: Path | None = None) -> None:
    """Convert the dataset and print a report."""
    for path in filter(None, (out / name / "1.0.0", yaml)):
        if path.exists():
            raise UserError(f"{path} exists: remove it, or choose another name")
    dataset = open_set(source)
    chosen = choose(dataset, episodes)
    step = frame_step(dataset.fps, fps)
    read_numbers(dataset, chosen)
    dimensions = describe_actions(dataset, chosen, override)
    with ProcessPoolExecutor(workers, get_context("fork"), end_with_parent) as pool:
        check_videos(dataset, chosen, pool)
        print(f"source {source} version {dataset.version} fps {dataset.fps:g} episodes {len(chosen)} frames "
              f"{sum(episode.length for episode in chosen)}")
        for note in dataset.notes:
            print(f"note: {note}")
        scratch = out / f".{name}.episodes"
        scratch.mkdir(parents=True, exist_ok=True)
        make = functools.partial(write_pictures, dataset=replace(dataset, episodes=[]), size=image_size,
                                 # episodes hold many numbers: send them once
                                 step=step, scratch=scratch)
        splits = {split: Episodes(part, make, functools.partial(as_steps, dataset, dimensions, step), pool)
                  for split in ("train", "val")
                  if (part := [e for e in chosen if (e.index in dataset.held_out) == (split == "val")])}
        try:
            path = write_rlds(out, name, "1.0.0", features(dataset, chosen, image_size), splits)
        except BaseException:
            print(f"finished episodes are kept for the next command in {scratch}")
            raise
    shutil.rmtree(scratch)
    (path / "recording.json").write_text(json.dumps({"fps": dataset.fps / step}) + "\n")  # for eval_vla.py
    report(dataset, chosen, dimensions, step, path, yaml)


# ---- Options -----------------------------------------------------------------------------------


def choose(dataset: LeRobotSet, wanted: str | None) -> list[Episode]:
    """The episodes of --episodes ("0-9,12"); all of them without it."""
    if wanted is None:
        return dataset.episodes
    numbers: set[int] = set()
    for part in wanted.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdecimal() or not (last or first).isdecimal():
            raise UserError(f"--episodes {wanted}: {part.strip()!r} is no number or range; write 0-9,12")
        asked = range(int(first), int(last or first) + 1)  # its length is up to the user
        numbers |= {*asked[: len(dataset.episodes) + 1]}
    there = {episode.index: episode for episode in dataset.episodes}
    if missing := sorted(numbers - there.keys()):
        raise UserError(f"--episodes {wanted}: {dataset.source} has no frames of episode {missing[0]}; it "
                        f"has {min(there, default='none')} to {max(there, default='none')}")
    if numbers and not numbers - dataset.held_out:
        raise UserError(f"--episodes {wanted}: none of them is in the split train of {dataset.source}")
    return [there[number] for number in sorted(numbers)]


def frame_step(recorded: float, fps: float | None) -> float:
    """The number of recorded frames per written frame."""
    if fps is not None and not 0 < fps <= recorded:
        raise UserError(f"--fps {fps:g}: the dataset has {recorded:g}: choose that or fewer")
    return recorded / (fps or recorded)


def kept_frames(length: int, step: float) -> np.ndarray:
    """The frames of an episode to write."""
    frames = np.rint(np.arange(np.ceil(length / step)) * step).astype(np.int64)
    return frames[frames < length]


def describe_actions(dataset: LeRobotSet, chosen: list[Episode], override: str | None) -> list[Dimension]:
    """The kind of each action dimension."""
    names = []
    for key in dataset.action:
        width = chosen[0].numbers[key].shape[1]
        names += number_labels(rlds_name(key), width, {rlds_name(key): dataset.names[key]})
    actions = [together(episode, dataset.action) for episode in chosen]
    states = [together(episode, dataset.state) for episode in chosen] if dataset.state else None
    return describe(names, actions, states, override)


def describe(names: list[str], actions: list[np.ndarray], states: list[np.ndarray] | None = None,
             override: str | None = None) -> list[Dimension]:
    """The kinds of the dimensions of episodes' actions, (T, A) each. states: (T, P) each."""
    every = np.concatenate(actions)
    columns = {"action": every} | ({"proprio": np.concatenate(states)} if states else {})
    frames = np.zeros(len(every), [(name, "<f4", values.shape[1:]) for name, values in columns.items()])
    for name, values in columns.items():
        frames[name] = values
    episodes = np.zeros(len(actions), EPISODE)
    episodes["count"] = [len(episode) for episode in actions]
    episodes["first"] = np.cumsum(episodes["count"]) - episodes["count"]
    stats = {f"q{q:02d}": np.quantile(frames["action"], q / 100, axis=0) for q in (1, 99)}
    return guess_kinds(names, every, looks_like_targets(frames, episodes, stats), override)


def together(episode: Episode, keys: list[str]) -> np.ndarray:
    """Some features of an episode, side by side: (T, k)."""
    return np.concatenate([episode.numbers[key] for key in keys], axis=1)


def check_videos(dataset: LeRobotSet, chosen: list[Episode], pool: ProcessPoolExecutor) -> None:
    """Raise DataError if videos are missing or short, before anything is written."""
    files: dict[Path, list] = {}
    frames: Counter[Path] = Counter()  # of all episodes
    for episode in dataset.episodes:
        frames.update({video.path: episode.length for video in episode.videos.values()})
    for episode in chosen:
        for path, start in episode.videos.values():
            files.setdefault(path, []).append((episode.index, start, episode.length))
    found = pool.map(check_video, files, files.values(), [dataset.fps] * len(files))
    bar = tqdm(found, "check", len(files), unit="video", leave=False, delay=1, disable=None)
    problems, longer = [], []
    for path, (problem, count) in zip(files, bar, strict=True):
        if problem:
            problems.append(problem)
        elif count > frames[path]:
            longer.append(f"{path} ({count}, its episodes {frames[path]})")
    if problems:
        more = f" ({len(problems) - 1} other videos are broken, too)" if len(problems) > 1 else ""
        raise DataError(problems[0] + more)
    if longer:
        print(f"warning: {len(longer)} videos have more frames than their episodes, the first {longer[0]}: "
              "look at the contact sheet: images may be of another time than the actions")


# ---- Images, on all cores ----------------------------------------------------------------------


def write_pictures(episode: Episode, dataset: LeRobotSet, size: int, step: float, scratch: Path) -> Path:
    """Encode the JPEGs of an episode, unless an earlier command did so from the same files -> the
    file that holds {camera: [JPEG, ...]}."""
    files = [episode.data, *(video.path for video in episode.videos.values())]
    changed = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    path = scratch / hashlib.sha256(repr((changed, episode.index, size, step)).encode()).hexdigest()
    if not path.exists():
        frames = kept_frames(episode.length, step)
        made = {camera: [as_jpeg(x, size) for x in read_pictures(dataset, episode, camera, frames)]
                for camera in dataset.cameras}
        partial = path.with_suffix(f".{os.getpid()}.tmp")
        partial.write_bytes(msgpack.packb(made))
        partial.rename(path)
    return path


def as_jpeg(picture, size: int) -> bytes:
    """An image as JPEG. A JPEG of the right size is kept unchanged."""
    if isinstance(picture, bytes) and picture.startswith(b"\xff\xd8"):
        height, width, *_ = simplejpeg.decode_jpeg_header(picture)
        if (height, width) == (size, size) or not size:
            return picture
    return simplejpeg.encode_jpeg(np.ascontiguousarray(as_array(picture, size)), JPEG_QUALITY,
                                  colorsubsampling="420")


class Episodes:
    """Episodes for write_rlds, in order, with a length for its progress bar. `pool` encodes images
    at most a few episodes ahead of the writer."""

    def __init__(self, episodes: list[Episode], make: Callable, as_steps: Callable,
                 pool: ProcessPoolExecutor):
        self.episodes, self.make, self.as_steps, self.pool = episodes, make, as_steps, pool

    def __len__(self) -> int:
        return len(self.episodes)

    def __iter__(self) -> Iterator[dict]:
        jobs, ahead = [], 2 * self.pool._max_workers
        for number, episode in enumerate(self.episodes):
            for later in self.episodes[number + len(jobs) : number + ahead]:
                jobs.append(self.pool.submit(self.make, replace(later, numbers={})))
            yield self.as_steps(episode, msgpack.unpackb(jobs.pop(0).result().read_bytes()))


# ---- An episode in RLDS ------------------------------------------------------------------------


def features(dataset: LeRobotSet, chosen: list[Episode], size: int) -> dict:
    """The layout of an episode, in TFDS' terms."""
    import tensorflow_datasets as tfds

    f, layout = tfds.features, {"observation": {}}
    for key in [*dataset.cameras, *dataset.names]:
        name = rlds_name(key, key in dataset.cameras)
        place = layout["observation"] if name.startswith("observation/") else layout
        short = name.removeprefix("observation/")
        if short in place:
            raise UserError(f"{dataset.source}: two of its features would be called {name}: rename {key}")
        if key in dataset.cameras:
            place[short] = f.Image(shape=(size or None, size or None, 3), encoding_format="jpeg")
        else:
            values = chosen[0].numbers[key]
            place[short] = f.Tensor(shape=values.shape[1:], dtype=stored_type(dataset, key, values))
    return {"steps": f.Dataset({**layout, "language_instruction": f.Text(), "is_first": np.bool_,
                                "is_last": np.bool_, "is_terminal": np.bool_}),
            "episode_metadata": {"episode_index": np.int64}}


def stored_type(dataset: LeRobotSet, key: str, values: np.ndarray) -> type:
    """The type of a feature's numbers in RLDS. Means of actions are not whole."""
    return np.float32 if values.dtype.kind == "f" or key in dataset.action else np.int64


def at_frames(dataset: LeRobotSet, episode: Episode, dimensions: list[Dimension], step: float
              ) -> dict[str, np.ndarray]:
    """The features of numbers at the written frames, (frames, k) each."""
    frames = kept_frames(episode.length, step)
    kinds = iter([dimension.kind for dimension in dimensions])
    found = {}
    for key in dataset.names:
        values = episode.numbers[key]
        values = values.astype(stored_type(dataset, key, values))
        if key in dataset.action:
            found[key] = resample(values, np.array([next(kinds) for _ in range(values.shape[1])]), frames)
        elif key.startswith(("action", "next.")):  # what follows a frame: that of the last until the next
            found[key] = values[np.append(frames[1:], len(values)) - 1]
        else:
            found[key] = values[frames]
    return found


def as_steps(dataset: LeRobotSet, dimensions: list[Dimension], step: float, episode: Episode,
             pictures: dict[str, list[bytes]]) -> dict:
    """An episode as write_rlds expects it."""
    columns = {**pictures, **at_frames(dataset, episode, dimensions, step)}
    frames = kept_frames(episode.length, step).tolist()
    steps = []
    for i, frame in enumerate(frames):
        made = {"observation": {}}
        for key, values in columns.items():
            name = rlds_name(key, key in pictures)
            place = made["observation"] if name.startswith("observation/") else made
            place[name.removeprefix("observation/")] = values[i]
        last = i == len(frames) - 1
        steps.append({**made, "language_instruction": episode.texts[frame],
                      "is_first": i == 0, "is_last": last, "is_terminal": last})
    return {"steps": steps, "episode_metadata": {"episode_index": episode.index}}


# ---- Report ------------------------------------------------------------------------------------


def report(dataset: LeRobotSet, chosen: list[Episode], dimensions: list[Dimension], step: float,
           path: Path, yaml: Path | None) -> None:
    """Write the recipe into the dataset's directory, and print it with what it rests on and the
    warnings of data.py --inspect."""
    kept = [kept_frames(episode.length, step) for episode in chosen]
    print(f"written {path} fps {dataset.fps / step:g} episodes {len(chosen)} frames {sum(map(len, kept))}")
    for number, dimension in enumerate(dimensions):
        print(f"action {number} name {dimension.name} kind {dimension.kind} min {dimension.low:.4g} max "
              f"{dimension.high:.4g}{dimension.words}")
    widths = {rlds_name(key): chosen[0].numbers[key].shape[1] for key in dataset.action}
    names = {rlds_name(key): dataset.names[key] for key in dataset.action + dataset.state if dataset.names[key]}
    guessed = guess_recipe(path)
    recipe = replace(guessed, action=field_list(widths, dimensions), names=names)
    write_recipe(path, recipe)
    subject = Subject(path.parent.name, path, recipe, "converted")
    table = subject.table(None, skip_bad_episodes=True)
    if table.unused:
        print(f"unused {', '.join(table.unused)}")
    for note in assumptions(dimensions):
        print(f"note: {note}")
    for finding in survey(table, subject.kind):
        print(f"warning: {finding}")
    lost = sum(lost_commands(together(episode, dataset.action), dimensions, frames)
               for episode, frames in zip(chosen, kept, strict=True))
    for dimension, times in zip(dimensions, lost, strict=True):
        if times:
            print(f"warning: {dimension.name} moves and returns within a written frame {times} times: commands "
                  "shorter than a frame are lost: convert with a higher --fps")
    if dataset.fps / step > 20:
        print(f"note: {dataset.fps / step:g} frames a second: 8 steps, as many as the policy predicts at once, "
              f"take {8 * step / dataset.fps:.2g} s: with --fps 10 they take 0.8 s")
    print(f"{TO_TRAIN}\n{as_yaml(subject)}", end="")
    if yaml:
        write_yaml(subject, yaml)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--source", type=Path, required=True, help="the folder with meta/info.json")
    parser.add_argument("--out", type=Path, default=Path("datasets"), help="the folder of all datasets")
    parser.add_argument("--name", required=True, help="the new dataset's name")
    parser.add_argument("--image_size", type=int, default=256,
                        help="side of the square images; 0: keep their size")
    parser.add_argument("--fps", type=float,
                        help="resample to fewer frames per second; 5 to 10 work well")
    parser.add_argument("--episodes", metavar="0-9,12", help="only these")
    parser.add_argument("--action", choices=("target", "change"),
                        help="override the detected kind: positions to reach, or displacements")
    parser.add_argument("--yaml", type=Path, metavar="FILE", help="write a YAML to train with")
    parser.add_argument("--workers", type=int, default=cores(), help="processes; default: one per core")
    args = parser.parse_args()
    with exit_with_one_line():
        if args.image_size < 0 or args.workers < 1 or not re.fullmatch(r"[^./:][^/:]*", args.name):
            raise UserError(f"--image_size {args.image_size} --workers {args.workers} --name {args.name!r}: "
                            "must be at least 0, at least 1, and a folder's name")
        convert(args.source.expanduser(), args.out, args.name, args.image_size, args.fps, args.episodes,
                args.action, args.workers, args.yaml)


if __name__ == "__main__":
    main()
