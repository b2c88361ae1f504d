"""Train a vision-language-action model with DeepSpeed ZeRO.

    deepspeed train_vla.py --config configs/demo.yaml --deepspeed_config ds_configs/zero2.json --set seed=8

The YAML says what is trained (TrainConfig below lists every key), the JSON how it is sharded. `train` is the
whole program: data, model, engine, then the loop. Running the same command again resumes from the newest
checkpoint. Also starts under torchrun, or as plain `python train_vla.py ...` on one device.
"""

import argparse
import dataclasses
import json
import math
import os
import signal
import sys
import time
import traceback
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the DataLoader's workers are parallelism enough
# how far the host may run ahead of the GPU: the towers' backward pass is thousands of short kernels
os.environ.setdefault("CUDA_SCALE_LAUNCH_QUEUES", "4x")

import deepspeed
import numpy as np
import psutil
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from action_tokenizer import load_tokenizer
from checkpoint import CheckpointError
from config import TrainConfig, load_config, load_ds_config
from data import Mixture, TrainBatches
from model import VLA, llm_config
from ranks import Preemption, follow_rank, naming_step, patient_group, start_job, stop_if_not_finite
from rlds import DataError
from run import (
    Log,
    average,
    check_pretrained,
    prepare_run,
    save_or_warn,
    save_run_description,
    set_weights,
    starting_point,
    utilisation,
)
from weights import Weights, open_language_model, open_weights, use_token
from zero import (
    keep_large_gradients,
    optimizer_step,
    optimizers,
    set_optimizer_step,
    spare_passes,
    stage_weights,
)

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


# ------------------------------------------------------------------------------------------------------------
# Run directory


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


if __name__ == "__main__":
    main()
