"""Runs the project's commands in forks of one process that has imported everything (conftest.commands).

Importing torch, deepspeed and transformers takes some ten CPU seconds, more than most of the tests' trainings.
Here it is paid once for the whole suite: each xdist worker opens a connection and gets a process of its own,
with mounts of its own, whose forks are the commands. A request is one line of JSON:
["start", [[shell command to run before, environment, script, arguments, file for the output], ...]] -> process
ids; ["wait", process ids] -> their exit statuses; or ["shell", command] -> its exit status. Each command leads a session; a script that is not one of
the project's programs is run as __main__.
"""

import contextlib
import ctypes
import gc
import importlib
import io
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import traceback
import types
from pathlib import Path

gc.disable()  # until everything is imported, here and by pytest: a fifth of that time is looking for garbage
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from PIL import Image  # noqa: E402

from machinery import frames, plots, rlds, survey  # noqa: E402

PROGRAMS = {"eval_vla.py": "eval_vla", "export_vla.py": "export_vla", "serve_vla.py": "serve_vla",
            "train_vla.py": "train_vla", "tests/run_cells.py": "run_cells"}
# what a training imports later: DeepSpeed's Muon compiles something and so imports all of inductor
LATER = ["machinery.inspect_data", "transformers.models.llama.modeling_llama", "machinery.zero_speed",
         "deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.module_inject.auto_ep_config",
         "numpy.ctypeslib", "torch.utils.tensorboard"]
LONGEST = 1200  # seconds; a command that hangs is killed
CLONE_NEWNS = 0x20000  # a command's mounts are seen by this process and its children only


def main(listener: socket.socket) -> None:
    """Serve every connection with a fork, until the last one is closed."""
    frames.index = index
    forked = dict.fromkeys(["machinery.survey", "machinery.plots"], ProgramFork)
    start = frames.start_program
    frames.start_program = lambda module, *given, **how: forked.get(module, start)(module, *given, **how)
    sys.modules["tensorboard.compat.notf"] = types.ModuleType("tensorboard.compat.notf")  # as run.py does
    for module in [*PROGRAMS.values(), *LATER]:
        with contextlib.suppress(Exception):  # the command fails with it, and no other
            importlib.import_module(module)
    importlib.import_module("deepspeed").ops.__compatible_ops__  # noqa: B018  (it asks the C compiler)
    Image.init()
    gc.freeze()  # collecting garbage would write to, and so copy, what the forks share
    gc.enable()
    listener.settimeout(1)
    handlers: set[int] = set()
    begun = False
    while handlers or not begun:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            handlers -= {pid for pid in handlers if os.waitpid(pid, os.WNOHANG)[0]}
            continue
        begun = True
        handler = os.fork()
        if not handler:
            listener.close()
            serve(connection)
            os._exit(0)
        connection.close()
        handlers.add(handler)


def serve(connection: socket.socket) -> None:
    """Answer one worker's requests; what it has not waited for ends with the connection."""
    ctypes.CDLL(None).unshare(CLONE_NEWNS)
    running: set[int] = set()
    with connection.makefile("rw") as lines:
        for line in lines:
            request, values = json.loads(line)
            if request == "start":
                reply = [start(*job) for job in values]
                running |= {*reply}
            elif request == "shell":
                reply = subprocess.run(values, shell=True).returncode
            else:
                reply = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in values]
                running -= {*values}
            print(json.dumps(reply), file=lines, flush=True)
    for pid in running:
        os.kill(pid, signal.SIGKILL)


def start(shell: str, environ: dict, script: str, arguments: list, output: str) -> int:
    """Run a program in a fork -> its process id."""
    if shell:
        subprocess.run(shell, shell=True, check=True)
    Path(output).touch()  # its reader may come before the fork
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        signal.alarm(LONGEST)
        os.setsid()
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(file, stream)
        os.environ.update(environ)
        sys.argv = [script, *map(str, arguments)]
        if script in PROGRAMS:
            importlib.import_module(PROGRAMS[script]).main()
        else:
            runpy.run_path(script, run_name="__main__")
        status = 0
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        else:
            status = stop.code or 0
    except BaseException:
        traceback.print_exc()
    for child in multiprocessing.active_children():  # daemons, which end with a Python that exits
        child.terminate()
        child.join()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def index(job: dict) -> None:
    """For frames.index, which starts a new Python for each frame table: the same program in a fork, which need
    not import TFDS for two CPU seconds. tests/test_rlds.py starts real ones."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        status = 1
        sys.stdin = io.StringIO(json.dumps(job))
        sys.stdout = open(writer, "w")
        try:
            rlds.main()
            status = 0
        except SystemExit as stop:
            status = stop.code
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(status)
    os.close(writer)
    with open(reader) as output:
        error = output.read().strip()
    if os.waitpid(pid, 0)[1]:
        raise frames.DataError(error or "indexing failed: see above, or was it killed for its memory?")


class ProgramFork:
    """For frames.start_program: a training's survey and curves in a fork."""

    def __init__(self, module: str, job: str, **how):
        self.reader, writer = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            status = 1
            sys.argv = [module, job]
            sys.stdout = open(writer, "w")
            try:
                if module == "machinery.plots":
                    plots.draw_training(Path(job))
                else:
                    survey.main()
                status = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            os._exit(status)
        os.close(writer)

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        with open(self.reader) as output:
            lines = output.read()
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return lines, None


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
