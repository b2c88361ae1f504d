"""Which episodes do not fit the others of their instruction, and which mistake would explain it.

Each episode is predicted from the others, its peers: kernel ridge regression from the pictures'
features to actions and states, fitted without the episode. A policy that has memorized a bad
episode therefore cannot vouch for it. (The mean of the most similar frames would be simpler. It
fails with ten episodes per instruction.) If the peers do not predict an episode, it is hard or
wrong. It is wrong if another *reading* of it fits: pictures mirrored back, another instruction,
actions of some frames later, an axis turned round.

All is measured in nats per frame: differences of log-likelihoods. Read `Frames`, then `examine`,
which measures, and `judge`, which ranks. `Peers` is the regression.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from machinery.frames import FrameTable
from machinery.survey_pictures import look

RIDGE = 0.03  # of the kernel, whose diagonal is 1
FLOOR = 0.05  # the smallest error that counts, of values in -1..1
GROUP_ROWS = 1500  # frames in one regression: bounds its time and memory
SIDE = 24  # pixels of the pictures, if no policy sees them: 16 hide which are mirrored
FEW = 4  # fewer episodes cannot predict one another
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
    known: np.ndarray  # (R, A + P): actions in -1..1, then states of deviation 1
    readings: dict[str, np.ndarray]  # (R, A) each: actions of K frames later (`shift K`), or with
    # dimension D turned round (`sign D`): the opposite change, or a target on the other side


def choose_rows(table: FrameTable, per_episode: int) -> np.ndarray:
    """Frames at even distances, up to per_episode of each episode that has an instruction."""
    episodes = table.episodes[table.episodes["labeled"]]
    return np.concatenate([int(episode["first"]) + evenly(int(episode["count"]), per_episode)
                           for episode in episodes])


def evenly(count: int, most: int) -> np.ndarray:
    """Up to `most` of the numbers 0 .. count-1, at even distances."""
    return np.unique(np.linspace(0, count - 1, most).astype(int))


def shrink(table: FrameTable, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features without a policy: small gray pictures of all cameras in frames `rows` (R,), and the
    mirrored ones, (R, D) each. A missing or broken picture is black."""
    cameras = [number for number, key in enumerate(table.cameras) if key]
    small = np.zeros((len(rows), len(cameras), SIDE, SIDE), np.float32)
    for place, camera in enumerate(cameras):
        small[:, place] = np.nan_to_num(look(table, rows, camera, SIDE)) / 255
    return small.reshape(len(rows), -1), small[..., ::-1].reshape(len(rows), -1)


def gather(table: FrameTable, rows: np.ndarray, seen: np.ndarray, mirrored: np.ndarray,
           stats: Mapping, kind: str) -> Frames:
    """The frames `rows` (R,) of choose_rows with features of their pictures (R, D) each.

    stats: of the actions; kind: of their normalization
    """
    from action_tokenizer import normalize  # imports PyTorch, for seconds

    number, episode = np.unique(table.episode_of(rows), return_inverse=True)
    start = table.first_frames[number]
    first = start[episode]
    last = first + table.episodes["count"][number][episode].astype(int) - 1

    def later(frames: int) -> np.ndarray:
        """The actions some frames later, within the episode."""
        recorded = table.frames["action"][(rows + frames).clip(first, last)]
        return normalize(recorded, stats, kind).clip(-1, 1)

    actions = later(0)
    readings = {f"shift {shift}": later(shift) for shift in SHIFTS}
    middle = np.add(stats["min"], stats["max"]) / 2
    zero = normalize(np.where(table.targets, middle, 0).astype(np.float32), stats, kind)
    turned = (2 * zero - actions).clip(-1, 1)
    for dim in range(len(zero)):
        readings[f"sign {dim}"] = np.where(np.arange(len(zero)) == dim, turned, actions)
    known = actions
    if "proprio" in table.frames.dtype.names:
        states = normalize(table.frames["proprio"][rows], table.statistics["proprio"], "normal")
        known = np.concatenate([actions, states], axis=1)
    second = np.abs(later(1) - 2 * actions + later(-1)).mean(1)
    rough = np.log(np.bincount(episode, second) / np.bincount(episode) + FLOOR)
    return Frames(number, table.frames["instruction"][start], rough, episode, seen, mirrored, known,
                  readings)


# ---- Predicting an episode from the others -------------------------------------------------------


class Peers:
    """Predictions from the n frames of a group. Each episode is predicted without itself."""

    def __init__(self, seen: np.ndarray, known: np.ndarray, episode: np.ndarray):
        """seen (n, D): features; known (n, K): predicted from them; episode (n,)."""
        self.seen = seen
        self.episode = episode
        self.width = np.median(distances(seen, seen)) + 1e-12
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

    def fit(self, known: np.ndarray, predicted: np.ndarray) -> np.ndarray:
        """The log-likelihood (R, k) of the first k of K numbers, known (R, k), predicted (R, K): by
        Student's t with 3 degrees of freedom, up to a constant, so that no single frame decides."""
        width = known.shape[1]
        error = (known - predicted[:, :width]) / self.scale[:width]
        return -2 * np.log1p(error**2 / 3) - np.log(self.scale[:width])


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared distances of the rows of (N, D) and (M, D) -> (N, M)."""
    squared = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    return squared.clip(0)


def groups(frames: Frames) -> list[np.ndarray]:
    """Episodes to compare with each other: those of an instruction, in parts of about GROUP_ROWS
    frames. Rare instructions form one group."""
    _, place, count = np.unique(frames.text, return_inverse=True, return_counts=True)
    text = np.where(count[place] < FEW, -1, frames.text)
    found = []
    for own in np.unique(text):
        group = np.flatnonzero(text == own)
        parts = -(-len(group) * len(frames.episode) // (len(text) * GROUP_ROWS))
        if len(group) >= FEW:
            found += [group[part::parts] for part in range(parts)]
    return found


# ---- The tests -----------------------------------------------------------------------------------


def examine(frames: Frames) -> dict[str, np.ndarray]:
    """{test: (E,) means of episodes}.

    `action`, `state`: how much worse peers predict them than others of the group, 0 without peers;
    `rough`: frames.rough less that of the group. All others are readings, and how much better the
    episode fits then: `mirrored` pictures, frames.readings, and `text N`, another instruction.
    """
    tests = {test: np.zeros(len(frames.number)) for test in ("action", "state", "rough")}

    def put(test: str, rows: np.ndarray, nats: np.ndarray) -> None:
        """nats (n, ...) of frames `rows` (n,): their sums, averaged over each episode."""
        unknown = np.full(len(frames.number), -np.inf)
        own, place, count = np.unique(frames.episode[rows], return_inverse=True, return_counts=True)
        tests.setdefault(test, unknown)[own] = np.bincount(place, nats.sum(1)) / count

    fits = np.full(len(frames.known), np.inf)  # of the recorded reading
    of_text = []  # (instruction, its peers)
    for group in groups(frames):
        rows = np.flatnonzero(np.isin(frames.episode, group))
        known = frames.known[rows]
        episode = frames.episode[rows]
        peers = Peers(frames.seen[rows], known, episode)
        predicted = peers.predict(peers.seen, episode)
        fit = peers.fit(known, predicted)
        fits[rows] = fit.sum(1)
        for test, actions in frames.readings.items():
            width = actions.shape[1]
            put(test, rows, peers.fit(actions[rows], predicted) - fit[:, :width])
        put("mirrored", rows, peers.fit(known, peers.predict(frames.mirrored[rows], episode)) - fit)
        put("action", rows, -fit[:, :width])
        put("state", rows, -fit[:, width:])
        tests["rough"][group] = frames.rough[group]
        for test in ("action", "state", "rough"):
            tests[test][group] -= np.median(tests[test][group])
        texts = np.unique(frames.text[group])
        if len(texts) == 1:
            of_text.append((texts[0], peers))
    step = 1 + len(of_text) * len(fits) // 1_000_000  # all with all: a few frames are enough
    for text, peers in of_text:
        rows = np.flatnonzero(frames.text[frames.episode] != text)[::step]
        fit = peers.fit(frames.known[rows], peers.predict(frames.seen[rows], frames.episode[rows]))
        put(f"text {text}", rows, fit.sum(1, keepdims=True) - fits[rows, None])
    return tests


# ---- The verdict ---------------------------------------------------------------------------------

SUSPICIOUS = 2.0  # score from which an episode is called hard or wrong
EXPLAINED = 0.6  # a reading explains an episode if it gains this share of its lack


class Verdict(NamedTuple):
    episode: int  # its number in the table
    score: float  # the larger, the worse it fits: 1 is the worst tenth's beginning
    kind: str  # "wrong", "hard" or ""
    reading: str  # the test with which it fits, or what does not fit: "text 3", "pictures", "noise"
    lack: float  # nats per frame by which its peers predict it worse than others
    gain: float  # nats per frame that the reading gains


def judge(frames: Frames, tests: dict[str, np.ndarray]) -> list[Verdict]:
    """All episodes, the worst first: by its largest test, relative to the dataset's worst tenth."""
    families: dict[str, np.ndarray] = {}
    for test, values in tests.items():
        name = test.split()[0]
        families[name] = np.maximum(families.get(name, -np.inf), values)
    score = np.full(len(frames.number), -np.inf)
    for values in families.values():
        middle, high = np.quantile(values[np.isfinite(values)], [0.5, 0.9])
        score = np.maximum(score, (values - middle) / max(high - middle, 0.2))
    verdicts = []
    for episode in np.argsort(-score, kind="stable"):
        gains = {test: float(values[episode]) for test, values in tests.items()}
        action, state, rough = (gains.pop(test) for test in ("action", "state", "rough"))
        lack = action + state
        reading = max(gains, key=gains.__getitem__, default="")
        gain = gains.get(reading, 0.0)
        kind = "wrong"
        if gain < max(EXPLAINED * lack, 1.0):
            gain = 0.0
            if state > max(4, 0.3 * lack):
                reading = "pictures"
            elif rough > 0.4:
                reading = "noise"
            else:
                reading = ""
                kind = "hard"
        if score[episode] < SUSPICIOUS:
            kind = ""
        number = int(frames.number[episode])
        verdicts.append(Verdict(number, float(score[episode]), kind, reading, lack, gain))
    return verdicts
