"""A matrix times one vector, in Triton: the product that takes most of acting's time.

A model acts token by token, and every token multiplies all matrices of the language model with one
vector. Each weight is read once (13 GB for the 7B in bf16, half of that in 8 bits) and little is
computed. Of an H100's 3.35 TB/s this reaches 3.0 and cuBLAS 2.6 (bench/act_latency.py). Large
matrices reach more than small ones, so layers with the same input become one (`join`).
"""

import copy

import torch
import triton
import triton.language as tl
from torch import nn

from machinery import int8

SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # names in transformers


@triton.jit
def row_times_vector(matrix, scale, vector, out, width: tl.constexpr, BLOCK: tl.constexpr):
    """out[row] = the row's dot product with vector, summed in float32. One program per row."""
    row = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        # a weight is not read again before the next token: do not keep it in the cache
        a = tl.load(matrix + row * width + column, mask=inside, other=0,
                    eviction_policy="evict_first")
        b = tl.load(vector + column, mask=inside, other=0.0)
        total += a.to(tl.float32) * b.to(tl.float32)
    factor = 1.0 if scale is None else tl.load(scale + row).to(tl.float32)
    tl.store(out + row, factor * tl.sum(total))


@torch.library.custom_op("zerovla::matrix_times_vector", mutates_args=())  # opaque to torch.compile
def matrix_times_vector(
    matrix: torch.Tensor, scale: torch.Tensor | None, vector: torch.Tensor
) -> torch.Tensor:
    """matrix (out, in), row scales (out,) if it is in 8 bits, vector (..., in) -> (..., out)."""
    rows, width = matrix.shape
    out = vector.new_empty(*vector.shape[:-1], rows)
    row_times_vector[(rows,)](matrix, scale, vector.contiguous(), out, width, BLOCK=4096)
    return out


@matrix_times_vector.register_fake
def _(matrix, scale, vector):
    return vector.new_empty(*vector.shape[:-1], len(matrix))


def linear(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """layer(x), (..., in) -> (..., out)."""
    if x.numel() != layer.in_features:  # several vectors: cuBLAS is faster
        return int8.linear(layer, x)
    y = matrix_times_vector(layer.weight, getattr(layer, "row_scale", None), x)
    return y if layer.bias is None else y + layer.bias


class Linear(nn.Linear):
    """A layer that computes as `linear`. A class, not a function for each layer: then torch.compile
    sees the same code in all blocks, and compiles it once."""

    def forward(self, x):
        return linear(self, x)


class Joined(nn.Linear):
    """One of several layers that get the same input and share one matrix, self.shared[0]. The first
    computes the outputs of all; the others return their part, or compute it for another input."""

    def forward(self, x):
        [joint] = self.shared
        if self.place == 0:
            parts = linear(joint, x).split(joint.rows, dim=-1)
            for place, part in enumerate(parts):
                joint.waiting[place] = (x, part)
        computed_for, part = joint.waiting.pop(self.place, (None, None))
        return part if computed_for is x else linear(self, x)


def speed_up(model: nn.Module) -> None:
    """Make all linear layers of a model compute as `linear`, those of the same input together."""
    for module in model.modules():
        for names in SAME_INPUT:
            layers = [getattr(module, name, None) for name in names]
            if (all(isinstance(layer, nn.Linear) for layer in layers)
                    and len({(layer.in_features, layer.bias is None) for layer in layers}) == 1):
                join(layers)
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and not isinstance(layer, Joined):
            layer.__class__ = Linear


def join(layers: list[nn.Linear]) -> None:
    """Make one matrix of layers that get the same input."""
    joint = copy.deepcopy(layers[0])
    joint.rows = [layer.out_features for layer in layers]
    joint.waiting = {}  # {place: (input, output)}
    for name in ("weight", "bias", "row_scale"):
        if getattr(joint, name, None) is not None:
            joined = torch.cat([getattr(layer, name).data for layer in layers])
            getattr(joint, name).data = joined
            for layer, part in zip(layers, joined.split(joint.rows), strict=True):
                getattr(layer, name).data = part  # the same memory
    for place, layer in enumerate(layers):
        layer.__class__ = Joined
        layer.place = place
        layer.shared = [joint]  # in a list, so that its weights are not counted twice
