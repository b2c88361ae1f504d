"""Guessing which features of a dataset are its states and actions, by their names.

Converters of openpi, AgiBot, GR00T, and others write one feature (`state`, `actions`) or one for
each part of the robot (observation/states/joint/position, action.left_arm, ...).
"""

import math
import re
from collections.abc import Mapping

from machinery.recipes import NO_STATE, Feature

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
    keys = [name.removeprefix("observation/") if name.startswith("observation/") else f"/{name}"
            for name in found]
    return ", ".join(keys) or "0"


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
