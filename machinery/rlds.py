"""The RLDS / TFDS dataset format without TensorFlow: read, index, write.

Robot datasets (Open X-Embodiment, LIBERO, ...) come as TFDS directories: `features.json` and
`dataset_info.json` describe them, and TFRecord files hold one episode per record, as a serialized
tf.train.Example.

Read in this order: read_records (bytes on disk) -> Steps (one episode) -> build_frame_table, which reads all
of a dataset once. That is a program of its own: frames.frame_table runs it where a dataset has no table yet,
with a job in JSON on its standard input. It imports no PyTorch, so that its many processes start quickly and
small. write_rlds goes the other way: your own recordings become a dataset. What the names in a dataset mean
is for fields.py and recipes.py; which frame comes when, data.py's.
"""

import functools
import io
import json
import os
import shutil
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import google_crc32c
import numpy as np
from PIL import Image
from tqdm import tqdm

from machinery.checks import frame_warnings, table_warnings
from machinery.config import Recipe, UserError
from machinery.frames import DataError, end_with_parent, find_dataset
from machinery.recipes import Feature, action_masks, check_features, standardize

__all__ = ["DataError", "find_dataset", "write_rlds"]  # what a program needs that writes a dataset

EPISODE = np.dtype([("split", "u1"), ("shard", "<u4"), ("record", "<u4"), ("first", "<i8"), ("count", "<u4"),
                    ("labeled", "?")])

# ------------------------------------------------------------------------------------------------------------
# TFRecord files: [length u64][masked crc of length u32][data][masked crc of data u32], again and again


def masked_crc(data: bytes) -> int:
    """CRC-32C, rotated and offset as TFRecord stores it."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


NOT_RECORDS = {b"version http": "a Git LFS pointer, not the data: run `git lfs pull` in its repository",
               b"\x1f\x8b": "compressed with gzip: unpack it (gunzip, keeping the file's name)"}


def read_records(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (file offset of the data, data) of each record of a TFRecord file. Raises DataError on any
    damage."""
    with open(path, "rb") as file:
        number = start = 0
        while header := file.read(12):
            for first_bytes, what in NOT_RECORDS.items():
                if not start and header.startswith(first_bytes):
                    raise DataError(f"{path}: {what}")
            if len(header) < 12 or masked_crc(header[:8]) != struct.unpack("<I", header[8:])[0]:
                raise DataError(f"{path}: record {number}: damaged header at byte {start}")
            (length,) = struct.unpack("<Q", header[:8])
            data, crc = file.read(length), file.read(4)
            if len(data) < length or len(crc) < 4:
                raise DataError(f"{path}: record {number}: the file ends inside it (incomplete copy?)")
            if masked_crc(data) != struct.unpack("<I", crc)[0]:
                raise DataError(f"{path}: record {number}: checksum mismatch, the data are damaged")
            yield start + 12, data
            number, start = number + 1, start + 12 + length + 4


# ------------------------------------------------------------------------------------------------------------
# tf.train.Example: a protobuf map {feature name: list of bytes, floats or ints}. The protobuf library would
# copy every image out; we only want to know where it is. A message is a sequence of (tag, length, payload),
# so that is a short walk.


def _varint(data: bytes, i: int) -> tuple[int, int]:
    value = shift = 0
    while data[i] >= 0x80:
        value |= (data[i] & 0x7F) << shift
        shift, i = shift + 7, i + 1
    return value | data[i] << shift, i + 1


def _fields(data: bytes, i: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Yield (field number, start, stop) of each field of the protobuf message data[i:stop]."""
    while i < stop:
        tag, i = _varint(data, i)
        size, i = _varint(data, i)
        yield tag >> 3, i, i + size
        i += size


class Steps:
    """One episode. `steps["observation/state"]` -> its values, decoded on demand, with a leading time
    dimension T."""

    def __init__(self, data: bytes, offset: int, features: Mapping[str, Feature]):
        """data: a serialized tf.train.Example; offset: where it starts in its file; features: what
        `step_features` says"""
        self.data, self.offset, self.features = data, offset, features
        self.where = {}  # feature name -> (start, stop) of its serialized list
        for _, start, stop in _fields(data, 0, len(data)):  # Example.features
            for _, first, last in _fields(data, start, stop):  # one entry of the map: 1 = key, 2 = value
                entry = {number: span for number, *span in _fields(data, first, last)}
                self.where[data[slice(*entry[1])].decode()] = entry[2]

    def __getitem__(self, name: str) -> np.ndarray | list[bytes]:
        """(T, *shape) array of the feature's declared dtype, or a list of T byte strings."""
        from tensorflow_datasets.proto import (
            tf_feature_pb2,  # here: importing TFDS takes half a second
        )

        start, stop = self._find(name)
        feature = tf_feature_pb2.Feature.FromString(self.data[start:stop])
        shape, dtype, *_ = self.features[name]
        if dtype.kind == "O":
            return list(feature.bytes_list.value)
        # tf.train.Example has only float32 and int64; float64 features were rounded to float32 when written
        values = (np.array(feature.float_list.value, np.float32) if dtype.kind == "f"
                  else np.array(feature.int64_list.value, np.int64))
        return values.astype(dtype).reshape(-1, *shape)

    def spans(self, name: str) -> np.ndarray:
        """(T, 2) int64: file offset and length in bytes of each of the T encoded images of feature `name`."""
        start, stop = self._find(name)
        lists = [(i, end) for _, i, end in _fields(self.data, start, stop)]
        spans = [(self.offset + a, b - a) for i, end in lists for _, a, b in _fields(self.data, i, end)]
        return np.array(spans, np.int64).reshape(-1, 2)

    def _find(self, name: str) -> tuple[int, int]:
        feature = self.features.get(name)
        try:
            return self.where[name if feature and not feature.of_step else f"steps/{name}"]
        except KeyError:
            raise DataError(f"its steps have no {name!r}; they have {sorted(self.features)}") from None


# ---- TFDS directories --------------------------------------------------------------------------------------


def _open_builder(directory: Path):
    import tensorflow_datasets as tfds

    try:
        return tfds.builder_from_directory(directory)
    except Exception as error:  # TFDS raises many kinds
        raise DataError(f"{directory}: not a readable TFDS dataset: {error}") from error


def step_features(directory: Path) -> dict[str, Feature]:
    """{"observation/image": Feature, ...} of a dataset's steps, then those of whole episodes under their full
    names ("episode_metadata/...")."""
    features = _open_builder(directory).info.features

    def walk(feature, info, prefix, of_step):
        if isinstance(info, Mapping):
            for key, value in info.items():
                yield from walk(feature[key], value, f"{prefix}/{key}", of_step)
        else:
            shape = info.shape[1:] if of_step else info.shape
            kind = type(feature).__name__  # floats are no colours: their bytes stand in a PNG
            kind += " of floats" if kind == "Image" and np.dtype(feature.np_dtype).kind == "f" else ""
            yield prefix[1:], Feature(shape, np.dtype(info.np_dtype), kind, of_step)

    try:
        stored = features.get_serialized_info()
        steps = walk(features["steps"].feature, stored.pop("steps"), "", True)
        # sorted, because features.json is read in random order
        return dict(sorted(walk(features, stored, "", False))) | dict(sorted(steps))
    except (KeyError, AttributeError):
        raise DataError(f"{directory}: a TFDS dataset, but not RLDS: its examples have no 'steps'") from None


def open_splits(directory: Path) -> Mapping:
    """A dataset's splits, in the order of TFDS' split "all": statistics are sums in this order. Raises
    DataError when one cannot train on them."""
    info = _open_builder(directory).info
    if (kind := info.file_format.value) != "tfrecord":
        raise DataError(f"{directory}: its files are {kind} files, not TFRecords: write the dataset again "
                        "with file_format tfrecord")
    if "train" not in info.splits:
        raise DataError(f"{directory}: has the splits {', '.join(info.splits)}, but no split 'train' to "
                        "train on: write it again with one")
    return info.splits


# ---- The frame table ---------------------------------------------------------------------------------------


def build_frame_table(directory: Path, path: Path, recipe: Recipe, cameras: list[str | None],
                      load_proprio: bool, skip_bad: bool, known_bad: Mapping[str, Mapping[str, str]]) -> None:
    """Read every record of the dataset once, on all cores, and write its frame table to `path`. known_bad:
    {file name: {record: reason}}, episodes that are bad for a reason that is not looked for here."""
    features, splits = step_features(directory), open_splits(directory)
    try:
        widths_of_features = check_features(features, recipe, cameras, load_proprio)
    except UserError as error:
        raise DataError(f"{directory}: {error}") from error
    shards = [(n, Path(file), count) for n, split in enumerate(splits.values())
              for file, count in zip(split.filepaths, split.shard_lengths, strict=True)]
    transform = functools.partial(standardize, recipe=recipe, cameras=cameras, load_proprio=load_proprio)
    read = functools.partial(_index_shard, features=features, transform=transform, skip_bad=skip_bad,
                             known_bad=known_bad)

    scratch = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    scratch.mkdir()
    try:
        episodes, instructions, bad, dtype, action_widths = collect(
            shards, read, scratch / "frames.bin", skip_bad)
        if not len(episodes):
            raise DataError(f"{directory}: no usable frame in its {len(shards)} files"
                            + (f"; the first problem: {bad[0]}" if bad else ""))
        np.save(scratch / "episodes.npy", episodes)
        table = np.memmap(scratch / "frames.bin", dtype, "r")
        target, raw = action_masks(recipe, action_widths)
        stats = statistics(table, len(episodes), ~raw)
        meta = {"splits": list(splits), "shards": [file.name for _, file, _ in shards],
                "cameras": cameras, "instructions": instructions, "bad_episodes": bad,
                "targets": target.tolist(), "features": widths_of_features,
                "frame": [(name, dtype[name].base.str, dtype[name].shape) for name in dtype.names],
                "statistics": stats,
                "warnings": table_warnings(table, episodes, stats, target) | {
                    "frames": frame_warnings(table, episodes, cameras, instructions)}}
        (scratch / "table.json").write_text(json.dumps(meta))
        scratch.rename(path)
    except BaseException as error:
        shutil.rmtree(scratch, ignore_errors=True)
        if not (isinstance(error, OSError) and path.exists()):  # another job was faster
            raise


def collect(shards: list[tuple[int, Path, int]], read: Callable, out: Path, skip_bad: bool) -> tuple:
    """Write the frame rows of all shards (number of the split, file, records) to `out`, on all cores ->
    (episodes, instructions, what is wrong with bad episodes, the rows' dtype, columns of each field of the
    action)."""
    episodes, instructions, bad, rows, dtype, action_widths = [], {}, [], 0, None, None
    workers = min(len(os.sched_getaffinity(0)), max(len(shards), 1))
    with (ProcessPoolExecutor(workers, get_context("fork"), end_with_parent) as pool,
          open(out, "wb") as table,
          tqdm(total=len(shards), desc="index", unit="shard", leave=False, delay=1) as bar):
        results = pool.map(read, [file for _, file, _ in shards], [count for *_, count in shards])
        for number, ((split, file, _), result) in enumerate(zip(shards, results, strict=True)):
            frames, found, texts, widths, skipped = result
            renumber = [instructions.setdefault(text, len(instructions)) for text in texts]
            if frames is not None:
                dtype, action_widths = frames.dtype, widths
                frames["instruction"] = np.array(renumber, np.uint32)[frames["instruction"]]
                table.write(frames.tobytes())
            for record, frames_of_it, labeled in found:
                episodes.append((split, number, record, rows, frames_of_it, labeled))
                rows += frames_of_it
            bad += [f"{file}: {reason}" for reason in skipped]
            if bad and rows and not skip_bad:
                raise DataError(f"{bad[0]}. Other episodes are fine: skip_bad_episodes: true leaves out "
                                "those that are not")
            bar.update()
    return np.array(episodes if rows else [], EPISODE), [*instructions], bad, dtype, action_widths


def _index_shard(file: Path, count: int, features: Mapping[str, Feature], transform: Callable, skip_bad: bool,
                 known_bad: Mapping[str, Mapping[str, str]]):
    """One shard of `count` records -> (frame rows, [(record, frames, labeled)], distinct instructions,
    columns of each field of the action, [reason for each bad episode]). Unless bad ones are to be skipped, it
    ends when one was found, and one that is not."""
    if not file.exists():
        raise DataError(f"{file}: missing, but dataset_info.json lists it (incomplete download?)")
    rows, episodes, texts, bad, widths = [], [], {}, [], None
    known = known_bad.get(file.name, {})
    for record, (offset, data) in enumerate(read_records(file)):
        try:
            if str(record) in known:
                raise DataError(known[str(record)])
            episode = transform(Steps(data, offset, features))
            for key in ("action", "proprio"):
                if episode[key] is not None and not np.isfinite(episode[key]).all():
                    raise DataError(f"its {key} is not finite")
            instructions = [text.decode() for text in episode["instructions"]]
        except (ValueError, IndexError, TypeError) as error:  # DataError is a ValueError
            bad.append(f"record {record}: {error}")
        else:
            numbers = {key: episode[key] for key in ("action", "proprio") if episode[key] is not None}
            cameras, widths = episode["images"].shape[1:2], episode["widths"]
            frames = np.zeros(len(instructions), [
                ("offset", "<i8", cameras), ("length", "<u4", cameras), ("instruction", "<u4"),
                *((key, "<f4", values.shape[1:]) for key, values in numbers.items())])
            frames["offset"], frames["length"] = np.moveaxis(episode["images"], -1, 0)
            frames["instruction"] = [texts.setdefault(text, len(texts)) for text in instructions]
            for key, values in numbers.items():
                frames[key] = values
            rows.append(frames)
            episodes.append((record, len(frames), any(text.strip() for text in instructions)))
        if bad and episodes and not skip_bad:
            break
    if (records := len(episodes) + len(bad)) != count and (skip_bad or not bad):
        raise DataError(f"{file}: has {records} records, dataset_info.json says {count}")
    return np.concatenate(rows) if rows else None, episodes, list(texts), widths, bad


def statistics(frames: np.ndarray, num_trajectories: int, mask: np.ndarray) -> dict:
    """What OpenVLA writes to dataset_statistics.json, over all splits of a dataset, bit for bit. mask: which
    of an action's dimensions are normalised, (A,) bool.

    Mean and deviation are float32 sums in file order. Without proprio, OpenVLA writes zeros of the action's
    size.
    """
    action = np.ascontiguousarray(frames["action"])
    proprio = frames["proprio"] if "proprio" in frames.dtype.names else np.zeros_like(action)
    result: dict = {"num_transitions": len(frames), "num_trajectories": num_trajectories}
    for name, values in (("action", action), ("proprio", np.ascontiguousarray(proprio))):
        numbers = {"mean": values.mean(0), "std": values.std(0), "max": values.max(0), "min": values.min(0),
                   "q01": quantile(values, 0.01), "q99": quantile(values, 0.99)}
        result[name] = {key: value.tolist() for key, value in numbers.items()}
    result["action"]["mask"] = mask.tolist()
    return result


def quantile(values: np.ndarray, q: float) -> np.ndarray:
    """Linear quantile over axis 0 as NumPy 1.26, OpenVLA's version, rounds it: the two neighbours'
    difference in float32, the rest in float64 (newer versions stay in float32)."""
    position = (len(values) - 1) * q
    low, t = int(position), position - int(position)
    high = min(low + 1, len(values) - 1)
    sorted_ = np.partition(values, (low, high), axis=0)
    a, b = sorted_[low], sorted_[high]
    difference = (b - a).astype(np.float64)
    return a + difference * t if t < 0.5 else b - difference * (1 - t)


# ---- Writing -----------------------------------------------------------------------------------------------


def write_rlds(directory: Path, name: str, version: str, features: Mapping,
               episodes: Mapping[str, Iterable[dict]], *, jpeg_quality: int = 95,
               shard_bytes: int = 128 << 20) -> Path:
    """Write episodes as a TFDS dataset that TFDS, OpenVLA and this project read. Returns its directory.

    features: what an episode looks like, in tensorflow_datasets.features:  {"steps": Dataset({...}), ...}
    episodes: {"train": iterable of episodes, "val": ...}; an episode is {"steps": [step, ...], ...} with
              NumPy values. Images are (H, W, 3) or (H, W, 1) uint8, or (H, W, 1) uint16, and stored in the
              feature's encoding_format; bytes are stored as they are.

    Nothing is left behind unless all was written; an existing dataset is never overwritten (FileExistsError).
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    path = Path(directory) / name / version
    if path.exists():
        raise FileExistsError(f"{path} exists: remove it, or write another version")
    if not isinstance(features, tfds.features.FeaturesDict):
        features = tfds.features.FeaturesDict(features)
    serializer = ExampleSerializer(features.get_serialized_info())
    scratch = path.with_name(f"{version}.{os.getpid()}.tmp")
    scratch.mkdir(parents=True)
    try:
        splits = []
        for split, items in episodes.items():
            items = tqdm(items, f"write {name} {split}", unit="episode", leave=False, delay=1, disable=None)
            examples = (serializer.get_tf_example(features.encode_example(
                _encode_images(features, item, jpeg_quality))) for item in items)
            # deterministic: the same episodes give the same bytes
            records = (example.SerializeToString(deterministic=True) for example in examples)
            sizes = _write_shards(records, scratch, f"{name}-{split}.tfrecord", shard_bytes)
            if not sizes[0]:
                raise ValueError(f"split {split!r} of {name} has no episodes")
            splits.append({"name": split, "shardLengths": [str(len(shard)) for shard in sizes],
                           "numBytes": str(sum(map(sum, sizes))),
                           "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"})
        features.save_config(scratch)
        info = {"name": name, "version": version, "fileFormat": "tfrecord", "splits": splits}
        (scratch / "dataset_info.json").write_text(json.dumps(info, indent=2))
        scratch.rename(path)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return path


def _write_shards(records: Iterable[bytes], folder: Path, name: str, shard_bytes: int) -> list[list[int]]:
    """Write TFRecord files of about shard_bytes -> the bytes of each record of each."""
    sizes = [[]]
    for data in records:
        if sum(sizes[-1]) > shard_bytes:
            sizes.append([])
        sizes[-1].append(len(data))
        with open(folder / f"{len(sizes) - 1}", "ab") as shard:
            for part in (struct.pack("<Q", len(data)), data):
                shard.write(part + struct.pack("<I", masked_crc(part)))
    for number in range(len(sizes) if sizes[0] else 0):
        (folder / f"{number}").rename(folder / f"{name}-{number:05d}-of-{len(sizes):05d}")
    return sizes


def _encode_images(feature, value, quality: int):
    """Replace each image array by a file object with its encoded bytes (TFDS itself would need TensorFlow
    for that)."""
    kind = type(feature).__name__
    if kind == "FeaturesDict":
        return {key: _encode_images(feature[key], item, quality) for key, item in value.items()}
    if kind in ("Dataset", "Sequence"):
        return [_encode_images(feature.feature, item, quality) for item in value]
    if kind != "Image":
        return value
    if isinstance(value, np.ndarray):
        if len(value.shape) != 3 or any(want not in (None, have)
                                        for want, have in zip(feature.shape, value.shape, strict=True)):
            raise ValueError(f"an image of shape {value.shape}, where the feature says {feature.shape}")
        encoded = io.BytesIO()
        value = value[..., 0] if value.shape[-1] == 1 else value  # grey or depth
        Image.fromarray(value).save(encoded, feature.encoding_format or "png", quality=quality)
        value = encoded.getvalue()
    return io.BytesIO(value)


# ---- The program that indexes ------------------------------------------------------------------------------


def main() -> None:
    """Carry out the job on standard input; what is wrong with the data goes to standard output."""
    end_with_parent()
    job = json.load(sys.stdin)
    paths = {key: Path(job[key]) for key in ("directory", "path")}
    try:
        build_frame_table(**{**job, **paths, "recipe": Recipe(**job["recipe"])})
    except (UserError, OSError) as error:
        if isinstance(error, OSError) and not error.filename:  # of writing: it does not say where
            error = f"{paths['path']}: {error.strerror}: make room there, or set index_dir to another disk"
        print(error)
        sys.exit(1)


if __name__ == "__main__":
    main()
