"""A robot that this project has never seen: a mobile manipulator with two cameras of different size.

Its actions are three velocities of the base, absolute angles of seven joints in degrees, and a gripper
from 0 to 100, where 100 is closed.
"""

import numpy as np

NAMES = ["base_vx", "base_vy", "base_wz", *(f"joint_{i}" for i in range(1, 8)), "gripper_closed"]
STATE_NAMES = NAMES[3:]
SIZES = {"head": (72, 96), "hand": (64, 64)}  # (height, width)
TEXTS = ["bring the cup", "open the drawer"]
RECIPE = {"primary": "head", "wrist": "hand",
          "action": "action[:3] change, action[3:10] target, action[10:] /100 clip invert target raw"}


def actions(episode: int, length: int) -> np.ndarray:
    """(length, 11): it drives, reaches out, and closes the gripper."""
    rng = np.random.default_rng(episode)
    time = np.linspace(0, 1, length)[:, None]
    drive = rng.uniform([0.2, -0.1, -0.5], [0.5, 0.1, 0.5]) * (time < 0.6) * (0.5 + time)
    start, end = rng.uniform(-170, 170, (2, 7))
    joints = start + (end - start) * time**2
    gripper = 100 * np.clip(4 * time - 2, 0, 1)
    return np.hstack([drive, joints, gripper]).astype(np.float32)


def states(acted: np.ndarray) -> np.ndarray:
    """(T, 8): joints and gripper, which arrive within a frame."""
    return np.concatenate([acted[:1], acted[:-1]])[:, 3:]


def picture(camera: str, episode: int, frame: int) -> np.ndarray:
    """A gradient that moves."""
    height, width = SIZES[camera]
    ramp = (np.arange(width) * (2 + episode % 7) + 9 * frame + 50 * (camera == "hand")) % 200
    return np.repeat(np.broadcast_to(ramp, (height, width))[..., None], 3, axis=2).astype(np.uint8)


class Arm:
    """The robot, for examples/own_robot/record.py."""

    cameras = (*SIZES,)
    action_names, state_names = NAMES, STATE_NAMES

    def reset(self, seed: int) -> None:
        self.plan, self.frame = actions(seed, 24), 0
        self.seed, self.instruction = seed, TEXTS[seed % 2]
        self.states = states(self.plan)

    def look(self) -> dict:
        return {"images": {camera: picture(camera, self.seed, self.frame) for camera in SIZES},
                "state": self.states[self.frame]}

    def expert(self) -> np.ndarray:
        return self.plan[self.frame]

    def move(self, action: np.ndarray) -> None:
        self.frame += 1

    @property
    def solved(self) -> bool:
        return self.frame > len(self.plan) - 3  # record.py adds two more


def check(policy, table, recorded: np.ndarray) -> None:
    """A policy takes and gives the robot's own numbers. recorded: (N, 11), of the table's frames."""
    robot = policy.convention(None)
    assert robot.action == NAMES and robot.state == STATE_NAMES
    np.testing.assert_allclose(robot.to_robot(table.frames["action"]), recorded, atol=1e-4)
    images = {"primary": picture("head", 0, 0), "wrist": picture("hand", 0, 0)}
    acted = policy.predict_action(images, TEXTS[0], proprio=recorded[0, 3:])
    slack = 1e-3 * np.ptp(recorded, axis=0) + 1e-6
    assert acted.shape == (8, 11)
    assert (acted >= recorded.min(0) - slack).all() and (acted <= recorded.max(0) + slack).all()
    assert np.abs(acted[:, 3:10]).max() > 4  # degrees, not normalized
