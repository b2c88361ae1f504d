"""Kill a training run repeatedly, at random moments, and check that the result is the same.

    python bench/kill_resume.py --cycles 100
    python bench/kill_resume.py --cycles 100 --ranks 2 --as_is

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
"""

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "tests")]
os.environ["OMP_NUM_THREADS"] = "1"

import torch
from conftest import ROOT, TINY

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
            train_vla.train(ds_config=ds_config, **settle(config.TrainConfig(**cfg)))
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cycles", type=int, default=100, help="number of kills")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--longest", type=float, default=8.0, help="seconds until the latest kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--as_is", action="store_true", help="unmodified JSONs, one stage per run")
    args = parser.parse_args()
    if args.ranks > 1 and not args.as_is:
        parser.error("stages only agree bit for bit on one rank: use --as_is with --ranks")
    draw, root = random.Random(args.seed), Path(tempfile.mkdtemp(prefix="kill_resume"))
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
