"""An episode's actions at fewer frames per second."""

import numpy as np

from machinery.guess import Dimension


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
    before = np.concatenate([values[:1], taken[:-1]])
    low = np.minimum.reduceat(values, frames, axis=0)
    high = np.maximum.reduceat(values, frames, axis=0)
    beyond = np.maximum(np.minimum(before, taken) - low, high - np.maximum(before, taken))
    # 0.4: a gripper's command may go from 0 to 1 or -1, half of its range
    return ((beyond > 0.4 * span) & (kinds == "target")).sum(0)
