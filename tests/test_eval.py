"""eval_vla.py on real runs: it reproduces the logged numbers and notices broken inputs."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY, read_metrics, write_colors
from PIL import Image

import eval_vla
import export_vla
from act import Policy
from machinery.weights import open_weights


def evaluate(monkeypatch, capsys, run, out, *arguments) -> tuple[dict, str]:
    """Run eval_vla.py -> (eval.json, its output). Raises its SystemExit."""
    monkeypatch.setattr(sys, "argv", ["eval_vla.py", "--checkpoint", str(run), "--out", str(out / "eval.png"),
                                      *map(str, arguments)])
    eval_vla.main()
    return json.loads((out / "eval.json").read_text()), capsys.readouterr().out


def test_held_out_frames_reproduce_the_log(colors, monkeypatch, capsys, tmp_path):
    facts, printed = evaluate(monkeypatch, capsys, colors, tmp_path, "--samples", 32)
    logged = read_metrics(colors.parent)[100]
    accuracy = facts["accuracy"]
    assert accuracy["logged"] == logged["eval/accuracy"]
    assert accuracy["teacher_forced"] == pytest.approx(accuracy["logged"], abs=1e-6)
    assert accuracy["teacher_forced"] == accuracy["greedy"] == accuracy["inference"] > 0.85
    assert facts["agreement"] == 1 and facts["mismatch"] is None and "warning" not in printed
    for name in ("cold", "warmer"):
        ours, constant = (facts["datasets"][name][key] for key in ("inference", "most_frequent_bin"))
        assert ours["l1"] == pytest.approx(logged[f"eval/l1/{name}"], abs=1e-6)
        assert constant["accuracy"] < 0.7 and constant["l1"] > 0.5
        # half a bin of +-0.1, +-0.3 in the dataset's units; the gripper's 0 and 1 are bins themselves
        scale = {"cold": 0.1, "warmer": 0.3}[name]
        assert max(ours["l1_units_per_dim"][0] / scale, ours["l1_units_per_dim"][1] / (3 * scale)) < 0.005
        assert f"dataset {name} dim 2 accuracy 1 " in printed
    picture = np.array(Image.open(tmp_path / "eval.png"))
    assert (picture == [255, 140, 0]).all(-1).sum() > 500  # the predicted curves


def test_the_picture_counts_seconds_where_the_rate_is_known(colors, monkeypatch, capsys, tmp_path):
    """A dataset's recording.json may have it, as `fps`: other numbers below the same curves."""
    recording = Path(json.loads((colors / "config.json").read_text())["data_root_dir"], "cold/1.0.0/recording.json")
    pictures = []
    for rate in (None, 5):
        if rate:
            recording.write_text(json.dumps({"fps": rate}))
        try:
            evaluate(monkeypatch, capsys, colors, tmp_path, "--samples", 8)
        finally:
            recording.unlink(missing_ok=True)
        pictures.append(np.array(Image.open(tmp_path / "eval.png")))
    frames, seconds = (picture[56:206, 76:460] for picture in pictures)  # the first panel
    assert (frames[:123] == seconds[:123]).all() and (frames[123:] != seconds[123:]).sum() > 200


def test_train_frames_reproduce_the_log(colors, monkeypatch, capsys, tmp_path):
    """The frames are the last ones before the checkpoint: those of steps 96 to 100, which the log's last line
    averages."""
    asked, collect = [], eval_vla.collect

    def noting(policy, mixture, frames):
        asked.append((mixture, frames))
        return collect(policy, mixture, frames)

    monkeypatch.setattr(eval_vla, "collect", noting)
    facts, _ = evaluate(monkeypatch, capsys, colors, tmp_path, "--samples", 80, "--on-train-frames")
    assert facts["accuracy"]["logged"] == pytest.approx(read_metrics(colors.parent)[100]["accuracy"])
    assert facts["accuracy"]["inference"] == pytest.approx(facts["accuracy"]["logged"], abs=0.05)
    assert facts["frames"] == 80 and facts["mismatch"] is None
    last = np.stack(asked[0][0].draw(95 * 16, 80), axis=1)
    np.testing.assert_array_equal(np.concatenate([frames for _, frames in asked]),
                                  np.concatenate([last[last[:, 0] == d] for d in (0, 1)]))


def swapped(see):
    return lambda policy, image: see(policy, np.asarray(image)[..., ::-1].copy())


def test_swapped_colors_are_noticed(colors, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(Policy, "prepare_image", swapped(Policy.prepare_image))
    facts, printed = evaluate(monkeypatch, capsys, colors, tmp_path, "--samples", 32)
    assert facts["accuracy"]["inference"] < 0.8 < facts["accuracy"]["teacher_forced"]
    assert "warning: " in printed and "the order of colors" in printed
    with pytest.raises(SystemExit, match=r"error: .* of the action tokens .*order of colors"):
        evaluate(monkeypatch, capsys, colors, tmp_path, "--samples", 32, "--on-train-frames")


def changed_run(run, path, **changes):
    """A copy of a run with changes in config.json."""
    shutil.copytree(run, path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    return path


def test_another_resize_is_noticed(colors, monkeypatch, capsys, tmp_path):
    run = changed_run(colors, tmp_path / "run", image_resize_strategy="resize-crop")
    with pytest.raises(SystemExit, match=r"image_resize_strategy.*resize-crop"):
        evaluate(monkeypatch, capsys, run, tmp_path, "--samples", 32, "--on-train-frames")


def test_few_frames_do_not_warn():
    accuracy = {"logged": 0.6, "teacher_forced": 0.45, "greedy": 0.45, "inference": 0.45}
    assert not eval_vla.verdict(accuracy, 1.0, 16, "lanczos")[1]
    assert "0.600" in eval_vla.verdict(accuracy, 1.0, 1024, "lanczos")[1][0]


def test_a_config_that_is_not_the_training_s_is_noticed(colors, monkeypatch, capsys, tmp_path):
    """Then both paths agree, but are less accurate than the log."""
    run = changed_run(colors, tmp_path / "run", prompt_style="phi", action_normalization="normal")
    facts, printed = evaluate(monkeypatch, capsys, run, tmp_path, "--samples", 64, "--on-train-frames")
    assert facts["mismatch"] is None and "warning" in printed and "config.json" in printed


def test_augmentation_history_cameras_proprio_and_chunks(monkeypatch, capsys, tmp_path, plain_run):
    """Acting prepares every kind of input as training does."""
    write_colors(tmp_path, "arm", 0.2, cameras=2)
    config = {**TINY, "data_root_dir": str(tmp_path), "data_mix": "arm", "image_aug": True,
              "use_proprio": True,
              "datasets": {"arm": {"primary": "image", "wrist": "wrist"}}, "cameras": ["primary", "wrist"],
              "window_size": 2, "action_chunk": 2, "max_steps": 30, "learning_rate": 3e-3,
              "per_device_batch_size": 16,
              "run_root_dir": str(tmp_path / "runs"), "run_id": "arm"}
    (tmp_path / "arm.yaml").write_text(yaml.safe_dump(config))
    done = plain_run(tmp_path / "arm.yaml", "--deepspeed_config", "ds_configs/cpu.json")
    assert done.returncode == 0, done.text
    run = tmp_path / "runs/arm--image_aug"
    given, generate = [], Policy.generate

    def noting(policy, *inputs):
        given.append(inputs)
        return generate(policy, *inputs)

    monkeypatch.setattr(Policy, "generate", noting)
    for extra in ([], ["--on-train-frames"]):
        given.clear()
        facts, _ = evaluate(monkeypatch, capsys, run, tmp_path, "--samples", 32, *extra)
        assert facts["agreement"] == 1
        if not extra:  # training's evaluation uses the center crop, too
            assert facts["accuracy"]["teacher_forced"] == pytest.approx(facts["accuracy"]["logged"], abs=1e-6)
        assert len(facts["datasets"]["arm"]["inference"]["l1_units_per_dim"]) == 3
        for training, acting in ((given[0], given[1]), (given[2], given[3])):  # two batches
            assert training[0].shape == (16, 4, 28, 28, 3) and torch.equal(training[0], acting[0])
            assert training[1] == acting[1] and torch.equal(training[2], acting[2])


def test_results_go_beside_the_checkpoint(colors, monkeypatch, capsys, tmp_path):
    """A run's or an export's folder. A model of the hub has none."""
    monkeypatch.setattr(eval_vla, "evaluate", lambda *arguments: capsys.readouterr() and print(arguments[-1]))
    monkeypatch.chdir(tmp_path)
    for name in ("hf", "native"):
        export_vla.export(str(colors), tmp_path / name, name)
    (pt,) = (tmp_path / "native/checkpoints").glob("step-*.pt")
    checkpoint = open_weights(colors).tensors.where
    for where, folder in ((colors, colors), (checkpoint, colors), (tmp_path / "hf", tmp_path / "hf"),
                          (tmp_path / "native", tmp_path / "native"), (pt, tmp_path / "native")):
        data = [] if folder == colors else ["--config", colors.parents[1] / "colors.yaml"]
        monkeypatch.setattr(sys, "argv", ["eval_vla.py", "--checkpoint", str(where), *map(str, data)])
        eval_vla.main()
        assert capsys.readouterr().out.strip() == str(folder / "eval.png")


def test_mistakes_name_the_cure(colors, monkeypatch, capsys, tmp_path):
    for arguments, message in (
            (["--data_mix", "nothing_like_it"], "nothing_like_it"),
            (["--data_root_dir", tmp_path], "warmer.*data_root_dir")):
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            evaluate(monkeypatch, capsys, colors, tmp_path, *arguments)
    write_colors(tmp_path, "unseen", 1.0)
    run = changed_run(colors, tmp_path / "run", datasets={"unseen": {"primary": "image"}})
    unseen = ["--data_mix", "unseen", "--data_root_dir", tmp_path]
    with pytest.raises(SystemExit, match=r"unnorm_key 'hot'.*'cold', 'warmer'"):
        evaluate(monkeypatch, capsys, run, tmp_path, *unseen, "--unnorm_key", "hot")
    for key, whose in (([], "the data"), (["--unnorm_key", "warmer"], "warmer")):  # before fine-tuning
        facts, printed = evaluate(monkeypatch, capsys, run, tmp_path, *unseen, *key)
        assert re.search(f"unseen: .*statistics of {whose}", printed)
        assert facts["agreement"] == 1 and [*facts["datasets"]] == ["unseen"]
