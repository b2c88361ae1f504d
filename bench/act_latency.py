"""How fast a 7B model acts on one GPU: an image and an instruction to an action, in bf16.

    python bench/act_latency.py --batch 1 8
    python bench/act_latency.py --batch 1 --openvla ../openvla --openvla_python ../openvla-env/bin/python

Weights are random, the shape is OpenVLA-7B's. Measured is predict_action as a user calls it, from a 256 px
image in host memory to numbers; with kernels as they come, and fused and recorded (speed_up). OpenVLA's class
(transformers 4.40.1) is timed in its own environment on the same GPU, one image at a time: it cannot batch.
The floor: each of 7 tokens reads the language model's weights once, of its head the actions' rows.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from openvla_peer import INSTRUCTION, STATS
from torch import nn

from act import Policy
from action_tokenizer import load_tokenizer
from config import TrainConfig
from model import VLA
from weights import PRISMATIC, parameters_without_memory, prismatic_config


def random_model(base: str) -> Policy:
    """A Prismatic VLM's shape with random bf16 weights, made on the GPU."""
    cfg = TrainConfig(**prismatic_config(*PRISMATIC[base]), action_dim=7)
    tokenizer = load_tokenizer(str(ROOT / "tests/fixtures/model/tokenizer_llama"))
    with parameters_without_memory():
        vla = VLA(cfg, tokenizer)
    for name, p in [*vla.named_parameters()]:
        module, _, leaf = name.rpartition(".")
        value = torch.randn(p.shape, device="cuda", dtype=torch.bfloat16) * 0.02
        vla.get_submodule(module).register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    return Policy(vla.to("cuda").eval(), tokenizer, STATS)


def measure(policy: Policy, batch: int, repeats: int = 20) -> tuple[float, float]:
    """Median seconds of predict_action for a batch, and of the first call."""
    image = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    times = []
    torch.cuda.reset_peak_memory_stats()
    for _ in range(repeats + 3):
        started = time.perf_counter()
        policy.predict_action([image] * batch, [INSTRUCTION] * batch)
        times.append(time.perf_counter() - started)
    return float(np.median(times[3:])), times[0]


@torch.inference_mode()
def parts(policy: Policy) -> tuple[float, float, float]:
    """Milliseconds of a recorded action's parts: the image, the prompt, one token."""
    vla, (_, (images, input_ids, lengths, _), *_) = policy.vla, next(iter(policy.graphs.values()))
    cache, count = policy.make_cache(images, input_ids.shape[1]), vla.num_action_tokens

    def milliseconds(function) -> float:
        for _ in range(3):
            function()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(10):
            graph.replay()
        torch.cuda.synchronize()
        return 100 * (time.perf_counter() - started)

    image = milliseconds(lambda: vla.embed(images, input_ids))
    whole = milliseconds(lambda: policy.tokens_of(images, input_ids, lengths, None, cache))
    vla.num_action_tokens = 1
    first = milliseconds(lambda: policy.tokens_of(images, input_ids, lengths, None, cache))
    vla.num_action_tokens = count
    return image, first - image, (whole - first) / (count - 1)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--base", default="prism-dinosiglip-224px+7b", help="a Prismatic id, for its shape")
    parser.add_argument("--openvla", type=Path, help="a checkout of OpenVLA, to be timed too")
    parser.add_argument("--openvla_python", default=sys.executable, help="its environment's interpreter")
    args = parser.parse_args()
    print(f"gpu {torch.cuda.get_device_name()} torch {torch.__version__} model {args.base}", flush=True)
    theirs = None
    if args.openvla:
        done = subprocess.run([args.openvla_python, str(ROOT / "bench/openvla_peer.py"), str(args.openvla),
                               "act"], text=True, capture_output=True)
        if done.returncode:
            print("openvla failed:", done.stderr[-1500:], flush=True)
        else:
            theirs = float(done.stdout.split("seconds")[-1])
            print(f"openvla batch 1 seconds {theirs:.4f} actions_per_second {1 / theirs:.2f}", flush=True)
    policy = random_model(args.base)
    vla = policy.vla
    head = vla.llm.get_output_embeddings().weight
    unread = vla.llm.get_input_embeddings().weight.numel() + head[vla.action_tokenizer.n_bins :].numel()
    llm = sum(p.numel() for p in vla.llm.parameters()) - unread
    print(f"weights_gb {vla.count_parameters()[0] * 2e-9:.2f} read_per_token_gb {llm * 2e-9:.2f}", flush=True)
    for fast in (False, True):
        if fast:
            policy.speed_up()
        for batch in args.batch:
            seconds, first = measure(policy, batch)
            ratio = f" ratio_to_openvla {theirs * batch / seconds:.2f}" if theirs else ""
            print(f"{'speed_up' if fast else 'plain'} batch {batch} seconds {seconds:.4f} actions_per_second "
                  f"{batch / seconds:.2f}{ratio} first_call_seconds {first:.1f} "
                  f"gpu_gb {torch.cuda.max_memory_allocated() / 1e9:.1f}", flush=True)
    image, prompt, token = parts(policy)
    print(f"parts image_ms {image:.2f} prompt_ms {prompt:.2f} token_ms {token:.2f} token_gb_per_second "
          f"{llm * 2e-6 / token:.0f}", flush=True)


if __name__ == "__main__":
    main()
