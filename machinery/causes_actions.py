"""How the robot executed the answers: do its motions follow them, or a changed form of them?

The demonstrations show how an action changes the robot's state within a frame (`Motion`). So the
state at the next request can be predicted from the answer to this one. Each way of executing
answers wrongly changes the answers: if the robot goes where the changed ones would have led it, and
not where the answers lead, this way is the cause. Read `action_causes`, then `ways`.

This predicts the effect of the answers, not the right answers. So it also works for a weak policy.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from machinery.causes_state import orders
from machinery.examine import Cause
from machinery.frames import FrameTable

MEMORY = 3  # actions on which the motion within a frame depends
FEW = 20  # requests with a next one: fewer prove nothing
SURE = 3  # standard errors by which a way must fit better
NOTICED = 0.1  # usual steps of a frame: less is no error
LEAST = 0.25  # of the model's own errors
EXPLAINED = 0.1, 0.6  # a way is named if it explains this share of the error; a second way
STEADY = 0.15  # frames: other times are not of a robot's clock
DELAYS = range(1, 7)  # frames
HOLDS = (2, 3, 4)  # frames that a step lasts
RATE = "execute the steps at the rate of the recording, each once"
SCALES = (0.001, 0.01, 1 / 57.29578, 0.1, 0.25, 0.35, 0.5, 0.7,
          1.4, 2, 2.8, 4, 10, 57.29578, 100, 1000)


class Played(NamedTuple):
    """R requests of a recording, those of an episode adjacent."""

    states: np.ndarray  # (R, P) in standard form
    answers: np.ndarray  # (R, chunk, A) in standard form
    episode: np.ndarray  # (R,) ascending
    clock: int | None = None  # frames from request to request


class Way(NamedTuple):
    """A way of executing answers. change: (actions (R, A), states (R, P)) -> what is executed."""

    text: str
    cure: str
    change: Callable = lambda actions, states: actions
    delay: int = 0
    hold: int = 1
    again: bool = False  # from its first step, when all of an answer is executed?
    doubt: float = 1.0  # by how much it must be better than others
    first: bool = False  # is `states` that of the request, for all steps of its answer?


PLAIN = Way("", "")


# ---- The effect of actions -----------------------------------------------------------------------


class Motion:
    """How the state changes within a frame: linear in the state and the latest actions."""

    def __init__(self, table: FrameTable, states: np.ndarray):
        """states: (N, P) of all frames of the table."""
        actions = np.array(table.frames["action"], np.float64)
        episode = table.episode_of(np.arange(len(states)))
        stats = table.statistics["action"]
        self.ends = np.array(stats["q01"]), np.array(stats["q99"])
        self.raw = ~np.array(stats.get("mask", np.ones(len(self.ends[0]))), bool)
        self.targets = table.targets & ~self.raw
        self.changes = ~table.targets & ~self.raw
        rows = MEMORY - 1 + np.flatnonzero(episode[:-MEMORY] == episode[MEMORY:])
        change = states[rows + 1] - states[rows]
        self.scale = change.std(0) + 1e-9  # (P,)
        self.low, self.high = states.min(0), states.max(0)
        self.reach = self.high - self.low
        known = self.inputs(states[rows], [actions[rows - back] for back in range(MEMORY)])
        spread = known.std(0)
        spread = np.where(spread > 1e-9, spread, np.abs(known).max(0) + 1)  # constants
        square = (known / spread).T @ (known / spread) + 1e-5 * len(rows) * np.eye(len(spread))
        self.weights = np.linalg.solve(square, (known / spread).T @ change) / spread[:, None]
        missed = change - known @ self.weights
        # (P,) the dimensions that follow the actions
        self.moved = missed.var(0) < 0.8 * change.var(0)
        self.unit = np.abs(missed).mean(0) + NOTICED * self.scale  # (P,) of errors
        effects = self.weights[1 + states.shape[1] :].reshape(MEMORY, actions.shape[1], -1)
        self.effect = effects.sum(0)  # (A, P)
        self.place = np.abs(self.effect / self.scale).argmax(1)  # (A,) the state that each moves

    @staticmethod
    def inputs(states: np.ndarray, actions: list[np.ndarray]) -> np.ndarray:
        """actions: the newest first."""
        return np.concatenate([np.ones((len(states), 1)), states, *actions], axis=1)

    def follow(self, played: Played, way: Way, frames: int) -> np.ndarray:
        """The states (R, P) `frames` after each request."""
        count, chunk, _ = played.answers.shape
        first = np.searchsorted(played.episode, played.episode) * frames  # (R,)
        start = np.arange(count) * frames - way.delay
        step = np.arange(frames) // way.hold
        step = step % chunk if way.again else np.minimum(step, chunk - 1)
        stream = played.answers[:, step].reshape(count * frames, -1)
        state = played.states
        least, most = np.minimum(self.low, state.min(0)), np.maximum(self.high, state.max(0))
        # changes may lead into a stop: where neither it nor any demonstration has been
        led = np.isin(np.arange(len(least)), self.place[self.changes])
        least[~led], most[~led] = -np.inf, np.inf
        actions = []
        for back in range(1, MEMORY):
            before = state
            if frames == 1:
                before = state[np.maximum(start + way.delay - back, first)]
            actions.append(way.change(stream[np.maximum(start - back, first)], before))
        for frame in range(frames):
            known = played.states if way.first else state
            action = way.change(stream[np.maximum(start + frame, first)], known)
            actions = [action, *actions][:MEMORY]
            state = (state + self.inputs(state, actions) @ self.weights).clip(least, most)
        return state


# ---- Ways of executing answers -------------------------------------------------------------------


def ways(motion: Motion, names: list[str]) -> list[Way]:
    """All that are tried."""
    width = len(names)
    every = np.arange(width)
    low, high = motion.ends
    raw, targets, changes = motion.raw, motion.targets, motion.changes
    labels = list(names)
    if raw[-1] and "gripper" not in labels[-1]:
        labels[-1] = f"the gripper ({labels[-1]})"
    found = []
    def pointwise(text: str, cure: str, dims, change: Callable, doubt: float = 1.0) -> None:
        chosen = np.isin(every, dims)
        found.append(Way(text, cure, lambda x, states: np.where(chosen, change(x), x),
                         doubt=doubt))

    for dim, name in enumerate(labels):
        for ends in (0, low + high):
            pointwise(f"{name} is executed with the other sign",
                      f"do not turn {name} round in the client", dim, lambda x, ends=ends: ends - x)
    for dim in every[raw]:
        for factor, offset in ((0.5, 0.5), (2, -1)):
            pointwise(f"{labels[dim]} is executed in another range", f"send {labels[dim]} as it is "
                      f"answered, in {low[dim]:g}..{high[dim]:g}", dim,
                      lambda x, a=factor, b=offset: a * x + b, doubt=1.3)
    for order in orders(width):
        moved = [name for name, dim, own in zip(names, order, every, strict=True) if dim != own]
        found.append(Way(f"{' and '.join(moved)} are exchanged: another order of columns",
                         f"execute the columns in the order {', '.join(names)}",
                         lambda x, states, order=order: x[:, order], doubt=1 + 0.05 * len(moved)))
    for dims in [every[~raw], *every[:, None]]:
        which = "the actions are" if len(dims) > 1 else f"{labels[dims[0]]} is"
        for factor, reach in itertools.product(SCALES, (np.inf, high - low)):
            # a robot may limit what it is told
            pointwise(f"{which} executed {factor:.3g} times as large: another scale, range or unit",
                      "execute the numbers of the answer in the units of the recording, unscaled",
                      dims, lambda x, factor=factor, reach=reach: (x * factor).clip(
                          low - reach + high - low, low + reach), doubt=1.3 if factor < 1 else 1.1)
    place = motion.place
    gain = motion.effect[every, place]
    for share in (1, 0.5, 0.25) if changes.any() else ():  # of the way, within a frame
        def toward(x, states, reach=gain / share):
            return np.where(changes, ((x - states[:, place]) / reach).clip(low, high), x)

        found.append(Way("changes are executed as absolute positions (delta as absolute)",
                         "add each change to the current position, or use the delta mode", toward))
    if targets.any():
        found += [Way("absolute targets are executed as changes (absolute as delta)",
                      "go to the targets: do not add them to the current position",
                      lambda x, states: x + np.where(targets, states[:, place], 0),
                      first=first) for first in (False, True)]
    return found


def late_ways() -> list[Way]:
    found = [Way(f"the answers are executed {delay} frames late: a delay after the picture",
                 "send the newest picture, execute the answer at once, or skip the steps of the "
                 "answer whose time is over", delay=delay) for delay in DELAYS]
    found += [Way(f"each step lasts {hold} frames: the control rate is too low, or a step of the "
                  "chunk is executed too long", RATE, hold=hold) for hold in HOLDS]
    found.append(Way("an answer is executed again after its last step: the chunk is executed too "
                     "long", RATE, again=True))
    return found


# ---- Which way explains the motion ---------------------------------------------------------------


def combined(first: Way, second: Way) -> Way:
    """Both: the second changes the answers before the first does."""
    return second._replace(change=lambda x, states: first.change(second.change(x, states), states),
                           first=first.first or second.first,
                           again=first.again or second.again,
                           delay=max(first.delay, second.delay),
                           hold=first.hold * second.hold)


class Trial:
    """How far the robot is from where the answers lead, if they are executed in a way."""

    def __init__(self, motion: Motion, played: Played):
        self.motion = motion
        self.played = played
        episode = played.episode
        middle = (motion.low + motion.high) / 2
        near = (np.abs(played.states - middle) < 2 * motion.reach).all(1)  # as in training
        self.followed = np.append((episode[1:] == episode[:-1]) & near[:-1], False)
        self.clock = None
        # a simulator's clock is not the robot's: its motion must fit, too
        if played.clock and self.followed.any():
            least, plain = self.best(PLAIN)
            timed = [self.errors(way, played.clock).mean() for way in [PLAIN, *late_ways()]]
            if played.clock >= least and min(timed) < 1.1 * plain.mean() + LEAST:
                self.clock = played.clock

    def errors(self, way: Way, frames: int) -> np.ndarray:
        """Of each request that has a next one, and each dimension, in units of the model's own."""
        reached = self.motion.follow(self.played, way, frames)
        wrong = (reached - np.roll(self.played.states, -1, axis=0)) / self.motion.unit
        return np.abs(wrong)[self.followed][:, self.motion.moved]

    def best(self, way: Way) -> tuple[int, np.ndarray]:
        """The frames from request to request that explain it best, and the errors."""
        steps = range(1, self.played.answers.shape[1] + 1)
        frames = {self.clock or count * way.hold for count in steps}
        tries = [(count, self.errors(way, count)) for count in frames]
        return min(tries, key=lambda each: each[1].mean())


def frames_by_clock(time: np.ndarray, episode: np.ndarray, fps: float) -> int | None:
    """Frames from request to request, if the robot asks in step with its own clock.

    time: (R,) of the requests, in nanoseconds; fps: frames a second of the recording, 0: unknown
    """
    between = np.diff(time)[episode[1:] == episode[:-1]] * 1e-9 * fps
    frames = round(np.median(between)) if len(between) else 0
    return frames if (np.abs(between - frames) < STEADY).mean() > 0.8 and frames else None


def explain(trial: Trial, every: list[Way]) -> tuple[list[tuple[float, Way, int]], float]:
    """The two ways that explain the motion, the second given the first: (share of the error that
    it explains, way, frames from request to request). And the error that remains."""
    now = PLAIN
    found = []
    for least in EXPLAINED:
        _, before = trial.best(now)
        tried = []
        for way in every:
            if all(way.text != other.text for _, other, _ in found):
                frames, after = trial.best(combined(way, now))
                tried.append((way.doubt * after.mean(), way, frames, after))
        _, way, frames, after = min(tried, key=lambda each: each[0])
        touched = np.abs(after - before).mean(0) > 0.1 * before.mean()
        if not touched.any():
            break
        gains = (before - after)[:, touched].mean(1)  # of each request
        gain = gains.mean() / before[:, touched].mean()
        sure = gains.mean() > SURE * gains.std() / len(gains) ** 0.5
        if not (sure and gain > least and gains.mean() > LEAST):
            break
        found.append((gain, way, frames))
        now = combined(way, now)
    return found, trial.best(now)[1].mean()


def action_causes(table: FrameTable, played: list[Played], names: list[str]) -> list[Cause]:
    """table: the training frames, with states; played: the requests, once for each reading of their
    states; names: of the actions' dimensions"""
    states = np.array(table.frames["proprio"], np.float64)
    moves = np.ptp(states, axis=0) > 0
    motion = Motion(table, states[:, moves])
    trials = [Trial(motion, own._replace(states=own.states[:, moves])) for own in played]
    trials = [trial for trial in trials if trial.followed.sum() >= FEW]
    if not trials or not motion.moved.any():
        return []
    every = ways(motion, names) + late_ways()
    steps = trials[0].played.answers.shape[1]
    explained = []
    for place, trial in enumerate(trials):
        # if the robot waits between answers, a delay would look like it
        ranked, error = explain(trial, [way for way in every
                                        if not way.delay or (trial.clock or 0) <= steps])
        # the likeliest reading, unless another leaves much less that is wrong
        explained.append((error * 2 ** len(ranked) * 1.5**place, place, trial, ranked))
    _, _, trial, ranked = min(explained)
    found = []
    late = False
    for gain, way, frames in ranked:
        text = (f"{way.text}: if so, the answers explain the robot's motion "
                f"{1 / (1 - gain):.1f} times as well, with {frames} frames from request to request")
        evidence = min([0.4 + gain / 2, *(cause.evidence - 0.01 for cause in found)])
        found.append(Cause(evidence, "actions", text, way.cure))
        late |= way in late_ways()
    frames, _ = trial.best(PLAIN)
    if frames > steps and not late:
        found.append(Cause(0.5, "actions", f"by the clock, {frames} frames of the recording pass "
                           f"from request to request, but an answer has {steps} steps: the control "
                           "rate is too low, or the chunk is executed too long or twice", RATE))
    if not found and steps >= 4 * frames:
        found.append(Cause(0.3, "actions", f"about {frames} of the {steps} steps of an answer are "
                           "executed before the next request: the chunk is executed too short, and "
                           "the robot may hesitate", "execute at least half of the steps"))
    return found
