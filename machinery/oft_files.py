"""OpenVLA-OFT's directories: OpenVLA's Hugging Face format, and a file for each new part.

    action_head--150000_checkpoint.pt         the head
    proprio_projector--150000_checkpoint.pt   the projector of the robot's state
    vision_backbone--150000_checkpoint.pt     with FiLM: both towers, their adapters, FiLM's layers
    dataset_statistics.json                   as OpenVLA's

Some facts are in no file: OFT takes them from the words of its command line. `recognized` infers
them from the shapes. Others, or other ones, can be put into DIR/zerovla.json, by their names in the
YAML: {"action_chunk": 10, "cameras": ["primary", "wrist", "side"]}.

Nothing is unpickled but tensors: torch.load(weights_only=True).
"""

import os
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from machinery.checkpoint import CheckpointError, Tensors
from machinery.config import load_table, one_line
from machinery.files import read_json

ROBOTS = load_table("openvla_oft")  # {numbers of an action: keys of TrainConfig}
OVERRIDES = "zerovla.json"
PROJECTOR = {"fc1": "0", "fc2": "2"}  # {OFT's layer: ours}
FILM = re.compile(r"(vision_backbone\.\w+)\.blocks\.(\d+)\.(scale|shift)\.(weight|bias)")


def is_variant(path: Path) -> bool:
    """Does a directory in OpenVLA's Hugging Face format come from OFT?"""
    code = path / "modeling_prismatic.py"
    return (any(path.glob("*--*_checkpoint.pt")) or (path / OVERRIDES).exists()
            or (code.exists() and "NUM_ACTIONS_CHUNK" in code.read_text(errors="replace")))


def read_part(path: Path, part: str) -> dict[str, torch.Tensor]:
    """The tensors of a part's file; {} without one. Raises CheckpointError."""
    files = sorted(path.glob(f"{part}--*"))
    if len(files) > 1:
        raise CheckpointError(f"{path}: {files[0].name} and {files[1].name}: remove one of them")
    if not files:
        return {}
    try:
        tensors = torch.load(files[0], "cpu", mmap=True, weights_only=True)
        return {name.removeprefix("module."): tensor.detach() for name, tensor in tensors.items()}
    except Exception as error:  # PyTorch raises many kinds
        raise CheckpointError(f"{files[0]}: damaged, or it has more than tensors: "
                              f"{one_line(error)[:200]}") from error


def add_parts(path: Path, config: dict, tensors: Tensors, norm_stats: dict,
              ours: Callable[[str], str]) -> dict:
    """Add the parts beside the model's files to `tensors`. Returns the config with their facts.

    config: of the model's own files; ours: a parameter's name in OpenVLA's class -> its name here.
    Raises CheckpointError for parts and facts that are missing.
    """
    head = read_part(path, "action_head")
    state = read_part(path, "proprio_projector")
    towers = read_part(path, "vision_backbone")
    if not head and (state or towers):
        raise CheckpointError(f"{path}: action_head--*_checkpoint.pt is missing")
    if head and "model.fc2.weight" not in head:
        raise CheckpointError(f"{path}: its action head is not OFT's L1 head")
    if head and not (path / "dataset_statistics.json").exists():  # config.json has the base's
        raise CheckpointError(f"{path}: dataset_statistics.json is missing")
    for name, tensor in head.items():
        add(tensors, f"action_head.{name}", tensor)
    for name, tensor in state.items():
        layer, _, leaf = name.partition(".")
        add(tensors, f"proprio_projector.{PROJECTOR.get(layer, layer)}.{leaf}", tensor)
    if towers:
        for name in [name for name in tensors.shapes if name.startswith("vision_backbone.")]:
            del tensors.shapes[name], tensors.pieces["weight", name]
        add_towers(path, tensors, towers, ours)
    overrides = read_json(path / OVERRIDES, {})
    if "action_head" not in config:
        config = config | recognized(path, head, state, towers, norm_stats, overrides)
    return config | overrides


def add(tensors: Tensors, name: str, tensor: torch.Tensor) -> None:
    """Add a tensor in memory."""
    tensors.add(name, tensor.shape, lambda start, stop: tensor.reshape(-1)[start:stop])


def add_towers(path: Path, tensors: Tensors, towers: dict, ours: Callable[[str], str]) -> None:
    """The towers with their adapters merged, and FiLM's layers."""
    alpha = read_json(path / "lora_adapter/adapter_config.json", {}).get("lora_alpha")
    for key, tensor in towers.items():
        layer, _, leaf = key.rpartition(".base_layer.")
        if found := FILM.fullmatch(key):
            tower, block, part, leaf = found.groups()
            name = ours(f"{tower}.").replace("vision_backbone", "film") + f"{block}.{part}.{leaf}"
            add(tensors, name, tensor)
        elif leaf == "weight":
            a, b = (towers[f"{layer}.lora_{side}.default.weight"] for side in "AB")
            scale = (alpha or min(len(a), 16)) / len(a)
            tensors.add(ours(f"{layer}.weight".replace(".block.", ".")), tensor.shape,
                        partial(merged, tensor, a, b, scale))
        elif ".lora_" not in key:
            add(tensors, ours(key.replace(".block.", ".").replace(".base_layer.", ".")), tensor)


def merged(weight, a, b, scale: float, start: int, stop: int) -> torch.Tensor:
    """Elements [start, stop) of a matrix, or a convolution's kernel, with its adapter."""
    if not b.any():  # unchanged, in its dtype
        return weight.reshape(-1)[start:stop]
    change = b.flatten(1).float() @ a.flatten(1).float()
    return weight.float().reshape(-1)[start:stop] + scale * change.reshape(-1)[start:stop]


def recognized(path: Path, head: dict, state: dict, towers: dict, norm_stats: dict, overrides: dict
               ) -> dict:
    """The keys of TrainConfig that OFT's files do not contain. overrides: those of zerovla.json.

    Raises CheckpointError, which names the key, if they cannot be inferred.
    """
    if not head and "action_head" not in overrides:
        raise CheckpointError(
            f"{path} is OpenVLA-OFT's variant with action tokens. Its files do not name its "
            f'attention: write {{"action_head": "oft_tokens"}} into {path / OVERRIDES} if each '
            "token sees all others (SimpleVLA-RL), or oft_tokens_causal if only earlier ones "
            "(RLinf). If it has "
            "an L1 head, action_head--*_checkpoint.pt is missing")
    width = len(head["model.fc2.weight"]) if head else 7
    config = {"image_resize_strategy": "oft", "image_aug": True, "film": bool(towers),
              "action_dim": width, "action_normalization": "bounds_q99", "cameras": ["primary"]}
    config |= ROBOTS.get(width, {})
    if any("bridge" in name for name in norm_stats):
        config["action_chunk"] = 5
    if head:
        config["action_head"] = "l1"
    if state:
        config |= {"use_proprio": True, "proprio_dim": state["fc1.weight"].shape[1]}
    elif width == 7:
        config["cameras"] = ["primary"]
    config |= overrides
    if "action_chunk" not in config:
        raise CheckpointError(f"{path}: actions of {width} numbers: write "
                              f'{{"action_chunk": 8, "cameras": ["primary", "wrist"]}}, or as it '
                              f"was trained, into {path / OVERRIDES}")
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {path}: taken for chunks of {config['action_chunk']} steps, cameras "
              f"{', '.join(config['cameras'])}, {config['action_normalization']}, as OFT's "
              f"constants say: correct it with {OVERRIDES} beside it", file=sys.stderr)
    return config
