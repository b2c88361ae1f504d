"""What makes steps faster under ZeRO-2 and 3, in place of DeepSpeed's own; what is computed stays the same.

zero.py calls `make_faster` once an engine stands. Each function below finds one thing that DeepSpeed does
while the GPU waits, and puts another in its place; where a version of DeepSpeed has nothing of that name, it
is left alone, and the log says so. Without this file everything works, at half the speed.
"""

from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import z3_leaf_module
from torch.distributed.distributed_c10d import _coalescing_manager as in_one_call

from machinery.config import UserError

AHEAD = 50_000_000  # elements of weights whose gathering should be on its way while the GPU computes
ALIGNED = 128  # elements: compiled kernels expect tensors to begin at multiples of some bytes


def make_faster(zero, stage: int) -> list[str]:
    """zero: DeepSpeed's optimizer. Returns what the log should say."""
    ways = {2: [wait_on_the_gpu_2, fuse_grad_passes_2],
            3: [gather_ahead, scatter_together, wait_on_the_gpu_3, fuse_grad_passes_3, copy_weights_pinned]}
    return [note for way in ways.get(stage, []) for note in way(zero)]


def replace(theirs, ours: dict, needed: bool = False) -> list[str]:
    """Put `ours` where DeepSpeed has its own. Where a version has none of that name: raises UserError if it
    is needed; else nothing is replaced, and what the log should say is returned."""
    missing = [name for name in ours if not hasattr(theirs, name)]
    if missing and needed:
        raise UserError(f"DeepSpeed {deepspeed.__version__} has no {missing[0]}, which must be replaced: pip "
                        "install deepspeed==0.19.8, or train with ds_configs/zero1.json")
    if missing:
        return [f"DeepSpeed {deepspeed.__version__} has no {missing[0]}: steps are slower than with 0.19.8"]
    for name, value in ours.items():
        setattr(theirs, name, value)
    return []


# ---- The host waits less -----------------------------------------------------------------------------------


def wait_on_the_gpu_2(zero) -> list[str]:
    """After each micro-batch DeepSpeed lets the host wait until the GPU has summed all gradients, and only
    then start the next one: small kernels begin later than the GPU could. Here the GPU itself waits."""
    if not torch.cuda.is_available() or not zero.overlap_comm or zero.cpu_offload:
        return []
    accelerator, theirs = get_accelerator(), getattr(zero, "independent_gradient_partition_epilogue", None)

    def epilogue():
        accelerator.synchronize = lambda *_: torch.cuda.current_stream().wait_stream(zero.reduction_stream)
        try:
            theirs()
        finally:
            del accelerator.synchronize

    return replace(zero, {"independent_gradient_partition_epilogue": epilogue})


class StreamForTheGPU(torch.cuda.Stream):
    """A stream whose end the GPU waits for, and not the host."""

    def synchronize(self) -> None:
        """Let what the GPU is told from now on come after all that it was told on this stream."""
        torch.cuda.current_stream().wait_stream(self)


def wait_on_the_gpu_3(zero) -> list[str]:
    """The same for ZeRO-3."""
    if not torch.cuda.is_available() or zero.offload_optimizer:
        return []
    return replace(zero, {"reduce_and_partition_stream": StreamForTheGPU()})


# ---- Gradients and AdamW pass over memory less often -------------------------------------------------------


def fuse_grad_passes_2(zero) -> list[str]:
    """Pass over gradients less often, where ZeRO-2 keeps a rank's in flat float32 tensors and PyTorch's fused
    AdamW steps on them.

    DeepSpeed divides gradients by the number of ranks, makes a float32 copy of each to add it up, reads each
    to find overflow, copies it to float64 for the norm, and clips. Here they are added up as they come and
    read once for their norm, which shows overflow as well, and AdamW divides them as it reads them. A step of
    the 7B on two H200 takes 0.82 s instead of 1.00 s.
    """
    adamw, ranks = zero.optimizer, dist.get_world_size()
    summed_apart = (zero.dtype, zero.gradient_accumulation_dtype) == (torch.bfloat16, torch.float32)
    if not is_fused(adamw) or not summed_apart or zero.cpu_offload:
        return []

    def norm_of_mean():
        return norm_over_ranks([sums.flat_partition for sums in zero.averaged_gradients.values()]) / ranks

    def average_and_clip(_, norm):
        adamw.grad_scale = ranks * clipping(norm, zero.clip_grad)

    return replace(zero, {
        "gradient_average": False, "check_overflow": lambda *_, **__: None,
        "_add_to_grad_partition_buffer": lambda sums, gradient: sums is None or sums.add_(gradient),
        "scaled_global_norm": norm_of_mean, "unscale_and_clip_grads": average_and_clip})


def fuse_grad_passes_3(zero) -> list[str]:
    """The same for ZeRO-3, whose sums lie in one row, a group that AdamW steps on after another. DeepSpeed
    copies it to float64 for the norm and once more for AdamW, and clips that."""
    adamw, sums = zero.optimizer, zero.grad_partitions_flat_buffer
    if not is_fused(adamw) or zero.offload_optimizer or sums.dtype != torch.float32:
        return []
    sums_of_group = sums.split(zero.fp16_partitioned_groups_flat_numel)

    def give(group):
        zero.fp32_partitioned_groups_flat[group].grad = sums_of_group[group]

    def clip(_, norm):
        adamw.grad_scale = clipping(norm, zero.clip_grad)

    return replace(zero, {"_get_norm_groups": lambda: [norm_over_ranks([sums])],
                          "_prepare_fp32_grad_for_sub_group": give, "unscale_and_clip_grads": clip})


def is_fused(adamw) -> bool:
    """Is it PyTorch's, which can divide gradients as it reads them?"""
    return isinstance(adamw, torch.optim.AdamW) and adamw.defaults["fused"]


def norm_over_ranks(sums: list[torch.Tensor]) -> torch.Tensor:
    """Norm of what all ranks have: a scalar. Infinite or NaN if anything is."""
    pieces = [piece for total in sums for piece in total.split(1 << 30)]  # PyTorch counts with 32 bits
    square = torch.nn.utils.get_total_norm(pieces).square()
    dist.all_reduce(square)
    return square.sqrt()


def clipping(norm: torch.Tensor, limit: float) -> torch.Tensor:
    """What gradients must be divided by."""
    return ((norm + 1e-6) / limit).clamp(min=1) if limit else torch.ones_like(norm)


def scatter_together(zero) -> list[str]:
    """ZeRO-3's gradients are summed as they are, many in one call. DeepSpeed copies them into a row first,
    and that into another one."""
    if zero.offload_optimizer:
        return []
    if not (notes := replace(zero, {"_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads": scatter})):
        zero.contiguous_gradients = False
        for bucket in zero.ipg_buckets.values():
            bucket.buffer = None
    return notes


def scatter(params: list, dtype: torch.dtype) -> list[torch.Tensor]:
    """This rank's slice of the gradient's mean over ranks, for each parameter."""
    ranks = dist.get_world_size()
    wholes = [param.grad.to(dtype).view(-1) for param in params]
    wholes = [torch.nn.functional.pad(whole, (0, rest)) if (rest := -whole.numel() % ranks) else whole
              for whole in wholes]
    slices = [whole.new_empty(whole.numel() // ranks) for whole in wholes]
    with in_one_call():
        for piece, whole in zip(slices, wholes, strict=True):
            dist.reduce_scatter_tensor(piece, whole)
    torch._foreach_div_(slices, ranks)
    return slices


def copy_weights_pinned(zero) -> list[str]:
    """Bring weights that ZeRO-3 stepped on in host memory to the GPU by way of pinned memory. DeepSpeed
    rounds each group into new memory, which the GPU reads slowly: the 60 % of a 7B that
    ds_configs/zero3_partial_offload.json keeps on the host take 2 s, and 0.5 s here."""
    full, rounded = zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups_flat
    crossing = {group: weights.numel() for group, weights in enumerate(full)
                if weights.numel() and weights.is_cpu and getattr(rounded[group], "is_cuda", False)}
    if not crossing:
        return []
    pinned = torch.empty(max(crossing.values()), dtype=zero.dtype, pin_memory=True)

    def by_way_of_pinned(group):
        if group in crossing:
            rounded[group].copy_(pinned[: crossing[group]].copy_(full[group].data))
            zero._unflatten_partitioned_parameters(group)
        else:
            type(zero)._reassign_or_swap_out_partitioned_parameters(zero, group)

    return replace(zero, {"_reassign_or_swap_out_partitioned_parameters": by_way_of_pinned})


# ---- ZeRO-3's weights arrive before they are needed --------------------------------------------------------


def gather_ahead(zero) -> list[str]:
    """Unless weights are offloaded, or hpZ keeps them twice."""
    offload = zero.parameter_offload
    if offload.offload_device or offload.zero_param_parallel_group:
        return []
    return replace(offload, {"param_coordinator": WeightsAhead()})


class WeightsAhead:
    """Whole weights for modules that compute, in place of DeepSpeed's coordinator of parameters.

    Each rank keeps 1/N of every parameter. DeepSpeed's hooks tell when a module is about to compute, forward
    or backward, and when it has: then its weights must be whole, and then they need not be. What DeepSpeed
    does in between waits on the host for every gathering, and copies what arrives. Here the host only starts
    things: while the GPU computes with one block's weights, those of the next, by the order of the pass
    before, arrive where they will be used, in the memory of the block before.
    """

    def __init__(self):
        # (module, weights, their elements), as they ask in this pass and, from `position` on, in the last
        self.order = []
        self.weights_below = {}  # block -> all weights in it, so that they are looked for once
        self.position = self.reached = 0  # in the order: whose turn is next, whose weights are to come next
        self.gathered = {}  # parameter -> its gathering: a handle, the memory, which parameters are in it
        self.spare = defaultdict(list)  # (elements, dtype) -> [(memory, event: nothing computes with it now)]
        self.stream = torch.cuda.Stream() if torch.cuda.is_available() else None

    # What DeepSpeed's hooks and its optimizer call

    def fetch_sub_module(self, module, forward: bool) -> None:
        """Before it computes."""
        if not (weights := self.weights_of(module)):
            return
        if [turn for turn, *_ in self.order[self.position: self.position + 1]] != [module]:
            size = sum(param.ds_numel for param in weights)
            self.order[self.position:] = [(module, weights, size)]  # the first pass, or another way
            self.reached = self.position
        self.position += 1
        self.gather(weights)
        for param in weights:
            if param.ds_status is ZeroParamStatus.INFLIGHT:
                self.wait(param)
            param.ds_active_sub_modules.add(module.ds_id)
        self.reached = max(self.reached, self.position)
        if sum(size for *_, size in self.order[self.position: self.reached]) < AHEAD:
            self.gather_next()

    def release_sub_module(self, module, forward: bool = False) -> None:
        """After it has computed; unless its weights count as gathered for a turn that comes soon."""
        again = any(module is other for other, *_ in self.order[self.position: self.reached])
        for param in self.weights_of(module):
            param.ds_active_sub_modules.discard(module.ds_id)
            if not (again or param.ds_persist or param.ds_active_sub_modules):
                self.free(param)

    def reset_step(self) -> None:
        """Before a forward pass: what is gathered from now on is what the optimizer has left."""
        self.release_backward_leftovers()
        self.position = self.reached = 0
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream())

    def release_backward_leftovers(self) -> None:
        """After a backward pass, in which a module whose input needs no gradient is not told that it ends."""
        for param in [param for param in self.gathered if not param.ds_persist]:
            param.ds_active_sub_modules.clear()
            self.free(param)

    def release_and_reset_all(self, module) -> None:
        """Before an optimizer step: small ones, too, which are whole all the time (`ds_persist`)."""
        for param in module.parameters():
            param.ds_active_sub_modules.clear()
            self.free(param)

    def trace_prologue(self, module) -> None:
        """DeepSpeed's compares the order of modules here."""

    def is_record_trace(self) -> bool:
        """DeepSpeed's wants to be told of each module in its first pass."""
        return False

    # How weights come and go

    def weights_of(self, module) -> list:
        """What a module's hooks are for: all that is below a block, and elsewhere a module's own."""
        if z3_leaf_module(module):
            if module not in self.weights_below:
                self.weights_below[module] = list(module.parameters())
            return self.weights_below[module]
        own = [param for param in module._parameters.values() if param is not None]
        return own + [param for _, param in module.ds_external_parameters()]

    def gather_next(self) -> None:
        """Start to gather the next module's weights or, if they are small, those of several."""
        weights, size = [], 0
        while self.reached < len(self.order) and size < AHEAD:
            _, more, elements = self.order[self.reached]
            weights, size = weights + more, size + elements
            self.reached += 1
        self.gather(weights)

    def gather(self, params: list) -> None:
        """Start to gather those that are not whole."""
        missing = [p for p in dict.fromkeys(params) if p.ds_status is ZeroParamStatus.NOT_AVAILABLE]
        if not missing:
            return
        sizes = [param.ds_tensor.numel() * dist.get_world_size() for param in missing]
        slots = [-(-size // ALIGNED) * ALIGNED for size in sizes]
        gathering = SimpleNamespace(params=set(missing), handle=None)
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            gathering.memory = self.take(sum(slots), missing[0])
            wholes = [slot[:size] for slot, size in zip(gathering.memory.split(slots), sizes, strict=True)]
            with in_one_call(async_ops=True) as gathering.handle:
                for param, whole in zip(missing, wholes, strict=True):
                    dist.all_gather_into_tensor(whole, param.ds_tensor)
        for param, whole in zip(missing, wholes, strict=True):
            param.data = whole[: param.ds_numel].view(param.ds_shape)
            param.ds_status = ZeroParamStatus.INFLIGHT
            self.gathered[param] = gathering

    def take(self, size: int, like: torch.Tensor) -> torch.Tensor:
        """Memory for so many elements, for the stream that gathers."""
        if not (spare := self.spare[size, like.dtype]):
            return torch.empty(size, dtype=like.dtype, device=like.device)
        memory, unused = spare.pop(0)
        if unused:
            self.stream.wait_event(unused)
        return memory

    def wait(self, param) -> None:
        """Let what computes from now on find the weights of this gathering."""
        gathering = self.gathered[param]
        gathering.handle.wait()
        for param in gathering.params:
            param.ds_status = ZeroParamStatus.AVAILABLE

    def free(self, param) -> None:
        """Forget a whole parameter; its slice stays."""
        if param.ds_status is ZeroParamStatus.INFLIGHT:  # it came for a pass that took another way
            self.wait(param)
        if param not in self.gathered:
            return param.partition()  # if it is whole, DeepSpeed itself has gathered it
        gathering = self.gathered.pop(param)
        param.data = torch.empty(0, dtype=param.dtype, device=param.device)
        param.ds_status = ZeroParamStatus.NOT_AVAILABLE
        gathering.params.discard(param)
        if not gathering.params:
            self.keep(gathering.memory)

    def keep(self, memory: torch.Tensor) -> None:
        """For the next gathering of that size; unless autograd has kept a view of it for the backward."""
        if self.stream:
            memory.record_stream(torch.cuda.current_stream())
        if holders(memory) == holders(torch.empty(1)):
            self.spare[memory.numel(), memory.dtype].append(
                (memory, torch.cuda.current_stream().record_event() if self.stream else None))


def holders(tensor: torch.Tensor) -> int:
    """How many tensors share this one's memory, and a constant."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
