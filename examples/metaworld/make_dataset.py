"""Record Meta-World's scripted experts as an RLDS dataset.

    python examples/metaworld/make_dataset.py --tasks mt50 --episodes 50 --name metaworld_mt50 --out datasets

Each step holds a policy's observations (camera images; hand position and gripper opening) and the
expert's action (hand velocity x, y, z and gripper effort, each in [-1, 1]), with an instruction.
Object and goal positions are drawn for each episode from its seed. Only successful episodes are
kept.

Every episode is first its own file in OUT/.NAME.episodes. An interrupted command continues where it
stopped, and the same seeds give the same bytes (on the same renderer). Read record, then record_all
in examples/recording.py.
"""

import argparse
import functools
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's modules

from machinery.config import exit_with_one_line  # first: it names a missing package

# isort: split

import numpy as np
from experts import expert_of
from simulator import INSTRUCTIONS, MAX_STEPS, OPTICS, PACKAGES, Simulator, task_names

from examples.closed_loop import versions
from examples.recording import episodes_from, open_scratch, record_all
from machinery.host import cores
from machinery.rlds import write_rlds

FIRST_SEED = {"train": 0, "val": 100_000}  # rollout.py's begin at 200_000


@functools.lru_cache(maxsize=1)  # one per process: it records one task for a while
def simulator_of(task: str, cameras: tuple, *optics) -> Simulator:
    """This process's simulator of a task. optics: values of OPTICS."""
    return Simulator(task, cameras, *optics)


def demonstrate(simulator: Simulator, expert, seed: int, noise: float, tail: int) -> Iterator[np.ndarray]:
    """Let the expert play the rest of an episode, and continue for `tail` steps. Yields each action
    (4,) float32 before it is executed. Noise can perturb the executed action, so that
    demonstrations also show recoveries."""
    rng, after = np.random.default_rng([seed, 1]), 0  # not the generator of positions
    while simulator.steps < MAX_STEPS and (not simulator.over or after < tail):
        after += simulator.over
        action = np.clip(expert.get_action(simulator.state), -1, 1).astype(np.float32)
        yield action
        disturbance = noise * rng.standard_normal(4) * [1, 1, 1, 0]
        simulator.step(action + disturbance.astype(np.float32))


def record(task: str, seed: int, recording: dict) -> dict | None:
    """One expert episode, or None if the expert failed."""
    simulator = simulator_for(task, recording)
    simulator.reset(seed)
    return rest_of_episode(simulator, task, seed, recording)


def simulator_for(task: str, recording: dict) -> Simulator:
    """This process's simulator of a task, as it was for these recordings."""
    return simulator_of(task, tuple(recording["cameras"]), *(recording[key] for key in OPTICS))


def rest_of_episode(simulator: Simulator, task: str, seed: int, recording: dict) -> dict | None:
    """The expert from the simulator's state to the end as RLDS steps, or None if it failed."""
    steps = []
    expert = expert_of(task, recording["experts"])
    for action in demonstrate(simulator, expert, seed, recording["noise"], recording["tail"]):
        steps.append({"observation": simulator.see(), "action": action,
                      "language_instruction": INSTRUCTIONS[task], "is_first": not steps})
    simulator.sheet.read()
    if simulator.success_at is None:
        return None
    last = len(steps) - 1
    for i, step in enumerate(steps):
        step |= {"is_last": i == last, "is_terminal": i == last, "reward": np.float32(i == last),
                 "discount": np.float32(1)}
    return {"steps": steps, "episode_metadata": {"task": task, "seed": seed}}


def features(cameras: list[str], image_size: int) -> dict:
    """The layout of an episode, in TFDS' terms."""
    import tensorflow_datasets as tfds  # imported here: the workers do not need it

    f = tfds.features
    images = {camera: f.Image(shape=(image_size, image_size, 3), encoding_format="jpeg")
              for camera in cameras}
    return {
        "steps": f.Dataset({
            "observation": {**images, "state": f.Tensor(shape=(4,), dtype=np.float32)},
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
    parser.add_argument("--tasks", nargs="+", default=["demo"],
                        help="demo, mt50, easy, medium, hard, very_hard, or names such as reach-v3")
    parser.add_argument("--episodes", type=int, default=50, help="training episodes per task")
    parser.add_argument("--val_episodes", type=int, default=0, help="held-out episodes per task")
    parser.add_argument("--cameras", nargs="+", default=["image"],
                        help="image (corner2), gripperPOV, ...")
    parser.add_argument("--image_size", type=int, default=224, help="pixels")
    parser.add_argument("--jpeg_quality", type=int, default=95, help="0..100")
    parser.add_argument("--action_repeat", type=int, default=1,
                        help="simulator steps per recorded step")
    parser.add_argument("--multisampling", type=int, default=0,
                        help="samples per pixel, for smooth edges")
    parser.add_argument("--noise", type=float, default=0.0,
                        help="standard deviation, on executed velocities")
    parser.add_argument("--experts", choices=["metaworld", "ours"], default="metaworld",
                        help="the experts of reach, reach-wall, and handle-pull-side: see experts.py")
    parser.add_argument("--tail", type=int, default=0, help="recorded steps after success")
    parser.add_argument("--name", default="metaworld_demo", help="of the dataset")
    parser.add_argument("--out", type=Path, default=Path("datasets"), help="the folder of all datasets")
    parser.add_argument("--workers", type=int, default=cores(), help="processes; default: one per core")
    args = parser.parse_args()
    recording = {key: getattr(args, key) for key in ("cameras", *OPTICS, "noise", "tail", "experts")}
    recording["simulator"] = versions(PACKAGES)
    scratch = args.out / f".{args.name}.episodes"
    with exit_with_one_line():
        tasks = task_names(args.tasks)
    if (args.out / args.name / "1.0.0").exists():
        sys.exit(f"error: {args.out / args.name} exists: remove it, or choose another --name")
    with exit_with_one_line():
        open_scratch(scratch, recording)
    counts = {"train": args.episodes, "val": args.val_episodes}
    wanted = {(task, FIRST_SEED[split]): count for split, count in counts.items() if count for task in tasks}
    layout = features(args.cameras, args.image_size)
    kept = record_all(functools.partial(record, recording=recording), layout, wanted, scratch, args.workers)
    splits = {split: episodes_from(FIRST_SEED[split], kept, scratch) for split in counts if counts[split]}
    path = write_rlds(args.out, args.name, "1.0.0", layout, splits)
    # rollout.py reads it to use the same settings, and eval_vla.py its `fps`: 80 simulator steps a second
    (path / "recording.json").write_text(json.dumps({**recording, "fps": 80 / args.action_repeat}) + "\n")
    shutil.rmtree(scratch)
    print(path)


if __name__ == "__main__":
    main()
