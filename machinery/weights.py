"""What stands at a path or id: Prismatic VLMs, OpenVLA in both its formats, Hugging Face parts, our own runs.

    base_vlm: prism-dinosiglip-224px+7b          a Prismatic VLM, from the hub
    base_vlm: openvla/openvla-7b                 OpenVLA, from the hub; or the path of a copy
    base_vlm: runs/bridge+n1+b32+x7              a run of this project, or one of its checkpoints

`open_weights` recognises it and returns Weights: what the model is, and its tensors under this project's
names (which are those of OpenVLA's native checkpoints), not yet read. act.load_vla makes a model for acting
from them; train_vla.py shards its model first, and each GPU then reads what it owns. Nothing is unpickled but
tensors: torch.load(weights_only=True).
"""

import contextlib
import copy
import fnmatch
import json
import math
import os
import pickle
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import google_crc32c
import torch
from huggingface_hub import list_repo_files, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from pydantic import ValidationError
from torch import nn

from action_tokenizer import load_tokenizer
from machinery.backbones import llm_config, round_up
from machinery.checkpoint import (
    Checkpoint,
    CheckpointError,
    SafetensorsFile,
    Tensors,
    list_checkpoints,
)
from machinery.config import (
    TrainConfig,
    UserError,
    first_problem,
    load_table,
    nearest,
    out_of_reach,
    read_secret,
)
from machinery.int8 import shrink
from machinery.lora import merged
from model import VLA

# ---- What Prismatic calls things ---------------------------------------------------------------------------

# keys of TrainConfig that come from the weights where the config leaves them unsaid
SHAPE = """vision_backbone llm_backbone tokenizer add_action_tokens arch_specifier prompt_style
    image_size""".split()
_table = load_table("prismatic")
VISION_BACKBONES, LANGUAGE_MODELS = _table["vision_backbones"], _table["language_models"]
PRISMATIC: dict[str, list[str]] = _table["models"]  # id: vision backbone, language model, resize strategy
PRISMATIC_HUB = "TRI-ML/prismatic-vlms"  # a folder for each id


def prismatic_config(vision_backbone_id: str, llm_backbone_id: str, image_resize_strategy: str) -> dict:
    """Prismatic's names -> this project's keys of TrainConfig."""
    for name, known in ((vision_backbone_id, VISION_BACKBONES), (llm_backbone_id, LANGUAGE_MODELS)):
        if name not in known:
            raise CheckpointError(f"{name!r} is none of Prismatic's backbones: {', '.join(known)}")
    vision, llm = copy.deepcopy((VISION_BACKBONES[vision_backbone_id], LANGUAGE_MODELS[llm_backbone_id]))
    return {"vision_backbone": vision["towers"], "image_size": vision["image_size"],
            "llm_backbone": llm["shape"], "tokenizer": llm["hub"], "prompt_style": llm["prompt_style"],
            "arch_specifier": "no-align+fused-gelu-mlp" if len(vision["towers"]) > 1 else "no-align+gelu-mlp",
            "image_resize_strategy": image_resize_strategy}


# ---- Opening -----------------------------------------------------------------------------------------------


@dataclass
class Weights:
    """A model on disk: its tensors; `config`, the keys of TrainConfig that describe it; and `norm_stats`, the
    content of dataset_statistics.json. base: the tensors of what a run rests on that keeps only what it
    trained; in `tensors`, both are merged."""

    tensors: Tensors
    config: dict
    norm_stats: dict = field(default_factory=dict)
    base: Tensors | None = None


def start_from(cfg: TrainConfig, checkpoint: Checkpoint | None) -> tuple:
    """Open what training begins with: a checkpoint to continue, else what the config names, if anything.

    -> (the config, in which the weights fill in what it leaves unsaid of the model's shape, and which
    describes the language model itself; the tokenizer; Weights or None)
    """
    if cfg.hf_token:
        os.environ["HF_TOKEN"] = read_secret(cfg.hf_token, "hf_token")
    weights, where = None, cfg.pretrained_checkpoint or cfg.base_vlm
    if checkpoint or where:
        weights = _open_ours(checkpoint) if checkpoint else open_weights(where)
        unsaid = {key for key in SHAPE if key in weights.config} - cfg.model_fields_set
        cfg = cfg.model_copy(update={key: weights.config[key] for key in unsaid})
        if checkpoint and weights.base:
            weights.tensors = weights.base  # its training goes on beside the base, not in it
    # a run has its own tokenizer, and stays whole when what it began with is gone
    tokenizer = load_tokenizer(weights.config["tokenizer"] if checkpoint else cfg.tokenizer,
                               cfg.add_action_tokens)
    if cfg.pretrained_backbones and not checkpoint:
        weights = open_language_model(cfg.llm_backbone, len(tokenizer))
    whole = json.loads(llm_config(cfg.llm_backbone, len(tokenizer)).to_json_string())
    if isinstance(cfg.llm_backbone, str):
        whole["_name_or_path"] = cfg.llm_backbone
    return cfg.model_copy(update={"llm_backbone": whole}), tokenizer, weights


def open_weights(where: str | Path) -> Weights:
    """Find out what `where` is and open it: a run or checkpoint of this project, a directory or hub id of
    OpenVLA (either format), a native .pt file, or the id of a Prismatic VLM. Raises CheckpointError."""
    try:
        weights = _open(where)
        actions = [stats["action"] for stats in weights.norm_stats.values() if "action" in stats]
        widths = [7, *(len(action["q01"]) for action in actions if "q01" in action)]
        weights.config.setdefault("action_dim", widths[-1])  # OpenVLA's files leave it unsaid
        TrainConfig(**weights.config)
        return weights
    except ValidationError as error:  # of another version of this project, perhaps
        raise CheckpointError(f"{where}: config.json: {first_problem(error)}") from error
    except (LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{where}: not described as a model should be: {error!r}") from error


def _open(where: str | Path) -> Weights:
    path = Path(os.path.abspath(where))
    if not path.exists():
        path = download(str(where))
    refuse_parts_left_out(str(where), [file.name for file in path.iterdir()] if path.is_dir() else [])
    if (path / "checkpoint.json").exists():
        return _open_ours(Checkpoint(path))
    if path.suffix == ".pt":
        return _open_native(path, path.parents[1])
    if native := sorted((path / "checkpoints").glob("*.pt")):  # "latest-checkpoint" comes before "step-..."
        return _open_native(native[-1], path)
    if checkpoints := list_checkpoints(path / "checkpoints"):
        return _open_ours(Checkpoint(checkpoints[-1]))
    config = path / "config.json"
    if config.exists() and _read_json(config).get("model_type") == "openvla":
        return _open_hugging_face(path)
    raise CheckpointError(f"{where}: neither a run of this project (checkpoints/step-*), nor OpenVLA's "
                          "native format (config.json, checkpoints/*.pt), nor its Hugging Face format "
                          "(config.json with model_type openvla)")


def refuse_parts_left_out(where: str, names: Iterable[str]) -> None:
    """Raise CheckpointError when a model's files hold more than OpenVLA's model: it would act nonsense."""
    for pattern, part in _table["parts_left_out"].items():
        if found := fnmatch.filter(names, pattern):
            raise CheckpointError(f"{where}: has {found[0]}, {part}: this project does not load such a part, "
                                  "and without it the model would act nonsense")


def download(name: str) -> Path:
    """Fetch a Prismatic VLM or a hub repository into the cache (once per node) and return its directory."""
    if name not in PRISMATIC and name.count("/") != 1:
        raise CheckpointError(f"{name!r} is no path here, no hub id (owner/name) and no Prismatic id"
                              + nearest(name, PRISMATIC))
    repository, patterns = name, ["*.json", "*.safetensors", "checkpoints/*.pt"]
    if name in PRISMATIC:
        repository = PRISMATIC_HUB
        patterns = [f"{name}/config.json", f"{name}/checkpoints/latest-checkpoint.pt"]
    try:
        if not out_of_reach(name):  # said before gigabytes are fetched
            refuse_parts_left_out(name, list_repo_files(repository))
        folder = snapshot_download(repository, allow_patterns=patterns, local_files_only=out_of_reach(name))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"could not download {name} from {repository}: {reason} (for gated models set "
                              "HF_TOKEN or hf_token; or give a local path)") from error
    return Path(folder) / name if name in PRISMATIC else Path(folder)


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text())
        if not isinstance(value, dict):
            raise ValueError(f"expected an object, {{...}}, not {value!r:.40}")
        return value
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _open_ours(checkpoint: Checkpoint) -> Weights:
    run_dir = checkpoint.run_dir
    config = _read_json(run_dir / "config.json")
    config["tokenizer"] = str(run_dir / "tokenizer")
    for tower in config["vision_backbone"].values():
        tower.pop("pretrained", None)  # their weights are here
    weights = Weights(checkpoint, config, _read_json(run_dir / "dataset_statistics.json"))
    if checkpoint.base:
        weights.base = open_base(checkpoint)
        scale = config["lora_alpha"] / max(config["lora_rank"], 1)
        weights.tensors = merged(weights.base, checkpoint, scale)
    return weights


def open_base(checkpoint: Checkpoint) -> Tensors:
    """What a checkpoint that keeps only what was trained rests on. Raises CheckpointError when it is gone or
    has changed."""
    where = checkpoint.base["where"]
    cure = f"put it back, or write where it is now into {checkpoint.path / 'checkpoint.json'} (\"base\")"
    try:
        tensors = open_weights(where).tensors
    except UserError as error:
        raise CheckpointError(f"{checkpoint.path} rests on {where}, which cannot be opened: {cure} ({error})"
                              ) from error
    if fingerprint(tensors) != checkpoint.base["fingerprint"]:
        raise CheckpointError(f"{checkpoint.path} rests on {where}, whose weights are others now: {cure}")
    return tensors


def describe_base(where: str, tensors: Tensors) -> dict:
    """What a checkpoint notes of the base it rests on: its path, or its id on the hub, and a fingerprint."""
    where = os.path.abspath(tensors.where) if Path(where).exists() else where
    return {"where": where, "fingerprint": fingerprint(tensors)}


def fingerprint(tensors: Tensors) -> int:
    """A checksum by which to know a model again: of our checkpoints, that of all their files' checksums; of
    others, that of names, shapes and the beginning of each tensor, for which no gigabytes are read."""
    own = Path(tensors.where) / "checkpoint.json"
    parts = [own.read_bytes()] if own.exists() else []
    for name, shape in sorted(tensors.shapes.items()) if not parts else ():
        beginning = tensors.read(name, 0, min(math.prod(shape), 1024)).contiguous()
        parts += [f"{name} {shape}".encode(), beginning.view(torch.uint8).numpy().tobytes()]
    return google_crc32c.value(b"".join(parts))


def _open_native(checkpoint: Path, run_dir: Path) -> Weights:
    description, stats = _read_json(run_dir / "config.json"), run_dir / "dataset_statistics.json"
    try:
        modules = torch.load(checkpoint, mmap=True, weights_only=True)["model"]
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{checkpoint}: refused: it holds more than tensors, and loading it could run "
                              f"code ({str(error).partition('.')[0]})") from error
    except (RuntimeError, OSError, KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint}: not a native OpenVLA checkpoint: {error}") from error
    base = description.get("model") or description.get("vla", {}).get("base_vlm")
    if "zerovla" in description:  # exported from here
        config = description["zerovla"]
    elif isinstance(base, dict):
        keys = ("vision_backbone_id", "llm_backbone_id", "image_resize_strategy")
        config = prismatic_config(*(base[key] for key in keys))
    elif base in PRISMATIC:
        config = prismatic_config(*PRISMATIC[base])
    else:
        raise CheckpointError(f"{run_dir / 'config.json'}: base_vlm {base!r} is no Prismatic id")
    if (run_dir / "tokenizer.json").exists():
        config["tokenizer"] = str(run_dir)
    if "vision_backbone" not in modules:  # frozen while this VLM was trained, so left out: timm has them
        towers = config["vision_backbone"].items()
        config["vision_backbone"] = {name: tower | {"pretrained": True} for name, tower in towers}
    tensors = Tensors(checkpoint)
    for module, state in modules.items():
        for name, tensor in state.items():
            flat = tensor.reshape(-1)
            tensors.add(f"{module}.{name}", tensor.shape, lambda start, stop, flat=flat: flat[start:stop])
    return Weights(tensors, config, _read_json(stats) if stats.exists() else {})


def _open_hugging_face(path: Path) -> Weights:
    facts = _read_json(path / "config.json")
    config = facts.get("zerovla")  # exported from here
    if config is None:
        config = prismatic_config(*(facts[key] for key in (
            "vision_backbone_id", "llm_backbone_id", "image_resize_strategy")))
        config["image_size"] = facts.get("image_sizes", [config["image_size"]])[0]
        names, models = [*config["vision_backbone"]], facts.get("timm_model_ids")
        acts = facts.get("timm_override_act_layers") or [None] * len(names)
        if models:
            config["vision_backbone"] = {
                name: {"model": model} | ({"act_layer": act} if act else {})
                for name, model, act in zip(names, models, acts, strict=True)}
        llm = {"model_type": config["llm_backbone"]["model_type"], **facts.get("text_config", {})}
        config["llm_backbone"] = {key: llm[key] for key in llm if key not in ("torch_dtype", "dtype")}
    config["tokenizer"] = str(path)
    towers, tensors = tuple(config["vision_backbone"]), Tensors(path)
    for file in safetensors_files(path):
        for key, shape in file.shapes.items():
            tensors.add(native_name(key, towers), shape, partial(file.read, key))
    # OpenVLA's finetune.py leaves the statistics of its data beside the base model's config; acting goes by
    # them first (experiments/robot/openvla_utils.py)
    own, known = path / "dataset_statistics.json", facts.get("norm_stats") or {}
    return Weights(tensors, config, known | (_read_json(own) if own.exists() else {}))


def safetensors_files(path: Path) -> list[SafetensorsFile]:
    """The files of a directory of safetensors, which an index lists when they are several."""
    index, files = path / "model.safetensors.index.json", [path / "model.safetensors"]
    if index.exists():
        files = sorted({path / name for name in _read_json(index)["weight_map"].values()})
    if missing := [file.name for file in files if not file.exists()]:
        raise CheckpointError(f"{path}: {', '.join(missing)} missing")
    return [SafetensorsFile(file) for file in files]


def open_language_model(where: str, num_tokens: int) -> Weights:
    """A plain causal language model's own weights, by directory or hub id, for a vocabulary of num_tokens
    (rounded up to a multiple of 64): new rows are drawn as its initialisation would."""
    rows, tensors = round_up(num_tokens), Tensors(where)

    def extended(file: SafetensorsFile, key: str, start: int, stop: int) -> torch.Tensor:
        shape, fixed = file.shapes[key], torch.Generator().manual_seed(0)
        known = file.read(key, 0, min(shape[0], rows) * torch.Size(shape[1:]).numel())
        new = torch.empty(max(rows - shape[0], 0), *shape[1:]).normal_(0, 0.02, generator=fixed)
        return torch.cat([known, new.to(known.dtype).reshape(-1)])[start:stop]

    for file in safetensors_files(Path(where) if Path(where).exists() else download(where)):
        for key, shape in file.shapes.items():
            if key.endswith("rotary_emb.inv_freq"):  # a constant that old files have
                continue
            if key.endswith(("embed_tokens.weight", "lm_head.weight", "lm_head.bias")):
                tensors.add(f"llm_backbone.llm.{key}", [rows, *shape[1:]], partial(extended, file, key))
            else:
                tensors.add(f"llm_backbone.llm.{key}", shape, partial(file.read, key))
    return Weights(tensors, {})


# ---- Filling a model ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def parameters_without_memory() -> Iterator[None]:
    """Modules made in here have matrices without values (on the meta device), but real buffers, vectors and
    convolutions: timm's hybrid towers try theirs out as they are made."""
    register = nn.Module.register_parameter

    def register_on_meta(module, name, param):
        matrix = param is not None and param.ndim == 2
        register(module, name, nn.Parameter(param.to("meta"), param.requires_grad) if matrix else param)

    nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def fill(vla: VLA, tensors: Tensors, device, dtype: torch.dtype, in_8_bits: dict[str, nn.Linear]) -> None:
    """Give a model that was made without memory its weights, a tensor at a time; what `tensors` lacks stays.
    in_8_bits: {name: layer}; those that are frozen shrink when they come, so that none is whole for long."""
    for name, param in [*vla.named_parameters()]:
        place, _, leaf = name.rpartition(".")
        if name in tensors.shapes:
            value = nn.Parameter(tensors.whole(name).to(device, dtype, copy=True), param.requires_grad)
            vla.get_submodule(place).register_parameter(leaf, value)
            if place in in_8_bits and leaf == "weight" and not param.requires_grad:
                shrink(in_8_bits[place])
    vla.llm.tie_weights()


# ---- Names: ours are those of OpenVLA's native checkpoints; its Hugging Face class has others --------------


def hugging_face_prefixes(towers: tuple[str, ...]) -> dict[str, str]:
    """{how parameters' names begin: and how they do in OpenVLA's Hugging Face class}. towers: their names."""
    fused = {f"vision_backbone.{tower}_featurizer.": f"vision_backbone.{theirs}."
             for tower, theirs in zip(towers, ("featurizer", "fused_featurizer"), strict=False)}
    return {"llm_backbone.llm.": "language_model.", **(fused if len(towers) > 1 else {}),
            **{f"projector.projector.{2 * i}.": f"projector.fc{i + 1}." for i in range(3)}}


def native_name(name: str, towers: tuple[str, ...]) -> str:
    """A name of OpenVLA's Hugging Face class -> ours."""
    for ours, theirs in hugging_face_prefixes(towers).items():
        if name.startswith(theirs):
            name = ours + name.removeprefix(theirs)
            break
    if name.startswith("vision_backbone.") and name.endswith(".scale_factor"):
        name = name.removesuffix("scale_factor") + "gamma"
    return name
