"""What goes wrong with a dataset without any error, found before anything is trained on it.

An action that is recorded, normalised and turned into tokens should come back, to within half a bin, when the
tokens are decoded and un-normalised again: a policy can give no better actions than these. `come_back` tries
it, for every dimension. Warnings name the dimension, what is lost, and the cure.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from action_tokenizer import ActionTokenizer, normalize, unnormalize
from config import UserError
from frames import DataError, FrameTable
from oxe import left_out

PREFETCH = 4  # micro-batches that each of the DataLoader's workers loads ahead
SAMPLE = 4096  # frames, and episodes, that are looked at


def come_back(recorded: np.ndarray, stats: Mapping, kind: str) -> dict[str, np.ndarray]:
    """Actions (N, A) in standard form -> for each of the A dimensions

    half_bin    half the width of a bin, in the dataset's units: as near as it can come
    error       the largest difference of what comes back, among values that were not cut off
    cut         the share of values that come back wrong by more than half a bin
    lost        the share of its motion (sum of distances from the median) that does not come back
    """
    tokenizer, raw = ActionTokenizer(512), ~np.array(stats["mask"])
    returned = unnormalize(tokenizer.decode(tokenizer.encode(normalize(recorded, stats, kind))), stats, kind)
    zero, one = (unnormalize(np.full(len(raw), value), stats, kind) for value in (0.0, 1.0))
    half_bin = np.where(raw, 1.0, np.abs(one - zero)) / (tokenizer.n_bins - 1)
    difference = np.abs(returned - recorded)
    wrong = difference > half_bin * 1.001 + 1e-6 * np.abs(recorded).max(0, initial=1e-9)
    motion = np.abs(recorded - np.median(recorded, axis=0)).sum(0)
    return {"half_bin": half_bin, "error": np.where(wrong, 0, difference).max(0), "cut": wrong.mean(0),
            "lost": np.where(wrong, difference, 0).sum(0) / np.maximum(motion, 1e-12)}


def action_warnings(table: FrameTable, stats: Mapping, kind: str) -> list[str]:
    """One line for each dimension of a dataset's actions that does not come back. stats: "action" of its
    dataset_statistics.json."""
    rows = np.unique(np.linspace(0, len(table.frames) - 1, SAMPLE).astype(int))
    back, found = come_back(table.frames["action"][rows], stats, kind), []
    low, high, q01, q99 = (np.array(stats[key]) for key in ("min", "max", "q01", "q99"))
    for d, raw in enumerate(~np.array(stats["mask"])):
        reach, cut = f"goes from {low[d]:.4g} to {high[d]:.4g}", back["cut"][d]
        if low[d] == high[d]:
            problem = f"never changes (always {low[d]:.4g}): it is trained as 0"
        elif raw and max(-low[d], high[d]) > 1.001:
            problem = (f"is raw and {reach}: what lies beyond -1..1 is cut off: divide it in the recipe (as "
                       "in 'gripper /255 target raw'), or remove raw")
        elif raw and high[d] - low[d] < 0.5:
            problem = (f"is raw and {reach}: it uses {(high[d] - low[d]) * 127.5:.0f} of 256 bins: scale it "
                       "to 0..1 in the recipe, or remove raw")
        elif raw and low[d] < -0.001 and len(np.unique(table.frames["action"][rows, d])) > 16:
            problem = (f"is raw and {reach}, with many values between: a position or angle should be "
                       "normalised: remove raw (or `absolute`) in its recipe")
        elif not raw and kind == "bounds_q99" and (q01[d] == q99[d] or back["lost"][d] > 0.5):
            problem = (f"{reach}, but 98 % of it lie within {q01[d]:.4g}..{q99[d]:.4g}: what lies beyond is "
                       "cut off, and will never be commanded: action_normalization: bounds")
        elif cut > 0.05:
            problem = (f"{reach}: {cut:.0%} of its values are cut off by the normalisation {kind!r}: "
                       "action_normalization: bounds_q99")
        else:
            continue
        found.append(f"action dimension {d} {problem}")
    return found


def mixture_warnings(mixture) -> list[str]:
    """All that a log should say of a data.Mixture at its start, each line beginning with the dataset."""
    cfg = mixture.cfg
    found = [f"{name}: left out: {why}" for name, why in left_out(cfg.data_mix).items()]
    for name, recipe, table, target in zip(mixture.names, mixture.recipes, mixture.tables, mixture.targets,
                                           strict=True):
        stats, kind = mixture.statistics[name]["action"], cfg.action_normalization
        lines = [f"left out {len(table.bad)} bad episodes, the first: {table.bad[0]}"] if table.bad else []
        if not any(recipe.camera_keys(cfg.cameras)):
            lines.append(f"its recipe has no {' or '.join(cfg.cameras)} camera: its images are black")
        lines += action_warnings(table, stats, kind)
        lines += target_warnings(table, stats, target) if cfg.action_chunk > 1 else []
        found += [f"{name}: {line}" for line in lines]
    return found


def target_warnings(table: FrameTable, stats: Mapping, target: np.ndarray) -> list[str]:
    """Dimensions that are said to be changes, target (A,) bool, and look like places to go to: never near
    zero, moving little from frame to frame, or followed by the state. Past the end of an episode, their
    labels jump to the middle of their range."""
    episodes = table.episodes[:: len(table.episodes) // 256 + 1]
    rows = np.concatenate([np.arange(e["first"], e["first"] + e["count"] - 1) for e in episodes]).astype(int)
    if not len(rows):
        return []
    actions, following = table.frames["action"][rows], table.frames["action"][rows + 1]
    low, high = np.array(stats["q01"]), np.array(stats["q99"])
    deviation = np.maximum(actions.std(0), 1e-9)
    smooth = np.abs(following - actions).mean(0) < 0.12 * deviation
    followed = np.zeros_like(smooth)
    if "proprio" in table.frames.dtype.names:
        state = table.frames["proprio"][rows + 1]
        both = np.nan_to_num(np.cov(actions.T, state.T))[: len(low), len(low) :]
        followed = (both / deviation[:, None] / np.maximum(state.std(0), 1e-9) > 0.98).any(1)
    return [f"action dimension {d} looks like a place to go to (a joint's angle, a pose) and not like a "
            "change: then say `target` in the recipe; as a change, its label past the end of an episode is "
            "the middle of its range"
            for d in np.flatnonzero(~target & (high > low) & ((low > 0) | (high < 0) | smooth | followed))]


def check_shared_memory(batches, num_workers: int) -> None:
    """Raise UserError where /dev/shm is too small for the micro-batches that this rank's workers load ahead:
    Docker gives a container 64 MB. batches: data.TrainBatches."""
    cfg, memory = batches.mixture.cfg, Path("/dev/shm")
    images = cfg.per_device_batch_size * cfg.window_size * len(cfg.cameras)
    needed = num_workers * PREFETCH * images * cfg.image_size**2 * 3
    if memory.exists() and needed > (free := shutil.disk_usage(memory).free):
        raise UserError(f"/dev/shm has {free / 1e6:.0f} MB free, and num_workers {num_workers} load "
                        f"{needed / 1e6:.0f} MB of images ahead: lower num_workers, or give the container "
                        "more (docker run --shm-size 16g)")


def leave_out_long_texts(mixture, room: int) -> list[str]:
    """Find instructions of a data.Mixture that make prompts of more than `room` tokens. Raises DataError with
    the first one's file and record; where bad episodes are to be skipped, theirs are, and told."""
    found = []
    for name, table in zip(mixture.names, mixture.tables, strict=True):
        # no token is shorter than a byte, and templates than 512: most texts need not be counted
        long = {number: tokens for number, text in enumerate(table.instructions)
                if len(text.encode()) + 512 > room and (tokens := len(mixture.prompt(text))) > room}
        if not long:
            continue
        rows = np.flatnonzero(np.isin(table.frames["instruction"], [*long]))
        number = int(table.frames["instruction"][rows[0]])
        problem = (f"{table.where(rows[0])}: its instruction makes a prompt of {long[number]} tokens, and "
                   f"max_length {mixture.cfg.max_length} leaves room for {room}: "
                   f"{table.instructions[number][:100]!r}")
        episodes = np.unique(table.episode_of(rows))
        if not mixture.cfg.skip_bad_episodes:
            raise DataError(f"{problem}: raise max_length, or leave such episodes out with "
                            "skip_bad_episodes: true")
        table.episodes["labeled"][episodes] = False
        found.append(f"{name}: left out {len(episodes)} episodes, the first: {problem}")
    return found
