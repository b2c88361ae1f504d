"""In whose terms a robot is told what to do, and tells its state.

Training knows actions and states in the standard form that a dataset's recipe makes of them: other columns
left out, a gripper turned so that 1 is open, numbers scaled. OpenVLA's own datasets are acted on in that
form. But whoever described a dataset in a YAML has a robot that speaks as it was recorded: for it, what the
recipe does to an action is undone on the way out, and done to a state on the way in.

    recipe  action: "pose[:6], grip /255 invert target raw"     0..255, 255 = closed, was recorded
    the model says ... 0.25, the robot gets ... 191.25

A helper that has no inverse (delta, rel2abs, ...) leaves its dimensions in standard form; what was clipped is
clipped again, and what was binarised stays as it is.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from machinery.config import Recipe, TrainConfig, UserError
from machinery.fields import CONSTANT, SCALE, Field, parse_fields
from machinery.recipes import apply, feature_name

AS_IT_IS = ("clip", "binarize")
POINTWISE = ("clip", "invert", "euler")  # helpers that look at one step alone; so does scaling


@dataclass
class Convention:
    """How the robot of one dataset speaks.

    action, state: what each number means, such as "gripper" or "joints[3]" for what was recorded under that
    name; other words are a recipe's, for what is in standard form. to_robot: actions (..., A) in standard
    form -> (..., len(action)); actions_from_robot: the inverse; from_robot: states (B, len(state)) -> (B, P)
    in standard form
    """

    action: list[str]
    state: list[str]
    to_robot: Callable[[np.ndarray], np.ndarray]
    actions_from_robot: Callable[[np.ndarray], np.ndarray]
    from_robot: Callable[[np.ndarray], np.ndarray]


def convention(cfg: TrainConfig, name: str, stats: dict) -> Convention:
    """Of one of a model's datasets; stats: its entry in dataset_statistics.json."""
    recipe, features = cfg.datasets.get(name.partition(":")[0]), cfg.features.get(name)
    return recorded(recipe, features, stats) if recipe and features else standard(stats)


def standard(stats: dict) -> Convention:
    """Of a dataset of OpenVLA's: everything stays as it is. stats: of the dataset."""
    action, state = (len(stats.get(key, {}).get("mean", ())) for key in ("action", "proprio"))
    actions = STANDARD if action == len(STANDARD) else [f"action[{i}]" for i in range(action)]
    return Convention(actions, [f"proprio[{i}]" for i in range(state)], *[np.asarray] * 3)


STANDARD = "dx dy dz droll dpitch dyaw gripper(1=open)".split()


def recorded(recipe: Recipe, features: dict[str, int], stats: dict) -> Convention:
    """Of a dataset that was described by a recipe. features: {name: values in a step}; stats: of the
    dataset."""
    action, to_robot, actions_from_robot = undo(recipe, features, stats["action"])
    state, from_robot = redo(recipe, features, stats)
    return Convention(action, state, to_robot, actions_from_robot, from_robot)


# ---- Actions, on the way out, and in again -----------------------------------------------------------------


def undo(recipe: Recipe, features: dict[str, int], stats: dict) -> tuple[list[str], Callable, Callable]:
    """-> what each number of the robot's action means, the function that makes it of a standard one, and its
    inverse."""
    fields, columns, place = parse_fields(recipe.action), [], 0
    whole = all(CONSTANT.fullmatch(field.key) or invertible(field) for field in fields)
    for field in fields:
        names = column_names(field, features)
        for i, (name, column) in enumerate(names):
            label = name if invertible(field) else f"{' '.join([field.key, *field.helpers])}[{i}]"
            columns.append((field.key, column, label, place + i, field.helpers if invertible(field) else []))
        place += len(names)
    if whole:  # as it was recorded: no added columns, each in its place, and those taken twice once
        order = list(dict.fromkeys(field.key for field in fields))
        columns = [column for column in columns if not CONSTANT.fullmatch(column[0])]
        columns.sort(key=lambda column: (order.index(column[0]), column[1]))
    spoken: dict = {}  # {which number: (what it means, [(its place in the standard form, helpers), ...])}
    for key, at, label, place, helpers in columns:
        spoken.setdefault((key, at) if whole else place, (label, []))[1].append((place, helpers))
    constant = np.array(stats["min"]) == np.array(stats["max"])

    def to_robot(actions: np.ndarray) -> np.ndarray:
        # what never changed while it was recorded was not learned: it stays what it was
        actions = np.where(constant, stats["min"], actions)
        first = [places[0] for _, places in spoken.values()]
        return np.stack([invert_helpers(actions[..., place], helpers) for place, helpers in first], -1)

    def actions_from_robot(actions: np.ndarray) -> np.ndarray:
        standard = np.zeros((*actions.shape[:-1], len(constant)))  # added columns never change: not learned
        for number, (_, places) in enumerate(spoken.values()):
            for place, helpers in places:
                pointwise = [word for word in helpers if word in POINTWISE or SCALE.fullmatch(word)]
                standard[..., place] = apply(actions[..., number], pointwise)
        return standard

    return [label for label, _ in spoken.values()], to_robot, actions_from_robot


def invertible(field: Field) -> bool:
    """Can what a field's helpers do be undone? (A constant's name is a number, and needs nothing.)"""
    return all(word in (*AS_IT_IS, "invert") or SCALE.fullmatch(word) for word in field.helpers)


def invert_helpers(values: np.ndarray, helpers: list[str]) -> np.ndarray:
    """The inverse of recipes.apply."""
    for word in reversed(helpers):
        if word == "invert":
            values = 1 - values
        elif word == "clip":  # what was recorded lay there; what a model says need not
            values = np.clip(values, 0, 1)
        elif word not in AS_IT_IS:
            values = values / float(word[1:]) if word[0] == "*" else values * float(word[1:])
    return values


def column_names(field: Field, features: dict[str, int]) -> list[tuple[str, int]]:
    """(name, column of its feature) of each standard dimension that a field makes."""
    if constant := CONSTANT.fullmatch(field.key):
        return [(field.key, i) for i in range(int(constant[2] or 1))]
    if "euler" in field.helpers:
        return [(field.key, i) for i in range(3)]
    width = features[field.key]
    return [(field.key if width == 1 else f"{field.key}[{i}]", i) for i in range(width)[field.columns]]


# ---- States, on the way in ---------------------------------------------------------------------------------


def redo(recipe: Recipe, features: dict[str, int], stats: dict) -> tuple[list[str], Callable]:
    """-> what each number of the robot's state means, and the function that makes a standard one of it."""
    fields = [field._replace(key=feature_name(field.key, "observation/")) if not CONSTANT.fullmatch(field.key)
              else field for field in parse_fields(recipe.state)]
    names = list(dict.fromkeys(field.key for field in fields if not CONSTANT.fullmatch(field.key)))
    pointwise = all(word in POINTWISE or SCALE.fullmatch(word) for field in fields for word in field.helpers)
    if not pointwise or not names or any(name not in features for name in names):
        return standard(stats).state, np.asarray
    widths = [features[name] for name in names]
    labels = [label.removeprefix("observation/") for name in names
              for label, _ in column_names(Field(name, slice(None), [], False, False), features)]

    def from_robot(states: np.ndarray) -> np.ndarray:
        states = np.asarray(states, np.float32)
        if states.ndim != 2 or states.shape[1] != len(labels):
            raise UserError(f"proprio of shape {states.shape}: expected {len(labels)} numbers, as recorded: "
                            f"{', '.join(labels)}")
        blocks = dict(zip(names, np.split(states, np.cumsum(widths)[:-1], axis=1), strict=True))
        columns = []
        for field in fields:
            if constant := CONSTANT.fullmatch(field.key):
                columns.append(np.full((len(states), int(constant[2] or 1)), int(constant[1]), np.float32))
            else:
                columns.append(apply(blocks[field.key][:, field.columns], field.helpers))
        return np.concatenate(columns, axis=1).astype(np.float32)

    return labels, from_robot
