"""Train a vision-language-action model with DeepSpeed ZeRO.

    deepspeed train_vla.py --config configs/demo.yaml --deepspeed_config ds_configs/zero2.json

The YAML describes the training (docs/keys.md lists every key), the JSON how it is sharded
over GPUs. `train` is the whole program: data, model, engine, then the loop. The same command again
resumes from the newest checkpoint. torchrun starts it too, and plain `python` on one device.
"""

import contextlib
import io
import math

from machinery.command_line import parse_command_line

if __name__ == "__main__":  # mistakes and --help, before PyTorch is imported for seconds
    parse_command_line(__doc__)

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from data import Mixture, TrainBatches, make_loader, most_frequent_tokens, to_device
from machinery import zero
from machinery.checkpoint import load_checkpoint
from machinery.config import TrainConfig, UserError
from machinery.cost import gpu_memory, memory_needed, recomputes, utilization
from machinery.cuda_graph import capture_passes
from machinery.frames import DataError
from machinery.lora import add_adapters, linear_layers
from machinery.metrics import Metrics, evaluate
from machinery.oft import new_mixture, new_vla
from machinery.ranks import Preemption, run_job, stop_if_not_finite
from machinery.run import Run, settle
from machinery.weights import Weights, fill, parameters_without_memory
from model import VLA

# ---- The program ---------------------------------------------------------------------------------


def train(cfg: TrainConfig, ds_config: dict, run: Run, tables: list, tokenizer,
          weights: Weights | None) -> None:
    """Train, on every rank of the job. The arguments come from machinery.run.settle, which has
    filled in the keys that the YAML leaves open: cfg is final."""
    world_size = dist.get_world_size()
    accumulation = accumulation_steps(cfg, world_size)
    torch.manual_seed(cfg.seed)
    mixture, held_out = open_data(cfg, tables, tokenizer)
    total_steps = cfg.max_steps or cfg.epochs * math.ceil(
        mixture.epoch_length / cfg.global_batch_size)
    if run.step >= total_steps:
        run.line(f"already at step {run.step} of {total_steps}: raise max_steps to train on")
        return
    # batch k is a function of (seed, k), so resuming means counting from another k
    batches = TrainBatches(mixture, cfg.global_batch_size, cfg.per_device_batch_size,
                           dist.get_rank(), world_size)
    micro_batches = range(run.step * accumulation, total_steps * accumulation)
    # fork the workers now: pages this process touches later would be copied for each of them
    loader = make_loader(batches, cfg.num_workers, micro_batches)
    engine = make_engine(cfg, ds_config, accumulation, tokenizer, weights, run)
    run.describe(cfg, ds_config, mixture, held_out)
    preemption = Preemption()  # SIGTERM and the like
    metrics = Metrics(mixture.names, engine.device, mixture.action_tokenizer)
    dataset, rows, _ = mixture.draw(0, min(cfg.eval_samples, 10**6))  # enough for the baseline
    baseline = most_frequent_tokens(mixture, dataset, rows) if held_out else None

    for step in run.steps(total_steps):
        lr = scheduled_learning_rate(cfg, step, total_steps)
        zero.set_learning_rate(engine, lr)
        losses = []
        for _ in range(accumulation):
            batch = metrics.wait_for_batch(loader, step + 1)
            if step == run.step and not losses:  # the run's first micro-batch
                run.first_batch(batch, mixture)
            loss, predicted, true = engine(**to_device(batch, engine.device))
            engine.backward(loss)  # adds up gradients; DeepSpeed divides the loss by accumulation
            engine.step()  # acts after the last micro-batch: average, clip, AdamW, copy to bf16
            losses.append(loss.detach())
            metrics.add(loss, predicted, true, batch["dataset"])

        done = step + 1
        last = done == total_steps
        stop = preemption.requested()  # the same on all ranks, as what follows must be
        save_now = cfg.keep_checkpoints != "none" and (stop or due(cfg.save_interval, done, last))
        evaluate_now = held_out and not stop and due(cfg.eval_interval, done, last)
        log_now = save_now or evaluate_now or due(cfg.log_interval, done, last)
        if log_now or engine.skipped_steps:  # counts steps with NaN or infinite gradients
            values = {"epoch": done * cfg.global_batch_size // mixture.epoch_length,
                      "learning_rate": lr, "grad_norm": float(engine.get_global_grad_norm()),
                      **metrics.average(cfg, total_steps - done)}  # here the host waits for the GPU
            values |= utilization(engine.module, batch, values["samples_per_second"])
            run.log(done, values)
            stop_if_not_finite(values, losses, done, batches)  # ends the training
        if save_now:
            run.save(engine, done, values["epoch"], values["loss"], must=last or stop)
        if evaluate_now:
            run.log(done, evaluate(engine, held_out, cfg, baseline, done))
        if save_now or evaluate_now:
            metrics.start_clock()
        if stop and not last:
            break
    run.end(done, total_steps, preemption.reason or "a signal to another rank")
    preemption.close()
    engine.destroy()


def due(interval: int, done: int, last: bool) -> bool:
    """Is it time, after `done` steps? Always after the last; an interval of 0 means only then."""
    return last or (interval > 0 and done % interval == 0)


def accumulation_steps(cfg: TrainConfig, world_size: int) -> int:
    """Micro-batches per optimizer step and rank. The global batch is fixed, the GPUs are not."""
    if cfg.expected_world_size not in (None, world_size):
        raise UserError(f"expected_world_size is {cfg.expected_world_size}, the job has "
                        f"{world_size} ranks: start as many, or remove the key")
    micro_batch = cfg.per_device_batch_size * world_size
    if cfg.global_batch_size % micro_batch:
        raise UserError(f"global_batch_size {cfg.global_batch_size} is not a multiple of "
                        f"per_device_batch_size x ranks = {micro_batch}: change one of them")
    return cfg.global_batch_size // micro_batch


# ---- Data, model, engine -------------------------------------------------------------------------


def open_data(cfg: TrainConfig, tables: list, tokenizer) -> tuple[Mixture, Mixture | None]:
    """The mixture's training frames, and its held-out ones if every dataset has some."""
    mixture = new_mixture(cfg, tables, tokenizer)
    try:
        return mixture, new_mixture(cfg, tables, tokenizer, train=False)
    except DataError:
        return mixture, None


def make_engine(cfg: TrainConfig, ds_config: dict, accumulation: int, tokenizer,
                weights: Weights | None, run: Run):
    """Build the model, shard it with DeepSpeed as the JSON says, and load its weights."""
    ds_config = zero.with_yaml_values(ds_config, cfg, accumulation)
    vla = build_model(cfg, ds_config, tokenizer, weights, run)
    groups = zero.parameter_groups(vla, cfg.weight_decay)
    # in bf16, AdamW steps on float32 copies of the trained parameters; ZeRO divides these by rank
    with contextlib.redirect_stdout(io.StringIO()):  # it prints 18 lines about memory
        engine, *_ = deepspeed.initialize(model=vla, config=ds_config, model_parameters=groups)
    zero.correct_engine(engine)
    if cfg.zero_speed:
        from machinery import zero_speed  # faster parts for ZeRO-2 and 3; nothing else imports it
        for note in zero_speed.apply(engine):
            run.line(note)
    load_weights(engine, cfg, weights, run)
    return engine


def build_model(cfg: TrainConfig, ds_config: dict, tokenizer, weights: Weights | None,
                run: Run) -> VLA:
    """The model as DeepSpeed gets it: trained parameters chosen, blocks compiled or recomputed."""
    zero3 = ds_config.get("zero_optimization", {}).get("stage") == 3
    vla = make_vla(cfg, tokenizer, weights, zero3, ds_config)
    trained_parts = vla.freeze(cfg.freeze_vision_backbone, cfg.freeze_llm_backbone,
                               cfg.unfreeze_last_llm_layer)
    if weights:
        missing = weights.tensors.check(vla)  # modules that start with random weights
        if cfg.rests_on_base or not run.checkpoint:
            run.line(f"weights_from {weights.tensors.where}"
                     + (f" except {', '.join(missing)}" if missing else ""))
    if cfg.lora_rank:
        add_adapters(vla, cfg.lora_rank, cfg.lora_alpha, cfg.seed)
        trained_parts += f" lora_rank {cfg.lora_rank}"
    if weights and not zero3:  # ZeRO-3 reads them when the model is sharded
        dtype = torch.bfloat16 if ds_config.get("bf16", {}).get("enabled") else torch.float32
        in_8_bits = linear_layers(vla) if cfg.frozen_weights else {}
        fill(vla, weights.tensors, get_accelerator().current_device_name(), dtype, in_8_bits)
    recompute = recomputes(vla, ds_config, dist.get_world_size(), gpu_memory())
    if cfg.compile:
        vla.compile_blocks(recompute)
    elif recompute:
        vla.recompute_activations()
    capture_passes(vla, ds_config)  # LoRA and small models: Python launches a pass at once
    if zero3:
        zero.gather_per_block([*vla.vision_backbone.values(), *vla.llm.base_model.layers])
    run.line(memory_needed(vla, ds_config, dist.get_world_size()))
    count, trained = vla.count_parameters()
    run.line(f"model {trained_parts} parameters {count / 1e6:.3f}M trainable {trained / 1e6:.3f}M "
             f"ranks {dist.get_world_size()} "
             f"accumulation {ds_config['gradient_accumulation_steps']}")
    return vla


def make_vla(cfg: TrainConfig, tokenizer, weights: Weights | None, zero3: bool,
             ds_config: dict) -> VLA:
    """The model on the GPU, with random weights. If `weights` will replace them, the language
    model takes no memory for random ones: under ZeRO-3 each layer is sharded as soon as it is
    made, and otherwise matrices have no values until `fill` reads them in the training's dtype."""
    given = {name.split(".")[0] for name in weights.tensors.shapes} if weights else set()
    towers = {name: dict(tower) for name, tower in cfg.vision_backbone.items()}
    for tower in towers.values():
        wanted = tower.get("pretrained", cfg.pretrained_backbones)
        tower["pretrained"] = wanted and "vision_backbone" not in given
    cfg = cfg.model_copy(update={"vision_backbone": towers})
    with torch.device(get_accelerator().current_device_name()):
        if weights and zero3:
            return zero.build_sharded(lambda init: new_vla(cfg, tokenizer, init), ds_config)
        return new_vla(cfg, tokenizer, parameters_without_memory() if weights else None)


def load_weights(engine, cfg: TrainConfig, weights: Weights | None, run: Run) -> None:
    """Load the weights that training begins with, or a checkpoint, into the sharded engine."""
    if weights and (cfg.rests_on_base or not run.checkpoint):
        # without ZeRO-3, `fill` has read them already, but rounded to the training's dtype: give
        # AdamW's float32 copies the exact values. Under ZeRO-3, nothing has been read yet
        zero3 = engine.zero_optimization_stage() == 3
        zero.set_tensors(engine, weights.tensors.read, ("weight",), frozen=zero3)
    if run.checkpoint:
        load_checkpoint(engine, run.checkpoint)  # weights, AdamW's two moments and its step count
        run.line(f"resumed {run.checkpoint.path} step {run.step}")
    if weights:
        weights.tensors = run.checkpoint = None  # close their files, which may now be deleted


def scheduled_learning_rate(cfg: TrainConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0), as OpenVLA's, which are transformers'."""
    if cfg.lr_scheduler_type == "constant":
        return cfg.learning_rate / (10 if step >= (cfg.num_steps_before_decay or math.inf) else 1)
    warmup = int(total_steps * cfg.warmup_ratio)
    if step < warmup:
        return cfg.learning_rate * step / max(1, warmup)
    progress = (step - warmup) / max(1, total_steps - warmup)
    return cfg.learning_rate * max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))


def main() -> None:
    """Command line."""
    cfg, ds_config = parse_command_line(__doc__)
    zero.check_json(ds_config)
    run_job(lambda: train(**settle(cfg, ds_config)))


if __name__ == "__main__":
    main()
