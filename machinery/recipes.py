"""Applying a recipe: from an episode of a dataset to its standard form.

fields.py explains recipes and parses their field lists. Here are the helpers that these name, and
`standardize`, which applies a recipe to an episode. The program that indexes (rlds.py) does this
once per episode, and convention.py for single actions and states of a robot that acts.
"""

import ctypes.util
import functools
import itertools
import math
import re
import zlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from machinery.config import Recipe
from machinery.fields import Field, feature_name, has_words, parse_fields
from machinery.frames import DataError

# ---- Helpers: (T, k) -> (T, m) -------------------------------------------------------------------

# 0.95 and 0.1 are thresholds: comparisons are in float32, as in TensorFlow


def near_one(x, word: str):
    """x, for helpers that are for grippers in 0..1 or -1..1. Raises DataError for others (percent,
    0..255), of which little would remain."""
    largest = abs(x).max(initial=0)
    if largest > 10:
        raise DataError(f"{word}: the values go up to {largest:.4g}: divide first, as in '/255 "
                        f"{word}'")
    return x


def clip(x):
    """To [0, 1], for grippers in 0..1 or -1..1."""
    return np.clip(near_one(x, "clip"), 0, 1)


def invert(x):
    """0 <-> 1: from "1 = closed" to "1 = open"."""
    return 1 - x


def scale(x, word: str):
    """Multiply or divide by the number in the word: `*2` or `/255`."""
    number = np.float32(float(word[1:]))
    return x * number if word[0] == "*" else x / number


def delta(x):
    """Difference to the next step (0 for the last, which has none and is trimmed)."""
    return np.diff(x, axis=0, append=x[-1:])


def binarize(x):
    """Gripper openings to 0 or 1. Values in between take the next value that is decided; after the
    last decided one, they take the very last value unchanged."""
    x = near_one(x, "binarize").astype(np.float32)
    is_open = x > np.float32(0.95)
    decided = is_open | (x < np.float32(0.05))
    value = np.where(decided, is_open, x[-1:]).astype(np.float32)
    row = np.where(decided, np.arange(len(x))[:, None], len(x) - 1)
    next_decided = np.minimum.accumulate(row[::-1], axis=0)[::-1]
    return np.take_along_axis(value, next_decided, axis=0)


def rel2abs(x):
    """Relative gripper commands (+ closes, - opens, within 0.1 of zero: no change) to absolute
    ones: 1 = open, 0 = closed. Before the first command, the gripper is in the opposite state.
    Without any command, it is open."""
    x = near_one(x, "rel2abs").astype(np.float32)
    command = np.where(x < np.float32(-0.1), 1, np.where(x > np.float32(0.1), -1, 0))
    first = np.take_along_axis(command, (command != 0).argmax(0)[None], axis=0)  # (1, k)
    before = np.where(first == 0, 1, -first)
    command = np.concatenate([before, command])
    row = np.where(command != 0, np.arange(len(command))[:, None], 0)
    last = np.maximum.accumulate(row, axis=0)
    state = np.take_along_axis(command, last, axis=0)[1:]
    return state.astype(np.float32) / 2 + np.float32(0.5)


# TensorFlow 2.15 on x86 computes arcs of 8 floats at once by Eigen's polynomials, and of the rest
# by the C library. They differ in the last bit, and OpenVLA's actions have these bits. One bit we
# cannot have: Eigen starts 1/r with the processor's estimate (rcpps), which AMD and Intel round
# differently, and we divide. On one EPYC, a tenth of the angles beyond 45 degrees differ from
# ours, by 2.4e-7 at most.


def _as_tensorflow(polynomial, c_name: str, *arrays: np.ndarray) -> np.ndarray:
    eights = len(arrays[0]) // 8 * 8
    rest = _c_function(c_name, *(a[eights:] for a in arrays))
    return np.append(polynomial(*(a[:eights] for a in arrays)), rest)


def _c_function(name: str, *arrays: np.ndarray) -> np.ndarray:
    function = getattr(ctypes.CDLL(ctypes.util.find_library("m")), name)
    function.restype = ctypes.c_float
    function.argtypes = [ctypes.c_float] * len(arrays)
    return np.array([function(*map(float, values)) for values in zip(*arrays, strict=True)],
                    np.float32)


def _asin(x):
    large = abs(x) > np.float32(0.5)  # there, asin(x) = pi/2 - 2 asin(sqrt((1 - x) / 2))
    v = np.where(large, np.sqrt(np.float32(0.5) - np.float32(0.5) * abs(x)), abs(x))
    p = np.float32(0.0508838854730129)
    for coefficient in (0.0395139865577221, 0.0755022019147873, 0.166649177670479,
                        1.0000001192092896):
        p = p * (v * v) + np.float32(coefficient)
    return np.copysign(np.where(large, np.float32(np.pi / 2) - 2 * (p * v), p * v), x)


def _atan2(y, x):
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        zero = np.copysign(np.float32(0), y) * np.copysign(np.float32(1), x)
        ratio = np.where(y == 0, zero, y / x)
        large = abs(ratio) > 1  # there, atan(r) = pi/2 - atan(1/r)
        v = np.where(large, 1 / abs(ratio), abs(ratio))
    odd = np.float32(0.00290188402868807)
    even = np.float32(-0.0162907354533672)
    for o, e in ((0.0430826172232628, -0.0754088833928108),
                 (0.10660472512245178, -0.14209578931331635),
                 (0.19993579387664795, -0.33333143591880798)):
        odd = odd * (v * v * (v * v)) + np.float32(o)
        even = even * (v * v * (v * v)) + np.float32(e)
    p = (odd * (v * v) + even) * (v * (v * v)) + v
    atan = np.copysign(np.where(large, np.float32(np.pi / 2) - p, p), ratio)
    return atan + np.where(np.signbit(x), np.copysign(np.float32(np.pi), y), np.float32(0))


def euler(q):
    """Unit quaternion x, y, z, w -> roll, pitch, yaw in radians.

    Bit for bit as in OpenVLA, by tensorflow_graphics (geometry/transformation/euler.py: products
    are shrunk by two epsilons so that asin is defined).
    """
    one = np.float32(1)
    eps = np.float32(2 * np.finfo(np.float32).eps)
    asin = functools.partial(_as_tensorflow, _asin, "asinf")
    atan2 = functools.partial(_as_tensorflow, _atan2, "atan2f")

    def shrink(v):
        return v * (one - eps)

    def sign(v):
        return np.where(v >= 0, one, -one)

    x, y, z, w = q.astype(np.float32).T
    tx = shrink(2 * x)
    ty = shrink(2 * y)
    tz = shrink(2 * z)
    r00 = shrink(one - (ty * y + tz * z))
    r01 = shrink(ty * x - tz * w)
    r02 = shrink(tz * x + ty * w)
    r10 = shrink(ty * x + tz * w)
    r20 = shrink(tz * x - ty * w)
    r21 = shrink(tz * y + tx * w)
    r22 = shrink(one - (tx * x + ty * y))

    pitch = -asin(r20)
    cos = sign(np.cos(pitch))
    roll = atan2(r21 * cos, (sign(r22) * eps + r22) * cos)
    yaw = atan2(r10 * cos, (sign(r00) * eps + r00) * cos)
    angles = np.stack([roll, pitch, yaw], axis=-1)

    up = sign(r20)  # straight up or down, roll and yaw are one: roll gets all of it
    locked_roll = atan2(-up * r01, -up * (sign(r02) * eps + r02))
    locked = np.stack([locked_roll, -up * np.float32(np.pi / 2), np.zeros_like(up)], axis=-1)
    is_locked = np.abs(np.abs(r20) - one) < np.float32(1e-6)
    return np.where(is_locked[:, None], locked, angles)


def unzip(strings):
    """zlib-compressed little-endian float32 (Kuka's observations)."""
    return np.stack([np.frombuffer(zlib.decompress(s), "<f4") for s in strings[:, 0]])


FUNCTIONS = {f.__name__: f for f in (clip, invert, delta, binarize, rel2abs, euler, unzip)}


def apply(values: np.ndarray, helpers: list[str]) -> np.ndarray:
    """Apply the helpers of a field, from left to right."""
    for word in helpers:
        values = FUNCTIONS[word](values) if word in FUNCTIONS else scale(values, word)
    return values


# ---- From an episode to standard form ------------------------------------------------------------


class Feature(NamedTuple):
    """A feature that a dataset declares."""

    shape: tuple[int | None, ...]  # of one step's value, as it is stored
    dtype: np.dtype  # object: bytes
    kind: str  # TFDS' name of its type
    of_step: bool = True  # or of the episode

    def __str__(self) -> str:
        dtype = "bytes" if self.dtype.kind == "O" else self.dtype.name
        owner = "step" if self.of_step else "episode"
        return f"{self.kind} of shape {self.shape} {dtype} per {owner}"


class Execution:
    """Some of a record's steps, read as rlds.Steps."""

    def __init__(self, steps, span: slice, length: int, decoded: dict):
        """length: steps of the record; decoded: its features, for all executions in it"""
        self.steps = steps
        self.features = steps.features
        self.span = span
        self.length = length
        self.decoded = decoded

    def __getitem__(self, name: str):
        if name not in self.decoded:
            self.decoded[name] = self.steps[name]
        values = self.decoded[name]
        return self.part(name, values) if self.features[name].of_step else values

    def spans(self, name: str) -> np.ndarray:
        return self.part(name, self.steps.spans(name))

    def part(self, name: str, values):
        return per_step(name, values, self.length)[self.span]


def executions(steps) -> list:
    """The executions in a record (rlds.Steps), usually one. is_first begins one, and is_last ends
    one. If it is true for several steps in a row, the first of them begins it, the last ends it."""
    bounds = set()
    for name, turn in (("is_first", 1), ("is_last", -1)):
        feature = steps.features.get(name)
        if feature and feature.of_step and feature.shape in ((), (1,)):
            flags = np.asarray(steps[name], np.int8).reshape(-1)
            length = len(flags)
            bounds |= {*(np.flatnonzero(np.diff(flags) == turn) + 1).tolist()}
    if not bounds:
        return [steps]
    decoded = {}
    return [Execution(steps, slice(first, stop), length, decoded)
            for first, stop in itertools.pairwise([0, *sorted(bounds), length])]


def standardize_record(steps, recipe: Recipe, cameras: list[str | None], load_proprio: bool
                       ) -> list[dict]:
    """Each episode in a record (rlds.Steps) in standard form."""
    parts = [steps] if recipe.openvla_rules else executions(steps)
    return [standardize(part, recipe, cameras, load_proprio) for part in parts]


def standardize(steps, recipe: Recipe, cameras: list[str | None], load_proprio: bool) -> dict:
    """One episode (rlds.Steps) in standard form, T frames after trimming.

    -> action (T, A) float32; widths, of the A dimensions by field; proprio (T, P) float32 or None;
    images (T, len(cameras), 2) int64, offset and length of each encoded image (0 without a camera);
    instructions: T byte strings

    Raises DataError if a feature does not have one value per step.
    """
    key = next(field.key for field in parse_fields(recipe.action) if not field.constant)
    length = len(steps[key])
    trimmed = int(recipe.trim)  # steps at both ends
    frames = slice(trimmed, length - trimmed)
    count = max(length - 2 * trimmed, 0)

    columns = read_fields(recipe.action, steps, "", trimmed, length)
    proprio = None
    if load_proprio:
        state = read_fields(recipe.state, steps, "observation/", trimmed, length)
        proprio = np.concatenate(state, axis=1)[:count]
    instructions = read_instructions(steps[recipe.instruction])
    if not steps.features[recipe.instruction].of_step:
        instructions = instructions * length
    per_step(recipe.instruction, instructions, length)
    images = np.zeros((count, len(cameras), 2), np.int64)
    for camera, key in enumerate(cameras):
        if key is not None:
            spans = per_step(key, steps.spans(feature_name(key, "observation/")), length)
            images[:, camera] = spans[frames]
    return {"action": np.concatenate(columns, axis=1)[:count],
            "widths": [column.shape[1] for column in columns], "proprio": proprio,
            "images": images, "instructions": instructions[frames]}


def read_fields(fields: str, steps, prefix: str, first: int, length: int) -> list[np.ndarray]:
    """Evaluate a field list on the steps first .. length - 1 -> the columns of each field,
    (length - first, width) float32."""
    columns = []
    for field in parse_fields(fields, prefix):
        if field.constant:
            value, width = field.constant
            columns.append(np.full((length - first, width), value, np.float32))
            continue
        values = per_step(field.key, steps[field.key], length)[first:]
        if isinstance(values, list):
            values = np.array(values, object)
        elif values.dtype.kind in "bui":  # 3 - 5 is -2 in recipes, not 65534
            values = values.astype(np.int64)
        values = values.reshape(len(values), math.prod(values.shape[1:]))
        columns.append(apply(take_columns(values, field), field.helpers).astype(np.float32))
    return columns


def per_step(name: str, values, length: int):
    """The values of a feature, if there is one for each step. Raises DataError otherwise."""
    if len(values) != length:
        raise DataError(f"{name!r} has {len(values)} values in {length} steps: a feature must have "
                        "one value for each step")
    return values


def take_columns(values: np.ndarray, field: Field) -> np.ndarray:
    """(T, all columns) -> (T, those of the field), with w last. Raises DataError for columns that
    are not there, which NumPy would leave out, and for a quaternion that is not 4."""
    width = values.shape[1]
    bounds = (field.columns.start or 0, field.columns.stop or 0)
    taken = values[:, field.columns]
    if not taken.shape[1] or max(map(abs, bounds)) > width:
        raise DataError(f"field {field.key!r}: has {width} columns, and the recipe takes "
                        f"[{bounds[0]}:{bounds[1] or ''}]")
    if (field.wxyz or "euler" in field.helpers) and taken.shape[1] != 4:
        raise DataError(f"field {field.key!r}: a quaternion has 4 columns, not {taken.shape[1]}: "
                        f"name them, as in {field.key}[3:7]")
    return np.roll(taken, -1, axis=1) if field.wxyz else taken


def read_instructions(values: np.ndarray | list[bytes]) -> list[bytes]:
    """Instructions per step, in UTF-8. Language-Table has code points, padded to 512 with zeros."""
    if isinstance(values, list):
        return values
    decode = functools.lru_cache(decode_code_points)
    return [decode(row.tobytes()) for row in values.astype("<i4")]


def decode_code_points(row: bytes) -> bytes:
    """Code points of four bytes, up to the first zero -> UTF-8. What is not a character becomes
    U+FFFD, as in TensorFlow."""
    return row.decode("utf-32-le", "replace").partition("\0")[0].encode()


def action_masks(recipe: Recipe, widths: list[int]
                 ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which dimensions of the action are targets, which are raw, and which the recipe calls targets
    or changes: each (A,) bool.

    widths: of the A dimensions, by field. The first two are OpenVLA's absolute_action_mask, and the
    opposite of its action_normalization_mask.
    """
    fields = parse_fields(recipe.action)
    target = np.repeat([field.target for field in fields], widths)
    raw = np.repeat([field.raw for field in fields], widths)
    if has_words(fields):
        return target, raw, target | np.repeat([field.change for field in fields], widths)
    declared = max(recipe.absolute or 0, recipe.targets)
    absolute = recipe.absolute or 0
    if recipe.absolute is None and not recipe.targets:
        absolute = 1
    targets = max(absolute, recipe.targets)
    from_end = np.arange(len(raw), 0, -1)
    if targets > len(raw):
        raise DataError(f"{targets} absolute action dimensions of {len(raw)}: lower `absolute` or "
                        "`targets` in its recipe")
    return from_end <= targets, from_end <= absolute, from_end <= declared


def unzipped(recipe: Recipe, widths: list[int]) -> dict[str, int]:
    """{feature: numbers per step} of those that unzip reads. Only their content shows it."""
    fields = zip(parse_fields(recipe.action), widths, strict=True)
    return {field.key: width for field, width in fields if "unzip" in field.helpers}


# ---- Does a recipe fit a dataset? ----------------------------------------------------------------


def all_fields(recipe: Recipe, load_proprio: bool) -> list[Field]:
    """The fields of a recipe's action and, if it is loaded, of its state."""
    states = parse_fields(recipe.state, "observation/") if load_proprio else []
    return parse_fields(recipe.action) + states


def check_features(features: Mapping[str, Feature], recipe: Recipe, cameras: list[str | None],
                   load_proprio: bool) -> dict[str, int]:
    """-> {feature: numbers per step} of the actions and states in a recipe.

    Raises DataError for a feature that the dataset does not have, or not in a form that gives one
    value per step: most other forms would be read as something else.
    """
    fields = all_fields(recipe, load_proprio)
    uses = [(field.key, "zlib" if "unzip" in field.helpers else "number")
            for field in fields if not field.constant]
    for key in cameras:
        if key is not None:
            uses.append((feature_name(key, "observation/"), "image"))
    uses.append((recipe.instruction, "text"))

    widths = {}
    for name, use in uses:
        if name not in features:
            raise DataError(f"its steps have no {name!r}, which the recipe names; they have "
                            f"{sorted(features)}")
        feature = features[name]
        one_string = feature.dtype.kind == "O" and feature.shape == ()
        fixed = None not in feature.shape
        code_points = feature.dtype.kind in "iu" and len(feature.shape) == 1 and fixed
        fits = {"number": feature.dtype.kind in "biuf" and fixed, "zlib": one_string,
                "image": one_string and feature.kind == "Image", "text": one_string or code_points}
        if not fits[use] or not (feature.of_step or use == "text"):
            raise DataError(f"the feature {name!r} is {feature}: {ACCEPTED[use]}")
        if use == "number":
            widths[name] = math.prod(feature.shape)
    return widths


ACCEPTED = {
    "number": "actions and states must be Tensors of numbers, of one shape, in every step",
    "zlib": "unzip needs one compressed string per step",
    "image": "a camera must be an Image feature (JPEG or PNG of uint8), one per step",
    "text": "an instruction must be one Text per step, or one per episode",
}


NO_STATE = re.compile(r"(^|/|next[._])(is_first|is_last|is_terminal|terminate_episode|reward|done|"
                      r"success|discount|timestamp|((frame|episode|task|step)_)?index)$|embedding")


def unused(features: Mapping[str, Feature], recipe: Recipe, cameras: list[str | None],
           load_proprio: bool) -> list[str]:
    """What each step records and a table leaves out: numbers that may be states or actions, and
    images. Each is named with its size."""
    fields = all_fields(recipe, load_proprio)
    used = {field.key for field in fields}
    used |= {feature_name(key, "observation/") for key in cameras if key}
    found = []
    for name, feature in features.items():
        if name in used or not feature.of_step or NO_STATE.search(name):
            continue
        if feature.kind.startswith("Image"):
            found.append(f"{name} ({feature.kind})")
        elif feature.dtype.kind in "biuf" and None not in feature.shape:
            count = math.prod(feature.shape)
            found.append(f"{name} ({count} number{'s' * (count > 1)})")
    return found
