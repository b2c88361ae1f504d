"""Train a vision-language-action model with DeepSpeed ZeRO.

    deepspeed train_vla.py --config configs/demo.yaml --deepspeed_config ds_configs/zero2.json --set seed=8

The YAML says what is trained (config.py lists every key), the JSON how it is sharded. `train` is the whole
program: data, model, engine, then the loop. Running the same command again resumes from the newest
checkpoint. Also starts under torchrun, or as plain `python train_vla.py ...` on one device.
"""

import contextlib
import logging
import math
import os
import signal
import time
import warnings
from functools import partial

from machinery.command_line import from_command_line
from machinery.config import FILLED_IN, TrainConfig, UserError, exit_with_one_line
from machinery.oxe import find_datasets

if __name__ == "__main__":
    with exit_with_one_line():  # what is wrong with YAML, JSON and data, before PyTorch is imported for seconds
        find_datasets(from_command_line(__doc__)[0])
if os.environ.get("RANK", "0") != "0":  # what libraries warn of, rank 0 says for all
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)

import deepspeed
import numpy as np
import psutil
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from data import Mixture, TrainBatches, most_frequent_tokens, open_tables
from machinery.checkpoint import load_checkpoint
from machinery.frames import DataError
from machinery.lora import add_adapters, linear_layers
from machinery.ranks import Preemption, follow_rank, naming_step, patient_group, run_job, stop_if_not_finite
from machinery.run import Run, memory_if, memory_needed, utilisation
from machinery.weights import Weights, describe_base, fill, parameters_without_memory, start_from
from machinery.zero import (
    adapt,
    build_sharded,
    check_json,
    describe_parameters,
    gather_per_block,
    optimizer_step,
    set_learning_rate,
    set_tensors,
)
from model import VLA

# ---- The program -------------------------------------------------------------------------------------------


def train(cfg: TrainConfig, ds_config: dict) -> None:
    """Train as configured, on every rank of the job, which start_job has connected."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    accumulation = accumulation_steps(cfg, world_size)
    torch.manual_seed(cfg.seed)
    run = Run(cfg)  # its directory, its log, and its newest checkpoint, from which it continues
    open_tables(run.cfg)  # what is wrong with the data is said before gigabytes of weights are fetched
    cfg, tokenizer, weights = start_from(run.cfg, run.checkpoint)
    mixture, held_out = open_data(cfg, tokenizer, run)
    cfg = cfg.model_copy(update={key: getattr(mixture, key) for key in FILLED_IN})
    total_steps = cfg.max_steps or cfg.epochs * math.ceil(mixture.epoch_length / cfg.global_batch_size)
    if run.step >= total_steps:
        return run.line(f"already at step {run.step} of {total_steps}: set max_steps or run_id to train on")
    # what batch k holds is a function of (seed, k): to continue, one begins to count at another k
    dataset = TrainBatches(mixture, cfg.global_batch_size, cfg.per_device_batch_size, rank, world_size)
    # its workers fork now, while this process is small: memory that it changes later is copied for each
    batches = make_loader(dataset, cfg.num_workers,
                          range(run.step * accumulation, total_steps * accumulation))
    engine = make_engine(cfg, ds_config, tokenizer, weights, run)
    run.describe(cfg, ds_config, mixture)
    preemption, metrics = Preemption(), Metrics(mixture.names, engine.device, mixture.action_tokenizer)
    baseline = None
    if held_out:
        baseline = most_frequent_tokens(mixture, *mixture.draw(0, min(cfg.eval_samples, 10**6))[:2])

    for step in run.steps(total_steps):
        set_learning_rate(engine, lr := learning_rate(cfg, step, total_steps))
        done, losses = step + 1, []
        with naming_step(done):
            for _ in range(accumulation):
                batch = metrics.timed(batches)
                if step == run.step and not losses:
                    run.first_batch(batch, mixture)
                loss, predicted, true = engine(**to_device(batch, engine.device))
                engine.backward(loss)  # DeepSpeed divides the loss by the accumulation, and sums gradients up
                losses.append(loss.detach())
                metrics.add(loss, predicted, true, batch["dataset"])
                # only after the last of them: average, clip, AdamW on float32 weights, copy to bf16
                grad_norm = optimizer_step(engine)

        last, stop = done == total_steps, preemption.requested()
        save = stop or (cfg.save_interval and (last or done % cfg.save_interval == 0))
        look = held_out and not stop and (last or (cfg.eval_interval and done % cfg.eval_interval == 0))
        # a step is skipped when its gradients are not finite; then training ends below
        if save or look or last or done % cfg.log_interval == 0 or engine.skipped_steps:
            values = {"epoch": done * cfg.global_batch_size // mixture.epoch_length, "learning_rate": lr,
                      "grad_norm": float(grad_norm), **metrics.read(cfg, total_steps - done)}
            values |= utilisation(engine.module, batch, values["samples_per_second"])
            run.metrics(done, values)
            stop_if_not_finite(values, losses, done, dataset)
        if save:
            run.save(engine, done, values["epoch"], values["loss"], must=last or stop)
        if look:
            with naming_step(done):
                run.metrics(done, evaluate(engine, held_out, cfg, baseline))
        if save or look:
            metrics.start_clock()
        if stop and not last:
            break
    run.end(done, total_steps, preemption.reason or "a signal to another rank")
    preemption.close()
    engine.destroy()


def accumulation_steps(cfg: TrainConfig, world_size: int) -> int:
    """Micro-batches per optimizer step and rank: the global batch is fixed, the number of GPUs is not."""
    if cfg.expected_world_size not in (None, world_size):
        raise UserError(f"expected_world_size is {cfg.expected_world_size}, but the job has {world_size} "
                        "ranks: start it on as many GPUs, or remove expected_world_size")
    together = cfg.per_device_batch_size * world_size
    steps, rest = divmod(cfg.global_batch_size, together)
    if rest or not steps:
        raise UserError(f"global_batch_size {cfg.global_batch_size} is not a multiple of "
                        f"per_device_batch_size {cfg.per_device_batch_size} x {world_size} ranks = "
                        f"{together}: change one of them")
    return steps


# ---- Data, model, engine -----------------------------------------------------------------------------------


def open_data(cfg: TrainConfig, tokenizer, run: Run) -> tuple[Mixture, Mixture | None]:
    """The mixture's training frames, and its held-out ones, if every dataset has some."""
    mixture, held_out = Mixture(cfg, tokenizer), None
    try:
        held_out = Mixture(cfg, tokenizer, train=False)
    except DataError as error:
        mixture.warnings.append(f"no evaluation: {error}")
    run.check_data(mixture)
    dist.barrier(patient_group())  # one machine may have been indexing its copy of the data for hours
    return mixture, held_out


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


def to_device(batch: dict, device) -> dict:
    """The tensors the model takes, on the GPU; from pinned memory the copy overlaps with computation."""
    return {key: value.to(device, non_blocking=True) for key, value in batch.items() if key != "dataset"}


def build_model(cfg: TrainConfig, tokenizer, ds_config: dict, weights: Weights | None) -> VLA:
    """The model, on the GPU, where its weights are random until `weights` are put in place. If a run begins
    with weights, its language model stands whole nowhere: ZeRO-3 shards it as it is made; else it takes no
    memory before `fill` reads it in the training's dtype."""
    given = {name.split(".")[0] for name in weights.tensors.shapes} if weights else ()
    new = "vision_backbone" not in given
    towers = {name: tower | {"pretrained": new and tower.get("pretrained", cfg.pretrained_backbones)}
              for name, tower in cfg.vision_backbone.items()}
    make = partial(VLA, cfg.model_copy(update={"vision_backbone": towers}), tokenizer)
    begun_with = cfg.base_vlm or cfg.pretrained_checkpoint or cfg.pretrained_backbones
    with torch.device(get_accelerator().current_device_name()):
        if begun_with and ds_config.get("zero_optimization", {}).get("stage") == 3:
            return build_sharded(make, ds_config)
        return make(parameters_without_memory()) if "llm_backbone" in given else make()


def make_engine(cfg: TrainConfig, ds_config: dict, tokenizer, weights: Weights | None, run: Run):
    """The model with its trainable parameters chosen, sharded by DeepSpeed as the JSON says, and filled."""
    ds_config = with_yaml_values(ds_config, cfg)
    vla = build_model(cfg, tokenizer, ds_config, weights)
    run.line(memory_if(vla))
    trained_parts = vla.freeze(cfg.freeze_vision_backbone, cfg.freeze_llm_backbone,
                               cfg.unfreeze_last_llm_layer)
    fresh = weights.tensors.check(vla) if weights else []  # modules that the weights lack
    if cfg.lora_rank:
        add_adapters(vla, cfg.lora_rank, cfg.lora_alpha, cfg.seed)
        trained_parts += f" lora_rank {cfg.lora_rank}"
    if cfg.rests_on_base and not run.checkpoint:
        run.base = describe_base(cfg.pretrained_checkpoint or cfg.base_vlm, weights.tensors)
    if filled := any(param.is_meta for param in vla.parameters()):
        dtype = torch.bfloat16 if ds_config.get("bf16", {}).get("enabled") else torch.float32
        device = get_accelerator().current_device_name()
        fill(vla, weights.tensors, device, dtype, linear_layers(vla) if cfg.frozen_weights else {})
    recompute = "activation_checkpointing" in ds_config
    if cfg.compile:
        vla.compile_blocks(recompute)
    elif recompute:
        vla.recompute_activations()
    if ds_config.get("zero_optimization", {}).get("stage") == 3:
        gather_per_block([*vla.vision_backbone.values(), *vla.llm.base_model.layers])
    run.line(memory_needed(vla, ds_config))
    # DeepSpeed makes the optimizer that the JSON names, over float32 copies of what is trained
    with contextlib.redirect_stdout(None):  # and would print 18 lines on memory: the lines above say it
        engine, *_ = deepspeed.initialize(model=vla, config=ds_config,
                                          model_parameters=parameter_groups(vla, cfg.weight_decay))
    for note in adapt(engine):
        run.line(note)
    count, trainable = vla.count_parameters()
    run.line(f"model {trained_parts} parameters {count / 1e6:.3f}M trainable {trainable / 1e6:.3f}M "
             f"zero_stage {engine.zero_optimization_stage()} ranks {dist.get_world_size()} "
             f"accumulation {ds_config['gradient_accumulation_steps']}")
    if weights and (cfg.rests_on_base or not run.checkpoint):
        set_tensors(engine, weights.tensors.read, ("weight",), frozen=not filled)
        run.line(f"weights_from {weights.tensors.where}" + (f" except {', '.join(fresh)}" if fresh else ""))
    if run.checkpoint:
        load_checkpoint(engine, run.checkpoint)  # weights, AdamW's two moments and its step count
        run.line(f"resumed {run.checkpoint.path} step {run.step}")
    if weights:
        weights.tensors = run.checkpoint = None  # they are read, and their files may be deleted now
    return engine


def with_yaml_values(ds_config: dict, cfg: TrainConfig) -> dict:
    """The JSON plus what the YAML says. The learning rate is set before every step; 0 makes DeepSpeed's own
    initialising step harmless."""
    params = {**ds_config["optimizer"].get("params", {}), "lr": 0.0, "weight_decay": cfg.weight_decay}
    optimizer = {**ds_config["optimizer"], "params": params}
    return {"steps_per_print": 1 << 60, **ds_config, "optimizer": optimizer,
            "train_micro_batch_size_per_gpu": cfg.per_device_batch_size,
            "gradient_accumulation_steps": accumulation_steps(cfg, dist.get_world_size()),
            "gradient_clipping": cfg.max_grad_norm}


def parameter_groups(vla: VLA, weight_decay: float) -> list[dict]:
    """Trainable parameters in two groups: matrices, which decay, and biases and norms, which do not."""
    named = [(name, p) for name, p in vla.named_parameters() if p.requires_grad]
    plain = {name for name, (shape, _) in describe_parameters(vla).items()
             if len(shape) <= 1 or name.endswith(".bias")}
    groups = [{"params": [p for name, p in named if name not in plain], "weight_decay": weight_decay},
              {"params": [p for name, p in named if name in plain], "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def learning_rate(cfg: TrainConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0), as transformers' schedules under OpenVLA."""
    if cfg.lr_scheduler_type == "constant":
        return cfg.learning_rate
    warmup = int(total_steps * cfg.warmup_ratio)
    if step < warmup:
        return cfg.learning_rate * step / max(1, warmup)
    progress = (step - warmup) / max(1, total_steps - warmup)
    return cfg.learning_rate * max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))


# ---- Numbers -----------------------------------------------------------------------------------------------


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

    def timed(self, batches) -> dict:
        """The next batch; waiting for it is counted."""
        asked = time.perf_counter()
        batch = next(batches)
        self.data_seconds += time.perf_counter() - asked
        return batch

    @torch.no_grad()
    def add(self, loss, predicted, true, dataset) -> None:
        """loss: scalar; predicted, true: action token ids (B, T); dataset: numbers (B,) on the host."""
        bins = self.action_tokenizer.bin_index(predicted) - self.action_tokenizer.bin_index(true)
        l1 = bins.abs() * (2 / (self.action_tokenizer.n_bins - 1))  # the distance of two bin centres
        values = torch.stack([torch.ones_like(l1), predicted == true, l1], dim=-1).sum(1).float()  # (B, 3)
        self.sums.index_add_(0, dataset.to(self.sums.device, non_blocking=True), values)
        self.sums[-1, 0] += 1
        self.sums[-1, 1] += loss.detach()

    def read(self, cfg: TrainConfig, steps_left: int = 0) -> dict:
        """Averages over all ranks since the last reading (it waits for the device); then begin from zero."""
        dist.all_reduce(self.sums)
        *datasets, (batches, loss, _) = self.sums.tolist()
        seconds = time.perf_counter() - self.started
        tokens, correct, l1 = np.sum(datasets, axis=0)
        steps = batches * cfg.per_device_batch_size / cfg.global_batch_size
        values = {"loss": loss / batches, "accuracy": correct / tokens, "l1": l1 / tokens,
                  "step_seconds": seconds / steps, "data_seconds": self.data_seconds / steps,
                  "samples_per_second": steps * cfg.global_batch_size / seconds,
                  "eta_seconds": steps_left * seconds / steps}
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


@torch.no_grad()
def evaluate(engine, held_out: Mixture, cfg: TrainConfig, baseline: np.ndarray) -> dict:
    """Loss, accuracy and L1 on held-out frames (always the same ones), and the accuracy of always
    answering with the training data's most frequent bin of each action dimension."""
    micro, ranks = cfg.per_device_batch_size, dist.get_world_size()
    micro_batches = range(math.ceil(min(cfg.eval_samples, int(held_out.sizes.sum())) / (micro * ranks)))
    dataset = TrainBatches(held_out, micro * ranks, micro, dist.get_rank(), ranks)
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


def main() -> None:
    """Command line."""
    with exit_with_one_line():
        cfg, ds_config = from_command_line(__doc__)
        check_json(ds_config)
    run_job(partial(train, cfg, ds_config))


if __name__ == "__main__":
    main()
