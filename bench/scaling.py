"""How speed grows with the number of GPUs of one host: a table, a figure, and the cores that
loading takes.

    python bench/scaling.py --out scaling.jsonl --figure scaling.png
    python bench/scaling.py --ranks 2 --ways zero2:recompute:compile openvla:full_shard:recompute \\
        --openvla ../openvla --openvla_python ../openvla-env/bin/python
    python bench/scaling.py --config configs/demo.yaml --own_data --num_workers 0 --global_batch 64 \\
        --ranks 1 2 4 8 --micro 8 --ways zero1 zero2 zero3 zero3_hpz           # no GPU: are losses equal?

A way is a case of train_throughput.py, which measures it, without the micro-batch. The micro-batch
is the largest of --micro that fits, found by trial. Each GPU takes one micro-batch per step, so
twice the GPUs do twice the work. With --global_batch the work is the same for any number of GPUs,
and so should the losses be; the largest difference is printed. `of fewest` is samples/s/GPU as a
share of the value on the fewest GPUs that ran this way.

OpenVLA's FSDP runs on the largest number of GPUs only. Both of its strategies are hybrid
(prismatic/training/strategies/fsdp.py): sharded within a host, replicated over hosts. On one host
nothing is left to replicate, so they equal the plain strategies of openvla_peer.py: full_shard is
OpenVLA's default, and without it its shard-grad-op.
"""

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from data_throughput import write_frames
from train_throughput import ROOT, gpus, measure, measure_openvla, options, run

from machinery.config import read_yaml

WAYS = [f"{name}{switches}" for name in ("zero1", "zero2", "zero3")
        for switches in (":compile", ":recompute:compile")]
OPENVLA = ["openvla:full_shard", "openvla:full_shard:recompute", "openvla:recompute"]
NO_ROOM = ("memory is full", "out of memory")  # a smaller micro-batch may help
NEVER = "weights, gradients and optimizer take"  # no micro-batch fits


def main() -> None:
    """Command line."""
    parser, there = options(__doc__), torch.cuda.device_count() or 8
    parser.add_argument("--ranks", type=int, nargs="+", default=[n for n in (1, 2, 4, 8) if n <= there],
                        help="numbers of GPUs, or of processes without a GPU")
    parser.add_argument("--ways", nargs="+",
                        help="default: ZeRO-1, 2, 3, and OpenVLA with --openvla")
    parser.add_argument("--micro", type=int, nargs="+", default=[64, 32, 16, 8, 4],
                        help="micro-batches to try")
    parser.add_argument("--global_batch", type=int,
                        help="the same on any number of GPUs, to compare losses")
    parser.add_argument("--figure", type=Path, help="draw all rows in --out as this picture")
    args = parser.parse_args()
    args.ways = args.ways or WAYS + OPENVLA * bool(args.openvla)
    if any(way.startswith("openvla") for way in args.ways) and (not args.openvla or args.config):
        parser.error("the way `openvla` needs --openvla, and only has the 7B's shape")
    names = {way.partition(":")[0] for way in args.ways} - {"openvla"}
    if missing := [name for name in sorted(names) if not (ROOT / f"ds_configs/{name}.json").exists()]:
        parser.error(f"there is no ds_configs/{missing[0]}.json")
    if args.figure and not args.out:
        parser.error("--figure needs --out")
    with tempfile.TemporaryDirectory() as folder:
        write_frames(Path(folder), 2000)
        rows = scale(args, Path(folder))
    if args.out:
        rows = [json.loads(line) for line in args.out.read_text().splitlines()]
    print(table(rows))
    if args.global_batch:
        print(agreement(rows))
    if args.figure:
        draw(rows, args.figure)


def scale(args, folder: Path) -> list[dict]:
    """All ways on all numbers of GPUs, the most GPUs first: a way that does not fit there does not
    fit on fewer."""
    per_core = frames_per_core(args, folder)
    print("loader", *(f"{key} {value:.0f}" for key, value in per_core.items()), flush=True)
    rows, may_fit = [], {way: sorted(args.micro, reverse=True) for way in args.ways}
    for ranks in sorted(args.ranks, reverse=True):
        for way, micros in may_fit.items():
            micros = [micro for micro in micros if not (args.global_batch or 0) % (micro * ranks)]
            if not micros or (way.startswith("openvla") and ranks < max(args.ranks)):
                continue
            row = largest(way, ranks, micros, args, folder)
            may_fit[way] = [] if no_room(row) else [micro for micro in micros if micro <= row["micro"]]
            if "failed" not in row:
                row |= {f"cores_{key}": row["samples_per_second"] / speed for key, speed in per_core.items()}
            shown = {key: f"{value:.4g}" for key, value in row.items() if isinstance(value, float)}
            print(row["gpus"], row["case"], *(f"{key} {value}" for key, value in shown.items()),
                  f"failed {row['failed']}" if "failed" in row else "", flush=True)
            rows.append(row)
            if args.out:
                with open(args.out, "a") as file:
                    file.write(json.dumps(row) + "\n")
    return rows


def largest(way: str, ranks: int, micros: list[int], args, folder: Path) -> dict:
    """-> the row of the largest micro-batch that fits or, if none does, of the smallest; `tried`
    lists the outcomes of the larger ones."""
    name, *switches = way.split(":")
    measured, tried = measure_openvla if name == "openvla" else measure, {}
    for micro in micros:
        case = ":".join([name, str(micro), *switches])
        size = {"num_gpus": ranks, "global_batch": args.global_batch or micro * ranks}
        row = measured(case, argparse.Namespace(**vars(args) | size), folder)
        if not no_room(row) or NEVER in row["log"]:
            break
        tried[micro] = row["failed"]
    return {"gpus": gpus(ranks), "case": case, "way": way, "ranks": ranks, "micro": micro, "tried": tried,
            **row}


def no_room(row: dict) -> bool:
    """True if it failed for lack of GPU memory."""
    return any(words in row.get("log", "") for words in (*NO_ROOM, NEVER))


def frames_per_core(args, folder: Path) -> dict[str, float]:
    """-> {"plain": frames per second that one core loads at the model's image size, "augmented":
    the same}"""
    size = read_yaml(args.config).get("image_size", 224) if args.config else 224
    text, _ = run([sys.executable, str(ROOT / "bench/data_throughput.py"), "--workers", "2", "--image_aug",
                   "--samples", "3000", "--data_root_dir", str(folder), "--image_size", str(size)],
                  args.timeout, folder)
    found = re.findall(r"^loader .* frames_per_s (\d+)", text, re.MULTILINE)
    return {key: int(speed) / 2 for key, speed in zip(("plain", "augmented"), found, strict=True)}


def table(rows: list[dict]) -> str:
    """Markdown, the ways in the order of the rows, the fewest GPUs first."""
    lines = ["| GPUs | JSON | recompute | compile | samples per GPU at a time | samples/s/GPU | of fewest, % "
             "| MFU, % | GB | waits for data, s per step | cores per GPU to load, and to augment |",
             "|---|---|---|---|---:|---:|---:|---:|---:|---:|---:|"]
    order = list(dict.fromkeys(row["way"] for row in rows))
    for row in sorted(rows, key=lambda row: (order.index(row["way"]), row["ranks"])):
        name, *switches = row["way"].split(":")
        name += ", full shard" * ("full_shard" in switches)
        yes = ["yes" if switch in switches else "" for switch in ("recompute", "compile")]
        figures = [row.get("failed", ""), *[""] * 5]
        if "failed" not in row:
            first = min((other for other in rows if other["way"] == row["way"] and "failed" not in other),
                        key=lambda other: other["ranks"])
            waits = f"{row['data_seconds']:.3f} of {row['step_seconds']:.2f}" if "data_seconds" in row else ""
            figures = [f"{row['samples_per_second']:.1f}",
                       f"{100 * row['samples_per_second'] / first['samples_per_second']:.0f}",
                       f"{100 * row['mfu']:.0f}" if "mfu" in row else "", f"{row.get('gpu_gb', 0):.0f}",
                       waits, f"{row['cores_plain']:.2f}, {row['cores_augmented']:.2f}"]
        lines.append(f"| {' | '.join([row['gpus'], name, *yes, str(row['micro']), *figures])} |")
    return "\n".join(lines)


def agreement(rows: list[dict]) -> str:
    """For runs with the same global batch: one line per row with its difference from the first
    row's losses."""
    curves = [(f"{row['gpus']} {row['case']}", np.array(row["losses"])) for row in rows if row.get("losses")]
    return "\n".join(f"losses {name} last {losses[-1]:.4f} largest_difference "
                     f"{np.abs(losses - curves[0][1]).max():.2g}" for name, losses in curves)


def draw(rows: list[dict], path: Path) -> None:
    """Plot samples/s/GPU over the number of GPUs. A horizontal line is ideal."""
    import matplotlib.pyplot as plt  # imported here: the table does not need it

    figure, axes = plt.subplots(figsize=(7, 4))
    done = [row for row in rows if "failed" not in row]
    for way in dict.fromkeys(row["way"] for row in done):
        row = sorted((row for row in done if row["way"] == way), key=lambda row: row["ranks"])
        axes.plot([one["ranks"] for one in row], [one["samples_per_second"] for one in row], marker="o",
                  label=f"{way} ({row[-1]['micro']} at a time)")
    ticks = sorted({row["ranks"] for row in done})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, ticks)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"GPUs ({rows[0]['gpus'].partition(' x ')[2]})")
    axes.set_ylabel("samples/s/GPU")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
