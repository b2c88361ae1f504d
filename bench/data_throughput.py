"""Speed of indexing, and frames per second and memory of the data loader, compared with OpenVLA's.

    python bench/data_throughput.py --workers 2 [--image_aug] [--samples 50000]
    python bench/data_throughput.py --openvla ../openvla --openvla_python ../openvla-env/bin/python

Without --data_root_dir it first writes 3,000 photo-like 256 px JPEG frames under the name
libero_spatial_no_noops. Files are read once before timing, so that they are in the page cache.

OpenVLA's loader runs on the same files in its own process and environment, with its pinned versions
(tensorflow 2.15, tensorflow-datasets 4.9.3, tensorflow-graphics 2021.12.3, dlimp, numpy 1.26) and
its own settings, except a shuffle buffer of 2,000 frames. Its frames are counted as they leave
tf.data, before tokenizing and batching. OpenVLA does these in the training process, we do them in
the workers.
"""

import argparse
import functools
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import psutil
import tensorflow_datasets as tfds
from PIL import Image

from action_tokenizer import load_tokenizer
from data import Mixture, TrainBatches, make_loader, open_tables
from machinery import oxe
from machinery.config import TrainConfig
from machinery.frames import find_dataset
from machinery.host import cores
from machinery.recipes import standardize
from machinery.rlds import _index_shard, step_features, write_rlds

OPENVLA = '''
import sys, time, types, psutil
for name in ("prismatic", "prismatic.vla", "prismatic.vla.datasets"):  # their __init__ files want torch
    module = types.ModuleType(name); module.__path__ = [sys.argv[1] + "/" + name.replace(".", "/")]
    sys.modules[name] = module
import logging
stub = types.ModuleType("prismatic.overwatch")
stub.initialize_overwatch = lambda *_: logging.getLogger("openvla")
sys.modules["prismatic.overwatch"] = stub
from prismatic.vla.datasets.rlds.dataset import make_interleaved_dataset
from prismatic.vla.datasets.rlds.oxe import get_oxe_dataset_kwargs_and_weights
from prismatic.vla.datasets.rlds.utils.data_utils import NormalizationType

root, name, size, augment, samples = *sys.argv[2:4], *map(int, sys.argv[4:])
kwargs, weights = get_oxe_dataset_kwargs_and_weights(
    root, [(name, 1.0)], load_camera_views=("primary",), load_depth=False, load_proprio=False,
    load_language=True, action_proprio_normalization_type=NormalizationType.BOUNDS_Q99)
frame = dict(resize_size=(size, size), num_parallel_calls=16)
if augment:
    frame["image_augment_kwargs"] = dict(
        random_resized_crop=dict(scale=[0.9, 0.9], ratio=[1.0, 1.0]), random_brightness=[0.2],
        random_contrast=[0.8, 1.2], random_saturation=[0.8, 1.2], random_hue=[0.05],
        augment_order=["random_resized_crop", "random_brightness", "random_contrast", "random_saturation",
                       "random_hue"])
dataset, _, _ = make_interleaved_dataset(
    traj_transform_kwargs=dict(window_size=1, future_action_window_size=0, skip_unlabeled=True,
                               goal_relabeling_strategy="uniform"),
    frame_transform_kwargs=frame, dataset_kwargs_list=kwargs, shuffle_buffer_size=2000,
    sample_weights=weights, balance_weights=True, traj_transform_threads=1, traj_read_threads=1, train=True)
iterator = dataset.as_numpy_iterator()
for _ in range(300):
    next(iterator)
def rss():
    return psutil.Process().memory_info().rss / 1e6
before, start = rss(), time.perf_counter()
for _ in range(samples):
    next(iterator)
print("RESULT", samples / (time.perf_counter() - start), rss() - before, rss())
'''


def write_frames(directory: Path, frames: int) -> None:
    """A dataset with LIBERO's names: smooth 256 px images with some noise, JPEGs of about 25 KB."""
    f, rng = tfds.features, np.random.default_rng(0)
    features = {"steps": f.Dataset({
        "observation": {"image": f.Image(shape=(256, 256, 3), encoding_format="jpeg"),
                        "wrist_image": f.Image(shape=(8, 8, 3), encoding_format="jpeg"),
                        "state": f.Tensor(shape=(8,), dtype=np.float32)},
        "action": f.Tensor(shape=(7,), dtype=np.float32), "language_instruction": f.Text()})}

    def step(i):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
        image = np.array(coarse.resize((256, 256), Image.Resampling.BICUBIC), np.int16)
        image = np.clip(image + rng.integers(-6, 7, image.shape), 0, 255).astype(np.uint8)
        return {"observation": {"image": image, "wrist_image": np.zeros((8, 8, 3), np.uint8),
                                "state": np.zeros(8, np.float32)},
                "action": rng.uniform(-1, 1, 7).astype(np.float32), "language_instruction": f"task {i % 10}"}

    episodes = ({"steps": [step(i) for i in range(100)]} for _ in range(frames // 100))
    write_rlds(directory, "libero_spatial_no_noops", "1.0.0", features, {"train": episodes})


def index_speed(directory: Path, name: str) -> None:
    """Print how fast one process reads, checks, and standardizes the shards of a dataset."""
    path, recipe = find_dataset(directory, name), oxe.DATASETS[name]
    keys = recipe.camera_keys(["primary"])
    read = functools.partial(
        _index_shard, features=step_features(path), skip_bad=False, known_bad={},
        transform=functools.partial(standardize, recipe=recipe, cameras=keys, load_proprio=False))
    splits = tfds.builder_from_directory(path).info.splits.values()
    shards = [(Path(file), count) for split in splits
              for file, count in zip(split.filepaths, split.shard_lengths, strict=True)]
    size = sum(len(shard.read_bytes()) for shard, _ in shards)
    read(*shards[0])  # warm up: imports
    start = time.perf_counter()
    for shard, count in shards:
        read(shard, count)
    speed = size / (time.perf_counter() - start) / 1e9
    print(f"index bytes {size} gb_per_s_per_core {speed:.2f}", flush=True)


def ours(cfg: TrainConfig, tokenizer, samples: int) -> tuple[float, float, float]:
    """-> frames per second, growth of RSS in MB while loading, final RSS in MB. Includes all
    processes."""
    mixture = Mixture(cfg, open_tables(cfg), tokenizer)
    batches = TrainBatches(mixture, cfg.global_batch_size, cfg.per_device_batch_size, 0, 1)
    loader = make_loader(batches, cfg.num_workers, range(1 << 40))
    for _ in range(10):
        next(loader)

    def rss():
        me = psutil.Process()
        return sum(p.memory_info().rss for p in [me, *me.children(recursive=True)]) / 1e6

    steps = math.ceil(samples / cfg.per_device_batch_size)
    before, start = rss(), time.perf_counter()
    for _ in range(steps):
        next(loader)
    return steps * cfg.per_device_batch_size / (time.perf_counter() - start), rss() - before, rss()


def openvla(args, data_root_dir: str, augment: bool) -> tuple[float, float, float]:
    """The same three numbers for OpenVLA's loader."""
    done = subprocess.run(
        [args.openvla_python, "-c", OPENVLA, args.openvla, data_root_dir, args.data_mix, str(args.image_size),
         str(int(augment)), str(args.samples)], capture_output=True, text=True)
    line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT")), None)
    if line is None:
        sys.exit(f"error: OpenVLA's loader failed:\n{done.stderr[-2000:]}")
    return tuple(map(float, line.split()[1:]))


def report(name: str, augment: bool, samples: int, speed: float, growth: float, rss: float) -> None:
    """Print one line of figures."""
    print(f"loader {name} image_aug {augment} samples {samples} frames_per_s {speed:.0f} "
          f"rss_growth_mb {growth:.0f} rss_mb {rss:.0f}", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--data_root_dir")
    parser.add_argument("--data_mix", default="libero_spatial_no_noops",
                        help="of Open X-Embodiment")
    parser.add_argument("--workers", type=int, default=cores())
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--image_aug", action="store_true")
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--tokenizer", default="tests/fixtures/model/tokenizer_llama")
    parser.add_argument("--openvla", metavar="PATH",
                        help="compare with this checkout of openvla/openvla")
    parser.add_argument("--openvla_python", default=sys.executable,
                        help="a Python with its requirements")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if args.data_root_dir is None:
            write_frames(Path(scratch), 3000)
        cfg = TrainConfig(data_root_dir=args.data_root_dir or scratch, data_mix=args.data_mix,
                          image_size=args.image_size, num_workers=args.workers, index_dir=f"{scratch}/index",
                          global_batch_size=32, per_device_batch_size=32)
        tokenizer = load_tokenizer(args.tokenizer)
        index_speed(Path(cfg.data_root_dir), cfg.data_mix)
        for augment in [False, True] if args.image_aug or args.openvla else [False]:
            cfg = cfg.model_copy(update={"image_aug": augment})
            mine = ours(cfg, tokenizer, args.samples)
            report(f"ours workers {args.workers}", augment, args.samples, *mine)
            if args.openvla:
                theirs = openvla(args, cfg.data_root_dir, augment)
                report("openvla", augment, args.samples, *theirs)
                print(f"ratio image_aug {augment} {mine[0] / theirs[0]:.2f}", flush=True)


if __name__ == "__main__":
    main()
