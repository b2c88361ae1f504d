"""Writes what OpenVLA-OFT keeps beside OpenVLA's files (oft_files.py reads it)."""

import re
from collections.abc import Callable
from pathlib import Path

import torch

from machinery.oft_files import PROJECTOR

RANK = 32  # of the adapters that OFT expects beside FiLM


def write_parts(tensors: dict[str, torch.Tensor], out: Path, step: str,
                theirs: Callable[[str], str]) -> None:
    """Write OFT's .pt files. tensors: action_head.*, proprio_projector.*, film.* and, beside
    film.*, vision_backbone.*; theirs: a parameter's name here -> in OpenVLA's class.

    OFT gives each linear layer and convolution of towers with FiLM an adapter. These ones change
    nothing: B is zero.
    """
    draw = torch.Generator().manual_seed(0)
    parts = {}
    adapted = {name.removesuffix(".weight") for name, tensor in tensors.items()
               if name.startswith("vision_backbone") and tensor.ndim in (2, 4)}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        layer, _, leaf = name.rpartition(".")
        if part == "film":
            tower, _, rest = rest.partition(".")
            key = theirs(f"vision_backbone.{tower}.blocks.{rest}")
        elif part == "vision_backbone":
            key = re.sub(r"(\.blocks\.\d+\.)", r"\1block.", theirs(name))
        else:
            names = {old: new for new, old in PROJECTOR.items()} if part != "action_head" else {}
            first, _, last = rest.partition(".")
            key = f"module.{names.get(first, first)}.{last}"
        state = parts.setdefault(part.replace("film", "vision_backbone"), {})
        if layer not in adapted or leaf not in ("weight", "bias"):
            state[key] = tensor
            continue
        key = key.removesuffix(f".{leaf}")
        state[f"{key}.base_layer.{leaf}"] = tensor
        if leaf == "weight":
            rows, columns, *kernel = tensor.shape
            a = torch.randn(RANK, columns, *kernel, generator=draw) / RANK
            state[f"{key}.lora_A.default.weight"] = a.to(tensor.dtype)
            b = torch.zeros(rows, RANK, *[1 for _ in kernel], dtype=tensor.dtype)
            state[f"{key}.lora_B.default.weight"] = b
    for part, state in parts.items():
        torch.save(state, out / f"{part}--{step}_checkpoint.pt")
