"""The command line of train_vla.py: a YAML, a JSON, and keys of the YAML after --set."""

import argparse
import runpy
import sys

from machinery.config import (
    PROJECT,
    TrainConfig,
    UserError,
    exit_with_one_line,
    find_input,
    load_config,
    load_ds_config,
    set_rank_env,
)


@exit_with_one_line()
def parse_command_line(description: str) -> tuple[TrainConfig, dict]:
    """The files that the command line names, read and checked; also sets this process's rank.

    description: the program's docstring. Ends the program if there is a mistake.
    """
    parser = argparse.ArgumentParser(
        description=description.partition("\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file of the training")
    parser.add_argument("--deepspeed_config", default="ds_configs/zero2.json",
                        help="DeepSpeed JSON: how it is sharded")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="key=value",
                        help="override keys of the YAML")
    # launchers pass it in two spellings; we read LOCAL_RANK from the environment
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    if {"-h", "--help"} & {*sys.argv}:
        parser.epilog = runpy.run_path(str(PROJECT / "docs/keys.py"))["for_terminal"]()
    args = parser.parse_args()
    set_rank_env()
    cfg = load_config(find_input(args.config), args.set)
    ds_config = load_ds_config(find_input(args.deepspeed_config))
    if cfg.frozen_weights and ds_config.get("zero_optimization", {}).get("stage") == 3:
        raise UserError("frozen_weights: ZeRO-3 cannot shard 8-bit weights: use zero2.json")
    return cfg, ds_config
