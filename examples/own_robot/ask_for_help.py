"""Your policy asks for help: rounds of DAgger with the simulated arm.

    python examples/own_robot/ask_for_help.py

Records demonstrations, trains a policy, lets it play, and has the expert finish 150 episodes in
which it did not get to the disc by itself. Then it trains on, with these among the demonstrations,
and plays again. README.md has the figures, and what to change for a person and a real robot. Read
record. examples/dagger/rounds.py has the loop, and explains the options.
"""

import functools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's modules

from machinery.config import PROJECT, exit_with_one_line  # first: it names a missing package

# isort: split

import numpy as np
from drive import CAMERAS, FIRST_SEED, HELD, STEPS
from record import rest_of_episode
from robot import Arm

from examples import closed_loop
from examples.dagger.collecting import answering, ask, collect, measure, takeover
from examples.dagger.rounds import Clock, call, parse_arguments, play_rounds, settings_of
from machinery.files import atomic

TASK = "my_robot"  # all three discs are one task here
# steps before anybody helps. A demonstration has 10: a policy that is not there by now has stopped
PATIENCE = 16


class CorrectedArm(Arm):
    """The arm, with an expert that leaves a closed gripper closed on its way to the disc."""

    def expert(self) -> np.ndarray:
        action = super().expert()
        # a policy that learns to open it also opens it over the disc, to correct a few millimeters
        action[3] = max(action[3], self.target[3] > 0.5)
        return action


@functools.cache
def arm() -> CorrectedArm:
    """This process's robot."""
    return CorrectedArm()


def play_some(robot: Arm, address: str, steps: int) -> list[bool]:
    """Let the policy play for so many steps -> was the goal reached after each of them?"""
    solved = []
    while len(solved) < steps:
        seen = robot.look()
        images = {camera: seen["images"][key] for camera, key in CAMERAS.items()}
        plan = ask(address, (images, seen["state"], robot.instruction))
        for action in plan[: steps - len(solved)]:
            robot.move(action)
            solved.append(robot.solved)
    return solved


def succeeds(task: str, seed: int, job: dict) -> bool:
    """Does the policy by itself reach the goal, and hold it to the end?"""
    robot = arm()
    robot.reset(seed)
    return all(play_some(robot, job["address"], STEPS)[-HELD:])


def record(task: str, seed: int, job: dict) -> dict | None:
    """An episode in which the policy begins and the expert ends, with its part only. None if the
    policy needed no help."""
    robot = arm()
    robot.reset(seed)
    solved = play_some(robot, job["address"], job["patience"] + takeover(seed, job["longest"]))
    if solved and solved[-1]:
        return None
    return {"steps": rest_of_episode(robot)}


# ---- The stages ----------------------------------------------------------------------------------


def answers_of(checkpoint: Path, execute: int):
    """The function from questions of play_some to their answers."""
    from act import load_vla

    policy = load_vla(checkpoint)

    def act(questions: list[tuple]) -> list[np.ndarray]:
        images, states, texts = zip(*questions, strict=True)
        return [*policy.predict_action(images, texts, None, np.stack(states))[:, :execute]]

    return act


def make_base(args, clock: Clock) -> Path:
    """Record 500 demonstrations, and train on them."""
    datasets, run = args.out / "datasets", args.out / "base/run"

    def record_some() -> None:
        if not (datasets / TASK / "1.0.0").exists():
            call([sys.executable, PROJECT / "examples/own_robot/record.py", "--episodes", 500,
                  "--val_episodes", 30, "--out", datasets])

    clock.stage("record", record_some)
    clock.stage("train base", functools.partial(call, [
        sys.executable, PROJECT / "train_vla.py", "--config", PROJECT / "configs/my_robot.yaml",
        "--deepspeed_config", PROJECT / "ds_configs/cpu.json", "--set", f"data_root_dir={datasets}",
        f"run_root_dir={args.out / 'base'}", "run_id=run", f"max_steps={args.base_steps}", "eval_interval=0"]))
    return run


def collect_round(checkpoint: Path, folder: Path, number: int, args, base: Path) -> None:
    """Collect with the policy of a checkpoint."""
    _, dataset = settings_of(base)
    job = {"patience": PATIENCE, "longest": args.execute}  # so it may be relieved within a plan, too
    if args.control:
        job = {"patience": 0, "longest": 0}  # its policy plays no step
    collect(dataset, folder, answers_of(checkpoint, args.execute), record, succeeds, job, [TASK], number,
            args.episodes, args.trials, args.workers)


def play(checkpoint: Path, folder: Path, args) -> None:
    """Count the successes of a policy on the seeds of drive.py, and by its rules."""
    folder.mkdir(parents=True, exist_ok=True)
    with answering(answers_of(checkpoint, args.execute)) as address:
        outcomes = measure(functools.partial(succeeds, job={"address": address}), [TASK], FIRST_SEED,
                           int(args.play), args.workers, folder / "outcomes.json")
    with atomic(folder / "summary.json") as scratch:
        scratch.write_text(json.dumps(closed_loop.rate(outcomes[TASK])))


def results(folder: Path) -> tuple[dict, str] | None:
    """The rate of an evaluation, if there is one."""
    path = folder / "summary.json"
    return (json.loads(path.read_text()), "") if path.exists() else None


if __name__ == "__main__":
    with exit_with_one_line():
        play_rounds(parse_arguments(__doc__, "runs/ask_for_help", episodes=150, repeat=4, steps=300,
                                    base_steps=800, learning_rate=5e-4, execute=8, trials=40, play="200"),
                    make_base, collect_round, play, results)
