"""Faults in a dataset's actions and states that raise no error but spoil a training.

Each check is a function of a `Sample` (some episodes of a frame table) and of a `Signal` (their
actions or their states). It returns findings, one for each kind of fault, with all dimensions that
have it. The comment at a threshold gives its reason. survey.py calls the checks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from machinery.frames import FrameTable

ROWS = 200_000  # frames to look at: most datasets have fewer, and more would take seconds
SHOWN = 8  # episodes and frames that a finding lists


class Finding(NamedTuple):
    """A fault of a dataset, and its cure."""

    kind: str  # a key of survey.KINDS
    severity: str  # "high": spoils a training, which prints it; "medium": worth knowing
    text: str  # which dimension, camera or episodes, and the evidence in numbers
    cure: str
    of: str = ""  # "action", "state", "instruction", "episode", or a camera's key
    dims: tuple[int, ...] = ()
    episodes: tuple[int, ...] = ()  # some of their numbers in the table, the worst first
    frames: tuple[int, ...] = ()  # some rows of the table, the worst first

    def __str__(self) -> str:
        return f"{self.text}: {self.cure} (if it is meant: accept: [{self.kind}])"


class Sample:
    """Episodes of a table at even distances, about `most` frames in all: E episodes, N frames.

    frames: (N,) rows as in the table; rows: (N,) their numbers there; numbers: (E,) the episodes'
    numbers there; first, count: (E,) which of these frames are an episode's; episode: (N,) whose
    frame it is; joined: (N,) bool, does it follow a frame of its episode?
    """

    def __init__(self, table: FrameTable, most: int = ROWS):
        step = -(-len(table.frames) // most)
        used = np.flatnonzero(table.episodes["count"] > 0)
        self.numbers = used[::step]
        episodes = table.episodes[self.numbers]
        self.count = episodes["count"].astype(np.int64)
        self.first = np.cumsum(self.count) - self.count
        self.episode = np.repeat(np.arange(len(episodes)), self.count)
        within = np.arange(len(self.episode)) - self.first[self.episode]
        self.rows = episodes["first"].astype(np.int64)[self.episode] + within
        self.frames = np.asarray(table.frames) if step == 1 else table.frames[self.rows]
        self.joined = within > 0
        self.last = self.first + self.count - 1

    def finding(self, kind: str, of: str, dims, bad: np.ndarray, text: str, cure: str,
                severity: str = "high") -> Finding:
        """bad: (N,), how bad each frame is; 0 or False if it is not."""
        bad = bad.astype(float)
        score = np.bincount(self.episode, bad, len(self.numbers))
        episodes = np.argsort(-score, kind="stable")[: min(SHOWN, np.count_nonzero(score))]
        frames = np.argsort(-bad, kind="stable")[: min(SHOWN, np.count_nonzero(bad))]
        return Finding(kind, severity, text, cure, of, tuple(int(dim) for dim in dims),
                       tuple(self.numbers[episodes].tolist()), tuple(self.rows[frames].tolist()))

    def where(self, bad: np.ndarray) -> str:
        """How many frames and episodes are bad, and the numbers of the worst episodes."""
        score = np.bincount(self.episode, bad, len(self.numbers))
        return f"in {np.count_nonzero(bad)} frames of {self.episodes(score)}"

    def episodes(self, score: np.ndarray) -> str:
        """score: (E,), how bad each episode is; 0 or False if it is not."""
        count = np.count_nonzero(score)
        worst = self.numbers[np.argsort(-score.astype(float), kind="stable")[: min(count, 4)]]
        more = ", ..." if count > 4 else ""
        return f"{count} of {len(score)} episodes ({', '.join(map(str, worst))}{more})"

    def per_episode(self, values: np.ndarray) -> np.ndarray:
        """(N, ...) -> (E, ...) the mean of each episode."""
        return (np.add.reduceat(values, self.first, axis=0, dtype=np.float64).T / self.count).T


@dataclass
class Signal:
    """The actions or the states of a sample, in standard form: N frames of D dimensions.

    place: (D,) bool, is it a position (a state, a target) instead of a change?
    raw: (D,) bool, is it not normalized? low, high: (D,) the values that become -1 and 1
    """

    of: str  # "action" or "state"
    values: np.ndarray  # (N, D) float32
    joined: np.ndarray  # (N,), of the sample
    place: np.ndarray
    raw: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @cached_property
    def steps(self) -> np.ndarray:
        """(N, D) differences to the frame before, 0 in an episode's first."""
        steps = np.diff(self.values, axis=0, prepend=self.values[:1])
        return steps * self.joined[:, None]

    @cached_property
    def quantiles(self) -> np.ndarray:
        """(5, D): 1, 5, 50, 95 and 99 %."""
        return np.quantile(self.values, [0.01, 0.05, 0.5, 0.95, 0.99], axis=0)

    @cached_property
    def span(self) -> np.ndarray:
        """(D,) from the 1st to the 99th percentile."""
        return self.quantiles[4] - self.quantiles[0]

    @cached_property
    def continuous(self) -> np.ndarray:
        """(D,) bool: has it more than a few values, unlike a gripper's open and closed?"""
        few = self.values[:: len(self.values) // 20_000 + 1]
        return np.array([len(np.unique(column)) > 8 for column in few.T]) & (self.span > 0)

    @cached_property
    def motion(self) -> np.ndarray:
        """(N,) how far the robot moves from the frame before to this one, as a share of each
        dimension's span, averaged. If it has no positions: how far it is commanded to move."""
        dims = self.continuous & self.place
        moves = self.steps
        if not dims.any():
            dims = self.continuous
            moves = self.values
        if not dims.any():
            return np.zeros(len(self.values))
        return (np.abs(moves[:, dims]) / self.span[dims]).mean(1)

    def leave_out(self, findings: list[Finding]) -> None:
        """Dimensions with a finding do not count as motion in the checks that follow."""
        for finding in findings:
            self.continuous[list(finding.dims)] = False

    def name(self, dims) -> str:
        """dims: ascending numbers -> "action dimensions 0-2, 7"."""
        dims = np.asarray(dims)
        return f"{self.of} dimension{'s' * (len(dims) > 1)} {spans(dims)}"


def spans(numbers: np.ndarray) -> str:
    """Ascending numbers in short: 0-2, 7."""
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
    return ", ".join(f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def signals(sample: Sample, table: FrameTable, kind: str) -> list[Signal]:
    """The actions, and the states if the table has them. kind: of normalization."""
    found = []
    for of, column in (("action", "action"), ("state", "proprio")):
        if column not in sample.frames.dtype.names:
            continue
        stats = table.statistics[column]
        values = np.ascontiguousarray(sample.frames[column])
        raw = ~np.array(stats.get("mask", [True] * values.shape[1]), bool)
        place = table.targets if of == "action" else np.ones(len(raw), bool)
        low, high = bounds(stats, kind)
        found.append(Signal(of, values, sample.joined, place, raw, low, high))
    return found


def bounds(stats: Mapping, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """The values that normalization makes -1 and 1, (D,) each."""
    if kind == "normal":
        return np.subtract(stats["mean"], stats["std"]), np.add(stats["mean"], stats["std"])
    from action_tokenizer import BOUNDS  # here: it imports PyTorch

    low, high = BOUNDS[kind]
    return np.array(stats[low]), np.array(stats[high])


# ---- Scale ---------------------------------------------------------------------------------------


def scale_findings(sample: Sample, signal: Signal, kind: str, odd: np.ndarray, factor: float
                   ) -> list[Finding]:
    """Values that take the bins from all others: of a few episodes in another unit, and single
    outliers; and dimensions that hold noise only, which normalization scales up.

    odd, factor: from odd_episodes
    """
    found = []
    if odd.any():
        dims = np.flatnonzero(odd.any(0))
        bad = odd.any(1)
        rest = signal.values[~bad[sample.episode]][:, dims]
        width = np.subtract(*np.quantile(rest, [0.95, 0.05], axis=0))
        bins = min(255, (256 * width / np.maximum((signal.high - signal.low)[dims], 1e-30)).min())
        text = (f"{signal.name(dims)}: values and motion are about {factor:.2g} times as large in "
                f"{sample.episodes(bad)} as in the rest, whose middle 90% gets {bins:.0f} of 256 "
                "bins: degrees among radians, or millimeters among meters?")
        cure = "convert these episodes, or leave them out"
        found.append(sample.finding("episode_scale", signal.of, dims, bad[sample.episode], text,
                                    cure))
    found += outliers(sample, signal, odd[sample.episode], kind)
    return found + jitter(sample, signal)


def odd_episodes(sample: Sample, signal: Signal) -> tuple[np.ndarray, float]:
    """-> which dimensions of which episodes are in another unit, (E, D) bool; by what factor."""
    level = np.abs(signal.values)
    motion = np.abs(signal.steps) if signal.place.all() else np.where(
        signal.place, np.abs(signal.steps), level)
    away = np.where(signal.place, np.abs(signal.values - signal.quantiles[2]), level)
    # the mean of square roots, squared, is hardly changed by a few outliers
    level, motion, away = (sample.per_episode(np.sqrt(x)) ** 2 for x in (level, motion, away))
    typical = [np.median(x, axis=0) for x in (level, motion, away)]
    active = signal.continuous & (typical[1] > 0) & (typical[2] > 0)
    odd = np.zeros(level.shape, bool)
    if len(level) < 5 or not active.any():
        return odd, 1.0
    level, motion, away = (x[:, active] / np.maximum(typical_x[active], 1e-30)
                           for x, typical_x in zip((level, motion, away), typical, strict=True))
    place = signal.place[active]
    larger = np.minimum(motion, away)  # (E, active)
    smaller = np.where(place & (motion > 0), np.maximum(motion, level), 1)
    # operators and tasks differ by factors of 2 or 3; units by 57, 100 or 1000
    all_larger = (np.median(larger, axis=1) > 10)[:, None]
    # a pause has small changes, too
    all_smaller = ((smaller < 0.1).sum(1) > max(2, 0.5 * place.sum()))[:, None]
    # one dimension only: not one that others hardly use, and a few episodes do
    used = typical[2][active] > 0.02 * np.median(typical[2][active])
    part = (larger > np.where(all_larger, 10, 20)) & (all_larger | used)
    part |= part.any(1)[:, None] & (larger > 8)
    part |= all_smaller & (smaller < 0.1)
    if part.any(1).mean() > 0.4:
        return odd, 1.0
    odd[:, active] = part
    ratio = np.where(all_smaller, smaller, np.sqrt(motion * away))[part]
    return odd, float(np.median(ratio)) if part.any() else 1.0


def outliers(sample: Sample, signal: Signal, ignored: np.ndarray, kind: str) -> list[Finding]:
    """Dimensions of which the middle 90 % of all values get few of the 256 bins, because of rare
    values far away. ignored: (N, D) bool, values that another finding explains."""
    _, q05, _, q95, _ = signal.quantiles
    width = q95 - q05
    reach = signal.high - signal.low
    bins = 256 * width / np.maximum(reach, 1e-30)
    # 3 widths from the middle: one value in a million of a Laplace distribution
    far = np.abs(signal.values - (q05 + q95) / 2) > 3 * width
    few = ~signal.raw & signal.continuous & (width > 0) & (bins < 64)  # a quarter of them
    far &= few & ~ignored
    few &= far.mean(0) > (0.01 if kind == "bounds_q99" else 0)  # or q99 leaves them out
    # a robot that goes far takes several frames to get there, and stays; an outlier comes and goes
    before = np.roll(far, 1, axis=0) & signal.joined[:, None]
    after = np.roll(far & signal.joined[:, None], -1, axis=0)
    alone = far & ~(before & after)
    spiky = alone.sum(0) >= 0.5 * far.sum(0)
    found = []
    for dims, severity in ((few & spiky, "high"), (few & ~spiky & (bins < 16), "medium")):
        dims = np.flatnonzero(dims)
        if not len(dims):
            continue
        bad = far[:, dims].any(1)
        text = (f"{signal.name(dims)}: the middle 90% of all values get {bins[dims].min():.0f} of "
                f"256 bins: it is within {q05[dims[0]]:.4g}..{q95[dims[0]]:.4g}, the range "
                f"{signal.low[dims[0]]:.4g}..{signal.high[dims[0]]:.4g} is that of rare values "
                f"{sample.where(bad)}")
        cure = "leave these frames out, or correct them"
        if kind != "bounds_q99" and far[:, dims].mean(0).max() < 0.01:
            cure = "action_normalization: bounds_q99"
        found.append(sample.finding("outliers", signal.of, dims, bad, text, cure, severity))
    return found


def jitter(sample: Sample, signal: Signal) -> list[Finding]:
    """Dimensions that are constant but for noise, which normalization makes as large as motion."""
    reach = np.where(signal.raw, 0, signal.span)
    if (reach > 0).sum() < 2:
        return []
    typical = np.quantile(reach[reach > 0], 0.75)
    share = reach / typical
    # successive values of noise are independent, so its steps are larger than its deviation
    centered = signal.values - sample.per_episode(signal.values)[sample.episode]
    deviation = centered.std(0)
    noisy = signal.steps.std(0) > 0.7 * deviation
    # changes are as independent as noise: only much smaller ones are surely noise
    tiny = np.where(signal.place, 1e-3, 1e-4)
    rounding = reach < 4e-6 * np.abs(signal.quantiles[2])  # float32 has 24 bits
    certain = (reach > 0) & ((share < 1e-5) | rounding | (noisy & (share < tiny)))
    # an encoder's noise beside joints that move smoothly
    likely = (reach > 0) & noisy & signal.place & (share < 0.02) & ~certain
    if np.median(noisy[reach > 0.1 * typical]) > 0:
        likely[:] = False
    found = []
    for dims, severity in ((certain, "high"), (likely, "medium")):
        dims = np.flatnonzero(dims)
        if len(dims):
            text = (f"{signal.name(dims)}: hardly any motion, only {reach[dims].max():.2g} (others "
                    f"{typical:.2g}): it is noise, which normalization makes as large as motion")
            cure = f"leave them out of the recipe's {signal.of}, or round them before recording"
            bad = np.zeros(len(signal.values))
            found.append(sample.finding("jitter", signal.of, dims, bad, text, cure, severity))
    return found


# ---- Rotations -----------------------------------------------------------------------------------

UNWRAP = "unwrap it before recording (numpy.unwrap in each episode), or record its sine and cosine"
ALIGN = ("in each episode, turn the sign if it is opposite to the frame before, beginning on the "
         "same side in all, or record a rotation matrix's first two columns")


def rotation_findings(sample: Sample, signal: Signal) -> list[Finding]:
    """Rotations that jump, though the robot does not: angles that wrap, quaternions and rotation
    vectors that change their sign; and quaternions whose length is not one."""
    found = wraps(sample, signal)
    starts = find_quaternions(signal)
    for start, length in starts.items():
        found += quaternion(sample, signal, start, length)
    taken = {start + i for start in starts for i in range(4)}
    taken |= {dim for finding in found for dim in finding.dims}
    return found + rotation_vector(sample, signal, taken)


def wraps(sample: Sample, signal: Signal) -> list[Finding]:
    """Dimensions that wrap: an angle that jumps from pi to -pi, or a difference of such angles. The
    range that is normalized is then that of the jumps, or both its ends are one place."""
    found = []
    moves = np.abs(np.where(signal.place, signal.steps, signal.values))
    reach = np.ptp(signal.values, axis=0)
    low = signal.values.min(0)
    for turn, name in ((2 * np.pi, "2 pi"), (360.0, "360")):
        far = moves > turn / 2
        share = far.mean(0)
        with np.errstate(invalid="ignore"):
            sure = np.where(far, moves, np.inf).min(0) > 0.85 * turn  # all of these: a full turn
        sure &= np.where(far, moves, 0).max(0) <= 1.001 * turn
        # a hand that points at the border jumps with each tremor, but stays within a turn
        within = signal.place & (reach < 1.001 * turn)
        jumping = (share > 0) & sure & (share < np.where(within, 0.5, 0.1)) & signal.continuous
        # or some episodes are at one end, and the rest at the other
        place = (signal.values - low) / turn
        ends = np.minimum((place < 0.1).mean(0), (place > 0.9).mean(0))
        middle = ((place > 0.25) & (place < 0.75)).mean(0)
        split = within & (reach > 0.98 * turn) & (ends > 0.05) & (middle < 0.01) & (share == 0)
        dims = np.flatnonzero(jumping)
        if len(dims):
            bad = far[:, dims].any(1)
            text = f"{signal.name(dims)}: jumps by about {name} {sample.where(bad)}: it wraps"
            found.append(sample.finding("wraps", signal.of, dims, bad, text, UNWRAP))
        dims = np.flatnonzero(split & signal.continuous)
        if len(dims):
            bad = (place[:, dims] > 0.9).any(1)
            text = (f"{signal.name(dims)}: at both ends of a turn ({name}) and not between, "
                    f"{sample.where(bad)} at the upper end: one direction has two values, and goes "
                    "round")
            found.append(sample.finding("wraps", signal.of, dims, bad, text, UNWRAP))
    return found


def find_quaternions(signal: Signal) -> dict[int, np.ndarray]:
    """{first of 4 dimensions that are a quaternion: its length (N,)}. Its length is one in most
    frames, or the same number in all."""
    found = {}
    start = 0
    while start + 4 <= signal.values.shape[1]:
        columns = slice(start, start + 4)
        length = np.linalg.norm(signal.values[:, columns].astype(np.float64), axis=1)
        typical = np.median(length)
        steady = np.abs(length - typical) < 0.01 * typical
        # two that vary, and not zeros and ones; a length other than 1 must be exactly constant
        varies = (signal.continuous[columns] & (signal.span[columns] > 0.01 * typical)).sum() >= 2
        one = abs(typical - 1) < 0.01
        if varies and typical > 0.1 and steady.mean() > (0.8 if one else 0.999):
            found[start] = length
            start += 4
        else:
            start += 1
    return found


def quaternion(sample: Sample, signal: Signal, start: int, length: np.ndarray) -> list[Finding]:
    """q and -q are one orientation: does a quaternion change between them?"""
    dims = range(start, start + 4)
    name = f"{signal.name(dims)}: the quaternion"
    off = np.abs(length - 1) > 0.02
    found = []
    if off.any():
        zeros = " (all zeros)" * bool((length[off] < 1e-3).any())
        severity = "high" if signal.of == "action" and off.mean() < 1 else "medium"
        text = f"{name} has the length {np.median(length[off]):.3g}{zeros} {sample.where(off)}"
        cure = "divide it by its length before recording, and leave frames without one out"
        found.append(sample.finding("quaternion_length", signal.of, dims, off, text, cure,
                                    severity))
    unit = signal.values[:, start : start + 4] / np.maximum(length, 1e-9)[:, None]
    cosine = (unit * np.roll(unit, 1, axis=0)).sum(1)[sample.joined]
    if not len(cosine) or (np.abs(cosine) > 0.9).mean() < 0.8:  # not a motion
        return found
    flips = np.zeros(len(unit), bool)
    flips[sample.joined] = cosine < -0.5
    few = unit[:: len(unit) // 1024 + 1]
    cosines = few @ few.T
    near = np.abs(cosines) > 0.98  # within 23 degrees
    opposite = (near & (cosines < 0)).sum() / near.sum()
    if flips.any() or opposite > 0.02:
        bad = flips if flips.any() else unit @ np.median(few, axis=0) < 0
        text = f"{name} changes its sign between frames that hardly differ, {sample.where(flips)}"
        if not flips.any():
            text = f"{name} has both signs for one orientation, {sample.where(bad)} the other sign"
        rare = opposite < 0.02 and flips.sum() < 0.05 * len(sample.numbers)
        found.append(sample.finding("quaternion_sign", signal.of, dims, bad, text, ALIGN,
                                    "medium" if rare else "high"))
    return found


def rotation_vector(sample: Sample, signal: Signal, taken: set[int]) -> list[Finding]:
    """Three dimensions that are an axis times an angle: at pi, the vector jumps to its opposite,
    which is the same orientation. taken: dimensions that are something else."""
    best = None
    for start in range(signal.values.shape[1] - 2):
        vector = signal.values[:, start : start + 3].astype(np.float64)
        angle = np.linalg.norm(vector, axis=1)
        # a recorder keeps it below pi, or lets it grow to a turn
        if {start, start + 1, start + 2} & taken or not 2.6 < angle.max() < 6.6:
            continue
        half = angle / 2
        axis = vector / np.maximum(angle, 1e-9)[:, None]
        unit = np.concatenate([axis * np.sin(half)[:, None], np.cos(half)[:, None]], axis=1)
        turned = np.abs((unit * np.roll(unit, 1, axis=0)).sum(1))
        if not sample.joined.any() or (turned[sample.joined] > 0.9).mean() < 0.8:  # not a motion
            continue
        step = np.abs(signal.steps[:, start : start + 3])
        size = np.linalg.norm(step, axis=1)
        # one orientation (within 23 degrees), and the opposite vector; not one angle that wraps
        opposite = (axis * np.roll(axis, 1, axis=0)).sum(1) < -0.8
        flips = sample.joined & (turned > 0.98) & (size > 4.5) & opposite
        flips &= step.max(1) < 0.98 * size
        both = np.zeros(len(angle), bool)
        if angle.max() < np.pi + 0.02 and (angle > 2.6).mean() > 0.05:  # as of a rotation vector
            few = np.flatnonzero(angle > 2.6)
            few = few[:: len(few) // 512 + 1]
            cosines = axis[few] @ axis[few].T
            near = np.abs(unit[few] @ unit[few].T) > 0.98
            if (near & (cosines < -0.9)).sum() > 0.02 * near.sum():
                side = axis @ axis[few[0]]
                both = (angle > 2.6) & (side < -0.9)
        bad = flips if flips.any() else both
        loss = 1 - turned[flips].mean() if flips.any() else 1.0
        if bad.any() and (best is None or loss < best[0]):
            best = (loss, start, bad, flips.any())
    if best is None:
        return []
    _, start, bad, jumps = best
    dims = range(start, start + 3)
    verb = "jumps to its opposite" if jumps else "has both signs for one orientation"
    text = f"{signal.name(dims)}: the rotation vector {verb} near the angle pi, {sample.where(bad)}"
    return [sample.finding("rotation_vector", signal.of, dims, bad, text, ALIGN)]
