"""train_vla.py with other parts of DeepSpeed, for cases of train_throughput.py.

    deepspeed --num_gpus 2 bench/train_variant.py --only gather_ahead+scatter_together \\
        --config CONFIG.yaml --deepspeed_config JSON
    deepspeed --num_gpus 2 bench/train_variant.py --deepcompile \\
        --config CONFIG.yaml --deepspeed_config JSON --set zero_speed=false compile=false

--only applies these replacements of machinery/zero_speed.py and no others. --deepcompile lets
DeepSpeed's DeepCompile schedule ZeRO's communication inside one compiled graph. It first builds C++
code, for which CUDA_HOME/include must contain cuda.h (or CPATH name its folder). All other
arguments are train_vla.py's.
"""

import argparse
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import deepspeed

import train_vla
from machinery import zero_speed


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--only")
    parser.add_argument("--deepcompile", action="store_true")
    args, sys.argv[1:] = parser.parse_known_args()
    if args.only:
        zero_speed.apply = functools.partial(zero_speed.apply, only=args.only.split("+"))
    if args.deepcompile:
        train_vla.zero.gather_per_block = lambda modules: None  # DeepCompile removes the hooks it is for
        deepspeed.initialize = functools.partial(initialize_and_compile, deepspeed.initialize)
    train_vla.main()


def initialize_and_compile(initialize, config: dict, **arguments):
    """deepspeed.initialize, then the engine compiled with DeepCompile."""
    config = {**config, "compile": {"deepcompile": True}}
    engine, *others = initialize(config=config, **arguments)
    engine.compile()
    return engine, *others


if __name__ == "__main__":
    main()
