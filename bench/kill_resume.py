"""Kill a training run repeatedly, at random moments, and check that the result is the same.

    python bench/kill_resume.py --cycles 100
    python bench/kill_resume.py --cycles 100 --ranks 2 --as_is
    python bench/kill_resume.py --pid1 2 2 2 2 2 2 2 2 1 2

Each run of --steps steps is killed with SIGKILL, all ranks at once, after a random time: during
startup, training, saving, or resuming. It is restarted until it finishes, at every start with a
newly drawn ZeRO stage.

The stages agree to the last bit only with one rank, float32, and no clipping: each sums the
gradients' norm in its own order, and divides parameters into slices whose last elements the CPU's
AdamW rounds differently. With --as_is, the JSONs are used unmodified, with clipping and on any
number of ranks, and the stage is drawn once per run, because each stage repeats itself bit for bit.

A run passes if the losses, accuracies, and learning rates of all its steps, and all weights and
moments of its last checkpoint, are bit for bit those of the same run without kills. Runs continue
until there were --cycles kills. The processes are forked from one that has imported everything;
otherwise startup would take nearly all of the time.

With --pid1, a run is started once for each of these numbers of ranks, as a container is: by machinery.supervise as
process 1 of a PID namespace (needs root), with deepspeed and torchrun in turn. After a few steps, process 1 gets
SIGTERM, and after 20 seconds SIGKILL. A start passes if no step is lost. The losses are compared with those of a run
with the first number of ranks that was not stopped: until that number changes, they must be the same bit for bit.
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil
import yaml

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "tests")]
os.environ["OMP_NUM_THREADS"] = "1"

import torch
from conftest import ROOT, TINY, launch_command

import train_vla
from machinery import config
from machinery.checkpoint import Checkpoint, list_checkpoints
from machinery.ranks import start_job
from machinery.run import settle

STAGES = ["zero0", "zero1", "zero2", "zero3"]


def start(cfg: dict, ds_config: dict, ranks: int, output: Path) -> list[int]:
    """Fork the ranks of a job -> their process ids."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids = []
    for rank in range(ranks):
        if pid := os.fork():
            pids.append(pid)
            continue
        log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        status = 1
        try:
            neighbor = start_job()
            train_vla.train(**settle(config.TrainConfig(**cfg), ds_config))
            neighbor.release()
            status = 0
        except BaseException as error:
            print(f"error: {type(error).__name__} {error}", flush=True)
        finally:
            os._exit(status)
    return pids


def run_for(pids: list[int], seconds: float) -> bool:
    """Let a job run, and kill it after so many seconds -> True if it finished before that."""
    deadline, statuses = time.time() + seconds, {}
    while len(statuses) < len(pids) and time.time() < deadline:
        time.sleep(0.002)
        for pid in set(pids) - statuses.keys():
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                statuses[pid] = status
    for pid in (left := set(pids) - statuses.keys()):
        os.kill(pid, signal.SIGKILL)
    for pid in left:
        os.waitpid(pid, 0)
    if any(statuses.values()):
        raise RuntimeError(f"a rank failed without being killed: {statuses}")
    return not left


def result(run: Path) -> tuple[list, dict]:
    """The values to compare: the curves, and the last checkpoint's tensors."""
    keys = ("step", "loss", "accuracy", "learning_rate")
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    curves = [[values[key] for key in keys] for values in lines if "loss" in values]
    reader = Checkpoint(list_checkpoints(run / "checkpoints")[-1])
    tensors = {(kind, name): reader.read(name, 0, pieces[-1][1], kind)
               for (kind, name), pieces in reader.pieces.items()}
    return curves, tensors


def same(first: tuple, second: tuple) -> bool:
    """True if both results are equal bit for bit."""
    (curves, tensors), (curves2, tensors2) = first, second
    return (curves == curves2 and tensors.keys() == tensors2.keys()
            and all(torch.equal(tensors[name], tensors2[name]) for name in tensors))


def last_step(run: Path) -> int:
    """The last step in a run's log."""
    log = run / "metrics.jsonl"
    return max((json.loads(line)["step"] for line in log.read_text().splitlines()), default=0) if log.exists() else 0


def stop_as_a_container(config: Path, run: Path, launcher: str, ranks: int, steps: int) -> tuple[int, float]:
    """Start as process 1, stop after so many steps -> how many were lost, and the seconds until all had ended."""
    how = launch_command(config, "--deepspeed_config", "ds_configs/zero2.json", ranks=ranks, launcher=launcher)
    contain = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", sys.executable, "-m", "machinery.supervise"]
    first_step = last_step(run)
    with open(config.with_suffix(".log"), "a") as log:
        job = subprocess.Popen([*contain, *how.pop("args")], stdout=log, stderr=log, **how)
    while last_step(run) < first_step + steps:
        assert job.poll() is None, f"see {log.name}"
        time.sleep(0.05)
    begun = time.time()
    (first,) = psutil.Process(job.pid).children()
    first.terminate()
    try:
        job.wait(20)
    except subprocess.TimeoutExpired:
        first.kill()
        job.wait()
    newest = list_checkpoints(run / "checkpoints")
    saved = Checkpoint(newest[-1]).meta["step"] if newest else 0
    return last_step(run) - saved, time.time() - begun


def as_containers(ranks: list[int], draw: random.Random, root: Path) -> None:
    """What --pid1 does."""
    config = root / "pid1.yaml"
    cfg = {**TINY, "run_root_dir": str(root), "run_id": "pid1", "max_steps": 10_000}
    config.write_text(yaml.safe_dump(cfg))
    failed = 0
    same_until = 0
    for number, count in enumerate(ranks):
        launcher = ["deepspeed", "torchrun"][number % 2]
        lost, seconds = stop_as_a_container(config, root / "pid1", launcher, count, draw.randint(2, 8))
        failed += lost > 0
        if ranks[: number + 1] == ranks[:1] * (number + 1):
            same_until = last_step(root / "pid1")
        print(f"start {number + 1} launcher {launcher} ranks {count} step {last_step(root / 'pid1')} lost {lost} "
              f"seconds {seconds:.1f}", flush=True)
    steps = last_step(root / "pid1")
    ds_config = json.loads((ROOT / "ds_configs/zero2.json").read_text())
    straight = {**cfg, "run_id": "straight", "max_steps": steps}
    assert run_for(start(straight, ds_config, ranks[0], root / "straight.log"), 3600)
    losses = [{values["step"]: values["loss"] for values in map(json.loads, open(root / name / "metrics.jsonl"))
               if "loss" in values} for name in ("pid1", "straight")]
    differences = [abs(losses[0][step] - losses[1][step]) for step in range(1, steps + 1)]
    identical = not any(differences[:same_until])
    print(f"starts {len(ranks)} without_loss {len(ranks) - failed} identical_until_step {same_until} {identical} "
          f"largest_difference_after {max(differences[same_until:], default=0):.2g}")
    sys.exit(failed > 0 or not identical)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cycles", type=int, default=100, help="number of kills")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--longest", type=float, default=8.0, help="seconds until the latest kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--as_is", action="store_true", help="unmodified JSONs, one stage per run")
    parser.add_argument("--pid1", type=int, nargs="+", metavar="RANKS", help="stop containers instead, see above")
    args = parser.parse_args()
    if args.ranks > 1 and not args.as_is:
        parser.error("stages only agree bit for bit on one rank: use --as_is with --ranks")
    draw, root = random.Random(args.seed), Path(tempfile.mkdtemp(prefix="kill_resume"))
    if args.pid1:
        as_containers(args.pid1, draw, root)
    configs = {stage: json.loads((ROOT / f"ds_configs/{stage}.json").read_text()) for stage in STAGES}
    cfg = {**TINY, "run_root_dir": str(root), "max_steps": args.steps, "save_interval": 2, "image_aug": True,
           "freeze_vision_backbone": True, "lr_scheduler_type": "linear-warmup+cosine-decay",
           "warmup_ratio": 0.1}
    if not args.as_is:
        cfg["max_grad_norm"] = 1e9
        configs = {stage: {**config, "bf16": {"enabled": False}} for stage, config in configs.items()}

    references, kills, passed, runs, where = {}, 0, 0, 0, Counter()
    while kills < args.cycles:
        stage = draw.choice(STAGES)
        if (reference := stage if args.as_is else "any") not in references:
            name = f"straight-{reference}"
            job = start({**cfg, "run_id": name}, configs[stage], args.ranks, root / f"{name}.log")
            assert run_for(job, 3600)
            references[reference] = result(root / f"{name}--image_aug")
        name, cycles = f"run{runs}", 0
        run = root / f"{name}--image_aug"
        while True:
            if not args.as_is:
                stage = draw.choice(STAGES)
            # after enough kills, let the last runs finish
            seconds = draw.uniform(0, args.longest) if kills < args.cycles else 3600
            before = len(list_checkpoints(run / "checkpoints"))
            job = start({**cfg, "run_id": name}, configs[stage], args.ranks, root / f"{name}.log")
            if run_for(job, seconds):
                break
            kills, cycles = kills + 1, cycles + 1
            if list(run.glob("checkpoints/*.tmp")):
                where["saving"] += 1
            elif not before and not list_checkpoints(run / "checkpoints"):
                where["before_the_first_checkpoint"] += 1
            else:
                where["elsewhere"] += 1
        good = same(result(run), references[reference])
        runs, passed = runs + 1, passed + good
        print(f"run {runs} stage {reference} ranks {args.ranks} kills {cycles} identical {good} kills_so_far "
              f"{kills} {' '.join(f'{key} {value}' for key, value in where.items())}", flush=True)
        shutil.rmtree(run) if good else print(f"kept {run}", flush=True)
    print(f"kills {kills} runs {runs} identical {passed}/{runs}")
    sys.exit(passed != runs)


if __name__ == "__main__":
    main()
