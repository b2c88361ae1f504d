"""Faults in the time of a dataset's actions and states: ends, jumps, pauses, delays.

Also: which actions are targets, and which are changes. Checks as in survey_numbers.py.
"""

from collections.abc import Mapping

import numpy as np

from machinery.survey_numbers import Finding, Sample, Signal

# ---- Ends and timing -----------------------------------------------------------------------------


def end_findings(sample: Sample, signal: Signal) -> list[Finding]:
    """First or last steps that are filled in: a position far from its neighbor, or no action."""
    found = []
    moving = signal.continuous
    inner = sample.joined.copy()
    inner[sample.last] = False
    seconds = sample.first + 1
    inner[seconds[sample.count > 2]] = False
    long = sample.count > 3  # shorter ones have no usual step
    if not inner.any() or not moving.any() or long.sum() < 3:
        return []
    dims = moving & signal.place
    for name, edge, step in (("last", sample.last, sample.last), ("first", sample.first, seconds)):
        rows = edge[long]
        constant = np.ptp(signal.values[rows], axis=0) == 0  # the same in all episodes: filled in
        zero = (signal.values[rows] == 0).all(1)
        bad = np.zeros(len(signal.values), bool)
        if dims.any():
            jump = np.abs(signal.steps[:, dims]) / signal.span[dims]
            usual = np.quantile(jump[inner], 0.99, axis=0)
            # 3 times the usual largest step, and a fifth of the range
            jumps = (jump[step[long]] > np.maximum(3 * usual, 0.2)).any(1)
            bad[rows[jumps]] = True
        elif signal.of == "action" and not (signal.values[inner] == 0).all(1).mean() > 0.1:
            bad[rows[zero]] = True  # zero changes are rare elsewhere
        share = bad[rows].mean()
        if share < 0.3:
            continue
        filled = "all zeros" if zero.mean() > 0.3 else "far from the step beside it"
        if constant[moving].all() and "zeros" not in filled:
            filled = "the same in all episodes, and " + filled
        text = f"the {signal.of} of the {name} step is {filled}, {sample.where(bad)}"
        severity = "high" if dims.any() else "medium"
        found.append(sample.finding("ends", signal.of, np.flatnonzero(dims | moving), bad, text,
                                    "trim: true in the recipe drops the first and last step",
                                    severity))
    return found


def jump_findings(sample: Sample, signal: Signal) -> list[Finding]:
    """Positions that jump within an episode: several executions in a record, or frames that were
    dropped."""
    dims = signal.continuous & signal.place
    motion = signal.motion
    inner = sample.joined.copy()
    inner[sample.last] = False
    if dims.sum() < 2 or not inner.any():
        return []
    # 15 % of all ranges at once, and 6 times what 19 of 20 steps reach: no robot moves so. Half as
    # much is enough if it is sudden, and ends where the episode begins
    usual, most = np.quantile(motion[inner], [0.95, 0.99])
    jumps = inner & (motion > max(0.15, 6 * usual))
    beside = np.max([np.roll(motion, shift) for shift in (-2, -1, 1, 2)], axis=0)
    sudden = inner & (motion > max(0.08, most)) & (motion > 3 * beside)
    start = signal.values[sample.first[sample.episode]][:, dims]
    away = (np.abs(signal.values[:, dims] - start) / signal.span[dims]).mean(1)
    back = (jumps | sudden) & (away < 0.5 * motion)
    jumps |= back
    found = []
    if jumps.any():
        back = back.sum() > 0.5 * jumps.sum()
        episodes = np.unique(sample.episode[jumps])
        text = f"{signal.of} jumps {sample.where(jumps)}"
        text += ", back to where they begin: several executions in one record?" if back else ""
        cure = "write one record per execution" if back else "leave these frames out"
        severity = "high" if len(episodes) > 0.1 * len(sample.numbers) else "medium"
        found.append(sample.finding("jumps", signal.of, np.flatnonzero(dims), jumps * motion, text,
                                    cure, severity))
    steps = signal.steps[:, dims] / signal.span[dims]
    size = np.linalg.norm(steps, axis=1)
    moving = size > 0.3 * (np.median(size[size > 0]) if size.any() else 1)
    dropped = inner & ~jumps
    for shift in (1, -1):  # before and after: in the same direction, but 2.5 times as far
        beside = np.roll(steps, shift, axis=0)
        length = np.roll(size, shift)
        cosine = (steps * beside).sum(1) / np.maximum(size * length, 1e-12)
        dropped &= np.roll(inner & moving, shift) & (cosine > 0.9) & (size > 2.5 * length)
    sizes = np.maximum(np.roll(size, 1), np.roll(size, -1))
    share = dropped.mean()
    if dropped.sum() > 2 and share > 0.005:
        factor = np.median(size[dropped] / sizes[dropped])
        text = (f"{signal.of} moves {factor:.1f} times as far as just before and after "
                f"{sample.where(dropped)}: frames were dropped there")
        cure = "record at a steady rate, or leave these episodes out"
        found.append(sample.finding("dropped_frames", signal.of, np.flatnonzero(dims), dropped,
                                    text, cure, "high" if share > 0.03 else "medium"))
    return found


def pace_findings(sample: Sample, signal: Signal, odd_unit: np.ndarray) -> list[Finding]:
    """States that are repeated while the robot moves, and episodes of another rate. odd_unit: (E,)
    bool, episodes whose unit differs."""
    motion = signal.motion
    if not (signal.continuous & signal.place).any() or not motion.any():
        return []
    found = []
    moved = motion > 0.2 * np.median(motion[motion > 0])
    after = np.roll(moved & sample.joined, -1)
    same = sample.joined & (signal.steps == 0).all(1)
    repeated = same & np.roll(moved, 1) & after
    share = repeated.sum() / max((repeated | moved).sum(), 1)
    if share > 0.15 and repeated.sum() > 20:
        text = (f"{signal.of} is repeated in {share:.0%} of the frames in which the robot moves, "
                f"{sample.where(repeated)}: it is recorded at a lower rate")
        found.append(sample.finding("repeated", signal.of, np.flatnonzero(signal.continuous),
                                    repeated, text, "record at the rate of the slowest sensor",
                                    "medium"))
    speed = sample.per_episode(np.sqrt(motion)) ** 2
    ratio = speed / max(np.median(speed), 1e-12)
    odd = (ratio > 4) | ((ratio < 0.25) & (sample.count > 10))  # people differ by a factor of 2
    odd &= ~odd_unit
    if len(speed) >= 5 and odd.any() and odd.mean() < 0.3:
        text = (f"{signal.of} moves {ratio[odd].min():.2g} to {ratio[odd].max():.2g} times as fast "
                f"as in the median episode in {sample.episodes(odd)}: another rate?")
        found.append(sample.finding("episode_speed", signal.of, (), odd[sample.episode], text,
                                    "record all at one rate", "medium"))
    return found


def idle_findings(sample: Sample, action: Signal) -> list[Finding]:
    """Many frames in which no motion is commanded."""
    # of the median episode: others may be in another unit
    spread = np.median(np.maximum.reduceat(action.values, sample.first)
                       - np.minimum.reduceat(action.values, sample.first), axis=0)
    spread = np.where(spread > 0, spread, action.span)
    moving = spread > 0
    if not moving.any():
        return []
    motion = np.where(action.place, action.steps, action.values)[:, moving]
    still = (np.abs(motion) < 1e-3 * spread[moving]).all(1)
    # the first frame's target has no frame before: it is as still as the second's
    still[sample.first] &= np.roll(still, -1)[sample.first] | ~action.place.any()
    idle = still.mean()
    if idle <= 0.05:
        return []
    within = np.arange(len(still)) - sample.first[sample.episode]
    begun = np.maximum.reduceat(np.where(still, -1, within), sample.first) < 0
    first_move = np.minimum.reduceat(np.where(still, len(still), within), sample.first)
    last_move = np.maximum.reduceat(np.where(still, -1, within), sample.first)
    before = np.where(begun, sample.count, first_move)
    after = np.where(begun, 0, sample.count - 1 - last_move)
    shares = [before.sum() / len(still), after.sum() / len(still)]
    text = (f"{idle:.0%} of all frames command no motion ({shares[0]:.0%} at the start of "
            f"episodes, {shares[1]:.0%} at the end, {max(idle - sum(shares), 0):.0%} between), and "
            "policies copy such pauses")
    severity = "high" if idle > 0.5 else "medium"
    return [sample.finding("idle", "action", (), still, text, "remove them", severity)]


def delay_findings(sample: Sample, action: Signal, state: Signal) -> list[Finding]:
    """Does the state follow the action, or precede it?"""
    dims = np.flatnonzero(action.continuous & ~action.raw)
    parts = np.flatnonzero(state.continuous)
    moves = limited(np.where(action.place, action.steps, action.values))
    responses = limited(state.steps)
    lags = np.arange(-5, 11)
    if not len(dims) or not len(parts) or len(moves) < 200:
        return []
    curves = []  # of each lag (rows) the correlation of each pair
    for lag in lags:
        same = sample.episode == np.roll(sample.episode, -lag)
        same[: max(-lag, 0)] = False
        same[len(same) - max(lag, 0) :] = False
        same &= np.roll(sample.joined, -lag) & sample.joined
        later = np.roll(responses, -lag, axis=0)[same][:, parts]
        curves.append(correlation(moves[same][:, dims], later))
    curves = np.stack(curves)  # (lags, dims, parts)
    partner = curves.max(0).argmax(1)
    curves = curves[:, np.arange(len(dims)), partner]  # (lags, dims)
    sure = curves.max(0) > 0.7
    if not sure.any():
        return []
    curve = curves[:, sure].mean(1)
    best = int(lags[curve.argmax()])
    places = action.place[dims[sure]].mean() > 0.5
    late = lags < (0 if places else 1)  # a change is seen in the next frame, a target may be copied
    bad = np.zeros(len(moves))
    name = action.name(dims[sure])
    if best in lags[late] and far_better(curve.max(), curve[~late].max()):
        ahead = -best if places else 1 - best
        text = (f"{name}: behind the state instead of ahead of it, by {ahead} frames (correlation "
                f"{curve.max():.2f}, {curve[~late].max():.2f} in the right order)")
        cure = f"shift the actions by {ahead} frames before recording"
        return [sample.finding("delay", "action", dims[sure], bad, text, cure)]
    if best > 3 and far_better(curve.max(), curve[lags == 1].max()):
        text = f"{name}: the state follows after {best} frames (correlation {curve.max():.2f})"
        cure = f"predict action_chunk: {2 * best} or more, or shift the actions"
        return [sample.finding("delay", "action", dims[sure], bad, text, cure, "medium")]
    return []


def far_better(one: float, other: float) -> bool:
    """Is a correlation better by more than chance? Slow motions correlate at all delays."""
    return one > other + 0.01 and 1 - one < 0.7 * (1 - other)


def limited(values: np.ndarray) -> np.ndarray:
    """(N, D) without outliers, which would decide a correlation."""
    return np.clip(values, *np.quantile(values, [0.02, 0.98], axis=0))


def correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of each column of (N, A) with each of (N, B) -> (A, B); 0 for a constant column."""
    covariance = np.nan_to_num(np.cov(a.T, b.T))[: a.shape[1], a.shape[1] :]
    return covariance / np.maximum(a.std(0), 1e-9)[:, None] / np.maximum(b.std(0), 1e-9)


# ---- Targets, changes, copies --------------------------------------------------------------------


def looks_like_targets(frames: np.ndarray, episodes: np.ndarray, stats: Mapping) -> np.ndarray:
    """Which dimensions of the actions look like targets, (A,) bool: they never come near zero, or
    move little from frame to frame, or the state follows them. stats: of the actions."""
    episodes = episodes[:: len(episodes) // 256 + 1]
    parts = [np.arange(e["first"], e["first"] + e["count"] - 1) for e in episodes]
    rows = np.concatenate(parts).astype(int)  # all but the last of each episode
    low, high = np.array(stats["q01"]), np.array(stats["q99"])
    if len(rows) < 2:
        return np.zeros(len(low), bool)
    actions = frames["action"][rows]
    steps = np.abs(frames["action"][rows + 1] - actions)
    smooth = steps.mean(0) < 0.12 * np.maximum(actions.std(0), 1e-9)
    # an angle far from zero moves in steps, a velocity that keeps its sign may be noisy
    one_sign = ((low > 0) | (high < 0)) & (steps.mean(0) < 0.5 * actions.std(0))
    followed = np.zeros_like(smooth)
    integrated = np.zeros_like(smooth)
    if "proprio" in frames.dtype.names:
        state = frames["proprio"][rows + 1]
        change = state - frames["proprio"][rows]
        like_state = np.abs(correlation(actions, state)).max(1)
        like_change = correlation(actions, change).max(1)
        followed = like_state > 0.98
        one_sign &= like_state > 0.5
        # a velocity may be smooth, too, but then it is more like the state's change than like the
        # state. The margin is for motion on a circle, where the change of y is like x
        integrated = (like_change > 0.7) & (like_change > like_state + 0.15)
    # a robot rests before and after an episode, so that its velocities are near zero there. A base
    # reports velocities as its state, which follows them
    ends = np.concatenate([episodes["first"], episodes["first"] + episodes["count"] - 1])
    ends = np.abs(frames["action"][ends.astype(int)])
    rests = (ends < 0.1 * np.maximum(np.abs(low), np.abs(high))).mean(0) > 0.8
    return (high > low) & ~rests & ~integrated & (one_sign | smooth | followed)


def copy_findings(sample: Sample, action: Signal, state: Signal) -> list[Finding]:
    """Actions that equal the state of their own frame, as when an arm is moved by hand. A gripper
    with two values may well do so."""
    step = len(action.values) // 4096 + 1
    actions, states = action.values[::step], state.values[::step]  # (N, A), (N, P)
    moved = actions != np.median(actions, axis=0)
    same = moved[..., None] & (actions[..., None] == states[:, None])  # (N, A, P)
    share = same.sum(0).max(1, initial=0) / np.maximum(moved.sum(0), 1)
    dims = np.flatnonzero((share > 0.99) & ~action.raw)
    if not len(dims):
        return []
    text = f"{action.name(dims)}: equal to the state of the same frame, so a policy stays put"
    return [sample.finding("copies", "action", dims, np.zeros(len(action.values)), text,
                           "record the commands, or the next frame's state, as the action")]
