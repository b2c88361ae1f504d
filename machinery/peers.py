"""Which episodes do not fit the others of their instruction, and which mistake would explain it.

Each episode is predicted from the others, its peers: kernel ridge regression from the pictures'
features to actions and states, fitted without the episode. A policy that has memorized a bad
episode therefore cannot vouch for it. If the peers do not predict an episode, it is either hard or
wrong. It is wrong if another *reading* of it fits: pictures mirrored back, another instruction,
actions of some frames later, an axis turned round.

All is measured in nats per frame: differences of log-likelihoods. Read `examine`, then `judge`.
"""

import functools
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from action_tokenizer import normalize
from machinery.files import atomic
from machinery.frames import FrameTable, bad_episodes_file

RIDGE = 0.03  # of the kernel, whose diagonal is 1
FLOOR = 0.05  # the smallest error that counts, of values in -1..1
GROUP_ROWS = 1500  # frames in one regression: bounds its time and memory
FEW = 4  # fewer episodes cannot predict one another
PIXELS = 24  # side of the pictures, if no policy sees them
WIDTH = 512  # features of a frame
SHIFTS = (-8, -5, -3, -2, -1, 1, 2, 3, 5, 8)  # frames


# ---- Frames --------------------------------------------------------------------------------------


class Frames(NamedTuple):
    """R frames of E episodes, those of an episode adjacent and at even distances."""

    number: np.ndarray  # (E,) of the episode in its table
    text: np.ndarray  # (E,) number of its instruction
    rough: np.ndarray  # (E,) logarithm of the mean second difference of its actions
    episode: np.ndarray  # (R,) 0..E-1, ascending
    seen: np.ndarray  # (R, D) features of the pictures
    mirrored: np.ndarray  # (R, D) features of the mirrored pictures
    actions: np.ndarray  # (R, A) in -1..1
    turned: np.ndarray  # (R, A) with the opposite sign, or for a target on the other side
    shifted: np.ndarray  # (len(SHIFTS), R, A) actions of other frames; NaN outside the episode
    states: np.ndarray  # (R, P) of deviation 1; P may be 0


def choose_rows(table: FrameTable, per_episode: int) -> np.ndarray:
    """Frames at even distances, up to per_episode of each episode that has an instruction."""
    rows = [np.zeros(0, int)]
    for episode in table.episodes[table.episodes["labeled"]]:
        last = int(episode["count"]) - 1
        inside = np.linspace(0, last, min(per_episode, last + 1)).round()
        rows.append(int(episode["first"]) + np.unique(inside).astype(int))
    return np.concatenate(rows)


def gather(table: FrameTable, rows: np.ndarray, seen: np.ndarray, mirrored: np.ndarray,
           stats: Mapping, kind: str) -> Frames:
    """The frames `rows` (R,) of choose_rows with features of their pictures (R, D) each.

    stats: of the actions; kind: of their normalization
    """
    number, episode = np.unique(table.episode_of(rows), return_inverse=True)
    first = table.first_frames[number]
    last = first + table.episodes["count"][number].astype(int) - 1

    def actions(wanted: np.ndarray | slice) -> np.ndarray:
        return normalize(table.frames["action"][wanted], stats, kind).clip(-1, 1)

    recorded = table.frames["action"][rows]
    middle = np.array(stats["min"], np.float32) + np.array(stats["max"], np.float32)
    turned = np.where(table.targets, middle, 0) - recorded
    turned = normalize(turned.astype(np.float32), stats, kind).clip(-1, 1)
    rough = np.zeros(len(number))
    for i, (start, stop) in enumerate(zip(first, last + 1, strict=True)):
        if stop - start > 2:
            rough[i] = np.abs(np.diff(actions(slice(start, stop)), n=2, axis=0)).mean()
    shifted = []
    for shift in SHIFTS:
        inside = (rows + shift).clip(first[episode], last[episode])
        moved = actions(inside)
        moved[inside != rows + shift] = np.nan
        shifted.append(moved)
    states = np.zeros((len(rows), 0))
    if "proprio" in table.frames.dtype.names:
        states = table.frames["proprio"][rows].astype(np.float64)
        states = (states - states.mean(0)) / np.maximum(states.std(0), 1e-6)
    return Frames(number, table.frames["instruction"][first], np.log(rough + FLOOR), episode, seen,
                  mirrored, actions(rows), turned, np.array(shifted), states)


def shrink(table: FrameTable, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features without a policy: all cameras' pictures of frames `rows` (R,), PIXELS x PIXELS, and
    the mirrored ones, (R, D) each."""
    cameras = [number for number, key in enumerate(table.cameras) if key]
    seen, mirrored = [], []
    for row in rows.tolist():
        small = np.zeros((len(cameras), PIXELS, PIXELS, 3), np.float32)
        for i, camera in enumerate(cameras):
            try:
                image = Image.open(io.BytesIO(table.read_image(row, camera)))
                image.draft("RGB", (PIXELS, PIXELS))  # a JPEG is decoded at an eighth
                image = image.convert("RGB").resize((PIXELS, PIXELS), Image.Resampling.BOX)
            except (ValueError, OSError):  # none, or broken: black (`data.py --check` reports it)
                continue
            small[i] = np.asarray(image) / 255
        seen.append(shorten(small.reshape(-1)))
        mirrored.append(shorten(small[:, :, ::-1].reshape(-1)))
    return np.array(seen), np.array(mirrored)


def shorten(features: np.ndarray) -> np.ndarray:
    """(..., D) -> (..., WIDTH) by a fixed random matrix, which nearly keeps distances."""
    return features @ random_matrix(features.shape[-1])


@functools.cache
def random_matrix(height: int) -> np.ndarray:
    draw = np.random.default_rng(0)
    return draw.standard_normal((height, WIDTH), np.float32) / np.float32(WIDTH**0.5)


# ---- Predicting an episode from the others -------------------------------------------------------


class Peers:
    """Predictions from the n frames of a group. Each episode is predicted without itself."""

    def __init__(self, seen: np.ndarray, known: np.ndarray, episode: np.ndarray):
        """seen (n, D): features; known (n, K): predicted from them; episode (n,)."""
        self.seen = seen
        self.episode = episode
        squared = distances(seen, seen)
        self.width = np.median(squared) + 1e-12
        self.inverse = np.linalg.inv(self.kernel(seen) + RIDGE * np.eye(len(seen)))
        self.mean = known.mean(0)
        self.weights = self.inverse @ (known - self.mean)
        error = np.abs(known - self.predict(seen, episode))
        self.scale = np.maximum(1.5 * np.median(error, axis=0), FLOOR)  # 1.5: to a deviation

    def kernel(self, seen: np.ndarray) -> np.ndarray:
        """Features (R, D) -> similarity (R, n) in 0..1."""
        return np.exp(-distances(seen, self.seen) / self.width)

    def predict(self, seen: np.ndarray, episode: np.ndarray) -> np.ndarray:
        """Features (R, D) of frames of `episode` (R,) -> (R, K), without that episode's frames."""
        kernel = self.kernel(seen)
        predicted = kernel @ self.weights + self.mean
        for number in np.intersect1d(episode, self.episode):
            own = self.episode == number  # the solution without these rows, by a block update
            update = np.linalg.solve(self.inverse[np.ix_(own, own)], self.weights[own])
            weights = self.weights - self.inverse[:, own] @ update
            weights[own] = 0
            predicted[episode == number] = kernel[episode == number] @ weights + self.mean
        return predicted

    def log_likelihood(self, known: np.ndarray, predicted: np.ndarray) -> np.ndarray:
        """(R, K) each -> (R, K) nats: Student's t with 3 degrees of freedom, up to a constant, so
        that no single frame decides."""
        error = (known - predicted) / self.scale
        return -2 * np.log1p(error**2 / 3) - np.log(self.scale)


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared distances of the rows of (N, D) and (M, D) -> (N, M)."""
    squared = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    return squared.clip(0)


def groups(frames: Frames) -> list[np.ndarray]:
    """Episodes to compare with each other: those of an instruction, in parts of about GROUP_ROWS
    frames. Rare instructions form one group."""
    texts, count = np.unique(frames.text, return_counts=True)
    of_text = [np.flatnonzero(frames.text == text) for text in texts[count >= FEW]]
    rare = np.flatnonzero(np.isin(frames.text, texts[count < FEW]))
    found = []
    for group in [*of_text, rare]:
        rows = len(group) * len(frames.episode) / len(frames.text)
        parts = int(np.ceil(rows / GROUP_ROWS))
        found += [group[part::parts] for part in range(parts) if len(group) >= FEW * parts]
    return found


# ---- The tests -----------------------------------------------------------------------------------


def examine(frames: Frames) -> dict[str, np.ndarray]:
    """{test: (E,)}, NaN for episodes without peers.

    `action` and `state`: how much worse peers predict them than those of others in the group;
    `rough`: frames.rough less that of the group. The others are readings, and how much better the
    episode fits then: `mirrored` pictures, `text N`, the actions of K frames later (`shift K`),
    dimension D turned round (`sign D`).
    """
    known = np.concatenate([frames.actions, frames.states], axis=1)
    values: dict[str, np.ndarray] = {}  # {test: (R,)}

    def put(test: str, rows: np.ndarray, nats: np.ndarray) -> None:
        values.setdefault(test, np.full(len(known), np.nan))[rows] = nats.sum(1)

    found = groups(frames)
    every = []
    for group in found:
        rows = np.flatnonzero(np.isin(frames.episode, group))
        peers = Peers(frames.seen[rows], known[rows], frames.episode[rows])
        every.append(peers)
        for test, nats in readings(frames, peers, rows, known[rows]).items():
            put(test, rows, nats)
    step = 1 + len(found) * len(known) // 1_000_000  # all with all: a few frames are enough
    for group, peers in zip(found, every, strict=True):
        text = frames.text[group[0]]
        rows = np.flatnonzero(frames.text[frames.episode] != text)[::step]
        predicted = peers.predict(frames.seen[rows], frames.episode[rows])
        put(f"text {text}", rows, peers.log_likelihood(known[rows], predicted))
        values[f"text {text}"] += values["action"] + values["state"]  # these are negative fits
    tests = {test: mean_of_episodes(frames, nats) for test, nats in values.items()}
    tests["rough"] = frames.rough.copy()
    for group in found:
        for test in ("action", "state", "rough"):
            tests[test][group] -= np.median(tests[test][group])
    return tests


def readings(frames: Frames, peers: Peers, rows: np.ndarray, known: np.ndarray
             ) -> dict[str, np.ndarray]:
    """The terms of a group's tests: {test: (n, ...) nats}. rows (n,), known (n, A + P)."""
    width = frames.actions.shape[1]
    episode = frames.episode[rows]
    predicted = peers.predict(frames.seen[rows], episode)
    fit = peers.log_likelihood(known, predicted)
    mirrored = peers.predict(frames.mirrored[rows], episode)
    turned = np.concatenate([frames.turned[rows], known[:, width:]], axis=1)
    turned = peers.log_likelihood(turned, predicted) - fit
    found = {"action": -fit[:, :width], "state": -fit[:, width:],
             "mirrored": peers.log_likelihood(known, mirrored) - fit}
    for dim in range(width):
        found[f"sign {dim}"] = turned[:, [dim]]
    for shift, actions in zip(SHIFTS, frames.shifted[:, rows], strict=True):
        moved = np.concatenate([actions, known[:, width:]], axis=1)
        found[f"shift {shift}"] = peers.log_likelihood(moved, predicted) - fit
    return found


def mean_of_episodes(frames: Frames, values: np.ndarray) -> np.ndarray:
    """Of frames (R,) -> of episodes (E,), over those that are not NaN if they are a third."""
    known = ~np.isnan(values)
    sums = np.bincount(frames.episode[known], values[known], len(frames.number))
    count = np.bincount(frames.episode[known], minlength=len(frames.number))
    enough = count > np.bincount(frames.episode) / 3
    return np.where(enough, sums / np.maximum(count, 1), np.nan)


# ---- The verdict ---------------------------------------------------------------------------------


class Verdict(NamedTuple):
    episode: int  # its number in the table
    score: float  # the larger, the worse it fits: 1 is the worst tenth's beginning
    kind: str  # "wrong", "hard" or ""
    reading: str  # the test with which it fits, or what does not fit: "text 3", "pictures", "noise"
    lack: float  # nats per frame by which its peers predict it worse than others
    gain: float  # nats per frame that the reading gains


def judge(frames: Frames, tests: dict[str, np.ndarray]) -> list[Verdict]:
    """All episodes, the worst first."""
    families: dict[str, np.ndarray] = {}
    for test, values in tests.items():
        name = test.split()[0]
        values = np.nan_to_num(values, nan=-np.inf)
        families[name] = np.maximum(families.get(name, -np.inf), values)
    surprise = []
    for values in families.values():
        finite = values[np.isfinite(values)]
        middle, high = np.quantile(finite, [0.5, 0.9]) if len(finite) else (0, 1)
        surprise.append((values - middle) / max(high - middle, 0.2))
    score = np.max(surprise, axis=0)
    verdicts = []
    for episode in np.argsort(-score, kind="stable"):
        own = {test: float(values[episode]) for test, values in tests.items()}
        verdicts.append(verdict(int(frames.number[episode]), float(score[episode]), own))
    return verdicts


SUSPICIOUS = 2.0  # score from which an episode is called hard or wrong
EXPLAINED = 0.6  # a reading explains an episode if it gains this share of its lack


def verdict(number: int, score: float, tests: dict[str, float]) -> Verdict:
    """The verdict of one episode with its tests."""
    lack = tests["action"] + tests["state"]
    gains = {test: gain for test, gain in tests.items()
             if test not in ("action", "state", "rough") and gain == gain}
    reading = max(gains, key=gains.__getitem__, default="")
    gain = gains.get(reading, 0.0)
    kind = "wrong"
    if gain < max(EXPLAINED * lack, 1.0):
        if tests["state"] > 4 and tests["state"] > 0.3 * lack:
            reading = "pictures"
        elif tests["rough"] > 0.4:
            reading = "noise"
        else:
            reading, kind = "", "hard"
        gain = 0.0
    if score < SUSPICIOUS:
        kind = ""
    return Verdict(number, score, kind, reading, lack, gain)


def leave_out(table: FrameTable, verdicts: Sequence[Verdict], index_dir: str | None) -> Path:
    """List episodes as bad, so that skip_bad_episodes leaves them out."""
    path = bad_episodes_file(table.directory, index_dir)
    listed = json.loads(path.read_text()) if path.exists() else {}
    for verdict in verdicts:
        episode = table.episodes[verdict.episode]
        file = table.shards[episode["shard"]]
        listed.setdefault(file, {})[str(episode["record"])] = f"doctor.py: {verdict.kind}"
    with atomic(path) as scratch:
        scratch.write_text(json.dumps(listed, indent=1))
    return path


def write_numbers(path: Path, table: FrameTable, verdicts: list[Verdict], losses: dict[int, float]
                  ) -> None:
    """The verdict of every episode, the worst first."""
    entries = []
    for verdict in verdicts:
        episode = table.episodes[verdict.episode]
        entries.append({**verdict._asdict(), "loss": losses.get(verdict.episode),
                        "split": table.splits[episode["split"]],
                        "file": table.shards[episode["shard"]], "record": int(episode["record"])})
    with atomic(path) as scratch:
        scratch.write_text(json.dumps({"episodes": entries}, indent=1))
