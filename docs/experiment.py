"""Run the experiments of docs/tour.md: python docs/experiment.py 4      (or several numbers, or none for all)

The code is the tour's own: the Python block under each idea's heading. Its expected output follows
it.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
BLOCKS = re.compile(r"^## (\d+)\. (.*?)$.*?```python\n(.*?)```\n\n```text\n(.*?)```",
                    re.MULTILINE | re.DOTALL)


def experiments(tour: str = "tour.md") -> dict[int, tuple[str, str, str]]:
    """-> {idea: (title, code, expected output)} of a tour."""
    ideas = re.split(r"^(?=## \d)", (FOLDER / tour).read_text(), flags=re.MULTILINE)
    found = [match.groups() for idea in ideas if (match := BLOCKS.search(idea))]
    return {int(number): tuple(rest) for number, *rest in found}


def run(code: str) -> str:
    """Run code from the project's folder -> its output."""
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parent), "DS_ACCELERATOR": "cpu"}
    return subprocess.run([sys.executable, "-"], input=code, text=True, cwd=FOLDER.parent, env=environment,
                          stdout=subprocess.PIPE, check=True).stdout


if __name__ == "__main__":
    known = experiments()
    for number in [int(word) for word in sys.argv[1:]] or known:
        if number not in known:
            sys.exit(f"experiment {number} has no Python code; {', '.join(map(str, known))} have")
        title, code, _ = known[number]
        print(f"{number}. {title}", run(code), sep="\n")
