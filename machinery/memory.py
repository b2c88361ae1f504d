"""Does a model fit? Answered before anything is allocated.

    python -m machinery.memory --config configs/oxe.yaml --gpus 8 \\
        --deepspeed_config ds_configs/zero3.json

prints, without a GPU, the line `memory` of a training (cost.py) and what other ways to train would
take. All sizes are in GB (1e9 bytes).
"""

import argparse
import math

import torch

from machinery.backbones import llm_config
from machinery.checkpoint import CheckpointError, Tensors
from machinery.config import (
    TrainConfig,
    exit_with_one_line,
    load_config,
    load_ds_config,
    one_line,
)
from machinery.cost import memory_needed
from machinery.lora import linear_layers
from machinery.weights import start_from
from model import VLA

LARGEST = 10_000  # pixels of a side, blocks, cameras, numbers of an action, ...


def check_size(cfg: TrainConfig, tensors: Tensors) -> None:
    """Raise CheckpointError if a description would make a much larger model than its files contain:
    making it could fill the memory before the files are compared with it."""
    try:
        llm = llm_config(cfg.llm_backbone, 1)
        sides = [cfg.image_size, cfg.action_dim * cfg.action_chunk, cfg.proprio_dim,
                 cfg.window_size * len(cfg.cameras), getattr(llm, "head_dim", None) or 0]
        sides += [count for counts in cfg.features.values() for count in counts.values()]
        experts = max(getattr(llm, key, 0) or 1 for key in ("num_experts", "num_local_experts"))
        width = getattr(llm, "moe_intermediate_size", 0) or llm.intermediate_size
        layers = [llm.num_hidden_layers]
        numbers = [llm.num_hidden_layers * llm.hidden_size * width * experts]  # a part of them
        for tower in cfg.vision_backbone.values():
            sides += [value for value in tower.values() if isinstance(value, int | float)]
            patch = tower.get("patch_size", 8)
            patch = min(patch) if isinstance(patch, list) else patch
            per_channel = [(cfg.image_size // patch) ** 2, 3 * patch**2,
                           tower.get("depth", 1) * tower.get("mlp_ratio", 1)]
            numbers.append(tower.get("embed_dim", 1) * max(per_channel))
            layers.append(tower.get("depth", 1))
        present = sum(map(math.prod, tensors.shapes.values()))
        larger = (max(sides) > LARGEST or max(layers) > len(tensors.shapes)
                  or max(numbers) > present)
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise CheckpointError(f"{tensors.where}: its config.json does not describe a model: "
                              f"{one_line(error)[:300]}") from error
    if larger:
        raise CheckpointError(f"{tensors.where}: config.json describes a larger model than the "
                              "files contain")


def memory_if(vla: VLA) -> str:
    """A line: the memory of one GPU if less were trained, or some were offloaded. Freezes `vla`."""
    layers = linear_layers(vla).values()
    weights = 2 * vla.count_parameters()[0]
    adapters = 18 * 32 * sum(layer.in_features + layer.out_features for layer in layers)
    saved = sum(layer.in_features * layer.out_features for layer in layers)  # int8: 1 byte of 2
    vla.freeze(True, True, True)
    kept = {"lora_bf16": weights + adapters, "lora_int8": weights + adapters - saved,
            "last_layer": weights + 16 * vla.count_parameters()[1],
            "everything_offloaded": weights + 2 * weights}
    return "memory_if " + " ".join(f"{way}_gb {size / 1e9:.4g}" for way, size in kept.items())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", required=True, help="the YAML of a training")
    parser.add_argument("--deepspeed_config", default="ds_configs/zero2.json", help="its JSON")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="override keys")
    parser.add_argument("--gpus", type=int, default=1, help="how many GPUs share the work")
    args = parser.parse_args()
    with exit_with_one_line():
        cfg = load_config(args.config, args.set)
        ds_config = load_ds_config(args.deepspeed_config)
        cfg, tokenizer, _ = start_from(cfg, None)
        cfg = cfg.model_copy(update={"action_dim": cfg.action_dim or 7})  # from the data, in a run
        with torch.device("meta"):
            vla = VLA(cfg, tokenizer)
        vla.freeze(cfg.freeze_vision_backbone, cfg.freeze_llm_backbone,
                   cfg.unfreeze_last_llm_layer)
        print(memory_needed(vla, ds_config, args.gpus))
        print(memory_if(vla))


if __name__ == "__main__":
    main()
