"""DeepSpeed's insides: where a parameter lives, and what is mended (what is made faster: zero_speed.py).

Checked with DeepSpeed 0.19.8, whose names below are no public interface. So: what would be wrong with another
version is refused.

Read find_slice first: where each ZeRO stage keeps a parameter. Then optimizer_step and adapt.
"""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils import set_z3_leaf_module
from pydantic import ValidationError

from machinery.config import UserError, first_problem
from machinery.zero_speed import make_faster, replace
from model import VLA

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state, besides the step count


def check_json(ds_config: dict) -> None:
    """Let DeepSpeed say what is wrong inside the JSON's sections. Raises UserError."""
    for section, model in (("bf16", DeepSpeedBF16Config), ("zero_optimization", DeepSpeedZeroConfig)):
        try:
            zero = model(**ds_config.get(section, {}))
        except ValidationError as error:
            raise UserError(f"--deepspeed_config: {section}: {first_problem(error)}") from None
    dry_run(ds_config, zero)
    group, ranks = zero.zero_hpz_partition_size, int(os.environ["WORLD_SIZE"])
    if group > 1 and (zero.stage != 3 or ranks % min(group, ranks)):
        raise UserError(f"--deepspeed_config: zero_hpz_partition_size: {group}: that is for stage 3, and "
                        f"for so many ranks (now {ranks}) or a multiple: write a machine's number of GPUs")


def dry_run(ds_config: dict, zero: DeepSpeedZeroConfig) -> None:
    """Raise UserError for what DeepSpeed and AdamW would find wrong only when the weights have been read."""
    params, partial = dict(ds_config["optimizer"].get("params", {})), zero.offload_optimizer
    optimizer, weights = (part and part.device for part in (partial, zero.offload_param))
    pytorch, dtype = params.pop("torch_adam", False), ds_config.get("data_types", {}).get("grad_accum_dtype")
    reasons = {
        f"data_types: grad_accum_dtype: {dtype}: write fp32": dtype not in (None, "fp32", "bf16", "fp16"),
        "device nvme: checkpoints are written from memory: write cpu": "nvme" in (optimizer, weights),
        "offload_param: only stage 3 does not keep every weight on every GPU: remove it, or choose stage 3":
            weights == "cpu" and zero.stage != 3,
        "offload_optimizer: ratio: PyTorch's AdamW cannot be in two places: remove torch_adam and fused":
            optimizer == "cpu" and partial.ratio < 1 and pytorch,
        "steps_per_print: 0: DeepSpeed divides by it: remove it": ds_config.get("steps_per_print") == 0}
    if why := [reason for reason, given in reasons.items() if given]:
        raise UserError(f"--deepspeed_config: {why[0]}")
    for key in ("adam_w_mode", "fp32_optimizer_states", *["bias_correction"] * (not pytorch)):
        params.pop(key, None)  # DeepSpeed's own
    where = "optimizer.params: "
    try:
        if not pytorch and (odd := params.keys() - {"betas", "eps"}):
            raise ValueError(f'{min(odd)}: only PyTorch\'s AdamW knows it: add "torch_adam": true')
        torch.optim.AdamW([torch.zeros(1)], **params)
        where = ""
        DeepSpeedConfig({**ds_config, "train_micro_batch_size_per_gpu": 1})
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        raise UserError(f"--deepspeed_config: {where}{' '.join(str(error).split())[:300]}") from error


# ---- Where DeepSpeed keeps a parameter ---------------------------------------------------------------------


@dataclass
class Slice:
    """This rank's part of one trainable parameter: elements [first, first + count) of it, flattened, live as
    elements [offset, offset + count) of `flat` (float32; AdamW's). replicated: every rank has all of it."""

    flat: torch.Tensor
    offset: int
    first: int
    count: int
    replicated: bool = False

    def view(self, engine, kind: str) -> torch.Tensor:
        """kind "weight", "exp_avg" or "exp_avg_sq" -> a view (count,) of the live tensor."""
        state = optimizers(engine)[-1 if self.flat.is_cuda else 0].state[self.flat]
        if kind in MOMENTS and kind not in state:  # AdamW has not stepped yet
            state.update({moment: torch.zeros_like(self.flat.data) for moment in MOMENTS})
            state["step"] = torch.zeros((), device=self.flat.device)  # a tensor: PyTorch's AdamW is fused
        tensor = self.flat.data if kind == "weight" else state[kind]
        return tensor.view(-1).narrow(0, self.offset, self.count)


def find_slice(engine, param: torch.nn.Parameter) -> Slice | None:
    """Where this rank keeps a trainable parameter's float32 weight and moments; None if it has no part."""
    optimizer = engine.optimizer
    if hasattr(param, "ds_id"):  # ZeRO-3: each parameter is cut into equal slices, the last one padded
        group, offset, size = optimizer.grad_position[optimizer.get_param_id(param)]
        first = size * dist.get_rank()
        count = max(min(size, param.ds_numel - first), 0)
        return Slice(optimizer.fp32_partitioned_groups_flat[group], offset, first, count) if count else None
    if hasattr(param, "_hp_mapping"):  # ZeRO-1 and 2: all parameters in a row, and the row is cut
        if (mapping := param._hp_mapping) is None:
            return None
        flat = engine.basic_optimizer.param_groups[mapping.param_group_index]["params"][0]
        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
        return Slice(flat, here.start, there.start, here.numel)
    flat = param  # stage 0 in float32
    for masters, weights in zip(getattr(optimizer, "fp32_groups", ()), getattr(optimizer, "fp16_groups", ()),
                                strict=True):  # stage 0 in bf16: float32 copies, one by one
        flat = next((m for m, weight in zip(masters, weights, strict=True) if weight is param), flat)
    return Slice(flat, 0, 0, param.numel(), replicated=True)


def optimizers(engine) -> list[torch.optim.Optimizer]:
    """The optimizer; and when the JSON offloads only a part (`ratio`), also that of the part on the GPU."""
    return [engine.basic_optimizer, *filter(None, [getattr(engine.optimizer, "backup_optimizer", None)])]


def set_optimizer_step(engine, step: int) -> None:
    """Set AdamW's step count, which its bias correction depends on. At the start of a run, too: in bf16 and
    stage 0 DeepSpeed makes a step of its own while it initialises (at learning rate 0, so it only counts)."""
    for state in (state for optimizer in optimizers(engine) for state in optimizer.state.values()):
        if isinstance(state.get("step"), torch.Tensor):
            state["step"].fill_(step)
        elif "step" in state:
            state["step"] = step


def frozen_slice(param: torch.nn.Parameter) -> tuple[int, torch.Tensor]:
    """This rank's part of a frozen parameter, in its own dtype: (first element, flat view)."""
    if hasattr(param, "ds_id"):
        part, first = param.ds_tensor.data.view(-1), param.ds_tensor.numel() * dist.get_rank()
        return first, part[: max(min(len(part), param.ds_numel - first), 0)]
    first, stop = split_evenly(param.numel())
    return first, param.data.view(-1)[first:stop]


def split_evenly(n: int) -> tuple[int, int]:
    """This rank's share of n elements that every rank has."""
    rank, world = dist.get_rank(), dist.get_world_size()
    return n * rank // world, n * (rank + 1) // world


def local_tensors(engine, frozen: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """("weight/<name>@<first>", flat tensor) of everything this rank should write; frozen: what is, too."""
    for name, param in engine.module.named_parameters():
        if not param.requires_grad:
            first, part = frozen_slice(param)
            yield from [(f"weight/{name}@{first}", part)] * frozen
        elif (part := find_slice(engine, param)) is not None:
            start, stop = split_evenly(part.count) if part.replicated else (0, part.count)
            for kind in ("weight", *MOMENTS):
                yield f"{kind}/{name}@{part.first + start}", part.view(engine, kind)[start:stop]


def set_tensors(engine, read: Callable[..., torch.Tensor | None], kinds: tuple[str, ...],
                frozen: bool = True) -> None:
    """Fill a model that DeepSpeed has already sharded. kinds: "weight" and, where known, the moments; frozen:
    not only what is trained.

    read(parameter, start, stop, kind) returns elements [start, stop) of the flattened tensor in any dtype, or
    None to leave it as it is (checkpoint.Tensors.read); it is asked only for what this rank owns, a tensor at
    a time, so that host memory stays small.
    """
    zero3 = engine.zero_optimization_stage() == 3
    if zero3:
        engine.optimizer.checkpoint_event_prologue()  # parameters that stay gathered go back to their slices
    for name, param in engine.module.named_parameters():
        if not param.requires_grad:
            first, part = frozen_slice(param) if zero3 else (0, param.data.view(-1))
            if frozen and (values := read(name, first, first + len(part), "weight")) is not None:
                part.copy_(values)
                param.ds_secondary_tensor = None  # hpZ's copy in the machine: the next pass makes it anew
        elif (part := find_slice(engine, param)) is not None:
            for kind in kinds:
                values = read(name, part.first, part.first + part.count, kind)
                if values is None:
                    continue
                part.view(engine, kind).copy_(values)
                if kind == "weight" and zero3:
                    param.ds_tensor.data.view(-1)[: part.count].copy_(values)
                elif kind == "weight" and part.replicated:
                    param.data.view(-1).copy_(values)
    if zero3:
        engine.optimizer.checkpoint_event_epilogue()  # and are gathered again
    elif hasattr(engine.optimizer, "update_lp_params"):
        engine.optimizer.update_lp_params()  # ZeRO-1 and 2: bf16 weights from the float32 slices of all ranks


def describe_parameters(module: torch.nn.Module) -> dict[str, tuple[list[int], bool]]:
    """{name: (shape, is it trained?)}, also where ZeRO-3 has left only slices."""
    return {name: (list(getattr(param, "ds_shape", param.shape)), param.requires_grad)
            for name, param in module.named_parameters()}


# ---- A step ------------------------------------------------------------------------------------------------


def set_learning_rate(engine, lr: float) -> None:
    """For the next step, in every optimizer there is."""
    for group in (group for optimizer in optimizers(engine) for group in optimizer.param_groups):
        group["lr"] = lr


def optimizer_step(engine) -> torch.Tensor:
    """engine.step(), which ends an accumulation by moving the weights -> gradients' norm before clipping."""
    norm = None
    plain = not (engine.zero_optimization() or engine.bfloat16_enabled())
    if plain and engine.is_gradient_accumulation_boundary():  # there, DeepSpeed neither reports nor checks it
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        engine.skipped_steps += not math.isfinite(norm)
    engine.step()
    return engine.get_global_grad_norm() if norm is None else norm


# ---- What is mended ----------------------------------------------------------------------------------------


def build_sharded(make: Callable[[AbstractContextManager], VLA], ds_config: dict) -> VLA:
    """A VLA whose language model ZeRO-3 divides layer by layer as it is made, so that it stands whole
    nowhere. make: VLA's constructor, given the context in which the language model is made."""
    vla = make(deepspeed.zero.Init(config_dict_or_path=ds_config))
    # zero.Init makes everything in bf16, also the rotary frequencies, which must not be rounded ...
    vla.llm.base_model.rotary_emb = type(vla.llm.base_model.rotary_emb)(vla.llm.config)
    for param in vla.parameters():  # ... and DeepSpeed assumes that the towers were, too
        param.data = param.data.to(next(vla.llm.parameters()).dtype)
    return vla


def gather_per_block(modules: list[torch.nn.Module]) -> None:
    """Let ZeRO-3 bring the weights of each of these at once, and not matrix by matrix: to ask for them costs
    the host as much, however small they are."""
    for module in modules:
        set_z3_leaf_module(module, True)
        if any(param.requires_grad for param in module.parameters()):
            module.register_forward_pre_hook(need_gradient)


def need_gradient(module: torch.nn.Module, inputs: tuple) -> None:
    """DeepSpeed takes a module's gradients, and lets its weights go, when that of its input is known.
    What comes from data or frozen layers needs none: then it would take zeros, before there are any."""
    inputs[0].requires_grad_()


def adapt(engine) -> list[str]:
    """Mend a new engine, and make it faster; returns what the log should say of it. Raises UserError when
    this version of DeepSpeed keeps parameters elsewhere."""
    try:
        for param in engine.module.parameters():
            if param.requires_grad:
                find_slice(engine, param)
        set_optimizer_step(engine, 0)
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"DeepSpeed {deepspeed.__version__} has other insides than 0.19.8 ({error!r}): pip "
                        "install deepspeed==0.19.8") from error
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    return (keep_large_gradients(zero) if stage == 2 else []) + make_faster(zero, stage)


def keep_large_gradients(zero) -> list[str]:
    """A gradient of more than `reduce_bucket_size` elements, say of an embedding of 128,000 words, is summed
    outside of ZeRO-2's buckets. With `overlap_comm`, DeepSpeed then frees it while the GPUs still sum it, and
    PyTorch would put the next tensor there: here its memory stays until they are done."""
    def keep(gradient, stream):
        if gradient.is_cuda and gradient.numel() > zero.reduce_bucket_size:
            gradient.record_stream(stream)

    if not zero.overlap_comm or zero.cpu_offload:
        return []
    return replace(zero, {"_record_gradient_stream": keep}, needed=True)


# ---- What DeepSpeed is given ---------------------------------------------------------------------


def with_yaml_values(ds_config: dict, cfg: TrainConfig, accumulation: int) -> dict:
    """The JSON plus the values that the YAML sets."""
    # the learning rate is set before every step; 0 makes a step of DeepSpeed's own harmless, which
    # it takes while it initializes
    params = {**ds_config["optimizer"].get("params", {}), "lr": 0.0,
              "weight_decay": cfg.weight_decay}
    return {"steps_per_print": 1 << 60, **ds_config,
            "optimizer": {**ds_config["optimizer"], "params": params},
            "train_micro_batch_size_per_gpu": cfg.per_device_batch_size,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": cfg.max_grad_norm}


def parameter_groups(vla: VLA, weight_decay: float) -> list[dict]:
    """Trainable parameters in two groups: matrices decay, biases and norms do not."""
    shapes = {name: shape for name, (shape, _) in describe_parameters(vla).items()}
    decayed, plain = [], []
    for name, p in vla.named_parameters():
        if p.requires_grad:
            matrix = len(shapes[name]) > 1 and not name.endswith(".bias")
            (decayed if matrix else plain).append(p)
    groups = [{"params": decayed, "weight_decay": weight_decay},
              {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
