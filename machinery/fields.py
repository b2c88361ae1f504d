"""Recipes: field lists describe which columns of a dataset are its actions and states.

OpenVLA's action is 7-D: change of end-effector position (3), change of orientation as
roll-pitch-yaw (3), gripper (absolute, 1 = open, 0 = closed). Datasets disagree on names, sign of
the gripper, rotation format and more. A recipe (config.Recipe) describes one of them. Its state and
action are *field lists*, comma-separated columns to be concatenated:

    "action[:6], action[-1:] clip invert"   key, slice of its columns, helpers from left to right
    "world_vector, 0*3, gripper rel2abs"    0*3: three columns of zeros (1*2: two of ones)
    "joints target, gripper /255 target raw"     scaled by a number (/255, *0.001), and two words

A helper is one of the small functions of recipes.py. The words of an action (target and raw are
OpenVLA's two masks):

    target   a place to go to: past the end of an episode, the last one repeats
    change   a velocity or a difference: zero past the end. The same as neither word, but stated
    raw      already in -1..1 (a gripper in 0..1). Without it: normalized by the dataset's
             quantiles

and one for a quaternion of an action or a state:

    wxyz     it was recorded with w first. The standard form is x, y, z, w

Keys of states and cameras are relative to `observation/`. Keys that start with "/" and all keys of
actions are relative to the step. So is the instruction's, or it belongs to the episode
(episode_metadata/...).

A dataset's own recipe can be in its directory: recipe.yaml (oxe.find_recipe). It applies if the
YAML has none.
"""

import re
from pathlib import Path
from typing import NamedTuple

import yaml

from machinery.config import Recipe, UserError, nearest
from machinery.files import atomic

WORDS = ["target", "change", "raw", "wxyz"]
HELPERS = ["clip", "invert", "delta", "binarize", "rel2abs", "euler", "unzip"]
FIELD = re.compile(r"(?P<key>[^\s\[\],]+)"
                   r"(\[(?P<start>-?\d*):(?P<stop>-?\d*)\])?"
                   r"(?P<words>( +\S+)*)")
SCALE = re.compile(r"[*/]-?(?=[\d.]*[1-9])(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")  # never 0
CONSTANT = re.compile(r"([01])(?:\*(\d+))?")  # "0", "0*3", "1*2"


class Field(NamedTuple):
    """One entry of a field list."""

    key: str  # the feature's name within a step
    constant: tuple[int, int] | None  # instead of a feature: the value, the number of columns
    columns: slice
    helpers: list[str]
    target: bool
    change: bool
    raw: bool
    wxyz: bool


def feature_name(key: str, prefix: str) -> str:
    """A recipe's key -> the feature's name within a step."""
    return key[1:] if key.startswith("/") else prefix + key


def recipe_key(name: str) -> str:
    """A feature's name within a step -> a recipe's key for a state or camera."""
    is_observation = name.startswith("observation/")
    return name.removeprefix("observation/") if is_observation else f"/{name}"


def parse_fields(fields: str, prefix: str = "") -> list[Field]:
    """Parse a field list whose keys are relative to `prefix`. Raises UserError for an entry that is
    not one."""
    parsed = []
    for text in fields.split(","):
        match = FIELD.fullmatch(text.strip())
        if not match:
            raise UserError(f"field {text.strip()!r}: expected 'key[a:b] helper ...'")
        key, constant = match["key"], CONSTANT.fullmatch(match["key"])
        if constant:
            constant = int(constant[1]), int(constant[2] or 1)
        else:
            key = feature_name(key, prefix)
        start = int(match["start"]) if match["start"] else None
        stop = int(match["stop"]) if match["stop"] else None
        words = match["words"].split()
        helpers = [word for word in words if word not in WORDS]
        for word in helpers:
            if word not in HELPERS and not SCALE.fullmatch(word):
                close = nearest(word, [*HELPERS, *WORDS])
                raise UserError(f"field {text.strip()!r}: unknown helper {word!r}{close}; helpers "
                                f"are {', '.join(HELPERS)}, *NUMBER and /NUMBER")
        parsed.append(Field(key, constant, slice(start, stop), helpers,
                            *(word in words for word in WORDS)))
    return parsed


def check_recipe(name: str, recipe: Recipe) -> None:
    """Raise UserError for a part of the recipe of dataset `name` that would silently do nothing."""
    standard = {"primary": recipe.primary, "secondary": recipe.secondary, "wrist": recipe.wrist}
    twice = [camera for camera in recipe.cameras if standard.get(camera)]
    problem = None
    fields = parse_fields(recipe.action)
    if has_words(fields) and (recipe.absolute or recipe.targets):
        problem = "remove absolute and targets: its action has the words target, change or raw"
    elif any(field.target and field.change for field in fields):
        problem = "action: a field is either target or change: remove one"
    elif all(field.constant for field in fields):
        problem = "action: name a feature: it has only constants"
    elif any(field.constant and (field.helpers or field.columns != slice(None))
             for field in fields + parse_fields(recipe.state)):
        problem = "helpers and columns do nothing to a constant (0, 1*2): remove them"
    elif has_words(parse_fields(recipe.state)):
        problem = "state: remove target and raw, or change: they are for actions"
    elif twice:
        problem = f"the camera {twice[0]} is also in `cameras`: remove one"
    elif recipe.skip_idle and "droid" not in name:  # see oxe.is_idle
        problem = "skip_idle: remove it, it only recognizes DROID's pauses"
    if problem:
        raise UserError(f"datasets: {name}: {problem}")


def has_words(fields: list[Field]) -> bool:
    """Does a field list describe the kinds of its dimensions?"""
    return any(field.target or field.change or field.raw for field in fields)


# ---- The recipe beside a dataset -----------------------------------------------------------------


def recipe_values(recipe: Recipe) -> dict[str, object]:
    """The keys of a recipe that differ from their defaults."""
    default = vars(Recipe())
    return {key: value for key, value in vars(recipe).items() if value != default[key]}


def write_recipe(directory: Path, recipe: Recipe) -> Path:
    """Write recipe.yaml into a dataset's directory. Returns its path."""
    path = directory / "recipe.yaml"
    text = yaml.safe_dump(recipe_values(recipe), sort_keys=False, width=1000, allow_unicode=True)
    with atomic(path) as scratch:
        scratch.write_text(text)
    return path
