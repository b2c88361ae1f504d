"""Starting and stopping all ranks of a job together: signals, dead ranks, broken numbers.

A rank that stops on its own leaves the others waiting in a collective, for minutes and silently. So
ranks stop together: Preemption lets all of them stop after the same step, Neighbor ends a rank
within moments of another's death, and stop_if_not_finite depends only on numbers that are the same
on all ranks.
"""

import contextlib
import io
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta

import deepspeed
import psutil
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from data import TrainBatches
from machinery import host
from machinery.config import UserError, exit_with_one_line
from machinery.connect import connect, gather, patient_group, print_line, progress
from machinery.frames import FULL, STOP_SIGNALS, DataError

# ---- Signals -----------------------------------------------------------------------------------


class Preemption:
    """Whether the run should end: SIGTERM, SIGUSR1 or Ctrl-C to any rank, or the launcher's death.

    A second Ctrl-C ends the rank at once. A signal to one rank counts for all, because DeepSpeed's
    launcher passes SIGTERM on to one rank after another.
    """

    def __init__(self):
        self.rank = dist.get_rank()
        self.reason: str | None = None
        self.noted_at = math.inf
        self.flag = torch.zeros(1)
        self.vote = None
        self.launchers = launchers()
        if self.rank == 0 and lost_in_container():
            print("warning: this container's first process does not pass SIGTERM on to the ranks: "
                  "when the container is stopped, nothing is saved. Start with python -m "
                  "machinery.supervise deepspeed ..., or with torchrun", flush=True)
        self.previous = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}

    def _note(self, number, frame) -> None:
        # launchers may pass one Ctrl-C on twice
        if number == signal.SIGINT and time.monotonic() > self.noted_at + 1:
            os._exit(128 + number)
        if self.rank == 0 and not self.reason:  # print() may not be interrupted by itself
            os.write(2, b"\nstopping: saving after this step; Ctrl-C again to stop at once\n")
        self.reason = signal.Signals(number).name
        self.noted_at = time.monotonic()

    def requested(self) -> bool:
        """Whether any rank had a reason one step ago. Every rank calls this after every step.

        The answer is the same on all ranks, and a step late so that no rank waits for it.
        """
        if launchers() != self.launchers and not self.reason:
            self.reason = "the end of its launcher"
        if self.vote is not None:
            self.vote.wait()
        answer = bool(self.flag.item())
        self.flag.fill_(self.reason is not None)
        self.vote = dist.all_reduce(
            self.flag, dist.ReduceOp.MAX, group=patient_group(), async_op=True)
        return answer

    def close(self) -> None:
        """Wait for the last vote and restore the signals' previous handlers."""
        if self.vote is not None:
            self.vote.wait()
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def launchers() -> list[int]:
    """Process ids of DeepSpeed's two launchers: the rank's parent, and `deepspeed` above it.

    If one of them ends, another process takes its place. Watching the parent is not enough: a
    signal kills `deepspeed` only, and the job would run on. Other launchers end their ranks.
    """
    if "CROSS_RANK" not in os.environ:  # set only by DeepSpeed's launcher
        return []
    return [process.pid for process in psutil.Process().parents()[:2]]


def lost_in_container() -> bool:
    """Whether DeepSpeed's launchers keep a container's SIGTERM from the ranks.

    It goes to process 1. The kernel drops it if that process has no handler, as `deepspeed` and
    shells; and if an init process passes it on, `deepspeed` ends, and with it the container.
    """
    if not launchers():
        return False
    first = psutil.Process().parents()[:3][-1]
    ours = any("supervise" in word for word in first.cmdline())
    return first.pid == 1 and not ours and first.name() not in ("systemd", "init")


# ---- Dead ranks --------------------------------------------------------------------------------


class Neighbor:
    """Ends this process when the previous rank dies, and so, around the ring, all ranks of the job.

    A thread waits for a message that is only sent at the very end of the program. When a process
    dies, the kernel closes its connections, and the waiting fails.
    """

    def __init__(self):
        self.group = dist.new_group(backend="gloo", timeout=timedelta(days=365))
        self.watcher = threading.Thread(target=self._watch, daemon=True)
        if dist.get_world_size() > 1:
            self.watcher.start()

    def _watch(self) -> None:
        previous = (dist.get_rank() - 1) % dist.get_world_size()
        try:
            dist.recv(torch.zeros(1), previous, group=self.group)
        except RuntimeError:
            time.sleep(0.5)  # if this rank fails for the same reason, let it name the reason
            print_line(f"rank {dist.get_rank()} ends because rank {previous} ended")
            os._exit(1)

    def release(self) -> None:
        """End cleanly: send the message to the next rank, and wait for the previous one's."""
        progress.stop()
        if dist.get_world_size() > 1:
            following = (dist.get_rank() + 1) % dist.get_world_size()
            dist.send(torch.zeros(1), following, group=self.group)
            self.watcher.join()


# ---- Bad data and broken numbers ---------------------------------------------------------------


LOADER = ("DataLoader worker (pid", "shared memory", "open files", "ancdata", "Pin memory thread")


def next_batch(batches: Iterator, step: int) -> dict:
    """The DataLoader's next batch.

    Raises DataError naming step and rank if a worker died, or if the batch is an error.
    TrainBatches returns errors in the data, because PyTorch would turn raised ones into the text of
    a traceback.
    """
    where = f"step {step} rank {dist.get_rank()}"
    progress.at(f"load the data of step {step}")
    try:
        batch = next(batches)
    except (ConnectionError, EOFError) as error:  # a dying worker first closes its connections
        raise DataError(f"{where}: DataLoader worker ended while sending {FULL}") from error
    except (RuntimeError, OSError) as error:
        text = str(error).strip()
        if not any(words in text for words in LOADER):
            raise
        cause = text.splitlines()[-1].partition(". ")[0]
        raise DataError(f"{where}: {cause} {FULL}") from error
    if isinstance(batch, Exception):
        raise DataError(f"{where}: {batch}") from batch
    progress.at(f"compute step {step}")
    return batch


def stop_if_not_finite(
    values: dict, losses: list[torch.Tensor], step: int, batches: TrainBatches
) -> None:
    """Raise UserError on every rank if the loss or the gradients of a step are NaN or infinite.

    values: "loss" and "grad_norm", the same on all ranks; losses: this rank's, one per micro-batch
    of the step. The message names the first rank with a broken loss and that micro-batch's records.
    """
    if math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"]):
        return
    mine = None
    for i, loss in enumerate(losses):
        if mine is None and not torch.isfinite(loss):
            records = sorted(set(batches.records((step - 1) * len(losses) + i)))
            mine = f"the loss on rank {dist.get_rank()} came from {'; '.join(records[:8])}"
    reports = gather(mine)
    cause = next(filter(None, reports), "this step's losses were finite, the gradients were not")
    raise UserError(
        f"step {step}: loss {values['loss']} grad_norm {values['grad_norm']}: {cause}. Nothing of "
        "this step was saved: continue from the last checkpoint with a smaller learning_rate or "
        "max_grad_norm, or inspect the dataset with data.py --inspect")


# ---- Start and end -----------------------------------------------------------------------------


LESS_MEMORY = (  # advice if a GPU has too little memory
    'lower per_device_batch_size, or set "activation_checkpointing": {} in the JSON; or train less '
    "(lora_rank: 32, frozen_weights: int8); or use more GPUs and a higher ZeRO stage. python -m "
    "machinery.memory computes what fits")


def run_job(program: Callable[[], None]) -> None:
    """Connect the ranks, run the program on all of them, and end.

    A rank that fails exits at once, without cleaning up: others may be waiting for it in a
    collective, and only notice closed connections.
    """
    try:
        with exit_with_one_line():
            neighbor = start_job()
            program()
            neighbor.release()
    except SystemExit as stop:
        print_line(str(stop))
        end_at_once()  # while the error holds the DataLoader, whose end may print a traceback
    except torch.OutOfMemoryError:
        print_line(f"error: the GPU's memory is full: {LESS_MEMORY}")
        end_at_once()
    except Exception:
        time.sleep(2)  # if another rank's death is the cause, Neighbor ends this rank meanwhile
        traceback.print_exc()
        sys.stderr.flush()
        end_at_once()
    dist.destroy_process_group()


def end_at_once() -> None:
    """End this process and its children: the survey of the data, and DataLoader workers."""
    children = psutil.Process().children()
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(children, timeout=5)
    os._exit(1)


def start_job() -> Neighbor:
    """Connect the ranks. The environment has their places (config.set_rank_env)."""
    # a CPU extension that training does not use: it takes a minute to compile, and a job killed
    # meanwhile leaves a lock at which all later jobs wait forever
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # DataLoader workers are enough
    # how far the host may run ahead of the GPU: the towers' backward pass has thousands of kernels
    os.environ.setdefault("CUDA_SCALE_LAUNCH_QUEUES", "4x")
    if os.environ["RANK"] != "0":  # only rank 0 prints the warnings of libraries
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
    connect()
    # DeepSpeed would do it after the model is made
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))
    host.allow_open_files()  # workers send batches as open files
    host.memory()  # before any rank takes some
    deepspeed.init_distributed()
    share_cores()
    threading.Thread(target=yield_cores, daemon=True).start()
    return Neighbor()


def share_cores() -> None:
    """Divide CPU cores among the ranks that may use the same ones, unless OMP_NUM_THREADS is set.

    An optimizer in host memory is as fast as its threads. PyTorch would count cores only when it
    needs them; by then the DataLoader's pinning thread has set the number to 1.
    """
    mine = (socket.gethostname(), os.sched_getaffinity(0))
    ranks = gather(mine)
    sharing = 1 if "OMP_NUM_THREADS" in os.environ else ranks.count(mine)
    threads = min(torch.get_num_threads(), host.cores())
    torch.set_num_threads(max(1, threads // sharing))


def yield_cores() -> None:
    """Let waiting threads sleep while other processes keep the cores busy. Runs in its own thread.

    OpenMP's threads wait for one another spinning, for milliseconds. On busy cores they take the
    time of those that they wait for: the demo trained at 3.5 samples/s instead of 85, now 46.
    libgomp, PyTorch's OpenMP, spins briefly if it has more threads than cores (GOMP_SPINCOUNT in
    its manual), so this thread adds some, which do nothing.
    """
    mine = torch.get_num_threads()
    busy = False
    try:
        file = open("/proc/self/schedstat", "rb")
    except OSError:  # some kernels have no such file
        return
    while True:
        before = waited_for_core(file)
        time.sleep(2)
        was_busy = busy
        busy = waited_for_core(file) - before > 0.3e9  # of 2e9
        if busy != was_busy:
            threads = len(os.sched_getaffinity(0)) + 1 if busy else 2
            torch.set_num_threads(threads)  # of this thread, and the default of new ones
            torch.zeros(threads << 15, dtype=torch.uint8).add_(1)  # 32,768 numbers start a thread
            torch.set_num_threads(mine)


def waited_for_core(file: io.IOBase) -> int:
    """Nanoseconds for which this process's main thread was ready to run, and had no core."""
    return int(os.pread(file.fileno(), 100, 0).split()[1])
