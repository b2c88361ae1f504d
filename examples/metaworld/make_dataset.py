"""Record Meta-World's scripted experts as an RLDS dataset.

    python examples/metaworld/make_dataset.py --tasks demo --episodes 22 --val_episodes 4 --out datasets

Each step holds what a policy may see (a camera image; hand position and gripper opening) and what the expert
did (hand velocity x, y, z and gripper effort, each in [-1, 1]), with an instruction. Object and goal
positions are drawn anew for each episode from its seed; only successful episodes are kept. `Simulator` is
also what rollout.py drives.
"""

import argparse
import os
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("MUJOCO_GL", "egl")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's modules
warnings.filterwarnings("ignore", message="Constant")  # experts ask for more than [-1, 1]; we clip

import metaworld
import mujoco
import numpy as np
import tensorflow_datasets as tfds
from metaworld.policies import ENV_POLICY_MAP

from rlds import write_rlds

# LeRobot's instructions for MT50. Two of its tasks share "Push the puck to a goal"; push-back-v3 therefore
# reads "Push the puck back to a goal" here, so that the 50 are distinct.
INSTRUCTIONS = {
    "assembly-v3": "Pick up a nut and place it onto a peg",
    "basketball-v3": "Dunk the basketball into the basket",
    "bin-picking-v3": "Grasp the puck from one bin and place it into another bin",
    "box-close-v3": "Grasp the cover and close the box with it",
    "button-press-topdown-v3": "Press a button from the top",
    "button-press-topdown-wall-v3": "Bypass a wall and press a button from the top",
    "button-press-v3": "Press a button",
    "button-press-wall-v3": "Bypass a wall and press a button",
    "coffee-button-v3": "Push a button on the coffee machine",
    "coffee-pull-v3": "Pull a mug from a coffee machine",
    "coffee-push-v3": "Push a mug under a coffee machine",
    "dial-turn-v3": "Rotate a dial 180 degrees",
    "disassemble-v3": "Pick a nut out of a peg",
    "door-close-v3": "Close a door with a revolving joint",
    "door-lock-v3": "Lock the door by rotating the lock clockwise",
    "door-open-v3": "Open a door with a revolving joint",
    "door-unlock-v3": "Unlock the door by rotating the lock counter-clockwise",
    "hand-insert-v3": "Insert the gripper into a hole",
    "drawer-close-v3": "Push and close a drawer",
    "drawer-open-v3": "Open a drawer",
    "faucet-open-v3": "Rotate the faucet counter-clockwise",
    "faucet-close-v3": "Rotate the faucet clockwise",
    "hammer-v3": "Hammer a screw on the wall",
    "handle-press-side-v3": "Press a handle down sideways",
    "handle-press-v3": "Press a handle down",
    "handle-pull-side-v3": "Pull a handle up sideways",
    "handle-pull-v3": "Pull a handle up",
    "lever-pull-v3": "Pull a lever down 90 degrees",
    "peg-insert-side-v3": "Insert a peg sideways",
    "pick-place-wall-v3": "Pick a puck, bypass a wall and place the puck",
    "pick-out-of-hole-v3": "Pick up a puck from a hole",
    "reach-v3": "Reach a goal position",
    "push-back-v3": "Push the puck back to a goal",
    "push-v3": "Push the puck to a goal",
    "pick-place-v3": "Pick and place a puck to a goal",
    "plate-slide-v3": "Slide a plate into a cabinet",
    "plate-slide-side-v3": "Slide a plate into a cabinet sideways",
    "plate-slide-back-v3": "Get a plate from the cabinet",
    "plate-slide-back-side-v3": "Get a plate from the cabinet sideways",
    "peg-unplug-side-v3": "Unplug a peg sideways",
    "soccer-v3": "Kick a soccer into the goal",
    "stick-push-v3": "Grasp a stick and push a box using the stick",
    "stick-pull-v3": "Grasp a stick and pull a box with the stick",
    "push-wall-v3": "Bypass a wall and push a puck to a goal",
    "reach-wall-v3": "Bypass a wall and reach a goal",
    "shelf-place-v3": "Pick and place a puck onto a shelf",
    "sweep-into-v3": "Sweep a puck into a hole",
    "sweep-v3": "Sweep a puck off the table",
    "window-open-v3": "Push and open a window",
    "window-close-v3": "Push and close a window",
}
TASKS = {
    "demo": ["button-press-topdown-v3", "coffee-button-v3", "drawer-close-v3", "plate-slide-v3", "reach-v3",
             "window-close-v3"],
    "mt50": list(INSTRUCTIONS),
}
MAX_STEPS = 500  # simulator steps, Meta-World's own limit


class Simulator:
    """One Meta-World task with its camera: `corner2` where LeRobot puts it, image turned upright."""

    def __init__(self, task: str, image_size: int, action_repeat: int):
        """action_repeat: simulator steps (80 per second) for which an action is held."""
        benchmark = metaworld.MT1(task, seed=42)
        self.env = benchmark.train_classes[task]()
        self.env.set_task(benchmark.train_tasks[0])
        self.env._freeze_rand_vec, self.env.seeded_rand_vec = False, True  # positions follow the seed
        self.env.model.cam_pos[2] = [0.75, 0.075, 0.7]
        self.env.model.vis.quality.offsamples = 0  # ten times faster in software, together with:
        self.renderer = mujoco.Renderer(self.env.model, image_size, image_size)
        self.renderer._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        self.renderer._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        self.action_repeat = action_repeat

    def reset(self, seed: int) -> None:
        """Begin the episode that belongs to this seed."""
        self.env.seed(seed)
        self.state, _ = self.env.reset()
        self.steps, self.success = 0, False

    def observation(self) -> dict:
        """image (size, size, 3) uint8; state (4,) float32: hand x, y, z in metres, gripper opening 0..1."""
        self.renderer.update_scene(self.env.data, camera="corner2")
        image = np.ascontiguousarray(self.renderer.render()[::-1, ::-1])
        return {"image": image, "state": self.state[:4].astype(np.float32)}

    def step(self, action: np.ndarray) -> bool:
        """Hold the action (4,) for action_repeat steps; True when the episode is over (success or time)."""
        for _ in range(self.action_repeat):
            self.state, *_, info = self.env.step(np.clip(action, -1, 1))
            self.steps += 1
            self.success = bool(info["success"])
            if self.success or self.steps >= MAX_STEPS:
                return True
        return False


def record(job: tuple) -> dict | None:
    """One expert episode as RLDS steps; None when the expert failed."""
    task, seed, image_size, action_repeat, noise = job
    simulator = Simulator(task, image_size, action_repeat)
    expert, rng = ENV_POLICY_MAP[task](), np.random.default_rng(seed)
    simulator.reset(seed)
    steps, over = [], False
    while not over:
        action = np.clip(expert.get_action(simulator.state), -1, 1).astype(np.float32)
        steps.append({"observation": simulator.observation(), "action": action,
                      "language_instruction": INSTRUCTIONS[task], "is_first": not steps})
        # what is executed may be perturbed, so that demonstrations also show recoveries; what is recorded is
        # not
        executed = action + noise * rng.standard_normal(4).astype(np.float32) * [1, 1, 1, 0]
        over = simulator.step(executed)
    simulator.renderer.close()
    last = len(steps) - 1
    for i, step in enumerate(steps):
        step |= {"is_last": i == last, "is_terminal": i == last, "reward": np.float32(i == last),
                 "discount": np.float32(1)}
    episode = {"steps": steps, "episode_metadata": {"task": task, "seed": seed}}
    return episode if simulator.success else None


def record_all(tasks: list[str], episodes: int, first_seed: int, settings: tuple, workers: int):
    """Yield `episodes` successful episodes of each task; failed seeds are replaced by the next, in order."""
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for task in tasks:
            seed, found = first_seed, 0
            while found < episodes:
                jobs = [(task, seed + i, *settings) for i in range(episodes - found)]
                for episode in pool.map(record, jobs):
                    if episode is not None:
                        found += 1
                        yield episode
                seed += len(jobs)


def features(image_size: int) -> dict:
    """What an episode looks like to TFDS."""
    f = tfds.features
    return {
        "steps": f.Dataset({
            "observation": {"image": f.Image(shape=(image_size, image_size, 3), encoding_format="jpeg"),
                            "state": f.Tensor(shape=(4,), dtype=np.float32)},
            "action": f.Tensor(shape=(4,), dtype=np.float32),
            "language_instruction": f.Text(),
            "is_first": np.bool_, "is_last": np.bool_, "is_terminal": np.bool_,
            "reward": np.float32, "discount": np.float32,
        }),
        "episode_metadata": {"task": f.Text(), "seed": np.int64},
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--tasks", nargs="+", default=["demo"], help="demo, mt50, or names such as reach-v3")
    parser.add_argument("--episodes", type=int, default=50, help="training episodes per task")
    parser.add_argument("--val_episodes", type=int, default=0, help="held-out episodes per task")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--jpeg_quality", type=int, default=95)
    parser.add_argument("--action_repeat", type=int, default=1, help="simulator steps per recorded step")
    parser.add_argument("--noise", type=float, default=0.0, help="standard deviation, on executed velocities")
    parser.add_argument("--name", default="metaworld_demo")
    parser.add_argument("--out", type=Path, default=Path("datasets"))
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    tasks = [task for name in args.tasks for task in TASKS.get(name, [name])]
    settings = (args.image_size, args.action_repeat, args.noise)
    # seeds: training 0..., held-out 100000...; rollout.py evaluates on 200000...
    splits = {"train": record_all(tasks, args.episodes, 0, settings, args.workers)}
    if args.val_episodes:
        splits["val"] = record_all(tasks, args.val_episodes, 100_000, settings, args.workers)
    print(write_rlds(args.out, args.name, "1.0.0", features(args.image_size), splits,
                     jpeg_quality=args.jpeg_quality))


if __name__ == "__main__":
    main()
