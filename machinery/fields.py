"""Recipes: field lists describe which columns of a dataset are its actions and states.

OpenVLA's action is 7-D: change of end-effector position (3), change of orientation as
roll-pitch-yaw (3), gripper (absolute, 1 = open, 0 = closed). Datasets disagree on names, sign of
the gripper, rotation format and more. A recipe (config.Recipe) describes one of them. Its state and
action are *field lists*, comma-separated columns to be concatenated:

    "action[:6], action[-1:] clip invert"   key, slice of its columns, helpers from left to right
    "world_vector, 0*3, gripper rel2abs"    0*3: three columns of zeros (1*2: two of ones)
    "joints target, gripper /255 target raw"     scaled by a number (/255, *0.001), and two words

A helper is one of the small functions of recipes.py. The two words of an action are OpenVLA's two
masks:

    target   a place to go to: past the end of an episode, the last one repeats. Without it, a
             change: zero past the end
    raw      already in -1..1 (a gripper in 0..1). Without it: normalized by the dataset's
             quantiles

Keys of states and cameras are relative to `observation/`. Keys that start with "/" and all keys of
actions are relative to the step. So is the instruction's, or it belongs to the episode
(episode_metadata/...).
"""

import re
from typing import NamedTuple

from machinery.config import Recipe, UserError, nearest

HELPERS = ["clip", "invert", "delta", "binarize", "rel2abs", "euler", "unzip"]
FIELD = re.compile(r"(?P<key>[^\s\[\],]+)"
                   r"(\[(?P<start>-?\d*):(?P<stop>-?\d*)\])?"
                   r"(?P<words>( +\S+)*)")
SCALE = re.compile(r"[*/]-?(?=[\d.]*[1-9])(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")  # never 0
CONSTANT = re.compile(r"([01])(?:\*(\d+))?")  # "0", "0*3", "1*2"


class Field(NamedTuple):
    """One entry of a field list."""

    key: str
    columns: slice
    helpers: list[str]
    target: bool
    raw: bool


def parse_fields(fields: str) -> list[Field]:
    """Parse a field list. Raises UserError for an entry that is not one."""
    parsed = []
    for text in fields.split(","):
        match = FIELD.fullmatch(text.strip())
        if not match:
            raise UserError(f"field {text.strip()!r}: expected 'key[a:b] helper ...'")
        start = int(match["start"]) if match["start"] else None
        stop = int(match["stop"]) if match["stop"] else None
        words = match["words"].split()
        helpers = [word for word in words if word not in ("target", "raw")]
        for word in helpers:
            if word not in HELPERS and not SCALE.fullmatch(word):
                close = nearest(word, [*HELPERS, "target", "raw"])
                raise UserError(f"field {text.strip()!r}: unknown helper {word!r}{close}; helpers "
                                f"are {', '.join(HELPERS)}, *NUMBER and /NUMBER")
        parsed.append(Field(match["key"], slice(start, stop), helpers,
                            "target" in words, "raw" in words))
    return parsed


def check_recipe(name: str, recipe: Recipe) -> None:
    """Raise UserError for a part of the recipe of dataset `name` that would silently do nothing."""
    standard = {"primary": recipe.primary, "secondary": recipe.secondary, "wrist": recipe.wrist}
    twice = [camera for camera in recipe.cameras if standard.get(camera)]
    problem = None
    marked = any(field.target or field.raw for field in parse_fields(recipe.action))
    if marked and (recipe.absolute or recipe.targets):
        problem = "remove absolute and targets: its action has the words target or raw"
    elif any(field.target or field.raw for field in parse_fields(recipe.state)):
        problem = "state: remove target and raw, which are for actions"
    elif twice:
        problem = f"the camera {twice[0]} is also in `cameras`: remove one"
    elif recipe.skip_idle and "droid" not in name:  # see oxe.is_idle
        problem = "skip_idle: remove it, it only recognizes DROID's pauses"
    if problem:
        raise UserError(f"datasets: {name}: {problem}")
