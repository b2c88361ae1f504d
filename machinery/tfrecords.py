"""Reading TFDS' files without TensorFlow: TFRecord files, their records, and what these declare.

Read in this order: read_records (bytes on disk), Steps (one episode), step_features (the names and
types in it). It imports no PyTorch, as rlds.py, which uses it.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import google_crc32c
import numpy as np

from machinery.frames import DataError
from machinery.recipes import Feature

# ---- TFRecord files ------------------------------------------------------------------------------

# per record: length (uint64), masked crc of length (uint32), data, masked crc of data (uint32)


def masked_crc(data: bytes) -> int:
    """CRC-32C, rotated and offset as TFRecord stores it."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def read_records(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (file offset of the data, data) for each record of a TFRecord file. Raises DataError if
    it is damaged."""
    with open(path, "rb") as file:
        number = start = 0
        while header := file.read(12):
            size, crc = header[:8], header[8:]
            if masked_crc(size) != int.from_bytes(crc, "little"):
                hint = "" if start else ": a Git LFS pointer (run `git lfs pull`), or compressed?"
                raise DataError(f"{path}: record {number}: damaged header at byte {start}{hint}")
            length = int.from_bytes(size, "little")
            data, crc = file.read(length), file.read(4)
            if len(crc) < 4 or masked_crc(data) != int.from_bytes(crc, "little"):
                raise DataError(f"{path}: record {number}: damaged or cut short, by its checksum: "
                                "copy or download the file again")
            yield start + 12, data
            number += 1
            start += 12 + length + 4


# ---- tf.train.Example ----------------------------------------------------------------------------

# a protobuf map {feature name: list of bytes, floats or ints}. The protobuf library would copy
# every image, and we only need to know where it is. A message is a sequence of (tag, length,
# payload), so finding it is a short walk


def _varint(data: bytes, i: int) -> tuple[int, int]:
    value = shift = 0
    while data[i] >= 0x80:
        value |= (data[i] & 0x7F) << shift
        shift += 7
        i += 1
    return value | data[i] << shift, i + 1


def _fields(data: bytes, i: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Yield (field number, start, stop) of each field of the protobuf message data[i:stop]."""
    while i < stop:
        tag, i = _varint(data, i)
        size, i = _varint(data, i)
        yield tag >> 3, i, i + size
        i += size


class Steps:
    """One episode. `steps["observation/state"]` decodes its values, with a leading time dimension.
    """

    def __init__(self, data: bytes, offset: int, features: Mapping[str, Feature]):
        """data: a serialized tf.train.Example; offset: where it starts in its file; features: from
        step_features"""
        self.data = data
        self.offset = offset
        self.features = features
        self.places = {}  # feature name -> (start, stop) of its serialized list
        for _, start, stop in _fields(data, 0, len(data)):  # Example.features
            for _, first, last in _fields(data, start, stop):  # one entry of the map
                entry = {number: span for number, *span in _fields(data, first, last)}
                name = data[slice(*entry[1])].decode()  # field 1 is the key, 2 the value
                self.places[name] = entry[2]

    def __getitem__(self, name: str) -> np.ndarray | list[bytes]:
        """(T, *shape) array of the feature's declared dtype, or a list of T byte strings."""
        from tensorflow_datasets.proto import tf_feature_pb2  # here: importing TFDS takes 0.5 s

        start, stop = self._place(name)
        feature = tf_feature_pb2.Feature.FromString(self.data[start:stop])
        shape, dtype, *_ = self.features[name]
        if dtype.kind == "O":
            return list(feature.bytes_list.value)
        # a tf.train.Example has only float32 and int64: writing rounded float64 to float32
        if dtype.kind == "f":
            values = np.array(feature.float_list.value, np.float32)
        else:
            values = np.array(feature.int64_list.value, np.int64)
        return values.astype(dtype).reshape(-1, *shape)

    def spans(self, name: str) -> np.ndarray:
        """(T, 2) int64: file offset and length in bytes of each encoded image of feature `name`."""
        spans = []
        for _, start, stop in _fields(self.data, *self._place(name)):
            for _, first, last in _fields(self.data, start, stop):
                spans.append((self.offset + first, last - first))
        return np.array(spans, np.int64).reshape(-1, 2)

    def _place(self, name: str) -> tuple[int, int]:
        return self.places[f"steps/{name}" if self.features[name].of_step else name]


def open_builder(directory: Path):
    """TFDS' description of a dataset: its features and splits."""
    import tensorflow_datasets as tfds

    return tfds.builder_from_directory(directory)


def step_features(directory: Path) -> dict[str, Feature]:
    """{"observation/image": Feature, ...} of a dataset's steps, then the features of episodes by
    their full names ("episode_metadata/...")."""
    features = open_builder(directory).info.features
    of_episode = features.get_serialized_info()
    of_steps = of_episode.pop("steps")
    found = {}
    for name, feature, info in _leaves(features, of_episode):
        found[name] = Feature(info.shape, np.dtype(info.np_dtype), _kind(feature), False)
    for name, feature, info in _leaves(features["steps"].feature, of_steps):
        found[name] = Feature(info.shape[1:], np.dtype(info.np_dtype), _kind(feature))
    return found


def _leaves(feature, info, name: str = "") -> Iterator[tuple]:
    """Yield (name, feature, how it is stored) of each feature inside a nested one."""
    if not isinstance(info, Mapping):
        yield name, feature, info
        return
    for key in sorted(info):  # features.json is read in random order
        yield from _leaves(feature[key], info[key], f"{name}/{key}" if name else key)


def _kind(feature) -> str:
    """TFDS' name of a feature's type. An image of floats is a PNG of their bytes, not of colors."""
    floats = type(feature).__name__ == "Image" and np.dtype(feature.np_dtype).kind == "f"
    return "Image of floats" if floats else type(feature).__name__
