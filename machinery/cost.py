"""GPU memory of a training, and its floating-point operations.

A training prints the line `memory` when it starts, and stops there if weights, gradients and
optimizer cannot fit. memory.py prints it without a GPU. All sizes are in GB (1e9 bytes).
"""

import torch

from machinery import host
from machinery.config import UserError, load_table, ranks_here
from machinery.connect import gather
from machinery.ranks import LESS_MEMORY
from model import VLA

PEAK_TFLOPS = load_table("gpus")  # {GPU: dense bf16 TFLOP/s}; the first name that fits counts


def memory_needed(vla: VLA, ds_config: dict, ranks: int, gpu: float = 0) -> str:
    """A line for the log: memory that each GPU keeps all the time, an estimate for the activations
    of a micro-batch, memory of the host, whether activations are recomputed, and the largest
    micro-batch. Raises UserError if that cannot fit. gpu: its bytes, if not this machine's."""
    gpu = gpu or gpu_memory()
    recompute = recomputes(vla, ds_config, ranks, gpu)
    held = memory_held(vla, ds_config, ranks, recompute)
    on_gpu = held["weights"] + held["gradients"] + held["optimizer"]
    if gpu and on_gpu > gpu:
        raise UserError(f"weights, gradients and optimizer take {on_gpu / 1e9:.1f} GB, "
                        f"this GPU has {gpu / 1e9:.1f}: {LESS_MEMORY}")
    on_host = held.get("host", 0)
    if torch.distributed.is_initialized() and not torch.cuda.is_available():
        on_host += on_gpu * ranks_here()
    if on_host > host.memory():  # else the kernel would kill the job while it is allocated
        raise UserError(f"offloading, or training without a GPU, takes {on_host / 1e9:.1f} GB, "
                        f"this host or container has {host.memory() / 1e9:.1f}: offload less "
                        "(zero3_partial_offload.json has a ratio), or train less (lora_rank: 32)")
    line = "memory " + " ".join(f"{name}_gb {size / 1e9:.4g}" for name, size in held.items())
    if gpu:
        line += (f" recompute {'yes' if recompute else 'no'}"
                 f" largest_micro_batch {largest_micro_batch(vla, held, gpu)}")
    return line


def gpu_memory() -> int:
    """Bytes of the job's smallest GPU, or 0 without GPUs. All ranks must decide the same by it:
    under ZeRO-3 they gather weights again where they recompute."""
    if not torch.cuda.is_available():
        return 0
    total = torch.cuda.mem_get_info()[1]
    return min(gather(total)) if torch.distributed.is_initialized() else total


def recomputes(vla: VLA, ds_config: dict, ranks: int, gpu: float) -> bool:
    """Are activations recomputed? If the JSON has activation_checkpointing. With only_if_needed in
    it, only if a micro-batch does not fit otherwise."""
    wanted = ds_config.get("activation_checkpointing")
    if not (wanted and wanted.get("only_if_needed")):
        return wanted is not None
    kept = memory_held(vla, ds_config, ranks, recompute=False)
    return bool(gpu) and largest_micro_batch(vla, kept, gpu) < vla.cfg.per_device_batch_size


def largest_micro_batch(vla: VLA, held: dict[str, float], gpu: float) -> int:
    """How many samples at a time fit. Too few rather than too many: measured peaks
    (bench/README.md) are up to 1.9 GB and 1.2 times the activations above the estimate."""
    room = 0.95 * gpu - 2e9 - held["weights"] - held["gradients"] - held["optimizer"]
    return max(0, int(room / (1.3 * held["activations"] / vla.cfg.per_device_batch_size)))


def memory_held(vla: VLA, ds_config: dict, ranks: int, recompute: bool) -> dict[str, float]:
    """Bytes: {"weights", "gradients", "optimizer", "activations", perhaps "host"}."""
    zero = ds_config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    half = ds_config.get("bf16", {}).get("enabled", False)
    trained = vla.count_parameters()[1]
    offloaded = {}
    for key, value in zero.items():  # null and a missing device mean that nothing is offloaded
        if key.startswith("offload_") and (value or {}).get("device", "none") != "none":
            offloaded[key] = value
    on_host = offloaded.get("offload_optimizer", {"ratio": 0}).get("ratio", 1)

    weights = 0
    for p in vla.parameters():
        weights += getattr(p, "ds_numel", p.numel()) * min(p.element_size(), 2 if half else 4)
    # bytes of gradients a parameter: float32 sums, and bf16 ones beside them (ds_configs/README.md)
    gradients = 4
    if half and stage < 2:
        gradients = 6 if stage else 2
    # ZeRO-1 and 2 sum on the GPU even the gradients that AdamW reads on the host
    if stage == 3 and on_host == 1:
        gradients = 0
    optimizer = 12 if half else 8  # AdamW's two moments in float32, and in bf16 float32 weights
    held = {
        "weights": weights / (ranks if stage == 3 else 1),
        "gradients": gradients * trained / (ranks if stage >= 2 else 1),
        "optimizer": (1 - on_host) * optimizer * trained / (ranks if stage >= 1 else 1),
    }
    if "offload_param" in offloaded:
        held["weights"] = 0
    held["activations"] = activations(vla, recompute) * (2 if half else 4)
    if on_host:  # 16: float32 weights, moments, gradients; 2: PyTorch rounds up pinned memory
        held["host"] = on_host * 18 * trained / (ranks if stage >= 1 else 1) * ranks_here()
    return held


def activations(vla: VLA, recompute: bool) -> float:
    """About how many numbers a micro-batch keeps for the backward pass: 17 for each token and
    feature of a block (Korthikanti et al., 2022; some 12 if compiled). With recomputation one, and
    17 in the block that is being recomputed."""
    total = 0
    for blocks, width, tokens, times, trained in stacks(vla, num_tokens=40):
        if trained:
            kept = len(blocks) + 17 if recompute else 17 * len(blocks)
            total += kept * width * tokens * times
    return vla.cfg.per_device_batch_size * total


def stacks(vla: VLA, num_tokens: int) -> list[tuple]:
    """The model's stacks of blocks: (blocks, width, tokens of a sample with num_tokens of text,
    how often each sees a sample, does it have a backward pass?)."""
    images = vla.num_images * vla.num_patches
    found = [(vla.llm.base_model.layers, vla.llm.config.hidden_size,
              num_tokens + images + vla.cfg.use_proprio, 1, True)]
    for tower in vla.vision_backbone.values():
        trained = any(p.requires_grad for p in tower.parameters())  # nothing before it is trained
        tokens = vla.num_patches + tower.num_prefix_tokens
        found.append((tower.blocks[:-1], tower.embed_dim, tokens, vla.num_images, trained))
    return found


# ---- Floating-point operations -------------------------------------------------------------------


def utilization(vla: VLA, batch: dict, samples_per_second: float) -> dict[str, float]:
    """TFLOP/s of each GPU, and of GPUs we know the share of their peak, MFU. Recomputation does
    not count as work. Without a GPU, nothing. samples_per_second: of all GPUs together."""
    if not torch.cuda.is_available():
        return {}
    flops = training_flops(vla, batch["input_ids"].shape[1])
    ranks = torch.distributed.get_world_size()
    values = {"tflops_per_gpu": samples_per_second * flops / ranks / 1e12}
    name = torch.cuda.get_device_name()
    for gpu, peak in PEAK_TFLOPS.items():
        if gpu in name:
            values["mfu"] = values["tflops_per_gpu"] / peak
            break
    return values


def training_flops(vla: VLA, num_tokens: int) -> float:
    """Operations of one training sample with num_tokens of text, without recomputation.

    The usual count. A matrix takes for each weight and token 2 forward, 2 for the gradient of its
    input, and 2 for its own if it is trained. Attention takes 4 x width x tokens^2 a block forward,
    and twice that backward. Embedding tables are looked up, not multiplied. The language model's
    head sees only the action tokens.
    """
    total = 0
    for p in vla.projector.parameters():
        total += vla.num_images * vla.num_patches * weight_flops(p)
    head = vla.llm.get_output_embeddings().weight
    total += (vla.num_action_tokens + 1) * weight_flops(head)
    for blocks, width, tokens, times, trained in stacks(vla, num_tokens):
        weights = sum(weight_flops(p, trained) for block in blocks for p in block.parameters())
        attention = (12 if trained else 4) * len(blocks) * width * tokens
        total += times * tokens * (weights + attention)
    return total


def weight_flops(p: torch.nn.Parameter, backward: bool = True) -> int:
    """Operations of one parameter for each token."""
    shape = getattr(p, "ds_shape", p.shape)  # ds_shape: ZeRO-3 has left only a slice of it
    if len(shape) < 2:
        return 0
    each = 2
    if backward:
        each += 4 if p.requires_grad else 2
    return each * shape.numel()
