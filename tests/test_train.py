"""The real thing: train_vla.py under its launchers, on CPU, with real data and checkpoints."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
import yaml
from conftest import FIXTURES, ROOT, TINY, ds_json, launch, launch_command, read_metrics
from PIL import Image
from safetensors import safe_open

from machinery import plots
from machinery import ranks as job
from machinery.checkpoint import Checkpoint, CheckpointError, list_checkpoints
from machinery.rlds import write_rlds


def losses(runs) -> np.ndarray:
    return np.array([values["loss"] for _, values in sorted(read_metrics(runs).items())])


# ------------------------------------------------------------------------------------------------------------
# A run's directory, and resuming it


@pytest.fixture(scope="module")
def finished(tmp_path_factory, ranks):
    """A finished run of 12 steps on two ranks with checkpoints every 5, and what it printed."""
    path = tmp_path_factory.mktemp("finished")
    values = {**TINY, "run_root_dir": str(path / "runs"), "max_steps": 12, "save_interval": 5,
              "keep_checkpoints": 0, "eval_interval": 6, "run_id_note": "note", "image_aug": True}
    (path / "tiny.yaml").write_text(yaml.safe_dump(values))
    done = ranks(2, path / "tiny.yaml")
    assert done.returncode == 0, done.text
    return path, done.text


def test_run_directory(finished):
    path, text = finished
    run = path / "runs/tiny+n1+b8+x7--note--image_aug"  # OpenVLA's way to name it
    assert sorted(p.name for p in run.iterdir() if "tfevents" not in p.name) == [
        ".lock", "checkpoints", "config.json", "config.yaml", "curves.png", "dataset_statistics.json",
        "ds_config.json", "first_batch.png", "metrics.jsonl", "tokenizer"]
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config == json.loads((run / "config.json").read_text())
    assert config["action_dim"] == 4 and config["max_steps"] == 12
    statistics = json.loads((run / "dataset_statistics.json").read_text())["metaworld_demo"]
    assert statistics["action"]["mask"] == [True, True, True, False] and statistics["num_trajectories"] == 144
    tags = [p.name for p in list_checkpoints(run / "checkpoints")]
    assert [tag.rsplit("-loss=")[0] for tag in tags] == [
        "step-000005-epoch-00", "step-000010-epoch-00", "step-000012-epoch-00"]
    assert all(len(tag.split("loss=")[1]) == 6 for tag in tags)
    values = read_metrics(path / "runs")[12]
    assert {"loss", "accuracy", "l1", "learning_rate", "grad_norm", "step_seconds", "data_seconds", "host_gb",
            "samples_per_second", "eval/loss", "eval/accuracy",
            "eval/accuracy_of_most_frequent_bin"} <= set(values)
    assert "model vla-full-train parameters" in text and "first_prompt '<s>In: What action should" in text


def test_tensorboard_has_curves_and_the_first_batch(finished, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.compat.notf", types.ModuleType("notf"))  # as run.py does
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (run,) = (finished[0] / "runs").iterdir()
    events = EventAccumulator(str(run)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 13))
    tags = events.Tags()
    groups = sorted({tag.partition("/")[0] for tag in tags["scalars"] + tags["images"]})
    assert groups == ["eval", "train", "tuning", "view"]  # as TensorBoard sorts them
    assert "tuning/learning_rate" in tags["scalars"] and "eval/accuracy" in tags["scalars"]
    assert b"max_steps: 12" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    image = events.Images("view/first_batch")[0]
    assert image.width >= 448 and image.height > 500


def test_samples_of_the_first_batch_have_a_margin(finished):
    (run,) = (finished[0] / "runs").iterdir()
    picture = np.array(Image.open(run / "first_batch.png"))[:224]  # images of 28 pixels, enlarged
    assert (picture[:, 224:248] == 255).all() and not (picture[:, [0, 223, 248]] == 255).all((0, 2)).any()


def test_the_curves_of_a_run(finished, tmp_path):
    """Each number has its curve; those that are not finite, and a line cut short, are left out."""
    (run,) = (finished[0] / "runs").iterdir()
    orange = (np.array(Image.open(run / "curves.png")) == [255, 140, 0]).all(-1)
    assert orange[:500, :480].any() and not orange[:, 480:].any()  # held-out: loss and accuracy alone
    lines = [json.dumps({"step": step, **{key: 1 / (1 + step) for key in plots.KEYS}}) for step in range(3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 3, "loss": NaN}', '{"step": 4, "lo']))
    plots.draw_training(tmp_path)
    ink = (np.array(Image.open(tmp_path / "curves.png")) == [68, 68, 68]).all(-1)
    assert all(ink[top + 20 : top + 122, left : left + 384].sum() > 300
               for left in (76, 556) for top in (56, 206, 356))


def weights(checkpoint) -> dict[str, torch.Tensor]:
    reader = Checkpoint(checkpoint)
    return {f"{kind}/{name}": reader.read(name, 0, int(np.prod(shape)), kind)
            for name, shape in reader.shapes.items() for kind in ("weight", "exp_avg", "exp_avg_sq")}


@pytest.mark.parametrize("stage, count", [(2, 2), (3, 1)])
def test_resuming_is_exact_and_may_change_stage_and_ranks(stage, count, finished, tmp_path, ranks):
    """From step 5 to 12 again: with the same JSON and ranks bit for bit, with others to bf16's tolerance."""
    path, _ = finished
    (run,) = (path / "runs").iterdir()
    shutil.copytree(run, tmp_path / "runs" / run.name)
    for checkpoint in list_checkpoints(tmp_path / "runs" / run.name / "checkpoints")[1:]:
        shutil.rmtree(checkpoint)
    killed = tmp_path / f"runs/{run.name}/checkpoints/step-000009-epoch-00-loss=1.0000.tmp"
    killed.mkdir()  # what a save leaves behind that was killed
    values = {**yaml.safe_load((path / "tiny.yaml").read_text()), "run_root_dir": str(tmp_path / "runs")}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values))
    command = [tmp_path / "tiny.yaml", "--deepspeed_config", f"ds_configs/zero{stage}.json"]
    done = ranks(count, *command) if count > 1 else launch(*command, launcher="torchrun")
    assert done.returncode == 0 and "resumed" in done.text, done.text
    before, after = losses(path / "runs"), losses(tmp_path / "runs")
    first = weights(list_checkpoints(run / "checkpoints")[-1])
    second = weights(list_checkpoints(tmp_path / "runs" / run.name / "checkpoints")[-1])
    assert len(after) == 12
    if stage == 2:
        assert (before == after).all()
        assert all(torch.equal(first[name], second[name]) for name in first)
    else:
        np.testing.assert_allclose(after, before, rtol=1e-3)
        assert all(torch.allclose(first[name], second[name], atol=2e-2) for name in first)


def test_a_run_is_not_continued_on_other_data(finished, tmp_path, plain_run):
    """And what describes it is still there afterwards: it is what acting goes by."""
    path, _ = finished
    (run,) = (path / "runs").iterdir()
    copy = shutil.copytree(run, tmp_path / "runs" / run.name)
    with open(copy / "metrics.jsonl", "a") as file:
        file.write('{"step": 1, "los{"step": 12}\n')  # what a full disk has left
    values = {**yaml.safe_load((path / "tiny.yaml").read_text()), "run_root_dir": str(tmp_path / "runs")}
    values["datasets"] = {"metaworld_demo": {"primary": "image", "action": "action[:3], action[-1:] invert"}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values))
    done = plain_run(tmp_path / "tiny.yaml")
    assert done.returncode == 1, done.text
    was = "datasets.metaworld_demo.action was 'action' and is now 'action[:3], action[-1:] invert'"
    assert was in done.text, done.text
    for name in ("dataset_statistics.json", "config.yaml"):
        assert (copy / name).read_text() == (run / name).read_text()
    values["datasets"] = TINY["datasets"]
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values))
    done = plain_run(tmp_path / "tiny.yaml", "--set", "max_steps=13", "eval_interval=0")
    assert done.returncode == 0, done.text
    assert (copy / "metrics.jsonl").read_text().startswith((run / "metrics.jsonl").read_text())
    assert sorted(read_metrics(tmp_path / "runs")) == list(range(1, 14))


def test_what_the_yaml_says_of_the_model_counts(finished, tmp_path, plain_run):
    """Also where it is what the default would be."""
    (checkpoint, *_) = list_checkpoints(next((finished[0] / "runs").iterdir()) / "checkpoints")
    values = {key: TINY[key] for key in TINY if key not in ("image_size", "tokenizer", "llm_backbone")}
    values |= {"run_root_dir": str(tmp_path / "runs"), "run_id": "r", "max_steps": 1, "num_workers": 0,
               "pretrained_checkpoint": str(checkpoint), "is_resume": False, "add_action_tokens": False}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values))
    done = plain_run(tmp_path / "tiny.yaml")
    assert done.returncode == 0, done.text
    config = yaml.safe_load((tmp_path / "runs/r/config.yaml").read_text())
    assert config["add_action_tokens"] is False and config["image_size"] == 28


def test_starting_a_finished_run_again_does_nothing(finished, plain_run):
    path, _ = finished
    before = sorted(p.stat().st_mtime_ns for p in path.rglob("*.safetensors"))
    done = plain_run(path / "tiny.yaml")
    assert done.returncode == 0 and "already at step 12 of 12" in done.text
    assert sorted(p.stat().st_mtime_ns for p in path.rglob("*.safetensors")) == before


def test_a_checkpoint_is_plain_safetensors(finished):
    (run,) = (finished[0] / "runs").iterdir()
    (newest,) = list_checkpoints(run / "checkpoints")[-1:]
    assert {p.suffix for p in newest.iterdir()} == {".json", ".safetensors"}
    reader = Checkpoint(newest)
    reader.verify()
    counted = sum(f.get_slice(key).get_shape()[0] for p in newest.glob("*.safetensors")
                  for f in [safe_open(p, "pt")] for key in f.keys() if key.startswith("weight/"))
    assert counted == sum(int(np.prod(facts["shape"])) for facts in reader.meta["tensors"].values())


@pytest.mark.parametrize("what, message", [
    ("flipped", "checksum"),
    ("short", "damaged"),
    ("gone", "not a readable checkpoint"),
])
def test_a_damaged_checkpoint_is_refused_by_name(what, message, finished, tmp_path):
    (run,) = (finished[0] / "runs").iterdir()
    copy = tmp_path / "step-000012"
    shutil.copytree(list_checkpoints(run / "checkpoints")[-1], copy)
    file = sorted(copy.glob("*.safetensors"))[1]
    data = bytearray(file.read_bytes())
    match what:
        case "flipped":
            data[-5] ^= 1
            file.write_bytes(data)
        case "short":
            file.write_bytes(data[:-5])
        case "gone":
            file.unlink()
    with pytest.raises(CheckpointError, match=message) as error:
        Checkpoint(copy).verify()
    assert str(copy) in str(error.value)


# ------------------------------------------------------------------------------------------------------------
# Mistakes are explained, and leave nothing behind


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"learnin_rate": 1e-3}, "learnin_rate: .*learning_rate"),
        ({"global_batch_size": 10}, "global_batch_size 10 .*per_device_batch_size"),
        ({"expected_world_size": 8}, "expected_world_size .*8.* 1 ranks"),
        ({"cameras": ["front"]}, "cameras: .*'front'.* primary"),
        ({"data_root_dir": "/nowhere"}, "/nowhere/metaworld_demo"),
        ({"data_root_dir": str(ROOT)}, f"{ROOT}/metaworld_demo: .*TFDS"),
        ({"data_root_dir": str(FIXTURES), "data_mix": "model", "datasets": {"model": {}}}, "TFDS"),
        ({"data_mix": "metawrld_demo"}, "data_mix: .*'metaworld_demo'"),
        ({"data_mix": {}}, "data_mix: .*empty"),
        ({"data_mix": "roboset"}, "data_mix: .*empty"),
        ({"datasets": {"metaworld_demo": {"primary": "front"}}}, "observation/front"),
        ({"arch_specifier": "mlp"}, "arch_specifier 'mlp'.*linear"),
        ({"freeze_llm_backbone": True}, "unfreeze_last_llm_layer"),
        ({"pretrained_checkpoint": "openvla/openvla-7b"}, "openvla/openvla-7b .*is_resume: false"),
    ],
)
def test_a_mistake_ends_in_one_line_and_leaves_nothing_behind(changes, words, tiny, tmp_path,
                                                              plain_run):
    """tests/test_configs.py has the mistakes that need no data."""
    done = plain_run(tiny(**changes))
    (line,) = [line for line in done.text.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and "Traceback" not in done.text
    assert re.search(words, line), line
    assert not list((tmp_path / "runs").rglob("config.yaml"))


@pytest.mark.parametrize("change, words", [
    ({"train_batch_size": 8}, "remove train_batch_size: .*global_batch_size"),  # load_ds_config's
    ({"zero_optimization": {"overlap_com": True}}, "overlap_com"),  # the others: zero.check_json's
    ({"zero_optimization": {"stage": 5}}, "stage"),
    ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, "nvme"),
    ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
     "ratio.*torch_adam"),
    ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9]}}}, "optimizer.params: "),
    ({"optimizer": {"type": "AdamW", "params": {"torch_adam": True, "eps": -1}}}, "epsilon"),
    ({"gradient_predivide_factor": 2.0}, "gradient_predivide_factor"),
    ({"communication_data_type": "float32"}, "communication_data_type"),
])
def test_mistakes_in_the_json(change, words, tiny, tmp_path, plain_run):
    done = plain_run(tiny(), "--deepspeed_config", ds_json(tmp_path / "ds.json", 2, **change))
    assert done.returncode == 1 and re.search("error: .*" + words, done.text), done.text


def test_nothing_offloaded_may_be_said_in_three_ways(tiny, tmp_path, plain_run):
    for part in (None, {}, {"device": "none"}):
        zero = {"stage": 2, "offload_optimizer": part}
        done = plain_run(tiny(max_steps=1), "--deepspeed_config",
                         ds_json(tmp_path / "ds.json", 2, False, zero_optimization=zero))
        assert done.returncode == 0 and "host_gb" not in done.text, done.text


def test_an_unreadable_checkpoint_ends_all_ranks(finished, tmp_path, ranks):
    path, _ = finished
    (run,) = (path / "runs").iterdir()
    shutil.copytree(run, tmp_path / "runs" / run.name)
    newest = list_checkpoints(tmp_path / "runs" / run.name / "checkpoints")[-1]
    file = sorted(newest.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:100])
    values = {**yaml.safe_load((path / "tiny.yaml").read_text()), "run_root_dir": str(tmp_path / "runs")}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values))
    done = ranks(2, tmp_path / "tiny.yaml")
    assert done.returncode != 0 and f"{newest}: not a readable checkpoint" in done.text


# ------------------------------------------------------------------------------------------------------------
# Memory and cores


def test_ten_times_the_data_takes_no_more_memory(tiny, tmp_path, plain_run):
    """Host memory of the trainer on 400 and on 4,000 frames of 20 KB."""
    import tensorflow_datasets as tfds

    f = tfds.features
    features = {"steps": f.Dataset({
        "observation": {"image": f.Image(shape=(96, 96, 3), encoding_format="png")},
        "action": f.Tensor(shape=(4,), dtype=np.float32), "language_instruction": f.Text()})}
    rng = np.random.default_rng(0)
    png = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (96, 96, 3), dtype=np.uint8)).save(png, "png")
    assert len(png.getvalue()) > 20_000
    memory = {}
    for size in (10, 100):
        actions = rng.uniform(-1, 1, (size, 40, 4)).astype(np.float32)
        episodes = [{"steps": [{"observation": {"image": png.getvalue()}, "action": action,
                                "language_instruction": "push"} for action in episode]}
                    for episode in actions]
        write_rlds(tmp_path, f"noise{size}", "1.0.0", features, {"train": episodes})
        config = tiny(data_root_dir=str(tmp_path), data_mix=f"noise{size}", run_id=f"r{size}", num_workers=2,
                      datasets={f"noise{size}": {"primary": "image"}}, log_interval=20)
        done = plain_run(config)
        assert done.returncode == 0, done.text
        lines = (tmp_path / f"runs/r{size}/metrics.jsonl").read_text().splitlines()
        memory[size] = json.loads(lines[0])["host_gb"]
    assert abs(memory[100] - memory[10]) < 0.1, memory


@pytest.mark.parametrize("other, omp_num_threads, threads", [
    (("this machine", {0, 1, 2, 3}), None, 2),
    (("this machine", {0}), None, 4),
    (("another machine", {0, 1, 2, 3}), None, 4),
    (("this machine", {0, 1, 2, 3}), "4", 4),
], ids=["same cores", "bound to others", "another machine", "the user's number"])
def test_ranks_share_the_cores_they_may_use(other, omp_num_threads, threads, monkeypatch):
    monkeypatch.setattr(job.socket, "gethostname", lambda: "this machine")
    monkeypatch.setattr(job.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setattr(job, "gather", lambda mine: [mine, other])
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp_num_threads:
        monkeypatch.setenv("OMP_NUM_THREADS", omp_num_threads)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        job.share_cores()
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


CORES = r"""
import os, threading
import torch
from machinery import ranks
alone = torch.get_num_threads()
neighbor = ranks.start_job()
loader = threading.Thread(target=torch.set_num_threads, args=[1])  # DataLoader's, which pins memory for a GPU
loader.start()
loader.join()
os.write(1, f"threads {alone} {torch.get_num_threads()}\n".encode())
neighbor.release()
torch.distributed.destroy_process_group()
"""


def test_ranks_that_deepspeed_starts_share_the_cores(tmp_path):
    (tmp_path / "cores.py").write_text(CORES)
    plain = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    how = launch_command("any", ranks=2, script=tmp_path / "cores.py")
    how["env"] = {**plain, "PATH": how["env"]["PATH"], "PYTHONPATH": str(ROOT)}
    done = subprocess.run(**how, capture_output=True, text=True, timeout=600)
    (first, second) = re.findall(r"threads (\d+) (\d+)", done.stdout)
    alone, shared = map(int, first)
    assert first == second and shared == max(1, alone // 2), (done.stdout, done.stderr)
