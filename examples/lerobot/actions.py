"""Infer the meaning of a robot's action dimensions from their names and ranges, as a recipe.

A joint's angle or a pose is a *target*: the last one is held past the end of an episode, and a
slower recording takes the last one before its next frame. A displacement is a *change*: it is zero
past the end, and changes add up over a longer step. A *velocity* is also zero past the end, but
over a longer step it is a mean. A gripper is a target. It is *raw* (not normalized by quantiles,
which could limit how far it opens) if its range is one of the usual ones.
"""

import re
from collections import Counter
from itertools import groupby
from typing import NamedTuple

import numpy as np

from machinery import survey
from machinery.rlds import EPISODE

GRIPPER = re.compile(r"gripper|grasp|jaw|claw|finger", re.IGNORECASE)
VELOCITY = re.compile(r"vel(ocity|ocities)?\b|speed|\brate\b|\b[vw][xyz]\b", re.IGNORECASE)
CHANGE = re.compile(r"delta|\bdpos\b|\brel(ative)?\b|\b(d|rel) ?(x|y|z|roll|pitch|yaw|r[xyz])\b",
                    re.IGNORECASE)
TARGET = re.compile(r"pos\b|joint|shoulder|elbow|wrist|waist|forearm|motor|qpos", re.IGNORECASE)
USUAL = (1, 100, 255)  # an open (or closed) gripper's value; LeRobot's own is 0..100


class Dimension(NamedTuple):
    """One dimension of an action. kind: target, change, or velocity; scale: the divisor of a raw
    dimension, 0 if it is normalized."""

    key: str
    column: int
    name: str
    kind: str
    scale: int
    low: float
    high: float

    @property
    def words(self) -> str:
        """The recipe's words for it."""
        return (f" /{self.scale}" * (self.scale > 1) + " target" * (self.kind == "target")
                + " raw" * (self.scale > 0))


def describe(key: str, names: list[str] | None, actions: list[np.ndarray], states: list[np.ndarray] | None,
             override: str | None) -> list[Dimension]:
    """The dimensions of the feature `key`. actions, states: (T, k) of each episode; override: "target"
    or "change", the user's override."""
    every, dimensions = np.concatenate(actions), []
    looks = looks_like_targets(actions, states)
    for column, values in enumerate(every.T):
        name, number = names[column] if names else f"{key}[{column}]", len(np.unique(values))
        # two values are open and closed, whatever the name
        grips = number == 2 or bool(GRIPPER.search(name))
        kind = kind_by_name(name)
        if not grips and kind != "velocity":
            kind = override or kind or ("target" if looks else "change")
        kind = kind or "target"
        scale = gripper_scale(values, number <= 4) if grips and kind == "target" else 0
        dimensions.append(Dimension(key, column, name, kind, scale, float(values.min()), float(values.max())))
    return dimensions


def kind_by_name(name: str) -> str | None:
    """The kind of a dimension by its name. None if the name is ambiguous: "x" may be a position or
    a step."""
    spaced = name.replace("_", " ")  # so that words end there
    kinds = {"velocity": VELOCITY, "change": CHANGE, "target": TARGET}
    return next((kind for kind, pattern in kinds.items() if pattern.search(spaced)),
                "target" if GRIPPER.search(name) else None)


def looks_like_targets(actions: list[np.ndarray], states: list[np.ndarray] | None) -> bool:
    """True if most moving dimensions look like targets, by the test of --inspect."""
    count = np.array([len(episode) for episode in actions])
    episodes = np.zeros(len(actions), EPISODE)
    episodes["first"], episodes["count"] = np.cumsum(count) - count, count
    columns = {"action": np.concatenate(actions)} | ({"proprio": np.concatenate(states)} if states else {})
    frames = np.zeros(count.sum(), [(name, "<f4", values.shape[1:]) for name, values in columns.items()])
    for name, values in columns.items():
        frames[name] = values
    stats = {f"q{q:02d}": np.quantile(frames["action"], q / 100, axis=0) for q in (1, 99)}
    return survey.looks_like_targets(frames, episodes, stats).sum() > (stats["q99"] > stats["q01"]).sum() / 2


def gripper_scale(values: np.ndarray, few: bool) -> int:
    """The divisor that brings a gripper's values to 0..1 or -1..1; 0: normalize them instead."""
    low, high = float(values.min()), float(values.max())  # bool has no differences
    for scale in USUAL:
        within = -1e-3 * scale <= low or (few and -1.001 * scale <= low)
        if within and high <= 1.001 * scale and high - low >= 0.5 * scale:
            return scale
    return 0


def as_recipe(dimensions: list[Dimension]) -> dict:
    """The recipe's keys for an action: neighboring dimensions of one kind form one field."""
    fields, widths = [], Counter(dimension.key for dimension in dimensions)
    for (key, words), group in groupby(dimensions, lambda d: (d.key, d.words)):
        columns = [dimension.column for dimension in group]
        first, stop = columns[0] or "", columns[-1] + 1 if columns[-1] + 1 < widths[key] else ""
        fields.append(f"{key}{f'[{first}:{stop}]' if first or stop else ''}{words}")
    marked = any(dimension.words for dimension in dimensions)
    # its default assumes a gripper
    return {"action": ", ".join(fields)} | ({} if marked else {"absolute": 0})


def resample(values: np.ndarray, kinds: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """An episode's actions (T, k) at some of its frames, each for the time until the next of them: the
    last target, the sum of changes, the mean of velocities. Rotations are added like the rest, which
    is correct for small ones."""
    ends = np.append(frames[1:], len(values))
    taken = values[ends - 1]
    sums = np.add.reduceat(values.astype(np.float64), frames, axis=0)
    changes, velocities = kinds == "change", kinds == "velocity"
    taken[:, changes] = sums[:, changes]
    taken[:, velocities] = sums[:, velocities] / (ends - frames)[:, None]
    return taken


def lost_commands(values: np.ndarray, dimensions: list[Dimension], frames: np.ndarray) -> np.ndarray:
    """How often `resample` drops a target that goes far away and comes back before the next of the
    frames, as when a button is pressed briefly: for each dimension of the actions (T, k)."""
    values = values.astype(np.float64)
    kinds = np.array([dimension.kind for dimension in dimensions])
    span = np.array([dimension.high - dimension.low for dimension in dimensions])
    taken = resample(values, kinds, frames)
    before = np.concatenate([taken[:1], taken[:-1]])
    low = np.minimum.reduceat(values, frames, axis=0)
    high = np.maximum.reduceat(values, frames, axis=0)
    beyond = np.maximum(np.minimum(before, taken) - low, high - np.maximum(before, taken))
    return ((beyond > 0.5 * span) & (kinds == "target")).sum(0)


def idle_frames(actions: list[np.ndarray], dimensions: list[Dimension]) -> int:
    """The number of frames that command no motion: no target moves, and no change or velocity is
    above a thousandth of its range. Policies copy such pauses."""
    target = np.array([dimension.kind == "target" for dimension in dimensions])
    every = np.concatenate(actions)
    spread = np.quantile(every, 0.99, axis=0) - np.quantile(every, 0.01, axis=0)
    idle = 0
    for values in actions:
        motion = np.where(target, np.diff(values, axis=0, append=values[-1:]), values)[:, spread > 0]
        still = (np.abs(motion) < 1e-3 * spread[spread > 0]).all(1)
        still[-1] &= not target.all()  # the recording ends before the effect of a last target
        idle += int(still.sum())
    return idle
