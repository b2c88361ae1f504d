"""Training speed of OpenVLA-7B's shape, through train_vla.py itself: a table of samples/s, MFU and memory.

    python bench/train_throughput.py --num_gpus 1 --cases zero3_partial_offload:32:compile zero2:8

A case is JSON:micro-batch[:recompute][:compile]; JSONs are those of ds_configs/. Weights are random and the
data synthetic (photo-like 256 px JPEGs, written first), but the path is the real one: loader, engine, step,
log.
Every case is a run of its own; its figures are medians over the steps after the warm-up.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import yaml
from data_throughput import write_frames

from weights import PRISMATIC, prismatic_config


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", nargs="+", default=["zero2:32", "zero3:32:recompute"])
    parser.add_argument("--num_gpus", type=int, default=1)
    parser.add_argument("--global_batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warmup", type=int, default=2, help="steps that are not counted")
    parser.add_argument("--base", default="prism-dinosiglip-224px+7b", help="a Prismatic id, for its shape")
    parser.add_argument("--num_layers", type=int, help="fewer layers in the language model, for a quick try")
    parser.add_argument("--num_workers", type=int, default=8)
    parser.add_argument("--timeout", type=int, default=500, help="seconds for a case")
    parser.add_argument("--out", type=Path, help="also write the table's rows here, as JSON lines")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_frames(Path(folder), 2000)
        print("case samples/s/GPU TFLOP/s MFU GPU_GB host_GB step_s data_s startup_s", flush=True)
        for case in args.cases:
            row = measure(case, args, Path(folder))
            print(case, " ".join(f"{value:.4g}" for value in row.values() if isinstance(value, float))
                  or row["failed"], flush=True)
            if args.out:
                with open(args.out, "a") as file:
                    file.write(json.dumps({"case": case, **row}) + "\n")


def measure(case: str, args, folder: Path) -> dict:
    """Train a few steps -> medians over those after the warm-up."""
    name, micro, *switches = case.split(":")
    config = prismatic_config(*PRISMATIC[args.base])
    if args.num_layers:
        config["llm_backbone"] = {**config["llm_backbone"], "num_hidden_layers": args.num_layers}
    config |= {
        "vla_id": case.replace(":", "-"), "data_root_dir": str(folder), "data_mix": "libero_spatial_no_noops",
        "tokenizer": str(ROOT / "tests/fixtures/model/tokenizer_llama"), "run_root_dir": str(folder / "runs"),
        "max_steps": args.steps, "learning_rate": 2e-5, "global_batch_size": args.global_batch,
        "per_device_batch_size": int(micro),
        "num_workers": args.num_workers, "log_interval": 1, "eval_interval": 0, "eval_samples": int(micro),
        "save_interval": 0, "compile": "compile" in switches,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    ds_config = json.loads((ROOT / f"ds_configs/{name}.json").read_text())
    if "recompute" in switches:
        ds_config["activation_checkpointing"] = {}
    (folder / "ds.json").write_text(json.dumps(ds_config))
    command = ["deepspeed", "--num_gpus", str(args.num_gpus)] if args.num_gpus > 1 else [sys.executable]
    started = time.time()
    try:
        done = subprocess.run(
            [*command, str(ROOT / "train_vla.py"), "--config", str(folder / "config.yaml"),
             "--deepspeed_config", str(folder / "ds.json")],
            env={**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, timeout=args.timeout,
            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        text = done.stdout
    except subprocess.TimeoutExpired as late:
        text = (late.stdout or b"").decode()
    metrics = next(folder.glob(f"runs/{config['vla_id']}+*/metrics.jsonl"), None)
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics else []
    steps = [line for line in lines if "loss" in line and line["step"] > args.warmup]
    if not steps:
        reasons = [line for line in text.splitlines() if "Error" in line or "error" in line]
        return {"failed": (reasons or text.splitlines()[-1:] or ["no output"])[-1][:200], "log": text[-9000:]}
    startup = [line for line in text.splitlines() if "startup_s" in line]
    middle = {key: float(np.median([step[key] for step in steps])) for key in (
        "samples_per_second", "tflops_per_gpu", "mfu", "gpu_gb", "host_gb", "step_seconds", "data_seconds")
        if key in steps[0]}
    middle["samples_per_second"] /= args.num_gpus
    middle["startup_s"] = float(startup[0].split("startup_s")[1]) if startup else float("nan")
    return {
        **middle,
        "wall_s": time.time() - started,
        "losses": [line["loss"] for line in lines if "loss" in line],
    }


if __name__ == "__main__":
    main()
