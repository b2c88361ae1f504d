"""The command line of a training: --config, the YAML; --set, what overrides it; --deepspeed_config, the JSON.

config.py reads the YAML. The JSON is read here, and refused where it says again what the YAML says, or what
nobody would read. Nothing here needs PyTorch, so that a mistake is told at once.
"""

import argparse
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path

from machinery.config import (
    TrainConfig,
    UserError,
    find_input,
    load_config,
    load_table,
    nearest,
    set_rank_env,
)


@functools.cache
def from_command_line(description: str) -> tuple[TrainConfig, dict]:
    """What --config, --set and --deepspeed_config say. Raises UserError."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--config", required=True, help="what is trained: a YAML file")
    parser.add_argument("--deepspeed_config", default="ds_configs/zero2.json",
                        help="how it is sharded: a DeepSpeed JSON")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="key=value",
                        help="override keys of the YAML")
    # launchers pass it in two spellings; the environment's LOCAL_RANK is what counts
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    args = parser.parse_args()
    set_rank_env()
    cfg, ds_config = load_config(find_input(args.config), args.set), load_ds_config(
        find_input(args.deepspeed_config))
    if cfg.frozen_weights and ds_config.get("zero_optimization", {}).get("stage") == 3:
        raise UserError(f"frozen_weights: {cfg.frozen_weights}: ZeRO-3 divides weights of the training's own "
                        "dtype only: take ds_configs/zero2.json")
    return cfg, ds_config


def load_ds_config(path: str | Path) -> dict:
    """DeepSpeed's JSON. Raises UserError when it says again what the YAML says, has a key that nobody reads,
    or lacks the optimizer."""
    try:
        ds_config = json.loads(Path(path).read_text("utf-8-sig"), object_pairs_hook=each_once)
    except (OSError, ValueError) as error:
        cure = ": JSON has no comments, and no comma before a closing bracket"
        cure *= isinstance(error, json.JSONDecodeError)
        raise UserError(f"--deepspeed_config {path}: {error}{cure}") from error
    if not isinstance(ds_config, dict):
        raise UserError(f"{path}: expected an object, {{...}}")
    table = load_table("deepspeed_json")
    sections, refused = table["sections"], table["refused"]
    for key, value in walk(ds_config):
        section, _, name = key.rpartition(".")
        known = sections.get(section) if section else [*sections, *table["keys"]]
        if key in refused and value is not False:
            raise UserError(f"{path}: remove {key!r}: {refused[key]}")
        if value == "auto":  # DeepSpeed leaves such keys out without a word: {"enabled": "auto"} is off
            raise UserError(f"{path}: {key}: \"auto\" is filled in by Hugging Face's Trainer, which is not "
                            "here: write a value, or remove the key")
        if isinstance(value, str) and re.fullmatch(r"[-+]?[\d.]+([eE][-+]?\d+)?|[Tt]rue|[Ff]alse", value):
            raise UserError(f'{path}: {key}: "{value}" is a text: write {value.lower()} without quotes')
        if known is not None and key not in refused and name not in known:
            raise UserError(f"{path}: unknown key {key!r}{nearest(name, known)}")
        if key in sections and not isinstance(value, dict):
            raise UserError(f"{path}: {key} must be an object, {{...}}")
    if str(ds_config.get("optimizer", {}).get("type")).lower() not in ("adam", "adamw"):
        raise UserError(f"{path}: optimizer.type must be Adam or AdamW (checkpoints hold their two moments), "
                        'as in "optimizer": {"type": "AdamW", "params": {"torch_adam": true, "fused": true}}')
    return ds_config


def each_once(pairs: list[tuple[str, object]]) -> dict:
    """A JSON's object, in which no key may stand twice."""
    names = [name for name, _ in pairs]
    if len({*names}) < len(names):
        raise ValueError(f"the key {max(names, key=names.count)!r} stands there twice")
    return dict(pairs)


def walk(section: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """{"a": {"b": 1}} -> ("a", {"b": 1}), ("a.b", 1)."""
    for key, value in section.items():
        yield prefix + key, value
        if isinstance(value, dict):
            yield from walk(value, f"{prefix}{key}.")
