"""Train a vision-language-action model with DeepSpeed ZeRO.

    deepspeed train_vla.py --config configs/demo.yaml --deepspeed_config ds_configs/zero2.json --set seed=8

The YAML says what is trained (TrainConfig below lists every key), the JSON how it is sharded. `train` is the
whole program: data, model, engine, then the loop. Running the same command again resumes from the newest
checkpoint. Also starts under torchrun, or as plain `python train_vla.py ...` on one device.
"""

import argparse
import dataclasses
import difflib
import fcntl
import inspect
import itertools
import json
import math
import os
import signal
import socket
import sys
import time
import traceback
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the DataLoader's workers are parallelism enough
# how far the host may run ahead of the GPU: the towers' backward pass is thousands of short kernels
os.environ.setdefault("CUDA_SCALE_LAUNCH_QUEUES", "4x")
# TensorBoard's own switch against importing TensorFlow where that is installed; some builds crash beside
# torch
sys.modules["tensorboard.compat.notf"] = types.ModuleType("tensorboard.compat.notf")

import deepspeed
import numpy as np
import psutil
import torch
import torch.distributed as dist
import yaml
from deepspeed.accelerator import get_accelerator
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from action_tokenizer import PROMPTS, load_tokenizer
from checkpoint import (
    CheckpointError,
    CheckpointReader,
    checkpoint_step,
    list_checkpoints,
    load_checkpoint,
    optimizers,
    save_checkpoint,
    set_optimizer_step,
    set_tensors,
)
from data import BOUNDS, Mixture, TrainBatches, contact_sheet
from faults import Neighbour, Preemption, follow_rank, naming_step, patient_group, stop_if_not_finite
from model import VLA, llm_config
from rlds import DataError
from weights import Weights, open_language_model, open_weights, use_token


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


# ------------------------------------------------------------------------------------------------------------
# The program


def train(cfg: TrainConfig, ds_config: dict) -> None:
    """Train as configured, on every rank of the job, which start_job has connected."""
    rank, world_size, started = dist.get_rank(), dist.get_world_size(), time.time()
    accumulation = accumulation_steps(cfg, world_size)
    check_pretrained(cfg)
    use_token(cfg.hf_token)
    torch.manual_seed(cfg.seed)
    run_dir = prepare_run(cfg, world_size)
    log = Log(run_dir, rank)

    cfg, tokenizer, weights = start_from(cfg)
    mixture = Mixture(cfg, tokenizer)
    held_out = open_held_out(cfg, tokenizer, log)
    dist.barrier(patient_group())  # one machine may have been indexing its copy of the data for hours
    cfg.action_dim, cfg.proprio_dim = mixture.action_dim, mixture.proprio_dim
    steps_per_epoch = math.ceil(mixture.epoch_length / cfg.global_batch_size)
    total_steps = cfg.max_steps or cfg.epochs * steps_per_epoch

    checkpoint, start_step = starting_point(cfg, mixture, run_dir)
    dataset = TrainBatches(mixture, cfg.global_batch_size, cfg.per_device_batch_size, rank, world_size)
    micro_batches = range(start_step * accumulation, total_steps * accumulation)
    # fork the workers while this process is small: what they share with it is copied once it changes, and an
    # optimizer in host memory changes at every step
    batches = make_loader(dataset, cfg.num_workers, micro_batches)

    engine = make_engine(cfg, with_yaml_values(ds_config, cfg, accumulation), tokenizer, weights, log)
    set_weights(engine, checkpoint, weights, log)
    log.resume_at(start_step)
    if rank == 0:
        save_run_description(cfg, ds_config, mixture, run_dir)
    log.mixture(mixture, steps_per_epoch)
    log.line(f"batch {cfg.global_batch_size} per_device {cfg.per_device_batch_size} ranks {world_size} "
             f"accumulation {accumulation} zero_stage {engine.zero_optimization_stage()} "
             f"total_steps {total_steps} startup_s {time.time() - started:.1f}")

    preemption = Preemption()
    metrics = Metrics(mixture.names, engine.device, mixture.action_tokenizer)
    baseline = most_frequent_tokens(mixture, cfg.eval_samples) if held_out else None
    for step in tqdm(range(start_step, total_steps), "train", initial=start_step, total=total_steps,
                     unit="step", disable=rank != 0):
        lr = learning_rate(cfg, step, total_steps)
        set_learning_rate(engine, lr)
        done, losses = step + 1, []
        with naming_step(done):
            for micro in range(accumulation):
                waited = time.perf_counter()
                batch = next(batches)
                metrics.data_seconds += time.perf_counter() - waited
                if step == start_step and micro == 0 and rank == 0:
                    log.first_batch(batch, mixture)
                loss, predicted, true = engine(**to_device(batch, engine.device))
                engine.backward(loss)
                losses.append(loss.detach())
                metrics.add(loss, predicted, true, batch["dataset"])
                grad_norm = optimizer_step(engine)

        epoch = done * cfg.global_batch_size // mixture.epoch_length
        last, stop = done == total_steps, preemption.requested()
        save = stop or (cfg.save_interval and (last or done % cfg.save_interval == 0))
        look = held_out and not stop and (last or (cfg.eval_interval and done % cfg.eval_interval == 0))
        # a step is skipped when its gradients are not finite; then training ends below
        if save or look or last or done % cfg.log_interval == 0 or engine.skipped_steps:
            values = {"epoch": epoch, "learning_rate": lr, "grad_norm": float(grad_norm), **metrics.read(cfg)}
            values |= utilisation(engine.module, batch, values["samples_per_second"])
            log.metrics(done, values)
            stop_if_not_finite(values, losses, done, dataset)
        if save:
            tag = f"step-{done:06d}-epoch-{epoch:02d}-loss={average(loss):.4f}"
            save_or_warn(engine, cfg, run_dir, tag, {"step": done, "epoch": epoch}, log, must=last or stop)
        if look:
            with naming_step(done):
                log.metrics(done, evaluate(engine, held_out, cfg, baseline))
        if save or look:
            metrics.start_clock()
        if stop and not last:
            log.line(f"stopped by {preemption.reason or 'a signal to another rank'} at step {done} of "
                     f"{total_steps}: start the same command again to continue")
            break
    else:
        log.line(f"done steps {total_steps} seconds {time.time() - started:.0f} run {run_dir}")
    preemption.close()
    engine.destroy()


def start_from(cfg: TrainConfig) -> tuple[TrainConfig, PreTrainedTokenizerBase, Weights | None]:
    """Open the tokenizer and the weights to begin with, if any. From them comes what the config leaves unsaid
    of the model's shape; it then describes its language model itself."""
    weights, where = None, cfg.pretrained_checkpoint or cfg.base_vlm
    if where is not None:
        weights = open_weights(where)
        shape = ("vision_backbone", "llm_backbone", "tokenizer", "add_action_tokens", "arch_specifier",
                 "prompt_style", "image_size")
        unsaid = {key for key in shape if key in weights.config} - cfg.stated
        cfg = dataclasses.replace(cfg, **{key: weights.config[key] for key in unsaid})
    tokenizer = load_tokenizer(cfg.tokenizer, cfg.add_action_tokens)
    if cfg.pretrained_backbones:
        weights = open_language_model(cfg.llm_backbone, len(tokenizer))
    whole = llm_config(cfg.llm_backbone, len(tokenizer)).to_json_string()
    return dataclasses.replace(cfg, llm_backbone=json.loads(whole)), tokenizer, weights


def make_engine(cfg: TrainConfig, ds_config: dict, tokenizer, weights: Weights | None, log):
    """The model with its trainable parameters chosen, sharded by DeepSpeed as the JSON says."""
    vla = build_model(cfg, tokenizer, ds_config, weights)
    stage = vla.freeze(cfg.freeze_vision_backbone, cfg.freeze_llm_backbone, cfg.unfreeze_last_llm_layer)
    if cfg.compile:
        vla.compile_blocks()
    if "activation_checkpointing" in ds_config:
        vla.recompute_activations()
    count, trainable = vla.count_parameters()
    log.line(f"model stage {stage} parameters {count / 1e6:.3f}M trainable {trainable / 1e6:.3f}M")
    groups = parameter_groups(vla, cfg.weight_decay)
    engine, *_ = deepspeed.initialize(model=vla, model_parameters=groups, config=ds_config)
    set_optimizer_step(engine, 0)
    if engine.zero_optimization_stage() == 2:
        keep_large_gradients(engine.optimizer)
        spare_passes(engine.optimizer)
    elif engine.zero_optimization_stage() == 3:
        stage_weights(engine.optimizer)
    return engine


def build_model(cfg: TrainConfig, tokenizer, ds_config: dict, weights: Weights | None) -> VLA:
    """The model, on the GPU. Its weights are random, and `weights` are put in place once it is sharded; so
    under ZeRO-3 the language model may be sharded as it is made, and never stands whole anywhere."""
    if cfg.pretrained_backbones:
        towers = {name: tower | {"pretrained": True} for name, tower in cfg.vision_backbone.items()}
        cfg = dataclasses.replace(cfg, vision_backbone=towers)
    stage = ds_config.get("zero_optimization", {}).get("stage")
    sharded = stage == 3 and (weights or cfg.pretrained_backbones)
    with torch.device(get_accelerator().current_device_name()):
        vla = VLA(cfg, tokenizer, deepspeed.zero.Init(config_dict_or_path=ds_config) if sharded else None)
        if sharded:
            # zero.Init makes everything in bf16, also the rotary frequencies, which must not be rounded ...
            vla.llm.base_model.rotary_emb = type(vla.llm.base_model.rotary_emb)(vla.llm.config)
            for param in vla.parameters():  # ... and DeepSpeed assumes that the towers were, too
                param.data = param.data.to(next(vla.llm.parameters()).dtype)
    return vla


def to_device(batch: dict, device) -> dict:
    """The tensors the model takes, on the GPU; from pinned memory the copy overlaps with computation."""
    return {key: value.to(device, non_blocking=True) for key, value in batch.items() if key != "dataset"}


def make_loader(dataset: TrainBatches, num_workers: int, micro_batches: range):
    """Iterator over this rank's micro-batches with these numbers, loaded ahead by worker processes."""
    workers = {"num_workers": num_workers, "generator": torch.Generator()}  # the global one makes the weights
    if num_workers:
        workers |= {"persistent_workers": True, "prefetch_factor": 4, "multiprocessing_context": "fork",
                    "worker_init_fn": follow_rank}
    batches = iter(torch.utils.data.DataLoader(dataset, batch_size=None, sampler=micro_batches,
                                               pin_memory=torch.cuda.is_available(), **workers))
    # a worker's death is an error when its batch is asked for; PyTorch's handler could also raise it while a
    # checkpoint is being written
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return batches


def learning_rate(cfg: TrainConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0), as transformers' schedules under OpenVLA."""
    if cfg.lr_scheduler_type == "constant":
        return cfg.learning_rate
    warmup = int(total_steps * cfg.warmup_ratio)
    if step < warmup:
        return cfg.learning_rate * step / max(1, warmup)
    progress = (step - warmup) / max(1, total_steps - warmup)
    return cfg.learning_rate * max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))


def set_learning_rate(engine, lr: float) -> None:
    """For the next step, in every optimizer there is."""
    for group in (group for optimizer in optimizers(engine) for group in optimizer.param_groups):
        group["lr"] = lr


def parameter_groups(vla: VLA, weight_decay: float) -> list[dict]:
    """Trainable parameters in two groups: matrices, which decay, and biases and norms, which do not."""
    named = [(name, p) for name, p in vla.named_parameters() if p.requires_grad]
    plain = {name for name, p in named if p.ndim <= 1 or name.endswith(".bias")}
    groups = [{"params": [p for name, p in named if name not in plain], "weight_decay": weight_decay},
              {"params": [p for name, p in named if name in plain], "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def keep_large_gradients(zero) -> None:
    """A gradient of more than `reduce_bucket_size` elements, say of an embedding of 128,000 words, is summed
    outside of ZeRO-2's buckets. With `overlap_comm`, DeepSpeed then frees it while the GPUs still sum it, and
    PyTorch would put the next tensor there: here its memory stays until they are done."""
    def keep(gradient, stream):
        if gradient.is_cuda and gradient.numel() > zero.reduce_bucket_size:
            gradient.record_stream(stream)

    if zero.overlap_comm and not zero.cpu_offload:
        override(zero, {"_record_gradient_stream": keep})


def spare_passes(zero) -> None:
    """Pass over gradients less often, where ZeRO-2 keeps a rank's in flat float32 tensors and PyTorch's fused
    AdamW steps on them. What is computed stays the same.

    DeepSpeed divides gradients by the number of ranks, makes a float32 copy of each to add it up, reads each
    to find overflow, copies it to float64 for the norm, and clips. Here they are added up as they come and
    read once for their norm, which shows overflow as well, and AdamW divides them as it reads them. A step of
    the 7B on two H200 takes 0.82 s instead of 1.00 s.
    """
    adamw, world_size = zero.optimizer, dist.get_world_size()
    fused = isinstance(adamw, torch.optim.AdamW) and adamw.defaults["fused"]
    summed_apart = (zero.dtype, zero.gradient_accumulation_dtype) == (torch.bfloat16, torch.float32)
    if not fused or not summed_apart or zero.cpu_offload:
        return

    def norm_of_mean():
        sums = [group.flat_partition for group in zero.averaged_gradients.values()]
        pieces = [piece for total in sums for piece in total.split(1 << 30)]  # PyTorch counts with 32 bits
        square = torch.nn.utils.get_total_norm(pieces).square()
        dist.all_reduce(square)
        return square.sqrt() / world_size

    def average_and_clip(_, norm):
        clip = ((norm + 1e-6) / zero.clip_grad).clamp(min=1) if zero.clip_grad else torch.ones_like(norm)
        adamw.grad_scale = clip * world_size

    override(zero, {
        "gradient_average": False, "check_overflow": lambda *_, **__: None,
        "_add_to_grad_partition_buffer": lambda sums, gradient: sums is None or sums.add_(gradient),
        "scaled_global_norm": norm_of_mean, "unscale_and_clip_grads": average_and_clip})


def stage_weights(zero) -> None:
    """Bring weights that ZeRO-3 stepped on in host memory to the GPU by way of pinned memory. DeepSpeed
    rounds each group into new memory, which the GPU reads slowly: the 60 % of a 7B that
    ds_configs/zero3_partial_offload.json keeps on the host take 2 s, and 0.5 s here."""
    full, rounded = zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat
    crossing = {group: weights.numel() for group, weights in enumerate(full)
                if weights.numel() and weights.is_cpu and getattr(rounded[group], "is_cuda", False)}
    if not crossing:
        return
    pinned = torch.empty(max(crossing.values()), dtype=zero.dtype, pin_memory=True)

    def by_way_of_pinned(group):
        if group in crossing:
            rounded[group].copy_(pinned[: crossing[group]].copy_(full[group].data))
            zero._unflatten_partitioned_parameters(group)
        else:
            type(zero)._reassign_or_swap_out_partitioned_parameters(zero, group)

    override(zero, {"_reassign_or_swap_out_partitioned_parameters": by_way_of_pinned})


def override(zero, ours: dict) -> None:
    """Put `ours` where DeepSpeed has its own. Raises ValueError when a version has none of that name, since
    wrong weights would go unseen."""
    for name, value in ours.items():
        if not hasattr(zero, name):
            raise ValueError(f"DeepSpeed {deepspeed.__version__} has no {name}, which is replaced here: "
                             "install deepspeed==0.19.8, or train with ds_configs/zero1.json")
        setattr(zero, name, value)


def optimizer_step(engine) -> torch.Tensor:
    """engine.step(), which at the end of an accumulation updates the weights -> norm of the gradients
    before clipping."""
    norm = None
    plain = not (engine.zero_optimization() or engine.bfloat16_enabled())
    if plain and engine.is_gradient_accumulation_boundary():  # there, DeepSpeed neither reports nor checks it
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        engine.skipped_steps += not math.isfinite(norm)
    engine.step()
    return engine.get_global_grad_norm() if norm is None else norm


@torch.no_grad()
def evaluate(engine, held_out: Mixture, cfg: TrainConfig, baseline: np.ndarray) -> dict:
    """Loss, accuracy and L1 on held-out frames (always the same ones), and the accuracy of always
    answering with the training data's most frequent bin of each action dimension."""
    world_size = dist.get_world_size()
    samples = min(cfg.eval_samples, int(held_out.sizes.sum()))
    micro_batches = range(math.ceil(samples / (cfg.per_device_batch_size * world_size)))
    batch_size = cfg.per_device_batch_size
    dataset = TrainBatches(held_out, batch_size * world_size, batch_size, dist.get_rank(), world_size)
    metrics = Metrics(held_out.names, engine.device, engine.module.action_tokenizer)
    constant = torch.from_numpy(baseline).to(engine.device)
    guessed = torch.zeros(2, device=engine.device)
    engine.eval()
    for batch in make_loader(dataset, cfg.num_workers, micro_batches):
        loss, predicted, true = engine(**to_device(batch, engine.device))
        metrics.add(loss, predicted, true, batch["dataset"])
        guessed += torch.stack([(true == constant).sum(), torch.tensor(true.numel(), device=engine.device)])
    engine.train()
    dist.all_reduce(guessed)
    values = {f"eval/{key}": value for key, value in metrics.read(cfg).items()
              if key.split("/")[0] in ("loss", "accuracy", "l1")}
    return values | {"eval/accuracy_of_most_frequent_bin": float(guessed[0] / guessed[1])}


def most_frequent_tokens(mixture: Mixture, samples: int) -> np.ndarray:
    """The most frequent id of each action token over the first training samples: the answer that knows no
    image."""
    dataset, rows, _ = mixture.draw(0, samples)
    actions = np.concatenate([mixture.actions(d, rows[dataset == d]) for d in np.unique(dataset)])
    tokens = mixture.action_tokenizer.encode(actions.reshape(samples, -1))
    return np.array([np.bincount(column).argmax() for column in tokens.T])


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


class Metrics:
    """Sums since the last reading, kept on the device so that the loop never waits for them."""

    def __init__(self, names: list[str], device: torch.device, action_tokenizer):
        self.names, self.action_tokenizer = names, action_tokenizer
        # a row per dataset: tokens, correct, L1; then one: batches, loss
        self.sums = torch.zeros(len(names) + 1, 3, device=device)
        self.start_clock()

    def start_clock(self) -> None:
        """Begin timing here: saving and evaluating are no part of a step."""
        self.started, self.data_seconds = time.perf_counter(), 0.0

    @torch.no_grad()
    def add(self, loss, predicted, true, dataset) -> None:
        """loss: scalar; predicted, true: action token ids (B, T); dataset: numbers (B,) on the host."""
        bins = self.action_tokenizer.bin_index(predicted) - self.action_tokenizer.bin_index(true)
        l1 = bins.abs() * (2 / (self.action_tokenizer.n_bins - 1))  # the distance of two bin centres
        values = torch.stack([torch.ones_like(l1), predicted == true, l1], dim=-1).sum(1).float()  # (B, 3)
        self.sums.index_add_(0, dataset.to(self.sums.device, non_blocking=True), values)
        self.sums[-1, 0] += 1
        self.sums[-1, 1] += loss.detach()

    def read(self, cfg: TrainConfig) -> dict:
        """Averages over all ranks since the last reading, which waits for the device; then start again
        from zero."""
        dist.all_reduce(self.sums)
        *datasets, (batches, loss, _) = self.sums.tolist()
        seconds = time.perf_counter() - self.started
        tokens, correct, l1 = np.sum(datasets, axis=0)
        steps = batches * cfg.per_device_batch_size / cfg.global_batch_size
        values = {"loss": loss / batches, "accuracy": correct / tokens, "l1": l1 / tokens,
                  "step_seconds": seconds / steps, "data_seconds": self.data_seconds / steps,
                  "samples_per_second": steps * cfg.global_batch_size / seconds}
        if torch.cuda.is_available():
            values["gpu_gb"] = torch.cuda.max_memory_allocated() / 1e9
        values["host_gb"] = psutil.Process().memory_info().rss / 1e9
        if len(self.names) > 1:
            for name, (n, c, d) in zip(self.names, datasets, strict=True):
                if n:
                    values |= {f"accuracy/{name}": c / n, f"l1/{name}": d / n}
        self.sums.zero_()
        self.start_clock()
        return values


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


# ------------------------------------------------------------------------------------------------------------
# Run directory


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


def open_held_out(cfg: TrainConfig, tokenizer, log: Log) -> Mixture | None:
    """The mixture's held-out frames, or None when a dataset has none."""
    try:
        return Mixture(cfg, tokenizer, train=False)
    except DataError as error:
        log.line(f"warning: no evaluation: {error}")
        return None


# ------------------------------------------------------------------------------------------------------------
# Configuration


def accumulation_steps(cfg: TrainConfig, world_size: int) -> int:
    """Micro-batches per optimizer step and rank: the global batch is fixed, the number of GPUs is not."""
    if cfg.expected_world_size not in (None, world_size):
        raise ValueError(f"expected_world_size is {cfg.expected_world_size}, but the job has {world_size} "
                         "ranks: start it on as many GPUs, or remove expected_world_size")
    together = cfg.per_device_batch_size * world_size
    steps, rest = divmod(cfg.global_batch_size, together)
    if rest or not steps:
        raise ValueError(f"global_batch_size {cfg.global_batch_size} is not a multiple of "
                         f"per_device_batch_size {cfg.per_device_batch_size} x {world_size} ranks = "
                         f"{together}: change one of them")
    return steps


def with_yaml_values(ds_config: dict, cfg: TrainConfig, accumulation: int) -> dict:
    """The JSON plus what the YAML says. The learning rate is set before every step; 0 makes DeepSpeed's own
    initialising step harmless."""
    params = {**ds_config["optimizer"].get("params", {}), "lr": 0.0, "weight_decay": cfg.weight_decay}
    return {**ds_config, "optimizer": {**ds_config["optimizer"], "params": params},
            "train_micro_batch_size_per_gpu": cfg.per_device_batch_size,
            "gradient_accumulation_steps": accumulation, "gradient_clipping": cfg.max_grad_norm,
            "steps_per_print": 1 << 60}


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


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", type=Path, required=True, help="what is trained: a YAML file")
    parser.add_argument("--deepspeed_config", type=Path, default=Path("ds_configs/zero2.json"),
                        help="how it is sharded: a DeepSpeed JSON")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="key=value",
                        help="override keys of the YAML")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the launcher passes it; LOCAL_RANK is used
    args = parser.parse_args()
    try:
        cfg, ds_config = load_config(args.config, args.set), load_ds_config(args.deepspeed_config)
        neighbour = start_job()
        train(cfg, ds_config)
        neighbour.release()
    except (ValueError, CheckpointError, FloatingPointError, OSError) as error:  # DataError is a ValueError
        print(f"\nerror: {error}", file=sys.stderr, flush=True)  # below the progress bar
        os._exit(1)  # at once: other ranks may be waiting in a collective, and find that this one has gone
    except Exception:
        time.sleep(2)  # if it failed because another rank ended, Neighbour ends this one first, in one line
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    dist.destroy_process_group()


def start_job() -> Neighbour:
    """Connect the ranks, under any launcher or none."""
    if "RANK" not in os.environ:  # plain python: a job of one
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.setdefault("MASTER_PORT", "0")  # any free one
    # an extension for CPUs that training has no use for: it takes a minute to compile, and a job killed
    # meanwhile leaves a lock behind at which all later ones wait for ever
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))  # DeepSpeed does it after the model is made
    deepspeed.init_distributed()
    share_cores()
    return Neighbour()


def share_cores() -> None:
    """Divide CPU cores among the ranks that may use the same ones, unless OMP_NUM_THREADS says how many each
    takes: an optimizer in host memory is as fast as its threads. PyTorch would count cores when it first
    needs one; by then, the DataLoader's thread that pins memory has set the number to 1."""
    mine, ranks = (socket.gethostname(), os.sched_getaffinity(0)), [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine, group=patient_group())
    sharing = 1 if "OMP_NUM_THREADS" in os.environ else ranks.count(mine)
    torch.set_num_threads(max(1, torch.get_num_threads() // sharing))


if __name__ == "__main__":
    main()
