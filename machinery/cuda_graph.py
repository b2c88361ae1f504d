"""Capture the forward and backward pass once as a CUDA graph, and replay it.

LoRA or a small model keeps the GPU busy for less time than Python needs to launch the kernels. A
CUDA graph launches all of them at once. The first micro-batch of each shape is captured, later ones
are copied to where the graph reads its inputs, and replayed:

    VLA.forward      replays both passes: the loss, and all gradients in one row
    loss.backward()  hands views of that row to the parameters, and so to DeepSpeed

A graph reads the weights at fixed addresses. ZeRO 0 to 2 update them there; ZeRO-3 gathers
each weight into new memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from transformers import masking_utils

from action_tokenizer import IGNORE_INDEX
from machinery.config import UserError, one_line
from model import VLA

MAX_TRAINED = 500e6  # parameters. Larger models keep the GPU busy, and their gradients would be
#                      held three times: in the graph, in its copy, and by DeepSpeed
TEXT_STEP = 16  # text is padded to a multiple of it, so that few shapes need a graph
WARMUP = 2  # passes before a capture: torch.compile and cuBLAS need memory of their own


def capture_passes(vla: VLA, ds_config: dict) -> None:
    """Let a model replay its training passes if that is possible and worthwhile. To be called
    before DeepSpeed makes its engine."""
    stage = ds_config.get("zero_optimization", {}).get("stage", 0)
    wanted = vla.cfg.cuda_graph and vla.count_parameters()[1] <= MAX_TRAINED
    if not (wanted and stage < 3 and torch.cuda.is_available()):
        return
    graphs = {}
    pool = torch.cuda.graph_pool_handle()  # one for all: only one graph is replayed at a time

    def forward(**batch):
        if not torch.is_grad_enabled():  # evaluation
            return type(vla).forward(vla, **batch)
        missing = -batch["input_ids"].shape[1] % TEXT_STEP
        batch["input_ids"] = F.pad(batch["input_ids"], (0, missing))
        batch["labels"] = F.pad(batch["labels"], (0, missing), value=IGNORE_INDEX)
        shape = tuple(value.shape for value in batch.values())
        if shape not in graphs or graphs[shape].moved():
            try:
                graphs[shape] = Captured(vla, batch, pool)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # a library did something that a capture forbids
                raise UserError(f"cuda_graph: the passes cannot be captured: set cuda_graph: false "
                                f"({one_line(error)[:200]})") from error
        return Replay.apply(graphs[shape], batch, *graphs[shape].params)

    vla.forward = forward


class Captured:
    """Both passes for batches of one shape.

    batch: VLA.forward's arguments, on the GPU. params: the parameters that receive gradients
    """

    def __init__(self, vla: VLA, batch: dict[str, torch.Tensor], pool):
        trained = {name: p for name, p in vla.named_parameters() if p.requires_grad}
        self.inputs = {name: value.clone() for name, value in batch.items()}
        self.graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), twins(vla, trained) as leaves, no_tracing():
            for _ in range(WARMUP):
                loss, *_ = type(vla).forward(vla, **self.inputs)
                torch.autograd.grad(loss, leaves, allow_unused=True)
            with torch.cuda.graph(self.graph, pool, stream):
                loss, predicted, true = type(vla).forward(vla, **self.inputs)
                gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
                self.row = torch.cat([g.flatten() for g in gradients if g is not None])
        torch.cuda.current_stream().wait_stream(stream)
        self.results = loss.detach(), predicted, true
        pairs = zip(trained.values(), gradients, strict=True)
        self.params = [p for p, g in pairs if g is not None]  # a tower's last block has none
        self.addresses = [p.data_ptr() for p in self.params]

    def moved(self) -> bool:
        """Are the weights elsewhere now?"""
        return [p.data_ptr() for p in self.params] != self.addresses


class Replay(torch.autograd.Function):
    """A replayed graph, as a function of the parameters."""

    @staticmethod
    def forward(ctx, captured: Captured, batch: dict, *params):
        for name, value in batch.items():
            captured.inputs[name].copy_(value, non_blocking=True)
        captured.graph.replay()
        loss, predicted, true = (result.clone() for result in captured.results)
        ctx.row = captured.row
        ctx.shapes = [p.shape for p in params]
        ctx.mark_non_differentiable(predicted, true)
        return loss, predicted, true

    @staticmethod
    def backward(ctx, scale, *_):
        row = ctx.row * scale  # a copy, because the next replay overwrites the graph's own
        parts = row.split([shape.numel() for shape in ctx.shapes])
        views = [part.view(shape) for part, shape in zip(parts, ctx.shapes, strict=True)]
        return None, None, *views


@contextmanager
def twins(vla: VLA, params: dict[str, nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Meanwhile, other parameters take the places of `params` and share their memory.

    Autograd ties a parameter to the stream on which it was first used. That is not the captured
    one, and a capture must not wait for other streams. DeepSpeed's hooks do not see the twins.
    """
    own = {name: nn.Parameter(p.data) for name, p in params.items()}

    def put(parameters: dict[str, nn.Parameter]) -> None:
        for name, p in parameters.items():
            module, _, key = name.rpartition(".")
            vla.get_submodule(module)._parameters[key] = p

    put(own)
    try:
        yield list(own.values())
    finally:
        put(params)


@contextmanager
def no_tracing() -> Iterator[None]:
    """Meanwhile, transformers does not notice the capture. It would write out the causal mask,
    and the blocks would be compiled again, which a capture does not allow."""
    noticed = masking_utils.is_tracing
    masking_utils.is_tracing = lambda tensor=None: False
    try:
        yield
    finally:
        masking_utils.is_tracing = noticed
