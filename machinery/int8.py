"""Frozen weights in 8 bits: whole numbers in -127..127, and a scale for each output row.

    W[i, j] is about scale[i] * number[i, j]          a byte each, where bf16 takes two; errors below 0.4 % of
                                                      the largest of a row

They are multiplied in the training's own dtype: its numbers become bf16 (exactly) while a layer computes, and
again in the backward pass, so that only bytes are kept in between. `shrink` turns a layer into this.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Product(torch.autograd.Function):
    """x (..., in), number (out, in) int8, scale (out,) -> scale * (number x), (..., out). PyTorch's own would
    keep the bf16 numbers until the backward pass, and save nothing."""

    @staticmethod
    def forward(ctx, x, number, scale):
        ctx.save_for_backward(number, scale)
        # scaled in float32: in bf16, torch.compile would recognise this and put a kernel of its own there,
        # which on an H100 takes 32 ms where a bf16 product takes 0.05 (bench/act_latency.py's profile)
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
    """Put a layer's weight (out, in) in 8 bits, where it is; it cannot be trained any more. The scale is
    rounded to the weight's dtype before it is divided by, so nothing is lost when it is multiplied with."""
    weight = layer.weight.detach().float()
    scale = (weight.abs().amax(1) / 127).clamp(min=1e-12).to(layer.weight.dtype)
    number = (weight / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    layer.weight = nn.Parameter(number, requires_grad=False)
    layer.register_buffer("row_scale", scale, persistent=False)
    if type(layer) is nn.Linear:
        layer.__class__ = Int8Linear
