"""What each Open X-Embodiment dataset calls things, and how its actions become standard.

OpenVLA's action is 7-D: change of end-effector position (3), change of orientation as roll-pitch-yaw (3),
gripper (absolute, 1 = open, 0 = closed). Datasets disagree on names, gripper sign, rotation format and more.
This file holds the facts, one entry per dataset, and is meant to be consulted rather than read: read Recipe,
the helpers and two or three entries, then skip to MIXTURES.

An entry names cameras, and gives state and action as *field lists*: comma-separated columns to be
concatenated,

    "action[:6], action[-1:] clip invert"        key, slice of its columns, helpers applied from left to right
    "world_vector, 0*3, gripper rel2abs"         0*3: three columns of zeros (1*2: two of ones)

where a helper is one of the small functions in HELPERS. State and camera keys are relative to `observation/`;
a state key that starts with "/" and all action keys are relative to the step. The facts are OpenVLA's
(prismatic/vla/datasets/rlds/oxe/{configs,transforms,mixtures}.py); a user's own dataset is described in the
same way in the YAML (`datasets:`).
"""

import ctypes.util
import difflib
import functools
import inspect
import math
import re
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

from rlds import DataError, Steps

CAMERAS = ("primary", "secondary", "wrist")


@dataclass(frozen=True)
class Recipe:
    """How to read one dataset. A camera may be None: OpenVLA then shows a black image."""

    primary: str | None = None  # camera keys; "a|b": either, drawn per episode (DROID's two exterior cameras)
    secondary: str | None = None
    wrist: str | None = None
    state: str = "state"  # field list, concatenated to `proprio`
    action: str = "action"  # field list; relative dimensions first, absolute ones last
    instruction: str = "language_instruction"  # key of the text, relative to the step
    absolute: int = 1  # how many trailing action dimensions are absolute (grippers): neither normalised nor
    #                    zeroed past the end of an episode
    trim: bool = False  # Bridge: the first step's action is all zero, the last step has none: drop both
    skip_idle: bool = False  # DROID: drop frames whose normalised action is "no motion" (see data.py)

    def camera_keys(self, names: list[str]) -> list[str | None]:
        """Observation keys of the named cameras, alternatives flattened in order of first use."""
        keys = [key for name in names for key in (getattr(self, name) or "").split("|")]
        return list(dict.fromkeys(key or None for key in keys))


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
    return np.array([function(*values) for values in zip(*map(np.ndarray.tolist, arrays), strict=True)], np.float32)


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
    """TensorFlow 2.15 on x86 takes whole packets of 8 floats through Eigen's polynomials and the rest
    through the C library. They differ in the last bit, and OpenVLA's actions have those bits. One bit is
    out of reach: Eigen begins 1/r with the processor's own estimate (rcpps), which AMD and Intel round
    differently; we divide. On one EPYC a tenth of the angles beyond 45 degrees differ so, by 2.4e-7 at most."""
    packets = len(arrays[0]) // 8 * 8
    return np.append(polynomial(*(a[:packets] for a in arrays)), _c_function(c_name, *(a[packets:] for a in arrays)))


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


# ------------------------------------------------------------------------------------------------------------
# From an episode to standard form

FIELD = re.compile(r"(?P<key>[^\s\[\],]+)(?:\[(?P<start>-?\d*):(?P<stop>-?\d*)\])?(?P<helpers>(?: \w+)*)")


def parse_fields(fields: str) -> list[tuple[str, slice, list]]:
    """ "a[:6], b clip" -> [(key, columns, helper functions), ...]. Raises ValueError naming what it cannot
    read."""
    parsed = []
    for text in fields.split(","):
        match = FIELD.fullmatch(text.strip())
        if not match or (unknown := [h for h in match["helpers"].split() if h not in HELPERS]):
            what = f"unknown helper {unknown[0]!r}" if match else "expected 'key[start:stop] helper ...'"
            raise ValueError(f"field {text.strip()!r}: {what}; helpers are {', '.join(HELPERS)}")
        start, stop = (int(match[end]) if match[end] else None for end in ("start", "stop"))
        parsed.append((match["key"], slice(start, stop), [HELPERS[h] for h in match["helpers"].split()]))
    return parsed


CONSTANT = re.compile(r"([01])(?:\*(\d+))?")  # "0", "0*3", "1*2"


def read_fields(fields: str, steps: Steps, prefix: str, first: int, length: int | None = None) -> np.ndarray:
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
    """int64 code points up to the first zero -> UTF-8; what is no character becomes U+FFFD, as in TensorFlow."""
    points = np.frombuffer(row, np.int64)
    points = points[: np.argmax(np.append(points, 0) == 0)]
    return "".join(chr(p) if 0 <= p < 0xD800 or 0xDFFF < p < 0x110000 else "\ufffd" for p in points).encode()


def standardize(steps: Steps, recipe: Recipe, cameras: list[str | None], load_proprio: bool) -> dict:
    """One episode in standard form, as rlds.build_frame_table wants it (T frames after trimming).

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


def fingerprint(recipe: Recipe, load_proprio: bool) -> str:
    """Text that changes when the recipe, or the code that carries it out, changes."""
    fields = [*parse_fields(recipe.action), *parse_fields(recipe.state)]
    code, todo = {}, ["standardize", *(helper.__name__ for _, _, helpers in fields for helper in helpers)]
    while todo:  # these, and every function that they name
        name = todo.pop()
        if name not in code and inspect.isfunction(function := globals().get(name)):
            code[name] = inspect.getsource(function)
            todo += re.findall(r"\w+", code[name])
    return repr((asdict(recipe), load_proprio, sorted(code.items())))


# ------------------------------------------------------------------------------------------------------------
# DROID: frames without motion. OpenVLA compares the normalised action with what "zero" would be under the
# quantiles of the full DROID dataset, written into its code; with other statistics the filter therefore drops
# nothing. Kept so.

DROID_Q01 = np.array([-0.7776297926902771, -0.5803514122962952, -0.5795090794563293, -0.6464047729969025,
                      -0.7041108310222626, -0.8895104378461838], np.float32)
DROID_Q99 = np.array([0.7597932070493698, 0.5726242214441299, 0.7351000607013702, 0.6705610305070877,
                      0.6464948207139969, 0.8897542208433151], np.float32)


def is_idle(normalized: np.ndarray) -> np.ndarray:
    """(..., steps, 7) normalised action chunks -> (...) bool: does the whole chunk command no motion?"""
    zero = np.float32(2) * (-DROID_Q01) / (DROID_Q99 - DROID_Q01 + np.float32(1e-8)) - np.float32(1)
    return (np.abs(normalized[..., :6] - zero) <= np.float32(1e-5)).all((-1, -2))


# ------------------------------------------------------------------------------------------------------------
# The datasets

NATURAL = "observation/natural_language_instruction"
RTX = "action/world_vector, action/rotation_delta, action/gripper_closedness_action"
LAST_INVERTED = "action[:6], action[-1:] clip invert"
POSE_GRIPPER = "state[:6], 0, state[-1:]"
NO_STATE = "0*8"
TDROID = Recipe("static_image", state="cartesian_position[:6], 0, gripper_position[-1:]",
                action="action[:6], action[-1:] binarize")
LIBERO = Recipe("image", wrist="wrist_image", state="state[:6], 0, state[-2:]", action=LAST_INVERTED)
BRIDGE = Recipe("image_0", "image_1", state=POSE_GRIPPER, trim=True,
                action="observation/state[:6] delta, action[-1:] binarize")
GNM = Recipe(wrist="image", state="position, 0*3, yaw, 0*2", action="action, 0*5")
DROID = {"wrist": "wrist_image_left", "state": "cartesian_position, gripper_position",
         "action": "action_dict/cartesian_velocity[:6], action_dict/gripper_position invert"}

# fmt: off
DATASETS: dict[str, Recipe] = {
    "fractal20220817_data": Recipe("image", state="base_pose_tool_reached, gripper_closed", action=RTX + " rel2abs", instruction=NATURAL),
    "kuka": Recipe("image", state="clip_function_input/base_pose_tool_reached unzip, gripper_closed unzip", action=RTX + " rel2abs", instruction=NATURAL),
    "bridge_orig": BRIDGE,
    "bridge_dataset": BRIDGE,
    "bridge_oxe": Recipe("image", "image_1", state=POSE_GRIPPER, action="observation/state[:6] delta, action/open_gripper", instruction=NATURAL, trim=True),
    "taco_play": Recipe("rgb_static", wrist="rgb_gripper", state="robot_obs[:6], 0, robot_obs[7:8]", action="action/rel_actions_world[:6], action/rel_actions_world[-1:] clip", instruction=NATURAL),
    "jaco_play": Recipe("image", wrist="image_wrist", state="end_effector_cartesian_pos[:6], 0, end_effector_cartesian_pos[-1:]", action="action/world_vector, 0*3, action/gripper_closedness_action rel2abs", instruction=NATURAL),
    "berkeley_cable_routing": Recipe("image", "top_image", "wrist45_image", "robot_state, 0", "action/world_vector, action/rotation_delta, 0", NATURAL),
    "roboturk": Recipe("front_rgb", state=NO_STATE, action=RTX + " clip invert", instruction=NATURAL),
    "nyu_door_opening_surprising_effectiveness": Recipe(wrist="image", state=NO_STATE, action=RTX + " rel2abs", instruction=NATURAL),
    "viola": Recipe("agentview_rgb", wrist="eye_in_hand_rgb", state="joint_states, gripper_states", action=RTX + " clip invert", instruction=NATURAL),
    "berkeley_autolab_ur5": Recipe("image", wrist="hand_image", state="robot_state[6:14]", action=RTX + " rel2abs", instruction=NATURAL),
    "toto": Recipe("image", state="state, 0", action="action/world_vector, action/rotation_delta, action/open_gripper", instruction=NATURAL),
    "language_table": Recipe("rgb", state="effector_translation, 0*6", action="action, 0*4, 1", instruction="observation/instruction"),
    "columbia_cairlab_pusht_real": Recipe("image", wrist="wrist_image", state="robot_state, 0*6", action=RTX, instruction=NATURAL),
    "stanford_kuka_multimodal_dataset_converted_externally_to_rlds": Recipe("image", state="ee_position, ee_orientation, 0", action="action[:3], 0*3, action[-1:]"),
    "nyu_rot_dataset_converted_externally_to_rlds": Recipe("image", state=POSE_GRIPPER, action="action[:7]"),
    "stanford_hydra_dataset_converted_externally_to_rlds": Recipe("image", wrist="wrist_image", state="state[:3], state[7:10], 0, state[-3:-2]", action="action[:6], action[-1:] invert"),
    "austin_buds_dataset_converted_externally_to_rlds": Recipe("image", wrist="wrist_image", state="state[:8]", action=LAST_INVERTED),
    "nyu_franka_play_dataset_converted_externally_to_rlds": Recipe("image", "image_additional_view", state="state[-6:], 0*2", action="action[-8:-2], action[-2:-1] clip"),
    "maniskill_dataset_converted_externally_to_rlds": Recipe("image", wrist="wrist_image", state="tcp_pose, state[7:8]"),
    "furniture_bench_dataset_converted_externally_to_rlds": Recipe("image", wrist="wrist_image", state="state[:7], state[-1:]", action="action[:3], action[3:7] euler, action[-1:] clip invert"),
    "cmu_franka_exploration_dataset_converted_externally_to_rlds": Recipe("highres_image", state=NO_STATE, action="action[:-1]"),
    "ucsd_kitchen_dataset_converted_externally_to_rlds": Recipe("image", state="state[:7], 0", action="action[:-1]"),
    "ucsd_pick_and_place_dataset_converted_externally_to_rlds": Recipe("image", state=POSE_GRIPPER, action="action[:3], 0*3, action[-1:]"),
    "austin_sailor_dataset_converted_externally_to_rlds": Recipe("image", wrist="wrist_image", action=LAST_INVERTED),
    "austin_sirius_dataset_converted_externally_to_rlds": Recipe("image", wrist="wrist_image", action=LAST_INVERTED),
    "bc_z": Recipe("image", state="present/xyz, present/axis_angle, 0, present/sensed_close", action="action/future/xyz_residual[:3], action/future/axis_angle_residual[:3], action/future/target_close[:1] invert", instruction=NATURAL),
    "utokyo_pr2_opening_fridge_converted_externally_to_rlds": Recipe("image", state=POSE_GRIPPER, action="action[:-1]"),
    "utokyo_pr2_tabletop_manipulation_converted_externally_to_rlds": Recipe("image", state=POSE_GRIPPER, action="action[:-1]"),
    "utokyo_xarm_pick_and_place_converted_externally_to_rlds": Recipe("image", "image2", "hand_image", "end_effector_pose, 0*2"),
    "utokyo_xarm_bimanual_converted_externally_to_rlds": Recipe("image", state="pose_r, 0*2", action="action[-7:]"),
    "robo_net": Recipe("image", "image1", state="state[:4], 0*3, state[-1:]", action="action[:4], 0*2, action[-1:]"),
    "kaist_nonprehensile_converted_externally_to_rlds": Recipe("image", state="state[-7:], 0", action="action[:6], 0"),
    "stanford_mask_vit_converted_externally_to_rlds": Recipe("image", state="end_effector_pose[:4], 0*3, end_effector_pose[-1:]", action="action[:4], 0*2, action[-1:]"),
    "tokyo_u_lsmo_converted_externally_to_rlds": Recipe("image", state=POSE_GRIPPER),
    "dlr_sara_pour_converted_externally_to_rlds": Recipe("image", state="state, 0*2"),
    "dlr_sara_grid_clamp_converted_externally_to_rlds": Recipe("image", state="state[:6], 0*2"),
    "dlr_edan_shared_control_converted_externally_to_rlds": Recipe("image", state="state, 0", action="action[:6], action[-1:] invert"),
    "asu_table_top_converted_externally_to_rlds": Recipe("image", state="/ground_truth_states/EE, 0, state[-1:]"),
    "stanford_robocook_converted_externally_to_rlds": Recipe("image_1", "image_2", state=POSE_GRIPPER),
    "imperialcollege_sawyer_wrist_cam": Recipe("image", wrist="wrist_image", state="0*7, state", action="action[:-1]"),
    "iamlab_cmu_pickup_insert_converted_externally_to_rlds": Recipe("image", wrist="wrist_image", state="state[:7], state[7:8]", action="action[:3], action[3:7] euler, action[7:8]"),
    "uiuc_d3field": Recipe("image_1", "image_2", state=NO_STATE, action="action, 0*4"),
    "utaustin_mutex": Recipe("image", wrist="wrist_image", state="state[:8]", action=LAST_INVERTED),
    "berkeley_fanuc_manipulation": Recipe("image", wrist="wrist_image", state="state[:6], 0, state[6:7]", action="action, observation/state[6:7] invert"),
    "cmu_playing_with_food": Recipe("image", wrist="finger_vision_1", state="state, 0*2", action="action[:3], action[3:7] euler, action[-1:]"),
    "cmu_play_fusion": Recipe("image", action="action[:3], action[-4:]"),
    "cmu_stretch": Recipe("image", state="state[:3], 0*4, state[-1:]", action="action[:-1]"),
    "berkeley_gnm_recon": GNM,
    "berkeley_gnm_cory_hall": GNM,
    "berkeley_gnm_sac_son": GNM,
    "droid": Recipe("exterior_image_1_left|exterior_image_2_left", "exterior_image_2_left|exterior_image_1_left", skip_idle=True, **DROID),
    "droid_wipe": Recipe("exterior_image_2_left", **DROID),
    "fmb_dataset": Recipe("image_side_1", "image_side_2", "image_wrist_1", "eef_pose, state_gripper_pose"),
    "dobbe": Recipe("wrist_image"),
    "rh20t": Recipe("image_front", "image_side_right", "image_wrist", "tcp_base, gripper_width", "action/tcp_base, action/gripper"),
    **{f"tdroid_{task}": TDROID for task in ("carrot_in_bowl", "pour_corn_in_pot", "flip_pot_upright", "move_object_onto_plate", "knock_object_over", "cover_object_with_towel")},
    **{f"libero_{suite}_no_noops": LIBERO for suite in ("spatial", "object", "goal", "10")},
}
# fmt: on

# what OpenVLA refuses, and why
REFUSED = {
    **dict.fromkeys(("berkeley_mvp_converted_externally_to_rlds", "berkeley_rpt_converted_externally_to_rlds", "roboset"),
                    "its actions are joint positions; OpenVLA trains on end-effector actions only"),
    **dict.fromkeys(("ppgm", "ppgm_static", "ppgm_wrist"), "OpenVLA has no camera and state keys for it"),
}

# ------------------------------------------------------------------------------------------------------------
# Mixtures: {name: {dataset: weight}}. A dataset is drawn in proportion to weight x its number of frames.


def _short(names: Mapping[str, float]) -> dict[str, float]:
    """Spell out "viola" and the like, which stand for "..._dataset_converted_externally_to_rlds"."""
    long = {re.sub(r"(_dataset)?_converted_externally_to_rlds$", "", name): name for name in [*DATASETS, *REFUSED]}
    return {long.get(name, name): weight for name, weight in names.items()}


_RTX = _short({
    "fractal20220817_data": 0.54087122203, "kuka": 0.8341046294, "bridge_orig": 1.0, "taco_play": 2.0, "jaco_play": 2.0,
    "berkeley_cable_routing": 3.0, "roboturk": 1.0, "viola": 2.0, "berkeley_autolab_ur5": 1.0, "toto": 1.0,
})
_SOUP = _RTX | _short({
    "jaco_play": 1.0, "berkeley_cable_routing": 1.0, "roboturk": 2.0, "berkeley_autolab_ur5": 2.0,
    "language_table": 0.1, "stanford_hydra": 2.0, "austin_buds": 1.0, "nyu_franka_play": 3.0, "furniture_bench": 0.1,
    "ucsd_kitchen": 2.0, "austin_sailor": 1.0, "austin_sirius": 1.0, "dlr_edan_shared_control": 1.0,
    "iamlab_cmu_pickup_insert": 1.0, "utaustin_mutex": 1.0, "berkeley_fanuc_manipulation": 2.0, "cmu_stretch": 1.0,
})
_SOUP_PLUS = _SOUP | {"bc_z": 0.2, "fmb_dataset": 1.0, "dobbe": 0.2, "droid": 0.06}
MIXTURES: dict[str, dict[str, float]] = {
    "bridge": {"bridge_orig": 1.0},
    "bridge_rt_1": {"bridge_orig": 1.0, "fractal20220817_data": 1.0},
    "rtx": _RTX,
    "rtx_franka": _RTX | _short({
        "stanford_hydra": 1.0, "austin_buds": 3.0, "nyu_franka_play": 3.0, "maniskill": 0.1, "furniture_bench": 0.1,
        "cmu_franka_exploration": 5.0, "austin_sailor": 1.0, "austin_sirius": 1.0, "berkeley_rpt": 1.0,
        "kaist_nonprehensile": 3.0, "stanford_robocook": 1.0, "iamlab_cmu_pickup_insert": 1.0, "utaustin_mutex": 1.0,
        "cmu_play_fusion": 1.0,
    }),
    "oxe_magic_soup": _SOUP,
    "oxe_magic_soup_plus": _SOUP_PLUS,  # what OpenVLA-7B was trained on at first ...
    "oxe_magic_soup_plus_minus": {  # ... and later: without DROID and Language-Table, with all of RT-1
        name: 1.0 if name == "fractal20220817_data" else weight
        for name, weight in _SOUP_PLUS.items() if name not in ("language_table", "droid")
    },
}


def check_types(recipe: Recipe) -> None:
    """Raise TypeError when a field of a user's recipe is of another type than its default."""
    for name, value in asdict(recipe).items():
        wanted = (str, type(None)) if name in CAMERAS else (type(Recipe.__dataclass_fields__[name].default),)
        if type(value) not in wanted:
            raise TypeError(f"{name} is {value!r}, expected {wanted[0].__name__}")
    if recipe.absolute < 0:
        raise TypeError(f"absolute is {recipe.absolute}, expected 0 or more")


def resolve_mixture(data_mix: str | Mapping[str, float], own: Mapping[str, Mapping] | None = None
                    ) -> list[tuple[str, float, Recipe]]:
    """A mixture's or a dataset's name, or {dataset: weight} -> [(dataset, weight, recipe), ...].

    own: the YAML's `datasets:`, {name: the fields of a Recipe}. Datasets that OpenVLA refuses are skipped
    with a warning inside a mixture. Raises ValueError for unknown names, and when nothing is left.
    """
    recipes = dict(DATASETS)
    for name, fields in (own or {}).items():
        try:
            recipes[name] = Recipe(**fields)
            check_types(recipes[name])
            parse_fields(recipes[name].action), parse_fields(recipes[name].state)
        except (TypeError, ValueError) as error:
            raise ValueError(f"datasets: {name}: {error}; a dataset has the fields "
                             f"{', '.join(Recipe.__dataclass_fields__)}") from None
    if isinstance(data_mix, str):
        data_mix = {data_mix: 1.0} if data_mix in (own or {}) else MIXTURES.get(data_mix, {data_mix: 1.0})
    mixture = []
    for name, weight in data_mix.items():
        plain = str(name).partition(":")[0]
        if plain in REFUSED:
            print(f"warning: skipping dataset {name}: {REFUSED[plain]}")
        elif plain not in recipes:
            near = difflib.get_close_matches(plain, [*recipes, *MIXTURES], n=3)
            raise ValueError(f"data_mix: no dataset or mixture is called {name!r}"
                             + (f"; did you mean {' or '.join(near)}?" if near else ".")
                             + " Describe your own datasets under `datasets:` in the YAML.")
        elif not (isinstance(weight, int | float) and 0 < weight < math.inf):
            raise ValueError(f"data_mix: the weight of {name} must be positive, it is {weight!r}"
                             + " (YAML takes 1e-1 for text; write 0.1)" * isinstance(weight, str))
        else:
            mixture.append((name, float(weight), recipes[plain]))
    if not mixture:
        raise ValueError("data_mix: the mixture is empty: nothing to train on")
    return mixture
