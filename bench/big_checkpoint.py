"""The life cycle of a model with 7.5 billion parameters: load, train a step, save, export, act.

    python bench/big_checkpoint.py --folder /tmp/big

Writes a checkpoint with random bf16 weights (15 GB) in OpenVLA's Hugging Face layout. Then runs the
project's own commands on it, one process each, and prints the seconds and peak host memory of each.
Only the language model's embeddings, head, and last layer are trained ("last layer"), so that
weights and moments fit a disk of 64 GB.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
import yaml
from act_latency import STATS
from data_throughput import write_frames

from action_tokenizer import load_tokenizer
from export_vla import save_tokenizer, write_hugging_face
from machinery.checkpoint import Tensors, list_checkpoints
from machinery.config import TrainConfig
from machinery.weights import PRISMATIC, Weights, parameters_without_memory, prismatic_config
from model import VLA

ACT = """
import sys, time, numpy as np, torch
sys.path.insert(0, {root!r})
from act import load_vla
started = time.time()
vla = load_vla({export!r}, "cuda", torch.bfloat16)
gpu_gb = torch.cuda.max_memory_allocated() / 1e9
print("loaded_seconds", round(time.time() - started, 1), "gpu_gb", round(gpu_gb, 1))
image = np.zeros((224, 224, 3), np.uint8)
print("action", vla.predict_action(image, "put the carrot on the plate").round(3).tolist())
"""


def write_random_model(folder: Path, model: dict) -> None:
    """Random bf16 weights in OpenVLA's Hugging Face layout. model: the keys of TrainConfig that
    describe it."""
    cfg, device = TrainConfig(**model, action_dim=7), "cuda" if torch.cuda.is_available() else "cpu"
    with parameters_without_memory():
        vla = VLA(cfg, load_tokenizer(cfg.tokenizer, cfg.add_action_tokens))

    def draw(start: int, stop: int) -> torch.Tensor:
        return (torch.randn(stop - start, device=device) * 0.02).bfloat16().cpu()

    tensors = Tensors(folder)
    for name, p in vla.named_parameters():
        tensors.add(name, p.shape, draw)
    folder.mkdir(parents=True)
    save_tokenizer(cfg, folder)
    write_hugging_face(Weights(tensors, model, STATS), cfg, folder, None)
    if device == "cuda":
        torch.cuda.empty_cache()  # for the following processes


def timed(name: str, command: list) -> str:
    """Run a command; print its seconds and the peak memory of its largest process."""
    started = time.time()
    done = subprocess.run([str(part) for part in command], text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    print(f"{name} seconds {time.time() - started:.0f} largest_host_gb_so_far {peak:.1f}", flush=True)
    if done.returncode:
        sys.exit(done.stdout[-3000:])
    return done.stdout


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True,
                        help="on a disk with 50 GB free; its contents are deleted")
    parser.add_argument("--base", default="prism-dinosiglip-224px+7b")
    args = parser.parse_args()
    folder = args.folder
    shutil.rmtree(folder, ignore_errors=True)
    started = time.time()
    write_random_model(folder / "hf", prismatic_config(*PRISMATIC[args.base]) | {
        "tokenizer": str(ROOT / "tests/fixtures/model/tokenizer_llama")})
    print(f"made seconds {time.time() - started:.0f}", flush=True)
    write_frames(folder / "data", 200)
    (folder / "config.yaml").write_text(yaml.safe_dump({
        "base_vlm": str(folder / "hf"), "data_root_dir": str(folder / "data"),
        "data_mix": "libero_spatial_no_noops", "run_root_dir": str(folder / "runs"), "run_id": "big",
        "freeze_vision_backbone": True, "freeze_llm_backbone": True, "unfreeze_last_llm_layer": True,
        "global_batch_size": 16, "per_device_batch_size": 16, "max_steps": 1, "eval_interval": 0,
        "eval_samples": 16}))
    text = timed("train", [sys.executable, ROOT / "train_vla.py", "--config", folder / "config.yaml"])
    wanted = ("weights_from", "model", "batch", "step", "saved", "done")
    print("\n".join(line for line in text.splitlines() if line.startswith(wanted)), flush=True)
    shutil.rmtree(folder / "hf")
    (checkpoint,) = list_checkpoints(folder / "runs/big/checkpoints")
    size = sum(file.stat().st_size for file in checkpoint.iterdir()) / 1e9
    names = json.loads((checkpoint / "checkpoint.json").read_text())["tensors"]
    print(f"checkpoint_gb {size:.1f} tensors {len(names)}", flush=True)
    timed("export", [sys.executable, ROOT / "export_vla.py", folder / "runs/big", folder / "exported",
                     "--format", "hf", "--dtype", "bf16"])
    text = timed("act", [sys.executable, "-c", ACT.format(root=str(ROOT), export=str(folder / "exported"))])
    print("\n".join(line for line in text.splitlines() if line.startswith(("loaded", "action"))))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
