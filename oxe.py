"""How a dataset's actions, states, cameras and texts become standard: recipes, and the helpers they name.

OpenVLA's action is 7-D: change of end-effector position (3), change of orientation as roll-pitch-yaw (3),
gripper (absolute, 1 = open, 0 = closed). Datasets disagree on names, gripper sign, rotation format and more.
A recipe (config.Recipe) says what one of them has. It gives state and action as *field lists*:
comma-separated columns to be concatenated,

    "action[:6], action[-1:] clip invert"        key, slice of its columns, helpers applied from left to right
    "world_vector, 0*3, gripper rel2abs"         0*3: three columns of zeros (1*2: two of ones)

where a helper is one of the small functions in HELPERS. State and camera keys are relative to `observation/`;
a state key that starts with "/" and all action keys are relative to the step.

The recipes of Open X-Embodiment and OpenVLA's mixtures stand in configs/tables/open_x_embodiment.yaml; a
user's own dataset is described in the same words in the YAML (`datasets:`). Read the helpers, then
standardize.
"""

import ctypes.util
import functools
import inspect
import math
import re
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from config import RECIPES, Recipe, TrainConfig, UserError, load_table, nearest
from frames import DataError, FrameTable, find_dataset

CAMERAS = ("primary", "secondary", "wrist")
_table = load_table("open_x_embodiment")
DATASETS: dict[str, Recipe] = RECIPES.validate_python(_table["datasets"])
MIXTURES: dict[str, dict[str, float]] = _table["mixtures"]  # {name: {dataset: weight}}
REFUSED: dict[str, str] = _table["refused"]  # {dataset: why OpenVLA does not train on it}

# ------------------------------------------------------------------------------------------------------------
# Helpers: (T, k) -> (T, m). Comparisons are in float32, as in TensorFlow, because 0.95 and 0.1 are
# thresholds.


def clip(x):
    """To [0, 1]."""
    return np.clip(x, 0, 1)


def invert(x):
    """0 <-> 1: makes "1 = open" of "1 = closed"."""
    return 1 - x


def delta(x):
    """Difference to the next step (the last row has none; it is trimmed)."""
    return np.diff(x, axis=0, append=x[-1:])


def binarize(x):
    """Gripper openings to 0 or 1: values in between take the value reached next; those at the end take the
    very last one as it is."""
    x = x.astype(np.float32)
    decided = (x > np.float32(0.95)) | (x < np.float32(0.05))
    value = np.where(decided, x > np.float32(0.95), x[-1:]).astype(np.float32)
    rows = np.where(decided, np.arange(len(x))[:, None], len(x) - 1)
    return np.take_along_axis(value, np.minimum.accumulate(rows[::-1], axis=0)[::-1], axis=0)


def rel2abs(x):
    """Relative gripper commands (+ closes, - opens, within 0.1 of zero: no change) to absolute: 1 = open,
    0 = closed. Before the first command the gripper is in the opposite state; without any command it is
    open."""
    x = x.astype(np.float32)
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


HELPERS = {f.__name__: f for f in (clip, invert, delta, binarize, rel2abs, euler, unzip)}


# ---- From an episode to standard form ----------------------------------------------------------------------

FIELD = re.compile(r"(?P<key>[^\s\[\],]+)(?:\[(?P<start>-?\d*):(?P<stop>-?\d*)\])?(?P<helpers>(?: \w+)*)")


def parse_fields(fields: str) -> list[tuple[str, slice, list]]:
    """ "a[:6], b clip" -> [(key, columns, helper functions), ...]. Raises UserError naming what it cannot
    read."""
    parsed = []
    for text in fields.split(","):
        match = FIELD.fullmatch(text.strip())
        if not match or (unknown := [h for h in match["helpers"].split() if h not in HELPERS]):
            what = f"unknown helper {unknown[0]!r}" if match else "expected 'key[start:stop] helper ...'"
            raise UserError(f"field {text.strip()!r}: {what}; helpers are {', '.join(HELPERS)}")
        start, stop = (int(match[end]) if match[end] else None for end in ("start", "stop"))
        parsed.append((match["key"], slice(start, stop), [HELPERS[h] for h in match["helpers"].split()]))
    return parsed


CONSTANT = re.compile(r"([01])(?:\*(\d+))?")  # "0", "0*3", "1*2"


def read_fields(fields: str, steps, prefix: str, first: int, length: int | None = None) -> np.ndarray:
    """Evaluate a field list on the steps from `first` on -> (T - first, columns) float32. `length` is T -
    first, needed where the list may hold nothing but constants."""
    columns = []
    for key, part, helpers in parse_fields(fields):
        if constant := CONSTANT.fullmatch(key):
            columns.append((int(constant[1]), int(constant[2] or 1)))
            continue
        values = steps[key[1:] if key.startswith("/") else prefix + key]
        values = (values if isinstance(values, np.ndarray) else np.array(values, object))[first:]
        length = len(values)
        width = int(np.prod(values.shape[1:]))
        values = values.reshape(length, width)[:, part]
        if not values.shape[1]:
            raise DataError(f"field {key!r}: no columns left of its {width}")
        for helper in helpers:
            values = helper(values)
        columns.append(values.astype(np.float32))
    columns = [c if isinstance(c, np.ndarray) else np.full((length, c[1]), c[0], np.float32) for c in columns]
    return np.concatenate(columns, axis=1)


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


def standardize(steps, recipe: Recipe, cameras: list[str | None], load_proprio: bool) -> dict:
    """One episode (rlds.Steps) in standard form, T frames after trimming.

    -> action (T, A) float32; proprio (T, P) float32 or None; images (T, len(cameras), 2) int64, where each
    encoded image lies (zeros for a camera that is None); instructions: T byte strings.
    """
    trim = int(recipe.trim)
    action = read_fields(recipe.action, steps, "", trim)
    proprio = read_fields(recipe.state, steps, "observation/", trim, len(action)) if load_proprio else None
    if trim:
        action, proprio = action[:-1], proprio[:-1] if load_proprio else None
    frames = slice(trim, trim + len(action))
    images = np.zeros((len(action), len(cameras), 2), np.int64)
    for c, key in enumerate(cameras):
        if key is not None:
            images[:, c] = steps.spans(f"observation/{key}")[frames]
    instructions = read_instructions(steps[recipe.instruction])[frames]
    return {"action": action, "proprio": proprio, "images": images, "instructions": instructions}


def code_of(recipe: Recipe) -> str:
    """The source of all that carries a recipe out: when it changes, frame tables are made anew."""
    fields = [*parse_fields(recipe.action), *parse_fields(recipe.state)]
    code, todo = {}, ["standardize", *(helper.__name__ for _, _, helpers in fields for helper in helpers)]
    while todo:  # these, and every function that they name
        name = todo.pop()
        if name not in code and inspect.isfunction(function := globals().get(name)):
            code[name] = inspect.getsource(function)
            todo += re.findall(r"\w+", code[name])
    return repr(sorted(code.items()))


# ---- Which frames are shown --------------------------------------------------------------------------------


def kept_episodes(table: FrameTable, train: bool) -> tuple[np.ndarray, np.ndarray]:
    """The episodes of a split: (first frame, number of frames), each (E,) int64.

    OpenVLA's rules: with a "val" split, train on "train"; otherwise on the first 95 % of its episodes
    (rounded half to even). Episodes without any instruction are left out.
    """
    split = np.array(table.splits)[table.episodes["split"]]
    chosen = split == "train"
    if "val" not in table.splits:
        boundary = round(95 * int(chosen.sum()) / 100)
        chosen = chosen & ((np.cumsum(chosen) <= boundary) == train)
    elif not train:
        chosen = split == "val"
    chosen = table.episodes[chosen & table.episodes["labeled"]]
    return chosen["first"].astype(np.int64), chosen["count"].astype(np.int64)


def is_idle(normalized: np.ndarray) -> np.ndarray:
    """(..., steps, 7) normalised action chunks -> (...) bool: does the whole chunk command no motion?

    For DROID. OpenVLA compares with what "zero" would be under the quantiles of the whole of it, written into
    its code; with other statistics the filter therefore drops nothing. Kept so.
    """
    low, high = (np.array(_table["droid"][key], np.float32) for key in ("q01", "q99"))
    zero = np.float32(2) * (-low) / (high - low + np.float32(1e-8)) - np.float32(1)
    return (np.abs(normalized[..., :6] - zero) <= np.float32(1e-5)).all((-1, -2))


def without_idle(first: np.ndarray, count: np.ndarray, actions: Callable) -> tuple[np.ndarray, np.ndarray]:
    """Stretches of frames -> those between idle ones, by the thousand to bound memory. actions: rows ->
    normalised action chunks."""
    stretches = []
    for part in range(0, len(first), 1000):
        f, c = first[part : part + 1000], count[part : part + 1000]
        rows = np.repeat(f - np.cumsum(c) + c, c) + np.arange(c.sum())
        rows = rows[~is_idle(actions(rows))]
        starts = np.flatnonzero((np.diff(rows, prepend=-2) != 1) | np.isin(rows, f))
        stretches.append(np.stack([rows[starts], np.diff(np.append(starts, len(rows)))]))
    return tuple(np.concatenate(stretches, axis=1)) if stretches else (first, count)


# ---- Mixtures ----------------------------------------------------------------------------------------------


def resolve_mixture(data_mix: str | Mapping[str, float], own: Mapping[str, Recipe] | None = None
                    ) -> list[tuple[str, float, Recipe]]:
    """A mixture's or a dataset's name, or {dataset: weight} -> [(dataset, weight, recipe), ...].

    own: the YAML's `datasets:`. Datasets that OpenVLA refuses are left out. Raises UserError for unknown
    names, for field lists that cannot be read, and when nothing is left.
    """
    own = RECIPES.validate_python(own or {})
    for name, recipe in own.items():
        try:
            parse_fields(recipe.action), parse_fields(recipe.state)
        except UserError as error:
            raise UserError(f"datasets: {name}: {error}") from None
    known, mixture = {**DATASETS, **own}, []
    own_name = isinstance(data_mix, str) and data_mix in own
    for name, weight in ({data_mix: 1.0} if own_name else spelled_out(data_mix)).items():
        plain = str(name).partition(":")[0]
        if not (isinstance(weight, int | float) and 0 < weight < math.inf):
            raise UserError(f"data_mix: the weight of {name} must be positive, it is {weight!r}")
        if plain not in known and plain not in REFUSED:
            raise UserError(f"data_mix: no dataset or mixture is called {name!r}"
                            f"{nearest(plain, [*known, *MIXTURES])}; describe your own under `datasets:`")
        if plain in known:
            mixture.append((name, float(weight), known[plain]))
    if not mixture:
        reasons = "".join(f"; {name}: {why}" for name, why in left_out(data_mix).items())
        raise UserError(f"data_mix: {data_mix}: the mixture is empty: nothing to train on{reasons}")
    return mixture


def spelled_out(data_mix: str | Mapping[str, float]) -> Mapping[str, float]:
    """A mixture by name, or one dataset -> {dataset: weight}."""
    return MIXTURES.get(data_mix, {data_mix: 1.0}) if isinstance(data_mix, str) else data_mix


def left_out(data_mix: str | Mapping[str, float]) -> dict[str, str]:
    """The datasets of a mixture that OpenVLA does not train on, and why."""
    names = [str(name).partition(":")[0] for name in spelled_out(data_mix)]
    return {name: REFUSED[name] for name in names if name in REFUSED}


def find_datasets(cfg: TrainConfig) -> list[tuple[str, float, Recipe, Path]]:
    """The mixture that a config names -> [(dataset, weight, recipe, its directory), ...]. Raises UserError
    for one that is not there."""
    mixture = resolve_mixture(cfg.data_mix, cfg.datasets)
    return [(name, weight, recipe, find_dataset(cfg.data_root_dir, name)) for name, weight, recipe in mixture]
