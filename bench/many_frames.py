"""How fast an indexed dataset of millions of frames opens, and the size of its index.

    python bench/many_frames.py [--frames 2000000] [--skip_idle]

Writes frames with tiny images by repeating one episode of 1,000 frames, indexes them, opens them
again as training does, and loads a batch. --skip_idle also checks every action for idle frames, as
for DROID.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import psutil
import tensorflow_datasets as tfds

from action_tokenizer import load_tokenizer
from data import Mixture, TrainBatches, open_tables
from machinery.config import TrainConfig
from machinery.rlds import write_rlds

SHARDS = 8
F = tfds.features
FEATURES = {"steps": F.Dataset({
    "observation": {"image": F.Image(shape=(8, 8, 3), encoding_format="jpeg")},
    "action": F.Tensor(shape=(7,), dtype=np.float32), "language_instruction": F.Text()})}


def write_frames(root: Path, frames: int) -> Path:
    """The dataset `droid_many`: one record repeated in each file, with a matching
    dataset_info.json."""
    rng = np.random.default_rng(0)
    steps = [{"observation": {"image": np.zeros((8, 8, 3), np.uint8)}, "language_instruction": "lift the cup",
              "action": np.float32(rng.uniform(-1, 1, 7))} for _ in range(1000)]
    path = write_rlds(root, "droid_many", "1.0.0", FEATURES, {"train": [{"steps": steps}]})
    (shard,) = path.glob("*.tfrecord*")
    record, count = shard.read_bytes(), frames // 1000 // SHARDS
    shard.unlink()
    for number in range(SHARDS):
        (path / f"droid_many-train.tfrecord-{number:05d}-of-{SHARDS:05d}").write_bytes(record * count)
    info = json.loads((path / "dataset_info.json").read_text())
    size = len(record) * count * SHARDS
    info["splits"][0] |= {"shardLengths": [str(count)] * SHARDS, "numBytes": str(size)}
    (path / "dataset_info.json").write_text(json.dumps(info))
    return path


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--frames", type=int, default=2_000_000, help="a multiple of 8,000")
    parser.add_argument("--skip_idle", action="store_true")
    parser.add_argument("--tokenizer", default="tests/fixtures/model/tokenizer_llama")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        path = write_frames(Path(scratch), args.frames)
        cfg = TrainConfig(data_root_dir=scratch, data_mix="droid_many", global_batch_size=32,
                          datasets={"droid_many": {"primary": "image", "skip_idle": args.skip_idle}})
        for what in ("index_and_open", "open"):
            start = time.perf_counter()
            mixture = Mixture(cfg, open_tables(cfg), tokenizer)
            opened = time.perf_counter() - start
            TrainBatches(mixture, 32, 32, 0, 1)[12345]
            print(f"{what} frames {len(mixture.tables[0].frames)} open_s {opened:.2f} "
                  f"first_batch_s {time.perf_counter() - start - opened:.2f} "
                  f"rss_mb {psutil.Process().memory_info().rss / 1e6:.0f}", flush=True)
        files = [file for file in (path / ".frame_table").rglob("*") if file.is_file()]
        size = sum(file.stat().st_size for file in files)
        print(f"frame_table bytes {size} per_frame {size / len(mixture.tables[0].frames):.2f}")


if __name__ == "__main__":
    main()
