"""A run's directory: its log and description, and where training starts."""

import dataclasses
import fcntl
import itertools
import json
import math
import os
import sys
import types
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import yaml
from tqdm import tqdm

from checkpoint import (
    CheckpointError,
    CheckpointReader,
    checkpoint_step,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from config import TrainConfig
from data import Mixture
from images import contact_sheet
from model import VLA
from weights import Weights
from zero import set_tensors


def step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinity for one that a full disk has cut short."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except ValueError:
        return math.inf


class Log:
    """Where rank 0 writes: the terminal, metrics.jsonl and TensorBoard. Other ranks write nothing."""

    def __init__(self, run_dir: Path, rank: int):
        self.run_dir, self.quiet, self.board = run_dir, rank != 0, None
        if self.quiet:
            return
        self.lock = open(run_dir / ".lock", "w")  # the system takes it back when this process ends
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise ValueError(f"{run_dir}: another job is training there: wait for its end, or give this "
                             "one a run_id of its own") from error

    def resume_at(self, step: int) -> None:
        """Start or continue the files; what an interrupted run logged after the checkpoint is dropped."""
        if self.quiet:
            return
        # TensorBoard's own switch against importing TensorFlow where that is installed; some builds crash
        # beside torch
        sys.modules["tensorboard.compat.notf"] = types.ModuleType("tensorboard.compat.notf")
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(self.run_dir, purge_step=step + 1)
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if step_of(line) <= step]
        scratch = path.with_suffix(".tmp")
        scratch.write_text("".join(kept))
        scratch.replace(path)  # at once, for this may be killed as well

    def line(self, text: str) -> None:
        """One line on the terminal, clear of the progress bar."""
        if not self.quiet:
            tqdm.write(text)
            sys.stdout.flush()

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """One line of key value pairs, here and in metrics.jsonl, and a point in each of TensorBoard's
        curves."""
        if self.quiet:
            return
        self.line(f"step {step} " + " ".join(f"{key} {value:.4g}" for key, value in values.items()))
        try:
            with open(self.run_dir / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
            for key, value in values.items():
                self.board.add_scalar(key, value, step)
            self.board.flush()
        except OSError as error:  # no reason to end a training
            self.line(f"warning: not logged: {error}")

    def mixture(self, mixture: Mixture, steps_per_epoch: int) -> None:
        """What is trained on, and what is odd about it."""
        shares = " ".join(f"{n}:{share:.4f}" for n, share in zip(mixture.names, mixture.weights, strict=True))
        self.line(f"data frames {mixture.sizes.sum()} epoch_steps {steps_per_epoch} mixture {shares}")
        for warning in mixture.warnings:
            self.line(f"warning: {warning}")

    def first_batch(self, batch: dict, mixture: Mixture) -> None:
        """Show what the model is about to see: one prompt here, the images with text and actions in
        TensorBoard."""
        tiles = []
        samples = zip(batch["images"], batch["input_ids"], batch["labels"], strict=True)
        for images, ids, labels in itertools.islice(samples, 16):
            prompt = mixture.tokenizer.decode(ids[: int((labels != -100).int().argmax())])
            action = mixture.action_tokenizer.decode(labels[labels != -100][:-1].numpy())
            caption = prompt.split(" to ", 1)[-1].split("?")[0]
            tiles.append((images[-1].numpy(), f"{caption[:40]}\n{' '.join(f'{a:.2f}' for a in action[:7])}"))
        self.line(f"first_prompt {prompt!r} action {' '.join(f'{a:.3f}' for a in action)}")
        sheet = np.asarray(contact_sheet(tiles))
        self.board.add_image("first_batch", sheet, dataformats="HWC")


def prepare_run(cfg: TrainConfig, world_size: int) -> Path:
    """Settle the run's name as OpenVLA does, and make its directory."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size)
    nodes = math.ceil(world_size / local)
    name = cfg.run_id or f"{cfg.vla_id}+n{nodes}+b{cfg.per_device_batch_size}+x{cfg.seed}"
    name += f"--{cfg.run_id_note}" if cfg.run_id_note else ""
    name += "--image_aug" if cfg.image_aug else ""
    run_dir = Path(cfg.run_root_dir) / name
    (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    return run_dir


def save_run_description(cfg: TrainConfig, ds_config: dict, mixture: Mixture, run_dir: Path) -> None:
    """config.yaml and config.json (the resolved TrainConfig), ds_config.json and dataset_statistics.json
    (OpenVLA's)."""
    values = dataclasses.asdict(cfg)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    (run_dir / "config.json").write_text(json.dumps(values, indent=2))
    (run_dir / "ds_config.json").write_text(json.dumps(ds_config, indent=2))
    mixture.tokenizer.save_pretrained(run_dir / "tokenizer")
    (run_dir / "dataset_statistics.json").write_text(json.dumps(mixture.statistics, indent=2))


def starting_point(cfg: TrainConfig, mixture: Mixture, run_dir: Path) -> tuple[Path | None, int]:
    """This run's newest checkpoint or cfg.pretrained_checkpoint, whichever is of the later step; and that
    step."""
    own = list_checkpoints(run_dir / "checkpoints")
    given = Path(cfg.pretrained_checkpoint) if cfg.pretrained_checkpoint and cfg.is_resume else None
    step = CheckpointReader(given).meta["step"] if given else 0
    if not own or step > checkpoint_step(own[-1]):
        return given, step
    check_same_data(run_dir, mixture)
    return own[-1], checkpoint_step(own[-1])


def set_weights(engine, checkpoint: Path | None, weights: Weights | None, log: Log) -> None:
    """Continue from a checkpoint, with its optimizer, or begin with `weights` if there are any."""
    if checkpoint:
        step = load_checkpoint(engine, checkpoint)["step"]
        log.line(f"resumed {checkpoint} step {step}")
    elif weights:
        fresh = weights.check(engine.module)
        set_tensors(engine, weights.read, ("weight",))
        log.line(f"weights_from {weights.where}" + (f" except {', '.join(fresh)}" if fresh else ""))


def check_same_data(run_dir: Path, mixture: Mixture) -> None:
    """Raise ValueError when a run with checkpoints was trained on other data: acting undoes the normalisation
    by the statistics that lie beside them."""
    path = run_dir / "dataset_statistics.json"
    known = json.loads(path.read_text()) if path.exists() else mixture.statistics
    if known != mixture.statistics:
        raise ValueError(f"{run_dir} was trained on {', '.join(known)}, with other statistics than those of "
                         f"{', '.join(mixture.names)} now: give this run another run_id; "
                         "pretrained_checkpoint with is_resume: false begins with the weights of the old one")


def check_pretrained(cfg: TrainConfig) -> None:
    """Raise ValueError when pretrained_checkpoint is not of the step and epoch that the config names."""
    expected = {"step": cfg.resume_step, "epoch": cfg.resume_epoch}
    given, resumes = cfg.pretrained_checkpoint, cfg.pretrained_checkpoint is not None and cfg.is_resume
    if resumes and not (Path(given) / "checkpoint.json").exists():
        raise ValueError(f"pretrained_checkpoint {given} is no checkpoint of this project (a directory with "
                         "checkpoint.json), so its training cannot be resumed: set is_resume: false to begin "
                         "with its weights")
    meta = CheckpointReader(Path(given)).meta if resumes else {}
    for key, value in expected.items():
        if value is not None and not resumes:
            raise ValueError(f"resume_{key} is {value}, but pretrained_checkpoint is {given} and is_resume "
                             f"{cfg.is_resume}: name a checkpoint to resume, or remove resume_{key} (a run "
                             "continues by itself from its newest checkpoint)")
        if value not in (None, meta.get(key)):
            raise ValueError(f"resume_{key} is {value}, but pretrained_checkpoint {given} is of {key} "
                             f"{meta[key]}: correct one of them")


def save_or_warn(engine, cfg: TrainConfig, run_dir: Path, tag: str, meta: dict, log: Log, must: bool) -> None:
    """Save a checkpoint. A failure ends the run, unless on_save_error allows to continue and nothing says
    that it must succeed."""
    try:
        path = save_checkpoint(engine, run_dir / "checkpoints", tag, meta, cfg.keep_checkpoints)
    except CheckpointError as error:
        if must or cfg.on_save_error == "stop":
            raise
        return log.line(f"warning: {error}; training goes on (on_save_error: continue)")
    log.line(f"saved {path}")


def average(value: torch.Tensor) -> float:
    """Mean over all ranks."""
    value = value.detach().float().clone()
    dist.all_reduce(value)
    return float(value) / dist.get_world_size()


# dense bf16 TFLOP/s of one GPU, from NVIDIA's data sheets; the first name that fits counts
PEAK_TFLOPS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "H800": 989, "B200": 2250,
               "A100": 312, "A800": 312, "L40S": 362, "RTX 4090": 165}


def utilisation(vla: VLA, batch: dict, samples_per_second: float) -> dict[str, float]:
    """Model TFLOP/s of each GPU and, for GPUs we know, MFU: the share of its peak. Recomputation does not
    count as work."""
    flops = vla.training_flops(batch["input_ids"].shape[1])
    values = {"tflops_per_gpu": samples_per_second * flops / dist.get_world_size() / 1e12}
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    peak = next((peak for gpu, peak in PEAK_TFLOPS.items() if gpu in name), None)
    return values | ({"mfu": values["tflops_per_gpu"] / peak} if peak else {})
