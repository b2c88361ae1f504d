"""Configuration: a YAML file describes the training, a DeepSpeed JSON how it is sharded.

Recipe and TrainConfig list every key of the YAML; docs/keys.md and `train_vla.py --help` show their
comments. The functions below them read and check both files, find paths, and find this process's
rank. Nothing here imports PyTorch: rlds.py's many processes start without it.

Programs import this file first: it prepares Python (the next section).
"""

import contextlib
import difflib
import locale
import os
import re
import sys
from collections.abc import Iterable, Iterator, MutableMapping
from dataclasses import field, fields
from pathlib import Path
from typing import Annotated, Literal

# ---- Before other packages are imported --------------------------------------------------------

PROJECT = Path(__file__).resolve().parents[1]  # where find_input looks after the current folder


def report_exception(kind: type, error: BaseException, trace) -> None:
    """For sys.excepthook: a missing package is one line with the cure instead of a traceback."""
    if kind is not ModuleNotFoundError:
        return sys.__excepthook__(kind, error, trace)
    program = Path(sys.argv[0]).resolve().parent  # an example has its own requirements
    files = {folder / "requirements.txt" for folder in (PROJECT, program)}
    install = " ".join(f"-r {file}" for file in sorted(files) if file.exists())
    print(f"error: {sys.executable}: {error}: activate the environment (source .venv/bin/activate) "
          f"or pip install {install}", file=sys.stderr)


sys.excepthook = report_exception
if sys.version_info < (3, 11):
    sys.exit(f"error: {sys.executable} is Python {sys.version.split()[0]}: use 3.11 or later")
if locale.getencoding().lower() != "utf-8":  # of files, logs and pipes
    locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8")

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic.dataclasses import dataclass


class UserError(ValueError):
    """An error the user can fix. Its message names the value, the file and the cure."""


@contextlib.contextmanager
def exit_with_one_line() -> Iterator[None]:
    """End the program with one line instead of a traceback for errors of the user or system."""
    try:
        yield
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0)]


# ---- Every key of the YAML ---------------------------------------------------------------------


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Recipe:
    """How to read one dataset: an entry of `datasets:`. fields.py explains field lists."""

    # `datasets: {NAME: {...}}`: how to read your own datasets
    primary: str | None = None  # a camera's key among the observations; without: a black image
    secondary: str | None = None  # another; "a|b" draws one of two per episode (DROID has two)
    wrist: str | None = None  # the one on the hand
    cameras: dict[str, str] = field(default_factory=dict)  # more cameras: {name: key}
    state: str = "state"  # field list, concatenated to `proprio`
    # field list; the words `target`, `change` and `raw` describe its dimensions ...
    action: str = "action"
    # ... or this and the next key do: how many of the last are `target raw` (default 1, a gripper)
    absolute: NotNegative | None = None
    targets: NotNegative = 0  # how many are `target`, normalized or not (joint positions)
    instruction: str = "language_instruction"  # key of the text, in the step or in the episode
    # train only on frames with these: a text, a pattern ("open *"), or !text to leave one out
    instructions: list[str] = field(default_factory=list)
    trim: bool = False  # Bridge: drop the first step (action zero) and the last (no action)
    skip_idle: bool = False  # DROID: drop frames without motion (oxe.is_idle)
    names: dict[str, list[str]] = field(default_factory=dict)  # {feature: names of its numbers}
    openvla_rules: bool = False  # a record is one episode, the last 5% are held out (oxe.held_out)

    @property
    def camera_names(self) -> dict[str, str]:
        """{camera: key} of all cameras that have a key."""
        standard = {"primary": self.primary, "secondary": self.secondary, "wrist": self.wrist}
        return {name: key for name, key in {**standard, **self.cameras}.items() if key}

    def camera(self, name: str) -> list[str | None]:
        """The keys from which a camera's images are drawn, usually one; [None] without a key."""
        names = self.camera_names
        return names[name].split("|") if name in names else [None]

    def camera_keys(self, names: list[str]) -> list[str | None]:
        """Observation keys of the named cameras, without repetition, in order of first use."""
        return list(dict.fromkeys(key for name in names for key in self.camera(name)))


RECIPES = TypeAdapter(dict[str, Recipe])  # {dataset: recipe}, the value of `datasets:`


class TrainConfig(BaseModel):
    """Every key of the YAML. Names and defaults are OpenVLA's for all keys that OpenVLA has."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    # the experiment
    vla_id: str = "vla"  # its name; the run's directory begins with it

    # the model: start from a VLM or VLA (see weights.py), which sets the keys that are missing ...
    base_vlm: str | None = None  # Prismatic id, directory or hub id
    hf_token: str | None = None  # file or environment variable with a Hugging Face token

    # ... or define a new model of this shape
    pretrained_backbones: bool = False  # weights from timm and the hub; the projector is random
    vision_backbone: dict[str, dict] = {}  # one or two: {name: {model: timm name, ...}}
    llm_backbone: dict | str = {}  # a transformers config, or directory or hub id
    tokenizer: str = ""  # directory or hub id
    add_action_tokens: bool = False  # append 256 ids instead of reusing the vocabulary's last 256
    arch_specifier: str = "no-align+gelu-mlp"  # projector: linear, gelu-mlp or fused-gelu-mlp
    # how the prompt is written (action_tokenizer.PROMPTS)
    prompt_style: Literal["pure", "vicuna_v15", "llama2_chat", "mistral_instruct", "phi"] = "pure"
    image_size: Positive = 224  # pixels; images are resized to a square
    # how images are resized when acting; OpenVLA has the next three, OpenVLA-OFT its own way
    image_resize_strategy: Literal[
        "lanczos", "resize-naive", "resize-crop", "letterbox", "oft"] = "lanczos"

    # the trained part (OpenVLA's four stages; see VLA.freeze)
    freeze_vision_backbone: bool = False  # keep the vision towers as they are
    freeze_llm_backbone: bool = False  # keep the language model as it is
    unfreeze_last_llm_layer: bool = False  # except its last layer
    lora_rank: NotNegative = 0  # train adapters of this rank instead of matrices (lora.py); 0: off
    # adapters are scaled by alpha / rank. OpenVLA: rank 32, alpha min(rank, 16)
    lora_alpha: Annotated[float, Field(gt=0)] = 16.0
    frozen_weights: Literal["int8"] | None = None  # keep frozen matrices in 8 bits (int8.py)

    # the data
    data_root_dir: str = "datasets/open-x-embodiment"  # the folder with the datasets' folders
    data_mix: str | dict[str, float] = "bridge"  # a mixture, a dataset, or {dataset: weight}
    balance_weights: bool = True  # shares are weight x frames, as in OpenVLA; false: weight only
    # recipes of your own datasets, {name: recipe}; a recipe's keys are listed below
    datasets: Annotated[dict[str, Recipe], BeforeValidator(RECIPES.validate_python)] = {}
    cameras: Annotated[list[str], Field(min_length=1)] = ["primary"]  # names in the recipes
    use_proprio: bool = False  # show the robot's state to the model
    window_size: Positive = 1  # frames that the model sees: this one and the ones before
    action_chunk: Positive = 1  # steps that it predicts: this one and the ones after
    parallel_decoding: bool = False  # predict all tokens of a chunk at once, not one after another
    max_prefix: NotNegative = 0  # parallel_decoding: up to this many steps of a chunk may be given
    # the range mapped to -1..1: 1% to 99% quantiles, all, or a deviation around the mean
    action_normalization: Literal["bounds_q99", "bounds", "normal"] = "bounds_q99"
    # OpenVLA-OFT's ways to predict a chunk (oft.py): l1 trains a head that returns numbers
    action_head: Literal["tokens", "l1", "oft_tokens", "oft_tokens_causal"] = "tokens"
    film: bool = False  # with action_head l1: let the instruction change the image features
    image_aug: bool = False  # random crop and colors, as in OpenVLA
    skip_bad_episodes: bool = False  # skip (and count) broken episodes; damaged files stop
    index_dir: str | None = None  # folder of the frame tables; default: beside each dataset
    # findings of the survey (docs/doctor.md) that are meant, as [idle] or, of one dataset of
    # several, [my_robot.idle]
    accept: list[str] = []
    num_workers: NotNegative = 4  # DataLoader processes per rank

    # the optimization
    epochs: Positive = 1000  # length of the run, unless max_steps is set
    max_steps: Positive | None = None  # overrides epochs
    expected_world_size: int | None = None  # required number of GPUs; default: any
    global_batch_size: Positive = 256  # samples per optimizer step, on all GPUs together
    per_device_batch_size: Positive = 32  # samples per GPU at a time; gradients are accumulated
    learning_rate: Rate = 2e-5  # of AdamW, after the warmup
    weight_decay: Rate = 0.0  # not applied to biases and norms
    max_grad_norm: Rate = 1.0  # larger gradients are scaled down to this norm
    # how the learning rate changes
    lr_scheduler_type: Literal["constant", "linear-warmup+cosine-decay"] = "constant"
    num_steps_before_decay: Positive | None = None  # constant: a tenth of it after these steps
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0  # share of all steps; needs a schedule
    seed: int = 7  # of the random weights, the order of the samples and their augmentation
    compile: bool = False  # torch.compile each transformer block: takes a minute, then faster
    cuda_graph: bool = True  # replay the passes of LoRA and small models (cuda_graph.py)
    zero_speed: bool = True  # use faster parts in DeepSpeed's ZeRO-2 and 3 (zero_speed.py)

    # the run; an interval of 0 means: only at the end
    run_root_dir: str = "runs"  # the folder of all runs
    run_id: str | None = None  # the run's directory; default: from vla_id, nodes, batch and seed
    run_id_note: str | None = None  # appended to it
    pretrained_checkpoint: str | None = None  # start from it, unless the run has its own
    is_resume: bool = True  # continue its training (step, optimizer, data); false: only its weights
    resume_step: int | None = None  # required step of that checkpoint
    resume_epoch: int | None = None  # required epoch of it
    save_interval: NotNegative = 2500  # steps between checkpoints
    # how many of the newest checkpoints; 0: all; none: save no checkpoint, not even the last
    keep_checkpoints: NotNegative | Literal["none"] = 2
    on_save_error: Literal["stop", "continue"] = "stop"  # if one cannot be saved; or only warn
    log_interval: NotNegative = 10  # steps between lines of the log
    eval_interval: NotNegative = 500  # steps between evaluations on held-out episodes
    eval_samples: Positive = 1024  # held-out frames to evaluate on

    # filled in from the data when training starts, and saved with the run
    action_dim: int = 0  # numbers of an action
    proprio_dim: int = 0  # numbers of a state
    features: dict[str, dict[str, int]] = {}  # of your own datasets: {feature: numbers in a step}

    @property
    def rests_on_base(self) -> bool:
        """Whether checkpoints hold only the trained part and need the weights it started from."""
        return bool(self.lora_rank or self.frozen_weights)

    @model_validator(mode="before")
    @classmethod
    def decode_in_parallel(cls, values: dict) -> dict:
        """OpenVLA-OFT's heads predict a chunk at once."""
        if values.get("action_head", "tokens") != "tokens":
            return {**values, "parallel_decoding": True}
        return values


# ---- Reading the YAML --------------------------------------------------------------------------


class Loader(yaml.CSafeLoader):
    """YAML that reads 2e-5 as a number and rejects duplicate keys."""

    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.MarkedYAMLError(problem=f"duplicate key {name!r}",
                                           problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


SCIENTIFIC = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
Loader.add_implicit_resolver("tag:yaml.org,2002:float", SCIENTIFIC, list("-+.0123456789"))


def load_yaml(text: str, source: str):
    """YAML -> its value. Raises UserError naming the source."""
    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2026-13-45
        raise UserError(f"{source}: {one_line(error)}") from error


def load_table(name: str) -> dict:
    """One of configs/tables/."""
    path = PROJECT / f"configs/tables/{name}.yaml"
    return load_yaml(path.read_text(), str(path))


def read_yaml(path: Path) -> dict[str, object]:
    """The values of a YAML file, on top of those of the file that it `inherits` from."""
    values = load_yaml(path.read_text(), str(path)) or {}
    parent = values.pop("inherits", None)
    if parent is None:
        return values
    return read_yaml(path.parent / expand(parent)) | values


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> TrainConfig:
    """Read a YAML file; overrides are "key=value". Raises UserError."""
    values = read_yaml(Path(path))
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text}: expected key=value")
        values[key] = load_yaml(value, f"--set {text}")
    for key, locate in PATHS.items():
        if isinstance(values.get(key), str):
            values[key] = locate(values[key])
    try:
        cfg = TrainConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path}: {first_problem(error)}") from None
    problem = next(find_conflicts(cfg), None)
    if problem:
        raise UserError(f"{path}: {problem}")
    return cfg


def find_conflicts(cfg: TrainConfig) -> Iterator[str]:
    """Combinations of valid values that would fail late or have no effect."""
    start = cfg.base_vlm or cfg.pretrained_checkpoint
    new_model = cfg.vision_backbone and cfg.llm_backbone and cfg.tokenizer
    if not (start or new_model):
        yield "no model: set base_vlm, or vision_backbone, llm_backbone and tokenizer"
    if cfg.rests_on_base and not start:
        yield "lora_rank and frozen_weights need trained weights: set base_vlm"
    if cfg.frozen_weights and not (
            cfg.lora_rank or cfg.freeze_vision_backbone or cfg.freeze_llm_backbone):
        yield "frozen_weights: nothing is frozen: set lora_rank or freeze_llm_backbone"
    if cfg.max_prefix and not (cfg.parallel_decoding and cfg.max_prefix < cfg.action_chunk):
        yield f"max_prefix {cfg.max_prefix}: needs parallel_decoding and a longer action_chunk"
    if cfg.max_prefix and cfg.action_head != "tokens":
        yield f"max_prefix {cfg.max_prefix}: an action_head {cfg.action_head} cannot learn it"
    if cfg.film and cfg.action_head == "tokens":
        yield "film: needs action_head: l1"
    if cfg.num_steps_before_decay and cfg.lr_scheduler_type != "constant":
        yield "num_steps_before_decay has no effect: set lr_scheduler_type: constant"
    if cfg.pretrained_backbones and (cfg.base_vlm or (start and not cfg.is_resume)):
        yield f"pretrained_backbones would replace the weights of {start}: remove one of them"
    if cfg.warmup_ratio and cfg.lr_scheduler_type == "constant":
        yield ("warmup_ratio has no effect with a constant learning rate: "
               "set lr_scheduler_type: linear-warmup+cosine-decay")


def first_problem(error: ValidationError) -> str:
    """One line for pydantic's first problem: key, value and the problem."""
    # the deepest: of a union's alternatives the one that fits best
    problem = max(error.errors(), key=lambda problem: len(problem["loc"]))
    place = [str(part) for part in problem["loc"] if isinstance(part, str)]
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        *section, name = place
        known = [part.name for part in fields(Recipe)] if section else TrainConfig.model_fields
        return f"{'.'.join(place)}: unknown key{nearest(name, known)}"
    return f"{'.'.join(place)}: {problem['input']!r}: {problem['msg']}"


def one_line(error: Exception) -> str:
    """An error's message without line breaks."""
    return " ".join(str(error).split())


def nearest(name: str, known: Iterable[str], alike: float = 0.6) -> str:
    """"; did you mean 'seed'?" if `name` resembles a known name, else ""."""
    close = difflib.get_close_matches(name, known, 1, alike)
    return f"; did you mean {close[0]!r}?" if close else ""


# ---- The JSON ----------------------------------------------------------------------------------


NOT_TEXT = re.compile(r"auto|true|false|[-+.]*\d[-+.\de]*", re.IGNORECASE)


def load_ds_config(path: str | Path) -> dict:
    """Read a DeepSpeed JSON (as YAML, which includes JSON and names the line of a mistake).

    Raises UserError for keys that DeepSpeed ignores silently, that the YAML sets, or that make
    checkpoints wrong (configs/tables/deepspeed_json.yaml), and for optimizers other than AdamW.
    zero.check_json lets DeepSpeed check the rest.
    """
    ds_config = load_yaml(Path(path).read_text(), f"--deepspeed_config {path}")
    table = load_table("deepspeed_json")
    for key, value in walk(ds_config):
        section, _, name = key.rpartition(".")
        known = table["known"].get(section)
        if key in table["refused"]:
            if value is not False:
                raise UserError(f"{path}: remove {key}: {table['refused'][key]}")
        elif known is not None and name not in known:
            raise UserError(f"{path}: {key}: unknown key{nearest(name, known)}")
        # DeepSpeed ignores "auto" and reads "3" as 3. Our own comparisons (stage == 3) do not
        if isinstance(value, str) and NOT_TEXT.fullmatch(value):
            raise UserError(f'{path}: {key}: replace "{value}" by a number, true or false')
    if str(ds_config.get("optimizer", {}).get("type")).lower() not in ("adam", "adamw"):
        raise UserError(f'{path}: optimizer: checkpoints hold Adam\'s moments: set "type": "AdamW"')
    return ds_config


def walk(section: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """{"a": {"b": 1}} -> ("a", {"b": 1}), ("a.b", 1)."""
    for key, value in section.items():
        yield prefix + key, value
        if isinstance(value, dict):
            yield from walk(value, f"{prefix}{key}.")


# ---- Paths -------------------------------------------------------------------------------------


def expand(path: str) -> str:
    """Expand `~` and `$VARIABLE` as a shell does. Raises UserError for an unset variable."""
    expanded = os.path.expanduser(os.path.expandvars(path))
    unset = re.search(r"\$\w+|\$\{\w+\}", expanded)
    if unset:  # a folder of this name would be created
        raise UserError(f"{path!r}: the environment variable {unset[0]} is not set")
    return expanded


def find_input(path: str) -> str:
    """A path to read, relative to the current folder or the project; unchanged if in neither."""
    path = expand(path)
    in_project = PROJECT / path
    if path and not os.path.exists(path) and in_project.exists():
        return str(in_project)
    return path


PATHS = {"base_vlm": find_input, "llm_backbone": find_input, "tokenizer": find_input,
         "data_root_dir": find_input, "pretrained_checkpoint": find_input,
         "run_root_dir": expand, "index_dir": expand, "hf_token": expand}


def read_secret(name: str, key: str) -> str:
    """The content of an environment variable or file. Raises UserError naming `key`."""
    if name in os.environ:
        return os.environ[name].strip()
    try:
        return Path(name).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}: {name!r} is not an environment variable or text file") from error


# ---- The job -----------------------------------------------------------------------------------


def set_rank_env(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set PyTorch's variables RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.

    deepspeed and torchrun set them already; other launchers use their own names (configs/tables/
    launchers.yaml); plain python is a job of one rank. Raises UserError.
    """
    for names in load_table("launchers").values():
        if "RANK" in environ or environ.get(names["WORLD_SIZE"], "1") == "1":
            continue
        for ours, theirs in names.items():
            if theirs in environ:  # SLURM writes "8(x2)" for 8 on each of two machines
                environ[ours] = environ[theirs].partition("(")[0]
        if environ.get("LOCAL_WORLD_SIZE") == environ["WORLD_SIZE"]:
            environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "RANK" not in environ:
        environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        environ.setdefault("MASTER_PORT", "0")  # any free port
    for name in ("WORLD_SIZE", "MASTER_ADDR"):
        if name not in environ:  # DeepSpeed would only report that mpi4py is missing
            raise UserError(f"RANK is set, {name} is not: set it, or use deepspeed or torchrun")
    environ.setdefault("MASTER_PORT", "29500")
    environ.setdefault("LOCAL_RANK", "0")  # one process per container


def ranks_here() -> int:
    """Number of the job's ranks on this machine: torchrun and deepspeed have a variable each."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE"):
        if name in os.environ:
            return int(os.environ[name])
    return 1


def run_directory(cfg: TrainConfig) -> Path:
    """The run's directory, named by OpenVLA's rule."""
    name = cfg.run_id
    if not name:
        nodes = -(-int(os.environ.get("WORLD_SIZE", 1)) // ranks_here())
        name = f"{cfg.vla_id}+n{nodes}+b{cfg.per_device_batch_size}+x{cfg.seed}"
    if cfg.run_id_note:
        name += f"--{cfg.run_id_note}"
    if cfg.image_aug:
        name += "--image_aug"
    return Path(cfg.run_root_dir) / name
