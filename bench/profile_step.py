"""train_vla.py with a look at what the GPU does during a few steps: train_throughput.py --profile runs it.

    python bench/profile_step.py --config CONFIG.yaml --deepspeed_config JSON

Takes train_vla.py's own arguments. The profiler watches the third- and second-to-last optimiser steps; rank 0
prints milliseconds a step by kind of kernel and for each of the longest kernels, and how long the GPU had
nothing to do (the profiler slows the host down, so that is an upper bound).
"""

import re
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

import train_vla

STEPS = 2
KINDS = {  # the first that fits counts
    "attention": "flash|fmha|sdpa|attention", "matmul": "nvjet|gemm|cutlass|xmma|cublas",
    "compiled": "^triton", "optimizer": "adam|multi_tensor", "communication": "nccl",
    "copies": "Memcpy|Memset|copy", "sums and norms": "reduce", "elementwise": "elementwise|vectorized"}


def main() -> None:
    """Train, and profile in passing."""
    if not torch.cuda.is_available():
        sys.exit("profile_step.py looks at a GPU's kernels, and there is no GPU")
    profiler = profile(activities=[ProfilerActivity.CUDA])
    max_steps, started = 0, 0.0
    optimizer_step, train, device = train_vla.optimizer_step, train_vla.train, train_vla.get_accelerator()

    def watched_train(cfg, ds_config):
        nonlocal max_steps
        max_steps = cfg.max_steps
        train(cfg, ds_config)

    def watched_step(engine):
        nonlocal started
        before = engine.global_steps
        norm = optimizer_step(engine)
        left = max_steps - engine.global_steps
        if engine.global_steps > before and left in (STEPS + 1, 1):
            device.synchronize()
            if left > 1:
                profiler.start()
                started = time.perf_counter()
            else:
                seconds = time.perf_counter() - started
                profiler.stop()
                if train_vla.dist.get_rank() == 0:
                    report(profiler, seconds)
        return norm

    train_vla.optimizer_step, train_vla.train = watched_step, watched_train
    train_vla.main()


def report(profiler, seconds: float) -> None:
    """Print what the kernels took."""
    kernels, calls, kinds = Counter(), Counter(), Counter()
    for event in profiler.key_averages():
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            kind = next((kind for kind, words in KINDS.items() if re.search(words, event.key)), "other")
            milliseconds = event.self_device_time_total / 1e3 / STEPS
            kernels[event.key] += milliseconds
            calls[event.key] += event.count // STEPS
            kinds[kind] += milliseconds
    busy, step = sum(kinds.values()), seconds * 1e3 / STEPS
    lines = [f"profile step_ms {step:.1f} busy_ms {busy:.1f} idle_ms {max(0.0, step - busy):.1f}"]
    lines += [f"profile kind {kind!r} ms {ms:.1f}" for kind, ms in kinds.most_common()]
    lines += [f"profile kernel {name[:100]!r} calls {calls[name]} ms {ms:.1f}"
              for name, ms in kernels.most_common(20)]
    tqdm.write("\n".join(lines))  # clear of the progress bar


if __name__ == "__main__":
    main()
