"""What is recorded as a CUDA graph computes what launched kernels do. All but the first test need a GPU."""

import json

import numpy as np
import pytest
import torch
from conftest import TINY, ds_json, launch, read_metrics
from test_model import tiny_policy

from action_tokenizer import load_tokenizer
from machinery.config import TrainConfig
from machinery.cuda_graph import capture_passes
from model import VLA

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("changes, stage", [({}, 3), ({"cuda_graph": False}, 2)])
def test_what_is_not_captured(changes, stage, monkeypatch):
    """ZeRO-3, which gathers weights into new memory, and a model whose YAML switches it off."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cfg = TrainConfig(**TINY, action_dim=7, **changes)
    vla = VLA(cfg, load_tokenizer(cfg.tokenizer, cfg.add_action_tokens))
    capture_passes(vla, {"zero_optimization": {"stage": stage}})
    assert "forward" not in vars(vla)


@on_gpu
def test_replayed_steps_are_launched_ones(tiny, tmp_path):
    """Losses and norms over ten steps of four micro-batches each, in float32."""
    json_file = ds_json(tmp_path / "ds.json", 2, bf16=False)
    values = {}
    for cuda_graph in (True, False):
        runs = tmp_path / str(cuda_graph)
        config = tiny(run_root_dir=str(runs), cuda_graph=cuda_graph, max_steps=10, eval_interval=5)
        done = launch(config, "--deepspeed_config", json_file, launcher="python")
        assert done.returncode == 0, done.text
        values[cuda_graph] = read_metrics(runs)
    for step, launched in values[False].items():
        for key in ("loss", "grad_norm", "accuracy", "eval/loss"):
            if key in launched:
                assert values[True][step][key] == pytest.approx(launched[key], rel=2e-3), (step, key)


@on_gpu
@pytest.mark.parametrize("stage", [0, 2])
def test_a_captured_run_resumes_exactly(tiny, tmp_path, stage):
    """bf16, adapters, compiled blocks."""
    json_file = ds_json(tmp_path / "ds.json", stage)
    last = {}
    for name, stops in {"through": [8], "resumed": [5, 8]}.items():
        runs = tmp_path / name
        for stop in stops:
            config = tiny(run_root_dir=str(runs), max_steps=stop, compile=True)
            done = launch(config, "--deepspeed_config", json_file, launcher="python")
            assert done.returncode == 0, done.text
        last[name] = read_metrics(runs)[8]
    for key in ("loss", "grad_norm"):
        assert json.dumps(last["through"][key]) == json.dumps(last["resumed"][key])


@on_gpu
@pytest.mark.parametrize("changes", [{}, {"action_chunk": 3, "parallel_decoding": True}])
def test_recorded_acting_is_acting(changes):
    policy = tiny_policy(**changes)
    policy.vla.cuda()
    image, words = np.full((2, 28, 28, 3), 90, np.uint8), ["open it", "close it"]
    plain = policy.predict_action(image, words)
    policy.speed_up([2])
    assert len(policy.graphs) == 2
    np.testing.assert_allclose(policy.predict_action(image, words), plain, atol=1e-5)
