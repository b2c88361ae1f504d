"""Eight ranks compute what one does, also with hpZ; a run resumes with 4 ranks and with 8 again.

Very small trainings in float32, in four jobs (see run_cells.py). So many processes take minutes to
start: pytest -m slow tests/test_scaling.py
"""

import json
import math
import re
import runpy
from collections import Counter

import numpy as np
import pytest
from conftest import ROOT
from test_zero import cell, read

from machinery.checkpoint import Checkpoint, list_checkpoints

STEPS = 6
HPZ = 2  # hpZ treats each two of the 8 ranks as a machine, and gathers again only within it
JSONS = ["zero1", "zero2", "zero3", "zero3_hpz"]
# passes over all weights
PASSES = {"all_reduce": 2, "all_gather_into_tensor": 1, "reduce_scatter_tensor": 1}


def run(root, prefix, json_name, ranks, **changes):
    """An entry for run_cells.py: a run whose losses show everything that a step does."""
    shows = {"learning_rate": 0.01, "weight_decay": 5.0, "max_grad_norm": 0.5, "max_steps": STEPS}
    entry = cell(root, f"{prefix}-{json_name}", json_name, ranks, "frozen_vision", bf16=False,
                 **shows | changes)
    if json_name == "zero3_hpz":
        zero = entry[f"{prefix}-{json_name}"]["ds_config"]["zero_optimization"]
        zero["zero_hpz_partition_size"] = HPZ
    return entry


def counted(root, json_name, steps):
    """A run with two micro-batches a step. It fetches no weight early and keeps none for later:
    DeepSpeed's limits for both are far below a 7B's size, but above this model's."""
    entry = run(root, f"count{steps}", json_name, 8, max_steps=steps, global_batch_size=16,
                per_device_batch_size=1, freeze_vision_backbone=False)
    if "zero3" in json_name:
        entry[f"count{steps}-{json_name}"]["ds_config"]["zero_optimization"] |= {
            "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 0}
    return entry


@pytest.fixture(scope="module")
def runs(tmp_path_factory, ranks):
    """The folder with all runs. Those with hpZ come last in a job: DeepSpeed keeps hpZ's groups of
    ranks until the process ends, and gives them to every later engine."""
    root = tmp_path_factory.mktemp("scaling")
    given = {"pretrained_checkpoint": str(root / "eight-zero3/checkpoints/*"), "is_resume": False,
             "seed": 8}
    eight = {}
    for name in JSONS:
        eight |= run(root, "eight", name, 8) | counted(root, name, 1) | counted(root, name, 3)
        eight |= run(root, "chain", name, 8, max_steps=2)
    four, again = {}, {}
    for name in JSONS:
        four |= run(root, "chain", name, 4, max_steps=4)
        again |= run(root, "given", name, 8, **given) | run(root, "chain", name, 8)
    jobs = [(1, run(root, "one", "zero0", 1)), (8, eight), (4, four), (8, again)]
    for number, (count, cells) in enumerate(jobs):
        path = root / f"job{number}.json"
        path.write_text(json.dumps(cells))
        done = ranks(count, path, script="tests/run_cells.py")
        assert done.returncode == 0, done.text[-5000:]
        (root / f"job{number}.txt").write_text(done.text)
    return root


def agree(found, reference):
    """Losses and norms of float32 runs, at every step."""
    assert len(read(found)) == STEPS
    np.testing.assert_allclose(read(found), read(reference), rtol=1e-5)
    np.testing.assert_allclose(read(found, "grad_norm"), read(reference, "grad_norm"), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("json_name", JSONS)
def test_eight_ranks_compute_what_one_does(json_name, runs):
    agree(runs / f"eight-{json_name}", runs / "one-zero0")


@pytest.mark.slow
@pytest.mark.parametrize("json_name", JSONS)
def test_a_run_goes_on_with_four_ranks_and_with_eight_again(json_name, runs):
    agree(runs / f"chain-{json_name}", runs / "one-zero0")


@pytest.mark.slow
def test_frozen_weights_that_a_run_begins_with_reach_hpz(runs):
    """DeepSpeed copies them for hpZ when it gets the model, before they are filled in."""
    for name in JSONS[1:]:
        agree(runs / f"given-{name}", runs / "given-zero1")


@pytest.mark.slow
def test_a_step_sends_what_is_reckoned_with(runs):
    """Passes over the weights in a step of two micro-batches, as in bench/many_machines.py."""
    lines = re.findall(r"^carried (count\S+) (.*)$", (runs / "job1.txt").read_text(), re.MULTILINE)
    carried = {name: Counter(json.loads(counts)) for name, counts in lines}
    shapes = Checkpoint(list_checkpoints(runs / "count1-zero1/checkpoints")[-1]).shapes
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    used = sum(size for name, size in sizes.items()  # the tower's second block only ZeRO-3 gathers
               if "vision" not in name or "blocks.0" in name or "embed" in name)
    stages = runpy.run_path(str(ROOT / "bench/many_machines.py"))["stages"](gpus=HPZ, ranks=8, a=2)
    for name in JSONS:
        size = sum(sizes.values()) if name.startswith("zero3") else used
        passes = Counter({key: count / 2 / size for key, count in
                          (carried[f"count3-{name}"] - carried[f"count1-{name}"]).items()})
        everywhere = sum(times * passes[f"{collective} 8"] for collective, times in PASSES.items())
        _, beside, _, alone, within = stages[name]
        assert everywhere == pytest.approx(beside + alone, abs=0.2), name  # padding
        assert passes[f"all_gather_into_tensor {HPZ}"] == pytest.approx(within, abs=0.2), name
