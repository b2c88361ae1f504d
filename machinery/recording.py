"""Record a training step's forward and backward pass once, and replay it.

A small model, or LoRA on a large one, computes for less time than Python needs to launch its
kernels. A CUDA graph launches all of them at once. `record_passes` replaces a model's forward pass:
the first micro-batch of each text length is recorded, and all others replay its recording, which
computes the loss and the gradients. The backward pass then only hands these to DeepSpeed.

    replayed: copy the batch to where the recording reads it -> replay -> loss, gradients

Weights are read where they were during the recording. That holds for ZeRO 0 to 2, which update them
in place; ZeRO-3 gathers each weight into new memory.
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import import_utils

from action_tokenizer import IGNORE_INDEX
from model import VLA

TEXT_STEP = 16  # text lengths are rounded up to a multiple, so that a few recordings suffice
WARMUP = 2  # passes before a recording: torch.compile compiles, cuBLAS takes its workspace


class Recording:
    """One recorded forward and backward pass, for batches of one shape.

    batch: VLA.forward's arguments, on the GPU; params: the trained parameters; pool: memory that
    all recordings share, since only one is replayed at a time
    """

    def __init__(self, vla: VLA, batch: dict, params: dict[str, nn.Parameter], pool):
        self.inputs = {name: value.clone() for name, value in batch.items()}
        self.addresses = [param.data_ptr() for param in params.values()]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), copies_of(vla, params) as leaves, without_explicit_masks():
            for _ in range(WARMUP):
                loss, *_ = VLA.forward(vla, **self.inputs)
                torch.autograd.grad(loss, leaves, allow_unused=True)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=pool, stream=stream):
                loss, predicted, true = VLA.forward(vla, **self.inputs)
                gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
                # in one row: a replay copies it at once
                self.gradients = torch.cat([g.flatten() for g in gradients if g is not None])
                self.results = loss.detach(), predicted, true
        torch.cuda.current_stream().wait_stream(stream)
        self.shapes = [None if g is None else g.shape for g in gradients]

    def replay(self, batch: dict) -> tuple[torch.Tensor, ...]:
        """-> loss, predicted, true as from VLA.forward, and all gradients in a row."""
        for name, value in batch.items():
            self.inputs[name].copy_(value, non_blocking=True)
        self.graph.replay()
        return *(result.clone() for result in self.results), self.gradients


class Replay(torch.autograd.Function):
    """A replayed pass, for autograd: the loss depends on the parameters."""

    @staticmethod
    def forward(ctx, recording: Recording, batch: dict, *params):
        loss, predicted, true, ctx.gradients = recording.replay(batch)
        ctx.shapes = recording.shapes
        ctx.mark_non_differentiable(predicted, true)
        return loss, predicted, true

    @staticmethod
    def backward(ctx, scale, *_):
        row = ctx.gradients * scale  # a copy: the next replay overwrites the recording's
        parts = iter(row.split([shape.numel() for shape in ctx.shapes if shape is not None]))
        views = [None if shape is None else next(parts).view(shape) for shape in ctx.shapes]
        return None, None, *views


def record_passes(vla: VLA) -> None:
    """Let `vla` record and replay its training passes. Call it before DeepSpeed makes its engine."""
    recordings: dict[tuple, Recording] = {}
    pool = torch.cuda.graph_pool_handle()

    def forward(**batch):
        if not torch.is_grad_enabled():  # evaluation
            return VLA.forward(vla, **batch)
        missing = -batch["input_ids"].shape[1] % TEXT_STEP
        batch["input_ids"] = F.pad(batch["input_ids"], (0, missing))
        batch["labels"] = F.pad(batch["labels"], (0, missing), value=IGNORE_INDEX)
        params = {name: param for name, param in vla.named_parameters() if param.requires_grad}
        key = tuple((name, value.shape) for name, value in batch.items())
        addresses = [param.data_ptr() for param in params.values()]
        if key not in recordings or recordings[key].addresses != addresses:
            recordings[key] = Recording(vla, batch, params, pool)
        return Replay.apply(recordings[key], batch, *params.values())

    vla.forward = forward


@contextmanager
def copies_of(vla: VLA, params: dict[str, nn.Parameter]):
    """Meanwhile, the model's trained parameters are other objects with the same memory. DeepSpeed's
    hooks do not see them, and autograd has not yet tied them to the stream of earlier passes."""
    places = {}
    for module_name, module in vla.named_modules():
        for name in module._parameters:
            places[f"{module_name}.{name}".lstrip(".")] = module._parameters, name
    leaves = {name: nn.Parameter(param.data) for name, param in params.items()}
    for name, leaf in leaves.items():
        owner, key = places[name]
        owner[key] = leaf
    try:
        yield list(leaves.values())
    finally:
        for name, param in params.items():
            owner, key = places[name]
            owner[key] = param


@contextmanager
def without_explicit_masks():
    """Meanwhile, transformers does not notice that a stream is being recorded: it would write out
    the causal mask, and the blocks would be compiled anew inside the recording."""
    noticed = import_utils.is_cuda_stream_capturing
    import_utils.is_cuda_stream_capturing = lambda: False
    try:
        yield
    finally:
        import_utils.is_cuda_stream_capturing = noticed
