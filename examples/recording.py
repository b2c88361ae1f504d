"""Record episodes in many processes, one file per episode until all are done.

    record(task, seed) -> an episode in RLDS' layout, or None if there is none, as the expert failed

An interrupted command continues where it stopped. Read record_all.
"""

import functools
import glob
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from machinery.config import UserError
from machinery.frames import end_with_parent
from machinery.rlds import serializer

CHOSEN_GPU = os.environ.get("MUJOCO_EGL_DEVICE_ID")


@functools.cache
def serializer_of(scratch: Path) -> Callable[[dict], bytes]:
    """The function from an episode to its record, by the layout that record_all has put there."""
    import tensorflow_datasets as tfds

    return serializer(tfds.features.FeaturesDict.from_config(str(scratch)))


def record_episode(record: Callable, task: str, seed: int, scratch: Path) -> bool:
    """Record an episode, unless that has been done -> did the expert succeed? If not, its file is
    empty."""
    path = record_path(scratch, task, seed)
    if not path.exists():
        episode, partial = record(task, seed), path.with_suffix(".tmp")
        partial.write_bytes(serializer_of(scratch)(episode) if episode else b"")
        partial.rename(path)
    return path.stat().st_size > 0


def record_path(scratch: Path, task: str, seed: int) -> Path:
    """The file of an episode."""
    return scratch / f"{task}-{seed}.record"


def record_all(record: Callable, features: dict, wanted: dict[tuple[str, int], int], scratch: Path,
               workers: int, insist: bool = True) -> dict[tuple[str, int], list[int]]:
    """Record wanted[task, first seed] successful episodes of each -> {(task, first seed): their
    seeds}, the first at which the expert succeeds. features: as for write_rlds.

    Each process gets one episode after the other, of the same task if possible. If a task fails too
    often, it raises RuntimeError or, unless it should insist, keeps fewer episodes.
    """
    import tensorflow_datasets as tfds

    tfds.features.FeaturesDict(features).save_config(str(scratch))
    left = dict(wanted)  # episodes that nobody records yet
    seeds, failed = {key: [] for key in wanted}, Counter()  # seeds: of episodes to keep
    attempts, last_task, jobs = Counter(), {}, {}
    with ExitStack() as stack:
        pools = []  # each of one process, because it is to keep its simulator
        for number in range(min(workers, sum(wanted.values()))):
            render_on_gpu(number)
            pools.append(stack.enter_context(
                ProcessPoolExecutor(1, get_context("spawn"), end_with_parent)))
            pools[-1].submit(os.getpid)  # starts the process
        idle = [*pools]
        bar = stack.enter_context(tqdm(total=sum(wanted.values()), desc="record", unit="episode",
                                       smoothing=0.05))
        while jobs or any(left.values()):
            while idle and any(left.values()):
                pool = idle.pop()
                key = choose(left, last_task.pop(pool, None), Counter(last_task.values()))
                seed = key[1] + attempts[key]
                attempts[key] += 1
                left[key] -= 1
                last_task[pool] = key[0]
                jobs[pool.submit(record_episode, record, key[0], seed, scratch)] = pool, key, seed
            for job in wait(jobs, return_when=FIRST_COMPLETED).done:
                pool, key, seed = jobs.pop(job)
                idle.append(pool)
                if job.result():
                    seeds[key].append(seed)
                    bar.update()
                else:  # another seed replaces it
                    left[key] += 1
                    failed[key] += 1
                if failed[key] > 20 + 5 * wanted[key]:
                    if insist:
                        raise RuntimeError(f"{key[0]}: the expert failed {failed[key]} times")
                    left[key] = 0
    for key, failures in failed.items():
        print(f"task {key[0]} attempts {attempts[key]} without_episode {failures}")
    return {key: sorted(found) for key, found in seeds.items()}


def choose(left: dict[tuple[str, int], int], last: str | None, at_work: Counter) -> tuple[str, int]:
    """What a process records next: its last task, because making a simulator takes a second, else
    the task with most episodes left for each process that is at it."""
    keys = [key for key, count in left.items() if count]
    same = [key for key in keys if key[0] == last]
    return same[0] if same else max(keys, key=lambda key: left[key] / (1 + at_work[key[0]]))


def render_on_gpu(number: int) -> None:
    """Let the next process that starts render on one of the GPUs in turn. MuJoCo would always use
    the first."""
    gpus = [*range(len(glob.glob("/dev/nvidia[0-9]*")))]
    if shown := os.environ.get("CUDA_VISIBLE_DEVICES"):
        gpus = [name for name in shown.split(",") if name.isdigit()]
    if len(gpus) > 1 and CHOSEN_GPU is None:
        os.environ["MUJOCO_EGL_DEVICE_ID"] = str(gpus[number % len(gpus)])


def episodes_from(first_seed: int, kept: dict[tuple[str, int], list[int]], scratch: Path) -> Iterator[bytes]:
    """The records of a split, in the order of tasks and seeds."""
    for (task, first), seeds in kept.items():
        if first == first_seed:
            yield from (record_path(scratch, task, seed).read_bytes() for seed in seeds)


def open_scratch(path: Path, recording: dict) -> None:
    """The folder of single episodes. Raises UserError if an earlier command recorded its episodes
    with other options."""
    path.mkdir(parents=True, exist_ok=True)
    known = path / "recording.json"
    if known.exists() and json.loads(known.read_text()) != recording:
        raise UserError(f"{path} holds episodes recorded with other options, {known.read_text()}: repeat "
                        "that command, or remove the folder")
    known.write_text(json.dumps(recording))
