"""Faster replacements for parts of DeepSpeed's ZeRO-2 and 3. They compute the same.

train_vla.py calls `apply` on a new engine unless the YAML sets `zero_speed: false`. Nothing else
imports this file, and training works without it. Each replacement below removes one thing that
DeepSpeed does while the GPU waits:

    wait_on_the_gpu_2, wait_on_the_gpu_3    the host runs ahead instead of waiting for gradients
    fuse_grad_passes_2, fuse_grad_passes_3  gradients are read once for their norm and once by AdamW
    scatter_together                        ZeRO-3 sums many gradients in one call, without copies
    copy_weights_pinned                     partly offloaded weights reach the GPU by pinned memory
    gather_ahead                            ZeRO-3's weights arrive before the GPU needs them

bench/README.md has the gain of each. bench/train_throughput.py measures it.

DeepSpeed may change its internals in any version. So configs/tables/deepspeed_fingerprints.yaml
lists the functions that each replacement replaces or relies on, with a fingerprint of their source.
If one differs, DeepSpeed runs its own code, and a line in the log names the function.
"""

import hashlib
import inspect
import pkgutil
import textwrap
from collections import defaultdict
from collections.abc import Collection
from contextlib import nullcontext
from types import SimpleNamespace

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import z3_leaf_module
from torch.distributed.distributed_c10d import _coalescing_manager as in_one_call

from machinery.config import load_table

ALIGNED = 128  # elements: compiled kernels expect tensors to begin at multiples of some bytes


def apply(engine, only: Collection[str] | None = None) -> list[str]:
    """Replace what this engine's ZeRO stage uses; returns lines for the log. only: the names of the
    replacements to apply, to measure them one by one; default: all."""
    replacements = {
        2: [wait_on_the_gpu_2, fuse_grad_passes_2],
        3: [gather_ahead, scatter_together, wait_on_the_gpu_3, fuse_grad_passes_3,
            copy_weights_pinned],
    }
    relies_on = load_table("deepspeed_fingerprints")  # replacement -> {function: fingerprint}
    notes = []
    for replacement in replacements.get(engine.zero_optimization_stage(), []):
        name = replacement.__name__
        if only is not None and name not in only:
            continue
        changed = [path for path, known in relies_on[name].items() if fingerprint(path) != known]
        if changed:
            notes.append(f"zero_speed: {name} not applied (slower): DeepSpeed "
                         f"{deepspeed.__version__} has another {changed[0]}")
        else:
            notes += replacement(engine) or []
    return notes


def fingerprint(path: str) -> str | None:
    """Hash of a function's source without comments and blank lines; None if there is no such
    function. (Not of its ast: another version of Python would give another hash.)"""
    try:
        function = inspect.unwrap(pkgutil.resolve_name(f"deepspeed.runtime.zero.{path}"))
        while hidden := inspect.getclosurevars(function).nonlocals.get("func"):
            function = inspect.unwrap(hidden)  # by @instrument_w_nvtx, which sets no __wrapped__
        source = inspect.getsource(function)
    except (ImportError, AttributeError, TypeError, OSError):
        return None
    lines = [line.partition("#")[0].rstrip() for line in source.splitlines()]
    code = textwrap.dedent("\n".join(line for line in lines if line))
    return hashlib.sha256(code.encode()).hexdigest()[:8]


def without_effect(engine, *keys: str) -> list[str]:
    """A line for the log if the JSON sets any of these keys, which a replacement does not read."""
    found = [key for key in keys if key in engine.config["zero_optimization"]]
    return [f"zero_speed: {', '.join(found)} in the JSON: no effect"] if found else []


# ---- The host waits less -----------------------------------------------------------------------


def wait_on_the_gpu_2(engine) -> None:
    """After each micro-batch DeepSpeed's epilogue calls get_accelerator().synchronize(): the host
    waits until all gradients are summed, and starts the next micro-batch late. Here the GPU's
    computing stream waits instead."""
    zero = engine.optimizer
    if not torch.cuda.is_available() or not zero.overlap_comm or zero.cpu_offload:
        return
    accelerator = get_accelerator()
    deepspeeds = zero.independent_gradient_partition_epilogue

    def wait_on_the_gpu(device=None):
        torch.cuda.current_stream().wait_stream(zero.reduction_stream)

    def epilogue():
        accelerator.synchronize = wait_on_the_gpu  # an attribute that hides the class's method ...
        try:
            deepspeeds()
        finally:
            del accelerator.synchronize  # ... until it is deleted

    zero.independent_gradient_partition_epilogue = epilogue


class StreamForTheGPU(torch.cuda.Stream):
    """A stream whose synchronize() makes the GPU wait instead of the host."""

    def synchronize(self) -> None:
        """Kernels launched from now on run after everything launched on this stream so far."""
        torch.cuda.current_stream().wait_stream(self)


def wait_on_the_gpu_3(engine) -> None:
    """The same for ZeRO-3."""
    zero = engine.optimizer
    if torch.cuda.is_available() and engine.zero_overlap_comm() and not zero.offload_optimizer:
        zero.reduce_and_partition_stream = StreamForTheGPU()


# ---- Gradients and AdamW pass over memory less often -------------------------------------------


def fuse_grad_passes_2(engine) -> None:
    """Pass over gradients less often if ZeRO-2 keeps a rank's gradients in flat float32 tensors and
    PyTorch's fused AdamW steps on them.

    DeepSpeed divides gradients by the number of ranks, copies each to float32 to add it up, reads
    each to find overflow, copies it to float64 for the norm, and clips. Here gradients are added up
    as they arrive and read once for their norm, which shows overflow as well. AdamW divides them as
    it reads them.
    """
    zero = engine.optimizer
    flat_float32 = (zero.dtype == torch.bfloat16 and not zero.cpu_offload
                    and zero.gradient_accumulation_dtype == torch.float32)
    if not flat_float32 or not is_fused(zero.optimizer):
        return
    ranks = dist.get_world_size()

    def add(sums, gradient):
        if sums is not None:
            sums.add_(gradient)

    def norm_of_mean():
        flat = [sums.flat_partition for sums in zero.averaged_gradients.values()]
        return norm_over_ranks(flat) / ranks

    def average_and_clip(_, norm):
        zero.optimizer.grad_scale = ranks * clipping(norm, zero.clip_grad)

    zero.gradient_average = False
    zero.check_overflow = lambda *_, **__: None
    zero._add_to_grad_partition_buffer = add
    zero.scaled_global_norm = norm_of_mean
    zero.unscale_and_clip_grads = average_and_clip


def fuse_grad_passes_3(engine) -> None:
    """The same for ZeRO-3, which keeps a rank's gradients in one tensor, group after group.
    DeepSpeed copies it to float64 for the norm, copies it again for AdamW, and clips the copy."""
    zero = engine.optimizer
    sums = zero.grad_partitions_flat_buffer
    if not is_fused(zero.optimizer) or zero.offload_optimizer or sums.dtype != torch.float32:
        return
    sums_of_group = sums.split(zero.fp16_partitioned_groups_flat_numel)

    def use_sums(group):
        zero.fp32_partitioned_groups_flat[group].grad = sums_of_group[group]

    def clip(_, norm):
        zero.optimizer.grad_scale = clipping(norm, zero.clip_grad)

    zero._get_norm_groups = lambda: [norm_over_ranks([sums])]
    zero._prepare_fp32_grad_for_sub_group = use_sums
    zero.unscale_and_clip_grads = clip


def is_fused(adamw) -> bool:
    """Is this PyTorch's fused AdamW, which can divide gradients as it reads them (`grad_scale`)?"""
    return isinstance(adamw, torch.optim.AdamW) and adamw.defaults["fused"]


def norm_over_ranks(sums: list[torch.Tensor]) -> torch.Tensor:
    """Norm (scalar) of the slices of all ranks. Infinite or NaN if any element is."""
    pieces = [piece for total in sums for piece in total.split(1 << 30)]  # counts have 32 bits
    square = torch.nn.utils.get_total_norm(pieces).square()
    dist.all_reduce(square)
    return square.sqrt()


def clipping(norm: torch.Tensor, limit: float) -> torch.Tensor:
    """The number by which to divide gradients. limit 0: no clipping."""
    if not limit:
        return torch.ones_like(norm)
    return ((norm + 1e-6) / limit).clamp(min=1)


def scatter_together(engine) -> list[str]:
    """Sum ZeRO-3's gradients where they are, many in one call. DeepSpeed copies them into a buffer
    first, and that buffer into another."""
    zero = engine.optimizer
    if zero.offload_optimizer:
        return []
    zero._DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads = scatter
    zero.contiguous_gradients = False
    for bucket in zero.ipg_buckets.values():
        bucket.buffer = None
    return without_effect(engine, "contiguous_gradients", "reduce_scatter")


def scatter(params: list, dtype: torch.dtype) -> list[torch.Tensor]:
    """For each parameter, this rank's slice of the gradient's mean over ranks, in `dtype`."""
    ranks = dist.get_world_size()
    gradients, slices = [], []
    for param in params:
        gradient = param.grad.to(dtype).view(-1)
        missing = -gradient.numel() % ranks
        if missing:
            gradient = torch.nn.functional.pad(gradient, (0, missing))
        gradients.append(gradient)
        slices.append(gradient.new_empty(gradient.numel() // ranks))
    with in_one_call():
        for piece, gradient in zip(slices, gradients, strict=True):
            dist.reduce_scatter_tensor(piece, gradient)
    torch._foreach_div_(slices, ranks)
    return slices


def copy_weights_pinned(engine) -> None:
    """Copy weights that ZeRO-3 stepped on in host memory to the GPU by way of pinned memory.

    DeepSpeed rounds each group into new memory, which the GPU reads slowly: the 60% of a 7B that
    ds_configs/zero3_partial_offload.json keeps on the host take 2 s, and 0.5 s here.
    """
    zero = engine.optimizer
    full = zero.fp32_partitioned_groups_flat
    rounded = zero.fp16_partitioned_groups_flat
    crossing = {}  # group -> its number of elements
    for group, weights in enumerate(full):
        if weights.numel() and weights.is_cpu and getattr(rounded[group], "is_cuda", False):
            crossing[group] = weights.numel()
    if not crossing:
        return
    pinned = torch.empty(max(crossing.values()), dtype=zero.dtype, pin_memory=True)
    deepspeeds = zero._reassign_or_swap_out_partitioned_parameters

    def copy(group):
        if group in crossing:
            rounded[group].copy_(pinned[: crossing[group]].copy_(full[group].data))
            zero._unflatten_partitioned_parameters(group)
        else:
            deepspeeds(group)

    zero._reassign_or_swap_out_partitioned_parameters = copy


# ---- ZeRO-3's weights arrive before they are needed --------------------------------------------


def gather_ahead(engine) -> list[str]:
    """Use WeightsAhead unless weights are offloaded or hpZ keeps them twice."""
    offload = engine.optimizer.parameter_offload
    if offload.offload_device or offload.zero_param_parallel_group:
        return []
    offload.param_coordinator = WeightsAhead(engine.zero_prefetch_bucket_size())
    return without_effect(engine, "stage3_max_live_parameters", "stage3_max_reuse_distance",
                          "stage3_use_all_reduce_for_fetch_params", "stage3_allgather_sequential")


class WeightsAhead:
    """Gathers and frees weights, in place of DeepSpeed's PartitionedParameterCoordinator.

    Each rank keeps 1/N of every parameter. DeepSpeed's hooks call fetch_sub_module before a module
    computes, forward or backward, and release_sub_module after. DeepSpeed's own coordinator then
    waits on the host for every gathering and copies the result. Here the host only launches: while
    the GPU computes with one block's weights, those of the next one (in the order of the last pass)
    arrive where they will be used, in memory that an earlier block has left.
    """

    def __init__(self, ahead: int):
        """ahead: elements of weights to have on their way while the GPU computes."""
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        self.status = ZeroParamStatus  # imported here, after fingerprints were compared
        self.ahead = ahead
        # (module, its weights, their elements): this pass up to `position`, then the last pass
        self.order = []
        self.position = 0  # in the order: the next module to compute
        self.reached = 0  # in the order: the next module to gather
        self.weights_below = {}  # block -> all weights in it, looked up once
        self.gathered = {}  # parameter -> its gathering: a handle, the memory, the parameters in it
        self.spare = defaultdict(list)  # (elements, dtype) -> [(memory, event: no longer used)]
        self.stream = torch.cuda.Stream() if torch.cuda.is_available() else None

    # Called by DeepSpeed's hooks and its optimizer

    def fetch_sub_module(self, module, forward: bool) -> None:
        """Before a module computes."""
        weights = self.weights_of(module)
        if not weights:
            return
        expected = self.order[self.position][0] if self.position < len(self.order) else None
        if module is not expected:  # the first pass, or another path through the model
            size = sum(param.ds_numel for param in weights)
            self.order[self.position:] = [(module, weights, size)]
            self.reached = self.position
        self.position += 1
        self.gather(weights)
        for param in weights:
            if param.ds_status is self.status.INFLIGHT:
                self.wait(param)
            param.ds_active_sub_modules.add(module.ds_id)
        self.reached = max(self.reached, self.position)
        if sum(size for *_, size in self.order[self.position: self.reached]) < self.ahead:
            self.gather_next()

    def release_sub_module(self, module, forward: bool = False) -> None:
        """After a module has computed: free its weights unless it computes again soon."""
        again = any(module is other for other, *_ in self.order[self.position: self.reached])
        for param in self.weights_of(module):
            param.ds_active_sub_modules.discard(module.ds_id)
            if not (again or param.ds_persist or param.ds_active_sub_modules):
                self.free(param)

    def reset_step(self) -> None:
        """Before a forward pass: gather from now on what the optimizer has written."""
        self.release_backward_leftovers()
        self.position = self.reached = 0
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream())

    def release_backward_leftovers(self) -> None:
        """After a backward pass: free modules whose input needs no gradient. DeepSpeed's hook after
        their backward never runs."""
        for param in list(self.gathered):
            if not param.ds_persist:
                param.ds_active_sub_modules.clear()
                self.free(param)

    def release_and_reset_all(self, module) -> None:
        """Before an optimizer step: free all, including small weights that stay gathered."""
        for param in module.parameters():
            param.ds_active_sub_modules.clear()
            self.free(param)

    def trace_prologue(self, module) -> None:
        """DeepSpeed's coordinator compares the order of modules here."""

    def is_record_trace(self) -> bool:
        """DeepSpeed's coordinator wants to see each module in its first pass."""
        return False

    # How weights come and go

    def weights_of(self, module) -> list:
        """All weights in a block (gather_per_block); of other modules, only their own."""
        if z3_leaf_module(module):
            if module not in self.weights_below:
                self.weights_below[module] = list(module.parameters())
            return self.weights_below[module]
        own = [param for param in module._parameters.values() if param is not None]
        return own + [param for _, param in module.ds_external_parameters()]

    def gather_next(self) -> None:
        """Start to gather the next module's weights; if they are small, those of several."""
        weights, size = [], 0
        while self.reached < len(self.order) and size < self.ahead:
            _, more, elements = self.order[self.reached]
            weights = weights + more
            size += elements
            self.reached += 1
        self.gather(weights)

    def gather(self, params: list) -> None:
        """Start to gather those of the parameters that are not here."""
        missing = [param for param in dict.fromkeys(params)
                   if param.ds_status is self.status.NOT_AVAILABLE]
        if not missing:
            return
        sizes = [param.ds_tensor.numel() * dist.get_world_size() for param in missing]
        slots = [-(-size // ALIGNED) * ALIGNED for size in sizes]
        gathering = SimpleNamespace(params=set(missing), handle=None)
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            gathering.memory = self.take(sum(slots), missing[0])
            gathering_slots = gathering.memory.split(slots)
            full = [slot[:size] for slot, size in zip(gathering_slots, sizes, strict=True)]
            with in_one_call(async_ops=True) as gathering.handle:
                for param, values in zip(missing, full, strict=True):
                    dist.all_gather_into_tensor(values, param.ds_tensor)
        for param, values in zip(missing, full, strict=True):
            param.data = values[: param.ds_numel].view(param.ds_shape)
            param.ds_status = self.status.INFLIGHT
            self.gathered[param] = gathering

    def take(self, size: int, like: torch.Tensor) -> torch.Tensor:
        """Memory (size,) for the gathering stream, spare or new."""
        spare = self.spare[size, like.dtype]
        if not spare:
            return torch.empty(size, dtype=like.dtype, device=like.device)
        memory, unused = spare.pop(0)
        if unused:
            self.stream.wait_event(unused)
        return memory

    def wait(self, param) -> None:
        """Let kernels launched from now on wait for the gathering of this parameter."""
        gathering = self.gathered[param]
        gathering.handle.wait()
        for param in gathering.params:
            param.ds_status = self.status.AVAILABLE

    def free(self, param) -> None:
        """Forget a gathered parameter. Its slice stays."""
        if param.ds_status is self.status.INFLIGHT:  # gathered for a pass that took another path
            self.wait(param)
        if param not in self.gathered:
            param.partition()  # frees it if DeepSpeed itself has gathered it
            return
        gathering = self.gathered.pop(param)
        param.data = torch.empty(0, dtype=param.dtype, device=param.device)
        param.ds_status = self.status.NOT_AVAILABLE
        gathering.params.discard(param)
        if not gathering.params:
            self.keep(gathering.memory)

    def keep(self, memory: torch.Tensor) -> None:
        """Keep memory for the next gathering of its size, unless autograd holds a view of it for
        the backward pass."""
        if self.stream:
            memory.record_stream(torch.cuda.current_stream())
        if holders(memory) == holders(torch.empty(1)):
            unused = torch.cuda.current_stream().record_event() if self.stream else None
            self.spare[memory.numel(), memory.dtype].append((memory, unused))


def holders(tensor: torch.Tensor) -> int:
    """How many tensors share this one's memory, plus a constant."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
