"""The language of recipes: what a dataset's actions and states are, said in lists of fields.

OpenVLA's action is 7-D: change of end-effector position (3), change of orientation as roll-pitch-yaw (3),
gripper (absolute, 1 = open, 0 = closed). Datasets disagree on names, gripper sign, rotation format and more.
A recipe (config.Recipe) says what one of them has. It gives state and action as *field lists*:
comma-separated columns to be concatenated,

    "action[:6], action[-1:] clip invert"        key, slice of its columns, helpers applied from left to right
    "world_vector, 0*3, gripper rel2abs"         0*3: three columns of zeros (1*2: two of ones)
    "joints target, gripper /255 target raw"     scaled by a number (/255, *0.001), and two words

where a helper is one of the small functions of recipes.py, and the words say what OpenVLA's two masks say:

    target   a place to go to: past the end of an episode, the last one repeats. Without it: a change, zero
             past the end
    raw      taken as it is, in -1..1 (a gripper in 0..1). Without it: normalised by the dataset's quantiles

State and camera keys are relative to `observation/`; those that start with "/" and all action keys are
relative to the step; the instruction's, too, or it is one of the whole episode (episode_metadata/...).
"""

import re
from typing import NamedTuple

from machinery.config import Recipe, UserError, nearest

HELPERS = "clip invert delta binarize rel2abs euler unzip".split()
FIELD = re.compile(r"(?P<key>[^\s\[\],]+)(\[(?P<start>-?\d*):(?P<stop>-?\d*)\])?(?P<words>( +\S+)*)")
SCALE = re.compile(r"[*/]-?(?=[\d.]*[1-9])(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")  # "*0.001", "/255"; never 0
CONSTANT = re.compile(r"([01])(?:\*(\d+))?")  # "0", "0*3", "1*2"


class Field(NamedTuple):
    """One entry of a field list."""

    key: str
    columns: slice
    helpers: list[str]
    target: bool
    raw: bool


def parse_fields(fields: str) -> list[Field]:
    """A field list, read. Raises UserError naming what it cannot read."""
    parsed = []
    for text in fields.split(","):
        match = FIELD.fullmatch(text.strip())
        words = match["words"].split() if match else []
        helpers = [word for word in words if word not in ("target", "raw")]
        unknown = [word for word in helpers if word not in HELPERS and not SCALE.fullmatch(word)]
        if not match or unknown:
            close = nearest(unknown[0], [*HELPERS, "target", "raw"]) if unknown else ""
            what = f"unknown helper {unknown[0]!r}{close}" if match else "expected 'key[a:b] helper ...'"
            raise UserError(f"field {text.strip()!r}: {what}; helpers are {', '.join(HELPERS)}, *NUMBER and "
                            "/NUMBER; then come target and raw")
        start, stop = (int(match[end]) if match[end] else None for end in ("start", "stop"))
        parsed.append(Field(match["key"], slice(start, stop), helpers, "target" in words, "raw" in words))
    return parsed


def check_recipe(recipe: Recipe) -> None:
    """Raise UserError for field lists that cannot be read, and words that have no meaning there."""
    action, state = parse_fields(recipe.action), parse_fields(recipe.state)
    if all(CONSTANT.fullmatch(field.key) for field in action):
        raise UserError(f"action: {recipe.action!r} names no feature: a robot does not learn from constants")
    marked = any(field.target or field.raw for field in action)
    if marked and (recipe.absolute or recipe.targets):
        raise UserError("the words target and raw say all: remove `absolute` and `targets`")
    for name in {"primary", "secondary", "wrist"} & recipe.cameras.keys():
        if getattr(recipe, name):
            raise UserError(f"the camera {name} stands there twice, also under `cameras`: remove one")
    if any(field.target or field.raw for field in state):
        raise UserError("state: target and raw are said of actions only")
