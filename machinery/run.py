"""A training run's directory: what describes it, its log, and where its training starts.

    runs/demo+n1+b32+x7/
        config.yaml, config.json    all knobs, with what was filled in
        dataset_statistics.json     how actions are normalised; OpenVLA's format
        ds_config.json, tokenizer/
        metrics.jsonl               a line for each line of the log, with more numbers
        first_batch.png             what the model saw first, with instructions and actions
        events.out.tfevents.*       TensorBoard's curves
        checkpoints/step-...        see checkpoint.py

A run that has a checkpoint of its own continues from it and opens nothing else. Its config.yaml then says
what the weights mean, and a config that says otherwise is refused.
"""

import json
import math
import os
import sys
import time
import types
from pathlib import Path

import numpy as np
import psutil
import torch
import torch.distributed as dist
import yaml
from tqdm import tqdm

from data import Mixture
from machinery.checkpoint import (
    Checkpoint,
    CheckpointError,
    list_checkpoints,
    open_checkpoint,
    save_checkpoint,
)
from machinery.command_line import walk
from machinery.config import TrainConfig, UserError, ranks_here, run_directory
from machinery.files import take_lock
from machinery.images import contact_sheet
from machinery.lora import linear_layers
from machinery.ranks import LESS_MEMORY
from machinery.weights import SHAPE
from model import VLA

# what a run may change when it continues; everything else would give its weights another meaning
MAY_CHANGE = """vla_id hf_token max_length data_root_dir index_dir num_workers epochs max_steps
    expected_world_size per_device_batch_size learning_rate weight_decay max_grad_norm lr_scheduler_type
    warmup_ratio compile run_root_dir run_id run_id_note resume_step resume_epoch save_interval
    keep_checkpoints on_save_error log_interval eval_interval eval_samples action_dim proprio_dim
    features""".split()
MEANING = "lora_alpha add_action_tokens prompt_style action_normalization cameras window_size".split()
# what a person reads of the numbers, and what is about speed; metrics.jsonl and TensorBoard have all
SHOWN = """loss accuracy grad_norm samples_per_second mfu eval/loss eval/accuracy
    eval/accuracy_of_most_frequent_bin""".split()
SPEED = "step_seconds data_seconds samples_per_second eta_seconds tflops_per_gpu mfu gpu_gb host_gb".split()


class Run:
    """A run. Rank 0 alone writes.

    path: its directory; cfg: the config it goes by; checkpoint: what it continues from, opened, or None;
    step: how many steps have been made
    """

    def __init__(self, cfg: TrainConfig):
        """Raises UserError when `cfg` does not fit the run of that name, or another job is in it."""
        self.quiet, self.path, self.cfg = dist.get_rank() != 0, run_directory(cfg), cfg
        self.lock, self.checkpoint, self.base, self.step, self.started = None, None, None, 0, time.time()
        if self.path.exists():
            self.claim()
        elif not self.quiet:  # else it would be said when the weights have been read
            there = next(folder for folder in self.path.parents if folder.exists())
            if not (there.is_dir() and os.access(there, os.W_OK)):
                raise UserError(f"run_root_dir {self.cfg.run_root_dir}: {there} is no folder that can be "
                                "written to: name another")
        if own := list_checkpoints(self.path / "checkpoints"):
            self.cfg = continued(cfg, self.path)
            self.checkpoint = open_checkpoint(own[-1])
        else:
            self.checkpoint = given_checkpoint(cfg)
        if self.checkpoint:
            self.step, self.base = self.checkpoint.meta["step"], self.checkpoint.base

    def claim(self) -> None:
        """Make the directory, and make sure that no other job trains in it."""
        if self.quiet or self.lock:
            return
        (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
        try:
            self.lock = take_lock(self.path / ".lock", wait=False)
        except BlockingIOError as error:
            raise UserError(f"{self.path}: another job is training there: wait for its end, or give this one "
                            "a run_id of its own") from error

    def check_data(self, mixture: Mixture) -> None:
        """Raise UserError when what goes on was trained on other statistics: acting goes by them."""
        run = self.checkpoint.run_dir if self.checkpoint else self.path
        known = run / "dataset_statistics.json"
        if self.step and known.exists() and json.loads(known.read_text()) != mixture.statistics:
            raise UserError(f"{run} was trained on data with other statistics than those of "
                            f"{', '.join(mixture.names)} now: give this training a run_id of its own (with "
                            "pretrained_checkpoint and is_resume: false it begins with the old weights)")

    def describe(self, cfg: TrainConfig, ds_config: dict, mixture: Mixture) -> None:
        """Write what the run is, now that nothing was found wrong with it, and start its log."""
        shares = " ".join(f"{n}:{share:.4f}" for n, share in zip(mixture.names, mixture.shares, strict=True))
        self.line(f"data frames {mixture.sizes.sum()} epoch_frames {mixture.epoch_length} shares {shares}")
        for name in mixture.features:  # your own datasets
            recipe = cfg.datasets[name.partition(":")[0]]
            self.line(f"recipe {name} action {recipe.action!r} state {recipe.state!r}")
        for warning in mixture.warnings:
            self.line(f"warning: {warning}")
        self.line(f"startup_s {time.time() - self.started:.1f}")
        if self.quiet:
            return
        self.claim()
        (self.path / "config.yaml").write_text(yaml.safe_dump(cfg.model_dump(), sort_keys=False))
        for name, values in (("config", cfg.model_dump()), ("ds_config", ds_config),
                             ("dataset_statistics", mixture.statistics)):
            (self.path / f"{name}.json").write_text(json.dumps(values, indent=2))
        mixture.tokenizer.save_pretrained(self.path / "tokenizer")
        self.open_log()

    # ---- The log -------------------------------------------------------------------------------------------

    def open_log(self) -> None:
        """Start or continue the files; what an interrupted run logged after its checkpoint is dropped."""
        # TensorBoard's own switch against importing TensorFlow, some builds of which crash beside torch
        sys.modules["tensorboard.compat.notf"] = types.ModuleType("tensorboard.compat.notf")
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(self.path, purge_step=self.step + 1)
        curves = {key: ["Multiline", [f"train/{key}", f"eval/{key}"]] for key in ("loss", "accuracy", "l1")}
        self.board.add_custom_scalars({"training and evaluation": curves})
        path = self.path / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        scratch = path.with_suffix(".tmp")
        scratch.write_text("".join(line for line in lines if step_of(line) <= self.step))
        scratch.replace(path)  # at once, for this may be killed as well

    def line(self, text: str) -> None:
        """One line on the terminal, clear of the progress bar."""
        if not self.quiet:
            tqdm.write(text)
            sys.stdout.flush()

    def steps(self, total: int):
        """The numbers of the steps to be made, behind a progress bar if there is a terminal to show it."""
        return tqdm(range(self.step, total), "train", initial=self.step, total=total, unit="step",
                    disable=True if self.quiet else None)

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """The most important numbers on the terminal, all of them in metrics.jsonl and in TensorBoard."""
        if self.quiet:
            return
        shown = " ".join(f"{key} {values[key]:.4g}" for key in SHOWN if key in values)
        if "eta_seconds" in values:
            minutes, seconds = divmod(round(values["eta_seconds"]), 60)
            shown += f" eta {minutes // 60}:{minutes % 60:02}:{seconds:02}"
        self.line(f"step {step} {shown}")
        try:
            with open(self.path / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
            for key, value in values.items():
                group = "" if key.startswith("eval/") else "speed/" if key in SPEED else "train/"
                self.board.add_scalar(group + key, value, step)
            self.board.flush()
        except OSError as error:  # no reason to end a training
            self.line(f"warning: not logged: {error}")

    def first_batch(self, batch: dict, mixture: Mixture) -> None:
        """Show what the model is about to see: a prompt here; in first_batch.png and TensorBoard all images
        of some samples, oldest first, with instruction and action."""
        if self.quiet:
            return
        tiles, times = [], -(-224 // batch["images"].shape[2])  # small images are enlarged
        samples = zip(batch["images"][:8], batch["input_ids"][:8], batch["labels"][:8], strict=True)
        for images, ids, labels in samples:
            prompt = mixture.tokenizer.decode(ids[: int((labels != -100).int().argmax())])
            tokens = labels[labels != -100][: mixture.action_dim].numpy()
            action = " ".join(f"{a:.2f}" for a in mixture.action_tokenizer.decode(tokens))
            row = np.concatenate(images.numpy(), axis=1).repeat(times, axis=0).repeat(times, axis=1)
            tiles.append((row, f"{prompt.split(' to ', 1)[-1].split('?')[0]}\naction {action}"))
        self.line(f"first_prompt {prompt!r}")
        self.line(f"first_action {action}")
        sheet = contact_sheet(tiles, columns=2)
        sheet.save(self.path / "first_batch.png")
        self.board.add_image("first_batch", np.asarray(sheet), dataformats="HWC")

    def end(self, step: int, total: int, reason: str) -> None:
        """The last line of the log."""
        if step == total:
            self.line(f"done steps {total} seconds {time.time() - self.started:.0f} run {self.path}")
        else:
            self.line(f"stopped by {reason} at step {step} of {total}: start the same command again to "
                      "continue")

    # ---- Checkpoints ---------------------------------------------------------------------------------------

    def save(self, engine, step: int, epoch: int, loss: float, must: bool) -> None:
        """Save a checkpoint. A failure ends the run if it `must` succeed, or on_save_error says so."""
        tag = f"step-{step:06d}-epoch-{epoch:02d}-loss={loss:.4f}"
        try:
            path = save_checkpoint(engine, self.path / "checkpoints", tag,
                                   {"step": step, "epoch": epoch, "base": self.base},
                                   self.cfg.keep_checkpoints)
        except CheckpointError as error:
            if must or self.cfg.on_save_error == "stop":
                raise
            return self.line(f"warning: {error}; training goes on (on_save_error: continue)")
        self.line(f"saved {path}")


def continued(cfg: TrainConfig, path: Path) -> TrainConfig:
    """The config of a run that continues: its own config.yaml, and of `cfg` what may change. Raises UserError
    naming what `cfg` says otherwise."""
    try:
        own = TrainConfig(**yaml.safe_load((path / "config.yaml").read_text()))
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path / 'config.yaml'}: {error}: without it, nobody knows what the run's "
                              "checkpoints mean") from error
    was, now, changed = leaves(own), leaves(cfg), []
    unsaid = set(SHAPE) - cfg.model_fields_set if own.base_vlm or own.pretrained_checkpoint else set()
    for key in sorted(was.keys() | now.keys()):
        knob = key.partition(".")[0]
        more = knob == "llm_backbone" and key not in now  # a run knows more of it than its YAML says
        if knob not in {*MAY_CHANGE, *unsaid} and not more and was.get(key) != now.get(key):
            changed.append(f"{key} was {was.get(key)!r} and is {now.get(key)!r} now")
    if changed:
        raise UserError(f"{path}: its checkpoints are of a training with another config: "
                        f"{'; '.join(changed)}: set that back, or give this training a run_id of its own")
    return own.model_copy(update={key: getattr(cfg, key) for key in MAY_CHANGE})


def leaves(cfg: TrainConfig) -> dict[str, object]:
    """{"datasets.my_robot.primary": value, ...}: what a config says. (What a run began with may have moved
    since, but not be called otherwise.)"""
    values = {key: value for key, value in walk(cfg.model_dump()) if not isinstance(value, dict)}
    if isinstance(cfg.llm_backbone, str):
        values["llm_backbone._name_or_path"] = values.pop("llm_backbone")
    for key in ("base_vlm", "pretrained_checkpoint", "tokenizer"):
        values[key] = values[key] and Path(values[key]).name
    return values


def given_checkpoint(cfg: TrainConfig) -> Checkpoint | None:
    """pretrained_checkpoint, opened to continue from it, if the config says so. Raises UserError when it is
    no checkpoint, or not of the step and epoch that the config names."""
    given, expected = cfg.pretrained_checkpoint, {"step": cfg.resume_step, "epoch": cfg.resume_epoch}
    checkpoint = None
    if given and cfg.is_resume:
        if not (Path(given) / "checkpoint.json").exists():
            raise UserError(f"pretrained_checkpoint {given} is no checkpoint of this project (a directory "
                            "with checkpoint.json), so its training cannot be resumed: set is_resume: false "
                            "to begin with its weights")
        checkpoint = open_checkpoint(Path(given))
        path = checkpoint.run_dir / "config.json"
        own = json.loads(path.read_text()) if path.exists() else {}
        for key in MEANING:  # with another, the same weights mean something else
            was, now = own.get(key), getattr(cfg, key)
            if was not in (None, now) and (checkpoint.base or not key.startswith("lora")):
                raise UserError(f"pretrained_checkpoint {given} was trained with {key} {was}, and is {now} "
                                "now: set that back, or is_resume: false")
    for key, value in expected.items():
        if value is not None and not checkpoint:
            raise UserError(f"resume_{key} is {value}, but pretrained_checkpoint is {given} and is_resume "
                            f"{cfg.is_resume}: name a checkpoint to resume, or remove resume_{key} (a run "
                            "continues by itself from its newest checkpoint)")
        if value is not None and value != checkpoint.meta[key]:
            raise UserError(f"resume_{key} is {value}, but pretrained_checkpoint {given} is of {key} "
                            f"{checkpoint.meta[key]}: correct one of them")
    return checkpoint


def step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; infinity for one that a full disk has cut short."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except ValueError:
        return math.inf


# ---- The GPU -----------------------------------------------------------------------------------------------


def memory_needed(vla: VLA, ds_config: dict) -> str:
    """For the log, in GB: what each GPU keeps all the time, about what a batch's activations take, and what
    is offloaded to the host. Raises UserError where there is no room for what is kept."""
    zero, count = ds_config.get("zero_optimization", {}), vla.count_parameters()[1]
    stage, half = zero.get("stage", 0), ds_config.get("bf16", {}).get("enabled", False)
    ranks = [dist.get_world_size() if stage >= divided else 1 for divided in range(4)]
    # null and a missing device mean that nothing is offloaded, as "none" does
    offloaded = {key: value for key, value in zero.items()
                 if key.startswith("offload_") and (value or {}).get("device", "none") != "none"}
    on_host = offloaded["offload_optimizer"].get("ratio", 1) if "offload_optimizer" in offloaded else 0
    weights = sum(getattr(p, "ds_numel", p.numel()) * min(p.element_size(), 2 if half else 4)
                  for p in vla.parameters())
    gradients = 4 if not half or stage > 1 else 6 if stage else 2  # ds_configs/README.md has these numbers
    held = {"weights": 0 if "offload_param" in offloaded else weights / ranks[3],
            # DeepSpeed's ZeRO-1 and 2 sum on the GPU also what AdamW reads on the host
            "gradients": (stage < 3 or on_host < 1) * gradients * count / ranks[2],
            "optimizer": (1 - on_host) * (12 if half else 8) * count / ranks[1]}
    needed = sum(held.values()) / 1e9
    if torch.cuda.is_available() and needed > (there := torch.cuda.mem_get_info()[1] / 1e9):
        raise UserError(f"weights, gradients and optimizer take {needed:.1f} GB, of a GPU that has "
                        f"{there:.1f}: {LESS_MEMORY}")
    held["activations"] = activations(vla, "activation_checkpointing" in ds_config) * (2 if half else 4)
    if on_host:  # float32 weights, moments, gradients; 2 bytes more, for PyTorch rounds up what is pinned
        held["host"] = on_host * 18 * count / ranks[1] * ranks_here()
        if held["host"] > (there := psutil.virtual_memory().total):
            raise UserError(f"what is offloaded takes {held['host'] / 1e9:.1f} GB of a host that has "
                            f"{there / 1e9:.1f}: offload less (zero3_partial_offload.json has a ratio), or "
                            "train less (lora_rank: 32)")
    return "memory " + " ".join(f"{name}_gb {size / 1e9:.4g}" for name, size in held.items())


def activations(vla: VLA, recompute: bool) -> float:
    """How many numbers a micro-batch keeps for the backward pass, about: 17 a token and feature of a block
    (Korthikanti et al., 2022; compiled, some 12); with recomputation one, and 17 of the block at work."""
    kept = [(len(blocks) + 17 if recompute else 17 * len(blocks)) * width * tokens * times
            for blocks, width, tokens, times, trained in stacks(vla, num_tokens=40) if trained]
    return vla.cfg.per_device_batch_size * sum(kept)


def stacks(vla: VLA, num_tokens: int) -> list[tuple]:
    """The model's blocks: (those of a tower or the language model, their width, how many tokens they see of a
    sample with num_tokens of text, how many times, and have they a backward pass?)."""
    language = (vla.llm.base_model.layers, vla.llm.config.hidden_size,
                num_tokens + vla.num_images * vla.num_patches + vla.cfg.use_proprio, 1, True)
    return [language, *((tower.blocks[:-1], tower.embed_dim, vla.num_patches + tower.num_prefix_tokens,
                         vla.num_images, any(p.requires_grad for p in tower.parameters()))
                        for tower in vla.vision_backbone.values())]


def memory_if(vla: VLA) -> str:
    """For the log, before VLA.freeze: GB that one GPU would keep if less were trained, or the host helped."""
    layers, whole = linear_layers(vla).values(), 2 * vla.count_parameters()[0]
    adapters = 18 * 32 * sum(layer.in_features + layer.out_features for layer in layers)
    saved = sum(layer.in_features * layer.out_features for layer in layers)  # a byte each, instead of two
    vla.freeze(True, True, True)
    kept = {"lora_bf16": whole + adapters, "lora_int8": whole + adapters - saved,
            "last_layer": whole + 16 * vla.count_parameters()[1], "everything_offloaded": whole + 2 * whole}
    return "memory_if " + " ".join(f"{way}_gb {size / 1e9:.4g}" for way, size in kept.items())


# dense bf16 TFLOP/s of one GPU, from NVIDIA's data sheets; the first name that fits counts
PEAK_TFLOPS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "H800": 989, "B200": 2250,
               "A100": 312, "A800": 312, "L40S": 362, "RTX 4090": 165}


def utilisation(vla: VLA, batch: dict, samples_per_second: float) -> dict[str, float]:
    """Model TFLOP/s of each GPU and, for GPUs we know, MFU: the share of its peak. Recomputation does not
    count as work. Without a GPU, nothing."""
    if not torch.cuda.is_available():
        return {}
    flops = training_flops(vla, batch["input_ids"].shape[1])
    values = {"tflops_per_gpu": samples_per_second * flops / dist.get_world_size() / 1e12}
    name = torch.cuda.get_device_name()
    peak = next((peak for gpu, peak in PEAK_TFLOPS.items() if gpu in name), None)
    return values | ({"mfu": values["tflops_per_gpu"] / peak} if peak else {})


def training_flops(vla: VLA, num_tokens: int) -> float:
    """Floating-point operations of one training sample with num_tokens of text, without recomputation.

    The usual count: for each weight of a matrix and each token 2 in the forward pass, 2 for the gradient of
    the input and 2 for that of the weight if it is trained; for attention, 4 x width x tokens^2 a block
    forward and twice that backward. A frozen tower has no backward pass: nothing before it is trained.
    Embedding tables are looked up, not multiplied; the LM head sees the action tokens only.
    """
    def weight_flops(p, trained=True):
        shape = getattr(p, "ds_shape", p.shape)  # ds_shape: where ZeRO-3 has left only slices
        return shape.numel() * (2 + trained * (2 + 2 * p.requires_grad)) if len(shape) > 1 else 0

    total = vla.num_images * vla.num_patches * sum(map(weight_flops, vla.projector.parameters()))
    total += weight_flops(vla.llm.get_output_embeddings().weight) * (vla.num_action_tokens + 1)
    for blocks, width, tokens, times, trained in stacks(vla, num_tokens):
        weights = sum(weight_flops(p, trained) for block in blocks for p in block.parameters())
        total += times * tokens * (weights + (4 + 8 * trained) * len(blocks) * width * tokens)
    return total
