"""The lesson: a weak policy of the arm gets better by itself, on two CPU cores.

    python examples/rl/lesson.py --out runs/rl_lesson
    python examples/rl/lesson.py --out runs/rl_lesson --controls

Records demonstrations, trains a policy with them for a few steps, and continues with reinforcement
(rl.py), which sees no demonstrations. An episode is one decision (reach.py). Then both play 400
episodes from starts that neither has seen: a table, and a film of six. --controls adds two rows:
filtered cloning (as many episodes, only the successful ones imitated) and more training on the
demonstrations, for as much CPU time as reinforcement took. A stage that has ended is not repeated.
"""

import argparse
import json
import resource
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

FIRST_SEED = 250_000  # not of demonstrations, nor of reinforcement, nor of the choice of settings
FILMED = 6  # the first episodes
OPTIONS = ["--groups", 64, "--updates", 1, "--temperature", 1]  # of rl.py


def stage(out: Path, name: str, script: str, *arguments) -> dict:
    """Run one of the project's programs, unless it has been done -> {seconds, cpu_seconds} it took."""
    done = out / f"{name}.json"
    if not done.exists():
        print(f"stage {name}", flush=True)
        began, used = time.perf_counter(), cpu_seconds()
        with open(out / f"{name}.log", "w") as log:
            subprocess.run([sys.executable, ROOT / script, *map(str, arguments)], check=True, stdout=log,
                           stderr=subprocess.STDOUT)
        took = {"seconds": time.perf_counter() - began, "cpu_seconds": cpu_seconds() - used}
        done.write_text(json.dumps(took))
    return json.loads(done.read_text())


def cpu_seconds() -> float:
    """The CPU time of all programs that this one has run."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def evaluate(checkpoint: Path, out: Path, name: str, episodes: int) -> list[dict]:
    """Play greedily, by the same `predict_action` as a server -> {instruction, success} of each
    episode. Films the first ones: OUT/NAME-0.webp, ..."""
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
            outcomes.append({"instruction": robot.instruction, "success": robot.solved})
    results.write_text(json.dumps(outcomes))
    return outcomes


def picture(robot) -> Image.Image:
    """An image of a film."""
    return Image.fromarray(robot.look()["images"]["outside"]).resize((SIDE, SIDE))


def newest(run: Path) -> Path:
    """A run's newest checkpoint."""
    return sorted((run / "checkpoints").glob("step-*"))[-1]


def print_row(name: str, outcomes: list[dict], took: dict) -> None:
    """A policy's success, its times, and below them its success with each instruction."""
    times = " ".join(f"{key} {value:.0f}" for key, value in took.items())
    print(row(name, rate([one["success"] for one in outcomes]), 8), f" {times}")
    for text in sorted({one["instruction"] for one in outcomes}):
        print(row(f"  {text}", rate([one["success"] for one in outcomes if one["instruction"] == text]), 24))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder for data, runs, and results")
    parser.add_argument("--demonstrations", type=int, default=2000, help="to train the weak policy with")
    parser.add_argument("--steps", type=int, default=900, help="of its training, with 32 samples each")
    parser.add_argument("--episodes", type=int, default=30_000, help="of reinforcement")
    parser.add_argument("--trials", type=int, default=400, help="episodes of the evaluation")
    parser.add_argument("--controls", action="store_true", help="also what to compare with")
    parser.add_argument("--rl", nargs=argparse.REMAINDER, default=[], help="the rest: options of rl.py")
    args = parser.parse_args()
    out = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    record = ["--episodes", args.demonstrations, "--val_episodes", 20, "--out", out / "datasets"]
    cpu = ["--deepspeed_config", ROOT / "ds_configs/cpu.json", "--set", f"data_root_dir={out / 'datasets'}",
           f"run_root_dir={out}"]
    train = ["--config", ROOT / "examples/rl/reach.yaml", *cpu]
    start = f"pretrained_checkpoint={out / 'weak'}"
    learn = ["--world", "reach", "--execute", 1, *OPTIONS, "--episodes", args.episodes, *args.rl, "--config",
             ROOT / "examples/rl/arm.yaml", *cpu, start]
    with exit_with_one_line():
        stage(out, "record", "examples/rl/reach.py", *record)
        took = {"weak": stage(out, "weak", "train_vla.py", *train, "run_id=weak", f"max_steps={args.steps}")}
        took["grpo"] = stage(out, "grpo", "examples/rl/rl.py", *learn, "run_id=grpo")
        if args.controls:
            took["cloning"] = stage(out, "cloning", "examples/rl/rl.py", "--method", "cloning", *learn,
                                    "run_id=cloning")
            more = round(args.steps * took["grpo"]["cpu_seconds"] / took["weak"]["cpu_seconds"])
            took["more"] = stage(out, "more", "train_vla.py", *train, start, "is_resume=false", "run_id=more",
                                 f"max_steps={more}")
    outcomes = {name: evaluate(newest(out / name), out, name, args.trials) for name in took}
    for name, found in outcomes.items():
        print_row(name, found, took[name])
    films = [(f"{name}: {outcomes[name][i]['instruction']}", out / f"{name}-{i}.webp", outcomes[name][i]["success"])
             for name in ("weak", "grpo") for i in range(FILMED)]
    draw_films(films, out)
    print(f"film {out / 'rollouts.webp'}")


if __name__ == "__main__":
    main()
