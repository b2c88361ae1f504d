"""LoRA: a frozen matrix W learns through two narrow ones beside it.

Hu et al., 2021, and OpenVLA's finetune.py:

    y = W x + b + alpha / rank * B (A x)            W (out, in), A (rank, in), B (out, rank)

A starts random and B zero, so that the first step computes exactly what the base does. For
OpenVLA-7B, A and B of rank 32 have 1.5% of the parameters. Gradients, AdamW's moments and
checkpoints shrink as much; what remains is the base itself, which int8.py halves. To act or to be
exported, B A is added to W: nothing is slower than before.

An adapter is two more parameters of its layer, `<layer>.lora_A` and `<layer>.lora_B`. AdamW's
groups, ZeRO's slices and checkpoints treat them like any other trained matrix.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from machinery import int8
from machinery.checkpoint import Tensors
from model import VLA

ADAPTER = ("lora_A", "lora_B")
BASE = ("vision_backbone", "projector", "llm_backbone")  # others are new, and trained in full


class Adapted(nn.Linear):
    """A linear layer with an adapter. Its weight is frozen, and may be in 8 bits."""

    def forward(self, x):
        """x (..., in) -> (..., out)."""
        y = int8.linear(self, x)
        return y + self.lora_scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


def linear_layers(vla: VLA) -> dict[str, nn.Linear]:
    """{name: layer}: linear layers of towers, projector and language model, except its head."""
    head = vla.llm.get_output_embeddings()
    return {name: layer for name, layer in vla.named_modules()
            if isinstance(layer, nn.Linear) and layer is not head and name.split(".")[0] in BASE}


def add_adapters(vla: VLA, rank: int, alpha: float, seed: int) -> None:
    """After VLA.freeze: put adapters beside the base's trainable layers, and freeze the base.

    A is drawn from N(0, 1 / rank^2), as peft's "gaussian", and B is zero. A has its own generator,
    on the CPU: it is the same on any device and however the model is sharded.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(vla.projector.parameters()).device
    for layer in linear_layers(vla).values():
        if not layer.weight.requires_grad:
            continue
        a = torch.randn(rank, layer.in_features, generator=generator) / rank
        b = torch.zeros(layer.out_features, rank)
        layer.__class__ = Adapted
        layer.lora_scale = alpha / rank
        for name, value in zip(ADAPTER, (a, b), strict=True):
            layer.register_parameter(name, nn.Parameter(value.to(device, layer.weight.dtype)))
    for name, param in vla.named_parameters():
        if name.split(".")[0] in BASE and not name.endswith(ADAPTER):
            param.requires_grad_(False)


def merged(base: Tensors, trained: Tensors, scale: float) -> Tensors:
    """The tensors of `base` with those `trained` on it.

    Parameters trained in full replace the base's. Adapters are added to their matrix as it is read,
    in float32. scale: alpha / rank.
    """
    def add_adapter(name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of W + scale B A, flattened."""
        layer = name.removesuffix("weight")
        width = base.shapes[name][1]
        first_row = start // width
        last_row = -(-stop // width)  # not included
        a = trained.whole(layer + "lora_A")  # (rank, in)
        rank = len(a)
        b = trained.read(layer + "lora_B", first_row * rank, last_row * rank).view(-1, rank)
        product = (b.float() @ a.float()).flatten()
        offset = first_row * width
        return base.read(name, start, stop) + scale * product[start - offset : stop - offset]

    result = Tensors(trained.where)
    for name, shape in {**base.shapes, **trained.shapes}.items():
        if name.removesuffix("weight") + "lora_A" in trained.shapes:
            result.add(name, shape, partial(add_adapter, name))
        elif name in trained.shapes and not name.endswith(ADAPTER):
            result.add(name, shape, partial(trained.read, name))
        elif name in base.shapes:
            result.add(name, shape, partial(base.read, name))
    return result
