"""Does a model fit? Answered before anything is allocated.

    python -m machinery.memory --config configs/oxe.yaml --gpus 8 \\
        --deepspeed_config ds_configs/zero3.json

prints, without a GPU, the line `memory` of a training (cost.py) and what other ways to train would
take. All sizes are in GB (1e9 bytes).
"""

import argparse

import torch

from machinery.config import exit_with_one_line, load_config, load_ds_config
from machinery.cost import memory_needed
from machinery.lora import add_adapters, linear_layers
from machinery.oft import new_vla
from machinery.weights import start_from
from model import VLA


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
    parser.add_argument("--gpu_gb", type=float, default=0, help="size of a GPU; default: this one")
    args = parser.parse_args()
    with exit_with_one_line():
        cfg = load_config(args.config, args.set)
        ds_config = load_ds_config(args.deepspeed_config)
        cfg, tokenizer, _ = start_from(cfg, None)
        cfg = cfg.model_copy(update={"action_dim": cfg.action_dim or 7})  # from the data, in a run
        with torch.device("meta"):
            vla = new_vla(cfg, tokenizer)
        other_ways = memory_if(vla)
        vla.freeze(cfg.freeze_vision_backbone, cfg.freeze_llm_backbone,
                   cfg.unfreeze_last_llm_layer)
        if cfg.lora_rank:
            add_adapters(vla, cfg.lora_rank, cfg.lora_alpha, cfg.seed)
        print(memory_needed(vla, ds_config, args.gpus, args.gpu_gb * 1e9))
        print(other_ways)


if __name__ == "__main__":
    main()
