"""Weights from elsewhere: Prismatic VLMs, OpenVLA in both its formats, Hugging Face parts, and our own runs.

    base_vlm: prism-dinosiglip-224px+7b          a Prismatic VLM, from the hub
    base_vlm: openvla/openvla-7b                 OpenVLA, from the hub; or the path of a copy
    base_vlm: runs/bridge+n1+b32+x7              a run of this project, or one of its checkpoints

`open_weights` recognises what stands there and returns Weights: what the model is, and its tensors under
this project's names (which are those of OpenVLA's native checkpoints), mapped into memory but not yet read.
`load_vla` makes a model for acting from them; train_vla.py shards its model first and then takes from them
what each GPU owns, so that a node reads each file once however many GPUs it has.

Nothing is unpickled but tensors: torch.load(weights_only=True).
"""

import contextlib
import difflib
import json
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import nn

from action_tokenizer import load_tokenizer
from checkpoint import CheckpointError, CheckpointReader, list_checkpoints
from model import VLA
from zero import describe_parameters

# ------------------------------------------------------------------------------------------------------------
# What Prismatic calls things (prismatic/models/{materialize,registry}.py, prismatic/conf/models.py)

_DINO = {"model": "vit_large_patch14_reg4_dinov2.lvd142m"}
_CLIP = {"model": "vit_large_patch14_clip_336.openai", "act_layer": "quick_gelu"}  # as OpenAI trained it
_SIGLIP_224, _SIGLIP_384 = ({"model": f"vit_so400m_patch14_siglip_{size}"} for size in (224, 384))
VISION_BACKBONES = {  # id: (image size, towers)
    "clip-vit-l": (224, {"clip": _CLIP | {"model": "vit_large_patch14_clip_224.openai"}}),
    "clip-vit-l-336px": (336, {"clip": _CLIP}),
    "siglip-vit-so400m": (224, {"siglip": _SIGLIP_224}),
    "siglip-vit-so400m-384px": (384, {"siglip": _SIGLIP_384}),
    "dinov2-vit-l": (224, {"dino": _DINO}),
    "in1k-vit-l": (224, {"in1k": {"model": "vit_large_patch16_224.augreg_in21k_ft_in1k"}}),
    "dinoclip-vit-l-336px": (336, {"dino": _DINO, "clip": _CLIP}),
    "dinosiglip-vit-so-224px": (224, {"dino": _DINO, "siglip": _SIGLIP_224}),
    "dinosiglip-vit-so-384px": (384, {"dino": _DINO, "siglip": _SIGLIP_384}),
}
# the shapes are written down, so that a model can be made without access to a gated repository
_LLAMA_7B = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
             "num_attention_heads": 32, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096}
_LLAMA_13B = _LLAMA_7B | {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
                          "num_attention_heads": 40}
_MISTRAL = _LLAMA_7B | {"model_type": "mistral", "intermediate_size": 14336, "num_key_value_heads": 8,
                        "max_position_embeddings": 32768, "sliding_window": 4096}
_PHI = {"model_type": "phi", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32,
        "num_attention_heads": 32, "partial_rotary_factor": 0.4, "vocab_size": 51200}
LANGUAGE_MODELS = {  # id: (hub id of weights and tokenizer, shape, prompt style)
    "llama2-7b-pure": ("meta-llama/Llama-2-7b-hf", _LLAMA_7B, "pure"),
    "llama2-13b-pure": ("meta-llama/Llama-2-13b-hf", _LLAMA_13B, "pure"),
    "llama2-7b-chat": ("meta-llama/Llama-2-7b-chat-hf", _LLAMA_7B, "llama2_chat"),
    "llama2-13b-chat": ("meta-llama/Llama-2-13b-chat-hf", _LLAMA_13B, "llama2_chat"),
    "vicuna-v15-7b": ("lmsys/vicuna-7b-v1.5", _LLAMA_7B, "vicuna_v15"),
    "vicuna-v15-13b": ("lmsys/vicuna-13b-v1.5", _LLAMA_13B, "vicuna_v15"),
    "mistral-v0.1-7b-pure": ("mistralai/Mistral-7B-v0.1", _MISTRAL, "pure"),
    "mistral-v0.1-7b-instruct": ("mistralai/Mistral-7B-Instruct-v0.1", _MISTRAL, "mistral_instruct"),
    "phi-2-3b": ("microsoft/phi-2", _PHI, "phi"),
}


def _prismatic() -> dict[str, tuple[str, str, str]]:
    """{Prismatic id: (vision backbone, language model, image resize strategy)}."""
    clip, dinoclip, dinosiglip = "clip-vit-l-336px", "dinoclip-vit-l-336px", "dinosiglip-vit-so-384px"
    table = {  # the ablations of the Prismatic paper: Vicuna, and letterboxed images unless said otherwise
        "in1k-224px+7b": "in1k-vit-l", "dinov2-224px+7b": "dinov2-vit-l", "clip-224px+7b": "clip-vit-l",
        "siglip-224px+7b": "siglip-vit-so400m", "siglip-384px-letterbox+7b": "siglip-vit-so400m-384px",
        "dinoclip-336px-letterbox+7b": dinoclip, "dinosiglip-384px-letterbox+7b": dinosiglip,
        "clip-336px-resize-crop+7b": (clip, "resize-crop"),
        "clip-336px-resize-naive+7b": (clip, "resize-naive"),
        "siglip-384px-resize-crop+7b": ("siglip-vit-so400m-384px", "resize-crop"),
        "siglip-384px-resize-naive+7b": ("siglip-vit-so400m-384px", "resize-naive"),
        "dinoclip-336px-resize-naive+7b": (dinoclip, "resize-naive"),
        "dinosiglip-384px-resize-naive+7b": (dinosiglip, "resize-naive"),
        "dinosiglip-224px-resize-naive+7b": ("dinosiglip-vit-so-224px", "resize-naive"),
    }
    table |= {f"{name}+7b": clip for name in (
        "reproduction-llava-v15", "one-stage", "full-ft-multi-stage", "full-ft-one-stage",
        "vicuna-no-cotraining", "train-1.25-epochs", "train-1.5-epochs", "train-2-epochs", "train-3-epochs",
        "llava-lvis4v", "llava-lrv", "llava-lvis4v-lrv")}
    table |= {f"{name}+13b": clip for name in ("reproduction-llava-v15", "one-stage")}
    rows = {name: (row, f"vicuna-v15-{name.rpartition('+')[2]}", "letterbox") if isinstance(row, str)
            else (row[0], "vicuna-v15-7b", row[1]) for name, row in table.items()}
    rows |= {name: (clip, llm, "letterbox") for name, llm in (
        ("llama2+7b", "llama2-7b-pure"), ("llama2+13b", "llama2-13b-pure"),
        ("llama2-chat+7b", "llama2-7b-chat"), ("llama2-chat+13b", "llama2-13b-chat"),
        ("llama2-no-cotraining+7b", "llama2-7b-pure"), ("mistral-v0.1+7b", "mistral-v0.1-7b-pure"),
        ("mistral-instruct-v0.1+7b", "mistral-v0.1-7b-instruct"), ("phi-2+3b", "phi-2-3b"))}
    for size in ("7b", "13b"):  # the models its authors recommend
        visions = {"clip": clip, "siglip": "siglip-vit-so400m-384px", "dinosiglip": dinosiglip}
        for name, vision in visions.items():
            for variant in (f"prism-{name}-controlled+{size}", f"prism-{name}+{size}"):
                rows[variant] = (vision, f"llama2-{size}-pure", "resize-naive")
    rows["prism-siglip+13b"] = (clip, "llama2-13b-pure", "resize-naive")  # so OpenVLA's registry has it
    for name in ("prism-dinosiglip-224px-controlled+7b", "prism-dinosiglip-224px+7b"):
        rows[name] = ("dinosiglip-vit-so-224px", "llama2-7b-pure", "resize-naive")
    return rows


PRISMATIC = _prismatic()
PRISMATIC_HUB = "TRI-ML/prismatic-vlms"  # a folder for each id


def prismatic_config(vision_backbone_id: str, llm_backbone_id: str, image_resize_strategy: str) -> dict:
    """Prismatic's names -> this project's keys of TrainConfig."""
    for name, known in ((vision_backbone_id, VISION_BACKBONES), (llm_backbone_id, LANGUAGE_MODELS)):
        if name not in known:
            raise CheckpointError(f"{name!r} is none of Prismatic's backbones: {', '.join(known)}")
    image_size, towers = VISION_BACKBONES[vision_backbone_id]
    repository, llm, prompt_style = LANGUAGE_MODELS[llm_backbone_id]
    return {"vision_backbone": towers, "image_size": image_size, "llm_backbone": llm, "tokenizer": repository,
            "arch_specifier": "no-align+fused-gelu-mlp" if len(towers) > 1 else "no-align+gelu-mlp",
            "prompt_style": prompt_style, "image_resize_strategy": image_resize_strategy}


# ------------------------------------------------------------------------------------------------------------
# Opening


@dataclass
class Weights:
    """A model on disk: `config`, the keys of TrainConfig that describe it; `tensors`, a function for each
    parameter that returns it mapped into memory; `norm_stats`, the content of dataset_statistics.json."""

    where: str
    config: dict
    tensors: dict[str, Callable[[], torch.Tensor]]
    norm_stats: dict = field(default_factory=dict)

    def read(self, key: str, start: int, stop: int) -> torch.Tensor | None:
        """Elements [start, stop) of the flattened tensor "weight/<parameter>" for checkpoint.set_tensors;
        None if there is none."""
        tensor = self.tensors.get(key.removeprefix("weight/"))
        return None if tensor is None else tensor().reshape(-1)[start:stop]

    def check(self, module: nn.Module) -> list[str]:
        """Raise CheckpointError listing parameters that are missing, extra or of another shape. Modules of
        which nothing is there, such as the projector beside a plain language model, are returned: they stay
        as they are."""
        shapes = {name: shape for name, (shape, _) in describe_parameters(module).items()}
        present = {name.split(".")[0] for name in self.tensors}
        problems = [f"missing {name}" for name in shapes
                    if name not in self.tensors and name.split(".")[0] in present]
        problems += [f"unexpected {name}" for name in self.tensors.keys() - shapes.keys()]
        for name in self.tensors.keys() & shapes.keys():
            if (shape := list(self.tensors[name]().shape)) != shapes[name]:
                problems.append(f"{name}: shape {shape}, this model has {shapes[name]}")
        if problems:
            shown = "; ".join(sorted(problems)[:20])
            raise CheckpointError(f"{self.where} does not fit this model ({len(problems)} problems): {shown}")
        return sorted({name.split(".")[0] for name in shapes} - present)


def open_weights(where: str | Path) -> Weights:
    """Find out what `where` is and open it: a run or checkpoint of this project, a directory or hub id of
    OpenVLA (Hugging Face or native format), a native .pt file, or the id of a Prismatic VLM. Raises
    CheckpointError."""
    path = Path(os.path.abspath(where))
    if not path.exists():
        path = download(str(where))
    if (path / "checkpoint.json").exists():
        path = path.resolve()  # a link to a checkpoint: its run is where it points
        return _open_ours(path, path.parents[1])
    if path.suffix == ".pt":
        return _open_native(path, path.parents[1])
    if native := sorted((path / "checkpoints").glob("*.pt")):  # "latest-checkpoint" comes before "step-..."
        return _open_native(native[-1], path)
    if checkpoints := list_checkpoints(path / "checkpoints"):
        return _open_ours(checkpoints[-1], path)
    config = path / "config.json"
    if config.exists() and _read_json(config).get("model_type") == "openvla":
        return _open_hugging_face(path)
    raise CheckpointError(f"{where}: neither a run of this project (checkpoints/step-*), nor OpenVLA's "
                          "native format (config.json, checkpoints/*.pt), nor its Hugging Face format "
                          "(config.json with model_type openvla)")


def download(name: str) -> Path:
    """Fetch a Prismatic VLM or a hub repository into the cache (once per node) and return its directory."""
    if name not in PRISMATIC and name.count("/") != 1:
        near = difflib.get_close_matches(name, PRISMATIC, n=3)
        raise CheckpointError(f"{name!r} is no path here, no hub id (owner/name) and no Prismatic id"
                              + (f"; did you mean {' or '.join(near)}?" if near else ""))
    repository, patterns = name, ["*.json", "*.safetensors", "checkpoints/*.pt"]
    if name in PRISMATIC:
        repository = PRISMATIC_HUB
        patterns = [f"{name}/config.json", f"{name}/checkpoints/latest-checkpoint.pt"]
    try:
        folder = snapshot_download(repository, allow_patterns=patterns)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"could not download {name} from {repository}: {reason} (for gated models set "
                              "HF_TOKEN or hf_token; or give a local path)") from error
    return Path(folder) / name if name in PRISMATIC else Path(folder)


def use_token(hf_token: str | None) -> None:
    """Let downloads use the Hugging Face token that a file or an environment variable of this name holds. A
    token in the variable HF_TOKEN is used anyway."""
    if hf_token is None:
        return
    if hf_token not in os.environ and not Path(hf_token).exists():
        raise ValueError(f"hf_token: {hf_token!r} is neither a file nor an environment variable")
    os.environ["HF_TOKEN"] = os.environ.get(hf_token) or Path(hf_token).read_text().strip()


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _open_ours(checkpoint: Path, run_dir: Path) -> Weights:
    config, reader = _read_json(run_dir / "config.json"), CheckpointReader(checkpoint)
    config["tokenizer"] = str(run_dir / "tokenizer")
    for tower in config["vision_backbone"].values():
        tower.pop("pretrained", None)  # their weights are here
    tensors = {name: partial(reader.weight, name) for name in reader.meta["tensors"]}
    return Weights(str(checkpoint), config, tensors, _read_json(run_dir / "dataset_statistics.json"))


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
    tensors = {f"{module}.{name}": partial(lambda tensor: tensor, tensor)
               for module, state in modules.items() for name, tensor in state.items()}
    return Weights(str(checkpoint), config, tensors, _read_json(stats) if stats.exists() else {})


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
    towers = tuple(config["vision_backbone"])
    tensors = {}
    for file in safetensors_files(path):
        tensors |= {native_name(key, towers): partial(map_tensor, file, key) for key in tensor_names(file)}
    return Weights(str(path), config, tensors, facts.get("norm_stats") or {})


def safetensors_files(path: Path) -> list[Path]:
    """The files of a directory of safetensors, which an index lists when they are several."""
    index, files = path / "model.safetensors.index.json", [path / "model.safetensors"]
    if index.exists():
        files = sorted({path / name for name in _read_json(index)["weight_map"].values()})
    if missing := [file.name for file in files if not file.exists()]:
        raise CheckpointError(f"{path}: {', '.join(missing)} missing")
    return files


def tensor_names(file: Path) -> list[str]:
    """What a safetensors file holds."""
    try:
        with safe_open(file, "pt") as contents:
            return list(contents.keys())
    except SafetensorError as error:
        raise CheckpointError(f"{file}: no safetensors file ({error}): damaged, or a Git LFS pointer that "
                              "was not pulled") from error


def map_tensor(file: Path, key: str) -> torch.Tensor:
    """A tensor of a safetensors file, mapped into memory."""
    with safe_open(file, "pt") as contents:
        return contents.get_tensor(key)


def open_language_model(where: str, num_tokens: int) -> Weights:
    """A plain causal language model's own weights, by directory or hub id, for a vocabulary of num_tokens
    (rounded up to a multiple of 64): new rows are drawn as its initialisation would."""
    path = Path(where) if Path(where).exists() else download(where)
    rows, tensors = -(-num_tokens // 64) * 64, {}

    def extended(file: Path, key: str) -> torch.Tensor:
        known, fixed = map_tensor(file, key), torch.Generator().manual_seed(0)
        new = torch.empty(max(rows - len(known), 0), *known.shape[1:]).normal_(0, 0.02, generator=fixed)
        return torch.cat([known[:rows], new.to(known.dtype)])

    for file in safetensors_files(path):
        for key in tensor_names(file):
            if not key.endswith("rotary_emb.inv_freq"):  # a constant that old files have
                vocabulary = key.endswith(("embed_tokens.weight", "lm_head.weight", "lm_head.bias"))
                tensor = partial(extended if vocabulary else map_tensor, file, key)
                tensors[f"llm_backbone.llm.{key}"] = tensor
    return Weights(where, {}, tensors)


# ------------------------------------------------------------------------------------------------------------
# Names. Ours are those of OpenVLA's native checkpoints; its Hugging Face class has others.

_PROJECTOR = {"projector.projector.0.": "projector.fc1.", "projector.projector.2.": "projector.fc2.",
              "projector.projector.4.": "projector.fc3."}


def hugging_face_name(name: str, towers: tuple[str, ...]) -> str:
    """Our name of a parameter -> that of OpenVLA's Hugging Face class. towers: their names, in order."""
    for ours, theirs in _prefixes(towers).items():
        if name.startswith(ours):
            name = theirs + name.removeprefix(ours)
            break
    if name.startswith("vision_backbone.") and name.endswith(".gamma"):  # transformers used to rename "gamma"
        name = name.removesuffix("gamma") + "scale_factor"
    return name


def native_name(name: str, towers: tuple[str, ...]) -> str:
    """The inverse of hugging_face_name."""
    for ours, theirs in _prefixes(towers).items():
        if name.startswith(theirs):
            name = ours + name.removeprefix(theirs)
            break
    if name.startswith("vision_backbone.") and name.endswith(".scale_factor"):
        name = name.removesuffix("scale_factor") + "gamma"
    return name


def _prefixes(towers: tuple[str, ...]) -> dict[str, str]:
    fused = {f"vision_backbone.{tower}_featurizer.": f"vision_backbone.{theirs}."
             for tower, theirs in zip(towers, ("featurizer", "fused_featurizer"), strict=False)}
    return {**_PROJECTOR, "llm_backbone.llm.": "language_model.", **(fused if len(towers) > 1 else {})}


# ------------------------------------------------------------------------------------------------------------
# A model for acting


ACTING = {  # what a file of OpenVLA's leaves unsaid
    "action_chunk": 1, "action_dim": 7, "action_normalization": "bounds_q99", "add_action_tokens": False,
    "cameras": ["primary"], "image_aug": False, "image_resize_strategy": "lanczos",
    "parallel_decoding": False, "proprio_dim": 0, "use_proprio": False, "window_size": 1,
}


def load_vla(where: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
             ) -> VLA:
    """A model to act with, from anything open_weights knows: `load_vla("openvla/openvla-7b", "cuda",
    torch.bfloat16).predict_action(image, instruction, unnorm_key="bridge_orig")`. It takes no more memory
    than the weights do."""
    weights = open_weights(where)
    cfg = SimpleNamespace(**{**ACTING, **weights.config})
    with parameters_without_memory():
        vla = VLA(cfg, load_tokenizer(cfg.tokenizer, cfg.add_action_tokens))
    vla.llm.tie_weights()
    if missing := weights.check(vla):
        raise CheckpointError(f"{weights.where}: has no {', '.join(missing)}, which acting needs")
    for name, _ in [*vla.named_parameters()]:
        module, _, leaf = name.rpartition(".")
        value = weights.tensors[name]().to(device, dtype, copy=True)
        vla.get_submodule(module).register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    vla.llm.tie_weights()
    vla.norm_stats = weights.norm_stats
    return vla.to(device).eval()


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
