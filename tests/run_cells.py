"""Many short trainings in one job, for test_zero.py: `deepspeed tests/run_cells.py --config cells.json`.

cells.json: {name: {"config": keys of TrainConfig, "ds_config": a DeepSpeed JSON}}. Each runs as if started by
itself; only the start of Python and of the process group, which take longest, are shared. A "*" in
pretrained_checkpoint stands for what is not known beforehand, the loss in the checkpoint's name. After each,
rank 0 prints {"collective ranks": elements that it carried}.
"""

import argparse
import contextlib
import gc
import glob
import inspect
import json
import pkgutil
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import train_vla
from machinery import config, ranks

COLLECTIVES = {"all_reduce": "tensor", "all_gather_into_tensor": "output_tensor",
               "reduce_scatter_tensor": "input"}


def count(name: str, tensor: str, carried: Counter) -> None:
    """Let one of PyTorch's collectives count the elements of its largest tensor, for each number of ranks."""
    dist, collective = train_vla.dist, getattr(train_vla.dist, name)
    signature = inspect.signature(collective)

    def counting(*arguments, **named):
        given = signature.bind(*arguments, **named).arguments
        carried[f"{name} {dist.get_world_size(given.get('group'))}"] += given[tensor].numel()
        return collective(*arguments, **named)

    setattr(dist, name, counting)


@contextlib.contextmanager
def altered(path: str):
    """Let a function of DeepSpeed compute what it did, but have another source."""
    owner, _, name = path.rpartition(".")
    owner = pkgutil.resolve_name(f"deepspeed.runtime.zero.{owner}")
    function = getattr(owner, name)

    def another(*arguments, **named):
        return function(*arguments, **named)

    setattr(owner, name, another)
    yield
    setattr(owner, name, function)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path)
    parser.add_argument("--local_rank")
    cells = json.loads(parser.parse_args().config.read_text())
    carried: Counter[str] = Counter()
    for collective, tensor in COLLECTIVES.items():
        count(collective, tensor, carried)  # before DeepSpeed takes hold of them
    neighbour = ranks.start_job()
    gc.freeze()  # DeepSpeed collects garbage whenever it starts: let it not look at all that was imported
    for name, cell in cells.items():
        print(f"cell {name}", flush=True)
        values = cell["config"]
        if "pretrained_checkpoint" in values:
            (values["pretrained_checkpoint"],) = glob.glob(values["pretrained_checkpoint"])
        cfg = config.TrainConfig(**values)
        carried.clear()
        with altered(cell["altered"]) if "altered" in cell else contextlib.nullcontext():
            train_vla.train(cfg, cell["ds_config"])
        if train_vla.dist.get_rank() == 0:
            print(f"carried {name} {json.dumps(carried)}", flush=True)
        gc.collect()  # an engine and its hooks refer to each other
    gc.unfreeze()
    neighbour.release()
    train_vla.dist.destroy_process_group()
