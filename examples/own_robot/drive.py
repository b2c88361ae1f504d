"""The policy drives the robot, through the server: success in so many episodes.

    python serve_vla.py --checkpoint runs/my_robot+n1+b32+x7     in one terminal (or on another machine), and
    python examples/own_robot/drive.py --episodes 40             in another

A robot that does not stop to think asks while it still moves: with --delay 3, the answer is there three steps
after the pictures were taken, and the last three steps of the plan before are done meanwhile. With --prefix,
the question names them, so that the answer goes on from there.

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
    """One episode -> was the goal reached at any time, and held to the end? And for the joints' targets, how
    far they went from each step to the next (radians): within an answer, and from one answer to another."""
    robot.reset(seed)
    solved, settled, told, joints = [], np.empty((0, len(robot.action_names))), [], []
    while len(solved) < STEPS:
        answer = ask(url, robot.look(), robot.instruction, settled.tolist() if with_prefix else [])
        plan = np.concatenate([settled, answer[len(settled) :]])  # the answer was not there before
        plan, settled = np.split(plan, [len(plan) - delay])
        joints.append(len(told) + delay)
        for action in plan[: STEPS - len(solved)]:
            robot.move(action)
            told.append(action[:3])
            solved.append(robot.solved)
    return {"reached": any(solved), "success": all(solved[-HELD:])}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where serve_vla.py listens")
    parser.add_argument("--episodes", type=int, default=40)
    args = parser.parse_args()
    with urllib.request.urlopen(f"{args.url}/health", timeout=60) as reply:
        health = json.load(reply)
    print(f"model {health['model']} action_shape {health['action_shape']} action {health['action']}")
    robot, results = Arm(), []
    for episode in range(args.episodes):
        results.append(drive(robot, args.url, FIRST_SEED + episode))
        print(f"episode {episode} reached {results[-1]['reached']} success {results[-1]['success']} "
              f"instruction {robot.instruction!r}", flush=True)
    reached, success = (sum(result[key] for result in results) for key in ("reached", "success"))
    print(f"episodes {len(results)} reached {reached} success {success} rate {success / len(results):.3f}")


if __name__ == "__main__":
    main()
