"""Guessing what a robot's numbers mean: states and actions by the names of features, and then the
kind of each dimension of the action by its name and range.

A joint's angle or a pose is a *target*: past the end of an episode, the last one is held. A
displacement is a *change*, and a *velocity* is treated as one: both are zero past the end. A
gripper is a target. It is *raw* (not normalized by quantiles, which could limit how far it opens)
if its range is a usual one. Whether its larger value means open or closed is only known if its name
contains the word.
"""

import math
import re
from collections.abc import Mapping
from itertools import groupby
from typing import NamedTuple

import numpy as np

from machinery.fields import recipe_key
from machinery.recipes import NO_STATE, Feature

# ---- Features ------------------------------------------------------------------------------------

# Converters of openpi, AgiBot, GR00T, and others write one feature (`state`, `actions`) or one for
# each part of the robot (observation/states/joint/position, action.left_arm, ...)
STATES = ["observation/state", "observation/proprio", "observation/states", "state", "states",
          "proprio"]  # one of these is all of it, the best first
ACTIONS = ["action", "actions"]
PARTS = {*"""state states proprio proprioception qpos joint joints jpos arm arms pose position
    positions pos angle angles orientation rotation quat quaternion gripper grippers effector hand
    finger fingers eef ee tcp xyz rpy cartesian base waist torso head leg""".split()}
NO_PLACE = {*"""vel velocity velocities qvel effort efforts torque torques force forces wrench
    current acceleration action actions command commands target goal depth""".split()}
MOST = 128  # numbers: images and embeddings have more


def state_fields(features: Mapping[str, Feature]) -> str:
    """The field list of what looks like the robot's state: positions, not speeds or forces. "0" if
    there is none. features: {name: feature} of a dataset's steps."""
    numbers = [name for name in features if is_numbers(name, features[name])]
    found = [name for name in STATES if name in numbers][:1]
    if not found:
        found = [name for name in numbers if parts(name) & PARTS and not parts(name) & NO_PLACE]
    return ", ".join(map(recipe_key, found)) or "0"


def action_fields(features: Mapping[str, Feature]) -> str | None:
    """The field list of what looks like the action: `action`, or all that begins so."""
    numbers = [name for name in features if is_numbers(name, features[name])]
    found = [name for name in ACTIONS if name in numbers][:1]
    if not found:
        found = [name for name in numbers if re.match("actions?[/._]", name)]
    return ", ".join(found) or None


def is_numbers(name: str, feature: Feature) -> bool:
    """Is it a vector of a few numbers, and not something like `is_first` or a reward?"""
    fixed = feature.dtype.kind in "biuf" and None not in feature.shape
    image = feature.kind.startswith("Image")
    return (feature.of_step and fixed and not image and math.prod(feature.shape) <= MOST
            and not NO_STATE.search(name))


def parts(name: str) -> set[str]:
    """The words in a feature's name, also of one in camelCase, but for `observation`."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
    return {*re.split(r"[/._\d]+", words)} - {"observation", ""}


# ---- The dimensions of an action -----------------------------------------------------------------

# of names with spaces for underscores, so that \b finds the ends of words
GRIPPER = re.compile(r"gripper|grasp|jaw|claw|finger|suction|(?<!end )effector", re.IGNORECASE)
CLOSED = re.compile(r"clos(e|ing|ure)|grasp", re.IGNORECASE)
OPEN = re.compile(r"open", re.IGNORECASE)
VELOCITY = re.compile(r"vel(ocity|ocities)?\b|speed|twist|omega|\brate\b|\b(v|v ?[xyz]|w[xyz])\b|"
                      r"\b(linear|angular) ?[xyz]\b|\bbase (linear|angular)\b", re.IGNORECASE)
CHANGE = re.compile(r"delta|\bdpos\b|\brel(ative)?\b|\b(d|rel) ?(x|y|z|roll|pitch|yaw|r[xyz])\b",
                    re.IGNORECASE)
TARGET = re.compile(r"pos(e|ition)?s?\b|angle|orientation|quat|joint|motor|\b[jq]\d|\bq[wxyz]\b|"
                    r"shoulder|elbow|wrist|waist|forearm|torso|neck|head", re.IGNORECASE)
USUAL = (1, 100, 255, 1000)  # the value of an open (or closed) gripper; LeRobot's own is 100


class Dimension(NamedTuple):
    """One dimension of an action. kind: target, change or velocity; scale: the divisor of a raw
    dimension, 0 if it is normalized; closed: is the larger value a closed gripper? None: unknown.
    """

    name: str
    kind: str
    scale: int
    closed: bool | None
    low: float
    high: float

    @property
    def words(self) -> str:
        """The recipe's words for it."""
        if not self.scale:
            return " target" if self.kind == "target" else " change"
        divide = f" /{self.scale}" * (self.scale > 1)
        if self.low >= -1e-3 * self.scale:
            # clip: a policy may predict less than 0, the robot is never told to open further
            return f"{divide} clip{' invert' * bool(self.closed)} target raw"
        return (f" /-{self.scale}" if self.closed else divide) + " target raw"  # -1..1


def guess_kinds(names: list[str], actions: np.ndarray, looks: np.ndarray,
                override: str | None = None) -> list[Dimension]:
    """The dimensions of actions (N, A). looks: (A,) bool, those that look like targets; override:
    "target" or "change" for all but grippers and velocities."""
    moving = np.ptp(actions.astype(np.float32), axis=0) > 0
    looks = np.where(moving, looks, looks.sum() > moving.sum() / 2)  # no motion: as most
    found = []
    for name, values, target in zip(names, actions.T, looks, strict=True):
        spaced = re.sub("[_./]", " ", name)
        count = len(np.unique(values))
        # two values, such as 0 and 1, are closed and open, whatever the name
        grips = (count == 2 and values.max() in USUAL) or bool(GRIPPER.search(spaced))
        kind = kind_by_name(name)
        if not grips and kind != "velocity":
            kind = override or kind or ("target" if target else "change")
        kind = kind or "target"
        scale = gripper_scale(values, count <= 4) if grips and kind == "target" else 0
        closed = None
        if OPEN.search(spaced) or CLOSED.search(spaced):
            closed = not OPEN.search(spaced)
        found.append(Dimension(name, kind, scale, closed, float(values.min()), float(values.max())))
    return found


def kind_by_name(name: str) -> str | None:
    """The kind of a dimension by its name. None if the name is ambiguous: "x" may be a position or
    a step."""
    spaced = re.sub("[_./]", " ", name)
    kinds = {"velocity": VELOCITY, "change": CHANGE, "target": TARGET}
    for kind, pattern in kinds.items():
        if pattern.search(spaced):
            return kind
    return "target" if GRIPPER.search(spaced) else None


def gripper_scale(values: np.ndarray, few: bool) -> int:
    """The divisor that brings a gripper's values to 0..1, or few of them to -1..1; 0: normalize
    them instead."""
    low, high = float(values.min()), float(values.max())  # bool has no differences
    for scale in USUAL:
        within = -1e-3 * scale <= low or (few and -1.001 * scale <= low)
        if within and high <= 1.001 * scale and high - low >= 0.5 * scale:
            return scale
    return 0


def field_list(widths: dict[str, int], dimensions: list[Dimension]) -> str:
    """The recipe's action: neighboring dimensions of one kind form one field. widths: {feature:
    numbers}, in the order of the dimensions."""
    fields = []
    rest = iter(dimensions)
    for key, width in widths.items():
        start = 0
        for words, group in groupby([next(rest).words for _ in range(width)]):
            stop = start + len([*group])
            first, last = start or "", stop if stop < width else ""
            columns = f"[{first}:{last}]" if first or last else ""
            fields.append(f"{key}{columns}{words}")
            start = stop
    return ", ".join(fields)


def assumptions(dimensions: list[Dimension]) -> list[str]:
    """One line for each gripper whose name does not contain open or closed."""
    lines = []
    for dimension in dimensions:
        if dimension.scale and dimension.closed is None:
            here, other = dimension.words.strip(), dimension._replace(closed=True).words.strip()
            lines.append(f"{dimension.name}: assuming that {dimension.high:.4g} is open: if it is "
                         f"closed, write `{other}` instead of `{here}`")
    return lines
