"""The lesson: a weak policy of the arm tries to get better by itself, on two CPU cores.

    python examples/rl/lesson.py --out runs/rl_lesson
    python examples/rl/lesson.py --out runs/rl_lesson --controls

It does not get better yet: docs/rl.md has the figures. Records 100 demonstrations, trains a weak
policy with them, and continues with reinforcement (rl.py). An episode is one decision (reach.py).
Then both play 200 episodes from starts that neither has seen: a table, and a film of six.
--controls adds two rows: filtered cloning (as many episodes, only the successful ones imitated) and
more training on the demonstrations, for as long as reinforcement took. A stage that has ended is
not repeated.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from machinery.config import exit_with_one_line  # first: it names a missing package

# isort: split

import numpy as np
from PIL import Image

from examples.closed_loop import SIDE, draw_films, encode_film, rate, row
from examples.rl.worlds import Reach

FIRST_SEED = 200_000  # as drive.py's: no demonstration and no start of reinforcement has these
FILMED = 6  # the first episodes
OPTIONS = ["--groups", 40, "--updates", 1, "--temperature", 0.5, "--noise", "independent"]  # of rl.py


def stage(out: Path, name: str, script: str, *arguments) -> float:
    """Run one of the project's programs, unless it has been done -> the seconds it took."""
    done = out / f"{name}.json"
    if not done.exists():
        print(f"stage {name}", flush=True)
        began = time.perf_counter()
        with open(out / f"{name}.log", "w") as log:
            subprocess.run([sys.executable, ROOT / script, *map(str, arguments)], check=True, stdout=log,
                           stderr=subprocess.STDOUT)
        done.write_text(json.dumps({"seconds": time.perf_counter() - began}))
    return json.loads(done.read_text())["seconds"]


def evaluate(checkpoint: Path, out: Path, name: str, episodes: int) -> list[bool]:
    """Play greedily, by the same `predict_action` as a server -> which episodes succeed. Films the
    first ones: OUT/NAME-0.webp, ..."""
    results = out / f"{name}.outcomes.json"
    if results.exists():
        return json.loads(results.read_text())
    from act import load_vla  # here: it imports PyTorch

    policy, world, outcomes = load_vla(checkpoint), Reach(["outside"], []), []
    for first in range(FIRST_SEED, FIRST_SEED + episodes, world.together):
        seeds = range(first, min(first + world.together, FIRST_SEED + episodes))
        robots = world.robots[: len(seeds)]
        for robot, seed in zip(robots, seeds, strict=True):
            robot.reset(seed)
        images, states = zip(*world.look(robots), strict=True)
        texts = [robot.instruction for robot in robots]
        for robot, action in zip(robots, policy.predict_action(images, texts, None, np.stack(states)), strict=True):
            if len(outcomes) < FILMED:
                film = [picture(robot)]
                robot.move(action, lambda robot=robot, film=film: film.append(picture(robot)))
                (out / f"{name}-{len(outcomes)}.webp").write_bytes(encode_film(film))
            else:
                robot.move(action)
            outcomes.append(robot.solved)
    results.write_text(json.dumps(outcomes))
    return outcomes


def picture(robot) -> Image.Image:
    """An image of a film."""
    return Image.fromarray(robot.look()["images"]["outside"]).resize((SIDE, SIDE))


def newest(run: Path) -> Path:
    """A run's newest checkpoint."""
    return sorted((run / "checkpoints").glob("step-*"))[-1]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder for data, runs, and results")
    parser.add_argument("--demonstrations", type=int, default=100, help="to train the weak policy with")
    parser.add_argument("--steps", type=int, default=50, help="of its training, with 32 samples each")
    parser.add_argument("--episodes", type=int, default=5000, help="of reinforcement")
    parser.add_argument("--trials", type=int, default=200, help="episodes of the evaluation")
    parser.add_argument("--controls", action="store_true", help="also what to compare with")
    parser.add_argument("--rl", nargs=argparse.REMAINDER, default=[], help="the rest: options of rl.py")
    args = parser.parse_args()
    out = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    record = ["--episodes", args.demonstrations, "--val_episodes", 20, "--out", out / "datasets"]
    cpu = ["--deepspeed_config", ROOT / "ds_configs/cpu.json", "--set", f"data_root_dir={out / 'datasets'}",
           f"run_root_dir={out}"]
    train = ["--config", ROOT / "examples/rl/reach.yaml", *cpu]
    with exit_with_one_line():
        stage(out, "record", "examples/rl/reach.py", *record)
        seconds = {"weak": stage(out, "weak", "train_vla.py", *train, "run_id=weak", f"max_steps={args.steps}")}
        start = f"pretrained_checkpoint={out / 'weak'}"
        learn = ["--world", "reach", "--execute", 1, *OPTIONS, "--episodes", args.episodes, *args.rl, "--config",
                 ROOT / "examples/rl/arm.yaml", *cpu, start]
        seconds["grpo"] = stage(out, "grpo", "examples/rl/rl.py", *learn, "run_id=grpo")
        if args.controls:
            seconds["cloning"] = stage(out, "cloning", "examples/rl/rl.py", "--method", "cloning", *learn,
                                       "run_id=cloning")
            more = round(args.steps * seconds["grpo"] / seconds["weak"])
            seconds["more"] = stage(out, "more", "train_vla.py", *train, start, "is_resume=false", "run_id=more",
                                    f"max_steps={more}")
    outcomes = {name: evaluate(newest(out / name), out, name, args.trials) for name in seconds}
    for name, found in outcomes.items():
        print(row(name, rate(found), 8), f" seconds {seconds[name]:.0f}")
    draw_films([(f"{name}, episode {i}", out / f"{name}-{i}.webp", outcomes[name][i])
                for name in ("weak", "grpo") for i in range(FILMED)], out)
    print(f"film {out / 'rollouts.webp'}")


if __name__ == "__main__":
    main()
