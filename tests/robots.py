"""Sound recordings of robots of different kinds, in memory or as datasets, for tests to damage.

    robot = ROBOTS["arm_in_degrees"](seed=0)
    robot.actions[3][:, 0] = 0            # a fault
    table = robot.table()                 # a frame table in memory, or robot.write(folder, "arm"): RLDS files
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import simplejpeg

from machinery.config import Recipe
from machinery.frames import FrameTable
from machinery.recipes import Feature, action_masks, standardize
from machinery.rlds import EPISODE, statistics, write_rlds

PICTURE = (48, 64, 3)


@dataclass
class Robot:
    """E episodes. actions: (T, A) of each; states: (T, P) of each; texts: one of each; cameras: {key: its
    pictures (T, 48, 64, 3) uint8, or encoded ones, of each episode}; recipe: keys of a recipe."""

    actions: list[np.ndarray]
    states: list[np.ndarray]
    texts: list[str]
    recipe: dict
    cameras: dict[str, list] = field(default_factory=dict)
    val: int = 0  # how many of the last episodes are the split val

    @property
    def own_recipe(self) -> Recipe:
        names = dict(zip(("primary", "secondary", "wrist"), self.cameras, strict=False))
        return Recipe(**names, state="state", **self.recipe)

    def draw_pictures(self, keys: tuple[str, ...] = ("image", "wrist")) -> "Robot":
        """Give it cameras: something in each picture moves with the state."""
        draw = np.random.RandomState(5)
        low = np.min([state.min(0) for state in self.states], axis=0)
        reach = np.maximum(np.max([state.max(0) for state in self.states], axis=0) - low, 1e-6)
        for number, key in enumerate(keys):
            room = draw.randint(40, 200, (6, 8, 3)).repeat(8, 0).repeat(8, 1)
            self.cameras[key] = [
                np.stack([picture(draw, room, (row - low) / reach, number) for row in state])
                for state in self.states]
        return self

    def table(self) -> FrameTable:
        return MemoryTable(self)

    def write(self, root: Path, name: str) -> Path:
        import tensorflow_datasets as tfds

        f = tfds.features
        picture = f.Image(shape=(None, None, 3), encoding_format="jpeg")
        numbers = {"action": self.actions[0].shape[1:], "state": self.states[0].shape[1:]}
        kinds = {key: f.Tensor(shape=shape, dtype=np.float32) for key, shape in numbers.items()}
        features = {"steps": f.Dataset({
            "observation": {**dict.fromkeys(self.cameras, picture), "state": kinds["state"]},
            "action": kinds["action"], "language_instruction": f.Text()})}
        episodes = [{"steps": [{
            "observation": {**{key: shots[e][t] for key, shots in self.cameras.items()},
                            "state": np.float32(self.states[e][t])},
            "action": np.float32(self.actions[e][t]), "language_instruction": self.texts[e]}
            for t in range(len(self.actions[e]))]} for e in range(len(self.actions))]
        cut = len(episodes) - self.val
        splits = {"train": episodes[:cut], "val": episodes[cut:]}
        return write_rlds(root, name, "1.0.0", features, {key: some for key, some in splits.items() if some})


def picture(draw, room: np.ndarray, state: np.ndarray, camera: int) -> np.ndarray:
    image = room + draw.randint(0, 6, PICTURE)  # a sensor's noise
    top, left = (int(8 + 24 * state[0]), int(8 + 40 * state[min(1 + camera, len(state) - 1)]))
    image[top : top + 14, left : left + 14] = [230, 40 + 60 * camera, 60]
    return image.astype(np.uint8)


def encode(image) -> bytes:
    if isinstance(image, bytes):
        return image
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=90, colorsubsampling="420")


class MemoryTable(FrameTable):
    """A frame table without files."""

    def __init__(self, robot: Robot):
        recipe = robot.own_recipe
        self.path = self.directory = Path("memory")
        self.cameras = list(robot.cameras) or ["image"]
        self.shots = {key: [encode(shot) for shots in robot.cameras[key] for shot in shots]
                      for key in robot.cameras}
        self.instructions = list(dict.fromkeys(robot.texts))
        self.splits = ["train", "val"] if robot.val else ["train"]
        self.shards, self.bad = ["memory"], []
        self.features = {"action": robot.actions[0].shape[1], "observation/state": robot.states[0].shape[1]}
        parts = [standardize(Steps(robot, e), recipe, [], True) for e in range(len(robot.actions))]
        count = np.array([len(part["action"]) for part in parts])
        action, state = (np.concatenate([part[key] for part in parts]) for key in ("action", "proprio"))
        self.frames = np.zeros(count.sum(), [
            ("offset", "<i8", (len(self.cameras),)), ("length", "<u4", (len(self.cameras),)),
            ("instruction", "<u4"), ("action", "<f4", action.shape[1:]), ("proprio", "<f4", state.shape[1:])])
        self.frames["action"], self.frames["proprio"] = action, state
        texts = [self.instructions.index(text) for text in robot.texts]
        self.frames["instruction"] = np.repeat(texts, count)
        for number, key in enumerate(self.cameras):
            lengths = [len(shot) for shot in self.shots[key]] if self.shots else 1
            self.frames["length"][:, number] = lengths
        self.episodes = np.zeros(len(count), EPISODE)
        self.episodes["count"], self.episodes["first"] = count, np.cumsum(count) - count
        self.episodes["record"], self.episodes["labeled"] = range(len(count)), [bool(t.strip()) for t in robot.texts]
        self.episodes["split"][len(count) - robot.val :] = len(self.splits) - 1
        self.first_frames = self.episodes["first"]
        self.openvla_rules, self.unused, self.chosen = False, [], None
        self.targets, raw, self.declared = action_masks(recipe, parts[0]["widths"])
        self.statistics = statistics(self.frames, len(count), ~raw)

    def read_image(self, row: int, camera: int) -> bytes:
        return self.shots[self.cameras[camera]][row] if self.shots else b""


class Steps(dict):
    """An episode's features, as rlds.Steps gives them."""

    def __init__(self, robot: Robot, e: int):
        super().__init__({"action": np.float32(robot.actions[e]),
                          "observation/state": np.float32(robot.states[e]),
                          "language_instruction": [robot.texts[e].encode()] * len(robot.actions[e])})
        self.features = {"language_instruction": Feature((), np.dtype(object), "Text")}


# ------------------------------------------------------------------------------------------------------------
# Motions


def glide(draw, steps: int, home: np.ndarray, reach: np.ndarray, stops: int = 4) -> np.ndarray:
    """From `home` through some stops, smoothly, (steps, D)."""
    points = home + reach * draw.uniform(-1, 1, (stops, len(home)))
    points[0] = home + 0.05 * reach * draw.randn(len(home))
    time = np.linspace(0, stops - 1, steps)
    part = time % 1
    part = part * part * (3 - 2 * part)
    start = np.minimum(time.astype(int), stops - 2)
    part = np.where(time >= stops - 1, 1.0, part)[:, None]
    return points[start] * (1 - part) + points[start + 1] * part


def follow(draw, target: np.ndarray, noise, lag: float = 0.6) -> np.ndarray:
    """The states of a robot that moves toward its targets: state t is read before target t is sent."""
    state = target[0].copy()
    rows = []
    for row in target:
        rows.append(state + noise * draw.randn(len(state)))
        state = state + lag * (row - state)
    return np.array(rows)


def grip(draw, steps: int) -> np.ndarray:
    """A gripper that is open (1), and closes for the middle part, (steps,)."""
    start, stop = int(steps * draw.uniform(0.25, 0.4)), int(steps * draw.uniform(0.7, 0.9))
    return np.where((np.arange(steps) >= start) & (np.arange(steps) < stop), 0.0, 1.0)


TASKS = ["pick up the red cup", "open the top drawer", "put the spoon into the pot"]


def record(episode, recipe: dict, seed: int, episodes: int, steps: int) -> Robot:
    draw = np.random.RandomState(seed)
    pairs = [episode(draw, int(steps * draw.uniform(0.8, 1.2))) for _ in range(episodes)]
    actions, states = map(list, zip(*pairs, strict=True))
    return Robot(actions, states, [TASKS[e % 3] for e in range(episodes)], recipe)


# ------------------------------------------------------------------------------------------------------------
# Robots


def mobile_base(seed: int = 0, episodes: int = 30, steps: int = 90, said: str = " change") -> Robot:
    """As LeKiwi: 5 joints in degrees, a gripper 0..100, and a base's velocities (m/s, m/s, degrees/s), which
    the state reports, too. It drives forward, never back."""
    def episode(draw, steps):
        joints = glide(draw, steps, np.array([0, -60, 50, 30, 5.0]), np.array([50, 40, 40, 40, 60.0]))
        joints += 0.1 * draw.randn(*joints.shape)
        forward = 0.15 * np.clip(np.sin(np.linspace(0, 2 * np.pi, steps)), 0, 1) + 0.002 * draw.rand(steps)
        aside = 0.1 * glide(draw, steps, np.zeros(1), np.ones(1))[:, 0]
        turn = 30 * glide(draw, steps, np.zeros(1), np.ones(1))[:, 0]
        base = np.stack([forward, aside, turn], 1) * np.clip(np.minimum(np.arange(steps), steps - 1 - np.arange(steps)) / 8, 0, 1)[:, None]
        hand = 100 * grip(draw, steps)[:, None]
        action = np.concatenate([joints, hand, base], 1)
        noise = np.array([0.1] * 5 + [0.5] + [0.002, 0.002, 0.3])
        return action, follow(draw, action, noise)

    return record(episode, {"action": f"action[:5] target, action[5:6] /100 target raw, action[6:]{said}"},
                  seed, episodes, steps)


def arm_in_degrees(seed: int = 0, episodes: int = 30, steps: int = 90) -> Robot:
    """As SO-101: a leader arm's 5 joints in degrees and a gripper 0..100, whose state lags behind."""
    def episode(draw, steps):
        joints = glide(draw, steps, np.array([0, -90, 80, 60, 0.0]), np.array([60, 50, 50, 40, 80.0]))
        joints = np.round((joints + 0.05 * draw.randn(*joints.shape)) / 0.088) * 0.088  # an encoder's ticks
        action = np.concatenate([joints, 90 * grip(draw, steps)[:, None] + 3], 1)
        return action, follow(draw, action, 0.05, 0.4)

    return record(episode, {"action": "action[:5] target, action[5:] /100 target raw"}, seed, episodes, steps)


def hand_pose(seed: int = 0, episodes: int = 30, steps: int = 90) -> Robot:
    """Poses x y z and a quaternion (w last) of a hand that points down, and a gripper."""
    def episode(draw, steps):
        place = glide(draw, steps, np.array([0.45, 0, 0.3]), np.array([0.15, 0.25, 0.15]))
        half = glide(draw, steps, np.array([np.pi / 2, 0, 0]), np.array([0.15, 0.3, 0.4]))
        tilt = np.linalg.norm(half, axis=1, keepdims=True)
        pose = np.concatenate([place, half / tilt * np.sin(tilt), np.cos(tilt)], 1)
        state = follow(draw, pose, 0.0005)
        state[:, 3:] /= np.linalg.norm(state[:, 3:], axis=1, keepdims=True)
        hand = grip(draw, steps)[:, None]
        return (np.concatenate([pose, hand], 1),
                np.concatenate([state, 0.08 * follow(draw, hand, 0.002)], 1))

    return record(episode, {"action": "action[:7] target, action[7:] target raw"}, seed, episodes, steps)


def bimanual(seed: int = 0, episodes: int = 30, steps: int = 90) -> Robot:
    """As ALOHA: twice 6 joints in radians and a gripper 0..1."""
    def episode(draw, steps):
        sides = []
        for _ in range(2):
            joints = glide(draw, steps, np.array([0, -0.9, 1.1, 0, -0.3, 0]), np.array([0.5, 0.5, 0.4, 0.6, 0.5, 0.9]))
            sides += [joints + 0.002 * draw.randn(*joints.shape), grip(draw, steps)[:, None]]
        action = np.concatenate(sides, 1)
        return action, follow(draw, action, 0.002, 0.5)

    return record(episode, {"action": "action[:6] target, action[6:7] target raw, action[7:13] target, "
                                      "action[13:] target raw"}, seed, episodes, steps)


def changes(seed: int = 0, episodes: int = 30, steps: int = 40) -> Robot:
    """As Bridge: small changes of a hand's place and Euler angles, noisy, and a gripper; 5 frames a second."""
    def episode(draw, steps):
        pose = glide(draw, steps + 1, np.array([0.3, 0, 0.15, 0, 0, 0]), np.array([0.12, 0.15, 0.1, 0.2, 0.2, 0.6]))
        change = np.diff(pose, axis=0) + 0.15 * draw.randn(steps, 6) * np.array([0.02] * 3 + [0.04] * 3)
        state = pose[0] + np.concatenate([np.zeros((1, 6)), np.cumsum(change, 0)[:-1]])
        state += 0.001 * draw.randn(*state.shape)
        hand = grip(draw, steps)[:, None]
        return np.concatenate([change, hand], 1), np.concatenate([state, follow(draw, hand, 0.01)], 1)

    return record(episode, {"action": "action[:6] change, action[6:] target raw"}, seed, episodes, steps)


ROBOTS = {robot.__name__: robot for robot in (mobile_base, arm_in_degrees, hand_pose, bimanual, changes)}
