"""Export a model so that OpenVLA's own code loads it.

    python export_vla.py runs/bridge+n1+b32+x7 exported --format hf --dtype bf16
    python export_vla.py openvla/openvla-7b exported --format native
    python export_vla.py runs/my-lora+n1+b8+x7 adapter --format peft --dtype bf16
    python export_vla.py runs/oft_libero+n1+b8+x7 exported --format oft --dtype bf16

The first argument is anything weights.py can open.

    hf        for OpenVLA's Hugging Face class: config.json, safetensors, processor, tokenizer
    native    for OpenVLA's training code: config.json, dataset_statistics.json, checkpoints/*.pt
    peft      adapters without their base; peft loads them onto the base in Hugging Face format,
              which they name: its hub id or directory. Another one must be exported (hf), too
    oft       action_head l1, for OpenVLA-OFT's code: as hf, and a file for each new part

hf, native and oft keep this project's description beside OpenVLA's, as "zerovla" in config.json:
load_vla and base_vlm read the export back exactly. Adapters (lora.py) are merged into the weights.
Tensors pass through memory a few at a time. No GPU is needed.
"""

import argparse
import functools
import json
import math
import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from machinery.config import TrainConfig, exit_with_one_line


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="a run, a checkpoint, an export or a hub id (see weights.py)")
    parser.add_argument("out", type=Path, help="a new directory")
    parser.add_argument("--format", choices=["hf", "native", "peft", "oft"], required=True,
                        help="of OpenVLA's class, of its training code, or of adapters alone")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], help="default: each tensor's own")
    return parser.parse_args()


if __name__ == "__main__":
    read_options()  # mistakes and --help, before PyTorch is imported for seconds

import timm
import torch
from safetensors.torch import save as to_safetensors
from tqdm import tqdm

from action_tokenizer import load_tokenizer
from machinery.backbones import llm_config
from machinery.checkpoint import Checkpoint, CheckpointError, Tensors
from machinery.description import DESCRIPTION
from machinery.files import atomic, read_json, write_json
from machinery.frames import without_version
from machinery.lora import ADAPTER
from machinery.oft_export import write_parts
from machinery.weights import (
    LANGUAGE_MODELS,
    PRISMATIC,
    VISION_BACKBONES,
    Weights,
    open_weights,
    rename,
)

SHARD_BYTES = 1 << 30  # of a file, in float32
HUB_CODE = "openvla/openvla-7b--"  # transformers finds the classes there (trust_remote_code=True)


def export(where: str, out: Path, format: str, dtype: torch.dtype | None = None) -> None:
    """Write the model `where` to the new directory `out` in one of FORMATS.

    dtype: None keeps each tensor's own; matrices with merged adapters are then float32. Raises
    CheckpointError if there is no model or `out` exists.
    """
    if out.exists():
        raise CheckpointError(f"{out} exists: remove it or choose another directory")
    weights = open_weights(where)
    cfg = TrainConfig(**weights.config)
    if (format == "oft") != (cfg.action_head == "l1") and format != "native":
        raise CheckpointError(f"{where}: --format {format} does not fit action_head "
                              f"{cfg.action_head}: choose oft for l1, else hf, or native")
    write = FORMATS[format]
    with atomic(out) as scratch:
        scratch.mkdir(parents=True)
        save_tokenizer(cfg, scratch)
        write_json(scratch / "dataset_statistics.json", weights.norm_stats)
        write(weights, cfg, scratch, dtype)
    own = cfg.datasets.keys() & {without_version(name) for name in weights.norm_stats}
    if own:
        print(f"note: for {', '.join(sorted(own))}, OpenVLA's own class returns actions in the "
              "standard form that the recipe makes (gripper 1 = open, ...); load_vla and "
              "serve_vla.py return them in the form of the recordings")


def save_tokenizer(cfg: TrainConfig, out: Path) -> None:
    """Save the tokenizer for the versions OpenVLA pins: transformers 4.40, tokenizers 0.19."""
    load_tokenizer(cfg.tokenizer, cfg.add_action_tokens).save_pretrained(out)
    config = read_json(out / "tokenizer_config.json")
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["model_input_names"] = ["input_ids", "attention_mask"]
    write_json(out / "tokenizer_config.json", config)
    vocabulary = read_json(out / "tokenizer.json")
    merges = vocabulary["model"].get("merges", [])
    for i, pair in enumerate(merges):
        if isinstance(pair, list):  # since tokenizers 0.20
            merges[i] = " ".join(pair)
    (out / "tokenizer.json").write_text(json.dumps(vocabulary, ensure_ascii=False))


def convert(tensors: Tensors, name: str, dtype: torch.dtype | None) -> torch.Tensor:
    return tensors.whole(name).to(dtype).contiguous()


# ---- Hugging Face ------------------------------------------------------------------------------


def write_hugging_face(weights: Weights, cfg: TrainConfig, out: Path,
                       dtype: torch.dtype | None) -> None:
    """The directory that OpenVLA's scripts/extern/convert_openvla_weights_to_hf.py would make."""
    towers = tuple(cfg.vision_backbone)
    shards = [[]]  # the names of the tensors in each file
    size = 0
    for name, shape in weights.tensors.shapes.items():
        if size > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += 4 * math.prod(shape)
    files = {}
    total = 0
    dtypes = set()
    for number, names in enumerate(tqdm(shards, "export", unit="file", disable=None), 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name in names:
            theirs = rename(name, towers, to_hugging_face=True)
            tensors[theirs] = convert(weights.tensors, name, dtype)
            files[theirs] = file
            total += tensors[theirs].nbytes
            dtypes.add(tensors[theirs].dtype)
        (out / file).write_bytes(to_safetensors(tensors, metadata={"format": "pt"}))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
    write_json(out / "model.safetensors.index.json", index)
    widest = functools.reduce(torch.promote_types, dtypes)  # loading in this dtype loses nothing
    config = hugging_face_config(cfg, weights.norm_stats, str(widest).removeprefix("torch."))
    write_json(out / "config.json", config)
    write_json(out / "preprocessor_config.json", preprocessor_config(cfg))


def prismatic_ids(cfg: TrainConfig) -> tuple[str, str]:
    """Prismatic's ids of the vision backbone and the language model.

    If it has none, warns that OpenVLA's code will not load the export, and returns similar ones.
    """
    towers = [*description(cfg)["vision_backbone"].values()]
    visions = [name for name, known in VISION_BACKBONES.items()
               if known["image_size"] == cfg.image_size and [*known["towers"].values()] == towers]

    llm = text_config(cfg)
    shape = ("model_type", "hidden_size", "num_hidden_layers")
    same_kind = [name for name, known in LANGUAGE_MODELS.items()
                 if known["shape"]["model_type"] == llm["model_type"]
                 and known["prompt_style"] == cfg.prompt_style]
    same_shape = [name for name in same_kind
                  if all(LANGUAGE_MODELS[name]["shape"][key] == llm.get(key) for key in shape)]

    # settings that OpenVLA's class does not read
    complete = llm_config(cfg.llm_backbone, llm["vocab_size"]).to_dict()
    rope = complete.get("rope_parameters") or {}
    extended = cfg.parallel_decoding or cfg.use_proprio or cfg.action_chunk > 1
    unread = (complete.get("attention_bias") or complete.get("mlp_bias") or "factor" in rope
              or (extended and cfg.action_head != "l1"))
    if unread or not visions or not same_kind:
        print("warning: OpenVLA does not know this model's towers, language model or extensions: "
              "only this project can read the export, OpenVLA's own code cannot", file=sys.stderr)
    return [*visions, "siglip-vit-so400m"][0], [*same_shape, *same_kind, "llama2-7b-pure"][0]


def text_config(cfg: TrainConfig) -> dict:
    """The keys of the language model's config that OpenVLA's class reads."""
    tokenizer = load_tokenizer(cfg.tokenizer, cfg.add_action_tokens)
    config = llm_config(cfg.llm_backbone, len(tokenizer))
    config.pad_token_id = tokenizer.pad_token_id
    values = config.to_dict()
    values |= values.get("rope_parameters") or {}  # nested since transformers 5
    keys = """model_type vocab_size pad_token_id hidden_size intermediate_size num_hidden_layers
        num_attention_heads num_key_value_heads rms_norm_eps layer_norm_eps max_position_embeddings
        sliding_window partial_rotary_factor rope_theta hidden_act tie_word_embeddings""".split()
    return {key: values[key] for key in keys if key in values}


def hugging_face_config(cfg: TrainConfig, norm_stats: dict, dtype: str) -> dict:
    """config.json of OpenVLA's class (prismatic/extern/hf/configuration_prismatic.py)."""
    vision, llm = prismatic_ids(cfg)
    towers = cfg.vision_backbone.values()
    text = text_config(cfg)
    tokenizer = load_tokenizer(cfg.tokenizer, cfg.add_action_tokens)
    return {
        "architectures": ["OpenVLAForActionPrediction"],
        "model_type": "openvla",
        "auto_map": {
            "AutoConfig": f"{HUB_CODE}configuration_prismatic.OpenVLAConfig",
            "AutoModelForVision2Seq": f"{HUB_CODE}modeling_prismatic.OpenVLAForActionPrediction",
        },
        "vision_backbone_id": vision,
        "llm_backbone_id": llm,
        "arch_specifier": cfg.arch_specifier,
        "use_fused_vision_backbone": len(towers) > 1,
        "timm_model_ids": [tower["model"] for tower in towers],
        "timm_override_act_layers": [tower.get("act_layer") for tower in towers],
        "image_sizes": [cfg.image_size] * len(towers),
        "image_resize_strategy": openvla_strategy(cfg),
        "hf_llm_id": LANGUAGE_MODELS[llm]["hub"],
        "llm_max_length": 2048,
        # the number of rows of the vocabulary above the action tokens, despite its name
        "pad_to_multiple_of": text["vocab_size"] - tokenizer.action_vocab_size,
        "pad_token_id": text["pad_token_id"],
        "text_config": text | {"torch_dtype": dtype},
        "torch_dtype": dtype,
        "n_action_bins": 256,
        "norm_stats": norm_stats,
        "output_projector_states": False,
        "transformers_version": "4.40.1",
        "zerovla": description(cfg),
    }


def openvla_strategy(cfg: TrainConfig) -> str:
    """How OpenVLA's processor resizes. It has no Lanczos; its bicubic comes nearest."""
    if cfg.image_resize_strategy in ("lanczos", "oft"):
        return "resize-naive"
    return cfg.image_resize_strategy


def description(cfg: TrainConfig) -> dict:
    """The config keys from which this project builds the model again."""
    values = cfg.model_dump(include=set(DESCRIPTION))
    for tower in values["vision_backbone"].values():
        tower.pop("pretrained", None)  # the export has their weights
    return values


def preprocessor_config(cfg: TrainConfig) -> dict:
    """preprocessor_config.json of OpenVLA's PrismaticImageProcessor."""
    size = cfg.image_size
    strategy = openvla_strategy(cfg)
    letterbox = strategy == "letterbox"
    towers = [timm.get_pretrained_cfg(tower["model"]) for tower in cfg.vision_backbone.values()]
    fill = [int(255 * x) for x in towers[-1].mean]
    crop = {"output_size": [size, size]}
    resize = {"antialias": True, "interpolation": 3, "max_size": None,
              "size": [size, size] if strategy == "resize-naive" else size}
    normalize = []
    for tower in towers:
        mean, std = torch.tensor([tower.mean, tower.std]).tolist()  # rounded to float32, as there
        normalize.append({"inplace": False, "mean": mean, "std": std})
    return {
        "image_processor_type": "PrismaticImageProcessor",
        "processor_class": "PrismaticProcessor",
        "auto_map": {
            "AutoImageProcessor": f"{HUB_CODE}processing_prismatic.PrismaticImageProcessor",
            "AutoProcessor": f"{HUB_CODE}processing_prismatic.PrismaticProcessor",
        },
        "image_resize_strategy": strategy,
        "input_sizes": [[3, size, size] for _ in towers],
        "interpolations": ["bicubic" for _ in towers],
        "means": [[*tower.mean] for tower in towers],
        "stds": [[*tower.std] for tower in towers],
        "tvf_crop_params": [crop for _ in towers],
        "tvf_do_letterbox": letterbox,
        "tvf_letterbox_fill": fill if letterbox else None,
        "tvf_normalize_params": normalize,
        "tvf_resize_params": [resize for _ in towers],
        "use_fused_vision_backbone": len(towers) > 1,
    }


# ---- Native ------------------------------------------------------------------------------------


def write_native(weights: Weights, cfg: TrainConfig, out: Path, dtype: torch.dtype | None) -> None:
    """A run directory of OpenVLA's training code.

    Its checkpoint has two names: OpenVLA's loader expects one, its converter the other.
    """
    ids = [*prismatic_ids(cfg), openvla_strategy(cfg)]
    base = next((name for name, known in reversed(PRISMATIC.items()) if known == ids), None)
    vla = {"vla_id": cfg.vla_id, "base_vlm": base}
    write_json(out / "config.json", {"vla": vla, "zerovla": description(cfg)})

    # torch.save needs all tensors at once: map them from files, whose pages need no memory
    staging = out / "staging"
    staging.mkdir()
    modules = {}
    names = tqdm(weights.tensors.shapes, "export", unit="tensor", disable=None)
    for number, name in enumerate(names):
        tensor = convert(weights.tensors, name, dtype)
        with open(staging / str(number), "wb") as file:
            # fails here if the disk is full; a mapped page without room would kill the process
            os.posix_fallocate(file.fileno(), 0, tensor.nbytes)
        mapped = torch.from_file(file.name, True, tensor.numel(), dtype=tensor.dtype)
        module, _, key = name.partition(".")
        modules.setdefault(module, {})[key] = mapped.view(tensor.shape).copy_(tensor)

    tag = Path(weights.tensors.where).name.removesuffix(".pt")
    if not tag.startswith("step-"):
        tag = "step-000000-epoch-00-loss=0.0000"
    path = out / "checkpoints" / f"{tag}.pt"
    path.parent.mkdir()
    try:
        torch.save({"model": modules}, path)
    except RuntimeError as error:  # PyTorch's message does not mention the disk
        raise CheckpointError(f"{path}: cannot be written: no space left? {error}") from error
    shutil.rmtree(staging)
    latest = path.with_name("latest-checkpoint.pt")
    try:
        os.link(path, latest)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, latest)


# ---- Adapters ----------------------------------------------------------------------------------


def write_peft(weights: Weights, cfg: TrainConfig, out: Path, dtype: torch.dtype | None) -> None:
    """adapter_config.json and adapter_model.safetensors.

    Raises CheckpointError if anything but adapters was trained.
    """
    own = Checkpoint(weights.tensors.where)
    towers = tuple(cfg.vision_backbone)
    tensors = {}
    layers = set()
    for name in own.shapes:
        if not name.endswith(ADAPTER):
            raise CheckpointError(f"{own.where}: {name} is not an adapter, and peft's files have "
                                  "no place for it: choose --format hf or native")
        layer, _, part = rename(name, towers, to_hugging_face=True).rpartition(".")
        layers.add(layer)
        tensors[f"base_model.model.{layer}.{part}.weight"] = convert(own, name, dtype)
    data = to_safetensors(tensors, metadata={"format": "pt"})
    (out / "adapter_model.safetensors").write_bytes(data)
    write_json(out / "adapter_config.json", {
        "peft_type": "LORA",
        "r": cfg.lora_rank,
        "lora_alpha": cfg.lora_alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(layers),
        "bias": "none",
        "init_lora_weights": "gaussian",
        "base_model_name_or_path": base_for_peft(own.base["where"], weights.base.where),
        "inference_mode": True,
    })


def base_for_peft(name: str, where: Path) -> str | None:
    """The base's hub id, or its directory in Hugging Face format: what peft and transformers load.

    name: as the run knows it; where: the opened directory or file. Prints a note if there is none.
    """
    if read_json(Path(where) / "config.json", {}).get("model_type") != "openvla":
        print(f"note: the base {name} is not in Hugging Face format: export it, too (--format hf), "
              "and tell peft its directory")
        return None
    cached = re.search(r"/models--([^/]+)--([^/]+)/snapshots/", str(where))  # of the hub
    return "/".join(cached.groups()) if cached else name


# ---- OpenVLA-OFT -------------------------------------------------------------------------------


def write_oft(weights: Weights, cfg: TrainConfig, out: Path, dtype: torch.dtype | None) -> None:
    """A directory as OFT's finetune.py writes it (machinery/oft_export.py)."""
    parts = {}
    own = ["action_head", "proprio_projector", *(["film", "vision_backbone"] if cfg.film else [])]
    body = Tensors(weights.tensors.where)
    for name, shape in weights.tensors.shapes.items():
        if name.split(".")[0] in own:
            parts[name] = convert(weights.tensors, name, dtype)
        if name.split(".")[0] not in own[:3]:
            body.add(name, shape, functools.partial(weights.tensors.read, name))
    write_hugging_face(replace(weights, tensors=body), cfg, out, dtype)
    config = read_json(out / "config.json")
    del config["auto_map"]  # OFT's code sets it to its own classes
    write_json(out / "config.json", config)
    theirs = functools.partial(rename, towers=tuple(cfg.vision_backbone), to_hugging_face=True)
    step = re.match(r"step-0*(\d+)", Path(weights.tensors.where).name)
    write_parts(parts, out, step[1] if step else "latest", theirs)
    proprio = f", PROPRIO_DIM {cfg.proprio_dim}" if cfg.use_proprio else ""
    print("note: OFT's code chooses its constants by the words of its command line "
          "(prismatic/vla/constants.py). They must be NUM_ACTIONS_CHUNK "
          f"{cfg.action_chunk}, ACTION_DIM {cfg.action_dim}{proprio}, {cfg.action_normalization}. "
          f"Pass num_images_in_input {len(cfg.cameras)}")


FORMATS = {"hf": write_hugging_face, "native": write_native, "peft": write_peft, "oft": write_oft}


def main() -> None:
    """Command line."""
    args = read_options()
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32, None: None}
    with exit_with_one_line():
        export(args.model, args.out, args.format, dtypes[args.dtype])


if __name__ == "__main__":
    main()
