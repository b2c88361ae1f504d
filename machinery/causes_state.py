"""Are the states in a robot's requests those of training, in other units, in another order?

Each reading predicts the quantiles of the seen states from those of training. The one that is much
closer than `nothing is wrong` is the cause, and repairs the states. Read `state_causes`.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from machinery.examine import Cause

CLOSE = 4  # orders of states that are tried, if several explain them
UNITS = {57.29578: "degrees, training's in radians", 1 / 57.29578: "radians, training's in degrees",
         1000: "millimeters, training's in meters", 0.001: "meters, training's in millimeters",
         100: "100 times as large: percent, training's in 0..1, or centimeters",
         0.01: "0.01 times as large: 0..1, training's in percent, or meters",
         -1: "of the other sign"}
QUANTILES = np.linspace(0.05, 0.95, 10)


class Reading(NamedTuple):
    """What may be wrong with states. away: (P,) how far off they still are if it is."""

    away: np.ndarray
    what: str
    cure: str
    repair: Callable | None = None  # states (S, P) as they were sent -> as they should be
    whole: bool = False  # all dimensions at once, or none?


def state_readings(trained: np.ndarray, seen: np.ndarray) -> Iterator[Reading]:
    """Of states (R, P) of training, (S, P) of requests. The first: nothing is wrong."""
    ours = np.quantile(trained, QUANTILES, axis=0)  # (10, P)
    theirs = np.quantile(seen, QUANTILES, axis=0)
    spans = np.ptp(ours, axis=0) + 1e-6

    def distance(reading: np.ndarray) -> np.ndarray:
        """Of quantiles (10, P) to those that are seen, in their span -> (P,)."""
        return np.abs(reading - theirs).mean(0) / np.maximum(np.ptp(reading, 0), 0.05 * spans)

    yield Reading(distance(ours), "", "")
    moved = np.median(theirs, axis=0) - np.median(ours, axis=0)
    yield Reading(distance(ours + moved) + 0.1, "have an offset", "calibrate its zero",
                  lambda x: x - moved)
    for factor, unit in UNITS.items():
        yield Reading(distance(np.sort(ours * factor, axis=0)), f"are {unit}",
                      "send the states in the units of the recording", lambda x, f=factor: x / f)
    for order in orders(len(spans)):
        yield Reading(distance(ours[:, order]), "are in another order",
                      "send the states in the order of the recording",
                      lambda x, order=order: x[:, np.argsort(order)], whole=True)


def orders(width: int) -> list[list[int]]:
    """Ways to order `width` numbers: all, or if these are too many, with two exchanged."""
    own = [*range(width)]
    if width < 6:
        return [[*order] for order in itertools.permutations(own)][1:]
    return [[{one: two, two: one}.get(dim, dim) for dim in own]
            for one, two in itertools.combinations(own, 2)]


def best_reading(trained: np.ndarray, seen: np.ndarray, wrong: np.ndarray
                 ) -> tuple[float, np.ndarray, Reading, list[Callable]]:
    """The reading that explains the dimensions that are wrong: how far off they still are, the
    evidence of each, the reading, and the likeliest ways to repair all states, if all can be."""
    plain, *readings = state_readings(trained, seen)
    readings.sort(key=lambda each: np.where(
        wrong, np.minimum(each.away, plain.away), each.whole * (each.away - plain.away)).sum())
    best = readings[0]
    evidence = np.where(wrong, 1 - best.away / (plain.away + 1e-9), 0)
    close = [each for each in readings if each.what == best.what]
    close.sort(key=lambda each: each.away.sum())
    ways = [lambda x, repair=each.repair: np.where(wrong | best.whole, repair(x), x)
            for each in close[:CLOSE]]
    return best.away[wrong].sum(), evidence, best, ways * int(evidence[wrong].min() > 0.5)


def state_causes(trained: np.ndarray, seen: np.ndarray, names: list[str],
                 first: np.ndarray, start: np.ndarray) -> tuple[list[Cause], list[Callable]]:
    """Are the states (S, P) of the requests unlike those of training, (R, P)?

    first: the first states of training's episodes; start: (S,) which state is the first of the
    request's episode. If a robot that begins as in training gets where no demonstration was, its
    states are not to blame. -> causes, and the likeliest ways to repair the states
    """
    def labels(dims: np.ndarray) -> str:
        return ", ".join(np.array(names)[dims])

    begun = seen[np.unique(start)]
    low, high = first.min(0), first.max(0)
    margin = 0.1 * (high - low) + 1e-3
    strange = ((begun > low - margin) & (begun < high + margin)).mean(0) < 0.8
    reach = np.ptp(trained, 0)
    least = 1e-3 * reach
    still = (reach > 0) & (np.abs(seen - seen[start]).max(0) < least)
    still &= np.sum(np.arange(len(seen)) != start) > 8
    if still.any():
        # a gripper may always be open, but other values differ from episode to episode
        sure = (still | (reach == 0)).all()
        sure |= (still & (strange | (np.ptp(seen, 0) > least))).any()
        return [Cause(1 if sure else 0.4, "state", f"the states {labels(still)} are frozen",
                      "read the state anew for each step")], [] if sure else [np.asarray]
    wrong = strange & (next(state_readings(trained, seen)).away > 0.6)
    samples = [(trained, seen)]
    if len(begun) > 1:
        samples.append((first, begun))  # later, the robot may be far from any demonstration
    if not wrong.any():
        return [], [np.asarray]
    _, evidence, reading, ways = min((best_reading(*sample, wrong) for sample in samples),
                                     key=lambda found: found[0])
    if evidence.max() < 0.5:
        return [], []
    return [Cause(evidence.max(), "state", f"the states {labels(evidence > 0.5)} "
                  f"{reading.what}", reading.cure)], ways
