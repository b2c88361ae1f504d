"""examples/dagger: who plays when, what is recorded, and what a continued training keeps.

The robot is test_own_robot_example.py's PaperArm, so no simulator is needed. It is a file that the
simulators' processes import, as they import MuJoCo's arm.
"""

import ast
import functools
import importlib
import inspect
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from conftest import ROOT, TINY
from test_own_robot_example import STATE, PaperArm

from examples import recording
from examples.dagger import collecting, rounds
from machinery.config import Recipe
from machinery.frames import find_dataset, frame_table
from machinery.rlds import Steps, read_records, step_features

OURS = ("robot", "record", "drive", "ask_for_help", "take_over")


@functools.cache
def prepared_processes():
    """Processes that start as clean as spawned ones: forks of one that has only imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["examples.dagger.rounds", "machinery.inspect_data"])
    return context


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of the example with another robot, first on Python's path."""
    own = tmp_path / "examples/own_robot"
    own.mkdir(parents=True)
    for name in OURS[1:]:
        shutil.copy(ROOT / f"examples/own_robot/{name}.py", own)
    (own / "robot.py").write_text(f"import numpy as np\nSTATE = np.array({STATE.tolist()})\n"
                                  f"{inspect.getsource(PaperArm)}\nArm = PaperArm\n")
    monkeypatch.syspath_prepend(str(own))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for module in (collecting, recording):  # a new Python would import PyTorch for five seconds, each time
        monkeypatch.setattr(module, "get_context", lambda _: prepared_processes())
    yield own
    for name in OURS:
        sys.modules.pop(name, None)


@pytest.fixture
def base(folder, tmp_path, plain_run):
    """A run that has learned nothing, from eight demonstrations."""
    record = importlib.import_module("record")
    robot = record.Arm()
    path = record.write_rlds(tmp_path / "datasets", "my_robot", "1.0.0", record.features(robot), {
        "train": record.demonstrations(robot, range(8)), "val": record.demonstrations(robot, range(8, 10))})
    (path / "recording.json").write_text("{}")
    small = {key: TINY[key] for key in ("image_size", "vision_backbone", "arch_specifier", "llm_backbone")}
    config = {**yaml.safe_load((ROOT / "configs/my_robot.yaml").read_text()), **small, "max_steps": 2,
              "data_root_dir": str(tmp_path / "datasets"), "run_root_dir": str(tmp_path / "runs"),
              "run_id": "base", "num_workers": 0, "eval_interval": 0, "global_batch_size": 4,
              "per_device_batch_size": 4}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(config))
    done = plain_run(tmp_path / "base.yaml", "--deepspeed_config", "ds_configs/cpu.json")
    assert done.returncode == 0, done.text
    return tmp_path / "runs/base"


def arguments(out, **changes) -> SimpleNamespace:
    values = {"out": out, "base": None, "control": None, "rounds": 1, "episodes": 5, "steps": 2, "trials": 3, "repeat": 2,
              "learning_rate": 1e-3, "execute": 3, "workers": 1, "play": "2"}
    return SimpleNamespace(**{**values, **changes})


def episodes(directory) -> list[dict]:
    """The recorded states and actions of a dataset's training episodes."""
    features, found = step_features(directory), []
    for shard in sorted(directory.glob("*-train.tfrecord*")):
        for offset, data in read_records(shard):
            steps = Steps(data, offset, features)
            found.append({"state": np.array(steps["observation/state"]).reshape(-1, 4),
                          "action": np.array(steps["action"]).reshape(-1, 4)})
    return found


def starts(recorded: list[dict]) -> int:
    """How many episodes begin where the robot does."""
    return sum(np.allclose(episode["state"][0], STATE) for episode in recorded)


def check_experts(recorded: list[dict], arm=PaperArm) -> None:
    """Every recorded action is the expert's in the recorded state."""
    for episode in recorded:
        robot = arm()
        robot.goal = episode["action"][-1].astype(np.float64)
        for state, action in zip(episode["state"], episode["action"], strict=True):
            robot.at = state.astype(np.float64)
            assert np.allclose(robot.expert(), action, atol=1e-5)


def test_only_the_experts_part_is_recorded(base, tmp_path):
    module = importlib.import_module("ask_for_help")
    out = tmp_path / "round-1"
    module.collect_round(base, out, 1, arguments(tmp_path), base)
    recorded = episodes(find_dataset(out / "new", "my_robot"))
    assert len(recorded) == 5 and starts(recorded) == 0  # the policy has played the beginning
    check_experts(recorded, module.CorrectedArm)
    assert len(json.loads((out / "before.json").read_text())["my_robot"]) == 3

    control = tmp_path / "control"
    module.collect_round(base, control, 1, arguments(tmp_path, control="demonstrations"), base)
    recorded = episodes(find_dataset(control / "new", "my_robot"))
    assert len(recorded) == starts(recorded) == 5
    check_experts(recorded)


def test_a_correction_leaves_the_gripper_closed(folder):
    """A demonstration is the same as ever: its gripper is open until the goal is reached."""
    module = importlib.import_module("ask_for_help")
    grips = {}
    for closed in (0, 1):
        robot, usual = module.CorrectedArm(), PaperArm()
        for each in (robot, usual):
            each.reset(0)
            each.move([*STATE[:3], closed])
        steps = module.rest_of_episode(robot)
        grips[closed] = [float(step["action"][3]) for step in steps]
        assert np.array_equal([step["action"][:3] for step in steps],
                              [step["action"][:3] for step in module.rest_of_episode(usual)])
    assert grips[0][0] == 0 and grips[0][-1] == 1 and {*grips[1]} == {1}


def test_a_measurement_renders_on_all_gpus(tmp_path, monkeypatch):
    """A trial succeeds on the second GPU only."""
    (tmp_path / "trials.py").write_text("import os, time\ndef on_second(task, seed):\n    time.sleep(0.1)\n"
                                        "    return os.environ['MUJOCO_EGL_DEVICE_ID'] == '1'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{tmp_path}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    trial = importlib.import_module("trials").on_second
    found = collecting.measure(trial, ["a"], 0, 40, 2, tmp_path / "outcomes.json")
    assert {*found["a"]} == {True, False}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_interrupted_round_continues(base, tmp_path):
    """A policy that fails ends the round instead of letting processes wait forever. What was recorded
    stays."""
    module = importlib.import_module("ask_for_help")
    policy, asked = module.answers_of(base, 3), []

    def fails_later(questions: list) -> list:
        asked.append(len(questions))
        if len(asked) > 70:
            raise MemoryError
        return policy(questions)

    def collect(act) -> None:
        collecting.collect(find_dataset(tmp_path / "datasets", "my_robot"), out, act, module.record,
                           module.succeeds, {"patience": 0, "longest": 12}, ["my_robot"], 2, 40, 3, 1)

    out = tmp_path / "round-2"
    with pytest.raises((EOFError, OSError)):
        collect(fails_later)
    before = (out / "before.json").stat().st_mtime_ns
    kept = {path.name: path.read_bytes() for path in (out / ".episodes").glob("*.record")}
    assert 2 < len(kept) < 40 and min(kept) == "my_robot-120000.record"
    one, other = [name for name, record in sorted(kept.items()) if record][:2]
    shutil.copy(out / ".episodes" / one, out / ".episodes" / other)  # a sign: what is there is not made again
    collect(policy)
    assert (out / "before.json").stat().st_mtime_ns == before and not (out / ".episodes").exists()
    (shard,) = find_dataset(out / "new", "my_robot").glob("*.tfrecord*")
    records = [bytes(data) for _, data in read_records(shard)]
    assert len(records) == 40 and records.count(kept[one]) == 2 and kept[other] not in records


def test_a_round_trains_on_all_data_with_the_bases_statistics(base, tmp_path, plain_run):
    module = importlib.import_module("ask_for_help")
    cfg, dataset = rounds.settings_of(base)
    folder, args = tmp_path / "round-1", arguments(tmp_path)
    module.collect_round(base, folder, 1, args, base)
    path = folder / "datasets/my_robot/1.0.0"
    new = find_dataset(folder / "new", "my_robot")
    rounds.join([dataset, *[new] * args.repeat], path, rounds.statistics_of(base))
    assert len(episodes(path)) == 18 and (path / "recording.json").exists()
    (old,), shards = dataset.glob("*-train*"), sorted(path.glob("*-train*"))
    assert os.path.samefile(old, shards[0]) and os.path.samefile(shards[1], shards[2])

    command, run = rounds.training(base, cfg, base, folder / "datasets", folder, 1, args)
    done = plain_run(command[3], *command[4:])
    assert done.returncode == 0 and f"weights_from {base}" in done.text, done.text
    assert "episode_twice" not in done.text  # it is meant
    assert f"statistics my_robot {path / 'normalization.json'}" in done.text
    ours, bases = (json.loads((each / "dataset_statistics.json").read_text())["my_robot"] for each in (run, base))
    assert ours["action"] == bases["action"] and ours["proprio"] == bases["proprio"]
    assert ours["num_trajectories"] == 20 > bases["num_trajectories"]

    (path / "normalization.json").unlink()  # what they would be
    table = frame_table(path, Recipe(primary="outside"), ["outside"], True)
    assert table.statistics["action"]["mean"] != bases["action"]["mean"]


def test_tasks_that_fail_get_more_episodes():
    before = {"always": [True] * 10, "mostly": [True] * 8 + [False] * 2, "half": [True, False] * 5,
              "never": [False] * 10}
    counts = collecting.allot(before, 4000, 1)
    assert sum(counts.values()) == 4000
    assert 0 < counts["always"] < counts["mostly"] < counts["half"]
    assert counts["never"] == pytest.approx(counts["half"], rel=0.2)


def test_seeds_of_collecting_are_nobody_elses():
    def constant(script: str, name: str):
        tree = ast.parse((ROOT / "examples" / script).read_text())
        (value,) = [node.value for node in tree.body if isinstance(node, ast.Assign)
                    and getattr(node.targets[0], "id", "") == name]
        return ast.literal_eval(value)

    ours = [collecting.FIRST_SEED + collecting.PER_ROUND * (number - 1) + i
            for number in collecting.ROUNDS for i in (0, collecting.TRIED, collecting.PER_ROUND - 1)]
    for simulator in ("own_robot/record.py", "metaworld/make_dataset.py", "libero/make_dataset.py"):
        assert max(constant(simulator, "FIRST_SEED").values()) + 10_000 <= min(ours)
    for evaluation in ("own_robot/drive.py", "metaworld/rollout.py"):
        assert max(ours) < constant(evaluation, "FIRST_SEED")
    assert len(set(ours)) == 3 * len(collecting.ROUNDS)
    drawn = [collecting.takeover(seed, 9.5) for seed in range(200)]
    assert {*drawn} == {*range(10)} and collecting.takeover(5, 0) == 0


@pytest.mark.slow
def test_the_command_continues_where_it_was_killed(base, folder, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, folder / "ask_for_help.py", "--base", base, "--out", out, "--episodes", "30",
               "--steps", "4", "--trials", "5", "--play", "4", "--workers", "1", "--repeat", "1"]
    scratch = out / "dagger/round-1/.episodes"
    with open(tmp_path / "log", "w") as log:
        job = subprocess.Popen([*map(str, command)], start_new_session=True, stdout=log, stderr=log)
    for _ in range(6000):
        if len([*scratch.glob("*.record")]) > 3:
            break
        assert job.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.1)
    job.kill()  # its processes have to end by themselves
    assert 3 < len([*scratch.glob("*.record")]) < 30
    done = subprocess.run([*map(str, command)], text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "collected 30 of 30" in done.stdout and "dagger_train_1" in done.stdout
    begin, end = json.loads((out / "clock.json").read_text())["dagger collect 1"]
    assert begin < (tmp_path / "log").stat().st_mtime < end  # it did not stop
    recorded = episodes(find_dataset(out / "dagger/round-1/datasets", "my_robot"))
    assert len(recorded) == 38
    control = subprocess.run([*map(str, command), "--control", "training"], text=True, capture_output=True)
    assert control.returncode == 0 and "training, round 1: evaluation" in control.stdout, control.stderr
    assert "dagger, round 1: evaluation" in control.stdout and (out / "success.png").exists()


@pytest.mark.slow
def test_a_person_takes_over(base, tmp_path, monkeypatch, capsys, plain_run, serving):
    """Enter, and from there the person's part is recorded; no key, and nothing is; q, and it ends."""
    module = importlib.import_module("take_over")
    hands, keyboard = (os.fdopen(end, mode) for end, mode in zip(os.pipe(), "rw", strict=True))
    passed = []

    def sleep(seconds: float) -> None:
        passed.append(seconds)
        keyboard.write({3: "\n", 50: "q\n"}.get(len(passed), ""))  # in the first episode and in the third
        keyboard.flush()

    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=sleep))
    monkeypatch.setattr(sys, "stdin", hands)
    with serving(base) as (_, port, _log):
        monkeypatch.setattr(sys, "argv", ["take_over.py", "--run", str(base), "--url", f"http://127.0.0.1:{port}",
                                          "--out", str(tmp_path / "helped")])
        module.main()
    assert len(passed) == 50
    (mine,) = episodes(tmp_path / "helped/new/my_robot/1.0.0")
    check_experts([mine])
    assert not np.allclose(mine["state"][0], STATE)  # the policy was there before
    command = capsys.readouterr().out.splitlines()[-1].split()
    done = plain_run(command[3], *command[4:], "max_steps=1")
    assert done.returncode == 0, done.text
    assert len(episodes(tmp_path / "helped/datasets/my_robot/1.0.0")) == 9
