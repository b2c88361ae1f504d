"""Where a run starts: its own checkpoint alone, under its own config; from any folder; offline."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from conftest import ROOT, TINY, launch_command, read_metrics, wait_for_steps
from safetensors import safe_open

from machinery import checkpoint
from machinery.checkpoint import Checkpoint, list_checkpoints

SHAPE = ("vision_backbone", "llm_backbone", "tokenizer", "arch_specifier", "image_size", "add_action_tokens")


@pytest.fixture(scope="module")
def begun(tmp_path_factory, plain_run):
    """A run of two steps that began with another run's weights; its YAML leaves the shape unsaid."""
    path = tmp_path_factory.mktemp("begun")
    whole = {**TINY, "run_root_dir": str(path), "max_steps": 2, "run_id": "base"}
    tuned = {key: value for key, value in whole.items() if key not in SHAPE}
    tuned |= {"run_id": "tuned", "base_vlm": str(path / "base"), "weight_decay": 0.1}
    for values in (whole, tuned):
        (path / f"{values['run_id']}.yaml").write_text(yaml.safe_dump(values))
        done = plain_run(path / f"{values['run_id']}.yaml")
        assert done.returncode == 0, done.text
    return path


@pytest.fixture
def runs(begun, tmp_path, plain_run):
    """A copy of both runs; the base is gone."""
    shutil.copytree(begun / "tuned", tmp_path / "tuned")
    values = {**yaml.safe_load((begun / "tuned.yaml").read_text()), "run_root_dir": str(tmp_path)}

    def go_on(**changes):
        (tmp_path / "tuned.yaml").write_text(yaml.safe_dump({**values, **changes}))
        return plain_run(tmp_path / "tuned.yaml")

    return tmp_path, go_on


def contents(run) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_run_goes_on_without_what_it_began_with(runs, begun):
    path, go_on = runs
    shutil.move(begun / "base", begun / "gone")
    for steps, changes in ((3, {}), (4, {"base_vlm": str(path / "moved/base")}),
                           (5, {"tokenizer": str(path / "moved/tokenizer")})):
        done = go_on(max_steps=steps, **changes)
        assert done.returncode == 0 and "resumed" in done.text, done.text
    assert sorted(read_metrics(path)) == [1, 2, 3, 4, 5]
    done = go_on(run_id="other")
    shutil.move(begun / "gone", begun / "base")
    assert done.returncode == 1 and f"error: '{begun / 'base'}'" in done.text, done.text


CHANGES = {  # what a YAML may say otherwise under the same run_id -> whether the run honors it
    "cameras": (["primary", "primary"], False), "action_chunk": (4, False), "window_size": (2, False),
    "use_proprio": (True, False), "parallel_decoding": (True, False),
    "action_normalization": ("normal", False),
    "datasets": ({"metaworld_demo": {"primary": "image", "absolute": 0}}, False), "seed": (8, False),
    "prompt_style": ("phi", False), "base_vlm": (str(ROOT), False), "freeze_vision_backbone": (True, False),
    "image_size": (56, False), "global_batch_size": (8, False), "data_mix": ({"metaworld_demo": 0.5}, False),
    "learning_rate": (0.5, True), "weight_decay": (0.3, True), "keep_checkpoints": (1, True),
    "per_device_batch_size": (4, True), "eval_samples": (16, True)}


@pytest.mark.parametrize("key", CHANGES)
def test_another_config_under_the_same_run_is_refused_by_name_or_honoured(key, runs):
    path, go_on = runs
    (value, honored), before = CHANGES[key], contents(path / "tuned")
    done = go_on(max_steps=3, run_id="tuned", **{key: value})
    if honored:
        assert done.returncode == 0 and "resumed" in done.text, done.text
        assert yaml.safe_load((path / "tuned/config.yaml").read_text())[key] == value
        if key == "learning_rate":
            assert read_metrics(path)[3]["learning_rate"] == value
    else:
        assert done.returncode == 1 and f" {key}" in done.text and " was " in done.text, done.text
        assert "is_a_training" not in done.text and "Traceback" not in done.text
        assert contents(path / "tuned") == before


def test_a_finished_run_is_left_as_it_is(runs):
    path, go_on = runs
    before = contents(path / "tuned")
    done = go_on()
    assert done.returncode == 0 and "already at step 2 of 2" in done.text and "max_steps" in done.text
    assert contents(path / "tuned") == before


def test_each_file_of_a_base_is_opened_once_and_each_slice_read_once(begun, monkeypatch):
    opened, read = [], []
    monkeypatch.setattr(checkpoint, "safe_open",
                        lambda path, *_: (opened.append(path), safe_open(path, "pt"))[1])
    original = checkpoint.SafetensorsFile.read
    monkeypatch.setattr(checkpoint.SafetensorsFile, "read",
                        lambda self, *which: (read.append(which), original(self, *which))[1])
    (path,) = list_checkpoints(begun / "base/checkpoints")
    source = Checkpoint(path)
    assert len(opened) == len(set(opened)) == len(list(path.glob("*.safetensors"))) and not read
    for name, shape in source.shapes.items():  # shapes without reading; a slice costs no more than itself
        assert source.read(name, 1, 3).tolist() == source.whole(name).flatten()[1:3].tolist() or shape == [1]
    assert len(read) == 2 * len(source.shapes) and len(opened) == len(list(path.glob("*.safetensors")))


# ---- Starting from anywhere --------------------------------------------------------------------------------


def test_from_another_directory(tmp_path):
    command = [sys.executable, ROOT / "train_vla.py", "--config", ROOT / "configs/demo.yaml",
               "--deepspeed_config", "ds_configs/cpu.json", "--set", "max_steps=1", "eval_interval=0",
               "save_interval=0", "num_workers=0", "eval_samples=8", "global_batch_size=4",
               "per_device_batch_size=4"]
    env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "OMP_NUM_THREADS": "1"}  # no hub answers there
    done = subprocess.run(command, cwd=tmp_path, env=env, text=True, capture_output=True)
    assert done.returncode == 0 and "done steps 1" in done.stdout, done.stdout + done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]  # what is written goes here


def test_a_hub_that_does_not_answer_is_not_waited_for(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump({**TINY, "tokenizer": "some/tokenizer", "run_root_dir": str(tmp_path)}))
    how = launch_command(config, launcher="python")
    how["env"] |= {"HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run(**how, text=True, capture_output=True, timeout=120)  # its client would try longer
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search("error: tokenizer: .*'some/tokenizer'.*hub does not answer", done.stderr), done.stderr


# ---- Ctrl-C ------------------------------------------------------------------------------------------------


def test_ctrl_c_saves_and_ends(tiny, tmp_path, fork):
    job = fork(1, tiny(max_steps=5000, num_workers=1))
    wait_for_steps(tmp_path / "runs", 2, job)
    job.send(signal.SIGINT)  # a terminal sends it to all processes, workers too
    status, text, _ = job.wait()
    assert status == 0 and "stopped by SIGINT at step" in text and "Traceback" not in text, text
    (saved,) = list_checkpoints(next((tmp_path / "runs").iterdir()) / "checkpoints")
    Checkpoint(saved).verify()
    assert "\r" not in text and "it/s" not in text  # no progress bar where the output is no terminal


WAITING = """
import time
from machinery.config import set_rank_env
from machinery.ranks import Preemption, start_job
set_rank_env()
start_job()
preemption = Preemption()
print("ready", flush=True)
time.sleep(600)
"""


def test_a_second_ctrl_c_kills(tmp_path, fork):
    """But not what a launcher passes on of the first, moments later."""
    (tmp_path / "waiting.py").write_text(WAITING)
    job = fork(1, "none", script=tmp_path / "waiting.py")
    while "ready" not in job.output.read_text():
        assert job.running(), job.output.read_text()
        time.sleep(0.05)
    for _ in range(2):
        job.send(signal.SIGINT)
        time.sleep(0.3)
    assert job.running()
    time.sleep(1)
    job.send(signal.SIGINT)
    assert job.wait()[0] == 130
