"""The RLDS / TFDS dataset format without TensorFlow: index, write.

A TFDS directory holds `features.json` and `dataset_info.json`, which describe it, and TFRecord
files with one episode per record, a serialized tf.train.Example (tfrecords.py reads them).

Read build_frame_table, which reads a dataset once. This file is also a program: frames.frame_table
runs it for a dataset without a table, with the job as JSON on standard input. It imports no
PyTorch, so that its many processes start fast and stay small. write_rlds goes the other way: your
own recordings become a dataset. What the names in a dataset mean: fields.py, recipes.py. Which
frame is used when: data.py.
"""

import functools
import io
import json
import struct
import sys
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from machinery import recipes
from machinery.config import Recipe, UserError
from machinery.fields import check_recipe
from machinery.files import atomic, write_json
from machinery.frames import DataError, end_with_parent, statistics
from machinery.host import cores
from machinery.images import encode
from machinery.recipes import Feature
from machinery.tfrecords import Steps, masked_crc, open_builder, read_records, step_features

EPISODE = np.dtype([("split", "u1"), ("shard", "<u4"), ("record", "<u4"), ("first", "<i8"),
                    ("count", "<u4"), ("labeled", "?")])

# ---- The frame table -----------------------------------------------------------------------------


def build_frame_table(directory: Path, path: Path, recipe: Recipe, cameras: list[str | None],
                      load_proprio: bool, skip_bad: bool,
                      known_bad: Mapping[str, Mapping[str, str]]) -> None:
    """Read every record of the dataset once, on all cores, and write its frame table to `path`.

    known_bad: {file name: {record: reason}}, episodes that are bad for reasons not looked for here.
    Raises DataError.
    """
    features = step_features(directory)
    try:
        check_recipe(directory.parent.name, recipe)
        widths_of_features = recipes.check_features(features, recipe, cameras, load_proprio)
    except UserError as error:
        raise DataError(f"{directory}: {error}") from error
    splits = open_builder(directory).info.splits  # in TFDS' order, in which statistics are sums
    shards = []
    for number, split in enumerate(splits.values()):
        for file, count in zip(split.filepaths, split.shard_lengths, strict=True):
            shards.append((number, Path(file), count))
    transform = functools.partial(recipes.standardize_record, recipe=recipe, cameras=cameras,
                                  load_proprio=load_proprio)
    read = functools.partial(_index_shard, features=features, transform=transform,
                             skip_bad=skip_bad, known_bad=known_bad)

    with atomic(path) as scratch:
        scratch.mkdir()
        episodes, instructions, bad, dtype, action_widths = collect(
            shards, read, scratch / "frames.bin", skip_bad)
        if not len(episodes):
            raise DataError(f"{directory}: no usable frame in {len(shards)} files; bad episodes: "
                            f"{bad[:1]}")
        np.save(scratch / "episodes.npy", episodes)
        frames = np.memmap(scratch / "frames.bin", dtype, "r")
        target, raw, declared = recipes.action_masks(recipe, action_widths)
        (scratch / "table.json").write_text(json.dumps({
            "splits": list(splits),
            "shards": [file.name for _, file, _ in shards],
            "cameras": cameras,
            "instructions": instructions,
            "bad_episodes": bad,
            "targets": target.tolist(),
            "declared": declared.tolist(),
            "features": widths_of_features | recipes.unzipped(recipe, action_widths),
            "unused": recipes.unused(features, recipe, cameras, load_proprio),
            "openvla_rules": recipe.openvla_rules,
            "frame": [(name, dtype[name].base.str, dtype[name].shape) for name in dtype.names],
            "statistics": statistics(frames, len(episodes), ~raw),
        }))


def collect(shards: list[tuple[int, Path, int]], read: Callable, out: Path, skip_bad: bool
            ) -> tuple:
    """Write the frame rows of all shards (number of the split, file, records) to `out`.

    -> episodes, instructions, reasons of bad episodes, dtype of the rows, widths of the action's
    fields
    """
    episodes = []
    bad = []
    instructions = {}  # {text: number}
    rows = 0
    dtype = action_widths = None
    workers = min(cores(), max(len(shards), 1))
    with (ProcessPoolExecutor(workers, get_context("fork"), end_with_parent) as pool,
          open(out, "wb") as table,
          tqdm(total=len(shards), desc="index", unit="shard", leave=False, delay=1) as bar):
        results = pool.map(read, [file for _, file, _ in shards], [n for _, _, n in shards])
        for number, ((split, file, _), result) in enumerate(zip(shards, results, strict=True)):
            frames, found, texts, widths, reasons = result
            if frames is not None:
                dtype = frames.dtype
                action_widths = widths
                numbers = [instructions.setdefault(text, len(instructions)) for text in texts]
                frames["instruction"] = np.array(numbers, np.uint32)[frames["instruction"]]
                table.write(frames.tobytes())
            for record, count, labeled in found:
                episodes.append((split, number, record, rows, count, labeled))
                rows += count
            bad += [f"{file}: {reason}" for reason in reasons]
            if bad and rows and not skip_bad:
                raise DataError(f"{bad[0]}. Other episodes are fine: skip_bad_episodes: true "
                                "leaves out those that are not")
            bar.update()
    episodes = np.array(episodes if rows else [], EPISODE)
    return episodes, list(instructions), bad, dtype, action_widths


def _index_shard(file: Path, count: int, features: Mapping[str, Feature], transform: Callable,
                 skip_bad: bool, known_bad: Mapping[str, Mapping[str, str]]) -> tuple:
    """One shard of `count` records -> (frame rows, [(record, frames, labeled)] of each episode,
    distinct instructions, widths of the action's fields, [reason of each bad record]).

    Unless bad records are skipped, it stops once it has found a bad one and a good one.
    """
    rows = []
    episodes = []
    bad = []
    texts = {}  # {instruction: number}
    widths = None
    known = known_bad.get(file.name, {})
    record = -1
    for record, (offset, data) in enumerate(read_records(file)):
        try:
            if str(record) in known:
                raise DataError(known[str(record)])
            parts = transform(Steps(data, offset, features))
            tables = [frame_rows(part) for part in parts]
        except (ValueError, LookupError, TypeError, zlib.error) as error:
            bad.append(f"record {record}: {error}")
            tables = []
        for frames, instructions in tables:
            widths = parts[0]["widths"]
            frames["instruction"] = [texts.setdefault(text, len(texts)) for text in instructions]
            rows.append(frames)
            episodes.append((record, len(frames), any(text.strip() for text in instructions)))
        if bad and episodes and not skip_bad:
            break
    else:
        if record + 1 != count:
            raise DataError(f"{file}: has {record + 1} records, but {count} by dataset_info.json: "
                            "copy or download it again")
    return np.concatenate(rows) if rows else None, episodes, list(texts), widths, bad


def frame_rows(episode: dict) -> tuple[np.ndarray, list[str]]:
    """An episode in standard form (see standardize) -> its rows, its instructions. Raises
    ValueError for numbers that are not finite, and texts that are not UTF-8."""
    texts = [text.decode("utf-8-sig") for text in episode["instructions"]]
    instructions = [unicodedata.normalize("NFC", text) for text in texts]  # one form of each accent
    cameras = episode["images"].shape[1:2]
    columns = [("offset", "<i8", cameras), ("length", "<u4", cameras), ("instruction", "<u4")]
    numbers = {key: episode[key] for key in ("action", "proprio") if episode[key] is not None}
    for key, values in numbers.items():
        if not np.isfinite(values).all():
            raise DataError(f"its {key} is not finite")
        columns.append((key, "<f4", values.shape[1:]))
    frames = np.zeros(len(instructions), columns)
    frames["offset"] = episode["images"][..., 0]
    frames["length"] = episode["images"][..., 1]
    for key, values in numbers.items():
        frames[key] = values
    return frames, instructions


# ---- Writing -------------------------------------------------------------------------------------


def write_rlds(directory: Path, name: str, version: str, features: Mapping,
               episodes: Mapping[str, Iterable[dict]], *, shard_bytes: int = 128 << 20) -> Path:
    """Write episodes as a TFDS dataset that TFDS, OpenVLA and this project read. Returns its
    directory.

    features: of an episode, in tensorflow_datasets.features:  {"steps": Dataset({...}), ...}
    episodes: {"train": iterable of episodes, "val": ...}; an episode is {"steps": [step, ...], ...}
              with NumPy values. Images are (H, W, 3) or (H, W, 1) uint8, or (H, W, 1) uint16, and
              are stored in the feature's encoding_format. Bytes are stored unchanged, also in the
              place of an episode: its record, as `serializer` makes it.

    The dataset appears complete or not at all. Raises FileExistsError instead of overwriting one,
    and ValueError for a split without episodes or an image that is not of the declared shape.
    """
    import tensorflow_datasets as tfds

    path = Path(directory) / name / version
    if path.exists():
        raise FileExistsError(f"{path} exists: remove it, or write another version")
    if not isinstance(features, tfds.features.FeaturesDict):
        features = tfds.features.FeaturesDict(features)
    serialize = serializer(features)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as scratch:
        scratch.mkdir()
        splits = []
        for split, items in episodes.items():
            items = tqdm(items, f"write {name} {split}", unit="episode", leave=False, delay=1,
                         disable=None)
            sizes = _write_shards(map(serialize, items), scratch, f"{name}-{split}.tfrecord",
                                  shard_bytes)
            splits.append({"name": split, "shardLengths": [str(len(shard)) for shard in sizes],
                           "numBytes": str(sum(map(sum, sizes))),
                           "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"})
        features.save_config(scratch)
        info = {"name": name, "version": version, "fileFormat": "tfrecord", "splits": splits}
        write_json(scratch / "dataset_info.json", info)
    return path


def serializer(features) -> Callable[[dict], bytes]:
    """The function from an episode to its record, for a tfds.features.FeaturesDict."""
    from tensorflow_datasets.core.example_serializer import ExampleSerializer
    def serialize(episode: dict | bytes) -> bytes:
        if isinstance(episode, bytes):
            return episode
        encoded = features.encode_example(_encode_images(features, episode))
        example = ExampleSerializer(features.get_serialized_info()).get_tf_example(encoded)
        return example.SerializeToString(deterministic=True)  # the same episode, the same bytes

    return serialize


def write_record(file: io.BufferedIOBase, data: bytes) -> None:
    """Append a record to a TFRecord file."""
    for part in (struct.pack("<Q", len(data)), data):
        file.write(part + struct.pack("<I", masked_crc(part)))


def _write_shards(records: Iterable[bytes], folder: Path, name: str, shard_bytes: int
                  ) -> list[list[int]]:
    """Write TFRecord files of about shard_bytes. Returns the bytes of each record of each file."""
    sizes = [[]]
    for data in records:
        if sum(sizes[-1]) > shard_bytes:
            sizes.append([])
        sizes[-1].append(len(data))
        with open(folder / f"{len(sizes) - 1}", "ab") as shard:
            write_record(shard, data)
    if not sizes[0]:
        raise ValueError(f"{name}: the split has no episodes")
    for number in range(len(sizes)):
        (folder / f"{number}").rename(folder / f"{name}-{number:05d}-of-{len(sizes):05d}")
    return sizes


def _encode_images(feature, value):
    """Replace each image array by a file object with its encoded bytes. (TFDS would do this with
    TensorFlow.)"""
    kind = type(feature).__name__
    if kind == "FeaturesDict":
        return {key: _encode_images(feature[key], item) for key, item in value.items()}
    if kind in ("Dataset", "Sequence"):
        return [_encode_images(feature.feature, item) for item in value]
    if kind != "Image":
        return value
    if isinstance(value, bytes):
        return io.BytesIO(value)
    for size, declared in zip(value.shape, feature.shape, strict=True):
        if declared not in (None, size):
            raise ValueError(f"an image of shape {value.shape}, declared as {feature.shape}")
    if value.shape[-1] == 1:  # gray or depth
        value = value[..., 0]
    return io.BytesIO(encode(value, feature.encoding_format or "png", quality=95))


# ---- The program that indexes --------------------------------------------------------------------


def main() -> None:
    """Do the job on standard input. An error in the data goes to standard output."""
    job = json.load(sys.stdin)
    job["recipe"] = Recipe(**job["recipe"])
    job["directory"] = Path(job["directory"])
    job["path"] = Path(job["path"])
    try:
        build_frame_table(**job)
    except DataError as error:
        print(error)
        sys.exit(1)
    except OSError as error:
        if job["path"].exists():
            return  # on a file system without locks, another process was faster
        print(f"{job['path']}: {error}: if it is full, make room, or set index_dir to another disk")
        sys.exit(1)


if __name__ == "__main__":
    main()
