"""Frozen weights in 8 bits: integers in -127..127, and a scale for each output row.

    W[i, j] is about scale[i] * number[i, j]          a byte each instead of bf16's two; errors are
                                                      below 0.4% of the row's largest weight

Products are computed in the training's own dtype. The numbers are cast to bf16 (exactly) while a
layer computes, and again in the backward pass: only the bytes are kept in between. `shrink`
converts a layer.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Product(torch.autograd.Function):
    """x (..., in), number (out, in) int8, scale (out,) -> scale * (number x), (..., out).

    PyTorch's own autograd would keep the bf16 numbers until the backward pass, which saves no
    memory.
    """

    @staticmethod
    def forward(ctx, x, number, scale):
        ctx.save_for_backward(number, scale)
        # scaled in float32: in bf16, torch.compile would recognize the pattern and use its own
        # kernel, which takes 32 ms on an H100 instead of 0.05 (bench/act_latency.py's profile)
        return (F.linear(x, number.to(x.dtype)).float() * scale).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient):
        number, scale = ctx.saved_tensors
        return (gradient * scale) @ number.to(gradient.dtype), None, None


def linear(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """layer(x), (..., in) -> (..., out), whether or not its weight was shrunk."""
    if layer.weight.dtype != torch.int8:
        return F.linear(x, layer.weight, layer.bias)
    y = Product.apply(x, layer.weight, layer.row_scale)
    return y if layer.bias is None else y + layer.bias


class Int8Linear(nn.Linear):
    """A linear layer whose weight was shrunk."""

    forward = linear


def shrink(layer: nn.Linear) -> None:
    """Replace a layer's weight (out, in) with 8-bit numbers, on its device. It cannot be trained.

    The scale is rounded to the weight's dtype before the division, so that multiplying by it later
    adds no error.
    """
    weight = layer.weight.detach().float()
    scale = (weight.abs().amax(1) / 127).clamp(min=1e-12).to(layer.weight.dtype)
    number = (weight / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    layer.weight = nn.Parameter(number, requires_grad=False)
    layer.register_buffer("row_scale", scale, persistent=False)
    if type(layer) is nn.Linear:
        layer.__class__ = Int8Linear
