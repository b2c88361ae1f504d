"""Carrying a recipe out: from an episode of a dataset to its standard form.

fields.py explains recipes and reads their field lists; here are the helpers that they name, and
`standardize`, which applies one to an episode. It is done once for each episode, by the program that indexes
(rlds.py), and for a single action or state when a robot asks for one in its own convention (convention.py).
"""

import ctypes.util
import functools
import math
import zlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from machinery.config import Recipe
from machinery.fields import CONSTANT, Field, parse_fields
from machinery.frames import DataError

# ------------------------------------------------------------------------------------------------------------
# Helpers: (T, k) -> (T, m). Comparisons are in float32, as in TensorFlow, because 0.95 and 0.1 are
# thresholds.


def near_one(x, word: str):
    """x, for helpers that are made for grippers in 0..1 or -1..1: of per cent or 0..255 little would be left.
    Raises DataError for such."""
    if (far := abs(x).max(initial=0)) > 10:
        raise DataError(f"{word}: would make 1 of values up to {far:.4g}: divide first, as in '/255 {word}'")
    return x


def clip(x):
    """To [0, 1], for grippers in 0..1 or -1..1."""
    return np.clip(near_one(x, "clip"), 0, 1)


def invert(x):
    """0 <-> 1: makes "1 = open" of "1 = closed"."""
    return 1 - x


def scale(x, word: str):
    """`*2` or `/255`: multiplied by the number, or divided."""
    number = np.float32(float(word[1:]))
    return x * number if word[0] == "*" else x / number


def delta(x):
    """Difference to the next step (the last row has none; it is trimmed)."""
    return np.diff(x, axis=0, append=x[-1:])


def binarize(x):
    """Gripper openings to 0 or 1: values in between take the value reached next; those at the end take the
    very last one as it is."""
    x = near_one(x, "binarize").astype(np.float32)
    decided = (x > np.float32(0.95)) | (x < np.float32(0.05))
    value = np.where(decided, x > np.float32(0.95), x[-1:]).astype(np.float32)
    rows = np.where(decided, np.arange(len(x))[:, None], len(x) - 1)
    return np.take_along_axis(value, np.minimum.accumulate(rows[::-1], axis=0)[::-1], axis=0)


def rel2abs(x):
    """Relative gripper commands (+ closes, - opens, within 0.1 of zero: no change) to absolute: 1 = open,
    0 = closed. Before the first command the gripper is in the opposite state; without any command it is
    open."""
    x = near_one(x, "rel2abs").astype(np.float32)
    command = np.where(x < np.float32(-0.1), 1, np.where(x > np.float32(0.1), -1, 0))
    first = np.take_along_axis(command, (command != 0).argmax(0)[None], axis=0)  # (1, k)
    command = np.concatenate([np.where(first == 0, 1, -first), command])
    last = np.maximum.accumulate(np.where(command != 0, np.arange(len(command))[:, None], 0), axis=0)
    return np.take_along_axis(command, last, axis=0)[1:].astype(np.float32) / 2 + np.float32(0.5)


def _c_function(name: str, *arrays: np.ndarray) -> np.ndarray:
    function = getattr(ctypes.CDLL(ctypes.util.find_library("m")), name)
    function.restype, function.argtypes = ctypes.c_float, [ctypes.c_float] * len(arrays)
    rows = zip(*map(np.ndarray.tolist, arrays), strict=True)
    return np.array([function(*values) for values in rows], np.float32)


def _asin(x):
    large = abs(x) > np.float32(0.5)  # there, asin(x) = pi/2 - 2 asin(sqrt((1 - x) / 2))
    v = np.where(large, np.sqrt(np.float32(0.5) - np.float32(0.5) * abs(x)), abs(x))
    p = np.float32(0.0508838854730129)
    for coefficient in (0.0395139865577221, 0.0755022019147873, 0.166649177670479, 1.0000001192092896):
        p = p * (v * v) + np.float32(coefficient)
    return np.copysign(np.where(large, np.float32(np.pi / 2) - 2 * (p * v), p * v), x)


def _atan2(y, x):
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        ratio = np.where(y == 0, np.copysign(np.float32(0), y) * np.copysign(np.float32(1), x), y / x)
        large = abs(ratio) > 1  # there, atan(r) = pi/2 - atan(1/r)
        v = np.where(large, 1 / abs(ratio), abs(ratio))
    odd, even = np.float32(0.00290188402868807), np.float32(-0.0162907354533672)
    for o, e in ((0.0430826172232628, -0.0754088833928108), (0.10660472512245178, -0.14209578931331635),
                 (0.19993579387664795, -0.33333143591880798)):
        odd, even = odd * (v * v * (v * v)) + np.float32(o), even * (v * v * (v * v)) + np.float32(e)
    p = (odd * (v * v) + even) * (v * (v * v)) + v
    atan = np.copysign(np.where(large, np.float32(np.pi / 2) - p, p), ratio)
    return atan + np.where(np.signbit(x), np.copysign(np.float32(np.pi), y), np.float32(0))


def _as_tensorflow(polynomial, c_name: str, *arrays: np.ndarray) -> np.ndarray:
    """TensorFlow 2.15 on x86 takes whole packets of 8 floats through Eigen's polynomials and the rest through
    the C library. They differ in the last bit, and OpenVLA's actions have those bits. One bit is out of
    reach: Eigen begins 1/r with the processor's own estimate (rcpps), which AMD and Intel round differently;
    we divide. On one EPYC a tenth of the angles beyond 45 degrees differ so, by 2.4e-7 at most."""
    packets = len(arrays[0]) // 8 * 8
    rest = _c_function(c_name, *(a[packets:] for a in arrays))
    return np.append(polynomial(*(a[:packets] for a in arrays)), rest)


def euler(q):
    """Unit quaternion x, y, z, w -> roll, pitch, yaw in radians, bit for bit as tensorflow_graphics does
    it for OpenVLA (geometry/transformation/euler.py: products are shrunk by two epsilons so that asin
    stays defined)."""
    if q.shape[1] != 4:
        raise DataError(f"euler: needs the columns x, y, z, w of a quaternion, and is given {q.shape[1]}")
    eps = np.float32(2 * np.finfo(np.float32).eps)
    one = np.float32(1)
    asin = functools.partial(_as_tensorflow, _asin, "asinf")
    atan2 = functools.partial(_as_tensorflow, _atan2, "atan2f")

    def shrink(v):
        return v * (one - eps)

    def sign(v):
        return np.where(v >= 0, one, -one)

    x, y, z, w = q.astype(np.float32).T
    tx, ty, tz = shrink(2 * x), shrink(2 * y), shrink(2 * z)
    r00, r10 = shrink(one - (ty * y + tz * z)), shrink(ty * x + tz * w)
    r21, r22 = shrink(tz * y + tx * w), shrink(one - (tx * x + ty * y))
    r20, r01, r02 = shrink(tz * x - ty * w), shrink(ty * x - tz * w), shrink(tz * x + ty * w)
    pitch = -asin(r20)
    cos = sign(np.cos(pitch))
    roll = atan2(r21 * cos, (sign(r22) * eps + r22) * cos)
    yaw = atan2(r10 * cos, (sign(r00) * eps + r00) * cos)
    up = sign(r20)  # pointing straight up or down, roll and yaw are one: give all of it to roll
    locked_roll = atan2(-up * r01, -up * (sign(r02) * eps + r02))
    locked = np.stack([locked_roll, -up * np.float32(np.pi / 2), np.zeros_like(up)], axis=-1)
    gimbal = np.abs(np.abs(r20) - one) < np.float32(1e-6)
    return np.where(gimbal[:, None], locked, np.stack([roll, pitch, yaw], axis=-1))


def unzip(strings):
    """zlib-compressed little-endian float32 (Kuka's observations)."""
    try:
        return np.stack([np.frombuffer(zlib.decompress(s), "<f4") for s in strings[:, 0]])
    except zlib.error as error:
        raise DataError(f"damaged zlib data: {error}") from error


FUNCTIONS = {f.__name__: f for f in (clip, invert, delta, binarize, rel2abs, euler, unzip)}  # oxe.HELPERS


def apply(values: np.ndarray, helpers: list[str]) -> np.ndarray:
    """The helpers of a field, from left to right."""
    for word in helpers:
        values = FUNCTIONS[word](values) if word in FUNCTIONS else scale(values, word)
    return values


class Feature(NamedTuple):
    """What a dataset declares of a feature: the shape and dtype of one step's value as it is stored (object:
    bytes), TFDS' name for its kind, and whether steps have it, or their episode."""

    shape: tuple[int | None, ...]
    dtype: np.dtype
    kind: str
    of_step: bool = True

    def __str__(self) -> str:
        stored = "bytes" if self.dtype.kind == "O" else self.dtype.name
        return f"{self.kind} of shape {self.shape} {stored}" + ("" if self.of_step else " of the episode")


# ---- From an episode to standard form ----------------------------------------------------------------------


def read_fields(fields: str, steps, prefix: str, first: int, length: int | None = None) -> list[np.ndarray]:
    """Evaluate a field list on the steps from `first` on -> for each field (T - first, columns) float32.
    `length` is T - first, needed where the list may hold nothing but constants."""
    columns = []
    for field in parse_fields(fields):
        if constant := CONSTANT.fullmatch(field.key):
            columns.append((int(constant[1]), int(constant[2] or 1)))
            continue
        values = steps[feature_name(field.key, prefix)]
        values = (values if isinstance(values, np.ndarray) else np.array(values, object))[first:]
        if values.dtype.kind in "bui":  # 3 - 5 is -2 in recipes, not 65534, and 100 + 100 is not -56
            values = values.astype(np.int64)
        if length not in (None, len(values)):
            raise DataError(f"{field.key!r} has {first + len(values)} values, others {first + length}: "
                            "a feature must have one value for each step")
        length, width = len(values), int(np.prod(values.shape[1:]))
        columns.append(apply(take_columns(values.reshape(length, width), field), field.helpers))
    return [column.astype(np.float32) if isinstance(column, np.ndarray)
            else np.full((length, column[1]), column[0], np.float32) for column in columns]


def take_columns(values: np.ndarray, field: Field) -> np.ndarray:
    """(T, all columns) -> (T, those of the field). Raises DataError where that leaves none, or some of them
    are not there: NumPy would take what there is."""
    start, stop, width = field.columns.start, field.columns.stop, values.shape[1]
    if not values[:, field.columns].shape[1]:
        raise DataError(f"field {field.key!r}: no columns left of its {width}")
    if max(abs(start or 0), abs(stop or 0)) > width:
        raise DataError(f"field {field.key!r}: has {width} columns, and the recipe says "
                        f"[{'' if start is None else start}:{'' if stop is None else stop}]")
    return values[:, field.columns]


def read_instructions(values: np.ndarray | list[bytes]) -> list[bytes]:
    """Instructions per step as UTF-8. Language-Table stores code points, padded with zeros to 512."""
    if isinstance(values, list):
        return values
    decoded = functools.lru_cache(decode_code_points)
    return [decoded(row.tobytes()) for row in values.astype(np.int64)]


def decode_code_points(row: bytes) -> bytes:
    """int64 code points up to the first zero -> UTF-8; what is no character becomes U+FFFD, as in
    TensorFlow."""
    points = np.frombuffer(row, np.int64)
    points = points[: np.argmax(np.append(points, 0) == 0)]
    return "".join(chr(p) if 0 <= p < 0xD800 or 0xDFFF < p < 0x110000 else "\ufffd" for p in points).encode()


def feature_name(key: str, prefix: str) -> str:
    """A recipe's key -> the feature's name within a step."""
    return key[1:] if key.startswith("/") else prefix + key


def action_masks(recipe: Recipe, widths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Which dimensions of a dataset's actions are targets, and which are raw: each (A,) bool. widths: how
    many of the A dimensions each field has. OpenVLA's absolute_action_mask, and the opposite of its
    action_normalization_mask."""
    fields = parse_fields(recipe.action)
    target = np.repeat([field.target for field in fields], widths)
    raw = np.repeat([field.raw for field in fields], widths)
    if not (target | raw).any():
        absolute = 1 if recipe.absolute is None and not recipe.targets else recipe.absolute or 0
        if max(absolute, recipe.targets) > len(raw):
            raise DataError(f"{max(absolute, recipe.targets)} absolute action dimensions of {len(raw)}: "
                            "lower `absolute` or `targets` in its recipe")
        raw = np.arange(len(raw)) >= len(raw) - absolute
        target = np.arange(len(raw)) >= len(raw) - max(absolute, recipe.targets)
    return target, raw


def standardize(steps, recipe: Recipe, cameras: list[str | None], load_proprio: bool) -> dict:
    """One episode (rlds.Steps) in standard form, T frames after trimming. Raises DataError when a feature has
    not exactly one value for each step.

    -> action (T, A) float32, and `widths`, how many of the A come from each of its fields; proprio (T, P)
    float32 or None; images (T, len(cameras), 2) int64, where each encoded image lies (zeros for a camera that
    is None); instructions: T byte strings.
    """
    trim = int(recipe.trim)
    columns = read_fields(recipe.action, steps, "", trim)
    action, proprio = np.concatenate(columns, axis=1), None
    length = trim + len(action)
    if load_proprio:
        proprio = np.concatenate(read_fields(recipe.state, steps, "observation/", trim, len(action)), axis=1)
    instructions = read_instructions(steps[recipe.instruction])
    if not steps.features[recipe.instruction].of_step:  # one text for all of them
        instructions = instructions * length
    spans = {key: steps.spans(feature_name(key, "observation/")) for key in cameras if key is not None}
    for name, values in {recipe.instruction: instructions, **spans}.items():
        if len(values) != length:
            raise DataError(f"{name!r} has {len(values)} values in {length} steps: a feature must have one "
                            "value for each step")
    if trim:
        action, proprio, length = action[:-1], proprio[:-1] if load_proprio else None, length - 1
    images = np.zeros((len(action), len(cameras), 2), np.int64)
    for c, key in enumerate(cameras):
        if key is not None:
            images[:, c] = spans[key][trim:length]
    return {"action": action, "widths": [column.shape[1] for column in columns], "proprio": proprio,
            "images": images, "instructions": instructions[trim:length]}


# ---- Does a recipe fit a dataset? --------------------------------------------------------------------------


def check_features(features: Mapping[str, Feature], recipe: Recipe, cameras: list[str | None],
                   load_proprio: bool) -> dict[str, int]:
    """-> {feature: numbers in a step} of actions and states that a recipe names. Raises DataError for what it
    names and a dataset does not have, or has in a form that does not give one value for each step."""
    fields = [(field, "") for field in parse_fields(recipe.action)]
    fields += [(field, "observation/") for field in parse_fields(recipe.state)] if load_proprio else []
    wanted = [(feature_name(field.key, prefix), "zlib" if "unzip" in field.helpers else "number")
              for field, prefix in fields if not CONSTANT.fullmatch(field.key)]
    wanted += [(feature_name(key, "observation/"), "image") for key in cameras if key is not None]
    for name, use in [*wanted, (recipe.instruction, "text")]:
        if (feature := features.get(name)) is None:
            raise DataError(f"its steps have no {name!r}, which the recipe names; they have "
                            f"{sorted(features)}")
        single = feature.shape == () and feature.dtype.kind == "O"  # of a declared type, once for each step
        code_points = len(feature.shape) == 1 and feature.dtype.kind in "iu"
        fits = {"number": feature.dtype.kind in "biuf" and None not in feature.shape,
                "zlib": single, "image": single and feature.kind == "Image",
                "text": ((single and not feature.kind.startswith("Image"))
                         or (code_points and None not in feature.shape))}
        if not fits[use] or not (feature.of_step or use == "text"):
            raise DataError(f"the feature {name!r} is {feature}: {ACCEPTED[use]}")
    return {name: math.prod(features[name].shape) for name, use in wanted if use == "number"}


ACCEPTED = {"number": "actions and states must be Tensors of numbers, of one shape, in every step",
            "zlib": "unzip needs one compressed string for each step",
            "image": "a camera needs an Image feature (JPEG or PNG, of uint8), one picture for each step",
            "text": "an instruction must be one Text for each step, or one of the episode"}
