"""Every key of the YAML, by the comments in machinery/config.py: docs/keys.md, and the end of `train_vla.py --help`.

    python docs/keys.py > docs/keys.md
"""

import inspect
import itertools
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from machinery.config import Recipe, TrainConfig

INTRODUCTION = """\
# Every key of the YAML

`python docs/keys.py > docs/keys.md` writes this page from `machinery/config.py`, and `python train_vla.py --help`
prints the same. Set a key in the YAML, or on the command line: `--set learning_rate=1e-4 "cameras=[primary, wrist]"`.
A key that the YAML lacks has its default.
"""


class Key(NamedTuple):
    section: str
    name: str
    default: str  # in YAML
    text: str


def keys(model: type[TrainConfig] | type[Recipe]) -> Iterator[Key]:
    """The keys that a class in config.py declares: a section's first line is a comment, and a key's
    comment is above it or at the end of its line."""
    defaults = vars(model())
    for section in inspect.getsource(model).split("\n\n"):
        title, *lines = section.splitlines()
        comments = []
        for line in lines:
            name = line.strip().partition(":")[0]
            comment = line.partition("# ")[2]
            if comment:
                comments.append(comment)
            if name not in defaults:
                continue
            choices = re.search(r"Literal\[(.*?)\]", str(model.__annotations__[name]))
            if choices:
                comments.append(f"({choices[1]})")
            default = json.dumps(defaults[name]).strip('"')
            yield Key(title.strip(" #"), name, default, " ".join(comments))
            comments = []


def sections() -> Iterator[tuple[str, Iterator[Key]]]:
    every = itertools.chain(keys(TrainConfig), keys(Recipe))
    return itertools.groupby(every, lambda key: key.section)


def for_terminal() -> str:
    text = "keys of the YAML, and their defaults:\n"
    for section, group in sections():
        text += f"\n{section}\n"
        for key in group:
            line = f"  {key.name + ': ' + key.default:38} {key.text}"
            text += textwrap.fill(line, 100, subsequent_indent=" " * 41, break_on_hyphens=False) + "\n"
    return text


def page() -> str:
    text = INTRODUCTION
    for section, group in sections():
        text += f"\n## {section[0].upper()}{section[1:]}\n\n| key | default | |\n|---|---|---|\n"
        for key in group:
            comment = key.text.replace("|", "\\|")
            text += f"| `{key.name}` | `{key.default or repr('')}` | {comment} |\n"
    return text


if __name__ == "__main__":
    print(page(), end="")
