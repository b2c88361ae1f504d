"""Opens the weights at a path or id: Prismatic VLMs, OpenVLA in both its formats, our own runs.

    base_vlm: prism-dinosiglip-224px+7b          a Prismatic VLM, from the hub
    base_vlm: openvla/openvla-7b                 OpenVLA, from the hub; or the path of a copy
    base_vlm: runs/bridge+n1+b32+x7              a run of this project, or one of its checkpoints

Read open_weights. It returns Weights: the config that describes the model, and its tensors, not yet
read, under this project's names (those of OpenVLA's native checkpoints). To act, act.load_vla fills
a model with them. To train, the model is sharded first, and each GPU reads the elements it owns.
Nothing is unpickled but tensors: torch.load(weights_only=True).
"""

import contextlib
import copy
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import google_crc32c
import torch
from torch import nn

from action_tokenizer import load_tokenizer
from machinery import hub, oft_files
from machinery.backbones import llm_config, round_up
from machinery.checkpoint import (
    Checkpoint,
    CheckpointError,
    SafetensorsFile,
    Tensors,
    list_checkpoints,
    plain_name,
)
from machinery.config import TrainConfig, UserError, load_table, nearest, one_line, read_secret
from machinery.description import DESCRIPTION, checked, refuse_parts, refuse_quantized
from machinery.files import read_json
from machinery.int8 import shrink
from machinery.lora import merged
from model import VLA

# ---- Prismatic's names -------------------------------------------------------------------------

# keys of TrainConfig that are taken from the weights if the config does not set them
SHAPE = """vision_backbone llm_backbone tokenizer add_action_tokens arch_specifier prompt_style
    image_size""".split()
_table = load_table("prismatic")
VISION_BACKBONES = _table["vision_backbones"]
LANGUAGE_MODELS = _table["language_models"]
PRISMATIC: dict[str, list[str]] = _table["models"]  # id: vision, language model, resize strategy
PRISMATIC_HUB = "TRI-ML/prismatic-vlms"  # has a folder for each id


def prismatic_config(vision_id: str, llm_id: str, image_resize_strategy: str) -> dict:
    """Prismatic's ids of a vision backbone and a language model -> this project's config keys."""
    vision = copy.deepcopy(VISION_BACKBONES[vision_id])
    llm = LANGUAGE_MODELS[llm_id]
    fused = len(vision["towers"]) > 1
    return {
        "vision_backbone": vision["towers"],
        "image_size": vision["image_size"],
        "llm_backbone": llm["shape"],
        "tokenizer": llm["hub"],
        "prompt_style": llm["prompt_style"],
        "arch_specifier": "no-align+fused-gelu-mlp" if fused else "no-align+gelu-mlp",
        "image_resize_strategy": image_resize_strategy,
    }


# ---- Opening -----------------------------------------------------------------------------------


@dataclass
class Weights:
    """A model on disk.

    config: the keys of TrainConfig that describe it; norm_stats: its dataset_statistics.json
    base: for a run that saves only what it trained, the tensors it started from. `tensors` then has
    the two merged.
    """

    tensors: Tensors
    config: dict
    norm_stats: dict = field(default_factory=dict)
    base: Tensors | None = None


def start_from(cfg: TrainConfig, checkpoint: Checkpoint | None) -> tuple:
    """Open what training starts from: a checkpoint to resume, or the weights the config names.

    Returns (config, tokenizer, Weights or None). In the config, keys of SHAPE that were not set
    come from the weights, and llm_backbone is a complete description.
    """
    if cfg.hf_token:
        os.environ["HF_TOKEN"] = read_secret(cfg.hf_token, "hf_token")
    weights, source = None, cfg.pretrained_checkpoint or cfg.base_vlm
    if checkpoint:
        weights = _open_ours(checkpoint)
    elif source:
        weights = open_weights(source)
    if weights:
        unset = {key for key in SHAPE if key in weights.config} - cfg.model_fields_set
        cfg = cfg.model_copy(update={key: weights.config[key] for key in unset})
    if checkpoint and weights.base:
        weights.tensors = weights.base  # resumed adapters are trained beside the base, not merged
    # a run keeps a copy of its tokenizer: the one it started with may be gone
    tokenizer = load_tokenizer(weights.config["tokenizer"] if checkpoint else cfg.tokenizer,
                               cfg.add_action_tokens)
    if cfg.pretrained_backbones and not checkpoint:
        weights = open_language_model(cfg.llm_backbone, len(tokenizer))
    llm = json.loads(llm_config(cfg.llm_backbone, len(tokenizer)).to_json_string())
    if isinstance(cfg.llm_backbone, str):
        llm["_name_or_path"] = cfg.llm_backbone
    elif "_name_or_path" in cfg.llm_backbone:  # of a run that continues
        llm["_name_or_path"] = cfg.llm_backbone["_name_or_path"]
    return cfg.model_copy(update={"llm_backbone": llm}), tokenizer, weights


def open_weights(where: str | Path) -> Weights:
    """Open a run or checkpoint of this project, OpenVLA in either format, or a Prismatic VLM.

    where: a directory, a native .pt file, a hub id, or the id of a Prismatic VLM. Raises
    CheckpointError.
    """
    path = Path(os.path.abspath(where))
    downloaded = not path.exists()
    if downloaded:
        path = download(str(where))
    with describes_a_model(where):
        weights = _open(path, downloaded)
        widths = {name: len(stats["action"]["q01"]) for name, stats in weights.norm_stats.items()
                  if "q01" in stats.get("action", ())}
        # OpenVLA's files do not contain it. Fine-tuning adds a dataset, maybe of another robot
        width = weights.config.setdefault("action_dim", [7, *widths.values()][-1])
        weights.norm_stats = {name: stats for name, stats in weights.norm_stats.items()
                              if widths.get(name, width) == width}
        TrainConfig(**weights.config)
    return weights


@contextlib.contextmanager
def describes_a_model(where: str | Path) -> Iterator[None]:
    """Raises CheckpointError for whatever goes wrong with the files of a model from elsewhere:
    PyTorch, timm and transformers raise many kinds."""
    try:
        yield
    except (UserError, OSError):
        raise
    except Exception as error:
        raise CheckpointError(f"{where}: its config.json or weights are not those of a model: "
                              f"{type(error).__name__}: {one_line(error)[:300]}") from error


def _open(path: Path, downloaded: bool) -> Weights:
    refuse_parts(str(path), [file.name for file in path.iterdir()] if path.is_dir() else [])
    if (path / "checkpoint.json").exists():
        return _open_ours(Checkpoint(path), downloaded)
    if path.suffix == ".pt":
        return _open_native(path, path.parents[1])
    native = sorted((path / "checkpoints").glob("*.pt"))  # "latest-checkpoint" sorts before "step-"
    if native:
        return _open_native(native[-1], path)
    checkpoints = list_checkpoints(path / "checkpoints")
    if checkpoints:
        return _open_ours(Checkpoint(checkpoints[-1]), downloaded)
    if read_json(path / "config.json", {}).get("model_type") == "openvla":
        return _open_hugging_face(path)
    if (path / "lora_adapter").exists():
        raise CheckpointError(f"{path}: it has OpenVLA-OFT's adapters without their base: merge "
                              "them first, with OFT's vla-scripts/merge_lora_weights_and_save.py")
    raise CheckpointError(f"{path}: expected a run of this project (checkpoints/step-*), "
                          "OpenVLA's native format (config.json, checkpoints/*.pt) or its Hugging "
                          "Face format (config.json with model_type openvla)")


def download(name: str) -> Path:
    """Fetch a Prismatic VLM or a hub repository (once per node) and return its directory."""
    repository = name
    patterns = ["*.json", "*.safetensors", "checkpoints/*.pt", "modeling_prismatic.py",
                "*--*_checkpoint.pt", "lora_adapter/adapter_config.json"]
    weights = "model.safetensors|model.safetensors.index.json|checkpoints/*"
    needed = ["config.json", weights]
    if name in PRISMATIC:
        repository = PRISMATIC_HUB
        needed = patterns = [f"{name}/config.json", f"{name}/checkpoints/latest-checkpoint.pt"]
    try:
        folder = hub.fetch(repository, patterns, needed, partial(refuse_parts, name))
    except CheckpointError:
        raise
    except UserError as error:
        hint = f" ({name})" if name in PRISMATIC else nearest(name, PRISMATIC)
        raise CheckpointError(f"{error}{hint}") from error
    return folder / name if name in PRISMATIC else folder


# ---- The formats -------------------------------------------------------------------------------


def _open_ours(checkpoint: Checkpoint, downloaded: bool = False) -> Weights:
    run_dir = checkpoint.run_dir
    config = read_json(run_dir / "config.json")
    for tower in config["vision_backbone"].values():
        tower.pop("pretrained", None)  # the checkpoint has their weights
    lora = config["lora_alpha"] / max(config["lora_rank"], 1)
    if downloaded:
        config = checked({key: config[key] for key in DESCRIPTION if key in config}, run_dir)
    config["tokenizer"] = str(run_dir / "tokenizer")
    weights = Weights(checkpoint, config, read_json(run_dir / "dataset_statistics.json"))
    if checkpoint.base:
        if downloaded and os.path.exists(checkpoint.base["where"]):
            raise CheckpointError(f"{checkpoint.path} is based on {checkpoint.base['where']}: a "
                                  "model from elsewhere may not name a path")
        weights.base = open_base(checkpoint)
        weights.tensors = merged(weights.base, checkpoint, lora)
    return weights


def open_base(checkpoint: Checkpoint) -> Tensors:
    """The weights that a checkpoint of adapters is based on.

    Raises CheckpointError if they are gone or have changed.
    """
    where = checkpoint.base["where"]
    file = checkpoint.path / "checkpoint.json"
    cure = f"put it back, or write its new place into {file} (\"base\")"
    try:
        tensors = open_weights(where).tensors
    except UserError as error:
        raise CheckpointError(f"{checkpoint.path} is based on {where}: {cure}: {error}") from error
    if fingerprint(tensors) != checkpoint.base["fingerprint"]:
        raise CheckpointError(f"{checkpoint.path} is based on {where}, whose weights have changed: "
                              f"{cure}")
    return tensors


def describe_base(where: str, tensors: Tensors) -> dict:
    """The entry "base" of checkpoint.json: the base's path or hub id, and its fingerprint."""
    if Path(where).exists():
        where = os.path.abspath(tensors.where)
    return {"where": where, "fingerprint": fingerprint(tensors)}


def fingerprint(tensors: Tensors) -> int:
    """A checksum that changes with the weights, without reading gigabytes."""
    own = Path(tensors.where) / "checkpoint.json"
    if own.exists():  # it contains the checksums of all files
        return google_crc32c.value(own.read_bytes())
    content = bytearray()
    for name, shape in sorted(tensors.shapes.items()):
        beginning = tensors.read(name, 0, min(math.prod(shape), 1024)).contiguous()
        content += f"{name} {shape}".encode() + beginning.view(torch.uint8).numpy().tobytes()
    return google_crc32c.value(bytes(content))


def _open_native(checkpoint: Path, run_dir: Path) -> Weights:
    description = read_json(run_dir / "config.json")
    modules = torch.load(checkpoint, mmap=True, weights_only=True)["model"]
    base = description.get("model") or description.get("vla", {}).get("base_vlm")
    if "zerovla" in description:  # exported by this project
        config = checked(description["zerovla"], run_dir)
    elif isinstance(base, dict):
        config = prismatic_config(base["vision_backbone_id"], base["llm_backbone_id"],
                                  base["image_resize_strategy"])
    else:
        config = prismatic_config(*PRISMATIC[base])
    if (run_dir / "tokenizer.json").exists():
        config["tokenizer"] = str(run_dir)
    if "vision_backbone" not in modules:  # it was frozen, so it was not saved: take timm's
        for tower in config["vision_backbone"].values():
            tower["pretrained"] = True
    tensors = Tensors(checkpoint)
    for module, state in modules.items():
        for name, tensor in state.items():
            if not tensor.is_floating_point():
                refuse_quantized(checkpoint, {}, {name: str(tensor.dtype)})
            oft_files.add(tensors, f"{module}.{name}", tensor)
    return Weights(tensors, config, read_json(run_dir / "dataset_statistics.json", {}))


def _open_hugging_face(path: Path) -> Weights:
    description = read_json(path / "config.json")
    config = description.get("zerovla") or hugging_face_to_ours(description)
    towers = tuple(config["vision_backbone"])
    tensors = Tensors(path)
    for file in safetensors_files(path):
        for key, shape in file.shapes.items():
            tensors.add(rename(key, towers, to_hugging_face=False), shape, partial(file.read, key))
    norm_stats = description.get("norm_stats") or {}
    # written by OpenVLA's finetune.py; these win (its openvla_utils.py)
    own = read_json(path / "dataset_statistics.json", {})
    norm_stats = {name: stats for name, stats in norm_stats.items() if name not in own} | own
    if oft_files.is_variant(path):
        norm_stats = own or norm_stats  # without the base's
        ours = partial(rename, towers=towers, to_hugging_face=False)
        config = oft_files.add_parts(path, config, tensors, norm_stats, ours)
    return Weights(tensors, {**checked(config, path), "tokenizer": str(path)}, norm_stats)


def hugging_face_to_ours(description: dict) -> dict:
    """The config.json of OpenVLA's Hugging Face class -> this project's config keys."""
    config = prismatic_config(description["vision_backbone_id"], description["llm_backbone_id"],
                              description["image_resize_strategy"])
    del config["tokenizer"]  # the directory has it
    config["image_size"] = description.get("image_sizes", [config["image_size"]])[0]
    names = [*config["vision_backbone"]]
    models = description.get("timm_model_ids")
    activations = description.get("timm_override_act_layers") or [None] * len(names)
    if models:
        config["vision_backbone"] = {name: {"model": model}
                                     for name, model in zip(names, models, strict=True)}
        for name, activation in zip(names, activations, strict=True):
            if activation:
                config["vision_backbone"][name]["act_layer"] = activation
    llm = {"model_type": config["llm_backbone"]["model_type"], **description.get("text_config", {})}
    config["llm_backbone"] = llm
    return config


def safetensors_files(path: Path) -> list[SafetensorsFile]:
    """The files of a directory of safetensors. If there are several, an index lists them. Raises
    CheckpointError if they are quantized."""
    index = path / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        names = sorted(set(read_json(index)["weight_map"].values()))
    files = [SafetensorsFile(path / plain_name(name)) for name in names]
    for file in files:
        refuse_quantized(path, read_json(path / "config.json", {}), file.dtypes)
    return files


def open_language_model(where: str, num_tokens: int) -> Weights:
    """A plain causal language model, by directory or hub id, for a vocabulary of num_tokens.

    The vocabulary is rounded up to a multiple of 64. New rows are drawn as at initialization.
    """
    rows = round_up(num_tokens)
    tensors = Tensors(where)

    def resized(file: SafetensorsFile, key: str, start: int, stop: int) -> torch.Tensor:
        old_rows, *width = file.shapes[key]
        known = file.read(key, 0, min(old_rows, rows) * math.prod(width))
        generator = torch.Generator().manual_seed(0)
        new = torch.empty(max(rows - old_rows, 0), *width).normal_(0, 0.02, generator=generator)
        return torch.cat([known, new.to(known.dtype).reshape(-1)])[start:stop]

    for file in safetensors_files(Path(where) if Path(where).exists() else download(where)):
        for key, shape in file.shapes.items():
            name = f"llm_backbone.llm.{key}"
            if key.endswith(("embed_tokens.weight", "lm_head.weight", "lm_head.bias")):
                tensors.add(name, [rows, *shape[1:]], partial(resized, file, key))
            elif not key.endswith("rotary_emb.inv_freq"):  # a constant that old files contain
                tensors.add(name, shape, partial(file.read, key))
    return Weights(tensors, {})


# ---- Filling a model ---------------------------------------------------------------------------


@contextlib.contextmanager
def parameters_without_memory() -> Iterator[None]:
    """Modules made in this context have matrices on the meta device, without values.

    Buffers, vectors and convolutions are real: timm runs its hybrid towers' stems once to learn the
    shape of their output.
    """
    register = nn.Module.register_parameter

    def register_on_meta(module, name, param):
        if param is not None and param.ndim == 2:
            param = nn.Parameter(param.to("meta"), param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def fill(vla: VLA, tensors: Tensors, device, dtype: torch.dtype,
         in_8_bits: dict[str, nn.Linear]) -> None:
    """Give a model made without memory its weights, one tensor at a time.

    Parameters that `tensors` lacks stay. in_8_bits: {name: layer}; frozen ones shrink at once, so
    that only one of them is in memory at full size.
    """
    for name, param in [*vla.named_parameters()]:
        if name not in tensors.shapes:
            continue
        layer, _, leaf = name.rpartition(".")
        value = tensors.whole(name).to(device, dtype, copy=True)
        vla.get_submodule(layer).register_parameter(leaf, nn.Parameter(value, param.requires_grad))
        if layer in in_8_bits and leaf == "weight" and not param.requires_grad:
            shrink(in_8_bits[layer])
    vla.llm.tie_weights()


# ---- Names -------------------------------------------------------------------------------------


def rename(name: str, towers: tuple[str, ...], to_hugging_face: bool) -> str:
    """A parameter's name here -> its name in OpenVLA's Hugging Face class, or the reverse.

    Our names are those of OpenVLA's native checkpoints. towers: the names of the vision towers.
    """
    prefixes = [("llm_backbone.llm.", "language_model."),
                ("projector.projector.0.", "projector.fc1."),
                ("projector.projector.2.", "projector.fc2."),
                ("projector.projector.4.", "projector.fc3.")]
    if len(towers) > 1:
        prefixes += [(f"vision_backbone.{tower}_featurizer.", f"vision_backbone.{theirs}.")
                     for tower, theirs in zip(towers, ("featurizer", "fused_featurizer"),
                                              strict=True)]
    suffixes = [(".gamma", ".scale_factor")]  # of LayerScale: old transformers rename "gamma"
    if not to_hugging_face:
        prefixes = [(new, old) for old, new in prefixes]
        suffixes = [(new, old) for old, new in suffixes]
    for old, new in suffixes:
        if name.startswith("vision_backbone.") and name.endswith(old):
            name = name.removesuffix(old) + new
    for old, new in prefixes:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
