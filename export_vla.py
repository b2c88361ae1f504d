"""Export a model so that OpenVLA's own code loads it.

    python export_vla.py runs/bridge+n1+b32+x7 exported --format hf --dtype bf16
    python export_vla.py openvla/openvla-7b exported --format native
    python export_vla.py runs/my-lora+n1+b8+x7 adapter --format peft --dtype bf16

The first argument is anything weights.py can open. hf: config.json, sharded safetensors, processor and
tokenizer, for OpenVLA's Hugging Face class. native: config.json, dataset_statistics.json and
checkpoints/*.pt, for OpenVLA's training code. Both keep this project's own description beside OpenVLA's (the
key "zerovla" of config.json), so that load_vla and base_vlm take the export back exactly, and adapters
(lora.py) are merged into the weights. peft: the adapters alone, which Hugging Face's peft loads onto the base
as it was exported for hf. Tensors pass through memory a few at a time; no GPU is needed.
"""

import argparse
import functools
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save as to_safetensors
from tqdm import tqdm

from action_tokenizer import load_tokenizer
from machinery.backbones import build_tower, llm_config
from machinery.checkpoint import Checkpoint, CheckpointError
from machinery.config import TrainConfig, exit_with_one_line
from machinery.lora import ADAPTER
from machinery.weights import (
    LANGUAGE_MODELS,
    PRISMATIC,
    VISION_BACKBONES,
    Weights,
    open_weights,
    parameters_without_memory,
    rename,
)

SHARD_BYTES = 1 << 30
HUB_CODE = "openvla/openvla-7b--"  # where transformers finds the classes, with trust_remote_code=True
# what makes a model itself
DESCRIPTION = """vision_backbone llm_backbone arch_specifier prompt_style image_size image_resize_strategy
    action_chunk action_dim action_normalization add_action_tokens cameras datasets features image_aug
    max_length max_prefix parallel_decoding proprio_dim use_proprio window_size""".split()


def export(where: str, out: Path, format: str, dtype: torch.dtype | None = None) -> None:
    """Write the model `where` to the new directory `out` in format "hf", "native" or "peft". dtype None keeps
    each tensor's own (of what adapters are merged into: float32). Raises CheckpointError when there is
    nothing to read or `out` exists."""
    if out.exists():
        raise CheckpointError(f"{out} exists: remove it or name another directory")
    weights = open_weights(where)
    cfg = TrainConfig(**weights.config)
    scratch = out.with_name(f".{out.name}.export")  # a name that nobody else has given a folder
    shutil.rmtree(scratch, ignore_errors=True)  # of an export that was killed
    scratch.mkdir(parents=True)
    try:
        refuse_small_disk(weights, scratch, dtype, copies=1 if format == "hf" else 2)
        save_tokenizer(cfg, scratch)
        (scratch / "dataset_statistics.json").write_text(json.dumps(weights.norm_stats, indent=2))
        write = {"hf": write_hugging_face, "native": write_native, "peft": write_peft}[format]
        write(weights, cfg, scratch, dtype)
        scratch.rename(out)
        if own := sorted(cfg.datasets.keys() & {name.partition(":")[0] for name in weights.norm_stats}):
            print(f"note: OpenVLA's own class acts in the standard form that the recipe of {', '.join(own)} "
                  "makes (gripper 1 = open, ...); load_vla and serve_vla.py, in that of the recordings")
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def refuse_small_disk(weights: Weights, out: Path, dtype: torch.dtype | None, copies: int) -> None:
    """Raise CheckpointError where the tensors will not fit."""
    sizes = {name: math.prod(shape) for name, shape in weights.tensors.shapes.items()}
    widths = {name: (weights.tensors.read(name, 0, 1).to(dtype)).element_size() for name in sizes}
    needed, free = copies * sum(sizes[name] * widths[name] for name in sizes), shutil.disk_usage(out).free
    if needed > free:
        raise CheckpointError(f"{out.parent}: No space left: the export takes {needed / 1e9:.4g} GB there, "
                              f"and {free / 1e9:.4g} GB are free")


def save_tokenizer(cfg: TrainConfig, out: Path) -> None:
    """The tokenizer, in words that the versions OpenVLA pins (transformers 4.40, tokenizers 0.19) know."""
    load_tokenizer(cfg.tokenizer, cfg.add_action_tokens).save_pretrained(out)
    config = json.loads((out / "tokenizer_config.json").read_text())
    vocabulary = json.loads((out / "tokenizer.json").read_text())
    config |= {"tokenizer_class": "PreTrainedTokenizerFast",
               "model_input_names": ["input_ids", "attention_mask"]}
    if "merges" in vocabulary["model"]:  # pairs since tokenizers 0.20
        pairs = vocabulary["model"]["merges"]
        vocabulary["model"]["merges"] = [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs]
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    (out / "tokenizer.json").write_text(json.dumps(vocabulary, ensure_ascii=False))


def converted(weights: Weights, dtype: torch.dtype | None) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of everything, in order, one at a time."""
    for name in tqdm(weights.tensors.shapes, "export", unit="tensor", disable=None):
        yield name, weights.tensors.whole(name).to(dtype).contiguous()


# ---- Hugging Face ------------------------------------------------------------------------------------------


def write_hugging_face(weights: Weights, cfg: TrainConfig, out: Path, dtype: torch.dtype | None) -> None:
    """The directory that OpenVLA's scripts/extern/convert_openvla_weights_to_hf.py would have made."""
    towers, shards, shard, size, total = tuple(cfg.vision_backbone), [], {}, 0, 0
    dtypes = set()
    for name, tensor in converted(weights, dtype):
        if size + tensor.nbytes > SHARD_BYTES and shard:
            shards.append(write_shard(shard, out, len(shards)))
            shard, size = {}, 0
        shard[rename(name, towers, to_hugging_face=True)] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
        dtypes.add(tensor.dtype)
    shards.append(write_shard(shard, out, len(shards)))
    places = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (out / f"{number}.safetensors").rename(out / file)
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    widest = functools.reduce(torch.promote_types, dtypes)  # to be loaded in it loses nothing
    config = hugging_face_config(cfg, weights.norm_stats, str(widest).removeprefix("torch."))
    (out / "config.json").write_text(json.dumps(config, indent=2))
    (out / "preprocessor_config.json").write_text(json.dumps(preprocessor_config(cfg), indent=2))


def write_shard(shard: dict[str, torch.Tensor], out: Path, number: int) -> list[str]:
    """Write one file under a temporary name; returns what is in it."""
    (out / f"{number}.safetensors").write_bytes(to_safetensors(shard, metadata={"format": "pt"}))
    return list(shard)


def prismatic_ids(cfg: TrainConfig) -> tuple[str, str]:
    """Prismatic's names of the towers and of the language model, or the nearest, with a warning."""
    towers = [*description(cfg)["vision_backbone"].values()]
    vision = next((name for name, known in VISION_BACKBONES.items()
                   if known["image_size"] == cfg.image_size and towers == [*known["towers"].values()]), None)
    llm, shape = text_config(cfg), ("model_type", "hidden_size", "num_hidden_layers")
    fits = [name for name, known in LANGUAGE_MODELS.items() if known["prompt_style"] == cfg.prompt_style
            and known["shape"]["model_type"] == llm["model_type"]]
    exact = [name for name in fits
             if all(LANGUAGE_MODELS[name]["shape"][key] == llm.get(key) for key in shape)]
    whole = llm_config(cfg.llm_backbone, llm["vocab_size"]).to_dict()
    odd = (whole.get("attention_bias") or whole.get("mlp_bias")  # of which text_config says nothing
           or "factor" in (whole.get("rope_parameters") or {}))
    if vision is None or not fits or odd or cfg.parallel_decoding or cfg.use_proprio or cfg.action_chunk > 1:
        print("warning: OpenVLA has no name for this model's towers, language model or extensions: this "
              "project takes the export back, OpenVLA's own code does not", file=sys.stderr)
    return vision or "siglip-vit-so400m", (exact or fits or ["llama2-7b-pure"])[0]


def text_config(cfg: TrainConfig) -> dict:
    """What OpenVLA's class reads of the language model, with the vocabulary rounded up as in llm_config."""
    tokenizer = load_tokenizer(cfg.tokenizer, cfg.add_action_tokens)
    config = llm_config(cfg.llm_backbone, len(tokenizer))
    config.pad_token_id = tokenizer.pad_token_id
    keep = ("model_type", "vocab_size", "pad_token_id", "hidden_size", "intermediate_size",
            "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "rms_norm_eps",
            "layer_norm_eps", "max_position_embeddings", "sliding_window", "partial_rotary_factor",
            "rope_theta", "hidden_act", "tie_word_embeddings")
    values = config.to_dict()
    values |= values.get("rope_parameters") or {}  # there since transformers 5; OpenVLA's version is older
    return {key: values[key] for key in keep if key in values}


def hugging_face_config(cfg: TrainConfig, norm_stats: dict, dtype: str) -> dict:
    """config.json of OpenVLA's Hugging Face class (prismatic/extern/hf/configuration_prismatic.py)."""
    vision, llm = prismatic_ids(cfg)
    towers, text = cfg.vision_backbone.values(), text_config(cfg)
    tokenizer = load_tokenizer(cfg.tokenizer, cfg.add_action_tokens)
    return {
        "architectures": ["OpenVLAForActionPrediction"], "model_type": "openvla",
        "auto_map": {"AutoConfig": f"{HUB_CODE}configuration_prismatic.OpenVLAConfig",
                     "AutoModelForVision2Seq": f"{HUB_CODE}modeling_prismatic.OpenVLAForActionPrediction"},
        "vision_backbone_id": vision, "llm_backbone_id": llm, "arch_specifier": cfg.arch_specifier,
        "use_fused_vision_backbone": len(towers) > 1,
        "timm_model_ids": [tower["model"] for tower in towers],
        "timm_override_act_layers": [tower.get("act_layer") for tower in towers],
        "image_sizes": [cfg.image_size] * len(towers),
        "image_resize_strategy": openvla_strategy(cfg),
        "hf_llm_id": LANGUAGE_MODELS[llm]["hub"], "llm_max_length": 2048,
        # how many rows of the vocabulary lie above the action tokens, whatever the name says
        "pad_to_multiple_of": text["vocab_size"] - tokenizer.action_vocab_size,
        "pad_token_id": text["pad_token_id"], "text_config": text | {"torch_dtype": dtype},
        "torch_dtype": dtype,
        "n_action_bins": 256, "norm_stats": norm_stats, "output_projector_states": False,
        "transformers_version": "4.40.1", "zerovla": description(cfg),
    }


def openvla_strategy(cfg: TrainConfig) -> str:
    """What the processor does to a camera's image; OpenVLA has no Lanczos there, and bicubic is nearest."""
    return "resize-naive" if cfg.image_resize_strategy == "lanczos" else cfg.image_resize_strategy


def description(cfg: TrainConfig) -> dict:
    """What this project needs to build the model again."""
    values = {key: value for key, value in cfg.model_dump().items() if key in DESCRIPTION}
    towers = {name: {key: value for key, value in tower.items() if key != "pretrained"}
              for name, tower in cfg.vision_backbone.items()}
    return values | {"vision_backbone": towers}


def preprocessor_config(cfg: TrainConfig) -> dict:
    """preprocessor_config.json of OpenVLA's PrismaticImageProcessor."""
    with parameters_without_memory():
        towers = description(cfg)["vision_backbone"].values()
        towers = [build_tower(cfg.image_size, **tower) for tower in towers]
    size, strategy = cfg.image_size, openvla_strategy(cfg)
    float32 = [torch.tensor([tower.mean, tower.std]).tolist() for tower in towers]
    return {
        "image_processor_type": "PrismaticImageProcessor", "processor_class": "PrismaticProcessor",
        "auto_map": {"AutoImageProcessor": f"{HUB_CODE}processing_prismatic.PrismaticImageProcessor",
                     "AutoProcessor": f"{HUB_CODE}processing_prismatic.PrismaticProcessor"},
        "image_resize_strategy": strategy, "input_sizes": [[3, size, size] for _ in towers],
        "interpolations": ["bicubic" for _ in towers], "means": [[*tower.mean] for tower in towers],
        "stds": [[*tower.std] for tower in towers],
        "tvf_crop_params": [{"output_size": [size, size]} for _ in towers],
        "tvf_do_letterbox": strategy == "letterbox",
        "tvf_letterbox_fill": [int(255 * x) for x in towers[-1].mean] if strategy == "letterbox" else None,
        "tvf_normalize_params": [{"inplace": False, "mean": mean, "std": std} for mean, std in float32],
        "tvf_resize_params": [{"antialias": True, "interpolation": 3, "max_size": None,
                               "size": [size, size] if strategy == "resize-naive" else size} for _ in towers],
        "use_fused_vision_backbone": len(towers) > 1,
    }


# ---- Native ------------------------------------------------------------------------------------------------


def write_native(weights: Weights, cfg: TrainConfig, out: Path, dtype: torch.dtype | None) -> None:
    """A run directory of OpenVLA's training code, with one checkpoint under two names: its loader wants the
    one, its converter the other."""
    vision, llm = prismatic_ids(cfg)
    row = [vision, llm, openvla_strategy(cfg)]
    base = next((name for name, known in reversed(PRISMATIC.items()) if known == row), None)
    vla = {"vla_id": cfg.vla_id, "base_vlm": base}
    (out / "config.json").write_text(json.dumps({"vla": vla, "zerovla": description(cfg)}, indent=2))
    (out / "checkpoints").mkdir()
    # torch.save wants all tensors at once: they are put in files first, which memory can forget again
    staging, modules = out / "staging", {}
    staging.mkdir()
    for number, (name, tensor) in enumerate(converted(weights, dtype)):
        with open(staging / str(number), "wb") as file:  # on a full disk an error here, not a crash later
            os.posix_fallocate(file.fileno(), 0, tensor.nbytes)
        mapped = torch.from_file(file.name, True, tensor.numel(), dtype=tensor.dtype)
        module, _, key = name.partition(".")
        modules.setdefault(module, {})[key] = mapped.view(tensor.shape).copy_(tensor)
    tag = Path(weights.tensors.where).name.removesuffix(".pt")
    tag = tag if tag.startswith("step-") else "step-000000-epoch-00-loss=0.0000"
    path = out / "checkpoints" / f"{tag}.pt"
    try:
        torch.save({"model": modules}, path)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: could not be written: is there no space left? ({error})") from error
    shutil.rmtree(staging)
    try:
        os.link(path, path.with_name("latest-checkpoint.pt"))
    except OSError:  # a file system without hard links
        shutil.copyfile(path, path.with_name("latest-checkpoint.pt"))


# ---- Adapters ----------------------------------------------------------------------------------------------


def write_peft(weights: Weights, cfg: TrainConfig, out: Path, dtype: torch.dtype | None) -> None:
    """adapter_config.json and adapter_model.safetensors. Raises CheckpointError where there is more, or less,
    than peft's files can say."""
    if weights.base is None or not cfg.lora_rank:
        raise CheckpointError(f"{weights.tensors.where} has no adapters: export it as hf or native")
    own, towers, tensors, layers = Checkpoint(weights.tensors.where), tuple(cfg.vision_backbone), {}, []
    if more := [name for name in own.shapes if not name.endswith(ADAPTER)]:
        raise CheckpointError(f"{own.where}: {more[0]} was trained, too, and peft's files have no place "
                              "for it: export it as hf or native")
    for name in own.shapes:
        layer, _, part = rename(name, towers, to_hugging_face=True).rpartition(".")
        tensors[f"base_model.model.{layer}.{part}.weight"] = own.whole(name).to(dtype).contiguous()
        layers.append(layer)
    (out / "adapter_model.safetensors").write_bytes(to_safetensors(tensors, metadata={"format": "pt"}))
    (out / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "r": cfg.lora_rank, "lora_alpha": cfg.lora_alpha, "lora_dropout": 0.0,
        "target_modules": sorted(set(layers)), "bias": "none", "init_lora_weights": "gaussian",
        "base_model_name_or_path": own.base["where"], "inference_mode": True}, indent=2))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="a run, a checkpoint, an export, a hub id: whatever weights.py opens")
    parser.add_argument("out", type=Path, help="a new directory")
    parser.add_argument("--format", choices=["hf", "native", "peft"], required=True)
    parser.add_argument("--dtype", choices=["bf16", "fp32"], help="default: each tensor's own")
    args = parser.parse_args()
    with exit_with_one_line():
        export(args.model, args.out, args.format,
               {"bf16": torch.bfloat16, "fp32": torch.float32, None: None}[args.dtype])


if __name__ == "__main__":
    main()
