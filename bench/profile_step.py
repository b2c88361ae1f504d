"""Profile the GPU during two steps of train_vla.py. Run by train_throughput.py --profile.

    python bench/profile_step.py --config CONFIG.yaml --deepspeed_config JSON

Takes the arguments of train_vla.py. The profiler records the third and fourth optimizer step. Rank
0 prints the milliseconds per step by kind of kernel and for each of the longest kernels, the time
in which the GPU computed nothing, and the kernel that followed. The profiler slows the host down,
so the idle time is an upper bound.
"""

import functools
import re
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import deepspeed
import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

import train_vla

WARMUP, STEPS = 2, 2  # optimizer steps before the profile, and in it
KINDS = {  # the first match counts
    "attention": "flash|fmha|sdpa|attention", "matmul": "nvjet|gemm|cutlass|xmma|cublas",
    "compiled": "^triton", "optimizer": "adam|multi_tensor", "communication": "nccl",
    "copies": "Memcpy|Memset|copy", "sums and norms": "reduce", "elementwise": "elementwise|vectorized"}


def main() -> None:
    """Train, with a profiler around two steps."""
    if not torch.cuda.is_available():
        sys.exit("profile_step.py needs a GPU")
    profiler = profile(activities=[ProfilerActivity.CUDA])
    step, started = deepspeed.DeepSpeedEngine.step, 0.0

    def watched_step(engine):
        nonlocal started
        before = engine.global_steps
        step(engine)
        if engine.global_steps > before and engine.global_steps in (WARMUP, WARMUP + STEPS):
            torch.cuda.synchronize()
            if engine.global_steps == WARMUP:
                profiler.start()
                started = time.perf_counter()
            else:
                seconds = time.perf_counter() - started
                profiler.stop()
                if train_vla.dist.get_rank() == 0:
                    report(profiler, seconds)

    deepspeed.DeepSpeedEngine.step = watched_step
    train_vla.main()


@functools.cache
def kind_of(kernel: str) -> str:
    """The first key of KINDS that matches a kernel's name."""
    return next((kind for kind, words in KINDS.items() if re.search(words, kernel)), "other")


def report(profiler, seconds: float) -> None:
    """Print the kernels' times. Communication runs beside computation: it counts as waiting only
    while nothing is computed."""
    milliseconds, calls, kinds, waits = Counter(), Counter(), Counter(), Counter()
    spans = sorted((event.time_range.start, event.time_range.end, event.name) for event in profiler.events()
                   if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation)
    computed_until = spans[0][0]
    for start, stop, name in spans:
        kind = kind_of(name)
        for counter, key in ((milliseconds, name), (kinds, kind)):
            counter[key] += (stop - start) / 1e3 / STEPS
        calls[name] += 1
        if kind != "communication":
            waits[name] += max(0.0, start - computed_until) / 1e3 / STEPS
            computed_until = max(computed_until, stop)
    lines = [f"profile step_ms {seconds * 1e3 / STEPS:.1f} waiting_ms {sum(waits.values()):.1f}"]
    lines += [f"profile kind {kind!r} ms {ms:.1f}" for kind, ms in kinds.most_common()]
    lines += [f"profile kernel {name[:100]!r} calls {calls[name] // STEPS} ms {ms:.1f}"
              for name, ms in milliseconds.most_common(20)]
    lines += [f"profile waiting_before {name[:100]!r} ms {ms:.1f}" for name, ms in waits.most_common(8)]
    tqdm.write("\n".join(lines))  # does not break the progress bar


if __name__ == "__main__":
    main()
