"""Every knob, once: the YAML says what is trained; how it is sharded, the JSON does (command_line.py).

Read Recipe and TrainConfig; the rest reads and checks the YAML. Whatever is wrong with it is found here
before anything else is opened, and told in one line: at once, for nothing here needs PyTorch.
"""

import contextlib
import difflib
import errno
import functools
import os
import re
import socket
import sys
import urllib.parse
from collections.abc import Iterable, Iterator, MutableMapping
from dataclasses import field, fields
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

PROJECT = Path(__file__).resolve().parents[1]  # where relative paths are meant that are not seen from here


class UserError(ValueError):
    """Something that the user can mend. The message names the value, the file and the cure."""


@contextlib.contextmanager
def exit_with_one_line() -> Iterator[None]:
    """End the program with one line instead of a traceback where the user or the machine is at fault."""
    try:
        yield
    except (UserError, OSError) as error:
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC  # without saying where it wrote
        sys.exit(f"error: {error}" + ": make room where runs and tables of data are written (df)" * full)
    except KeyboardInterrupt:
        sys.exit("interrupted")


Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0)]
AboveZero = Annotated[float, Field(gt=0)]
Name = Annotated[str, Field(pattern=r"^[^\x00-\x1f]*$")]  # a folder's


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Recipe:
    """How to read one dataset: an entry of `datasets:`. fields.py explains field lists."""

    primary: str | None = None  # camera keys; "a|b": either, drawn per episode (DROID has two outside).
    secondary: str | None = None  # A camera may be left out: OpenVLA then shows a black image
    wrist: str | None = None
    cameras: dict[str, str] = field(default_factory=dict)  # more of them, {name: key}
    state: str = "state"  # field list, concatenated to `proprio`
    action: str = "action"  # field list; `target` and `raw` say what its dimensions are. Or, in numbers:
    absolute: NotNegative | None = None  # how many trailing ones are `target raw` (default 1: a gripper)
    targets: NotNegative = 0  # how many trailing ones are `target`, normalised or not (joint positions)
    instruction: str = "language_instruction"  # key of the text, relative to the step or the episode
    trim: bool = False  # Bridge: the first step's action is all zero, the last step has none: drop both
    skip_idle: bool = False  # DROID: drop frames whose normalised action is "no motion" (oxe.is_idle)

    @property
    def camera_names(self) -> dict[str, str]:
        """{camera: key} of all that there are."""
        named = {"primary": self.primary, "secondary": self.secondary, "wrist": self.wrist, **self.cameras}
        return {name: key for name, key in named.items() if key}

    def camera(self, name: str) -> list[str | None]:
        """The keys that a camera's images may have, mostly one; [None] where there are none."""
        return self.camera_names[name].split("|") if name in self.camera_names else [None]

    def camera_keys(self, names: list[str]) -> list[str | None]:
        """Observation keys of the named cameras, alternatives flattened in order of first use."""
        return list(dict.fromkeys(key for name in names for key in self.camera(name)))


RECIPES = TypeAdapter(dict[str, Recipe])  # what `datasets:` holds, by the datasets' names


class TrainConfig(BaseModel):
    """Every knob. Names are OpenVLA's where it has the knob; defaults are OpenVLA's where it has one."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    vla_id: Name = "vla"  # name of the experiment; the run's directory begins with it

    # model: begin with a VLM or VLA (see weights.py), which also sets what is left unsaid of its shape ...
    base_vlm: str | None = None  # Prismatic id, directory or hub id
    hf_token: str | None = None  # file or environment variable with a Hugging Face token; else HF_TOKEN
    # ... or with weights of this shape, random or, but for the projector, from timm and the hub
    pretrained_backbones: bool = False
    vision_backbone: dict[str, dict] = {}  # one or two: {name: {model: timm name, ...}}
    llm_backbone: dict | str = {}  # a transformers config, or directory or hub id
    tokenizer: str = ""  # directory or hub id
    add_action_tokens: bool = False  # append 256 ids instead of taking over the vocabulary's last 256
    arch_specifier: str = "no-align+gelu-mlp"  # projector: linear, gelu-mlp or fused-gelu-mlp
    # how the language model is asked: a key of action_tokenizer.PROMPTS
    prompt_style: Literal["pure", "vicuna_v15", "llama2_chat", "mistral_instruct", "phi"] = "pure"
    image_size: Positive = 224  # pixels; images are resized to a square
    # when acting; OpenVLA's are the last three
    image_resize_strategy: Literal["lanczos", "resize-naive", "resize-crop", "letterbox"] = "lanczos"
    max_length: Positive = 2048  # most text tokens in a sample, with its action; more are an error

    # what is trained (OpenVLA's four stages; see VLA.freeze)
    freeze_vision_backbone: bool = False
    freeze_llm_backbone: bool = False
    unfreeze_last_llm_layer: bool = False
    lora_rank: NotNegative = 0  # train adapters of this rank beside what is not frozen (lora.py); 0: itself
    lora_alpha: AboveZero = 16.0  # an adapter's share is alpha / rank. OpenVLA: rank 32, and min(rank, 16)
    frozen_weights: Literal["int8"] | None = None  # keep frozen matrices in 8 bits (int8.py)

    # data
    data_root_dir: str = "datasets/open-x-embodiment"  # the folder with the datasets' folders
    data_mix: str | dict[str, float] = "bridge"  # mixture or dataset by name, or {dataset: weight}
    balance_weights: bool = True  # shares are weight x frames, as OpenVLA's; false: weights are the shares
    datasets: Annotated[dict[str, Recipe], BeforeValidator(RECIPES.validate_python)] = {}  # your own
    cameras: Annotated[list[str], Field(min_length=1)] = ["primary"]  # names of recipes' cameras, in order
    use_proprio: bool = False  # show the robot's state to the model
    window_size: Positive = 1  # how many frames the model sees: this one and the ones before
    action_chunk: Positive = 1  # how many steps it predicts: this one and the ones after
    parallel_decoding: bool = False  # predict a chunk's tokens all at once instead of one after the other
    max_prefix: NotNegative = 0  # parallel_decoding: up to so many steps of a chunk may be given as known
    action_normalization: Literal["bounds_q99", "bounds", "normal"] = "bounds_q99"
    image_aug: bool = False  # random crop and colours, as OpenVLA
    skip_bad_episodes: bool = False  # leave out (and count) broken episodes; damaged files always stop
    index_dir: str | None = None  # where frame tables go; default: beside each dataset
    num_workers: NotNegative = 4  # DataLoader processes per rank

    # optimisation
    epochs: Positive = 1000  # ends the run unless max_steps does
    max_steps: Positive | None = None  # overrides epochs
    expected_world_size: int | None = None  # refuse to start on another number of GPUs; default: any
    global_batch_size: Positive = 256  # samples per optimizer step, whatever the number of GPUs
    per_device_batch_size: Positive = 32  # samples a GPU takes at a time; accumulation follows from the two
    learning_rate: Rate = 2e-5
    weight_decay: Rate = 0.0  # not on biases and norms
    max_grad_norm: Rate = 1.0
    lr_scheduler_type: Literal["constant", "linear-warmup+cosine-decay"] = "constant"
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0  # share of all steps
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)] = 7
    compile: bool = False  # torch.compile each transformer block: a minute at the start, then faster
    zero_speed: bool = True  # replace parts of DeepSpeed's ZeRO-2 and 3 by faster ones; false: none

    # run
    run_root_dir: str = "runs"
    run_id: Name | None = None  # name of the run's directory; default: made of vla_id, nodes, batch and seed
    run_id_note: Name | None = None  # appended to it
    pretrained_checkpoint: str | None = None  # begin with it, unless the run has one of its own
    is_resume: bool = True  # continue its training (step, optimizer, data); false: take its weights alone
    resume_step: int | None = None  # refuse to start if it is not of this step
    resume_epoch: int | None = None  # or epoch
    save_interval: NotNegative = 2500  # steps between checkpoints; 0: none unless the run is preempted
    keep_checkpoints: NotNegative = 2  # the newest ones; 0 keeps all
    on_save_error: Literal["stop", "continue"] = "stop"  # a full disk ends the run, or is a warning
    log_interval: Positive = 10  # steps between lines of the log
    eval_interval: NotNegative = 500  # steps between evaluations on held-out episodes; 0: only at the end
    eval_samples: Positive = 1024  # how many held-out frames to evaluate on

    # filled in from the data when training starts, and kept with the run
    action_dim: int = 0
    proprio_dim: int = 0
    features: dict[str, dict[str, int]] = {}  # of your own datasets: {feature: numbers in a step}

    @property
    def rests_on_base(self) -> bool:
        """Do checkpoints hold only what was trained, and need what the training began with?"""
        return bool(self.lora_rank or self.frozen_weights)


FILLED_IN = ("action_dim", "proprio_dim", "features")  # the last three


# ---- Reading it --------------------------------------------------------------------------------------------


class Loader(yaml.CSafeLoader):
    """YAML in which 2e-5 is a number, and no key may stand twice."""

    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value]
        if twice := [name for name in names if names.count(name) > 1]:
            raise yaml.MarkedYAMLError(problem=f"the key {twice[0]!r} stands there twice",
                                       problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_object(self, node, deep=False):
        if node.tag.endswith((":int", ":float")) and re.match(r"[-+]?0[\d_]|.*:", node.value):
            raise yaml.MarkedYAMLError(problem=f"{node.value} is another number in YAML (010 is 8, 1:30 is "
                                       "90): write it without leading zeros and colons",
                                       problem_mark=node.start_mark)
        return super().construct_object(node, deep)


Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
                             list("-+.0123456789"))


def load_yaml(text: str, source: str):
    """YAML -> its value. Raises UserError."""
    try:
        return yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:
        raise UserError(f"{source}: line {error.problem_mark.line + 1}: {error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:  # characters that YAML, or dates that the calendar has not
        raise UserError(f"{source}: {str(error).partition(chr(10))[0]}") from error


def load_table(name: str) -> dict:
    """One of configs/tables/."""
    path = PROJECT / f"configs/tables/{name}.yaml"
    return load_yaml(path.read_text(), str(path))


def load_config(path: str | Path, overrides: list[str] | tuple = ()) -> TrainConfig:
    """A YAML file, on top of the one it `inherits` from, with "key=value" overrides. Raises UserError."""
    values = read_yaml(Path(path))
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text}: expected key=value")
        values[key] = load_yaml(value, f"--set {text}"), "--set"
    try:
        for key, locate in PATHS.items():
            if isinstance(values.get(key, (None,))[0], str):
                values[key] = locate(values[key][0]), values[key][1]
        cfg = TrainConfig(**{key: value for key, (value, _) in values.items()})
        begun = any(run_directory(cfg).glob("checkpoints/step-*"))  # then it needs nothing but its data
        for key in cfg.model_fields_set & ({"data_root_dir"} if begun else PATHS.keys()):
            if PATHS[key] is find_input and isinstance(value := getattr(cfg, key), str):
                refuse_missing(value)
    except ValidationError as error:
        _, source = values.get(error.errors()[0]["loc"][0], (None, path))
        raise UserError(f"{source}: {first_problem(error)}") from None
    except UserError as error:
        raise UserError(f"{values.get(key, (None, path))[1]}: {key}: {error}") from None
    for problem in find_conflicts(cfg):
        raise UserError(f"{path}: {problem}")
    return cfg


def read_yaml(path: Path, heirs: tuple[Path, ...] = ()) -> dict[str, tuple[object, str]]:
    """{key: (value, the file it stands in)}, the parent's first. heirs: the files that inherit from this."""
    if path in heirs:
        raise UserError(f"{path}: inherits from itself, by way of {', '.join(map(str, heirs))}")
    try:
        values = load_yaml(path.read_text(), str(path)) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected `key: value` lines")
    if odd := [key for key in values if not isinstance(key, str)]:  # YAML reads on, no and 1 as values
        raise UserError(f"{path}: the key {odd[0]!r} is no name of a key")
    parent = values.pop("inherits", None)
    inherited = read_yaml(path.parent / expand(str(parent)), (*heirs, path)) if parent else {}
    return inherited | {key: (value, str(path)) for key, value in values.items()}


def find_conflicts(cfg: TrainConfig) -> Iterator[str]:
    """What cannot work although each value by itself could."""
    begins_with = cfg.base_vlm or cfg.pretrained_checkpoint
    for key in ("vision_backbone", "llm_backbone", "tokenizer"):
        if not (getattr(cfg, key) or begins_with):
            yield f"{key} is missing: the model needs it, or a base_vlm to take it from"
    for name, tower in cfg.vision_backbone.items():
        if "model" not in tower:
            yield f"vision_backbone: {name}: {tower!r} is not like {{model: name of a timm ViT}}"
        if not name.isidentifier():
            yield f"vision_backbone: {name!r}: call the tower by letters, digits and _"
    if cfg.rests_on_base and not begins_with:
        yield "lora_rank and frozen_weights: int8 need trained weights to rest on: set base_vlm"
    if cfg.frozen_weights and not (cfg.lora_rank or cfg.freeze_vision_backbone or cfg.freeze_llm_backbone):
        yield "frozen_weights: nothing is frozen: set lora_rank, or freeze something"
    if cfg.max_prefix and not (cfg.parallel_decoding and cfg.max_prefix < cfg.action_chunk):
        yield f"max_prefix: {cfg.max_prefix}: needs parallel_decoding, and an action_chunk that is longer"
    if cfg.pretrained_backbones and not isinstance(cfg.llm_backbone, str):
        yield "pretrained_backbones: llm_backbone must be a directory or hub id, to take its weights from"
    if cfg.pretrained_backbones and (cfg.base_vlm or (begins_with and not cfg.is_resume)):
        yield f"pretrained_backbones: these are other weights than those of {begins_with}: remove one key"


def first_problem(error: ValidationError) -> str:
    """The first thing that pydantic found wrong, in a line: key, value, what is expected."""
    found = max(error.errors(), key=lambda found: len(found["loc"]))  # of a union, the branch nearest to fit
    *place, name = [str(part) for part in found["loc"] if isinstance(part, str)] or [""]
    if found["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = [part.name for part in fields(Recipe)] if place else [*TrainConfig.model_fields]
        return "".join(f"{part}: " for part in place) + f"unknown key {name!r}{nearest(name, known)}"
    place = [*place, name][: 3 if place[:1] == ["datasets"] else 1]  # then come branches of its type
    message = found["msg"].removeprefix("Value error, ").replace("Input should", "it should")
    return f"{'.'.join(place)}: {found['input']!r}: {message}"


def one_line(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def nearest(name: str, known: Iterable[str], alike: float = 0.6) -> str:
    """"; did you mean 'seed'?" for a name that is like a known one."""
    return "".join(f"; did you mean {close!r}?" for close in difflib.get_close_matches(name, known, 1, alike))


# ---- Paths -------------------------------------------------------------------------------------------------


def expand(path: str) -> str:
    """`~` and `$VARIABLE` as a shell expands them. Raises UserError."""
    expanded = os.path.expanduser(os.path.expandvars(path))
    if unset := re.search(r"\$\w+|\$\{\w+\}", expanded):
        raise UserError(f"{path!r}: the environment has no variable {unset[0]}")
    return expanded


def find_input(path: str) -> str:
    """A path that is read: as seen from the current folder or, failing that, from the project's. What is in
    neither stays as it is. Raises UserError."""
    path = expand(path)
    here = not path or os.path.exists(path)  # "": none
    return path if here or not (PROJECT / path).exists() else str(PROJECT / path)


def read_secret(name: str, key: str) -> str:
    """What a file or an environment variable of this name holds. Raises UserError."""
    if name not in os.environ and not Path(name).is_file():
        raise UserError(f"{key}: {name!r} is neither a file nor an environment variable")
    try:
        return (os.environ[name] if name in os.environ else Path(name).read_text()).strip()
    except UnicodeDecodeError:
        raise UserError(f"{key}: the file {name!r} holds no text") from None


PATHS = {**dict.fromkeys(["base_vlm", "llm_backbone", "tokenizer", "data_root_dir", "pretrained_checkpoint"],
                         find_input), **dict.fromkeys(["run_root_dir", "index_dir", "hf_token"], expand)}


def refuse_missing(path: str) -> None:
    """Raise UserError for what looks like a path and not like an id (owner/name), and is not there."""
    no_id = re.search(r"^[./~]|/.*(/|--|[^\w.-])", path)
    folder = "/" in path and any((root / path).parent.is_dir() for root in (Path(), PROJECT))
    if not os.path.exists(path) and (no_id or folder):
        raise UserError(f"{path!r}: there is no such file or folder here or in {PROJECT}")


@functools.cache
def out_of_reach(name: str) -> bool:
    """Is `name` an id, and the hub does not answer? (Its client would try for minutes.) Raises UserError for
    a path that is not there."""
    from huggingface_hub import constants

    refuse_missing(name)
    if os.path.exists(name) or constants.HF_HUB_OFFLINE or os.environ.get("HTTPS_PROXY"):
        return not os.path.exists(name) and constants.HF_HUB_OFFLINE
    hub = urllib.parse.urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((hub.hostname, hub.port or hub.scheme), timeout=3).close()
    except OSError:
        return True
    return False


# ---- The job -----------------------------------------------------------------------------------------------

def set_rank_env(environ: MutableMapping[str, str] = os.environ) -> None:
    """Let the environment say in PyTorch's words which rank of which job this process is. deepspeed and
    torchrun say it so, others in words of their own; plain python is a job of one. Raises UserError."""
    for name in {*PLACE, "MASTER_ADDR"} & {name for name, value in environ.items() if not value}:
        del environ[name]  # empty: unsaid
    for names in load_table("launchers").values():
        if "RANK" not in environ and environ.get(names["WORLD_SIZE"], "1") != "1":
            for ours, name in names.items():
                if name in environ:  # "8(x2)" is how SLURM says 8 on each of two machines
                    environ[ours] = environ[name].partition("(")[0]
            if environ.get("LOCAL_WORLD_SIZE") == environ["WORLD_SIZE"]:
                environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "RANK" not in environ:
        environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        environ.setdefault("MASTER_PORT", "0")  # any free one
    if missing := [name for name in ("WORLD_SIZE", "MASTER_ADDR") if name not in environ]:
        raise UserError(f"the environment has RANK {environ['RANK']} but no {' and no '.join(missing)}: set "
                        "these, too, or start the job with deepspeed or torchrun")
    environ.setdefault("MASTER_PORT", "29500")
    environ.setdefault("LOCAL_RANK", "0")  # one process in each container
    for name, (least, most) in PLACE.items():
        most = int(environ["WORLD_SIZE"]) - 1 if most is None else most
        if name in environ and not (environ[name].isdecimal() and least <= int(environ[name]) <= most):
            raise UserError(f"the environment says {name} {environ[name]}, which must be {least} to {most}: "
                            "set it right, or start the job with deepspeed or torchrun")


# the least and the most that a launcher can say; None: below WORLD_SIZE
PLACE = {**dict.fromkeys(["WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"], (1, 1 << 20)),
         **dict.fromkeys(["RANK", "LOCAL_RANK"], (0, None)), "MASTER_PORT": (0, 65535)}


def ranks_here() -> int:
    """How many of the job's ranks this machine runs; torchrun and deepspeed have a word each for it."""
    environ = os.environ
    return int(environ.get("LOCAL_WORLD_SIZE") or environ.get("LOCAL_SIZE") or environ.get("WORLD_SIZE") or 1)


def run_directory(cfg: TrainConfig) -> Path:
    """Where a run lives; its name is made as OpenVLA makes it."""
    nodes = -(-int(os.environ.get("WORLD_SIZE") or 1) // ranks_here())
    name = cfg.run_id or f"{cfg.vla_id}+n{nodes}+b{cfg.per_device_batch_size}+x{cfg.seed}"
    name += f"--{cfg.run_id_note}" if cfg.run_id_note else ""
    return Path(cfg.run_root_dir) / (name + "--image_aug" * cfg.image_aug)
