"""The lesson: a weak policy of the arm gets better by itself, in twenty minutes on two CPU cores.

    python examples/rl/lesson.py --out runs/rl_lesson                       # docs/rl.md has the table
    python examples/rl/lesson.py --out runs/rl_lesson --controls            # and what to compare with

Records 100 demonstrations and trains a policy with few of them. Reinforcement (rl.py) continues
from it. Both play 200 episodes from starts that neither has seen: a table, and a film. A stage that
has ended is not repeated. --controls also runs filtered cloning (the same number of episodes, but
only the successful ones are imitated), and more training on the demonstrations, for as long as
reinforcement took.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from machinery.config import exit_with_one_line  # first: it names a missing package

# isort: split

import numpy as np
from PIL import Image, ImageDraw
from worlds import Arm

from examples.closed_loop import encode_film, rate, row

FIRST_SEED = 200_000  # as drive.py's: no demonstration and no start of reinforcement has these
CPU = ROOT / "ds_configs/cpu.json"


def evaluate(checkpoint: Path, episodes: int) -> list[bool]:
    """Play greedily, as a robot would: `predict_action` -> which episodes succeed. Each color in
    turn."""
    from act import load_vla

    policy, outcomes = load_vla(checkpoint), []
    world = Arm(["outside", "wrist"], [])
    for seed in range(FIRST_SEED, FIRST_SEED + episodes):
        ...
