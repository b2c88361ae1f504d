"""Network traffic and time of a training step of the 7B on many machines: calculated, not measured.

    python bench/many_machines.py

A pass is one all-gather of the weights, 2 bytes for each of P parameters, or one reduce-scatter of
as many gradients: each of N GPUs receives 2 P (N - 1) / N bytes. An all-reduce is two passes. NCCL
uses rings that enter and leave each machine once, so all network cards of a machine together carry
the traffic of one GPU. Passes in a step of `a` micro-batches (tests/test_scaling.py counts them on
8 ranks):

    ZeRO-1      2 all-reduce the gradients at the end, then 1 gathers the updated weights
    ZeRO-2      2 a all-reduce gradients during the backward pass, then 1 gathers the weights
    ZeRO-3      a gather weights in the forward pass, a in the backward pass, a reduce-scatter gradients
    with hpZ    1 gathers weights in the first forward pass, a reduce-scatter gradients; and 2 a - 1 gather
                weights within a machine, which keeps a complete copy of them

Communication beside computation costs nothing as long as it is the shorter of the two. A backward
pass is two thirds of the computation. Ignored: latency, and that no link reaches the rate in its
data sheet.
"""

import argparse


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--machines", type=int, default=8)
    parser.add_argument("--gpus", type=int, default=8, help="per machine")
    parser.add_argument("--network", type=float, nargs="+", default=[400, 50, 12.5],
                        help="GB/s into a machine: 8 cards of 400 Gb/s, one of them, one of 100 Gb/s")
    parser.add_argument("--nvlink", type=float, default=450,
                        help="GB/s into a GPU, by NVIDIA's data sheet")
    parser.add_argument("--parameters", type=float, default=7.54, help="billions")
    parser.add_argument("--global_batch", type=int, default=2048)
    parser.add_argument("--micro", type=int, default=32)
    parser.add_argument("--samples_per_second", type=float, default=39.2, help="per GPU, measured")
    args = parser.parse_args()
    ranks = args.machines * args.gpus
    a, rest = divmod(args.global_batch, ranks * args.micro)
    if rest or not a:
        parser.error(f"--global_batch {args.global_batch} is not a multiple of {ranks} GPUs x {args.micro}")
    compute = a * args.micro / args.samples_per_second
    everywhere, within = (2 * args.parameters * (n - 1) / n for n in (ranks, args.gpus))
    print(f"computation {compute:.2f} s for {a} x {args.micro} samples a GPU, a pass {everywhere:.1f} GB\n")
    head = ["JSON", "GB per GPU", "GB into a machine", "s by NVLink",
            *(f"s per step at {speed:g} GB/s" for speed in args.network)]
    print(f"| {' | '.join(head)} |\n|---{'|---:' * (len(head) - 1)}|")
    for name, (kept, beside, share, alone, inside) in stages(args.gpus, ranks, a).items():
        def seconds(passes: int, inside: int, network: float) -> float:
            return max(passes * everywhere / network, (passes * everywhere + inside * within) / args.nvlink)

        steps = [max(share * compute, seconds(beside, inside, speed)) + (1 - share) * compute
                 + seconds(alone, 0, speed) for speed in args.network]
        row = [f"{kept * args.parameters:.1f}", f"{(beside + alone) * everywhere:.1f}",
               f"{seconds(beside + alone, inside, 1e9):.2f}", *(f"{step:.2f}" for step in steps)]
        print(f"| {name} | {' | '.join(row)} |")


def stages(gpus: int, ranks: int, a: int) -> dict[str, tuple[float, int, float, int, int]]:
    """-> {JSON: (bytes per parameter on a GPU, as in ds_configs/README.md; passes over all GPUs
    beside computation; the share of the computation beside them; passes beside none; passes within
    a machine)}"""
    return {"zero1": (2 + 6 + 12 / ranks, 0, 0, 3, 0), "zero2": (2 + 16 / ranks, 2 * a, 2 / 3, 1, 0),
            "zero3": (18 / ranks, 3 * a, 1, 0, 0),
            "zero3_hpz": (18 / ranks + 2 / gpus, 1 + a, 1, 0, 2 * a - 1)}


if __name__ == "__main__":
    main()
