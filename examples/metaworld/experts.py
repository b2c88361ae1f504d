"""The demonstrators: Meta-World's scripted experts or, in three tasks, others that a policy can
imitate.

Meta-World's experts stop at the edge of success in reach and reach-wall, and in handle-pull-side
reverse for reasons that no camera shows (FINDINGS.md). If you publish figures of a policy trained
on ours, mention them.
"""

import numpy as np

RAISE = 0.045  # m: success is measured at the fingertips, this far below the hand


class Reach:
    """Meta-World's expert, but it brings its fingertips to the goal instead of its hand."""

    def __init__(self, expert):
        self.expert = expert

    def get_action(self, state: np.ndarray) -> np.ndarray:
        """state (39,) as given by Meta-World, the goal at its end -> velocities and gripper effort
        (4,)."""
        raised = state.copy()
        raised[-1] += RAISE
        return self.expert.get_action(raised)


class HandlePullSide:
    """Moves to 3.5 cm above the handle, closes, and stays above the handle as it rises."""

    def get_action(self, state: np.ndarray) -> np.ndarray:
        """The same as Reach.get_action."""
        hand, handle = state[:3], state[4:7]
        beside = np.linalg.norm((hand - handle)[:2]) > 0.04
        way = handle - hand
        close = not beside and abs(way[2]) < 0.045
        way[2] += 0.1 if beside else 0.035
        return np.array([*25 * way, 0.6 * close])


def expert_of(task: str, whose: str):
    """A new expert for a task. whose: "metaworld", or "ours", which equal Meta-World's in the other
    tasks."""
    # imported here: simulator.py must select OpenGL before MuJoCo is imported
    from metaworld.policies import ENV_POLICY_MAP

    expert = ENV_POLICY_MAP[task]()
    reach = Reach(expert)
    ours = {"reach-v3": reach, "reach-wall-v3": reach, "handle-pull-side-v3": HandlePullSide()}
    return ours.get(task, expert) if whose == "ours" else expert
