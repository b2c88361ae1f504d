"""Datasets written by LeRobot's own package: are they converted exactly, and how fast beside its own reading?

    python bench/lerobot_read.py --lerobot_python ../lerobot-env/bin/python [--check] [--workers 2]

LeRobot runs in an environment of its own: lerobot 0.3.3 writes v2.1, 0.4.4 writes v3.0; each needs datasets, av
and torchcodec (datasets < 4 for 0.3.3). --check: sets of 3 to 5 episodes in H.264 and AV1, of videos and images,
6-D and 14-D; every number and text must be equal, every picture where it belongs, and where SVT-AV1 has encoded
another picture than it was given, both readers must see the same one. Without: one set of 12 x 150 frames of two
640 x 480 videos; a frame is both pictures. LeRobot's reader decodes to float tensors and keeps nothing; the
converter decodes, resizes to 256, writes JPEGs and indexes them, once, and its start of some seconds counts.
"""

import argparse
import io
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
from PIL import Image

from rlds import Steps, read_records, step_features


def lerobot(args, *words) -> str:
    """Run tests/with_lerobot.py in LeRobot's environment -> what it printed."""
    done = subprocess.run([args.lerobot_python, str(ROOT / "tests/with_lerobot.py"), *map(str, words)], text=True,
                          capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1", "SVT_LOG": "1"})
    if done.returncode:
        sys.exit(f"error: LeRobot failed:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def convert(source: Path, out: Path, *words) -> str:
    """Run the converter."""
    done = subprocess.run([sys.executable, str(ROOT / "examples/lerobot/convert.py"), "--source", str(source),
                           "--out", str(out), "--name", "my_robot", *map(str, words)], text=True,
                          capture_output=True)
    if done.returncode:
        sys.exit(f"error: convert.py failed:\n{done.stdout + done.stderr}")
    return done.stdout


def read_pattern(image: np.ndarray) -> list[int]:
    """As in tests/with_lerobot.py."""
    centres = [[(2 * i + 1) * side // 8 for i in range(4)] for side in image.shape[:2]]
    bits = "".join("01"[int(image[y - 2 : y + 3, x - 2 : x + 3, 0].mean() > 125)]
                   for y in centres[0] for x in centres[1])
    return [int(bits[:2], 2), int(bits[2:7], 2), int(bits[7:], 2)]


def read_back(directory: Path, cameras: list[str]) -> tuple[np.ndarray, list[str], np.ndarray]:
    """A converted dataset -> (N, 2, A) states and actions, texts, (N, cameras, 3) what its pictures say."""
    features, numbers, texts, seen = step_features(directory), [], [], []
    for path in sorted(directory.glob("*.tfrecord*")):
        whole = path.read_bytes()
        for offset, data in read_records(path):
            steps = Steps(data, offset, features)
            numbers.append(np.stack([steps["observation/state"], steps["action"]], axis=1))
            texts += [text.decode() for text in steps["language_instruction"]]
            spans = [steps.spans(f"observation/{camera}") for camera in cameras]
            seen += [[read_pattern(np.array(Image.open(io.BytesIO(whole[i : i + n])))) for i, n in row]
                     for row in zip(*spans, strict=True)]
    return np.concatenate(numbers), texts, np.array(seen)


def check(args, folder: Path) -> None:
    """Compare sets of several kinds."""
    kinds = [{"front": "video", "wrist": "video"}, {"front": "video", "wrist": "image", "top": "image"}]
    for number, (codec, cameras, width) in enumerate(itertools.product(["h264", "libsvtav1"], kinds, [6, 14])):
        source, out = folder / f"source{number}", folder / f"out{number}"
        how = {"codec": codec, "kinds": cameras, "width": width, "lengths": [20, 31, 12, 25], "size": [96, 128]}
        lerobot(args, "write", source, json.dumps(how))
        version = json.loads((source / "meta/info.json").read_text())["codebase_version"]
        convert(source, out, "--image_size", "128")
        numbers, texts, seen = read_back(out / "my_robot/1.0.0", [*cameras])
        truth = np.load(f"{source}.npz")
        written = [[[c, e, f] for c in range(len(cameras))] for e, n in enumerate(how["lengths"]) for f in range(n)]
        right, theirs = (seen == written).all(-1), (truth["seen"] == written).all(-1)
        as_theirs = (seen == truth["seen"]).all(-1)
        print(f"check version {version} codec {codec} cameras {'+'.join(cameras.values())} width {width} frames "
              f"{len(seen)} numbers_equal {np.array_equal(numbers, truth['numbers'])} texts_equal "
              f"{texts == truth['texts'].tolist()} pictures {seen[..., 0].size} in_place {right.sum()} "
              f"in_place_as_lerobot_reads {theirs.sum()} same_as_lerobot {as_theirs.sum()}", flush=True)


def speed(args, folder: Path) -> None:
    """Time both readers on one set, one after the other."""
    how = {"codec": args.codec, "kinds": {"front": "video", "wrist": "video"}, "width": 6,
           "lengths": [150] * args.episodes, "size": [480, 640]}
    lerobot(args, "write", folder / "source", json.dumps(how))
    frames, size = sum(how["lengths"]), sum(p.stat().st_size for p in (folder / "source").rglob("*.mp4"))
    print(f"set codec {args.codec} frames {frames} cameras 2 mp4_bytes {size} cores "
          f"{len(os.sched_getaffinity(0))} load {os.getloadavg()[0]:.1f}", flush=True)
    for turn in range(args.turns):
        for line in lerobot(args, "read", folder / "source", args.workers).splitlines():
            if line.startswith("RESULT"):
                _, order, value = line.split()
                print(f"turn {turn} reader lerobot order {order} workers {args.workers} frames_per_s "
                      f"{float(value):.0f}", flush=True)
        start = time.perf_counter()
        convert(folder / "source", folder / f"out{turn}", "--workers", args.workers)
        seconds = time.perf_counter() - start
        print(f"turn {turn} reader convert.py workers {args.workers} frames_per_s {frames / seconds:.0f} seconds "
              f"{seconds:.1f}", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--lerobot_python", required=True)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--codec", choices=("h264", "libsvtav1"), default="libsvtav1")
    parser.add_argument("--episodes", type=int, default=12)
    parser.add_argument("--turns", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (check if args.check else speed)(args, Path(folder))


if __name__ == "__main__":
    main()
