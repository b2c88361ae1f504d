"""You are the expert: the policy drives until you press Enter, then you take over.

    python serve_vla.py --checkpoint runs/my_robot+n1+b32+x7                  in one terminal, and
    python examples/own_robot/take_over.py --run runs/my_robot+n1+b32+x7      in another

Only your part is recorded: from the moment at which you take over until the goal is held. If you
press nothing, the policy needed no help, and nothing is recorded. "q" and Enter ends early and
keeps what was recorded. Then it prints the command that trains on, with the old data and yours.

With the simulated arm, its `expert` moves for you. With a robot, teleoperate it: `Arm.expert`
returns the command that your leader arm or joystick gives. Read corrections.
"""

import argparse
import os
import select
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project's modules

from machinery.config import exit_with_one_line  # first: it names a missing package

# isort: split

from drive import STEPS, ask
from record import features, rest_of_episode
from robot import Arm

from examples.dagger.rounds import join, settings_of, statistics_of
from machinery.rlds import write_rlds

FIRST_SEED = 90_000  # of the simulated arm, used by no other program here
STEP = 0.1  # seconds. The simulated arm would be too fast for you; a robot takes its time in `move`


def key() -> str | None:
    """What you have typed: "" for Enter alone, None if you have not pressed Enter."""
    ready, _, _ = select.select([sys.stdin], [], [], 0)
    text = os.read(sys.stdin.fileno(), 1000) if ready else b""
    return text.decode().strip() if text else None


def corrections(robot: Arm, url: str, episodes: int) -> Iterator[dict]:
    """Generate your parts of so many episodes, one at a time."""
    for seed in range(FIRST_SEED, FIRST_SEED + episodes):
        robot.reset(seed)  # with a robot: put the objects elsewhere
        pressed, steps, plan = None, 0, []
        print(f"{robot.instruction}: Enter takes over", flush=True)
        while pressed is None and steps < STEPS:
            plan = plan or [*ask(url, robot.look(), robot.instruction, [])]
            robot.move(plan.pop(0))
            time.sleep(STEP)
            pressed, steps = key(), steps + 1
        if pressed == "q":
            return
        if pressed is not None:
            print("yours", flush=True)
            yield {"steps": rest_of_episode(robot)}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="the policy's training run")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where serve_vla.py listens")
    parser.add_argument("--episodes", type=int, default=20, help="how many")
    parser.add_argument("--out", type=Path, default=Path("helped"), help="a new folder")
    args = parser.parse_args()
    with exit_with_one_line():
        _, dataset = settings_of(args.run)
        name, robot = dataset.parent.name, Arm()
        new = write_rlds(args.out / "new", name, "1.0.0", features(robot),
                         {"train": corrections(robot, args.url, args.episodes)})
        join([dataset, new], args.out / "datasets" / name / dataset.name, statistics_of(args.run))
    print(f"python train_vla.py --config {args.run}/config.yaml --deepspeed_config {args.run}/ds_config.json "
          f"--set data_root_dir={args.out}/datasets run_root_dir={args.out} run_id=run "
          f"pretrained_checkpoint={args.run} is_resume=false max_steps=600 learning_rate=5e-4")


if __name__ == "__main__":
    main()
