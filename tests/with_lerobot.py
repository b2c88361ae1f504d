"""Run by the Python of an environment with LeRobot's package (0.3.3 writes v2.1, 0.4.4 v3.0), not by ours.

    with_lerobot.py write DIR JSON       a dataset of pictures that tell which they are; what was written, and
                                         what LeRobot itself reads, goes to DIR.npz
    with_lerobot.py read DIR WORKERS     prints how many frames a second its own reading gives

JSON: {"codec": "h264" or "libsvtav1", "kinds": {camera: "video" or "image"}, "width": 6, "lengths": [...],
"size": [height, width]}
"""

import functools
import inspect
import json
import logging
import sys
import time

import numpy as np
import torch
from lerobot.datasets import lerobot_dataset
from lerobot.datasets.lerobot_dataset import LeRobotDataset

FPS = 30
TEXTS = ["pick up the cube", "leg den Würfel in die Schale", "把方块放进碗里"]


def pattern(camera: int, episode: int, frame: int, size: tuple[int, int]) -> np.ndarray:
    """As in test_lerobot.py; large ones have some texture, so that they take as many bytes as real ones."""
    bits = np.array([*f"{camera:02b}{episode:05b}{frame:09b}"], np.uint8).reshape(4, 4)
    rows, columns = (np.arange(side) * 4 // side for side in size)
    light = 40 + 170 * bits[rows][:, columns]
    picture = np.stack([light, light, np.full(size, 60 + frame % 100)], axis=-1)
    if max(size) > 200:
        wave = 18 * np.sin(np.arange(size[0])[:, None] / 5) * np.sin((np.arange(size[1]) + 3 * frame) / 7)
        noise = np.random.default_rng([episode, frame]).integers(-6, 7, size)
        picture = np.clip(picture + (wave + noise)[..., None], 0, 255)
    return picture.astype(np.uint8)


def read_pattern(image: np.ndarray) -> list[int]:
    """(H, W, 3) uint8 -> [camera, episode, frame]."""
    centers = [[(2 * i + 1) * side // 8 for i in range(4)] for side in image.shape[:2]]
    bits = "".join("01"[int(image[y - 2 : y + 3, x - 2 : x + 3, 0].mean() > 125)]
                   for y in centers[0] for x in centers[1])
    return [int(bits[:2], 2), int(bits[2:7], 2), int(bits[7:], 2)]


def write(root: str, how: dict) -> None:
    """Record episodes as a robot's program would, and read them back."""
    kinds, width, size, codec = how["kinds"], how["width"], tuple(how["size"]), how["codec"]
    names = [f"joint_{i}.pos" for i in range(width)]
    features = {key: {"dtype": "float32", "shape": (width,), "names": names}
                for key in ("action", "observation.state")}
    for camera, kind in kinds.items():
        features[f"observation.images.{camera}"] = {
            "dtype": kind, "shape": (*size, 3), "names": ["height", "width", "channels"]}
    more = {"vcodec": codec} if "vcodec" in inspect.signature(LeRobotDataset.create).parameters else {}
    if not more:  # 0.3.3 leaves no choice
        encode = lerobot_dataset.encode_video_frames
        lerobot_dataset.encode_video_frames = functools.partial(encode, vcodec=codec)
    dataset = LeRobotDataset.create("some/robot", FPS, features, root=root, robot_type="so101", **more)
    draw, numbers, texts = np.random.default_rng(1), [], []
    for episode, length in enumerate(how["lengths"]):
        for frame in range(length):
            state, action = draw.normal(0, 50, (2, width)).astype(np.float32)
            text = TEXTS[(episode + (frame > length // 2)) % 3]  # it changes within the episode
            seen = {f"observation.images.{camera}": pattern(c, episode, frame, size)
                    for c, camera in enumerate(kinds)}
            row = {"action": action, "observation.state": state, **seen}
            if "task" in inspect.signature(LeRobotDataset.add_frame).parameters:
                dataset.add_frame(row, text)
            else:
                dataset.add_frame({**row, "task": text})
            numbers.append([state, action])
            texts.append(text)
        dataset.save_episode()
    if hasattr(dataset, "finalize"):
        dataset.finalize()
    again, seen = LeRobotDataset("some/robot", root=root, video_backend="torchcodec"), []
    for i in range(len(again)):
        item = again[i]
        assert item["task"] == texts[i] and np.array_equal(item["action"].numpy(), numbers[i][1])
        images = [(255 * item[f"observation.images.{camera}"]).round().byte().permute(1, 2, 0).numpy()
                  for camera in kinds]
        seen.append([read_pattern(image) for image in images])
    np.savez(f"{root}.npz", numbers=np.array(numbers), texts=np.array(texts), seen=np.array(seen))


def read(root: str, workers: int) -> None:
    """As a training would, in order and shuffled; the first ten batches are not timed."""
    dataset = LeRobotDataset("some/robot", root=root, video_backend="torchcodec")
    for order in ("in_order", "shuffled"):
        loader = torch.utils.data.DataLoader(dataset, batch_size=8, num_workers=workers,
                                             shuffle=order == "shuffled")
        batches = iter(loader)
        for _ in range(10):
            next(batches)
        start = time.perf_counter()
        count = sum(len(batch["action"]) for batch in batches)
        print(f"RESULT {order} {count / (time.perf_counter() - start)}", flush=True)


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    {"write": lambda: write(sys.argv[2], json.loads(sys.argv[3])),
     "read": lambda: read(sys.argv[2], int(sys.argv[3]))}[sys.argv[1]]()
