"""Record episodes in many processes, one file per episode until all are done.

    record(task, seed) -> an episode in RLDS' layout, or None if the expert failed

An interrupted command continues where it stopped.
"""

import json
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from machinery.config import UserError

BLOCK = 25  # episodes per job: making a simulator takes seconds


def record_block(record: Callable, task: str, seeds: list[int], scratch: Path) -> list[int]:
    """Record the missing episodes of these seeds -> the seeds at which the expert failed."""
    failed = []
    for seed in seeds:
        path = scratch / f"{task}-{seed}"
        if not path.exists():
            partial = path.with_suffix(".tmp")
            partial.write_bytes(pickle.dumps(record(task, seed)))
            partial.rename(path)
        if read_episode(path) is None:
            failed.append(seed)
    return failed


def read_episode(path: Path) -> dict | None:
    """Read a file of record_block."""
    return pickle.loads(path.read_bytes())


def record_all(record: Callable, wanted: dict[tuple[str, int], int], scratch: Path,
               workers: int) -> dict[tuple[str, int], list[int]]:
    """Record wanted[task, first seed] successful episodes of each -> {(task, first seed): their
    seeds}.

    All jobs share one pool. The next unused seed replaces a seed at which the expert fails.
    """
    seeds = {key: [] for key in wanted}  # attempted so far
    failed = {key: [] for key in wanted}
    jobs = {}
    with (ProcessPoolExecutor(workers, get_context("spawn")) as pool,
          tqdm(total=sum(wanted.values()), desc="record", unit="episode", smoothing=0.05) as bar):

        def attempt(key: tuple[str, int], count: int) -> None:
            task, first = key
            new = [first + len(seeds[key]) + i for i in range(count)]
            seeds[key] += new
            for i in range(0, count, BLOCK):
                job = pool.submit(record_block, record, task, new[i : i + BLOCK], scratch)
                jobs[job] = key, len(new[i : i + BLOCK])

        for key, count in wanted.items():
            attempt(key, count)
        while jobs:
            for job in wait(jobs, return_when=FIRST_COMPLETED).done:
                key, count = jobs.pop(job)
                failed[key] += job.result()
                bar.update(count - len(job.result()))
                if len(failed[key]) > 20 + 5 * wanted[key]:
                    raise RuntimeError(f"{key[0]}: the expert failed {len(failed[key])} times")
                if job.result():
                    attempt(key, len(job.result()))
    for (task, _), tries in seeds.items():
        if failures := len(failed[task, _]):
            print(f"task {task} attempts {len(tries)} expert_failed {failures}")
    return {key: sorted(set(seeds[key]) - set(failed[key])) for key in wanted}


def episodes_from(first_seed: int, kept: dict[tuple[str, int], list[int]], scratch: Path) -> Iterator[dict]:
    """The recorded episodes of a split, in the order of tasks and seeds."""
    for (task, first), seeds in kept.items():
        if first == first_seed:
            yield from (read_episode(scratch / f"{task}-{seed}") for seed in seeds)


def open_scratch(path: Path, recording: dict) -> None:
    """The folder of single episodes. Raises UserError if an earlier command recorded its episodes
    with other options."""
    path.mkdir(parents=True, exist_ok=True)
    known = path / "recording.json"
    if known.exists() and json.loads(known.read_text()) != recording:
        raise UserError(f"{path} holds episodes recorded with other options, {known.read_text()}: repeat "
                        "that command, or remove the folder")
    known.write_text(json.dumps(recording))
