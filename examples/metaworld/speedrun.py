"""How many minutes from nothing to a policy for Meta-World's 50 tasks? Records, trains, and plays.

    examples/metaworld/recipe.sh speedrun --num_gpus 1

Prints `stage seconds total` after each stage of recipe.sh, and at the end a row for the table in
README.md, which has the rules. An interrupted command continues where it stopped. Its clock has
not stopped.
"""

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the project's modules

from machinery.config import exit_with_one_line  # first: it names a missing package

# isort: split

from examples.closed_loop import open_folder, versions
from machinery.files import atomic
from machinery.host import cores

COLUMNS = ["date", "machine", "cores", "record", "train", "play", "minutes", "success by seed, %",
           "mean of tasks, %", "commit", "versions"]


def run_stages(stages: dict[str, list[str]], clock: dict, path: Path, environment: dict[str, str]) -> None:
    """Run the stages whose end the clock does not have yet. path: of the clock's file."""
    before = clock["start"]
    for stage, arguments in stages.items():
        if stage not in clock:
            command = [str(ROOT / "examples/metaworld/recipe.sh"), *arguments]
            if code := subprocess.run(command, env={**os.environ, **environment}).returncode:
                sys.exit(f"error: {stage} failed, see above (exit status {code})")
            clock[stage] = time.time()
            store(clock, path)
        print(f"{stage} {clock[stage] - before:.1f} {clock[stage] - clock['start']:.1f}", flush=True)
        before = clock[stage]


def store(clock: dict, path: Path) -> None:
    """Write the clock's file."""
    with atomic(path) as scratch:
        scratch.write_text(json.dumps(clock))


def table_row(clock: dict, summary: dict, gpus: int) -> str:
    """The row of the table, as COLUMNS."""
    import torch

    ends = [clock[name] for name in ("start", "record", "train", "play")]
    minutes = [f"{(end - begin) / 60:.1f}" for begin, end in itertools.pairwise(ends)]
    machine = f"{gpus} x {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "no GPU"
    seeds = [f"{seed}: {100 * part['per_task_average']['rate']:.1f}" for seed, part in summary["seeds"].items()]
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True,
                            text=True).stdout.strip()
    packages = versions(["torch", "transformers", "deepspeed", "mujoco", "metaworld"])
    row = [time.strftime("%Y-%m-%d", time.localtime(clock["start"])), machine, cores(), *minutes,
           f"{(ends[-1] - ends[0]) / 60:.1f}", ", ".join(seeds),
           f"{100 * summary['per_task_average']['rate']:.1f}", commit or "unknown", packages]
    return "| " + " | ".join(map(str, row)) + " |"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--num_gpus", type=int, default=1, help="GPUs that train")
    parser.add_argument("--out", type=Path, default=Path("runs/speedrun"), help="an empty folder")
    for stage in ("record", "train", "play"):
        parser.add_argument(f"--{stage}", default="", metavar="ARGUMENTS",
                            help="more arguments of this stage's script, as one word")
    args = parser.parse_args()
    out = args.out.resolve()
    path = out / "clock.json"
    with exit_with_one_line():
        open_folder(out, {key: str(value) for key, value in vars(args).items()})
    clock = {"start": time.time(), "seeds": sorted(random.sample(range(3, 10_000), 3))}
    if path.exists():
        clock = json.loads(path.read_text())
    store(clock, path)
    seeds = map(str, clock["seeds"])  # of the evaluation: fresh ones
    stages = {
        "record": ["data", *args.record.split()],
        "train": ["train", "eval_interval=2000", "save_interval=2000", *args.train.split()],
        "play": ["rollout", "--seeds", *seeds, "--out", str(out / "rollouts"), *args.play.split()],
    }
    # kernels that were compiled before would save minutes
    caches = {name: str(out / "cache" / name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    run_stages(stages, clock, path, {"WORK": str(out), "NUM_GPUS": str(args.num_gpus), **caches})
    row = table_row(clock, json.loads((out / "rollouts/summary.json").read_text()), args.num_gpus)
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|\n" + row)
    (out / "row.md").write_text(row + "\n")


if __name__ == "__main__":
    main()
