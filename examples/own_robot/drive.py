"""Drive the robot with a policy, through the server, and count successes.

    python serve_vla.py --checkpoint runs/my_robot+n1+b32+x7     in one terminal (or on another machine), and
    python examples/own_robot/drive.py --episodes 40             in another

A robot that does not wait asks while it is moving. With --delay 3, the answer arrives three steps
after the images were taken, and the robot meanwhile executes the last three steps of its plan. With
--prefix, the request includes these steps, and the answer continues from them.

This is the code for a robot's own computer. It needs the robot and a few lines of Python, but
nothing from this project. Read ask, then drive. The request has the recorded inputs: images by the
cameras' names, and the state. The reply has the recorded kind of action, for the next few steps.
"""

import argparse
import base64
import io
import json
import urllib.error
import urllib.request

from robot import Arm  # first: it names a missing package

# isort: split

import numpy as np
from PIL import Image

# the model's camera names (see the YAML): the robot's
CAMERAS = {"primary": "outside", "wrist": "wrist"}
FIRST_SEED = 200_000  # no recorded episode has these seeds
STEPS, HELD = 40, 8  # an episode is 4 s; it succeeds if the goal is held for the last 0.8 s


def ask(url: str, seen: dict, instruction: str, prefix: list) -> np.ndarray:
    """The actions of the next steps: (action_chunk, A), in the recorded units. seen: the output of
    robot.look(); prefix: the first of these steps, if they are already decided."""
    request = {"images": {name: jpeg(seen["images"][camera]) for name, camera in CAMERAS.items()},
               "proprio": seen["state"].tolist(), "instruction": instruction, "prefix": prefix}
    post = urllib.request.Request(f"{url}/act", json.dumps(request).encode())
    try:
        with urllib.request.urlopen(post, timeout=60) as reply:
            return np.array(json.load(reply))
    except urllib.error.HTTPError as error:  # its message names the field and the fix
        raise SystemExit(f"error: {json.load(error)['error']}") from None


def jpeg(image: np.ndarray) -> str:
    """An image (H, W, 3) uint8 as base64 of a JPEG file, with the recording's quality."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "jpeg", quality=95)
    return base64.b64encode(file.getvalue()).decode()


def drive(robot: Arm, url: str, seed: int, delay: int = 0, with_prefix: bool = False) -> dict:
    """One episode -> was the goal reached at any time, was it held to the end, and how far did the
    joints turn per step (radians, the largest): at the seams between two answers, and at all other
    steps."""
    robot.reset(seed)
    solved, told, seams, settled = [], [], [], np.empty((0, len(robot.action_names)))
    while len(solved) < STEPS:
        answer = ask(url, robot.look(), robot.instruction, settled.tolist() if with_prefix else [])
        # it arrives when the prefix has been executed
        plan = np.concatenate([settled, answer[len(settled) :]])
        seams.append(len(solved) + len(settled))
        plan, settled = plan[: len(plan) - delay], plan[len(plan) - delay :]
        for action in plan[: STEPS - len(solved)]:
            robot.move(action)
            told.append(action)
            solved.append(robot.solved)
    # turned[t]: from step t to t + 1
    turned = np.abs(np.diff(np.array(told)[:, :-1], axis=0)).max(1)
    at_seam = np.isin(np.arange(1, STEPS), seams)
    return {"reached": any(solved), "success": all(solved[-HELD:]), "seams": turned[at_seam],
            "others": turned[~at_seam]}


def interval(count: int, of: int) -> tuple[float, float]:
    """The 95% interval of a rate (Wilson)."""
    rate, z = count / of, 1.96
    middle, half = rate + z**2 / (2 * of), z * np.sqrt(rate * (1 - rate) / of + z**2 / (4 * of**2))
    return (middle - half) / (1 + z**2 / of), (middle + half) / (1 + z**2 / of)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where serve_vla.py listens")
    parser.add_argument("--episodes", type=int, default=40, help="how many")
    parser.add_argument("--delay", type=int, default=0, help="steps from the images to the answer")
    parser.add_argument("--prefix", action="store_true",
                        help="send the actions executed in these steps")
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
          f"between {low:.3f} and {high:.3f} turn_at_seams {seams.mean():.3f} elsewhere {others.mean():.3f} "
          f"{getattr(robot, 'simulator', '')}".rstrip())


if __name__ == "__main__":
    main()
