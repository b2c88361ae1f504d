"""Who demonstrates: Meta-World's scripted experts or, in three tasks, others that a policy can imitate.

Meta-World's stop at the edge of success in reach and reach-wall, and in handle-pull-side turn round by what
no camera shows (FINDINGS.md). Figures of a policy that learned from these are to say so.
"""

import numpy as np

RAISE = 0.045  # m: success is measured at the fingertips, so far below the hand


class Reach:
    """Meta-World's expert, which brings its fingertips to the goal, and not its hand."""

    def __init__(self, expert):
        self.expert = expert

    def get_action(self, state: np.ndarray) -> np.ndarray:
        """state (39,) as Meta-World gives it, the goal at its end -> velocities and gripper effort (4,)."""
        raised = state.copy()
        raised[-1] += RAISE
        return self.expert.get_action(raised)


class HandlePullSide:
    """Goes to 3.5 cm above the handle, closes, and keeps going there while the handle comes up with it."""

    def get_action(self, state: np.ndarray) -> np.ndarray:
        """As Reach's."""
        hand, handle = state[:3], state[4:7]
        beside = np.linalg.norm((hand - handle)[:2]) > 0.04
        way = handle - hand
        close = not beside and abs(way[2]) < 0.045
        way[2] += 0.1 if beside else 0.035
        return np.array([*25 * way, 0.6 * close])


def expert_of(task: str, whose: str):
    """A new expert for a task. whose: "metaworld", or "ours", which are Meta-World's in the other tasks."""
    from metaworld.policies import (
        ENV_POLICY_MAP,  # here: simulator.py chooses OpenGL before MuJoCo is read
    )

    expert = ENV_POLICY_MAP[task]()
    reach = Reach(expert)
    ours = {"reach-v3": reach, "reach-wall-v3": reach, "handle-pull-side-v3": HandlePullSide()}
    return ours.get(task, expert) if whose == "ours" else expert
