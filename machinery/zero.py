"""Where DeepSpeed keeps each parameter, and the few places where we correct DeepSpeed.

The names used below are internals of DeepSpeed, checked with 0.19.8. Read find_slice first: it
shows where each ZeRO stage keeps a parameter. zero_speed.py replaces parts of DeepSpeed with faster
ones; nothing here depends on it.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.utils import set_z3_leaf_module

from machinery.compiler import build_adam
from machinery.config import TrainConfig, UserError, exit_with_one_line, one_line
from model import VLA

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state, besides the step count


@exit_with_one_line()
def check_json(ds_config: dict) -> None:
    """Build now what DeepSpeed would build from the JSON only after the data are indexed and the
    weights loaded. A mistake ends the program with DeepSpeed's or PyTorch's own message."""
    try:  # with any batch size: the YAML sets it, and DeepSpeed wants one
        zero = DeepSpeedConfig({**ds_config, "train_micro_batch_size_per_gpu": 1}).zero_config
    except Exception as error:
        raise UserError(f"--deepspeed_config: {one_line(error)[:300]}") from error

    params = dict(ds_config["optimizer"].get("params", {}))
    torch_adam = params.pop("torch_adam", False)
    for key in ("adam_w_mode", "bias_correction", "fp32_optimizer_states"):
        params.pop(key, None)  # only DeepSpeed's AdamW takes these
    try:
        torch.optim.AdamW([torch.zeros(1)], **params)
    except Exception as error:
        raise UserError(f"--deepspeed_config: optimizer.params: {one_line(error)}") from error

    # three mistakes that DeepSpeed accepts: nvme, which would fail at the first checkpoint,
    # offload_param below stage 3, which has no effect, and a ratio with PyTorch's AdamW
    for part in (zero.offload_optimizer, zero.offload_param):
        if part and part.device == "nvme":
            raise UserError("--deepspeed_config: device nvme: checkpoints need memory: use cpu")
    if zero.offload_param and zero.offload_param.device == "cpu" and zero.stage != 3:
        raise UserError("--deepspeed_config: offload_param: needs stage 3: remove it")
    if torch_adam and zero.offload_optimizer and zero.offload_optimizer.ratio < 1:
        raise UserError("--deepspeed_config: offload_optimizer.ratio: PyTorch's AdamW cannot be on "
                        "two devices: remove torch_adam and fused")
    build_adam(ds_config)


# ---- Where DeepSpeed keeps a parameter ---------------------------------------------------------


@dataclass
class Slice:
    """This rank's part of one trainable parameter.

    Elements [first, first + count) of the flattened parameter are elements [offset, offset + count)
    of `flat`, the float32 tensor that AdamW steps on. replicated: every rank has all of it.
    """

    flat: torch.Tensor
    offset: int
    first: int
    count: int
    replicated: bool = False

    def view(self, engine, kind: str) -> torch.Tensor:
        """kind "weight", "exp_avg" or "exp_avg_sq" -> a view (count,) of the live tensor."""
        # of two optimizers, the last one steps on the GPU
        state = optimizers(engine)[-1 if self.flat.is_cuda else 0].state[self.flat]
        if kind in MOMENTS and kind not in state:  # AdamW has not stepped yet
            state.update({moment: torch.zeros_like(self.flat.data) for moment in MOMENTS})
            state["step"] = torch.zeros((), device=self.flat.device)  # fused AdamW expects a tensor
        tensor = self.flat.data if kind == "weight" else state[kind]
        return tensor.view(-1).narrow(0, self.offset, self.count)


def find_slice(engine, param: torch.nn.Parameter) -> Slice | None:
    """This rank's part of a trainable parameter; None if it has none."""
    optimizer = engine.optimizer
    if hasattr(param, "ds_id"):  # ZeRO-3 cuts each parameter into equal slices, the last one padded
        group, offset, size = optimizer.grad_position[optimizer.get_param_id(param)]
        first = size * dist.get_rank()
        count = max(min(size, param.ds_numel - first), 0)
        flat = optimizer.fp32_partitioned_groups_flat[group]
        return Slice(flat, offset, first, count) if count else None

    if hasattr(param, "_hp_mapping"):  # ZeRO-1 and 2 put all parameters in a row and cut the row
        mapping = param._hp_mapping
        if mapping is None:
            return None
        flat = engine.basic_optimizer.param_groups[mapping.param_group_index]["params"][0]
        here = mapping.hp_fragment_address  # in the row
        there = mapping.lp_fragment_address  # in the parameter
        return Slice(flat, here.start, there.start, here.numel)

    flat = param  # stage 0 in float32 has only one copy ... (DeepSpeed says fp16 for bf16, too)
    groups = zip(getattr(optimizer, "fp32_groups", ()), getattr(optimizer, "fp16_groups", ()),
                 strict=True)
    for masters, weights in groups:  # ... in bf16 a float32 copy of each parameter
        for master, weight in zip(masters, weights, strict=True):
            if weight is param:
                flat = master
    return Slice(flat, 0, 0, param.numel(), replicated=True)


def optimizers(engine) -> list[torch.optim.Optimizer]:
    """The optimizer. If the JSON offloads a `ratio` of it, also the one that steps on the GPU."""
    backup = getattr(engine.optimizer, "backup_optimizer", None)
    return [engine.basic_optimizer, backup] if backup else [engine.basic_optimizer]


def set_optimizer_step(engine, step: int) -> None:
    """Set AdamW's step count, which its bias correction depends on. A new run needs it, too: while
    it initializes in bf16 stage 0, DeepSpeed counts a step (at learning rate 0)."""
    for optimizer in optimizers(engine):
        for state in optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"].fill_(step)
            elif "step" in state:
                state["step"] = step


def frozen_slice(param: torch.nn.Parameter) -> tuple[int, torch.Tensor]:
    """This rank's part of a frozen parameter, in its own dtype: (first element, flat view)."""
    if hasattr(param, "ds_id"):
        part = param.ds_tensor.data.view(-1)
        first = param.ds_tensor.numel() * dist.get_rank()
        return first, part[: max(min(len(part), param.ds_numel - first), 0)]
    first, stop = split_evenly(param.numel())
    return first, param.data.view(-1)[first:stop]


def split_evenly(n: int) -> tuple[int, int]:
    """This rank's share [first, stop) of n elements that every rank has."""
    rank = dist.get_rank()
    world = dist.get_world_size()
    return n * rank // world, n * (rank + 1) // world


def local_tensors(engine, frozen: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """("weight/<name>@<first>", flat tensor) for everything this rank writes to a checkpoint.
    frozen: include frozen parameters."""
    for name, param in engine.module.named_parameters():
        if not param.requires_grad:
            if frozen:
                first, part = frozen_slice(param)
                yield f"weight/{name}@{first}", part
            continue
        part = find_slice(engine, param)
        if part is None:
            continue
        start, stop = split_evenly(part.count) if part.replicated else (0, part.count)
        for kind in ("weight", *MOMENTS):
            yield f"{kind}/{name}@{part.first + start}", part.view(engine, kind)[start:stop]


def set_tensors(engine, read: Callable[..., torch.Tensor | None], kinds: tuple[str, ...],
                frozen: bool = True) -> None:
    """Fill a model that DeepSpeed has already sharded.

    read(parameter, start, stop, kind) returns elements [start, stop) of the flattened tensor in any
    dtype, or None to leave them (checkpoint.Tensors.read). It is asked only for the elements this
    rank owns, one tensor at a time, so host memory stays small. kinds: "weight" and, if known, the
    moments. frozen: also fill frozen parameters.
    """
    zero3 = engine.zero_optimization_stage() == 3
    if zero3:
        engine.optimizer.checkpoint_event_prologue()  # release parameters that stay gathered
    for name, param in engine.module.named_parameters():
        if not param.requires_grad:
            if frozen:
                set_frozen(name, param, read)
            continue
        part = find_slice(engine, param)
        if part is None:
            continue
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
        engine.optimizer.checkpoint_event_epilogue()  # gather them again
    elif hasattr(engine.optimizer, "update_lp_params"):
        engine.optimizer.update_lp_params()  # ZeRO-1, 2: bf16 weights from float32 slices


def set_frozen(name: str, param: torch.nn.Parameter, read: Callable) -> None:
    """Fill this rank's part of a frozen parameter; without ZeRO-3, each rank has all of it."""
    if hasattr(param, "ds_id"):
        first, part = frozen_slice(param)
    else:
        first, part = 0, param.data.view(-1)
    values = read(name, first, first + len(part), "weight")
    if values is not None:
        part.copy_(values)
        param.ds_secondary_tensor = None  # hpZ's copy: the next forward pass recreates it


def describe_parameters(module: torch.nn.Module) -> dict[str, tuple[list[int], bool]]:
    """{name: (full shape, is it trained?)}, even if ZeRO-3 has left only slices."""
    return {name: (list(getattr(param, "ds_shape", param.shape)), param.requires_grad)
            for name, param in module.named_parameters()}


def set_learning_rate(engine, lr: float) -> None:
    """Set it for the next step."""
    for optimizer in optimizers(engine):
        for group in optimizer.param_groups:
            group["lr"] = lr


# ---- Corrections -------------------------------------------------------------------------------


def build_sharded(make: Callable[[AbstractContextManager], VLA], ds_config: dict) -> VLA:
    """A VLA whose language model ZeRO-3 shards layer by layer while it is made, so that no rank
    ever holds all of it. make: VLA's constructor, which takes the context for making it."""
    vla = make(deepspeed.zero.Init(config_dict_or_path=ds_config))
    # zero.Init makes everything in bf16, including the rotary frequencies, which need float32 ...
    vla.llm.base_model.rotary_emb = type(vla.llm.base_model.rotary_emb)(vla.llm.config)
    for param in vla.parameters():  # ... and DeepSpeed assumes that the towers are in bf16, too
        param.data = param.data.to(next(vla.llm.parameters()).dtype)
    return vla


def gather_per_block(modules: list[torch.nn.Module]) -> None:
    """Let ZeRO-3 gather all weights of each module at once, by DeepSpeed's public setting: a
    gathering costs the host the same time however small it is."""
    for module in modules:
        set_z3_leaf_module(module, True)
        if any(param.requires_grad for param in module.parameters()):
            module.register_forward_pre_hook(need_gradient)


def need_gradient(module: torch.nn.Module, inputs: tuple) -> None:
    """DeepSpeed reduces a module's gradients, and frees its weights, once the gradient of its input
    arrives. An input that needs none (data, frozen layers) would trigger that too early, and
    DeepSpeed would reduce zeros."""
    inputs[0].requires_grad_()


def correct_engine(engine) -> None:
    """Correct a new engine: AdamW's step count, the norm without ZeRO, a race in ZeRO-2."""
    trained = [param for param in engine.module.parameters() if param.requires_grad]
    for param in trained:
        find_slice(engine, param)  # with another DeepSpeed: fail here, not at the first checkpoint
    set_optimizer_step(engine, 0)
    if not (engine.zero_optimization() or engine.bfloat16_enabled()):
        report_norm(engine)
    if engine.zero_optimization_stage() == 2:
        # a gradient larger than the bucket (Llama 3's embedding) is summed by itself. With
        # overlap_comm, DeepSpeed frees it while another stream is still summing it
        bucket_size = engine.optimizer.reduce_bucket_size
        if max(param.numel() for param in trained) > bucket_size:
            engine.optimizer.overlap_comm = False


def report_norm(engine) -> None:
    """Let engine.step() also set get_global_grad_norm() and skipped_steps, as in all other modes:
    in float32 without ZeRO DeepSpeed does neither, and step() clears the gradients."""
    step = engine.step

    def step_with_norm():
        if engine.is_gradient_accumulation_boundary():
            gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            engine._global_grad_norm = norm
            engine.skipped_steps += not math.isfinite(norm)
        step()

    engine.step = step_with_norm


# ---- What DeepSpeed is given ---------------------------------------------------------------------


def with_yaml_values(ds_config: dict, cfg: TrainConfig, accumulation: int) -> dict:
    """The JSON plus the values that the YAML sets."""
    # DeepSpeed takes a step of its own while it initializes, which a learning rate of 0 makes
    # harmless. Training sets the rate before every step
    params = {**ds_config["optimizer"].get("params", {}), "lr": 0.0,
              "weight_decay": cfg.weight_decay}
    return {"steps_per_print": 1 << 60, **ds_config,
            "optimizer": {**ds_config["optimizer"], "params": params},
            "train_micro_batch_size_per_gpu": cfg.per_device_batch_size,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": cfg.max_grad_norm}


def parameter_groups(vla: VLA, weight_decay: float) -> list[dict]:
    """Trainable parameters in two groups: matrices decay, biases and norms do not."""
    decayed, plain = [], []
    for name, p in vla.named_parameters():
        if p.requires_grad:
            shape = getattr(p, "ds_shape", p.shape)
            matrix = len(shape) > 1 and not name.endswith(".bias")
            (decayed if matrix else plain).append(p)
    groups = [{"params": decayed, "weight_decay": weight_decay},
              {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
