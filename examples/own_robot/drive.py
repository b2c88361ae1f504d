"""The policy drives the robot, through the server: success in so many episodes.

    python serve_vla.py --checkpoint runs/my_robot+n1+b32+x7     in one terminal (or on another machine), and
    python examples/own_robot/drive.py --episodes 40             in another

A robot that does not stop to wait asks while it still moves: with --delay 3, the answer comes three steps
after the pictures were taken, and meanwhile the last three steps of the plan are done. With --prefix the
question names them, so that the answer goes on from there.

This is what runs on a robot's own computer: it needs the robot and a few lines of Python, nothing of the
project. Read ask, then drive. What goes in is what was recorded, pictures by the camera's name and the state
as it was; what comes back is what the robot was told when it was recorded, for the next few steps.
"""

import argparse
import base64
import io
import json
import urllib.error
import urllib.request

import numpy as np
from PIL import Image
from robot import Arm

CAMERAS = {"primary": "outside", "wrist": "wrist"}  # the model's names of them (see the YAML): the robot's
FIRST_SEED = 200_000  # of these episodes nothing was recorded
STEPS, HELD = 40, 8  # an episode is 4 s; it succeeds when the goal is held for all of the last 0.8 s


def ask(url: str, seen: dict, instruction: str, prefix: list) -> np.ndarray:
    """What to do in the next steps: (action_chunk, A), as it was recorded. seen: what robot.look() gave;
    prefix: the first of these steps, where they are settled."""
    request = {"images": {name: jpeg(seen["images"][camera]) for name, camera in CAMERAS.items()},
               "proprio": seen["state"].tolist(), "instruction": instruction, "prefix": prefix}
    post = urllib.request.Request(f"{url}/act", json.dumps(request).encode())
    try:
        with urllib.request.urlopen(post, timeout=60) as reply:
            return np.array(json.load(reply))
    except urllib.error.HTTPError as error:  # names the field and the cure
        raise SystemExit(f"error: {json.load(error)['error']}") from None


def jpeg(image: np.ndarray) -> str:
    """A picture (H, W, 3) uint8 as base64 of a JPEG file, in the quality in which it was recorded."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "jpeg", quality=95)
    return base64.b64encode(file.getvalue()).decode()


def drive(robot: Arm, url: str, seed: int, delay: int = 0, with_prefix: bool = False) -> dict:
    """One episode -> was the goal reached at any time, and held to the end? And how far the joints were told
    to turn in a step (radians, the farthest): where one answer follows another, and everywhere else."""
    robot.reset(seed)
    solved, told, seams, settled = [], [], [], np.empty((0, len(robot.action_names)))
    while len(solved) < STEPS:
        answer = ask(url, robot.look(), robot.instruction, settled.tolist() if with_prefix else [])
        plan = np.concatenate([settled, answer[len(settled) :]])  # it comes when the settled ones are done
        seams.append(len(solved) + len(settled))
        plan, settled = plan[: len(plan) - delay], plan[len(plan) - delay :]
        for action in plan[: STEPS - len(solved)]:
            robot.move(action)
            told.append(action)
            solved.append(robot.solved)
    turned = np.abs(np.diff(np.array(told)[:, :-1], axis=0)).max(1)  # turned[t]: from step t to t + 1
    at_seam = np.isin(np.arange(1, STEPS), seams)
    return {"reached": any(solved), "success": all(solved[-HELD:]), "seams": turned[at_seam],
            "others": turned[~at_seam]}


def interval(count: int, of: int) -> tuple[float, float]:
    """Where a rate lies with 95 %, by Wilson."""
    rate, z = count / of, 1.96
    middle, half = rate + z**2 / (2 * of), z * np.sqrt(rate * (1 - rate) / of + z**2 / (4 * of**2))
    return (middle - half) / (1 + z**2 / of), (middle + half) / (1 + z**2 / of)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where serve_vla.py listens")
    parser.add_argument("--episodes", type=int, default=40)
    parser.add_argument("--delay", type=int, default=0, help="steps from the pictures to the answer")
    parser.add_argument("--prefix", action="store_true", help="tell the server what is done in these steps")
    args = parser.parse_args()
    with urllib.request.urlopen(f"{args.url}/health", timeout=60) as reply:
        health = json.load(reply)
    print(f"model {health['model']} action_shape {health['action_shape']} action {health['action']}")
    if args.delay * 2 > health["action_shape"][0]:
        parser.error(f"--delay {args.delay}: longer than half of the {health['action_shape'][0]} steps that "
                     "an answer has")
    robot, results = Arm(), []
    for episode in range(args.episodes):
        results.append(drive(robot, args.url, FIRST_SEED + episode, args.delay, args.prefix))
        print(f"episode {episode} reached {results[-1]['reached']} success {results[-1]['success']} "
              f"instruction {robot.instruction!r}", flush=True)
    reached, success = (sum(result[key] for result in results) for key in ("reached", "success"))
    seams, others = (np.concatenate([result[key] for result in results]) for key in ("seams", "others"))
    low, high = interval(success, len(results))
    print(f"episodes {len(results)} reached {reached} success {success} rate {success / len(results):.3f} "
          f"between {low:.3f} and {high:.3f} turn_at_seams {seams.mean():.3f} elsewhere {others.mean():.3f}")


if __name__ == "__main__":
    main()
