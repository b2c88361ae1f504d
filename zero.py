"""All that knows DeepSpeed's insides: where a parameter lives, and what is replaced."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import deepspeed
import torch
import torch.distributed as dist

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state, besides the step count


@dataclass
class Slice:
    """This rank's part of one trainable parameter: elements [first, first + count) of it, flattened, live
    as elements [offset, offset + count) of `flat`, a float32 tensor the optimizer steps on. replicated:
    every rank has all of it."""

    flat: torch.Tensor
    offset: int
    first: int
    count: int
    replicated: bool = False

    def view(self, engine, kind: str) -> torch.Tensor:
        """kind "weight", "exp_avg" or "exp_avg_sq" -> a view (count,) of the live tensor."""
        tensor = self.flat.data if kind == "weight" else optimizer_state(engine, self.flat)[kind]
        return tensor.view(-1).narrow(0, self.offset, self.count)


def find_slice(engine, param: torch.nn.Parameter) -> Slice | None:
    """Where this rank keeps float32 master weight and moments of a trainable parameter; None if it has no
    part."""
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


def optimizer_state(engine, flat: torch.Tensor) -> dict:
    """AdamW's state of one flat tensor, made here if it has not stepped yet."""
    state = optimizers(engine)[-1 if flat.is_cuda else 0].state[flat]
    if "exp_avg" not in state:
        state.update({kind: torch.zeros_like(flat.data) for kind in MOMENTS})
        state["step"] = torch.zeros((), device=flat.device)  # a tensor, because it is PyTorch's fused AdamW
    return state


def set_optimizer_step(engine, step: int) -> None:
    """Set AdamW's step count, which its bias correction depends on. At the start of a run, too: in bf16
    and stage 0 DeepSpeed makes one step of its own while it initialises (at learning rate 0, so it only
    counts)."""
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


def local_tensors(engine) -> Iterator[tuple[str, torch.Tensor]]:
    """("weight/<name>@<first>", flat tensor) of everything this rank should write."""
    for name, param in engine.module.named_parameters():
        if not param.requires_grad:
            first, part = frozen_slice(param)
            yield f"weight/{name}@{first}", part
        elif (part := find_slice(engine, param)) is not None:
            start, stop = split_evenly(part.count) if part.replicated else (0, part.count)
            for kind in ("weight", *MOMENTS):
                yield f"{kind}/{name}@{part.first + start}", part.view(engine, kind)[start:stop]


def set_tensors(engine, read: Callable[[str, int, int], torch.Tensor | None], kinds: tuple[str, ...]) -> None:
    """Fill a model that DeepSpeed has already sharded. kinds: "weight" and, where they are known, the
    moments.

    read("<kind>/<parameter>", start, stop) returns elements [start, stop) of the flattened tensor in any
    dtype, or None to leave the parameter as it is; it is asked only for what this rank owns, a tensor at a
    time, so that host memory stays small.
    """
    zero3 = engine.zero_optimization_stage() == 3
    if zero3:
        engine.optimizer.checkpoint_event_prologue()  # parameters that stay gathered go back to their slices
    for name, param in engine.module.named_parameters():
        if not param.requires_grad:
            first, part = frozen_slice(param) if zero3 else (0, param.data.view(-1))
            if (values := read(f"weight/{name}", first, first + len(part))) is not None:
                part.copy_(values)
        elif (part := find_slice(engine, param)) is not None:
            for kind in kinds:
                values = read(f"{kind}/{name}", part.first, part.first + part.count)
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
