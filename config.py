"""Every knob: the YAML (TrainConfig) and the DeepSpeed JSON, read and checked."""

import difflib
import inspect
import json
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml

from action_tokenizer import BOUNDS, PROMPTS


@dataclass
class TrainConfig:
    """Every knob. Names are OpenVLA's where it has the knob; defaults are OpenVLA's where it has one."""

    vla_id: str = "vla"  # name of the experiment; the run's directory begins with it

    # model: begin with a VLM or VLA (see weights.py), which also sets what is left unsaid of its shape ...
    base_vlm: str | None = None  # Prismatic id, directory or hub id
    hf_token: str | None = None  # file or environment variable with a Hugging Face token; default: HF_TOKEN
    # ... or with weights of this shape, random or, but for the projector, from timm and the hub
    pretrained_backbones: bool = False
    vision_backbone: dict = field(default_factory=dict)  # one or two: {name: {model: timm name, ...}}
    llm_backbone: dict | str = field(default_factory=dict)  # a transformers config, or directory or hub id
    tokenizer: str = ""  # directory or hub id
    add_action_tokens: bool = False  # append 256 ids instead of taking over the vocabulary's last 256
    arch_specifier: str = "no-align+gelu-mlp"  # projector: linear, gelu-mlp or fused-gelu-mlp
    prompt_style: str = "pure"  # how the language model is asked: a key of action_tokenizer.PROMPTS
    image_size: int = 224  # pixels; images are resized to a square
    image_resize_strategy: str = "lanczos"  # when acting; OpenVLA's: resize-naive, resize-crop, letterbox
    max_length: int = 2048  # most text tokens in a sample; longer instructions are an error

    # what is trained (OpenVLA's four stages; see VLA.freeze)
    freeze_vision_backbone: bool = False
    freeze_llm_backbone: bool = False
    unfreeze_last_llm_layer: bool = False

    # data
    data_root_dir: str = "datasets/open-x-embodiment"  # the folder with the datasets' folders
    data_mix: str | dict = "bridge"  # mixture or dataset of oxe.py, or {dataset: weight}
    datasets: dict = field(default_factory=dict)  # your own: {name: fields of oxe.Recipe}
    cameras: list = field(default_factory=lambda: ["primary"])  # of primary, secondary, wrist
    use_proprio: bool = False  # show the robot's state to the model
    window_size: int = 1  # how many frames the model sees: this one and the ones before
    action_chunk: int = 1  # how many steps it predicts: this one and the ones after
    parallel_decoding: bool = False  # predict a chunk's tokens all at once instead of one after the other
    action_normalization: str = "bounds_q99"  # or bounds, normal
    image_aug: bool = False  # random crop and colours, as OpenVLA
    skip_bad_episodes: bool = False  # leave out (and count) broken episodes; damaged files always stop
    index_dir: str | None = None  # where frame tables go; default: beside each dataset
    num_workers: int = 4  # DataLoader processes per rank

    # optimisation
    epochs: int = 1000  # ends the run unless max_steps does
    max_steps: int | None = None  # overrides epochs
    expected_world_size: int | None = None  # refuse to start on another number of GPUs; default: any
    global_batch_size: int = 256  # samples per optimizer step, whatever the number of GPUs
    per_device_batch_size: int = 32  # samples a GPU takes at a time; accumulation steps follow from the two
    learning_rate: float = 2e-5
    weight_decay: float = 0.0  # not on biases and norms
    max_grad_norm: float = 1.0
    lr_scheduler_type: str = "constant"  # or linear-warmup+cosine-decay
    warmup_ratio: float = 0.0  # share of all steps
    seed: int = 7
    compile: bool = False  # torch.compile each transformer block: a minute at the start, then faster

    # run
    run_root_dir: str = "runs"
    run_id: str | None = None  # name of the run's directory; default: made of vla_id, nodes, batch and seed
    run_id_note: str | None = None  # appended to it
    pretrained_checkpoint: str | None = None  # begin with it, unless the run has a later one of its own
    is_resume: bool = True  # continue its training (step, optimizer, data); false: take its weights alone
    resume_step: int | None = None  # refuse to start if it is not of this step
    resume_epoch: int | None = None  # or epoch
    save_interval: int = 2500  # steps between checkpoints; 0: none unless the run is preempted
    keep_checkpoints: int = 2  # the newest ones; 0 keeps all
    on_save_error: str = "stop"  # or continue: a full disk ends the run, or is a warning and the run goes on
    log_interval: int = 10  # steps between lines of the log
    eval_interval: int = 500  # steps between evaluations on held-out episodes; 0: only at the end
    eval_samples: int = 1024  # how many held-out frames to evaluate on

    # filled in from the data when training starts, and kept with the run
    action_dim: int = 0
    proprio_dim: int = 0

    stated = frozenset()  # not a knob: the keys that YAML and --set state (see load_config)


def load_config(path: Path, overrides: list[str]) -> TrainConfig:
    """A YAML file, on top of the one it `inherits` from, with "key=value" overrides. Raises ValueError
    with the cure."""
    values = read_yaml(path)
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set {text}: expected key=value")
        try:
            values[key] = (yaml.safe_load(value), "--set")
        except yaml.YAMLError as error:
            raise ValueError(f"--set {text}: {error}") from error
    types_ = typing.get_type_hints(TrainConfig)
    for key, (value, source) in values.items():
        if key not in types_:
            near = "".join(f"; did you mean {k!r}?" for k in difflib.get_close_matches(key, types_, n=1))
            raise ValueError(f"{source}: unknown key {key!r}{near}")
        check_type(key, value, types_[key], source)
    cfg = TrainConfig(**{key: float(value) if types_[key] is float else value
                         for key, (value, _) in values.items()})
    cfg.stated = frozenset(values)
    check_choices(cfg)
    return cfg


def read_yaml(path: Path, heirs: tuple[Path, ...] = ()) -> dict[str, tuple[object, str]]:
    """{key: (value, the file it stands in)}, the parent's first. heirs: the files that inherit from this."""
    if path in heirs:
        raise ValueError(f"{path}: inherits from itself, by way of {', '.join(map(str, heirs))}")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected `key: value` lines")
    parent = values.pop("inherits", None)
    inherited = read_yaml(path.parent / str(parent), (*heirs, path)) if parent else {}
    return inherited | {key: (value, str(path)) for key, value in values.items()}


def check_type(key: str, value, wanted, source: str) -> None:
    """Raise ValueError when a value has not the type of its TrainConfig field."""
    allowed = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    if type(value) in allowed or (type(value) is int and float in allowed):
        return
    hint = ""
    if isinstance(value, str) and (float in allowed or int in allowed):
        hint = " (YAML takes 2e-5 for text; write 2.0e-5)" if "e" in value.lower() else " (remove the quotes)"
    names = " or ".join("null" if t is type(None) else t.__name__ for t in allowed)
    raise ValueError(f"{source}: {key}: {value!r} is a {type(value).__name__}, expected {names}{hint}")


def check_choices(cfg: TrainConfig) -> None:
    """Raise ValueError for values that cannot work, naming the choices."""
    choices = {"prompt_style": [*PROMPTS], "action_normalization": [*BOUNDS, "normal"],
               "image_resize_strategy": ["lanczos", "resize-naive", "resize-crop", "letterbox"],
               "lr_scheduler_type": ["constant", "linear-warmup+cosine-decay"],
               "on_save_error": ["stop", "continue"]}
    for key, allowed in choices.items():
        if getattr(cfg, key) not in allowed:
            raise ValueError(f"{key}: {getattr(cfg, key)!r} is not one of {', '.join(allowed)}")
    for camera in cfg.cameras:
        if camera not in ("primary", "secondary", "wrist"):
            raise ValueError(f"cameras: {camera!r} is not one of primary, secondary, wrist")
    at_least = {1: ("global_batch_size", "per_device_batch_size", "image_size", "action_chunk", "window_size",
                    "log_interval", "eval_samples", "epochs", "max_steps"),
                0: ("learning_rate", "weight_decay", "max_grad_norm", "warmup_ratio", "num_workers",
                    "save_interval", "keep_checkpoints", "eval_interval")}
    for least, key in ((least, key) for least, keys in at_least.items() for key in keys):
        value = getattr(cfg, key)
        if value is not None and not least <= value < math.inf:
            raise ValueError(f"{key}: {value} must be at least {least}")
    if cfg.warmup_ratio > 1:
        raise ValueError(f"warmup_ratio: {cfg.warmup_ratio} must be at most 1: it is a share of all steps")
    if cfg.pretrained_backbones and not isinstance(cfg.llm_backbone, str):
        raise ValueError("pretrained_backbones: llm_backbone must be a directory or hub id then, to take the "
                         "weights from")
    if cfg.pretrained_backbones and (cfg.base_vlm or (cfg.pretrained_checkpoint and not cfg.is_resume)):
        raise ValueError("pretrained_backbones: these are other weights than those of "
                         f"{cfg.pretrained_checkpoint or cfg.base_vlm}: remove one of the two keys")
    for name, tower in cfg.vision_backbone.items():
        if not isinstance(tower, dict) or "model" not in tower:
            raise ValueError(f"vision_backbone: {name}: {tower!r} is not like {{model: name of a timm ViT}}")
    for key in ("vision_backbone", "llm_backbone", "tokenizer"):
        if not (getattr(cfg, key) or cfg.base_vlm or cfg.pretrained_checkpoint):
            raise ValueError(f"{key} is missing: the model needs it, or a base_vlm to take it from")
    if not cfg.cameras:
        raise ValueError("cameras is empty: the model needs to see something")


def load_ds_config(path: Path) -> dict:
    """DeepSpeed's JSON. Raises ValueError when it says again what the YAML says, or lacks the optimizer."""
    try:
        ds_config = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"--deepspeed_config {path}: {error}") from error
    if not isinstance(ds_config, dict):
        raise ValueError(f"{path}: expected an object, {{...}}")
    stated = dict(ds_config)  # {key or section.key: value}
    for section in ("bf16", "fp16", "data_types", "zero_optimization", "activation_checkpointing",
                    "optimizer", "optimizer.params"):
        inside = stated.get(section, {})
        if not isinstance(inside, dict):
            raise ValueError(f"{path}: {section} must be an object, {{...}}")
        stated |= {f"{section}.{key}": value for key, value in inside.items()}
    in_yaml = {"train_batch_size": "global_batch_size", "gradient_clipping": "max_grad_norm",
               "train_micro_batch_size_per_gpu": "per_device_batch_size",
               "gradient_accumulation_steps": "global_batch_size", "scheduler": "lr_scheduler_type",
               "optimizer.params.lr": "learning_rate", "optimizer.params.weight_decay": "weight_decay"}
    refused = {key: f"it is set once, by {name} in the YAML" for key, name in in_yaml.items()} | {
        "fp16.enabled": "its loss scaling is not supported; without bf16, training is in float32",
        "zero_optimization.round_robin_gradients": "DeepSpeed then does not say where a parameter is, and "
                                                   "checkpoints would be wrong",
        "optimizer.params.amsgrad": "checkpoints hold AdamW's two moments only"}
    for key, value in stated.items():
        if key in refused and value is not False:
            raise ValueError(f"{path}: remove {key!r}: {refused[key]}")
    if "optimizer" not in ds_config:
        raise ValueError(f"{path}: needs an \"optimizer\", for example "
                         '{"type": "AdamW", "params": {"torch_adam": true, "fused": true}}')
    if str(ds_config["optimizer"].get("type")).lower() not in ("adam", "adamw"):
        raise ValueError(f"{path}: optimizer.type must be Adam or AdamW: checkpoints hold their two moments")
    known = {"torch_adam", "adam_w_mode", "bias_correction", "fp32_optimizer_states",  # DeepSpeed's
             *inspect.signature(torch.optim.AdamW).parameters}
    for key, value in stated.items():
        section, _, name = key.rpartition(".")
        if section == "optimizer.params" and name not in known:
            raise ValueError(f"{path}: unknown key {key!r}; known are {', '.join(sorted(known))}")
        if section == "activation_checkpointing" and value:
            raise ValueError(f"{path}: {key} is not supported; the section by itself switches "
                             "recomputation on")
    return ds_config
