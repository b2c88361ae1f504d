"""Start a launcher, and pass signals to stop on to its ranks, which save, instead of to itself.

    python -m machinery.supervise deepspeed train_vla.py --config configs/demo.yaml

The first process of a container needs it. Docker, Kubernetes and clouds send SIGTERM to that
process, and kill everything some seconds later or when it ends. `deepspeed` in its place does not
notice: the kernel drops signals that a first process has no handler for. Started by another
program, `deepspeed` ends at SIGTERM or Ctrl-C, before the ranks have saved. torchrun waits for
them, and prints a traceback.
"""

import contextlib
import ctypes
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def training() -> Iterator[psutil.Process]:
    """The ranks that save when they are asked to stop: ranks.Preemption handles SIGUSR1 there, and
    no launcher or DataLoader worker does."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(OSError):  # it has just ended
            status = Path(f"/proc/{process.pid}/status").read_text()
            caught = int(status.partition("SigCgt:")[2].split()[0], 16)  # a bit per signal
            if caught >> (signal.SIGUSR1 - 1) & 1:
                yield process


stopped_by: list[int] = []  # signals


def stop(number: int, frame) -> None:
    """Handle a signal: pass it on to the ranks. If there are none, end at once."""
    stopped_by.append(number)
    ranks = list(training())
    for rank in ranks:
        rank.send_signal(number)
    if not ranks:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        print(f"\nstopped by {signal.Signals(number).name} while nothing was training",
              file=sys.stderr)
        sys.exit(128 + number)


def main() -> None:
    """Run the command, until the last rank has ended. The exit status is the command's. After a
    signal it is 128 + the signal's number: with 0, Kubernetes would take the training as done."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)  # ranks whose launcher is killed become children of ours
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, stop)
    try:  # in a process group of its own, which Ctrl-C does not reach
        launcher = subprocess.Popen(sys.argv[1:], process_group=0, preexec_fn=lambda: libc.prctl(
            PR_SET_PDEATHSIG, signal.SIGTERM))
    except OSError as error:
        sys.exit(f"error: {error}")
    while launcher.poll() is None or any(training()):
        time.sleep(0.2)
    status = launcher.returncode
    if stopped_by and status == 0:
        status = -stopped_by[0]
    sys.exit(status if status >= 0 else 128 - status)


if __name__ == "__main__":
    main()
