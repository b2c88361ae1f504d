"""Many short trainings in one job: conftest.ranks(2, cells.json, script="tests/run_cells.py").

cells.json: {name: {"config": keys of TrainConfig, "ds_config": a DeepSpeed JSON}}. Each cell runs
as if started separately, but all share one process group. A "*" in pretrained_checkpoint replaces
the loss in a checkpoint's name. "altered" names a function of DeepSpeed whose source should differ.
After each cell rank 0 prints {"collective ranks": elements that it carried}.

Compiled cells use the environment's TORCH_COMPILE_BACKEND. The default captures, partitions and
recomputes as inductor does, but generates no C++, which takes minutes. `make slow` runs inductor, too.
"""

import argparse
import contextlib
import functools
import gc
import glob
import inspect
import json
import os
import pkgutil
from collections import Counter
from pathlib import Path

import torch
from deepspeed.utils import groups

import train_vla
from machinery import config, frames, plots, ranks, run, survey

COLLECTIVES = {"all_reduce": "tensor", "all_gather_into_tensor": "output_tensor",
               "reduce_scatter_tensor": "input"}


def count(name: str, tensor: str, carried: Counter) -> None:
    """Let one of PyTorch's collectives count its elements, for each number of ranks."""
    dist, collective = train_vla.dist, getattr(train_vla.dist, name)
    signature = inspect.signature(collective)

    def counting(*arguments, **named):
        given = signature.bind(*arguments, **named).arguments
        carried[f"{name} {dist.get_world_size(given.get('group'))}"] += given[tensor].numel()
        return collective(*arguments, **named)

    setattr(dist, name, counting)


@contextlib.contextmanager
def altered(path: str):
    """Let a function of DeepSpeed compute the same, but have another source."""
    owner, _, name = path.rpartition(".")
    owner = pkgutil.resolve_name(f"deepspeed.runtime.zero.{owner}")
    function = getattr(owner, name)

    def another(*arguments, **named):
        return function(*arguments, **named)

    setattr(owner, name, another)
    yield
    setattr(owner, name, function)


class Called:
    """For frames.start_program: a training's survey and curves without a fork of this large process."""

    returncode = 0

    def __init__(self, module: str, job: str, **how):
        if module == "machinery.plots":
            plots.draw_training(Path(job))
            self.lines = ""
        else:
            self.lines = "\n".join(survey.mixture_lines(json.loads(job)))

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        return self.lines, None


def main() -> None:
    frames.start_program = Called
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path)
    cells = json.loads(parser.parse_args().config.read_text())
    backend = os.environ.get("TORCH_COMPILE_BACKEND", "aot_eager_decomp_partition")
    torch.compile = functools.partial(torch.compile, backend=backend)
    carried: Counter[str] = Counter()
    for collective, tensor in COLLECTIVES.items():
        count(collective, tensor, carried)  # before DeepSpeed takes hold of them
    neighbor = ranks.start_job()
    gc.freeze()  # DeepSpeed collects garbage whenever it starts: skip everything that was imported
    for name, cell in cells.items():
        print(f"cell {name}", flush=True)
        values = cell["config"]
        if "pretrained_checkpoint" in values:
            (values["pretrained_checkpoint"],) = glob.glob(values["pretrained_checkpoint"])
        cfg = config.TrainConfig(**values)
        carried.clear()
        with altered(cell["altered"]) if "altered" in cell else contextlib.nullcontext():
            train_vla.train(**run.settle(cfg, cell["ds_config"]))
        if train_vla.dist.get_rank() == 0:
            print(f"carried {name} {json.dumps(carried)}", flush=True)
        gc.collect()  # an engine and its hooks refer to each other
        groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # DeepSpeed keeps hpZ's until the process ends
    gc.unfreeze()
    neighbor.release()
    train_vla.dist.destroy_process_group()
