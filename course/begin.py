"""What the notebooks use to show the lines they are about."""

import inspect
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def show(thing, first: str = "", last: str = "") -> None:
    """Print a function's or class's source with its file and line numbers: from the line that
    contains `first` to the next one that contains `last`, or all of it."""
    thing = inspect.unwrap(getattr(thing, "fget", None) or thing)  # of a property, its function
    lines, number = inspect.getsourcelines(thing)
    start = next(i for i, line in enumerate(lines) if first in line)
    stop = len(lines)
    if last:
        stop = next(i for i, line in enumerate(lines) if i >= start and last in line) + 1
    text = textwrap.dedent("".join(lines[start:stop])).rstrip()
    print(f"{Path(inspect.getsourcefile(thing)).resolve().relative_to(ROOT)}, from line {number + start}\n")
    print(text)


def demo_policy() -> Path:
    """The demo's model, trained for 200 steps of 32 samples (some three minutes on two CPU cores, if
    that has not been done before) -> its run."""
    run = ROOT / "runs/course+n1+b32+x7"
    if not [*run.glob("checkpoints/step-000200*")]:
        command = [sys.executable, "train_vla.py", "--config", "configs/demo.yaml",
                   "--deepspeed_config", "ds_configs/cpu.json", "--set", "vla_id=course", "max_steps=200",
                   "global_batch_size=32", "keep_checkpoints=1"]
        trained = subprocess.run(command, capture_output=True, text=True)
        if trained.returncode:
            raise RuntimeError(trained.stdout[-2000:] + trained.stderr[-2000:])
    return run
