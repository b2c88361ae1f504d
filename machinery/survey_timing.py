"""Faults in the time of a dataset's actions and states: ends, jumps, pauses, delays.

Also: which actions are targets, and which are changes. Checks as in survey_numbers.py.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from machinery.frames import FrameTable
from machinery.survey_numbers import Finding, Sample, Signal

# ---- Ends, jumps, pauses -------------------------------------------------------------------------


def inner_frames(sample: Sample) -> np.ndarray:
    """(N,) bool: the steps to these frames are neither an episode's first nor its last one."""
    inner = sample.joined.copy()
    inner[sample.last] = False
    inner[sample.second] = False
    return inner


def end_findings(signal: Signal) -> Iterator[Finding]:
    """First or last steps that are filled in: a position far from its neighbor, or no action."""
    sample = signal.sample
    inner = inner_frames(sample)
    long = sample.count > 3  # shorter ones have no usual step
    if long.sum() < 3 or not signal.continuous.any():
        return
    zero = (signal.values == 0).all(1)
    filled = zero
    last = sample.last
    padded = np.zeros_like(long)
    dims = signal.continuous & signal.place
    if dims.any():
        zero = (signal.values[:, dims] == 0).all(1)
        # where up to 10 zeros begin, with which an episode is padded
        before = np.maximum.reduceat(np.where(zero, -1, np.arange(len(zero))), sample.first)
        padded = (last - before > 1) & (last - before <= 10) & (sample.count > 20)
        last = np.where(padded, before + 1, last)
        inner[last] = False
        steps = abs(signal.steps[:, dims]) / signal.span[dims]
        # 3 times the usual largest step, and a fifth of the range
        filled = (steps > np.maximum(3 * np.quantile(steps[inner], 0.99, axis=0), 0.2)).any(1)
        filled[sample.first] = filled[sample.second]
    elif zero[inner].mean() > 0.1:  # pauses, which are not filled in
        return
    for name, edge in (("last", last[long]), ("first", sample.first[long])):
        bad = np.isin(np.arange(len(filled)), edge[filled[edge]])
        if bad[edge].mean() > 0.3:  # a robot may jump at the end of some
            what = "all zeros" if zero[edge].mean() > 0.3 else "far from the step beside it"
            cure = "trim: true in the recipe drops the first and last step"
            if name == "last" and padded.any():
                cure = f"leave out the last {np.max(sample.last - last) + 1} steps of each episode"
            yield signal.finding("ends", signal.continuous, bad,
                                 f"the {name} step is {what}, {sample.where(bad)}", cure,
                                 "high" if dims.any() else "medium")


def jump_findings(signal: Signal) -> Iterator[Finding]:
    """Positions that jump within an episode: several executions in a record, or frames that were
    dropped, over which the robot moves on."""
    sample = signal.sample
    inner = inner_frames(sample)
    dims = signal.continuous & signal.place
    if dims.sum() < 2 or not inner.any():
        return
    motion = signal.motion
    beside = np.max([np.roll(motion, shift) for shift in (-2, -1, 1, 2)], axis=0)
    usual, most = np.quantile(motion[inner], [0.95, 0.99])
    values = signal.values[:, dims] / signal.span[dims]
    # 15 % of all ranges at once, and 6 times what 19 of 20 steps reach: no robot moves so. Half as
    # much is enough if it ends where the episode begins
    back = abs(values - values[sample.first[sample.episode]]).mean(1) < 0.5 * motion
    least = np.where(back, max(0.08, most), max(0.15, 6 * usual))
    jumps = inner & (motion > least) & (motion > 3 * beside)
    if jumps.any():
        several = back[jumps].mean() > 0.5
        text = f"jumps {sample.where(jumps)}"
        text += ", back to where they begin: several executions in one record?" * bool(several)
        cure = "write one record per execution" if several else "leave these frames out"
        often = len(sample.episodes(jumps)) > 0.1 * len(sample.numbers)
        yield signal.finding("jumps", dims, jumps, text, cure, "high" if often else "medium")
    steps = signal.steps[:, dims] / signal.span[dims]
    size = np.linalg.norm(steps, axis=1)
    moving = inner & (size > 0.3 * np.median(size[inner & (size > 0)]))
    beside = np.stack([np.roll(size, 1), np.roll(size, -1)])  # the steps before and after
    # one lost frame doubles a step, which is plain if the steps beside it are equal
    even = beside.min(0) > 0.8 * beside.max(0)
    dropped = inner & ~jumps & (size > np.where(even, 1.7, 2.5) * beside.max(0))
    held = inner & (size == 0)
    for shift in (1, -1):
        near = np.roll(steps, shift, axis=0)
        product = (steps * near).sum(1)  # in the same direction
        dropped &= np.roll(moving, shift) & (product > 0.9 * size * np.roll(size, shift))
        # an encoder's ticks repeat a state, too, but then most dimensions stay between others
        held &= np.roll(moving, shift) & ((near != 0).mean(1) > 0.5)
    if held.mean() > 0.05:
        text = f"repeats the state of the frame before while it moves, {sample.where(held)}"
        yield signal.finding("dropped_frames", dims, held, text, "read the state in each frame, or "
                             "record at the rate at which it changes", "medium")
    if dropped.sum() > 2 and dropped.mean() > 0.005:
        text = ("moves about twice as far as just before and after, or more, "
                f"{sample.where(dropped)}: frames were dropped there")
        yield signal.finding("dropped_frames", dims, dropped, text, "record at a steady rate, or "
                             "leave these episodes out",
                             "high" if dropped.mean() > 0.03 else "medium")


def stuck_states(action: Signal, state: Signal) -> Iterator[Finding]:
    """States that never move, in all or in some episodes, though actions command motion."""
    sample = state.sample
    reach = sample.reach(state.values)
    # noise only: far less than in other episodes, or than the values (but for rare outliers).
    # Meters among millimeters are a thousandth
    commands = action.quantiles[3] - action.quantiles[1]
    noise = 1e-4 * max(abs(state.quantiles[2]).max(), commands.max())
    still = (reach <= np.maximum(0.01 * np.quantile(reach, 0.9, axis=0), noise)).all(1)
    commanded = sample.per_episode(action.motion)
    still &= (commanded > 0.2 * np.median(commanded)) & (sample.count > 9)
    if still.any():
        bad = still[sample.episode]
        text = f"never moves while the actions do, {sample.where(bad)}"
        yield state.finding("still_state", range(len(state.place)), bad, text,
                            "leave these episodes out, or use_proprio: false",
                            "high" if still.mean() > 0.5 else "medium")


def idle_findings(action: Signal, motion: np.ndarray) -> Iterator[Finding]:
    """Many frames in which no motion is commanded. motion: (N,) of the robot."""
    sample = action.sample
    # of the median episode: others may be in another unit
    spread = np.median(sample.reach(action.values), axis=0)
    spread = np.where(spread > 0, spread, action.span)
    moves = abs(action.moves) / np.where(spread > 0, spread, np.inf)
    size = moves.max(1)
    # a slow motion at a high rate has small steps, but few are much smaller than its others
    still = size < np.minimum(1e-3, 0.05 * sample.per_episode(size)[sample.episode])
    still |= size == 0
    still &= motion <= 0.2 * np.quantile(motion, 0.9)  # not on its way to a target that is held
    # the first frame's target has no frame before: it is as still as the second's
    still[sample.first] &= still[sample.second]
    if not spread.any() or still.mean() < 0.05:
        return
    moves = np.cumsum(~still)
    start = moves == (moves - ~still)[sample.first][sample.episode]
    end = still & ~start & (moves == moves[sample.last][sample.episode])
    text = (f"{still.mean():.0%} of all frames command no motion ({start.mean():.0%} at the start "
            f"of episodes, {end.mean():.0%} at the end, {(still & ~start & ~end).mean():.0%} "
            "between), and policies copy such pauses")
    yield sample.finding("idle", "action", text, "remove them", still,
                         "high" if still.mean() > 0.5 or start.mean() > 0.25 else "medium")


# ---- Delays, copies ------------------------------------------------------------------------------


def delay_findings(action: Signal, state: Signal) -> Iterator[Finding]:
    """Does the state follow the action, or precede it?"""
    dims = np.flatnonzero(action.continuous & ~action.raw)
    sample = action.sample
    lags = np.arange(-5, 11)
    if not len(dims) or not state.continuous.any() or len(sample.rows) < 200:
        return
    moves, responses = (np.clip(values, *np.quantile(values, [0.02, 0.98], axis=0))  # no outliers
                        for values in (action.moves[:, dims], state.steps[:, state.continuous]))
    curves = []  # of each lag the correlation of each pair
    rows = np.flatnonzero(sample.joined)
    for lag in lags:
        later = (rows + lag) % len(moves)
        same = sample.joined[later] & (sample.episode[later] == sample.episode[rows])
        curves.append(correlation(moves[rows[same]], responses[later[same]]))
    curves = np.stack(curves)  # (lags, dims, parts of the state)
    partner = curves.max(0).argmax(1)  # the part that follows an action, or precedes it
    curves = curves[:, np.arange(len(dims)), partner]
    sure = curves.max(0) > 0.7
    if not sure.any():
        return
    curve = curves[:, sure].mean(1)
    best = int(lags[curve.argmax()])
    # a change is seen in the next frame, a target may be copied
    earliest = 0 if action.place[dims[sure]].mean() > 0.5 else 1
    late = best < earliest
    right = curve[lags >= earliest if late else lags == 1].max()
    # is it better by more than chance? Slow motions correlate at all delays
    better = curve.max() > right + 0.01 and 1 - curve.max() < 0.7 * (1 - right)
    if not better or earliest <= best <= 3:
        return
    text = f"the state follows after {best} frames"
    cure = f"predict action_chunk: {2 * best} or more, or shift the actions"
    if late:
        text = f"behind the state instead of ahead of it, by {earliest - best} frames"
        cure = f"shift the actions by {earliest - best} frames before recording"
    text += f" (correlation {curve.max():.2f}, {right:.2f} in the right order)"
    yield action.finding("delay", dims[sure], None, text, cure, "high" if late else "medium")


def correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of each column of (N, A) with each of (N, B) -> (A, B); 0 for a constant column."""
    covariance = np.nan_to_num(np.cov(a.T, b.T))[: a.shape[1], a.shape[1] :]
    return covariance / np.maximum(a.std(0), 1e-9)[:, None] / np.maximum(b.std(0), 1e-9)


def copy_findings(action: Signal, state: Signal) -> Iterator[Finding]:
    """Actions that equal the state of their own frame, as when an arm is moved by hand. A gripper
    with two values may well do so."""
    step = len(action.values) // 4096 + 1
    actions = action.values[::step]  # (N, A)
    moved = actions != np.median(actions, axis=0)
    same = moved[..., None] & (actions[..., None] == state.values[::step, None])  # (N, A, P)
    dims = (same.sum(0).max(1) > 0.99 * moved.sum(0)) & ~action.raw
    if dims.any():
        yield action.finding("copies", dims, None, "equal to the state of the same frame, so a "
                             "policy stays put", "record the commands, or the next frame's state, "
                             "as the action")


# ---- Targets or changes --------------------------------------------------------------------------


def target_findings(action: Signal, states: list[Signal], table: FrameTable) -> Iterator[Finding]:
    """Dimensions that look like targets though the recipe takes them for changes, or vice versa.
    """
    likely = looks_like_targets(table.frames, table.episodes, table.statistics["action"])
    dims = ~table.targets & ~table.declared & likely
    if dims.any():
        text = ("look like targets (joint angles, a pose), not like changes: past the end of an "
                "episode, the labels jump to the middle of the range")
        yield action.finding("target_or_change", dims, None, text,
                             "write `target` after them in the recipe, or `change`")
    for state in states:
        yield from called_targets(action, state)


def called_targets(action: Signal, state: Signal) -> Iterator[Finding]:
    """Dimensions that the recipe calls targets, but whose sum the state follows."""
    rows = np.flatnonzero(action.sample.joined)
    if len(rows) < 100:  # fewer may be alike by chance
        return
    values, steps = (np.clip(some, *np.quantile(some, [0.01, 0.99], axis=0))  # no outliers
                     for some in (action.values[rows - 1], state.steps[rows]))
    like_change = correlation(values, steps).max(1)
    like_state = abs(correlation(values, state.values[rows])).max(1)
    # a target is most of all like the state
    dims = action.place & action.continuous & (like_change > np.maximum(0.9, like_state + 0.1))
    if dims.any():
        text = ("changes that the recipe calls `target`: the state moves by them (correlation "
                f"{like_change[dims].min():.2f}, {like_state[dims].max():.2f} with its values)")
        yield action.finding("target_or_change", dims, None, text, "write `change` instead")


def looks_like_targets(frames: np.ndarray, episodes: np.ndarray, stats: Mapping) -> np.ndarray:
    """Which dimensions of the actions look like targets, (A,) bool: they never come near zero, or
    move little from frame to frame, or the state follows them. stats: of the actions."""
    episodes = episodes[:: len(episodes) // 256 + 1]
    firsts = episodes["first"].astype(int)
    lasts = firsts + episodes["count"].astype(int) - 1
    rows = np.concatenate([*map(np.arange, firsts, lasts)])  # all but the last of each episode
    low, high = np.array(stats["q01"]), np.array(stats["q99"])
    if len(rows) < 2:
        return np.zeros(len(low), bool)
    # without outliers, which would decide all of what follows
    actions = np.clip(frames["action"][rows], low, high)
    steps = abs(np.clip(frames["action"][rows + 1], low, high) - actions).mean(0)
    smooth = steps < 0.12 * np.maximum(actions.std(0), 1e-9)
    # an angle far from zero moves in steps, a velocity that keeps its sign may be noisy
    one_sign = ((low > 0) | (high < 0)) & (steps < 0.5 * actions.std(0))
    followed = np.zeros_like(smooth)
    integrated = followed
    if "proprio" in frames.dtype.names:
        state = frames["proprio"][rows + 1]
        like_state = abs(correlation(actions, state)).max(1)
        like_change = correlation(actions, state - frames["proprio"][rows]).max(1)
        followed = like_state > 0.98
        one_sign &= like_state > 0.5
        # a velocity may be smooth, too, but then it is more like the state's change than like the
        # state. The margin is for motion on a circle, where the change of y is like x
        integrated = (like_change > 0.7) & (like_change > like_state + 0.15)
    # a robot rests before and after an episode, so that its velocities are near zero there. A base
    # reports velocities as its state, which follows them
    ends = abs(frames["action"][np.concatenate([firsts, lasts])])
    rests = (ends < 0.1 * np.maximum(abs(low), abs(high))).mean(0) > 0.8
    return (high > low) & ~rests & ~integrated & (one_sign | smooth | followed)
