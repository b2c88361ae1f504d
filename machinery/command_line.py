"""The command line of train_vla.py: a YAML, a JSON, and keys of the YAML after --set.

`--help` and docs/keys.md list all keys of the YAML, by the comments in config.py.
"""

import argparse
import inspect
import itertools
import json
import re
import sys
import textwrap
from collections.abc import Iterator
from typing import NamedTuple

from machinery.config import (
    Recipe,
    TrainConfig,
    UserError,
    exit_with_one_line,
    find_input,
    load_config,
    load_ds_config,
    set_rank_env,
)


class Key(NamedTuple):
    section: str
    name: str
    default: str  # in YAML
    text: str


def keys(model: type[TrainConfig] | type[Recipe]) -> Iterator[Key]:
    """The keys that a class in config.py declares: a section's first line is a comment, and a key's
    comment is above it or at the end of its line."""
    defaults = vars(model())
    for section in inspect.getsource(model).split("\n\n"):
        title, *lines = section.splitlines()
        comments = []
        for line in lines:
            name = line.strip().partition(":")[0]
            comment = line.partition("# ")[2]
            if comment:
                comments.append(comment)
            if name not in defaults:
                continue
            choices = re.search(r"Literal\[(.*?)\]", str(model.__annotations__[name]))
            if choices:
                comments.append(f"({choices[1]})")
            default = json.dumps(defaults[name]).strip('"')
            yield Key(title.strip(" #"), name, default, " ".join(comments))
            comments = []


def help_on_keys() -> str:
    """The end of --help."""
    text = "keys of the YAML, and their defaults:\n"
    every = itertools.chain(keys(TrainConfig), keys(Recipe))
    for section, group in itertools.groupby(every, lambda key: key.section):
        text += f"\n{section}\n"
        for key in group:
            line = f"  {key.name + ': ' + key.default:38} {key.text}"
            text += textwrap.fill(line, 100, subsequent_indent=" " * 41,
                                  break_on_hyphens=False) + "\n"
    return text


@exit_with_one_line()
def parse_command_line(description: str) -> tuple[TrainConfig, dict]:
    """The files that the command line names, read and checked; also sets this process's rank.

    description: the program's docstring. Ends the program if there is a mistake.
    """
    parser = argparse.ArgumentParser(
        description=description.partition("\n")[0], epilog=help_on_keys(),
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file of the training")
    parser.add_argument("--deepspeed_config", default="ds_configs/zero2.json",
                        help="DeepSpeed JSON: how it is sharded")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="key=value",
                        help="override keys of the YAML")
    # launchers pass it in two spellings; we read LOCAL_RANK from the environment
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    for option, after in itertools.pairwise([*sys.argv[1:], "--"]):
        name, _, value = option.partition("=")
        key = name.removeprefix("--").replace("-", "_")
        if name.startswith("--") and key in TrainConfig.model_fields:
            value = value or ("true" if after.startswith("--") else after)
            raise UserError(f"{option} is a key of the YAML: --set {key}={value}")
    args = parser.parse_args()
    set_rank_env()
    cfg = load_config(find_input(args.config), args.set)
    ds_config = load_ds_config(find_input(args.deepspeed_config))
    if cfg.frozen_weights and ds_config.get("zero_optimization", {}).get("stage") == 3:
        raise UserError("frozen_weights: ZeRO-3 cannot shard 8-bit weights: use zero2.json")
    return cfg, ds_config
