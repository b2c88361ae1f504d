"""bench/injected_faults.py: a fault that is injected is recorded, and its row tells where the doctor names it."""

import importlib
import re
import sys
import types

import numpy as np
import pytest
import yaml
from conftest import ROOT, TINY
from test_own_robot_example import PaperArm

from machinery.config import Recipe
from machinery.frames import frame_table
from machinery.images import decode_native


class PaintedArm(PaperArm):
    """Its pictures differ if they are turned, and the cameras' differ, too."""

    def look(self) -> dict:
        seen = super().look()
        for place, name in enumerate(self.cameras):
            seen["images"][name] = np.pad(seen["images"][name][4:, 6:], ((4, 0), (6, 0), (0, 0)),
                                          constant_values=220 * place)
        return seen


@pytest.fixture
def bench(monkeypatch):
    """The program, with PaintedArm as the robot, and few requests."""
    monkeypatch.setitem(sys.modules, "robot", types.SimpleNamespace(Arm=PaintedArm))
    monkeypatch.setattr(sys, "path", [str(ROOT / "bench"), str(ROOT / "examples/own_robot"), *sys.path])
    known = {*sys.modules}
    program = importlib.import_module("injected_faults")
    monkeypatch.setattr(program, "REQUESTS", 12)
    monkeypatch.setattr(program, "EPISODES", 2)
    monkeypatch.setattr("machinery.record.time", importlib.import_module("time"))  # it is replaced by the robot's
    yield program
    for name in {"injected_faults", "faulty_policies", "record"} - known:
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_a_fault_is_recorded_and_found(bench, tmp_path, monkeypatch, capsys, plain_run, index_here):
    record = importlib.import_module("record")
    monkeypatch.setattr(sys, "argv", ["record.py", "--episodes", "12", "--val_episodes", "2", "--out", str(tmp_path)])
    record.main()
    small = {key: TINY[key] for key in ("image_size", "vision_backbone", "arch_specifier", "llm_backbone")}
    changes = {**small, "inherits": str(ROOT / "configs/my_robot.yaml"), "data_root_dir": str(tmp_path),
               "run_root_dir": str(tmp_path), "max_steps": 2, "global_batch_size": 8, "run_id": "arm2",
               "per_device_batch_size": 8, "eval_interval": 0, "num_workers": 0}
    (tmp_path / "few.yaml").write_text(yaml.safe_dump(changes))
    done = plain_run(tmp_path / "few.yaml", "--deepspeed_config", "ds_configs/cpu.json")
    assert done.returncode == 0, done.text

    rows = ["wrist turned by 180", "wrist turned by 180 + chunk too long", "degrees", "sound arm2"]
    monkeypatch.setattr(sys, "argv", ["injected_faults.py", "--policies", str(tmp_path), "--out",
                                      str(tmp_path / "out"), "--only", *rows])
    capsys.readouterr()
    bench.main()
    printed = dict(line.split(" | ", 1) for line in capsys.readouterr().out.splitlines() if " | " in line)
    assert [*printed][1:] == ["wrist turned by 180", "degrees", "wrist turned by 180 + chunk too long", "sound arm2"]
    for row in rows[0], rows[2]:
        assert re.match(r"arm2 \| \d of \d \| \[\d\] \| cause ", printed[row]), printed[row]

    seen = {}
    for name in ("wrist turned by 180", "degrees", "sound arm2"):
        folder = tmp_path / "out" / ("arm2-" + name.replace(" ", "-"))
        assert "causes" in (folder / "doctor.txt").read_text()
        seen[name] = frame_table(folder / "seen/1.0.0", Recipe(action="action target", state="state"),
                                 ["primary", "wrist"], True)
        assert len(seen[name].frames) >= 12 and len(seen[name].episodes) >= 2
        assert seen[name].instructions == ["touch the red disc"]
    views = {name: [decode_native(table.read_image(0, camera)).astype(int) for camera in (0, 1)]
             for name, table in seen.items()}
    assert np.abs(views["wrist turned by 180"][1][::-1, ::-1] - views["sound arm2"][1]).mean() < 3
    assert np.abs(views["wrist turned by 180"][0] - views["sound arm2"][0]).max() == 0
    first = [seen[name].frames["proprio"][0] for name in ("degrees", "sound arm2")]
    np.testing.assert_allclose(first[0], first[1] * [57.29578, 57.29578, 57.29578, 1], rtol=1e-4)


def test_two_faults_of_the_same_part_both_act(bench):
    mixed = bench.both(bench.FAULTS["black wrist"].changes, bench.each(lambda x: x + 1, "primary") | {"hold": 2})
    shown = bench.Client(**mixed).see({"primary": np.ones(2), "wrist": np.ones(2)}, {})
    assert shown["primary"].tolist() == [2, 2] and shown["wrist"].tolist() == [0, 0] and mixed["hold"] == 2
    for pair in bench.PAIRS:
        one, two = (bench.FAULTS[name] for name in pair)
        assert one.policy == two.policy
        assert {*one.changes} & {*two.changes} <= {"see", "say", "feel", "do"}  # which can be chained
