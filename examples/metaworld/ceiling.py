"""The limits of a policy apart from learning: the experts, with one of a policy's limitations at a
time.

    python examples/metaworld/ceiling.py --tasks handle-pull-side-v3 door-open-v3 --seeds 20

Successes, with rollout.py's seeds and rules; then steps, and the percentage of frames with a
clipped state:

    expert      the scripted expert as recorded, its actions clipped to [-1, 1]
    replay      its actions of that episode again, open loop, after another reset
    replay_path the same, each action after a policy's path: normalized, clipped, one of 256 bins, and back
    path        that path in the closed loop
    state_q99   the expert sees its hand as a policy does: clipped to the 1st and 99th percentile
    noise1, noise2      Gaussian noise of 0.1 or 0.2 on executed actions (demonstrations have 0.2)
    chunk8, chunk16     noise 0.1, a look every 8 or 16 steps: the expert's actions in a copy, open loop
    still8      a look every 8 steps, without velocities and the controller's target: nothing seems to move
    off5, off10, off20  objects and goal seem off by 5, 10, 20 mm in each coordinate (standard deviation;
                one error per episode)
    look10      off10, but drawn anew at each look, every 8 steps
"""

import argparse
import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's modules

from machinery.config import exit_with_one_line  # first: it names a missing package

if __name__ == "__main__":  # before PyTorch is imported for seconds
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--tasks", nargs="+", default=["mt50"],
                        help="names, or lists of them such as mt50")
    parser.add_argument("--seeds", type=int, default=20, help="episodes of each task and column")
    parser.add_argument("--experts", choices=["metaworld", "ours"], default="metaworld",
                        help="see experts.py")
    args = parser.parse_args()

import mujoco
import numpy as np
from experts import expert_of
from make_dataset import demonstrate
from simulator import MAX_STEPS, TASKS, Simulator, task_names

from action_tokenizer import ActionTokenizer, normalize, unnormalize
from machinery.rlds import statistics

FIRST_SEED, TAIL = 200_000, 8  # as in rollout.py; steps recorded after success, as in recipe.sh
WHOLE, TOKENS = mujoco.mjtState.mjSTATE_INTEGRATION, ActionTokenizer(1000)
FRAME = [("action", np.float32, 4), ("proprio", np.float32, 4)]
HINDRANCES = {  # column -> arguments of Scene.play
    "expert": {}, "path": {"path": True}, "state_q99": {"clipped": True}, "noise1": {"noise": 0.1},
    "noise2": {"noise": 0.2}, "chunk8": {"noise": 0.1, "chunk": 8}, "chunk16": {"noise": 0.1, "chunk": 16},
    "still8": {"chunk": 8, "still": True}, "off5": {"off": 0.005}, "off10": {"off": 0.01},
    "off20": {"off": 0.02}, "look10": {"off": 0.01, "chunk": 8, "anew": True}}
HEAD = ["replay", "replay_path", *HINDRANCES, "steps", "outside"]


class Scene(Simulator):
    """A task without cameras, with its expert, that can be reset to an earlier moment."""

    def __init__(self, task: str, experts: str, stats: dict | None = None):
        super().__init__(task, [], 0, 90, 1, sheet=object())
        self.expert, self.stats = expert_of(task, experts), stats

    def moment(self):
        """-> a function that restores this moment."""
        env, state = self.env, np.empty(mujoco.mj_stateSize(self.env.model, WHOLE))
        mujoco.mj_getState(env.model, env.data, state, WHOLE)
        plain = {key: x for key, x in vars(env).items() if isinstance(x, np.ndarray | float | int)}
        here = copy.deepcopy((plain, {key: vars(self)[key] for key in ("state", "steps", "success_at")}))

        def back():
            mujoco.mj_setState(env.model, env.data, state, WHOLE)
            for owner, kept in zip((env, self), copy.deepcopy(here), strict=True):
                vars(owner).update(kept)
        return back

    def ask(self, error: np.ndarray | float = 0.0, clipped: bool = False) -> np.ndarray:
        """The expert's action (4,) float32, with objects and goal displaced by so many meters."""
        seen = self.state.copy()
        seen[4:7], seen[-3:] = seen[4:7] + error, seen[-3:] + error
        if clipped:
            seen[:4] = np.clip(seen[:4], self.stats["proprio"]["q01"], self.stats["proprio"]["q99"])
        return np.clip(self.expert.get_action(seen), -1, 1).astype(np.float32)

    def look_ahead(self, count: int, error: np.ndarray, still: bool) -> list[np.ndarray]:
        """The next `count` actions of an undisturbed expert."""
        back, actions = self.moment(), []
        if still:
            self.env.data.qvel[:], self.env.data.mocap_pos[0] = 0, self.state[:3]
        while len(actions) < count and not self.over:
            actions.append(self.ask(error))
            self.step(actions[-1])
        back()
        return actions

    def way(self, actions: np.ndarray) -> np.ndarray:
        """Actions as a policy without errors would output them."""
        tokens = TOKENS.encode(normalize(actions, self.stats["action"], "bounds_q99"))
        return unnormalize(TOKENS.decode(tokens), self.stats["action"], "bounds_q99")

    def play(self, rng, noise=0.0, chunk=1, off=0.0, anew=False, still=False, path=False, clipped=False):
        """Play to the end with the limitations listed at the top -> success."""
        error = off * rng.standard_normal(3)
        while not self.over:
            error = off * rng.standard_normal(3) if anew else error
            for action in [self.ask(error, clipped)] if chunk == 1 else self.look_ahead(chunk, error, still):
                if not self.over:
                    action = self.way(action) if path else action
                    self.step(action + noise * rng.standard_normal(4) * [1, 1, 1, 0])
        return self.success_at is not None

    def frames(self, seed: int, noise: float) -> np.ndarray:
        """The frames of an episode with its tail, as make_dataset.py records it: (T,) of FRAME."""
        self.reset(seed)
        played = [(action, self.state[:4]) for action in demonstrate(self, self.expert, seed, noise, TAIL)]
        return np.array(played, FRAME)


def statistics_of(episodes: int, experts: str) -> dict[str, dict]:
    """dataset_statistics.json for so many demonstrations of each of the 50 tasks."""
    kept = []
    for task in TASKS["mt50"]:
        scene, seed, wanted = Scene(task, experts), 0, len(kept) + episodes
        while len(kept) < wanted:
            episode, seed = scene.frames(seed, 0.2), seed + 1
            kept += [episode] * (scene.success_at is not None)
    return statistics(np.concatenate(kept), len(kept), np.ones(4, bool))


def measure(task: str, experts: str, seeds: int, stats: dict) -> dict[str, float]:
    """The row of a task."""
    scene, row, state = Scene(task, experts, stats), dict.fromkeys(HEAD, 0), stats["proprio"]
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        episode = scene.frames(seed, 0.0)
        states, actions = episode["proprio"], episode["action"]
        row["steps"] += (scene.success_at or MAX_STEPS) / seeds
        row["outside"] += 100 * ((states < state["q01"]) | (states > state["q99"])).any(1).mean() / seeds
        for name, again in (("replay", actions), ("replay_path", scene.way(actions))):
            scene.reset(seed)
            for action in again:
                scene.step(action)
            row[name] += scene.success_at is not None
        scene.reset(seed)
        back = scene.moment()
        for name, how in HINDRANCES.items():
            back()
            row[name] += scene.play(np.random.default_rng([seed, 2]), **how)
    return row


if __name__ == "__main__":
    print(stats := statistics_of(8, args.experts), f"\n{'':29s}", *HEAD, flush=True)
    with exit_with_one_line():
        tasks = task_names(args.tasks)
    for task in tasks:
        row = measure(task, args.experts, args.seeds, stats)
        print(f"{task:29s}", *(f"{row[name]:{len(name)}.0f}" for name in HEAD), flush=True)
