"""Read LeRobot's formats, v2.1 and v3.0, with pyarrow.

    meta/info.json       fps, features, counts, and the files' paths
    meta/tasks.*         the text of each task_index
    meta/episodes*       each episode's length; in v3.0, its files and its place in them
    data/...parquet      one row per frame: its numbers, and the images of `image` features
    videos/...mp4        the images of `video` features

v2.1 has one parquet and one mp4 file per episode, v3.0 has files of many episodes. Every count is
checked, episode by episode, because with a missing file or a truncated video a dataset just looks
smaller.

Read open_set (the metadata) -> read_numbers -> lerobot_images.py.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from machinery.fields import parse_fields
from machinery.guess import action_fields, state_fields
from machinery.recipes import Feature
from machinery.rlds import DataError

LEAVE_OUT = "leave the episode out with --episodes"
BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "index", "task_index")
# GR00T's instructions: an index into meta/tasks in each frame
TASK = re.compile(r"annotation\.human\..*(task|instruction|description)")


class Video(NamedTuple):
    """The place of an episode's images of a camera: a file, and the second at which they begin."""

    path: Path
    start: float


@dataclass
class Episode:
    """One episode: its declared number of frames, and its files. Filled by read_numbers: numbers,
    {feature: (length, k)}, and texts, the instruction of each frame."""

    index: int
    length: int
    data: Path
    videos: dict[str, Video]
    numbers: dict[str, np.ndarray] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)


@dataclass
class LeRobotSet:
    """A dataset. cameras: {feature: "video" or "image"}; names: {feature of numbers: names of its
    dimensions, if known}; action, state: those of the features that are the robot's; listed: all
    features of meta/info.json; task_key: the feature with the number of the task; held_out: numbers
    of the episodes that are not in its split "train"; notes: remarks for the reader."""

    source: Path
    version: str
    fps: float
    cameras: dict[str, str]
    names: dict[str, list[str] | None]
    action: list[str]
    state: list[str]
    listed: set[str]
    task_key: str
    tasks: dict[int, str]
    episodes: list[Episode]
    held_out: set[int]
    notes: list[str]


# ---- Metadata ----------------------------------------------------------------------------------


def open_set(source: Path) -> LeRobotSet:
    """Read a dataset's metadata. Raises DataError if they are missing or contradictory."""
    info = read_info(source / "meta/info.json")
    try:
        cameras, names, notes = read_features(info["features"], read_slices(source / "meta/modality.json"))
        tasks = read_tasks(source / "meta", notes)
        # the paths reveal the format; third parties invent version numbers
        read = episodes_of_v3 if "{file_index" in info["data_path"] else episodes_of_v2
        videos = [key for key, kind in cameras.items() if kind == "video"]
        episodes = sorted(read(source, info, videos), key=lambda episode: episode.index)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{source}/meta: not as LeRobot writes it: {type(error).__name__}: {error}") from None
    check_counts(source, info, episodes)
    action, state = find_action_and_state(info["features"], names)
    if not action or not cameras or not any(episode.length for episode in episodes):
        raise DataError(f"{source}/meta/info.json: needs episodes, an action and a camera; it has "
                        f"{sum(episode.length > 0 for episode in episodes)} episodes with frames, and the "
                        f"features {', '.join([*names, *cameras])}")
    if not state:
        notes.append("no state: no feature has the name of one: to use another, write `state:` in the recipe")
    for key in [*action, *state]:
        if names[key] is None:
            given = json.dumps(info["features"][key].get("names"))[:40]
            notes.append(f"{key}: names: {given} in meta/info.json does not name each of its dimensions: "
                         "ranges alone tell what they are")
    for episode in episodes:
        if not episode.length:
            notes.append(f"episode {episode.index} has no frames: it is left out")
    held_out = set(range(len(episodes))) - train_split(info.get("splits"), len(episodes))
    task_key = next(filter(TASK.fullmatch, names), "task_index")
    return LeRobotSet(source, str(info["codebase_version"]), float(info["fps"]), cameras, names, action, state,
                      set(info["features"]), task_key, tasks,
                      [episode for episode in episodes if episode.length], held_out, notes)


def read_info(path: Path) -> dict:
    """meta/info.json."""
    if not path.exists():
        raise DataError(f"{path}: missing: --source must be the folder of a LeRobot dataset, which contains it")
    try:
        info = json.loads(path.read_text())
        missing = {"codebase_version", "fps", "features", "data_path"} - info.keys()
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path}: not readable as JSON: {error}") from None
    if missing:
        raise DataError(f"{path}: has no {', '.join(sorted(missing))}: not LeRobot v2.x or v3.x; convert "
                        "older datasets with LeRobot's own scripts first")
    if not isinstance(size := info.get("chunks_size", 1000), int) or size < 1:
        raise DataError(f"{path}: chunks_size is {size!r}: it must be a positive whole number")
    if not isinstance(info["fps"], int | float) or not info["fps"] > 0:
        raise DataError(f"{path}: fps: {info['fps']!r}: must be the frames a second, a positive number")
    return info


def read_features(features: dict, slices: dict[str, list[str]]) -> tuple[dict, dict, list[str]]:
    """-> cameras {feature: kind}, {feature of numbers: names of its dimensions, or None}, notes."""
    cameras, names, notes = {}, {}, []
    for key, feature in features.items():
        kind, shape = feature["dtype"], feature.get("shape") or ()
        if kind in ("video", "image"):
            details = {**feature, **(feature.get("info") or {}), **(feature.get("video_info") or {})}
            if details.get("video.is_depth_map") or details.get("is_depth_map"):
                notes.append(f"{key} is a depth map: it is left out")
            else:
                cameras[key] = kind
        elif key in BOOKKEEPING:
            continue
        elif len(shape) > 1 or 0 in shape or not re.fullmatch(r"(float|u?int|bool)\d*", kind):
            notes.append(f"{key} ({kind} of shape {[*shape]}) is not a row of numbers: it is left out")
        else:
            width = int(shape[0]) if shape else 1
            given = slices.get(key, ())
            names[key] = given if len(given) == width else flat_names(feature.get("names"), width)
    return cameras, names, notes


def rlds_name(key: str, camera: bool = False) -> str:
    """A feature's name -> its full name in an RLDS step."""
    seen = camera or key.startswith("observation.")
    for prefix in ("observation.images.", "observation."):
        key = key.removeprefix(prefix)
    key = key.replace(".", "_").replace("/", "_")
    return f"observation/{key}" if seen else key


def find_action_and_state(features: dict, names: dict) -> tuple[list[str], list[str]]:
    """The features that are the robot's action and its state, by their names: one or several each."""
    numbers = {}
    for key in names:
        shape = tuple(features[key].get("shape") or ())
        numbers[rlds_name(key)] = Feature(shape, np.dtype(features[key]["dtype"]), "Tensor")
    action = {field.key for field in parse_fields(action_fields(numbers) or "0")}
    state = {field.key for field in parse_fields(state_fields(numbers), "observation/")}
    return ([key for key in names if rlds_name(key) in action],
            [key for key in names if rlds_name(key) in state])


def read_slices(path: Path) -> dict[str, list[str]]:
    """GR00T's meta/modality.json, which names slices of features -> {feature: names}."""
    try:
        parts = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise DataError(f"{path}: not readable as JSON: {error}") from None
    names: dict[str, list[str]] = {}
    for section, default in (("state", "observation.state"), ("action", "action")):
        slices = [item for item in parts.get(section, {}).items() if {"start", "end"} <= item[1].keys()]
        for name, part in sorted(slices, key=lambda item: item[1]["start"]):
            name = name if part.get("absolute", True) else f"delta_{name}"
            width = part["end"] - part["start"]
            numbered = [name] if width == 1 else [f"{name}[{i}]" for i in range(width)]
            names.setdefault(part.get("original_key") or default, []).extend(numbered)
    return names


def flat_names(names, width: int) -> list[str] | None:
    """A feature's names: a list, a dict of lists ({"motors": [...]}), a dict {name: place}, or
    null."""
    if isinstance(names, dict):
        lists = [part for part in names.values() if isinstance(part, list)]
        if not lists and all(isinstance(place, int) for place in names.values()):
            names = sorted(names, key=names.get)
        names = [name for part in lists for name in part] if lists else list(names)
    return [*map(str, names)] if names and len(names) == width else None


def read_tasks(meta: Path, notes: list[str]) -> dict[int, str]:
    """{task_index: text}."""
    if (path := meta / "tasks.parquet").exists():  # v3.0: the text is the index of a pandas table
        table = read_parquet(path)
        text = next((name for name in ("task", "__index_level_0__") if name in table.column_names), None)
        if text is None or "task_index" not in table.column_names:
            raise DataError(f"{path}: has the columns {', '.join(table.column_names)}: expected task_index "
                            "and the texts")
        rows = list(zip(table["task_index"].to_pylist(), table[text].to_pylist(), strict=True))
    elif (path := meta / "tasks.jsonl").exists():
        rows = [(row["task_index"], row["task"]) for row in read_lines(path)]
    else:
        raise DataError(f"{meta}: has neither tasks.parquet nor tasks.jsonl (incomplete download?)")
    tasks, owner = {}, {}
    for index, text in rows:
        if not isinstance(text, str):
            raise DataError(f"{path}: the text of task_index {index} is {text!r}: write what is done there")
        if tasks.setdefault(index, text) != text:
            raise DataError(f"{path}: task_index {index} has two texts, {tasks[index]!r} and {text!r}: "
                            "remove one")
        if owner.setdefault(text, index) != index:
            notes.append(f"tasks {owner[text]} and {index} have one text, {text!r}: they become one "
                         "instruction")
    return tasks


def episodes_of_v2(source: Path, info: dict, videos: list[str]) -> Iterator[Episode]:
    """v2.x: meta/episodes.jsonl, and one file per episode."""
    for row in read_lines(source / "meta/episodes.jsonl"):
        where = {"episode_index": row["episode_index"],
                 "episode_chunk": row["episode_index"] // info.get("chunks_size", 1000)}
        yield Episode(row["episode_index"], row["length"], source / info["data_path"].format(**where), {
            key: Video(source / info["video_path"].format(video_key=key, **where), 0.0) for key in videos})


def episodes_of_v3(source: Path, info: dict, videos: list[str]) -> Iterator[Episode]:
    """v3.x: meta/episodes/*/*.parquet. Numbers and each camera are divided into files
    separately."""
    paths = sorted((source / "meta/episodes").glob("*/*.parquet"))
    if not paths:
        raise DataError(f"{source / 'meta/episodes'}: no parquet files there (incomplete download?)")
    places = ["data", *(f"videos/{key}" for key in videos)]
    indices = ("chunk_index", "file_index")
    columns = ["episode_index", "length", *(f"{place}/{index}" for place in places for index in indices),
               *(f"{place}/from_timestamp" for place in places[1:])]
    for path in paths:
        for row in read_parquet(path, columns).to_pylist():
            data, *where = ({index: row[f"{place}/{index}"] for index in indices} for place in places)
            yield Episode(row["episode_index"], row["length"], source / info["data_path"].format(**data), {
                key: Video(source / info["video_path"].format(video_key=key, **place),
                           row[f"videos/{key}/from_timestamp"])
                for key, place in zip(videos, where, strict=True)})


def check_counts(source: Path, info: dict, episodes: list[Episode]) -> None:
    """Check that the listed episodes add up to the counts in info.json."""
    listed = [episode.index for episode in episodes]
    if lost := sorted(set(range(max([*listed, -1]) + 1)) - set(listed)):
        raise DataError(f"{source}/meta: episode {lost[0]} is not listed, and {len(lost) - 1} others "
                        "(incomplete download?)")
    if len(set(listed)) < len(listed):
        raise DataError(f"{source}/meta: {len(listed)} episodes are listed, some of them twice: there are "
                        f"{len(set(listed))} numbers")
    counts = {"total_episodes": len(episodes), "total_frames": sum(episode.length for episode in episodes)}
    for key, count in counts.items():
        if info.get(key, count) != count:
            raise DataError(f"{source}/meta/info.json: says {key} {info[key]}, but the episodes that are "
                            f"listed make {count}: download it again, or correct {key}")


def train_split(splits: dict | None, count: int) -> set[int]:
    """The episodes of the split "train" (such as "0:50"); all of them if it is not declared."""
    match = re.fullmatch(r"(\d+):(\d+)", str((splits or {}).get("train", "")))
    return set(range(int(match[1]), int(match[2]))) if match and len(splits) > 1 else set(range(count))


def read_lines(path: Path) -> list[dict]:
    """A .jsonl file."""
    if not path.exists():
        raise DataError(f"{path}: missing (incomplete download?)")
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except ValueError as error:
        raise DataError(f"{path}: not readable as lines of JSON: {error}") from None


def read_parquet(path: Path, columns: list[str] | None = None, optional: Sequence[str] = (), **how
                 ) -> pa.Table:
    """A parquet file, or some of its columns; `optional`: if it has them."""
    if not path.exists():
        raise DataError(f"{path}: missing, but the metadata list it (incomplete download?)")
    try:
        there = pq.read_schema(path).names
        if missing := [name for name in columns or () if name not in there]:
            raise DataError(f"{path}: has no column {missing[0]}; it has {', '.join(there)[:200]}")
        if columns:
            columns = [name for name in there if name in {*columns, *optional}]
        return pq.read_table(path, columns=columns, partitioning=None, **how)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable parquet file: {what_it_is(path, error)}") from None


def what_it_is(path: Path, error: Exception) -> str:
    """The reason a file cannot be read, in one line."""
    with open(path, "rb") as file:
        pointer = file.read(12) == b"version http"
    return ("a Git LFS pointer, not the data: run `git lfs pull` in its repository" if pointer
            else " ".join(str(error).split()))


# ---- Numbers -----------------------------------------------------------------------------------


def read_numbers(dataset: LeRobotSet, episodes: Sequence[Episode]) -> None:
    """Read the episodes' numbers and texts into them. Raises DataError if frames are missing or
    extra, or for faults in the action or state. Another feature with a fault is left out."""
    opened, rows = None, {}
    needed = [*BOOKKEEPING[:3], dataset.task_key, *dataset.action, *dataset.state]
    for episode in episodes:  # in v3.0, episodes of one file are consecutive
        if episode.data != opened:
            table = read_parquet(episode.data, needed, [*dataset.names])
            order, opened = table["episode_index"].to_numpy(), episode.data
        rows = np.flatnonzero(order == episode.index)
        if len(rows) != episode.length:
            raise DataError(f"{episode.data}: has {len(rows)} frames of episode {episode.index}, the "
                            f"metadata say {episode.length}: download it again, or {LEAVE_OUT}")
        part = table.take(rows)
        part = part.take(np.argsort(part["frame_index"].to_numpy(), kind="stable"))
        for key, names in [*dataset.names.items()]:
            try:
                values = as_rows(part, key, episode)
                # later code does not check widths
                width, wanted = values.shape[1], len(names or episodes[0].numbers.get(key, values)[0])
                if width != wanted:
                    others = "meta/info.json names" if names else "others have"
                    raise DataError(f"{episode.data}: {key} of episode {episode.index} has {width} numbers, "
                                    f"{others} {wanted}: correct meta/info.json, or {LEAVE_OUT}")
                episode.numbers[key] = values
            except DataError as error:
                if key in needed:
                    raise
                del dataset.names[key]
                dataset.notes.append(f"{key} is left out: {error}")
        check_frames(dataset, episode, part["frame_index"].to_numpy(), part["timestamp"].to_numpy())
        read_texts(dataset, episode, as_rows(part, dataset.task_key, episode).reshape(-1))
    early = sum(episode.numbers["next.done"][:-1].any() for episode in episodes if "next.done" in dataset.names)
    if early:
        dataset.notes.append(f"next.done is true before the last frame of {early} episodes: each is still one")
    unlisted = set(pq.read_schema(opened).names) - dataset.listed - {"__index_level_0__"}
    for key in sorted(unlisted):
        dataset.notes.append(f"{key} is in the data, but not in meta/info.json: it is left out")


def as_rows(table: pa.Table, key: str, episode: Episode) -> np.ndarray:
    """A column of numbers, or of lists of numbers -> (T, k)."""
    if key not in table.column_names:
        raise DataError(f"{episode.data}: has no column {key}")
    flat, rows = table[key].combine_chunks(), len(table)
    flat = flat.storage if isinstance(flat, pa.ExtensionArray) else flat
    values = (flat.flatten() if pa.types.is_nested(flat.type) else flat).to_numpy(zero_copy_only=False)
    ragged = pa.types.is_nested(flat.type) and len(pc.unique(pc.list_value_length(flat))) > 1
    if flat.null_count or ragged or len(values) % rows or values.dtype.kind not in "biuf":
        raise DataError(f"{episode.data}: {key} of episode {episode.index} is not a row of numbers in each "
                        "frame")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        bad = int(np.flatnonzero(~np.isfinite(values))[0]) // (len(values) // rows)
        raise DataError(f"{episode.data}: {key} of episode {episode.index} is not finite at frame {bad}: "
                        f"{LEAVE_OUT}")
    return values.reshape(rows, -1)


def check_frames(dataset: LeRobotSet, episode: Episode, frames: np.ndarray, seconds: np.ndarray) -> None:
    """Check that an episode's frames count from 0, at the dataset's rate, with known tasks."""
    if (frames != np.arange(len(frames))).any():
        raise DataError(f"{episode.data}: the frame_index of episode {episode.index} does not count from 0 "
                        f"to {len(frames) - 1}: {LEAVE_OUT}")
    # float32, so only close to frame_index / fps
    # also true for NaN
    if (late := ~(np.abs(seconds.reshape(-1) * dataset.fps - frames) <= 0.5)).any():
        frame = int(np.argmax(late))
        raise DataError(f"{episode.data}: frame {frame} of episode {episode.index} has the timestamp "
                        f"{float(seconds[frame]):.4g} s, but at {dataset.fps:g} fps it is due at "
                        f"{frame / dataset.fps:.4g} s: correct fps in meta/info.json, or {LEAVE_OUT}")


def read_texts(dataset: LeRobotSet, episode: Episode, numbers: np.ndarray) -> None:
    """The texts of the tasks with these numbers, one for each frame, into the episode."""
    unknown = set(numbers.tolist()) - dataset.tasks.keys()
    if unknown:
        raise DataError(f"{episode.data}: {dataset.task_key} {min(unknown)} in episode {episode.index} has "
                        f"no text in meta/tasks; there are {sorted(dataset.tasks)[:10]}")
    episode.texts = [dataset.tasks[number] for number in numbers.tolist()]
