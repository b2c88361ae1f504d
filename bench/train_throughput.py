"""Training speed through train_vla.py itself: a table of samples/s, MFU, and memory, and loss
curves.

    python bench/train_throughput.py --num_gpus 1 --cases zero3_partial_offload:64:compile zero2:8
    python bench/train_throughput.py --num_gpus 2 --global_batch 64 --out rows.jsonl --table \\
        --cases zero2:32:compile zero3:32:recompute openvla:32:full_shard:recompute \\
        --openvla ../openvla --openvla_python ../openvla-env/bin/python
    python bench/train_throughput.py --config configs/demo.yaml --own_data --global_batch 64 --steps 200 \\
        --cases zero1:64 zero1:64:compile zero3:64:recompute --out rows.jsonl --figure curves.png

A case is JSON:micro-batch[:recompute][:compile]. The JSONs are those of ds_configs/. `openvla`,
which needs --openvla, is OpenVLA's class under FSDP (openvla_peer.py); OpenVLA trains with
:full_shard:recompute. It cannot accumulate, so to compare, set --global_batch to micro-batch x
GPUs. To see the gain of machinery/zero_speed.py, add :plain (DeepSpeed as it comes) or
:only=NAME+NAME (only these replacements). :deepcompile tries DeepSpeed's DeepCompile instead
(train_variant.py).

The model has OpenVLA-7B's shape, or that of --config, and random weights. The data are synthetic
(photo-like 256 px JPEGs, written first), or with --own_data the config's own. The code path is the
real one: loader, engine, step, log. Every case is its own run. Its figures are medians over the log
lines after the warm-up.
"""

import argparse
import contextlib
import json
import os
import re
import signal
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

from machinery.config import read_yaml
from machinery.frames import end_with_parent
from machinery.weights import PRISMATIC, prismatic_config


def main() -> None:
    """Command line."""
    parser = options(__doc__)
    parser.add_argument("--cases", nargs="*", default=["zero2:32", "zero3:32:recompute"])
    parser.add_argument("--num_gpus", type=int, default=1)
    parser.add_argument("--global_batch", type=int, default=256)
    parser.add_argument("--table", action="store_true",
                        help="print all rows in --out as a Markdown table")
    parser.add_argument("--figure", type=Path,
                        help="draw the losses of all rows in --out as this PNG")
    args = parser.parse_args()
    if (args.own_data and not args.config) or ((args.figure or args.table) and not args.out):
        parser.error("--own_data needs --config, and --figure and --table need --out")
    if any(case.startswith("openvla") for case in args.cases) and (not args.openvla or args.config):
        parser.error("the case `openvla` needs --openvla, and only has the 7B's shape")
    with tempfile.TemporaryDirectory() as folder:
        if not args.own_data:
            write_frames(Path(folder), 2000)
        for case in args.cases:
            row = (measure_openvla if case.startswith("openvla") else measure)(case, args, Path(folder))
            numbers = {key: f"{value:.4g}" for key, value in row.items() if isinstance(value, float)}
            print("case", case, *(f"{key} {value}" for key, value in numbers.items()),
                  f"failed {row['failed']}" if "failed" in row else "", flush=True)
            if args.out:
                with open(args.out, "a") as file:
                    file.write(json.dumps({"gpus": gpus(args.num_gpus), "case": case, **row}) + "\n")
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out else []
    if args.figure:
        draw_losses(rows, args.figure)
    if args.table:
        print(table(rows))


def options(description: str) -> argparse.ArgumentParser:
    """Options of `measure` and `measure_openvla`; scaling.py has the same."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warmup", type=int, default=2, help="steps before measuring")
    parser.add_argument("--log_interval", type=int, default=1,
                        help="steps between lines of the log")
    parser.add_argument("--base", default="prism-dinosiglip-224px+7b",
                        help="Prismatic id that sets the shape")
    parser.add_argument("--num_layers", type=int,
                        help="fewer layers in the language model, for a quick try")
    parser.add_argument("--config", type=Path, help="use the model of this YAML instead")
    parser.add_argument("--own_data", action="store_true", help="also use its data")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value",
                        help="override keys of the YAML")
    parser.add_argument("--num_workers", type=int, default=8)
    parser.add_argument("--timeout", type=int, default=500, help="seconds for a case")
    parser.add_argument("--openvla", type=Path,
                        help="a checkout of OpenVLA, for the `openvla` cases")
    parser.add_argument("--openvla_python", default=sys.executable,
                        help="its environment's interpreter")
    parser.add_argument("--profile", action="store_true",
                        help="also profile the GPU (profile_step.py)")
    parser.add_argument("--out", type=Path,
                        help="also append the table's rows to this file, as JSON lines")
    return parser


def measure(case: str, args, folder: Path) -> dict:
    """Train a few steps -> medians over the steps after the warm-up."""
    name, micro, *switches = case.split(":")
    if args.config:
        config = read_yaml(args.config)
    else:
        config = prismatic_config(*PRISMATIC[args.base])
        config |= {"tokenizer": str(ROOT / "tests/fixtures/model/tokenizer_llama"), "learning_rate": 2e-5}
    if args.num_layers:
        config["llm_backbone"] = {**config["llm_backbone"], "num_hidden_layers": args.num_layers}
    if not args.own_data:
        config |= {"data_root_dir": str(folder), "data_mix": "libero_spatial_no_noops"}
    runs = Path(tempfile.mkdtemp(dir=folder))
    config |= {
        "run_root_dir": str(runs), "max_steps": args.steps, "global_batch_size": args.global_batch,
        "per_device_batch_size": int(micro), "num_workers": args.num_workers,
        "log_interval": args.log_interval, "eval_interval": 0, "eval_samples": int(micro),
        "keep_checkpoints": "none", "compile": "compile" in switches,
        "zero_speed": not {"plain", "deepcompile"} & {*switches},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    ds_config = json.loads((ROOT / f"ds_configs/{name}.json").read_text())
    if "recompute" in switches:
        ds_config["activation_checkpointing"] = {}
    (folder / "ds.json").write_text(json.dumps(ds_config))
    command = ["deepspeed", "--num_gpus", str(args.num_gpus)] if args.num_gpus > 1 else [sys.executable]
    started = time.time()
    only = [switch.removeprefix("only=") for switch in switches if switch.startswith("only=")]
    if "deepcompile" in switches:
        command += [str(ROOT / "bench/train_variant.py"), "--deepcompile"]
    elif only:
        command += [str(ROOT / "bench/train_variant.py"), "--only", only[0]]
    else:
        command += [str(ROOT / ("bench/profile_step.py" if args.profile else "train_vla.py"))]
    command += ["--config", str(folder / "config.yaml"), "--deepspeed_config", str(folder / "ds.json"),
                *(["--set", *args.set] if args.set else [])]
    text, succeeded = run(command, args.timeout, folder)
    if args.profile:
        print("\n".join(line for line in text.splitlines() if line.startswith("profile")), flush=True)
    metrics = next(runs.glob("*/metrics.jsonl"), None)
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics else []
    steps = [line for line in lines if "loss" in line and line["step"] - args.log_interval >= args.warmup]
    if not steps or not succeeded:
        return failure(text)
    startup = [line for line in text.splitlines() if "startup_s" in line]
    middle = {key: float(np.median([step[key] for step in steps])) for key in (
        "samples_per_second", "tflops_per_gpu", "mfu", "gpu_gb", "host_gb", "step_seconds", "data_seconds")
        if key in steps[0]}
    middle["samples_per_second"] /= args.num_gpus
    middle["startup_s"] = float(startup[0].split("startup_s")[1]) if startup else float("nan")
    curves = {name: [line[key] for line in lines if "loss" in line]
              for name, key in (("steps", "step"), ("losses", "loss"), ("grad_norms", "grad_norm"))}
    return {**middle, "wall_s": time.time() - started, **curves,
            "recompute": "activation_checkpointing" in ds_config}


def measure_openvla(case: str, args, folder: Path) -> dict:
    """OpenVLA's training step; it has no `compile`."""
    _, micro, *switches = case.split(":")
    return openvla_step("train", int(micro), args.num_gpus, args, folder, "--layers",
                        str(args.num_layers or 32), *(f"--{switch}" for switch in switches))


def openvla_step(what: str, micro: int, num_gpus: int, args, folder: Path, *more: str) -> dict:
    """The speed of openvla_peer.py's "train" or "finetune", and GB at the peak, or the reason for a
    failure."""
    command = [args.openvla_python, "-m", "torch.distributed.run", "--nproc-per-node", str(num_gpus),
               str(ROOT / "bench/openvla_peer.py"), str(args.openvla), what, "--micro", str(micro),
               "--steps", str(args.steps + 2), *more]
    text, succeeded = run(command, args.timeout, folder)
    found = dict(re.findall(r"(seconds|gpu_gb) ([\d.]+)", text))
    if "seconds" not in found or not succeeded:
        return failure(text)
    return {"samples_per_second": micro / float(found["seconds"]), "gpu_gb": float(found["gpu_gb"]),
            "step_seconds": float(found["seconds"])}


def run(command: list[str], timeout: int, folder: Path) -> tuple[str, bool]:
    """Run a command until it ends or times out -> (its output, True if it succeeded)."""
    with open(folder / "log", "w+") as log:
        process = subprocess.Popen(
            command, env={**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, cwd=ROOT,
            stdout=log, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=end_with_parent)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            # including its workers, which would keep the GPU's memory
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            log.write(f"\nerror: timed out after {timeout} seconds\n")
        log.seek(0)
        return log.read(), process.returncode == 0


def failure(text: str) -> dict:
    """The likeliest reason in a failed command's output."""
    reasons = [line for line in text.splitlines() if "Error:" in line or "error:" in line]
    return {"failed": (reasons or text.splitlines()[-1:] or ["no output"])[0][:200], "log": text[-9000:]}


def gpus(count: int) -> str:
    """Their number and name, without creating a CUDA context here, which would take memory from the
    cases."""
    name = "CPU"
    with contextlib.suppress(FileNotFoundError, subprocess.CalledProcessError):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        name = subprocess.check_output(query, text=True).splitlines()[0].removeprefix("NVIDIA ")
    return f"{count} x {name}"


def table(rows: list[dict]) -> str:
    """Markdown. GB: the peak on a GPU and, if it is large, of a rank's host memory."""
    lines = ["| GPUs | JSON | recompute | compile | samples per GPU at a time | samples/s/GPU | MFU, % | GB |",
             "|---|---|---|---|---:|---:|---:|---:|"]
    for row in rows:
        name, micro, *switches = row["case"].split(":")
        others = [switch for switch in switches if switch not in ("recompute", "compile")]
        name += f" ({', '.join(others)})" if others else ""
        recompute = row.get("recompute") or "recompute" in switches  # some JSONs set it themselves
        yes = ["yes" if on else "" for on in (recompute, "compile" in switches)]
        host = f" + {row['host_gb']:.0f} host" if row.get("host_gb", 0) > 20 else ""
        figures = [row["failed"], "", ""] if "failed" in row else [
            f"{row['samples_per_second']:.1f}", f"{100 * row['mfu']:.0f}" if "mfu" in row else "",
            f"{row.get('gpu_gb', 0):.0f}{host}"]
        lines.append(f"| {' | '.join([row['gpus'], name, *yes, micro, *figures])} |")
    return "\n".join(lines)


def in_words(case: str) -> str:
    """zero2:32:compile -> zero2.json, compiled"""
    name, _, *switches = case.split(":")
    words = {"recompute": "recomputed", "compile": "compiled"}
    return ", ".join([f"{name}.json", *(words.get(switch, switch) for switch in switches)])


def draw_losses(rows: list[dict], path: Path) -> None:
    """Draw each case's loss over the steps as a PNG, and below it the difference from the first
    case's."""
    import matplotlib.pyplot as plt  # imported here: the table does not need it

    figure, (curves, differences) = plt.subplots(2, sharex=True, height_ratios=[2, 1], figsize=(8, 6))
    rows = [row for row in rows if row.get("losses")]
    for row in rows:
        shared = min(len(row["losses"]), len(rows[0]["losses"]))
        difference = np.subtract(row["losses"][:shared], rows[0]["losses"][:shared])
        curves.plot(row["steps"], row["losses"], label=in_words(row["case"]), linewidth=1)
        differences.plot(row["steps"][:shared], difference, linewidth=1)
        print(f"{row['case']} largest_difference {np.abs(difference).max():.4f} last_20_mean "
              f"{np.mean(row['losses'][-20:]):.4f}")
    curves.set_ylabel("loss")
    curves.legend()
    differences.set_ylabel(f"difference from\n{in_words(rows[0]['case'])}")
    differences.set_xlabel("step of training")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
