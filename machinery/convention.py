"""Converting between the model's standard form and the robot's own actions and states.

Training sees actions and states in the standard form that a dataset's recipe makes: unused columns
dropped, a gripper turned so that 1 is open, numbers scaled. Models of OpenVLA's own datasets act in
that form. A dataset described in a YAML belongs to a robot that expects the recorded form: the
recipe is inverted for an action on its way to the robot, and applied to a state on its way in.

    recipe  action: "pose[:6], grip /255 invert target raw"     recorded: 0..255, 255 = closed
    the model predicts 0.25, the robot gets 191.25

A helper that has no inverse (delta, rel2abs, ...) leaves its dimensions in standard form. Clipped
values are clipped again; binarized values are returned unchanged. A quaternion that was recorded
with w first (wxyz) is returned so.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from machinery.config import Recipe, TrainConfig, UserError
from machinery.fields import SCALE, Field, parse_fields
from machinery.frames import without_version
from machinery.recipes import apply, take_columns

STANDARD = "dx dy dz droll dpitch dyaw gripper(1=open)".split()


@dataclass
class Convention:
    """The form in which one dataset's robot takes actions and reports states.

    action, state: a label for each number: its name in the recipe, or that of a recorded feature,
        such as "gripper" or "joints[3]", or the recipe's words for a number in standard form
    to_robot: standard actions (..., A) -> (..., len(action))
    actions_from_robot: the inverse of to_robot
    from_robot: states (B, len(state)) -> standard states (B, P)
    """

    action: list[str]
    state: list[str]
    to_robot: Callable[[np.ndarray], np.ndarray]
    actions_from_robot: Callable[[np.ndarray], np.ndarray]
    from_robot: Callable[[np.ndarray], np.ndarray]

    def gripper(self, dims: int) -> list[float]:
        """The values of the robot's last number, if it is a gripper, for open and closed: 1 and 0
        in standard form, whose dimensions are dims."""
        ends = np.zeros((2, dims))
        ends[0, -1] = 1
        return self.to_robot(ends)[:, -1].tolist()


def convention(cfg: TrainConfig, name: str, stats: dict) -> Convention:
    """The convention of a model's dataset. stats: its entry in dataset_statistics.json."""
    recipe = cfg.datasets.get(without_version(name))
    features = cfg.features.get(name)
    return recorded(recipe, features, stats) if recipe and features else standard(stats)


def standard(stats: dict) -> Convention:
    """The convention of OpenVLA's own datasets: nothing is converted."""
    dims = len(stats["action"].get("mean", ()))
    actions = STANDARD if dims == len(STANDARD) else [f"action[{i}]" for i in range(dims)]
    return Convention(actions, standard_state(stats), np.asarray, np.asarray, np.asarray)


def standard_state(stats: dict) -> list[str]:
    return [f"proprio[{i}]" for i in range(len(stats.get("proprio", {}).get("mean", ())))]


def recorded(recipe: Recipe, features: dict[str, int], stats: dict) -> Convention:
    """The convention of a dataset that a recipe describes. features: {name: numbers in a step}."""
    action, to_robot, actions_from_robot = undo(recipe, features, stats["action"])
    state, from_robot = redo(recipe, features, stats)
    return Convention(action, state, to_robot, actions_from_robot, from_robot)


# ---- Helpers and columns of fields -------------------------------------------------------------


def is_pointwise(word: str) -> bool:
    """Does this helper look at one step only?"""
    return word in ("clip", "invert", "euler") or bool(SCALE.fullmatch(word))


def invertible(field: Field) -> bool:
    """Can the field's helpers be undone?"""
    return all(word in ("clip", "binarize", "invert") or SCALE.fullmatch(word)
               for word in field.helpers)


def invert_helpers(values: np.ndarray, helpers: list[str]) -> np.ndarray:
    """The inverse of recipes.apply."""
    for word in reversed(helpers):
        if word == "invert":
            values = 1 - values
        elif word == "clip":  # recorded values were within 0..1; a model's may not be
            values = np.clip(values, 0, 1)
        elif word[0] == "*":
            values = values / float(word[1:])
        elif word[0] == "/":
            values = values * float(word[1:])
    return values


class Dimension(NamedTuple):
    """One dimension in standard form: column `column` of feature `key`, after `helpers`."""

    key: str | None  # None: a constant, which the recipe adds
    column: int
    label: str
    helpers: list[str]


def number_labels(name: str, width: int, names: dict[str, list[str]]) -> list[str]:
    """A label for each of a feature's numbers."""
    labels = [name] if width == 1 else [f"{name}[{i}]" for i in range(width)]
    return names.get(name) or [label.removeprefix("observation/") for label in labels]


def dimensions_of(field: Field, features: dict[str, int], names: dict[str, list[str]]
                  ) -> list[Dimension]:
    """The standard dimensions that a field makes. features: {feature: numbers in a step}."""
    if field.constant:
        return [Dimension(None, i, field.key, field.helpers) for i in range(field.constant[1])]
    width = features[field.key]
    columns = [*range(width)] if "unzip" in field.helpers else [*range(width)[field.columns]]
    if field.wxyz:
        columns = columns[1:] + columns[:1]
    if invertible(field):
        labels = number_labels(field.key, width, names)
        return [Dimension(field.key, i, labels[i], field.helpers) for i in columns]
    count = 3 if "euler" in field.helpers else len(columns)
    words = " ".join([field.key.removeprefix("observation/"), *field.helpers])
    return [Dimension(field.key, i, f"{words}[{i}]", []) for i in range(count)]


def dimension_names(recipe: Recipe, features: dict[str, int]) -> tuple[list[str], list[str]]:
    """Labels of the dimensions of a dataset's standard actions and states (none if not indexed)."""
    labels = []
    for fields in (parse_fields(recipe.action), parse_fields(recipe.state, "observation/")):
        known = all(field.constant or field.key in features for field in fields)
        labels.append(distinct([dimension for field in fields if known
                                for dimension in dimensions_of(field, features, recipe.names)]))
    return labels[0], labels[1]


def distinct(dimensions: list[Dimension]) -> list[str]:
    """Their labels. If several are the same, these get their feature's name."""
    labels = Counter(dimension.label for dimension in dimensions)
    return [f"{key}.{label}" if key and labels[label] > 1 else label
            for key, _, label, _ in dimensions]


# ---- Actions -----------------------------------------------------------------------------------


def undo(
    recipe: Recipe, features: dict[str, int], stats: dict
) -> tuple[list[str], Callable, Callable]:
    """-> (labels of the robot's numbers, the function from standard to robot actions, its inverse).

    stats: of the dataset's actions."""
    fields = parse_fields(recipe.action)
    dimensions = [dimension for field in fields
                  for dimension in dimensions_of(field, features, recipe.names)]
    if all(invertible(field) for field in fields):
        places = recorded_order(dimensions)
    else:  # the robot takes the standard form, inverted where that is possible
        places = [[place] for place in range(len(dimensions))]
    constant = np.array(stats["min"]) == np.array(stats["max"])

    def to_robot(actions: np.ndarray) -> np.ndarray:
        actions = np.where(constant, stats["min"], actions)  # what never changed was not learned
        numbers = []
        for first, *_ in places:
            numbers.append(invert_helpers(actions[..., first], dimensions[first].helpers))
        return np.stack(numbers, axis=-1)

    def actions_from_robot(actions: np.ndarray) -> np.ndarray:
        # the recipe's own constants stay 0: they were not learned
        standard = np.zeros((*actions.shape[:-1], len(dimensions)))
        for number, copies in enumerate(places):
            for place in copies:
                helpers = filter(is_pointwise, dimensions[place].helpers)
                standard[..., place] = apply(actions[..., number], helpers)
        return standard

    labels = distinct([dimensions[first] for first, *_ in places])
    return labels, to_robot, actions_from_robot


def recorded_order(dimensions: list[Dimension]) -> list[list[int]]:
    """For each recorded number, its places in the standard action: several if the recipe takes it
    several times, the least changed first. Features come in the recipe's order, the columns of a
    feature in their own."""
    features = list(dict.fromkeys(dimension.key for dimension in dimensions))
    places: dict[tuple[int, int], list[int]] = {}
    for place, dimension in enumerate(dimensions):
        if dimension.key is not None:  # the recipe adds constants; the robot has none
            number = (features.index(dimension.key), dimension.column)
            places.setdefault(number, []).append(place)
    lossy = [sum(word in ("clip", "binarize") for word in dimension.helpers)
             for dimension in dimensions]
    return [sorted(places[number], key=lossy.__getitem__) for number in sorted(places)]


# ---- States ------------------------------------------------------------------------------------


def redo(recipe: Recipe, features: dict[str, int], stats: dict) -> tuple[list[str], Callable]:
    """-> (labels of the robot's state, the function from the robot's to standard states). If the
    recipe needs several steps or unrecorded features, the robot must send the standard form."""
    fields = parse_fields(recipe.state, "observation/")
    pointwise = all(is_pointwise(word) for field in fields for word in field.helpers)
    widths = {field.key: features.get(field.key) for field in fields if not field.constant}
    if not pointwise or not widths or None in widths.values():
        return standard_state(stats), np.asarray
    labels = distinct([Dimension(name, i, label, []) for name, width in widths.items()
                       for i, label in enumerate(number_labels(name, width, recipe.names))])

    def from_robot(states: np.ndarray) -> np.ndarray:
        states = np.asarray(states, np.float32)
        if states.ndim != 2 or states.shape[1] != len(labels):
            raise UserError(f"proprio of shape {states.shape}: expected {len(labels)} numbers, as "
                            f"recorded: {', '.join(labels)}")
        starts = np.cumsum([*widths.values()])[:-1]
        blocks = dict(zip(widths, np.split(states, starts, axis=1), strict=True))
        columns = []
        for field in fields:
            if field.constant:
                value, width = field.constant
                columns.append(np.full((len(states), width), value))
            else:
                columns.append(apply(take_columns(blocks[field.key], field), field.helpers))
        return np.concatenate(columns, axis=1).astype(np.float32)

    return labels, from_robot
