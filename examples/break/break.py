"""Tell a trained policy something wrong, one thing at a time, and see which numbers notice.

    make demo                                # once: six minutes on two CPU cores
    python examples/break/break.py           # two minutes

Held-out frames of the demo are answered as a robot would ask. `accuracy` is of action tokens, `error` the
mean distance from the recorded action in its own units, `size` the mean size of the three movements: a robot
that hardly moves shows there. README.md beside this file says how each mistake looks on a robot.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from act import load_vla
from action_tokenizer import unnormalize
from config import find_input, told_in_one_line
from data import Mixture
from images import decode_native

SMALL_ROBOT = {"q01": [-0.03] * 4, "q99": [0.03] * 4, "mask": [True, True, True, False]}
WORDS = {"Push and close a drawer": "Shut the drawer", "Reach a goal position": "Move the hand to the goal",
         "Press a button from the top": "Push the button down", "Push and close a window": "Shut the window",
         "Push a button on the coffee machine": "Start the coffee machine",
         "Slide a plate into a cabinet": "Move the plate into the cabinet"}
TASKS = sorted(WORDS)
NEXT_TASK = dict(zip(TASKS, TASKS[1:] + TASKS[:1], strict=True))
CASES = {  # what is changed, and how
    "nothing": {}, "image upside down": {"see": lambda image: image[::-1]},
    "red and blue swapped": {"see": lambda image: image[..., ::-1]}, "image black": {"see": np.zeros_like},
    "instruction reworded": {"read": WORDS.get}, "another task's instruction": {"read": NEXT_TASK.get},
    "another dataset's statistics": {"stats": SMALL_ROBOT}, "gripper's sign": {"sign": [1, 1, 1, -1]}}


def main(checkpoint: str, count: int) -> None:
    """Print a row for each mistake."""
    policy = load_vla(checkpoint)
    cfg = policy.cfg.model_copy(update={"data_root_dir": find_input(policy.cfg.data_root_dir)})
    mixture = Mixture(cfg, policy.tokenizer, train=False)
    table, index = mixture.tables[0], np.linspace(0, mixture.sizes[0] - 1, count).astype(int)
    rows = mixture.rows(np.zeros(count, int), index)
    images = [decode_native(table.read_image(row, 0)) for row in rows]
    texts = [table.instructions[number] for number in table.frames["instruction"][rows]]
    true = policy.action_tokenizer.encode(mixture.actions(0, rows)[:, 0])
    recorded = table.frames["action"][rows]
    for name, wrong in CASES.items():
        see, read = wrong.get("see", np.asarray), wrong.get("read", str)
        parts = [policy.prepare([*map(see, images[i : i + 32])], [*map(read, texts[i : i + 32])], None, None)
                 for i in range(0, count, 32)]
        tokens = np.concatenate([policy.generate(*part).numpy() for part in parts])
        stats = wrong.get("stats", policy.dataset_statistics(None)["action"])
        actions = unnormalize(policy.action_tokenizer.decode(tokens), stats, cfg.action_normalization)
        actions = actions * wrong.get("sign", 1)
        print(f"{name:<29} accuracy {(tokens == true).mean():.3f} error {abs(actions - recorded).mean():.3f} "
              f"size {abs(actions[:, :3]).mean():.3f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", default="runs/demo+n1+b32+x7")
    parser.add_argument("--frames", type=int, default=478, help="how many, evenly spread; 478 are all")
    args = parser.parse_args()
    with told_in_one_line():
        main(args.checkpoint, args.frames)
