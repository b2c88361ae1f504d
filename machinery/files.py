"""Files that appear complete or not at all, and locks between processes.

    with atomic(path) as scratch:
        scratch.write_text(...)  # or scratch.mkdir(), and files in it
"""

import contextlib
import fcntl
import io
import json
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a scratch path beside `path`, at which the caller makes a file or a folder.

    When the block ends it is renamed to `path`, in place of a file of that name. If the block
    raises, it is removed. A killed process leaves `<path>.*.tmp`, which no other process uses.
    """
    scratch = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield scratch
        scratch.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # the error to report is the block's
            remove(scratch)
        raise


def remove(path: Path) -> None:
    """Delete a file, a link (not its target) or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def take_lock(path: Path, wait: bool = True) -> io.TextIOBase | None:
    """Lock a file until it is closed.

    The system releases the lock when this process ends, and forked processes do not inherit it. On
    file systems without locks, returns None and prints a warning. Raises BlockingIOError if another
    process has the lock and `wait` is false.
    """
    file = open(path, "w")
    operation = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
    try:
        fcntl.lockf(file, operation)
    except (BlockingIOError, PermissionError) as error:
        raise BlockingIOError(str(error)) from error
    except OSError as error:
        print(f"warning: {path}: cannot be locked ({error}): start one job at a time",
              file=sys.stderr)
        return None
    return file


def read_json(path: Path, default=None):
    """The content of a JSON file, or the default if there is none. Raises FileNotFoundError if
    there is no default either."""
    if default is not None and not path.exists():
        return default
    return json.loads(path.read_text())


def write_json(path: Path, content) -> None:
    """Write a JSON file that appears complete or not at all."""
    with atomic(path) as scratch:
        scratch.write_text(json.dumps(content, indent=2))


def read_metrics(run_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl, without those that a full disk has cut short."""
    path = run_dir / "metrics.jsonl"
    lines = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines
