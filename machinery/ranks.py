"""How a job's ranks begin and end together, and what ends them early: signals, dead ranks, broken numbers.

A rank that stops alone leaves the others waiting in a collective, for minutes and without a word. So nothing
is decided alone: with Preemption all ranks stop after the same step; Neighbour ends a rank within moments of
any other's death; stop_if_not_finite goes by a norm that is the same everywhere.
"""

import contextlib
import functools
import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import deepspeed
import psutil
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from data import TrainBatches
from machinery.config import UserError, exit_with_one_line
from machinery.frames import DataError, end_with_parent


@functools.cache
def patient_group() -> dist.ProcessGroup:
    """All ranks, over TCP, without a timeout: for waiting on disks, beside the traffic of the training."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=365))


# ---- Signals -----------------------------------------------------------------------------------------------


class Preemption:
    """Whether somebody wants the run to end: SIGTERM, SIGUSR1 or Ctrl-C to any rank, or the death of its
    launcher. A second Ctrl-C ends the rank at once.

    DeepSpeed's launcher is two processes. `deepspeed` passes no signal on, it just dies; its child,
    deepspeed.launcher.launch, passes SIGTERM on to one rank after the other, and kills each after 30 seconds.
    Therefore a signal to any rank counts for all, and every rank watches both of them.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self):
        self.reason: str | None = None
        self.noted_at = math.inf
        self.flag, self.vote = torch.zeros(1), None
        self.ancestors = self._ancestors()
        self.previous = {number: signal.signal(number, self._note) for number in self.SIGNALS}

    def _note(self, number, frame) -> None:
        if number == signal.SIGINT and time.monotonic() > self.noted_at + 1:  # launchers may pass it on twice
            os._exit(128 + number)
        self.reason, self.noted_at = signal.Signals(number).name, time.monotonic()

    def _ancestors(self) -> list[int]:
        """Process ids of the launchers above this process; when one ends, another process takes its place."""
        try:
            pids = [os.getppid(), psutil.Process(os.getppid()).ppid()] if launchers() else []
        except psutil.NoSuchProcess:  # it ended just now
            pids = []
        return pids[: launchers()]

    def requested(self) -> bool:
        """Call it after every step on every rank -> had any rank been told to stop by the end of the step
        before? The same answer everywhere, and one step late so that nobody waits for it."""
        if self._ancestors() != self.ancestors:
            self.reason = self.reason or "the end of its launcher"
        if self.vote is not None:
            self.vote.wait()
        answer = bool(self.flag.item())
        self.flag.fill_(self.reason is not None)
        self.vote = dist.all_reduce(self.flag, dist.ReduceOp.MAX, group=patient_group(), async_op=True)
        return answer

    def close(self) -> None:
        """Wait for the last vote, which nobody needs, and give the signals back their old meaning."""
        if self.vote is not None:
            self.vote.wait()
        for number, handler in self.previous.items():
            signal.signal(number, handler)


@functools.cache
def launchers() -> int:
    """How many of our parent and grandparent belong to DeepSpeed's launcher: 0, 1 or 2."""
    names = ["deepspeed.launcher.launch", "deepspeed"]
    found = zip(names, psutil.Process().parents(), strict=False)
    return sum(any(Path(word).name == name for word in process.cmdline()[:4]) for name, process in found)


def follow_rank(worker: int) -> None:
    """For the DataLoader's workers: they ignore a signal to the whole job, and end with their rank, at once,
    because they hold its connections open."""
    for number in Preemption.SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()


# ---- Dead ranks --------------------------------------------------------------------------------------------


class Neighbour:
    """Ends this process when the rank before it dies, and so, round the ring, all ranks on all machines.

    A thread waits for a message that comes only at the very end of the program. The kernel closes a dead
    process' connections, whereupon the waiting fails. The first rank to go has printed why.
    """

    def __init__(self):
        self.group = dist.new_group(backend="gloo", timeout=timedelta(days=365))
        self.watcher = threading.Thread(target=self._watch, daemon=True)
        if dist.get_world_size() > 1:
            self.watcher.start()

    def _watch(self) -> None:
        before = (dist.get_rank() - 1) % dist.get_world_size()
        try:
            dist.recv(torch.zeros(1), before, group=self.group)
        except RuntimeError:
            print(f"\nrank {dist.get_rank()} ends because rank {before} ended", file=sys.stderr, flush=True)
            os._exit(1)

    def release(self) -> None:
        """Tell the next rank that this one ends in good order, and wait to be told by the one before."""
        if dist.get_world_size() > 1:
            dist.send(torch.zeros(1), (dist.get_rank() + 1) % dist.get_world_size(), group=self.group)
            self.watcher.join()


# ---- Bad data and broken numbers ---------------------------------------------------------------------------


@contextlib.contextmanager
def naming_step(step: int) -> Iterator[None]:
    """Put step and rank before what goes wrong with the data, whether it is read here or by a worker."""
    where = f"step {step} rank {dist.get_rank()}"
    memory = ("(Processes are killed where memory runs out, or /dev/shm, of which Docker gives 64 MB: lower "
              "num_workers, or docker run --shm-size 16g)")
    try:
        yield
    except (ConnectionError, EOFError) as error:  # a dying process' connections end a moment before it does
        raise DataError(f"{where}: DataLoader worker ended while it sent a batch {memory}") from error
    except (DataError, OSError) as error:  # a worker's has the text of a traceback, whose last line says all
        text = str(error).strip().splitlines()[-1].removeprefix("frames.DataError: ")
        raise DataError(f"{where}: {text}") from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        what = str(error).strip().splitlines()[-1] if "shared memory" in str(error) else error
        raise DataError(f"{where}: {what} {memory}") from error


def stop_if_not_finite(values: dict, losses: list[torch.Tensor], step: int, batches: TrainBatches) -> None:
    """Raise UserError on every rank when the loss or the gradients of a step became NaN or infinite.

    values: "loss" and "grad_norm", the same on all ranks; losses: this rank's, one per micro-batch of the
    step. The message names the first rank with a broken loss and the records of that micro-batch.
    """
    if math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"]):
        return
    broken = next((i for i, loss in enumerate(losses) if not torch.isfinite(loss)), None)
    mine, reports = None, [None] * dist.get_world_size()
    if broken is not None:
        records = sorted(set(batches.records((step - 1) * len(losses) + broken)))
        more = f" and {len(records) - 8} more records" if len(records) > 8 else ""
        mine = f"the loss on rank {dist.get_rank()} came from {'; '.join(records[:8])}{more}"
    dist.all_gather_object(reports, mine, group=patient_group())
    cause = next(filter(None, reports), "this step's losses were finite, the gradients were not")
    raise UserError(
        f"step {step}: loss {values['loss']} grad_norm {values['grad_norm']}: {cause}. Nothing of this step "
        "was saved: continue from the last checkpoint with a smaller learning_rate or max_grad_norm, or look "
        "at the dataset with data.py --inspect")


# ---- Beginning and end -------------------------------------------------------------------------------------


LESS_MEMORY = (  # what to do where a GPU has too little
    'take a smaller per_device_batch_size, or "activation_checkpointing": {} in the JSON; or what fits by '
    "the line memory_if: lora_rank: 32, with frozen_weights: int8, the last layer (freeze_vision_backbone, "
    "freeze_llm_backbone, unfreeze_last_llm_layer), zero2_offload.json; or more GPUs and a higher ZeRO stage")


def run_job(program: Callable[[], None]) -> None:
    """Connect the ranks, run the program on all of them, and end. A rank that fails ends at once: others may
    be waiting for it in a collective, and find that it has gone."""
    try:
        with exit_with_one_line():
            neighbour = start_job()
            program()
            neighbour.release()
    except (SystemExit, torch.OutOfMemoryError) as stop:
        told = stop if isinstance(stop, SystemExit) else f"error: the GPU's memory is full: {LESS_MEMORY}"
        print(f"\n{told}", file=sys.stderr, flush=True)  # below the progress bar
        os._exit(1)
    except Exception:
        time.sleep(2)  # if it failed because another rank ended, Neighbour ends this one first, in one line
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    dist.destroy_process_group()


def start_job() -> Neighbour:
    """Connect the ranks, which know their places (config.set_rank_env)."""
    # an extension for CPUs that training has no use for: it takes a minute to compile, and a job killed
    # meanwhile leaves a lock behind at which all later ones wait for ever
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the DataLoader's workers are enough of it
    # how far the host may run ahead of the GPU: the towers' backward pass is thousands of short kernels
    os.environ.setdefault("CUDA_SCALE_LAUNCH_QUEUES", "4x")
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))  # DeepSpeed does it after the model is made
    try:
        deepspeed.init_distributed()
    except RuntimeError as error:  # as PyTorch's network errors are
        if "address already in use" not in str(error).lower():
            raise
        raise UserError(f"port {os.environ['MASTER_PORT']} is in use, perhaps by another job on this machine:"
                        " start this one with another, as in deepspeed --master_port 29501 train_vla.py ... "
                        "(torchrun: --master-port; else the variable MASTER_PORT)") from error
    share_cores()
    return Neighbour()


def share_cores() -> None:
    """Divide CPU cores among the ranks that may use the same ones, unless OMP_NUM_THREADS says how many each
    takes: an optimizer in host memory is as fast as its threads. PyTorch would count cores when it first
    needs one; by then, the DataLoader's thread that pins memory has set the number to 1."""
    mine, ranks = (socket.gethostname(), os.sched_getaffinity(0)), [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine, group=patient_group())
    sharing = 1 if "OMP_NUM_THREADS" in os.environ else ranks.count(mine)
    torch.set_num_threads(max(1, torch.get_num_threads() // sharing))
