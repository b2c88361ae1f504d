"""Convert datasets written by LeRobot's own package: exactness, and speed compared with its reader.

    python bench/lerobot_read.py --lerobot_python ../lerobot-env/bin/python [--check] [--workers 2]

LeRobot runs in its own environment: lerobot 0.3.3 writes v2.1, 0.4.4 writes v3.0. Each needs
datasets, av, and torchcodec (datasets < 4 for 0.3.3).

With --check: sets in H.264 and AV1, with videos and images, 6-D and 14-D. Every number and text
must be equal, and every image at its place. Where SVT-AV1 encoded a different image than it was
given, both readers must see the same one. Exits with 1 if not.

Without --check: one set with episodes of 100 frames of two videos; a frame is both images.
LeRobot's reader decodes to float tensors and stores nothing; the startup of its workers is not
counted. The converter decodes, resizes to 256, writes JPEGs, and indexes them, once. frames_per_s
includes the seconds of imports. more_frames_per_s counts only the frames beyond a conversion of two
episodes.
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

from machinery.host import cores
from machinery.rlds import Steps, read_records, step_features


def lerobot(args, *words) -> str:
    """Run tests/with_lerobot.py in LeRobot's environment -> its output."""
    done = subprocess.run([args.lerobot_python, str(ROOT / "tests/with_lerobot.py"), *map(str, words)],
                          text=True, capture_output=True,
                          env={**os.environ, "HF_HUB_OFFLINE": "1", "SVT_LOG": "1"})
    if done.returncode:
        sys.exit(f"error: LeRobot failed:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def convert(source: Path, out: Path, *words) -> str:
    """Run the converter -> its output."""
    words = ["--source", source, "--out", out, "--name", "my_robot", *words]
    done = subprocess.run([sys.executable, str(ROOT / "examples/lerobot/convert.py"), *map(str, words)],
                          text=True, capture_output=True)
    if done.returncode:
        sys.exit(f"error: convert.py failed:\n{done.stdout + done.stderr}")
    return done.stdout


def read_pattern(image: np.ndarray) -> list[int]:
    """The same as in tests/with_lerobot.py."""
    centers = [[(2 * i + 1) * side // 8 for i in range(4)] for side in image.shape[:2]]
    bits = "".join("01"[int(image[y - 2 : y + 3, x - 2 : x + 3, 0].mean() > 125)]
                   for y in centers[0] for x in centers[1])
    return [int(bits[:2], 2), int(bits[2:7], 2), int(bits[7:], 2)]


def read_back(directory: Path, cameras: list[str]) -> tuple[np.ndarray, list[str], np.ndarray]:
    """A converted dataset -> (N, 2, A) states and actions, texts, (N, cameras, 3) the images'
    patterns."""
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
    """Compare several kinds of sets."""
    kinds = [{"front": "video", "wrist": "video"}, {"front": "video", "wrist": "image", "top": "image"}]
    bad = 0
    every = itertools.product(["h264", "libsvtav1"], kinds, [6, 14])
    for number, (codec, cameras, width) in enumerate(every):
        source, out = folder / f"source{number}", folder / f"out{number}"
        how = {"codec": codec, "kinds": cameras, "width": width, "lengths": [20, 31, 12, 25],
               "size": [96, 128]}
        lerobot(args, "write", source, json.dumps(how))
        version = json.loads((source / "meta/info.json").read_text())["codebase_version"]
        convert(source, out, "--image_size", "128")
        numbers, texts, seen = read_back(out / "my_robot/1.0.0", [*cameras])
        truth = np.load(f"{source}.npz")
        written = [[[c, e, f] for c in range(len(cameras))]
                   for e, length in enumerate(how["lengths"]) for f in range(length)]
        right, theirs = (seen == written).all(-1), (truth["seen"] == written).all(-1)
        as_theirs = (seen == truth["seen"]).all(-1)
        equal = np.array_equal(numbers, truth["numbers"]), texts == truth["texts"].tolist()
        bad += not (all(equal) and as_theirs.all() and (right.all() or codec != "h264"))
        print(f"check version {version} codec {codec} cameras {'+'.join(cameras.values())} width {width} "
              f"frames {len(seen)} numbers_equal {equal[0]} texts_equal {equal[1]} pictures {right.size} "
              f"in_place {right.sum()} "
              f"in_place_as_lerobot_reads {theirs.sum()} same_as_lerobot {as_theirs.sum()}", flush=True)
    sys.exit(1 if bad else 0)


def speed(args, folder: Path) -> None:
    """Time both readers on one set, one after the other."""
    how = {"codec": args.codec, "kinds": {"front": "video", "wrist": "video"}, "width": 6,
           "lengths": [100] * args.episodes, "size": args.size}
    lerobot(args, "write", folder / "source", json.dumps(how))
    frames, size = sum(how["lengths"]), sum(p.stat().st_size for p in (folder / "source").rglob("*.mp4"))
    print(f"set codec {args.codec} size {args.size[0]}x{args.size[1]} frames {frames} cameras 2 mp4_bytes "
          f"{size} cores {cores()} load {os.getloadavg()[0]:.1f}", flush=True)
    start = time.perf_counter()
    convert(folder / "source", folder / "two", "--episodes", "0-1", "--workers", args.workers)
    two = time.perf_counter() - start
    for turn in range(args.turns):
        for line in lerobot(args, "read", folder / "source", args.workers).splitlines():
            if line.startswith("RESULT"):
                _, order, value = line.split()
                print(f"turn {turn} reader lerobot order {order} workers {args.workers} frames_per_s "
                      f"{float(value):.0f}", flush=True)
        start = time.perf_counter()
        convert(folder / "source", folder / f"out{turn}", "--workers", args.workers)
        seconds = time.perf_counter() - start
        print(f"turn {turn} reader convert.py workers {args.workers} frames_per_s {frames / seconds:.0f} "
              f"more_frames_per_s {(frames - 200) / (seconds - two):.0f} seconds {seconds:.1f} two_episodes "
              f"{two:.1f} load {os.getloadavg()[0]:.1f}", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--lerobot_python", required=True)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--workers", type=int, default=cores())
    parser.add_argument("--codec", choices=("h264", "libsvtav1"), default="libsvtav1")
    parser.add_argument("--episodes", type=int, default=8)
    parser.add_argument("--size", type=int, nargs=2, default=[480, 640],
                        help="height and width of images")
    parser.add_argument("--turns", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (check if args.check else speed)(args, Path(folder))


if __name__ == "__main__":
    main()
