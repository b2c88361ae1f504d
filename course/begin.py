"""What the notebooks use to show the lines they are about."""

import inspect
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
    print(f"{Path(inspect.getsourcefile(thing)).relative_to(ROOT)}, from line {number + start}\n")
    print(text)
