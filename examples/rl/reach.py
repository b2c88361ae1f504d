"""The arm of examples/own_robot with one decision per episode, and its demonstrations.

    python examples/rl/reach.py --episodes 300 --val_episodes 30 --out datasets

An action is a goal: where to put the closed gripper, x and y in meters. An episode is a look, a
goal, and the motion. So its reward judges 2 tokens, instead of all tokens of five chunks.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "own_robot"))

import robot  # first: it names a missing package

# isort: split

import numpy as np


class Reach(robot.Arm):
    """The arm, told where to go. Each motion takes 0.8 s."""

    cameras = ("outside",)  # the other one sees only what is near the hand
    action_names = ("x", "y")
    fps = 1.25  # actions per second
    steps = 8  # of the robot: a frame of a film is a step

    def move(self, goal: np.ndarray, film=lambda: None) -> None:
        """Turn the joints to the goal evenly, and settle for the last two steps. film: called after
        each step."""
        begin, end = self.target, np.append(robot.joints_at(*goal), 1)
        for share in np.minimum(np.arange(1, self.steps + 1) / (self.steps - 2), 1):
            super().move(begin + share * (end - begin))
            film()

    def expert(self) -> np.ndarray:
        """The demonstrator's only action: the disc's center."""
        return np.float32(self.discs[self.goal])


if __name__ == "__main__":
    import record  # here: simulators of rl.py do without its packages

    record.Arm, record.HOLD = Reach, 1  # an episode ends when the disc is touched
    record.main()
