"""LoRA: a frozen matrix W learns through two narrow ones beside it (Hu et al., 2021; OpenVLA's finetune.py).

    y = W x + b + alpha / rank * B (A x)            W (out, in), A (rank, in), B (out, rank)

A begins random and B zero, so the first step sees exactly what the base computes. Of OpenVLA-7B, A and B of
rank 32 are 1.5 %: gradients, AdamW's moments and checkpoints shrink as much; what remains is the base itself,
which int8.py halves. To act, or to be exported, B A is added to W, and nothing is slower than before.

An adapter is two more parameters of its layer, `<layer>.lora_A` and `<layer>.lora_B`, each a trained matrix
like any other: for AdamW's groups, for ZeRO's slices, and in checkpoints.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from machinery import int8
from machinery.checkpoint import Tensors
from model import VLA

ADAPTER = ("lora_A", "lora_B")
BASE = ("vision_backbone", "projector", "llm_backbone")  # a module that is not OpenVLA's is trained whole


class Adapted(nn.Linear):
    """A linear layer, its weight frozen and perhaps in 8 bits, with an adapter."""

    def forward(self, x):
        """x (..., in) -> (..., out)."""
        return int8.linear(self, x) + self.lora_scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


def linear_layers(vla: VLA) -> dict[str, nn.Linear]:
    """{name: layer} of all linear layers of towers, projector and language model but its head."""
    head = vla.llm.get_output_embeddings()
    return {name: layer for name, layer in vla.named_modules() if isinstance(layer, nn.Linear)
            and layer is not head and name.split(".")[0] in BASE}


def add_adapters(vla: VLA, rank: int, alpha: float, seed: int) -> None:
    """After VLA.freeze: what it left trainable of the base gets adapters instead, and is frozen.

    As peft's "gaussian": A from N(0, 1 / rank^2), B zero. They are drawn apart, on the CPU, and so are the
    same however the model is sharded, and on any device.
    """
    draw, device = torch.Generator().manual_seed(seed), next(vla.projector.parameters()).device
    for layer in linear_layers(vla).values():
        if layer.weight.requires_grad:
            start = (torch.randn(rank, layer.in_features, generator=draw) / rank,
                     torch.zeros(layer.out_features, rank))
            layer.__class__, layer.lora_scale = Adapted, alpha / rank
            for name, value in zip(ADAPTER, start, strict=True):
                layer.register_parameter(name, nn.Parameter(value.to(device, layer.weight.dtype)))
    for name, param in vla.named_parameters():
        if name.split(".")[0] in BASE and not name.endswith(ADAPTER):
            param.requires_grad_(False)


def merged(base: Tensors, trained: Tensors, scale: float) -> Tensors:
    """The tensors of `base` with what was `trained` on it: whole parameters in place of its own, and adapters
    added to the matrix they belong to, as it is read and in float32. scale: alpha / rank."""
    def add(name: str, start: int, stop: int) -> torch.Tensor:  # elements [start, stop) of W + scale B A
        layer, width = name.removesuffix("weight"), base.shapes[name][1]
        a = trained.whole(layer + ADAPTER[0])
        first, last, rank = start // width, -(-stop // width), len(a)
        b = trained.read(layer + ADAPTER[1], first * rank, last * rank).view(-1, rank)
        product = (b.float() @ a.float()).flatten()[start - first * width : stop - first * width]
        return base.read(name, start, stop) + scale * product

    whole = Tensors(trained.where)
    for name, shape in {**base.shapes, **trained.shapes}.items():
        if name.removesuffix("weight") + ADAPTER[0] in trained.shapes:
            whole.add(name, shape, partial(add, name))
        elif not name.endswith(ADAPTER):
            whole.add(name, shape, partial((trained if name in trained.shapes else base).read, name))
    return whole
