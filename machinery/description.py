"""What the files of a model from elsewhere may contain.

A directory in one of OpenVLA's formats, and everything from the hub, was written by others. Their
config.json describes a model, and nothing else: `checked` has the list. What this project would
load wrongly, without an error, is refused.
"""

import fnmatch
import re
from collections.abc import Iterable
from pathlib import Path

from machinery.backbones import TOWER_ARGUMENTS, llm_fields
from machinery.checkpoint import CheckpointError
from machinery.config import load_table

# keys that describe a model, as opposed to its training: those that an export contains
DESCRIPTION = """vision_backbone llm_backbone arch_specifier prompt_style image_size
    image_resize_strategy action_chunk action_dim action_head action_normalization add_action_tokens
    cameras datasets features film image_aug max_prefix parallel_decoding proprio_dim use_proprio
    window_size""".split()
PLAIN = re.compile(r"[\w.+-]*")  # text that is not a path or an address


def checked(config: dict, where: Path) -> dict:
    """Check the description of a model that others wrote, and return it.

    It may set the keys of DESCRIPTION. What reaches timm and transformers are names and numbers for
    arguments of their models: not a path, an address, or code to load. Raises CheckpointError.
    """
    llm = config["llm_backbone"]
    if not isinstance(llm, dict):
        raise CheckpointError(f"{where}: config.json: llm_backbone {llm!r}: expected the fields of "
                              "a language model")
    # transformers would ignore the others, or load something
    llm = {key: llm[key] for key in llm.keys() & llm_fields(llm["model_type"])}
    config = {**config, "llm_backbone": llm}
    keys = config.keys() - {*DESCRIPTION}
    for name, tower in config["vision_backbone"].items():
        keys |= {f"vision_backbone.{name}.{key}" for key in tower.keys() - TOWER_ARGUMENTS}
    values = {**config["vision_backbone"], "llm_backbone": llm}
    keys |= {f"{key}: {value}" for key, value in values.items() if not is_plain(value)}
    if keys:
        raise CheckpointError(f"{where}: config.json sets {', '.join(sorted(keys))}: a model from "
                              "elsewhere may not (paths and addresses, for example)")
    return config


def is_plain(value) -> bool:
    """Whether a value of a JSON file contains names and numbers only."""
    if isinstance(value, dict):
        return is_plain([*value.keys(), *value.values()])
    if isinstance(value, list):
        return all(map(is_plain, value))
    return not isinstance(value, str) or bool(PLAIN.fullmatch(value))


# ---- Refused: it would act nonsense ------------------------------------------------------------


def refuse_parts(where: str, names: Iterable[str]) -> None:
    """Raise CheckpointError for files of parts that this project would leave out."""
    for pattern, part in load_table("prismatic")["parts_left_out"].items():
        for name in fnmatch.filter(names, pattern):
            raise CheckpointError(f"{where}: {name} is {part}. This project cannot load it, and "
                                  "without it the model would act nonsense")


def refuse_quantized(where: Path, config: dict, dtypes: dict[str, str]) -> None:
    """Raise CheckpointError for weights that are whole numbers, or 8-bit floats: their scales are
    elsewhere, if they were saved. dtypes: {parameter: safetensors' name of its type}."""
    small = [name for name, dtype in dtypes.items()
             if name.endswith("weight") and dtype not in ("F64", "F32", "F16", "BF16")]
    if small or "quantization_config" in config:
        raise CheckpointError(f"{where}: the weights are quantized "
                              f"({', '.join(small[:1]) or 'config.json'}): take the full ones "
                              "(--int8 saves as much memory)")
