"""Print docs/keys.md: every key of the YAML, by the comments in machinery/config.py.

    python docs/keys.py > docs/keys.md
"""

import sys
from itertools import groupby
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from machinery.command_line import keys
from machinery.config import Recipe, TrainConfig

INTRODUCTION = """\
# Every key of the YAML

`python docs/keys.py > docs/keys.md` writes this page from `machinery/config.py`, and `python train_vla.py --help`
prints the same. Set a key in the YAML, or on the command line: `--set learning_rate=1e-4 cameras=[primary,wrist]`.
A key that the YAML lacks has its default. Names in other files' words: [OpenVLA's options](openvla_options.md).
"""


def page() -> str:
    text = INTRODUCTION
    for section, group in groupby([*keys(TrainConfig), *keys(Recipe)], lambda key: key.section):
        text += f"\n## {section[0].upper()}{section[1:]}\n\n| key | default | |\n|---|---|---|\n"
        for key in group:
            text += f"| `{key.name}` | `{key.default}` | {key.text} |\n".replace("a|b", "a\\|b")
    return text


if __name__ == "__main__":
    print(page(), end="")
