"""What GPUs of 16, 24, 48, and 80 GB can train of OpenVLA-7B, through train_vla.py: one row per
case.

    python bench/small_cards.py --out rows.jsonl                                # on a GPU, 7B's shape
    python bench/small_cards.py --config configs/demo.yaml --gb 16 --micro 1 4  # a try on the CPU
    python bench/small_cards.py --gb 24 --cases lora_bf16 --micro 1 4 --openvla ../openvla \\
        --openvla_python ../openvla-env/bin/python                              # and OpenVLA's finetune.py
    python bench/small_cards.py --gb 140 --cases oft --micro 8 --oft ../openvla-oft --openvla_python ...

The model begins with random bf16 weights, written first in OpenVLA's Hugging Face layout (15 GB;
--folder sets the place, and keeps them). The GPU is a large one of which PyTorch may use only so
many GB (torch.cuda.set_per_process_memory_fraction), so the speed is the large GPU's. Blocks are
compiled and recomputed. Every case is its own run. samples/s are medians over the steps after the
first two. The table shows cases that do not fit.

OpenVLA's step (openvla_peer.py finetune) may use all of the GPU. It has random weights of the same
shape, images of the same size, and prompts of the same length. So has OpenVLA-OFT's (finetune_oft),
which is compared with the case `oft`.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import yaml
from big_checkpoint import write_random_model
from data_throughput import write_frames
from train_throughput import failure, gpus, openvla_step, run

LAST_LAYER = {"freeze_llm_backbone": True, "unfreeze_last_llm_layer": True}
CASES = {  # the trained weights: keys of the YAML, and the JSON
    "lora_bf16": ({"lora_rank": 32}, "one_small_gpu"),
    "lora_int8": ({"lora_rank": 32, "frozen_weights": "int8"}, "one_small_gpu"),
    "last_layer": ({**LAST_LAYER, "freeze_vision_backbone": True}, "one_small_gpu"),
    "sandwich": (LAST_LAYER, "one_small_gpu"),
    "everything_offloaded": ({}, "zero2_offload"),
    "oft": ({"lora_rank": 32, "action_head": "l1", "action_chunk": 8, "use_proprio": True,
             "cameras": ["primary", "wrist"], "datasets": {"libero_spatial_no_noops": {
                 "primary": "image", "wrist": "image", "action": "action[:6], action[-1:] clip"}}},
            "one_small_gpu"),
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gb", type=int, nargs="+", default=[16, 24, 48, 80], help="GPU sizes")
    parser.add_argument("--micro", type=int, nargs="+", default=[1, 4, 8], help="samples at a time")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[*CASES][:-1])
    parser.add_argument("--base", default="prism-dinosiglip-224px+7b",
                        help="Prismatic id that sets the shape")
    parser.add_argument("--config", type=Path, help="use the model of this YAML instead")
    parser.add_argument("--num_layers", type=int,
                        help="fewer layers in the language model, for a quick try")
    parser.add_argument("--openvla", type=Path,
                        help="also time finetune.py of this checkout of OpenVLA")
    parser.add_argument("--oft", type=Path, help="the same of this checkout of OpenVLA-OFT")
    parser.add_argument("--openvla_python", default=sys.executable,
                        help="their environment's interpreter")
    parser.add_argument("--no_recompute", action="store_true", help="keep activations, as they do")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--no_compile", action="store_true")
    parser.add_argument("--no_cuda_graph", action="store_true", help="launch each kernel from Python")
    parser.add_argument("--timeout", type=int, default=400, help="seconds for a case")
    parser.add_argument("--folder", type=Path,
                        help="for weights and data, kept; default: a temporary one")
    parser.add_argument("--out", type=Path, help="also append the rows to this file, as JSON lines")
    args = parser.parse_args()
    if (args.openvla or args.oft) and args.config:
        parser.error("--openvla and --oft only have the 7B's shape: omit --config")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        model = describe_model(args)
        if not (folder / "hf").exists():
            write_random_model(folder / "hf", model)
            write_frames(folder / "data", 400)
        print("| GPU | GB allowed | trained | samples at a time | samples/s | GB at the peak |")
        print("|---|---:|---|---:|---:|---:|")
        for gb in args.gb:
            for case in args.cases:
                for micro in args.micro:
                    figures = measure(gb, case, micro, args, folder)
                    tell({"gb": gb, "case": case, "micro": micro, **figures}, args.out)
                    if "memory" in figures.get("failed", ""):
                        break  # more samples will not fit either
        for what, checkout, numbers in (("finetune", args.openvla, 7), ("finetune_oft", args.oft, 56)):
            for micro in args.micro if checkout else ():
                tokens = text_tokens(model) - 7 + numbers
                args.openvla = checkout
                figures = openvla_step(what, micro, 1, args, folder, "--tokens", str(tokens), "--layers",
                                       str(args.num_layers or 32))
                tell({"gb": "all", "case": f"openvla_{what}", "micro": micro, **figures}, args.out)


def tell(row: dict, out: Path | None) -> None:
    """Print a row of the table and store it."""
    row = {"gpu": gpus(1), **row}
    figures = row.get("failed") or f"{row['samples_per_second']:.2f} | {row['gpu_gb']:.1f}"
    print(f"| {row['gpu']} | {row['gb']} | {row['case']} | {row['micro']} | {figures} |", flush=True)
    if out:
        with open(out, "a") as file:
            file.write(json.dumps(row) + "\n")


def describe_model(args) -> dict:
    """The keys of TrainConfig that describe the model."""
    from machinery.config import read_yaml
    from machinery.weights import PRISMATIC, SHAPE, prismatic_config

    if args.config:
        return {key: value for key, value in read_yaml(args.config).items() if key in SHAPE}
    model = prismatic_config(*PRISMATIC[args.base]) | {
        "tokenizer": str(ROOT / "tests/fixtures/model/tokenizer_llama")}
    if args.num_layers:
        model["llm_backbone"] = {**model["llm_backbone"], "num_hidden_layers": args.num_layers}
    return model


def text_tokens(model: dict) -> int:
    """Text tokens of a sample of write_frames: prompt, action, and stop."""
    from action_tokenizer import load_tokenizer, prompt_ids

    return len(prompt_ids(load_tokenizer(model["tokenizer"]), "task 0", model["prompt_style"])) + 7 + 1


def measure(gb: float, case: str, micro: int, args, folder: Path) -> dict:
    """Train a few steps -> samples/s and GB at the peak, or the reason for a failure."""
    keys, json_name = CASES[case]
    runs = Path(tempfile.mkdtemp(dir=folder))
    config = {
        "base_vlm": str(folder / "hf"), "data_root_dir": str(folder / "data"),
        "data_mix": "libero_spatial_no_noops", "run_root_dir": str(runs), "max_steps": args.steps,
        "global_batch_size": micro, "per_device_batch_size": micro, "num_workers": 2, "log_interval": 1,
        "eval_interval": 0, "eval_samples": micro, "keep_checkpoints": "none",
        "compile": not args.no_compile, "cuda_graph": not args.no_cuda_graph,
        "learning_rate": 1e-5, **keys}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    ds_config = json.loads((ROOT / f"ds_configs/{json_name}.json").read_text())
    recompute = {} if args.no_recompute else {"activation_checkpointing": {}}
    (folder / "ds.json").write_text(json.dumps({**ds_config, **recompute}))
    command = [sys.executable, __file__, "inside", str(gb), "--config", str(folder / "config.yaml"),
               "--deepspeed_config", str(folder / "ds.json")]
    text, succeeded = run(command, args.timeout, folder)
    metrics = next(runs.glob("*/metrics.jsonl"), None)
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics else []
    steps = [line for line in lines if "loss" in line and line["step"] > 2]
    if not succeeded or not steps:
        return failure(text)
    estimate = next(line for line in text.splitlines() if line.startswith("memory "))
    return {"samples_per_second": float(np.median([step["samples_per_second"] for step in steps])),
            "gpu_gb": steps[-1].get("gpu_gb", 0.0), "host_gb": steps[-1]["host_gb"], "estimate": estimate}


def train_inside(gb: float, arguments: list[str]) -> None:
    """train_vla.py in a process that may use only so many GB of the GPU."""
    import torch

    import train_vla

    if torch.cuda.is_available():
        whole = torch.cuda.mem_get_info()[1] / 1e9
        torch.cuda.set_per_process_memory_fraction(min(gb / whole, 1.0))
        torch.cuda.mem_get_info = lambda *_: (int(gb * 1e9), int(gb * 1e9))
    sys.argv = [sys.argv[0], *arguments]
    train_vla.main()


if __name__ == "__main__":
    if sys.argv[1:2] == ["inside"]:
        train_inside(float(sys.argv[2]), sys.argv[3:])
    else:
        main()
