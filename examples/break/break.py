"""Feed a trained policy one wrong input at a time, and see which numbers reveal it.

    make demo                                       # once: eight minutes on two CPU cores
    python examples/break/break.py                  # half a minute
    python examples/break/break.py --success 5      # also act; needs examples/metaworld's packages

The policy answers the demo's held-out frames as it would on a robot. `accuracy` is the accuracy of
action tokens, `error` the mean distance from the recorded action in its own units, and `size` the
mean magnitude of the three movements, which shows a robot that hardly moves. --success also saves
films and a picture in the run's folder under break/. README.md in this folder describes each
mistake.
"""

import argparse
import copy
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples/metaworld")]

from machinery.config import exit_with_one_line  # first: it names a missing package

# isort: split

import numpy as np

SMALL_ROBOT = {"q01": [-0.03] * 4, "q99": [0.03] * 4, "mask": [True, True, True, False]}
WORDS = {"Push and close a drawer": "Shut the drawer", "Reach a goal position": "Move the hand to the goal",
         "Press a button from the top": "Push the button down", "Push and close a window": "Shut the window",
         "Push a button on the coffee machine": "Start the coffee machine",
         "Slide a plate into a cabinet": "Move the plate into the cabinet"}
TASKS = sorted(WORDS)
NEXT_TASK = dict(zip(TASKS, TASKS[1:] + TASKS[:1], strict=True))
CASES = {  # the change of each case
    "nothing": {}, "image upside down": {"see": lambda image: image[::-1]},
    "red and blue swapped": {"see": lambda image: image[..., ::-1]}, "image black": {"see": np.zeros_like},
    "instruction reworded": {"read": WORDS.get}, "another task's instruction": {"read": NEXT_TASK.get},
    "another dataset's statistics": {"stats": SMALL_ROBOT}, "gripper's sign": {"sign": [1, 1, 1, -1]}}


def told_wrong(policy, see=np.asarray, read=str, stats=None, sign=1):
    """The same policy with a change applied to its images, words, statistics, or commands."""
    from action_tokenizer import unnormalize

    wrong, stats = copy.copy(policy), stats or policy.dataset_statistics(None)["action"]
    wrong.prepare = lambda images, texts, key, state: policy.prepare(
        [[see(view) for view in policy.views(views)] for views in images], [*map(read, texts)], key, state)
    wrong.actions = lambda tokens, key: sign * unnormalize(
        policy.action_tokenizer.decode(tokens.cpu().numpy()), stats, policy.cfg.action_normalization)
    return wrong


def success(checkpoint: str, wrong: dict, trials: int, out: Path) -> str:
    """Film `trials` episodes of each of the demo's six tasks -> number of successes, with the 95%
    interval."""
    import rollout

    player = rollout.Player(checkpoint, None, None, "cpu", trials)
    tasks = rollout.task_names(["demo"])
    player.policy = told_wrong(player.policy, **wrong)
    out.mkdir(parents=True, exist_ok=True)
    rollout.run(player, [(task, 0) for task in tasks], trials, 2, out)
    results = {(task, 0): json.loads((out / f"{task}-0.json").read_text()) for task in tasks}
    rollout.draw_films(rollout.first_films(results, out), out)
    counted = rollout.rate([episode for episodes in results.values() for episode in episodes])
    return "success {successes} of {trials} {interval}".format(**counted)


def draw_ends(films: Path) -> None:
    """One picture with the last image of each mistake's first episodes."""
    from PIL import Image, ImageDraw, ImageFont

    sheet = Image.new("RGB", (960, 380 * len(CASES) // 2), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(18)
    for i, name in enumerate(CASES):
        x, y = 480 * (i % 2), 380 * (i // 2)
        pen.text((x + 4, y + 4), f"what is wrong: {name}", "black", font)
        sheet.paste(Image.open(films / name / "rollouts_end.png").resize((474, 348)), (x, y + 28))
    sheet.save(films / "how_it_ends.jpg", quality=80)


def main(checkpoint: str, count: int, trials: int) -> None:
    """Print one row per mistake."""
    import torch

    from act import load_vla
    from data import Mixture, open_tables
    from machinery.config import find_input
    from machinery.images import decode_native

    policy, films = load_vla(checkpoint), Path(checkpoint) / "break"
    cfg = policy.cfg.model_copy(update={"data_root_dir": find_input(policy.cfg.data_root_dir)})
    mixture = Mixture(cfg, open_tables(cfg), policy.tokenizer, train=False)
    table, index = mixture.tables[0], np.linspace(0, mixture.sizes[0] - 1, count).astype(int)
    rows = mixture.rows(np.zeros(count, int), index)
    images = [decode_native(table.read_image(row, 0)) for row in rows]
    texts = [table.instructions[number] for number in table.frames["instruction"][rows]]
    true = policy.action_tokenizer.encode(mixture.actions(0, rows)[:, 0])
    recorded = table.frames["action"][rows]
    for name, wrong in CASES.items():
        robot = told_wrong(policy, **wrong)
        batches = [robot.prepare(images[i : i + 32], texts[i : i + 32], None, None)
                   for i in range(0, count, 32)]
        tokens = torch.cat([robot.generate(*batch) for batch in batches])
        actions = robot.actions(tokens, None)
        print(f"{name:<29} accuracy {(tokens.numpy() == true).mean():.3f} "
              f"error {abs(actions - recorded).mean():.3f} size {abs(actions[:, :3]).mean():.3f}",
              success(checkpoint, wrong, trials, films / name) if trials else "", flush=True)
    if trials:
        draw_ends(films)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--checkpoint", default="runs/demo+n1+b32+x7", help="a run")
    parser.add_argument("--frames", type=int, default=478,
                        help="number of frames, evenly spread; 478 are all")
    parser.add_argument("--success", type=int, default=0, metavar="N",
                        help="episodes of each of six tasks")
    args = parser.parse_args()
    with exit_with_one_line():
        main(args.checkpoint, args.frames, args.success)
