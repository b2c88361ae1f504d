r"""How fast a 7B model acts on one GPU: from an image and an instruction to an action.

    python bench/act_latency.py
    python bench/act_latency.py --openvla ../openvla --oft ../openvla-oft \
        --openvla_python ../openvla-env/bin/python

The weights are random, in OpenVLA-7B's shape. It times predict_action as users call it, from a 256
px image in host memory to numbers. The cases: bf16 with unmodified kernels (plain); fused and
recorded (fast: Policy.speed_up); the same with the language model's matrices in 8 bits (int8); a
model that decodes the actions of 8 steps in parallel (chunk); OpenVLA-OFT's, with an L1 head, two
cameras and the state, for chunks of 8 (oft). Without a GPU, for a try: --layers 1 --repeats 1, and
nothing is recorded.

OpenVLA's class (transformers 4.40.1) is timed in its own environment on the same GPU, one image at
a time, because it cannot batch. So is OpenVLA-OFT's, which decodes the actions of 8 steps in
parallel: like chunk without a head, and like oft (its fork of transformers changes the attention's
mask, not the arithmetic). The lower
bound: each of 7 tokens reads the language model's weights once, and the actions' rows of its head.
"""

import argparse
import gc
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from openvla_peer import INSTRUCTION, STATS

from act import Policy, shrinkable
from action_tokenizer import load_tokenizer
from machinery.checkpoint import Tensors
from machinery.config import TrainConfig
from machinery.cuda_graph import no_tracing
from machinery.oft import new_vla
from machinery.weights import PRISMATIC, fill, parameters_without_memory, prismatic_config

CASES = {"plain": {}, "fast": {}, "int8": {}, "chunk": {"action_chunk": 8, "parallel_decoding": True},
         "oft": {"action_chunk": 8, "action_head": "l1", "cameras": ["primary", "wrist"],
                 "use_proprio": True, "proprio_dim": 8}}
PEERS = {"openvla": ("openvla", "act", 1), "chunk": ("oft", "act", 8), "oft": ("oft", "act_oft", 8)}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_model(base: str, layers: int | None, in_8_bits: bool, **keys) -> Policy:
    """The shape of a Prismatic VLM, with random bf16 weights allocated on the GPU."""
    shape = prismatic_config(*PRISMATIC[base])
    if layers:
        shape["llm_backbone"] = {**shape["llm_backbone"], "num_hidden_layers": layers}
    cfg = TrainConfig(**shape, action_dim=7, **keys)
    tokenizer = load_tokenizer(str(ROOT / "tests/fixtures/model/tokenizer_llama"))
    with parameters_without_memory():
        vla = new_vla(cfg, tokenizer).requires_grad_(False)
    weights = Tensors("random")
    for name, param in vla.named_parameters():
        weights.add(name, param.shape, random_numbers)
    fill(vla, weights, DEVICE, torch.bfloat16, shrinkable(vla) if in_8_bits else {})
    return Policy(vla.to(DEVICE).eval(), tokenizer, STATS)


def random_numbers(start: int, stop: int) -> torch.Tensor:
    """Random weights at the scale of a language model's."""
    return torch.randn(stop - start, device=DEVICE, dtype=torch.bfloat16) * 0.02


def measure(policy: Policy, batch: int, repeats: int) -> tuple[float, float]:
    """Median seconds of predict_action for a batch, and seconds of the first call."""
    image = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    views = [[image] * policy.vla.num_images] * batch
    state = np.zeros((batch, 8)) if policy.cfg.use_proprio else None
    times = []
    for _ in range(repeats + 3):
        started = time.perf_counter()
        policy.predict_action(views, [INSTRUCTION] * batch, None, state)
        times.append(time.perf_counter() - started)
    return float(np.median(times[3:])), times[0]


@torch.inference_mode()
def parts(policy: Policy) -> str:
    """Milliseconds of each part of a recorded action: image; prompt (and chunk); one token."""
    vla, (_, inputs, *_) = policy.vla, next(iter(policy.graphs.values()))
    images, input_ids, _, state, _ = inputs
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

    image = milliseconds(lambda: vla.embed(images, input_ids, state))
    whole = milliseconds(lambda: policy.tokens_of(*inputs, cache))
    if policy.cfg.parallel_decoding:
        return f"image_ms {image:.2f} prompt_and_chunk_ms {whole - image:.2f}"
    vla.num_action_tokens = 1
    first = milliseconds(lambda: policy.tokens_of(*inputs, cache))
    vla.num_action_tokens, token = count, (whole - first) / (count - 1)
    read = sum(p.nbytes for p in vla.llm.base_model.layers.parameters())
    return (f"image_ms {image:.2f} prompt_ms {first - image:.2f} token_ms {token:.2f} "
            f"token_gb {read / 1e9:.2f} token_gb_per_second {read / 1e6 / token:.0f}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[*CASES])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--base", default="prism-dinosiglip-224px+7b",
                        help="Prismatic id that sets the shape")
    parser.add_argument("--openvla", type=Path, help="also time this checkout of OpenVLA")
    parser.add_argument("--oft", type=Path,
                        help="also time this checkout of OpenVLA-OFT, in chunks")
    parser.add_argument("--openvla_python", default=sys.executable,
                        help="Python of their environment")
    parser.add_argument("--layers", type=int, help="of the language models, for a quick try")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    gpu = torch.cuda.get_device_name() if DEVICE == "cuda" else "none"
    print(f"gpu {gpu} torch {torch.__version__} model {args.base}", flush=True)
    theirs = {}
    for name, (checkout, what, steps) in PEERS.items():
        if getattr(args, checkout) and (name in args.cases or name == "openvla"):
            done = subprocess.run([args.openvla_python, str(ROOT / "bench/openvla_peer.py"),
                                   str(getattr(args, checkout)), what, "--repeats", str(args.repeats),
                                   "--layers", str(args.layers or 32)], text=True, capture_output=True)
            if done.returncode:
                sys.exit(f"{name} failed: {done.stderr[-1500:]}")
            seconds = float(done.stdout.split("seconds")[-1])
            theirs[name] = steps / seconds
            print(f"{checkout} {what} batch 1 ms {1000 * seconds:.1f} actions_per_second {theirs[name]:.1f}",
                  flush=True)
    for case in args.cases:
        gc.collect()  # free the previous policy: compiled code has reference cycles
        torch.cuda.empty_cache()
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        policy = random_model(args.base, args.layers, case == "int8", **CASES[case])
        print(f"{case} weights_gb {torch.cuda.memory_allocated() / 1e9:.2f} peak_while_made_gb "
              f"{torch.cuda.max_memory_allocated() / 1e9:.2f}", flush=True)
        recorded = case != "plain" and DEVICE == "cuda"
        if recorded:
            started = time.perf_counter()
            policy.speed_up(args.batch)
            print(f"{case} recorded seconds {time.perf_counter() - started:.1f}", flush=True)
        for batch in args.batch:
            seconds, first = measure(policy, batch, args.repeats)
            speed = batch * policy.cfg.action_chunk / seconds
            their = theirs.get("openvla" if policy.cfg.action_chunk == 1 else case)
            ratio = f" ratio_to_theirs {speed / their:.2f}" if their else ""
            print(f"{case} batch {batch} ms {1000 * seconds:.1f} actions_per_second {speed:.1f}{ratio} "
                  f"first_call_seconds {first:.1f} peak_gb {torch.cuda.max_memory_allocated() / 1e9:.1f}",
                  flush=True)
        if recorded:
            with policy.fuse(), no_tracing():
                print(f"{case} {parts(policy)}", flush=True)
        del policy


if __name__ == "__main__":
    main()
