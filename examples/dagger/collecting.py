"""Collect episodes in which the policy begins and the expert ends.

A round of DAgger: the policy plays k steps of an episode, k drawn from 0..T, then the expert plays
to the end. Only the expert's part is kept. So the policy itself chooses the states in which it is
taught, and the labels of an action chunk are still one plan, because one player made them all.

Every simulator is its own process (examples/recording.py). The policy is in this one: `answering`
answers all waiting processes as one batch. Read collect, then answering.
"""

import contextlib
import functools
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path

import numpy as np
from tqdm import tqdm

from examples.recording import episodes_from, record_all, render_on_gpu
from machinery.files import atomic
from machinery.frames import end_with_parent
from machinery.rlds import write_rlds

# Seeds of collecting. Recordings begin at 0 and at 100,000 (held out), evaluations at 200,000
FIRST_SEED = 110_000
PER_ROUND = 10_000  # so there are nine rounds
TRIED = 9_000  # of them; from here on those of `measure`
ROUNDS = range(1, 10)
FLOOR = 0.02  # of p (1 - p), so that no task gets nothing


# ---- Where the policy is -------------------------------------------------------------------------


@contextlib.contextmanager
def answering(act: Callable[[list], list]) -> Iterator[str]:
    """Meanwhile, a thread answers the questions of other processes, all that wait as one batch.
    Yields the address to ask at. act: questions -> an answer for each."""
    listener = Listener(family="AF_UNIX")
    connections: list[Connection] = []
    ended = threading.Event()

    def accept() -> None:
        while True:
            connection = listener.accept()
            if ended.is_set():
                connection.close()
            else:
                connections.append(connection)

    def answer() -> None:
        try:
            while not ended.is_set():
                asking, questions = [], []
                for connection in wait(connections, timeout=0.05):  # new ones join after this
                    try:
                        questions.append(connection.recv())
                    except EOFError:  # its process has ended
                        connections.remove(connection)
                        continue
                    asking.append(connection)
                for connection, reply in zip(asking, act(questions) if asking else [], strict=True):
                    connection.send(reply)
        finally:  # if `act` failed, nobody may wait forever
            ended.set()
            for connection in connections:
                connection.close()

    threads = [threading.Thread(target=target, daemon=True) for target in (accept, answer)]
    for thread in threads:
        thread.start()
    yield listener.address
    ended.set()
    threads[1].join()


@functools.cache
def policy_at(address: str) -> Connection:
    """This process's connection to the policy."""
    return Client(address)


def ask(address: str, question):
    """In a simulator's process: the policy's answer."""
    policy_at(address).send(question)
    return policy_at(address).recv()


# ---- A round -------------------------------------------------------------------------------------


def takeover(seed: int, longest: float) -> int:
    """After how many of its steps the policy of this episode is relieved: 0..longest."""
    return int(np.random.default_rng([seed, 2]).integers(0, int(longest) + 1))


def collect(dataset: Path, folder: Path, act: Callable, record: Callable, succeeds: Callable, job: dict,
            tasks: list[str], number: int, episodes: int, trials: int, workers: int) -> None:
    """Round `number`: write FOLDER/new, a dataset with the layout of `dataset`.

    record(task, seed, job) -> an episode, or None if the policy needed no help or the expert failed
    succeeds(task, seed, job) -> whether the policy by itself does the task
    job: what they need, a dict that any process can read; they find the policy in job["address"].
    """
    import tensorflow_datasets as tfds  # imported here: the simulators' processes do not need it

    shutil.rmtree(folder / "new", ignore_errors=True)  # an earlier command was killed
    scratch, first_seed = folder / ".episodes", FIRST_SEED + PER_ROUND * (number - 1)
    scratch.mkdir(parents=True, exist_ok=True)
    with answering(act) as address:
        job = {**job, "address": address}
        before = measure(functools.partial(succeeds, job=job), tasks, first_seed + TRIED, trials,
                         workers, folder / "before.json")
        counts = allot(before, episodes, number)
        wanted = {(task, first_seed): count for task, count in counts.items()}
        layout = tfds.features.FeaturesDict.from_config(str(dataset))
        kept = record_all(functools.partial(record, job=job), layout, wanted, scratch, workers, insist=False)
    write_rlds(folder / "new", dataset.parent.name, "1.0.0", layout,
               {"train": episodes_from(first_seed, kept, scratch)})
    found = {task: len(seeds) for (task, _), seeds in kept.items()}
    (folder / "collected.json").write_text(json.dumps(found, indent=1))
    print(f"collected {sum(found.values())} of {episodes}")
    shutil.rmtree(scratch)


def measure(succeeds: Callable, tasks: list[str], first_seed: int, trials: int, workers: int,
            path: Path) -> dict[str, list[bool]]:
    """Let the policy play -> {task: did it succeed?}, also in a file, so that it plays only once."""
    if path.exists():
        return json.loads(path.read_text())
    blocks = [(task, range(first, min(first + 5, first_seed + trials)))
              for task in tasks for first in range(first_seed, first_seed + trials, 5)]
    outcomes = {task: [] for task in tasks}
    with (ProcessPoolExecutor(min(workers, len(blocks)), get_context("spawn"), end_with_parent) as pool,
          tqdm(total=len(tasks) * trials, desc="measure", unit="episode") as bar):
        jobs = []
        for number, block in enumerate(blocks):
            render_on_gpu(number)
            jobs.append(pool.submit(play_block, succeeds, *block))  # the first ones start a process each
        for (task, _), job in zip(blocks, jobs, strict=True):
            outcomes[task] += job.result()
            bar.update(len(job.result()))
    with atomic(path) as partial:
        partial.write_text(json.dumps(outcomes))
    return outcomes


def play_block(succeeds: Callable, task: str, seeds: range) -> list[bool]:
    """Some trials of a task, in one process: making a simulator takes a second."""
    return [bool(succeeds(task, seed)) for seed in seeds]


def allot(before: dict[str, list[bool]], episodes: int, number: int) -> dict[str, int]:
    """Draw how many of the episodes each task gets: in proportion to p (1 - p) + FLOOR, where p is
    its success rate. Below one half, more failures do not mean fewer episodes."""
    p = np.array([np.mean(outcomes) for outcomes in before.values()]).clip(0.5)
    weights = p * (1 - p) + FLOOR
    counts = np.random.default_rng([number, 3]).multinomial(episodes, weights / weights.sum())
    return dict(zip(before, counts.tolist(), strict=True))
