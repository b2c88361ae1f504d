"""Record demonstrations as an RLDS dataset. Copy this file and replace `Arm` with your robot.

    python examples/own_robot/record.py --episodes 300 --val_episodes 30 --out datasets

Each step holds the robot's observations (images, joint positions), its next command, and the
instruction. Record the commands exactly as you send them. A policy returns them in the same form
(here absolute angles, and a gripper that is 1 when closed). A recipe describes their meaning: this
program guesses it from names and numbers, prints it, and writes it to recipe.yaml beside the data.
Names help: joint_1, gripper_closed (if the larger value is closed), base_vx, delta_x.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's modules

from machinery.config import exit_with_one_line  # first: it names a missing package

# isort: split

import numpy as np
import tensorflow_datasets as tfds
from robot import Arm

from machinery.inspect_data import describe_dataset
from machinery.rlds import write_rlds

FIRST_SEED = {"train": 0, "val": 100_000}  # drive.py's begin at 200_000
HOLD = 3  # steps recorded after the goal is reached


def features(robot: Arm) -> dict:
    """The layout of an episode: names, shapes, and types, in TFDS' terms."""
    f = tfds.features
    images = {camera: f.Image(shape=(None, None, 3), encoding_format="jpeg") for camera in robot.cameras}
    return {"steps": f.Dataset({
        "observation": {**images, "state": f.Tensor(shape=(len(robot.state_names),), dtype=np.float32)},
        "action": f.Tensor(shape=(len(robot.action_names),), dtype=np.float32),
        "language_instruction": f.Text(),
    })}


def demonstrations(robot: Arm, seeds: range) -> Iterator[dict]:
    """Generate the episodes one at a time: only the current one is in memory."""
    for seed in seeds:
        robot.reset(seed)
        yield {"steps": rest_of_episode(robot)}


def rest_of_episode(robot: Arm) -> list[dict]:
    """The expert's steps, from wherever the robot is until the goal is held."""
    steps, held = [], 0
    while held < HOLD:
        seen, action = robot.look(), robot.expert()
        steps.append({"observation": {**seen["images"], "state": seen["state"]}, "action": action,
                      "language_instruction": robot.instruction})
        robot.move(action)
        held = held + 1 if robot.solved else 0
    return steps


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--episodes", type=int, default=300, help="to train on")
    parser.add_argument("--val_episodes", type=int, default=30, help="to evaluate on")
    parser.add_argument("--name", default="my_robot", help="of the dataset")
    parser.add_argument("--out", type=Path, default=Path("datasets"), help="the folder of all datasets")
    args = parser.parse_args()
    robot, counts = Arm(), {"train": args.episodes, "val": args.val_episodes}
    splits = {split: demonstrations(robot, range(FIRST_SEED[split], FIRST_SEED[split] + count))
              for split, count in counts.items()}
    with exit_with_one_line():
        path = write_rlds(args.out, args.name, "1.0.0", features(robot), splits)
    # fps: eval_vla.py draws seconds, and doctor.py compares a robot's requests with it
    facts = {name: getattr(robot, name) for name in ("fps", "simulator") if hasattr(robot, name)}
    (path / "recording.json").write_text(json.dumps(facts) + "\n")
    print(f"recorded {path}")
    describe_dataset(path, {"action": [*robot.action_names], "observation/state": [*robot.state_names]})


if __name__ == "__main__":
    main()
