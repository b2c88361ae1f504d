"""examples/own_robot: record, train, serve, drive, with a robot of a few lines in place of MuJoCo's; and the
template configs/my_robot.yaml, which both read."""

import importlib
import json
import re
import sys
import types

import mobile
import numpy as np
import pytest
import yaml
from conftest import ROOT, TINY

import act
import eval_vla
from machinery import inspect_data
from machinery.config import load_config
from machinery.inspect_data import find_subjects

EXAMPLE = ROOT / "examples/own_robot"
STATE = np.array([0.3, 1.5, -0.9, 0])


class PaperArm:
    """A robot that is where it was told to be, and shows it in two pictures."""

    cameras = ("outside", "wrist")
    action_names = state_names = ("shoulder", "elbow", "wrist", "gripper_closed")

    def reset(self, seed: int) -> None:
        self.goal = STATE + np.append(np.random.default_rng(seed).uniform(-0.2, 0.2, 3), 1)
        self.at, self.told, self.instruction = STATE, [], "touch the red disc"

    def look(self) -> dict:
        images = {}
        for name in self.cameras:
            ramp = np.arange(64) + 50 + 60 * self.at[0] + len(name)
            images[name] = np.broadcast_to(ramp[:, None], (48, 64, 3)).astype(np.uint8)
        return {"images": images, "state": self.at.astype(np.float32)}

    def move(self, action) -> None:
        self.at = np.asarray(action, np.float64)
        self.told.append(self.at)

    @property
    def target(self) -> np.ndarray:
        return self.at

    @property
    def solved(self) -> bool:
        return bool(np.allclose(self.at, self.goal, atol=0.01))

    def expert(self) -> np.ndarray:
        near = np.abs(self.goal - self.at)[:3].max() < 0.03
        return np.float32(self.goal if near else [*(self.at + self.goal)[:3] / 2, 0])


@pytest.fixture
def example(monkeypatch):
    """The example's two programs, with PaperArm as the robot."""
    monkeypatch.setitem(sys.modules, "robot", types.SimpleNamespace(Arm=PaperArm))
    monkeypatch.syspath_prepend(str(EXAMPLE))
    yield types.SimpleNamespace(**{name: importlib.import_module(name) for name in ("record", "drive")})
    for name in ("record", "drive"):
        del sys.modules[name]


def test_from_recording_to_driving(example, tmp_path, monkeypatch, capsys, plain_run, serving):
    monkeypatch.setattr(sys, "argv", ["record.py", "--episodes", "12", "--val_episodes", "2", "--out",
                                      str(tmp_path)])
    example.record.main()

    # cameras by name, and which numbers are places to go to
    (subject,) = find_subjects(tmp_path / "my_robot", None, None)
    guess = subject.recipe
    assert subject.source.endswith("recipe.yaml")
    assert (guess.primary, guess.wrist) == ("outside", "wrist")
    assert guess.action == "action[:3] target, action[3:] clip invert target raw"
    assert f"action: {guess.action}" in capsys.readouterr().out

    small = {key: TINY[key] for key in ("image_size", "vision_backbone", "arch_specifier", "llm_backbone")}
    changes = {**small, "inherits": str(ROOT / "configs/my_robot.yaml"), "data_root_dir": str(tmp_path),
               "run_root_dir": str(tmp_path / "runs"), "max_steps": 2, "global_batch_size": 8,
               "per_device_batch_size": 8, "eval_samples": 8, "num_workers": 0, "run_id": "few"}
    (tmp_path / "few.yaml").write_text(yaml.safe_dump(changes))
    done = plain_run(tmp_path / "few.yaml", "--deepspeed_config", "ds_configs/cpu.json")
    assert done.returncode == 0 and "warning" not in done.text.lower().replace("[warning]", ""), done.text

    with serving(tmp_path / "runs/few") as (_, port, log):
        robot, url = PaperArm(), f"http://127.0.0.1:{port}"
        result = example.drive.drive(robot, url, 200_000)
        assert result.keys() == {"reached", "success", "seams", "others"}
        assert len(result["seams"]) == 4 and len(robot.told) == example.drive.STEPS == 40
        assert "cameras primary,wrist" in log.read_text()
    told = np.array(robot.told)
    recorded = subject.table(None, False).statistics["action"]
    low, high = (np.array(recorded[key]) for key in ("min", "max"))
    assert (told >= low - 0.01).all() and (told <= high + 0.01).all()  # radians, and a gripper in 0..1


def test_a_robot_that_nobody_has_seen(tmp_path, monkeypatch, capsys, plain_run):
    """Recorded, inspected and trained without an edit, and evaluated in the robot's own units."""
    monkeypatch.setitem(sys.modules, "robot", mobile)
    monkeypatch.syspath_prepend(str(EXAMPLE))
    record = importlib.import_module("record")
    del sys.modules["record"]
    monkeypatch.setattr(sys, "argv", ["record.py", "--episodes", "5", "--val_episodes", "1", "--name", "mobile",
                                      "--out", str(tmp_path)])
    record.main()
    recorded = capsys.readouterr().out
    config = tmp_path / "mobile.yaml"
    monkeypatch.setattr(sys, "argv", ["data.py", "--inspect", str(tmp_path / "mobile"), "--yaml", str(config),
                                      "--out", str(tmp_path / "sheet.png")])
    inspect_data.main()
    inspected = capsys.readouterr().out
    printed = [yaml.safe_load(text) for text in (
        recorded.partition("recipe.yaml\n")[2], inspected.partition(f"{inspect_data.TO_TRAIN}\n")[2].partition(
            "\ncontact_sheet")[0])]
    assert printed[0] == printed[1] and printed[0]["datasets"] == {"mobile": mobile.RECIPE}
    assert "warning" not in inspected and all(name in inspected for name in mobile.NAMES)
    done = plain_run(config, "--deepspeed_config", "ds_configs/cpu.json", "--set", "max_steps=1", "run_id=one",
                     f"run_root_dir={tmp_path}/runs", "num_workers=0")
    assert done.returncode == 0 and "warning: " not in done.text, done.text

    (subject,) = inspect_data.find_subjects(tmp_path / "mobile", None, None)
    table = subject.table(None, False)
    acted = np.concatenate([mobile.actions(seed, 24) for seed in (*range(5), 100_000)])
    policy = act.load_vla(tmp_path / "runs/one")
    mobile.check(policy, table, acted)
    monkeypatch.setattr(sys, "argv", ["eval_vla.py", "--checkpoint", str(tmp_path / "runs/one"), "--samples", "24"])
    eval_vla.main()
    facts = json.loads((tmp_path / "runs/one/eval.json").read_text())["datasets"]["mobile"]
    assert facts["robot"] == facts["names"] == mobile.NAMES
    # always the most frequent bin: nearly open, and half of the time wrong by up to 100
    constant = facts["most_frequent_bin"]["l1_units_per_dim"]
    assert 20 < constant[-1] <= 100 and 10 < np.mean(constant[3:10]) < 340 and max(constant[:3]) < 1


def test_the_template_says_what_a_7b_needs(tmp_path):
    """Its commented lines, put in place of what they say they are for, are a YAML that loads."""
    text = (ROOT / "configs/my_robot.yaml").read_text()
    values = yaml.safe_load(text)
    marked = yaml.safe_load("\n".join(line[4:] for line in re.findall(r"^#7b \w+: .*", text, re.MULTILINE)))
    model = ("image_size", "vision_backbone", "arch_specifier", "llm_backbone", "tokenizer",
             "add_action_tokens")
    rest = {key: value for key, value in values.items() if key not in model}
    (tmp_path / "big.yaml").write_text(yaml.safe_dump({**rest, **marked}))
    cfg = load_config(tmp_path / "big.yaml")
    assert cfg.base_vlm == "openvla/openvla-7b" and cfg.image_size == 224 and not cfg.llm_backbone
    assert cfg.datasets["my_robot"].action == values["datasets"]["my_robot"]["action"]
