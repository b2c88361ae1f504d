"""Record the scripted expert as an RLDS dataset in the layout of libero_*_no_noops.

    python examples/libero/make_dataset.py --episodes 50 --val_episodes 2 --name libero_scripted

These are not LIBERO's demonstrations, which people recorded. Mention this if you compare a policy
trained on them with policies trained on LIBERO's. They share the images (256 pixels, rotated,
JPEG), the state, the actions, the instructions, and all names. Objects are drawn from the ranges of
LIBERO's task, so no start state is one of the 50 used for evaluation.

Every episode is first its own file in OUT/.NAME.episodes, and an interrupted command continues
where it stopped. Read record, then record_all in examples/recording.py.
"""

import argparse
import functools
import json
import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for each simulator; there is one per core
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's modules

from machinery.config import UserError, exit_with_one_line  # first: it names a missing package

# isort: split

import numpy as np
from expert import TASKS, Expert
from protocol import MAX_STEPS, PACKAGES, Protocol, jpeg, settle
from simulator import Simulator, instructions

from examples.closed_loop import versions
from examples.recording import episodes_from, open_scratch, record_all
from machinery.host import cores
from machinery.rlds import write_rlds

FIRST_SEED = {"train": 1_000, "val": 100_000}
# the points of the protocol that recordings follow
RECORDED = ("image_size", "turn", "jpeg_quality", "settling_steps")
JOINT_NOISE = 0.02  # rad: the arm's start, as in LIBERO's own start states
making: list[Simulator] = []  # this process's simulator of the last recorded task


def simulator_of(task: str) -> Simulator:
    """A simulator of a task, by its name: libero_object-3."""
    suite, _, number = task.rpartition("-")
    if not making or (making[0].suite, making[0].task) != (suite, int(number)):
        if making:
            making.pop().close()
        making.append(Simulator(suite, int(number), Protocol().image_size, JOINT_NOISE))
    return making[0]


def record(task: str, seed: int, recording: dict) -> dict | None:
    """One expert episode, or None if the expert failed."""
    simulator = simulator_of(task)
    simulator.begin_anew(seed)
    settle(simulator, Protocol())
    return rest_of_episode(simulator, task, seed, recording)


def rest_of_episode(simulator: Simulator, task: str, seed: int, recording: dict) -> dict | None:
    """The expert from the simulator's state to the end as RLDS steps, or None if it failed.

    Noise can perturb the executed actions, so that demonstrations also show recoveries. The
    recorded actions have no noise.
    """
    rng = np.random.default_rng([seed, 1])  # not the generator of positions
    expert, steps, after = Expert(simulator), [], 0
    while after <= recording["tail"]:
        action, seen = expert.act(), simulator.look()
        steps.append({
            "observation": {"image": turned(seen["primary"]), "wrist_image": turned(seen["wrist"]),
                            "state": seen["state"], "joint_state": seen["joint_state"]},
            "action": action, "language_instruction": instructions(simulator.suite)[simulator.task],
            "is_first": not steps})
        disturbance = recording["noise"] * np.append(rng.standard_normal(3), [0, 0, 0, 0])
        simulator.step(action + disturbance, look=True)
        after += simulator.solved or after > 0
        if len(steps) > MAX_STEPS[simulator.suite]:
            return None
    for i, step in enumerate(steps):
        last = i == len(steps) - 1
        step |= {"is_last": last, "is_terminal": last, "reward": np.float32(last), "discount": np.float32(1)}
    return {"steps": steps, "episode_metadata": {
        "file_path": f"scripted by ZeroVLA's examples/libero/expert.py: {task} seed {seed}"}}


def turned(picture: np.ndarray) -> bytes:
    """A rendered image -> as in LIBERO's RLDS: upright, as a JPEG file."""
    return jpeg(picture[::-1, ::-1], Protocol().jpeg_quality)


def features() -> dict:
    """The layout of an episode, in TFDS' terms."""
    import tensorflow_datasets as tfds  # imported here: the workers do not need it

    f, size = tfds.features, Protocol().image_size
    picture = f.Image(shape=(size, size, 3), encoding_format="jpeg")
    return {
        "steps": f.Dataset({
            "observation": {"image": picture, "wrist_image": picture,
                            "state": f.Tensor(shape=(8,), dtype=np.float32),
                            "joint_state": f.Tensor(shape=(7,), dtype=np.float32)},
            "action": f.Tensor(shape=(7,), dtype=np.float32),
            "language_instruction": f.Text(),
            "is_first": np.bool_, "is_last": np.bool_, "is_terminal": np.bool_,
            "reward": np.float32, "discount": np.float32,
        }),
        "episode_metadata": {"file_path": f.Text()},
    }


def task_names(names: list[str]) -> list[str]:
    """Names of tasks, and of suites (their tasks that the expert can do) -> names of tasks."""
    known = {suite: [f"{suite}-{number}" for number in numbers] for suite, numbers in TASKS.items()}
    single = {task: [task] for tasks in known.values() for task in tasks}
    for name in names:
        if name not in known | single:
            raise UserError(f"no task {name!r} that the expert can do: choose {', '.join(known)} or of "
                            f"{', '.join(single)}")
    return list(dict.fromkeys(task for name in names for task in (known | single)[name]))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--tasks", nargs="+", default=[*TASKS],
                        help="suites, or tasks, as libero_object-3")
    parser.add_argument("--episodes", type=int, default=50, help="training episodes per task")
    parser.add_argument("--val_episodes", type=int, default=0, help="held-out episodes per task")
    parser.add_argument("--noise", type=float, default=0.2,
                        help="standard deviation, on the executed changes of position; 1 is 5 cm")
    parser.add_argument("--tail", type=int, default=8, help="recorded steps after success")
    parser.add_argument("--name", default="libero_scripted", help="of the dataset")
    parser.add_argument("--out", type=Path, default=Path("datasets"), help="the folder of all datasets")
    parser.add_argument("--workers", type=int, default=cores(), help="processes; default: one per core")
    args = parser.parse_args()
    recording = {"noise": args.noise, "tail": args.tail, "simulator": versions(PACKAGES),
                 **{key: getattr(Protocol(), key) for key in RECORDED}}
    scratch = args.out / f".{args.name}.episodes"
    with exit_with_one_line():
        tasks = task_names(args.tasks)
        if (args.out / args.name / "1.0.0").exists():
            raise UserError(f"{args.out / args.name} exists: remove it, or choose another --name")
        open_scratch(scratch, recording)
    counts = {"train": args.episodes, "val": args.val_episodes}
    wanted = {(task, FIRST_SEED[split]): count for split, count in counts.items() if count for task in tasks}
    layout = features()
    kept = record_all(functools.partial(record, recording=recording), layout, wanted, scratch, args.workers)
    splits = {split: episodes_from(FIRST_SEED[split], kept, scratch) for split in counts if counts[split]}
    path = write_rlds(args.out, args.name, "1.0.0", layout, splits)
    (path / "recording.json").write_text(json.dumps({**recording, "tasks": tasks, "fps": 20}) + "\n")
    shutil.rmtree(scratch)
    print(path)


if __name__ == "__main__":
    main()
