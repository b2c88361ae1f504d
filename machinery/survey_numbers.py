"""Faults in the scale and in the rotations of a dataset's actions and states.

Each check is a function of a `Signal`: the actions or the states of a `Sample`, which is some
episodes of a frame table. It measures something for each dimension, episode or frame, compares it
with a threshold, whose reason is beside it, and yields a finding for the dimensions that exceed it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from machinery.frames import FrameTable

ROWS = 200_000  # frames to look at: most datasets have fewer, and more would take seconds
SHOWN = 8  # episodes that a finding lists


class Finding(NamedTuple):
    """A fault of a dataset, and its cure."""

    kind: str  # a key of survey.KINDS
    severity: str  # "high": spoils a training, which prints it; "medium": worth knowing
    text: str  # which dimension, camera or episodes, and the evidence in numbers
    cure: str
    of: str = ""  # "action", "state", "instruction", "episode", or a camera's key
    dims: tuple[int, ...] = ()
    episodes: tuple[int, ...] = ()  # some of their numbers in the table, the worst first

    def __str__(self) -> str:
        return f"{self.text}: {self.cure} (if it is meant: accept: [{self.kind}])"


class Sample:
    """Episodes of a table at even distances, about `most` frames in all: E episodes, N frames.

    frames: (N,) rows as in the table; rows: (N,) their numbers there; numbers: (E,) the episodes'
    numbers there; first, second, last, count: (E,) which of these frames are an episode's; episode:
    (N,) whose frame it is; joined: (N,) bool, does it follow a frame of its episode?
    """

    def __init__(self, table: FrameTable, most: int = ROWS):
        step = -(-len(table.frames) // most)
        used = np.flatnonzero(table.episodes["count"] > 0)
        self.numbers = used[::step]
        episodes = table.episodes[self.numbers]
        self.count = episodes["count"].astype(np.int64)
        self.first = np.cumsum(self.count) - self.count
        self.last = self.first + self.count - 1
        self.second = np.minimum(self.first + 1, self.last)
        self.episode = np.repeat(np.arange(len(episodes)), self.count)
        within = np.arange(len(self.episode)) - self.first[self.episode]
        self.joined = within > 0
        self.rows = episodes["first"].astype(np.int64)[self.episode] + within
        self.frames = np.asarray(table.frames) if step == 1 else table.frames[self.rows]

    def finding(self, kind: str, of: str, text: str, cure: str, bad: np.ndarray | None = None,
                severity: str = "high", dims=()) -> Finding:
        """bad: (N,), how bad each frame is; 0 or False if it is not."""
        episodes = [] if bad is None else self.episodes(bad)[:SHOWN]
        return Finding(kind, severity, text, cure, of, tuple(map(int, dims)), tuple(episodes))

    def episodes(self, bad: np.ndarray) -> list[int]:
        """The numbers of the episodes that have bad frames, the worst first."""
        score = np.bincount(self.episode, bad, len(self.numbers))
        order = np.argsort(-score, kind="stable")
        return self.numbers[order[: np.count_nonzero(score)]].tolist()

    def where(self, bad: np.ndarray) -> str:
        """How many frames and episodes are bad, and the numbers of the worst episodes."""
        episodes = self.episodes(bad)
        names = ", ".join(map(str, episodes[:4])) + ", ..." * (len(episodes) > 4)
        return (f"in {np.count_nonzero(bad)} frames of {len(episodes)} of {len(self.numbers)} "
                f"episodes ({names})")

    def reach(self, values: np.ndarray) -> np.ndarray:
        """(N, ...) -> (E, ...) from the smallest to the largest of each episode."""
        return np.maximum.reduceat(values, self.first) - np.minimum.reduceat(values, self.first)

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
    sample: Sample
    values: np.ndarray  # (N, D) float32
    place: np.ndarray
    raw: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @cached_property
    def steps(self) -> np.ndarray:
        """(N, D) differences to the frame before, 0 in an episode's first."""
        steps = np.diff(self.values, axis=0, prepend=self.values[:1])
        return steps * self.sample.joined[:, None]

    @cached_property
    def calm(self) -> np.ndarray:
        """(N, D) the values without spikes of one frame: medians of three."""
        near = [np.roll(self.values, shift, axis=0) for shift in (-1, 0, 1)]
        return np.median(near, axis=0)

    @cached_property
    def moves(self) -> np.ndarray:
        """(N, D) how far each dimension moves, or is commanded to: steps of positions, or changes.
        """
        return np.where(self.place, self.steps, self.values)

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

    @property
    def motion(self) -> np.ndarray:
        """(N,) how far the robot moves from the frame before to this one, as a share of each
        dimension's span, averaged. If it has no positions: how far it is commanded to move."""
        dims = self.continuous & self.place
        dims = dims if dims.any() else self.continuous
        return (abs(self.moves[:, dims]) / self.span[dims]).sum(1) / max(dims.sum(), 1)

    def leave_out(self, findings: list[Finding]) -> None:
        """Dimensions with a finding do not count as motion in the checks that follow."""
        for finding in findings:
            self.continuous[list(finding.dims)] = False

    def finding(self, kind: str, dims: np.ndarray | range, bad: np.ndarray | None, text: str,
                cure: str, severity: str = "high") -> Finding:
        """dims: ascending numbers, or (D,) bool, which the text names; bad: as of Sample.finding"""
        dims = np.arange(len(self.place))[dims]
        runs = np.split(dims, np.flatnonzero(np.diff(dims) != 1) + 1)
        names = ", ".join("-".join(map(str, sorted({run[0], run[-1]}))) for run in runs)
        text = f"{self.of} dimension{'s' * (len(dims) > 1)} {names}: {text}"
        return self.sample.finding(kind, self.of, text, cure, bad, severity, dims)


def signals(sample: Sample, table: FrameTable, kind: str) -> list[Signal]:
    """The actions, and the states if the table has them. kind: of normalization."""
    found = []
    for of, column in (("action", "action"), ("state", "proprio")):
        if column not in sample.frames.dtype.names:
            continue
        if of == "state" and all("action" in name for name in table.features):
            continue  # the recipe has constants for a state, as `0`
        stats = table.statistics[column]
        values = np.ascontiguousarray(sample.frames[column])
        raw = ~np.array(stats.get("mask", [True] * values.shape[1]), bool)
        place = table.targets if of == "action" else np.ones(len(raw), bool)
        found.append(Signal(of, sample, values, place, raw, *bounds(stats, kind)))
    return found


def bounds(stats: Mapping, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """The values that normalization makes -1 and 1, (D,) each."""
    if kind == "normal":
        return np.subtract(stats["mean"], stats["std"]), np.add(stats["mean"], stats["std"])
    from action_tokenizer import BOUNDS  # here: it imports PyTorch

    low, high = BOUNDS[kind]
    return np.array(stats[low]), np.array(stats[high])


# ---- Scale ---------------------------------------------------------------------------------------


def scale_findings(signal: Signal, kind: str) -> Iterator[Finding]:
    """Values that take the bins from all others, of a few episodes in another unit or of single
    frames, and dimensions that hold noise only. kind: of normalization"""
    odd, factor = odd_episodes(signal)
    bad = odd[signal.sample.episode]
    if odd.any():
        text = (f"values and motion are about {factor:.2g} times as large as in the rest "
                f"{signal.sample.where(bad.any(1))}, so the smaller ones get about "
                f"{256 * min(factor, 1 / factor):.0f} of 256 bins: degrees among radians, or "
                "millimeters among meters?")
        yield signal.finding("episode_scale", odd.any(0), bad.any(1), text,
                             "convert these episodes, or leave them out")
    yield from outliers(signal, bad, kind)
    yield from jitter(signal)


def odd_episodes(signal: Signal) -> tuple[np.ndarray, float]:
    """-> which dimensions of which episodes are in another unit, (E, D) bool; by what factor."""
    center = np.where(signal.place, signal.quantiles[2], 0)
    level, _ = relative(signal, signal.calm)
    motion, _ = relative(signal, np.where(signal.place, signal.steps, signal.calm))
    away, reach = relative(signal, signal.calm - center)
    # a dimension that the others hardly use differs without a fault
    used = signal.continuous & (reach > 0.02 * np.median(reach))
    mean = signal.sample.per_episode(signal.calm)[signal.sample.episode]
    around, _ = relative(signal, signal.calm - mean)
    larger = np.where(used, np.minimum(motion, away), 0)
    smaller = used & signal.place & (motion > 0) & (np.maximum(motion, level) < 0.1)
    # operators and tasks differ by factors of 2 or 3; units by 57, 100 or 1000
    odd = (larger > 8) & (larger > 20).any(1)[:, None]
    # a pause has small changes, too, but not in most positions
    most = max(2, 0.5 * (used & signal.place).sum())
    odd |= smaller & (smaller.sum(1) > most)[:, None]
    # or a place, or one arm of two. One that rests at zero is as small, but noise makes its steps
    # as large as its deviation
    tiny = smaller & (np.maximum(motion, level) < 0.03) & (motion < 3 * around)
    odd |= smaller & (tiny.sum(1) > 2)[:, None]
    if len(odd) < 5 or not odd.any() or odd.any(1).mean() > 0.4:  # then they are not the exception
        return np.zeros_like(odd), 1.0
    return odd, float(np.median(motion[odd]))


def relative(signal: Signal, size: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, D) -> each episode's size over that of the median episode (E, D), and the latter (D,)."""
    # the mean of square roots, squared, is hardly changed by a few outliers
    size = signal.sample.per_episode(np.sqrt(abs(size))) ** 2
    typical = np.median(size, axis=0)
    return size / np.where(typical > 0, typical, np.inf), typical


def outliers(signal: Signal, ignored: np.ndarray, kind: str) -> Iterator[Finding]:
    """Dimensions of which the middle 90 % of all values get few of the 256 bins, because of rare
    values far away. ignored: (N, D) bool, values that another finding explains."""
    _, q05, _, q95, _ = signal.quantiles
    width = q95 - q05
    bins = 256 * width / np.maximum(signal.high - signal.low, 1e-30)
    few = ~signal.raw & signal.continuous & (width > 0) & (bins < 64)  # a quarter of them
    # 3 widths from the middle: one value in a million of a Laplace distribution
    far = few & ~ignored & (abs(signal.values - (q05 + q95) / 2) > 3 * width)
    few &= far.mean(0) > (0.01 if kind == "bounds_q99" else 0)  # or q99 leaves them out
    # a robot that goes far takes several frames to get there, and stays; an outlier comes and goes
    stays = far & np.roll(far, 1, axis=0) & np.roll(far, -1, axis=0)
    few &= stays.sum(0) <= 0.5 * far.sum(0)
    if few.any():
        bad = far[:, few].any(1)
        text = (f"the middle 90% of all values get {bins[few].min():.0f} of 256 bins, because the "
                f"range {signal.low[few][0]:.4g}..{signal.high[few][0]:.4g} is that of rare values "
                f"{signal.sample.where(bad)}")
        cure = "leave these frames out"
        cure += ", or action_normalization: bounds_q99" * (kind != "bounds_q99")
        yield signal.finding("outliers", few, bad, text, cure)


def jitter(signal: Signal) -> Iterator[Finding]:
    """Dimensions that are constant but for noise, which normalization makes as large as motion."""
    reach = np.where(signal.raw, 0, signal.span)
    used = reach > 0
    if used.sum() < 2:
        return
    typical = np.quantile(reach[used], 0.75)
    # successive values of noise are independent, so its steps are larger than its deviation
    centered = signal.values - signal.sample.per_episode(signal.values)[signal.sample.episode]
    noisy = used & (signal.steps.std(0) > 0.7 * centered.std(0))
    # changes are as independent as noise: only much smaller ones are surely noise
    tiny = np.where(signal.place, 3e-3, 1e-4) * typical
    certain = used & ((reach < 1e-5 * typical) | (noisy & (reach < tiny)))
    # an encoder's noise beside joints that move smoothly
    likely = noisy & signal.place & (reach < 0.02 * typical) & ~certain
    likely &= np.median(noisy[reach > 0.1 * typical]) == 0
    dims = certain if certain.any() else likely
    if dims.any():
        text = (f"hardly any motion, only {reach[dims].max():.2g} (others {typical:.2g}): it is "
                "noise, which normalization makes as large as motion")
        cure = f"leave them out of the recipe's {signal.of}, or round them before recording"
        severity = "high" if certain.any() else "medium"
        yield signal.finding("jitter", dims, None, text, cure, severity)


# ---- Rotations -----------------------------------------------------------------------------------

UNWRAP = "unwrap it before recording (numpy.unwrap in each episode), or record its sine and cosine"
ALIGN = ("in each episode, turn the sign if it is opposite to the frame before, beginning on the "
         "same side in all, or record a rotation matrix's first two columns")


def rotation_findings(signal: Signal) -> list[Finding]:
    """Rotations that jump, though the robot does not: angles that wrap, quaternions and rotation
    vectors that change their sign; and quaternions whose length is not one."""
    found = [*wraps(signal)]
    taken = {dim for finding in found for dim in finding.dims}
    for start in range(signal.values.shape[1] - 3):
        dims = range(start, start + 4)
        length = np.linalg.norm(signal.values[:, dims].astype(np.float64), axis=1)
        if not taken & {*dims} and is_quaternion(signal, dims, length):
            taken |= {*dims}
            found += quaternion(signal, dims, length)
    return [*found, *rotation_vector(signal, taken)]


def wraps(signal: Signal) -> Iterator[Finding]:
    """Dimensions that wrap: an angle that jumps from pi to -pi, or a difference of such angles. The
    range that is normalized is then that of the jumps, or both its ends are one place."""
    moves = abs(signal.moves)
    for turn, name in ((2 * np.pi, "2 pi"), (360.0, "360")):
        above = (signal.values - signal.values.min(0)) / turn
        within = signal.place & (above.max(0) < 1.001)
        far = moves > turn / 2
        full = (moves > 0.85 * turn) & (moves < 1.001 * turn)  # what else can move so far?
        # a hand that points at the border jumps with each tremor, but stays within a turn
        few = far.mean(0) < np.where(within, 0.5, 0.1)
        jumps = far.any(0) & (far == full).all(0) & few
        # or some episodes are at one end, the rest at the other, and none is between
        upper = above > 0.9
        ends = np.minimum(upper.mean(0), (above < 0.1).mean(0))
        between = (abs(above - 0.5) < 0.25).mean(0)
        split = within & (above.max(0) > 0.98) & (ends > 0.05) & (between < 0.01) & ~far.any(0)
        dims = (jumps | split) & signal.continuous
        if dims.any():
            bad = (far | (split & upper))[:, dims].any(1)
            text = (f"jumps by about {name}, or is at both ends of a turn, which are one "
                    f"direction, {signal.sample.where(bad)}: it wraps")
            yield signal.finding("wraps", dims, bad, text, UNWRAP)


def is_quaternion(signal: Signal, dims: range, length: np.ndarray) -> bool:
    """Is the length (N,) of four dimensions one in most frames, or the same number in all?"""
    typical = np.median(length)
    steady = (abs(length - typical) < 0.01 * typical).mean()
    # two that vary, and not zeros and ones; a length other than 1 must be exactly constant
    varies = signal.continuous[dims] & (signal.span[dims] > 0.01 * typical)
    # small changes beside an open gripper, which is 1, have this length, too
    flag = ~signal.continuous[dims] & (abs(signal.values[:, dims]).max(0) > 0.01)
    one = abs(typical - 1) < 0.01
    enough = 0.8 if one else 0.999
    return varies.sum() > 1 and not flag.any() and typical > 0.1 and steady > enough


def quaternion(signal: Signal, dims: range, length: np.ndarray) -> Iterator[Finding]:
    """Is its length one, and does it change between q and -q?"""
    off = abs(length - 1) > 0.02
    if off.any():
        zeros = " (all zeros)" * bool(length[off].min() < 1e-3)
        text = (f"the quaternion has the length {np.median(length[off]):.3g}{zeros} "
                f"{signal.sample.where(off)}")
        severity = "high" if signal.of == "action" and not off.all() else "medium"
        yield signal.finding("quaternion_length", dims, off, text, "divide it by its length before "
                             "recording, and leave frames without one out", severity)
    unit = signal.values[:, dims] / np.maximum(length, 1e-9)[:, None]
    bad, how, _ = sign_changes(unit, signal.sample.joined)
    if bad.any():
        text = f"the quaternion {how}, {signal.sample.where(bad)}"
        yield signal.finding("quaternion_sign", dims, bad, text, ALIGN)


def rotation_vector(signal: Signal, taken: set[int]) -> Iterator[Finding]:
    """Three dimensions that are an axis times an angle: at pi, the vector jumps to its opposite,
    which is the same orientation. taken: dimensions that are something else."""
    best = 2.0
    for start in range(signal.values.shape[1] - 2):
        dims = range(start, start + 3)
        vector = signal.values[:, dims].astype(np.float64)
        angle = np.linalg.norm(vector, axis=1)[:, None]
        # a recorder keeps it below pi, or lets it grow to a turn
        if taken & {*dims} or not 2.6 < angle.max() < 6.6:
            continue
        axis = vector / np.maximum(angle, 1e-9)
        unit = np.concatenate([axis * np.sin(angle / 2), np.cos(angle / 2)], axis=1)
        bad, how, error = sign_changes(unit, signal.sample.joined)
        if error < 1:
            bad &= (axis * np.roll(axis, 1, axis=0)).sum(1) < -0.8
        elif angle.max() > np.pi + 0.02:  # both signs: only if a recorder keeps it below pi
            continue
        if bad.any() and error < best:  # of those that overlap
            best = error
            text = f"the rotation vector {how} near the angle pi, {signal.sample.where(bad)}"
            finding = signal.finding("rotation_vector", dims, bad, text, ALIGN)
    if best < 2:
        yield finding


def sign_changes(unit: np.ndarray, joined: np.ndarray) -> tuple[np.ndarray, str, float]:
    """q and -q are one orientation: does it change between them? unit: (N, 4) of length one

    -> at which frames, (N,) bool; how; how much the orientation itself changes there, 1 if unknown
    """
    cosine = (unit * np.roll(unit, 1, axis=0)).sum(1)
    if not joined.any() or (abs(cosine[joined]) > 0.9).mean() < 0.8:  # not a motion
        return np.zeros(len(unit), bool), "", 1.0
    flips = joined & (cosine < -0.9)  # it turns by less than 52 degrees
    if flips.any():
        error = 1 + float(cosine[flips].mean())
        return flips, "changes its sign between frames that hardly differ", error
    few = unit[:: len(unit) // 1024 + 1]
    cosines = few @ few.T
    near = abs(cosines) > 0.98  # within 23 degrees
    both = (near & (cosines < 0)).sum() > 0.02 * near.sum()
    return both & (unit @ np.median(few, axis=0) < 0), "has both signs for one orientation", 1.0
