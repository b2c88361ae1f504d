"""examples/metaworld: recording, closed loop and counting, with the real simulator.

    python -m pytest -q tests/test_metaworld.py        # by its name alone: see conftest.py

Skipped where Meta-World, MuJoCo or an OpenGL to render with is missing: nothing of the core needs them.
"""

import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import Pipe
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT, TINY, launch

from machinery.rlds import Steps, read_records, step_features

ENVIRONMENT = dict(os.environ)  # a user's: the scripts choose their OpenGL themselves
os.environ.setdefault("MUJOCO_GL", "egl")
EXAMPLE = ROOT / "examples/metaworld"
sys.path.insert(0, str(EXAMPLE))
CAMERA = {"cameras": ["image", "gripperPOV"], "image_size": 32, "jpeg_quality": 90, "action_repeat": 4}
RECORDING = {**CAMERA, "multisampling": 0, "noise": 0.0, "tail": 0, "experts": "metaworld"}

try:  # without OpenGL, MuJoCo fails in many ways as it is imported or makes its first context
    import make_dataset
    import rollout
    import simulator as module
    from simulator import GROUPS, INSTRUCTIONS, MAX_STEPS, PACKAGES, Sheet, Simulator, task_names

    Simulator("reach-v3", **CAMERA)
except Exception as error:
    pytest.skip(f"no simulator: {error!r}", allow_module_level=True)


def python(script: str, *arguments, check: bool = True) -> subprocess.CompletedProcess:
    """Run one of the example's scripts as a user does."""
    command = [sys.executable, str(EXAMPLE / script), *map(str, arguments)]
    done = subprocess.run(command, text=True, capture_output=True, timeout=600, env=ENVIRONMENT)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def test_tasks_are_meta_worlds_fifty():
    assert len(INSTRUCTIONS) == len(set(INSTRUCTIONS.values())) == 50
    assert {name: len(tasks) for name, tasks in GROUPS.items()} == {
        "easy": 28, "medium": 11, "hard": 6, "very_hard": 5}
    assert sorted(task for tasks in GROUPS.values() for task in tasks) == sorted(INSTRUCTIONS)
    assert task_names(["reach-v3", "demo"])[:2] == ["reach-v3", "button-press-topdown-v3"]
    with pytest.raises(ValueError, match="reach-v2"):
        task_names(["reach-v2"])


@pytest.mark.parametrize("task", ["reach-v3", "drawer-open-v3", "pick-place-v3"])
def test_an_episode_is_a_function_of_its_seed(task):
    def look(simulator, seed):
        simulator.reset(seed)
        for action in np.random.default_rng(0).uniform(-1, 1, (5, 4)):
            simulator.step(action)
        return simulator.observation()

    used, fresh = Simulator(task, **CAMERA), Simulator(task, **CAMERA)
    other = look(used, 3)
    for simulator in (used, Simulator(task, **CAMERA, sheet=used.sheet)):
        same, reference = look(simulator, 4), look(fresh, 4)
        assert same["state"].tobytes() == reference["state"].tobytes()
        assert all(same[camera] == reference[camera] for camera in CAMERA["cameras"])
    assert other["image"] != reference["image"]
    smooth = look(Simulator(task, **CAMERA, multisampling=4), 4)["image"]
    assert smooth != reference["image"]  # the software renderer can do it, too


def test_a_program_that_drew_ends_quietly():
    """Also where something, here as PyTorch does, is to be done at the end since before MuJoCo was read."""
    program = f"""
import sys, weakref
sys.path[:0] = [{str(EXAMPLE)!r}, {str(ROOT)!r}]
weakref.finalize(type("Thing", (), {{}})(), print)
from simulator import Simulator
simulator = Simulator("reach-v3", **{CAMERA})
simulator.reset(1)
print(len(simulator.observation()["image"]) > 500)"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, text=True, capture_output=True, timeout=100, env=ENVIRONMENT)
    assert done.returncode == 0 and "True" in done.stdout and "Error" not in done.stderr, done.stderr


def test_a_sheet_that_is_full_goes_on():
    """Pictures are the same wherever they stand on a sheet, and none is lost when it is full."""
    simulator = Simulator("reach-v3", **CAMERA)
    simulator.sheet = Sheet(simulator.env.model, CAMERA["image_size"], side=2)
    simulator.reset(1)
    alone, seen = [], []
    for action in np.random.default_rng(0).uniform(-1, 1, (5, 4)):
        seen.append(simulator.see())
        simulator.step(action)
    simulator.sheet.read()
    simulator.reset(1)
    for action in np.random.default_rng(0).uniform(-1, 1, (5, 4)):
        alone.append(simulator.observation())
        simulator.step(action)
    assert len({step["image"] for step in alone}) == 5
    for one, other in zip(seen, alone, strict=True):
        assert all(one[camera] == other[camera] for camera in CAMERA["cameras"])


@pytest.mark.parametrize("task", ["assembly-v3", "peg-insert-side-v3"])
def test_what_is_out_of_view_is_not_drawn_and_changes_no_pixel(task, monkeypatch):
    simulator = Simulator(task, **CAMERA)
    hidden = []
    for seed in range(3):
        simulator.reset(seed)
        for action in np.random.default_rng(seed).uniform(-1, 1, (3, 4)):
            simulator.step(action)
            culled = simulator.observation()
            model = simulator.env.model
            hidden.append(sum(module.out_of_view(model, simulator.env.data, model.camera("gripperPOV").id)))
            with monkeypatch.context() as patch:
                patch.setattr(module, "out_of_view", lambda model, data, camera: False)
                whole = simulator.observation()
            assert all(culled[camera] == whole[camera] for camera in CAMERA["cameras"])
    assert min(hidden) > 10  # of some 35: the arm


def test_positions_are_the_benchmarks():
    """Drawn from a seed, positions have the range of metaworld.MT1's and place things as it does."""
    import metaworld

    benchmark = metaworld.MT1("push-v3", seed=1)
    theirs = [pickle.loads(task.data)["rand_vec"] for task in benchmark.train_tasks]
    simulator, ours = Simulator("push-v3", **CAMERA), []
    for seed in range(50):
        simulator.reset(seed)
        ours.append(np.array(simulator.env._last_rand_vec))
    assert np.ptp(ours, axis=0) == pytest.approx(np.ptp(theirs, axis=0), rel=0.2)
    placed = simulator.state.copy()
    simulator.env._freeze_rand_vec = True  # what MT1's tasks do with a vector
    assert np.array_equal(simulator.env.reset()[0], placed)


def test_a_recording_can_be_played_back():
    """A recorded action does in a rollout what the expert's did, and the policy sees what was recorded."""
    episode = make_dataset.record("button-press-topdown-v3", 5, RECORDING)
    simulator = Simulator("button-press-topdown-v3", **CAMERA)
    simulator.reset(5)
    for step in episode["steps"]:
        seen = simulator.observation()
        assert not simulator.over and seen["image"] == step["observation"]["image"]
        assert seen["gripperPOV"] == step["observation"]["gripperPOV"]
        assert np.array_equal(seen["state"], step["observation"]["state"])
        simulator.step(step["action"])
    assert simulator.success_at == simulator.steps


def test_noise_and_tail():
    plain, noisy, long = (make_dataset.record("reach-v3", 1, {**RECORDING, **changes})["steps"]
                          for changes in ({}, {"noise": 0.5}, {"tail": 3}))
    assert len(long) == len(plain) + 3 and long[-1]["is_last"] and not long[-2]["is_last"]
    assert np.array_equal(plain[0]["action"], noisy[0]["action"])  # the expert's, not what was executed
    assert not np.array_equal(plain[1]["observation"]["state"], noisy[1]["observation"]["state"])


def test_our_experts_end_inside_the_goal_and_do_not_turn_round():
    def played(task, whose):
        recording = {**RECORDING, "tail": 40, "action_repeat": 1, "experts": whose}
        return make_dataset.record(task, 1, recording)["steps"]

    for task in ("reach-v3", "reach-wall-v3"):
        simulator = make_dataset.simulator_of(task, (*CAMERA["cameras"],), 32, 90, 1, 0)
        above = {}
        for whose in ("metaworld", "ours"):
            hand = played(task, whose)[-1]["observation"]["state"][:3]
            above[whose] = hand - simulator.state[-3:]
        np.testing.assert_allclose(above["ours"] - above["metaworld"], [0, 0, 0.045], atol=0.01)
        assert np.linalg.norm(simulator.env.tcp_center - simulator.state[-3:]) < 0.015  # success: 0.05
    turns = {whose: np.sum(np.diff([step["action"][2] > 0 for step in played("handle-pull-side-v3", whose)]))
             for whose in above}
    assert turns["ours"] <= 5 < turns["metaworld"]


def test_the_first_picture_is_of_this_episode():
    """Meta-World moves the goal last; what is seen before the first step must show where it is then."""
    import mujoco

    for task in ("reach-v3", "window-close-v3"):
        simulator = Simulator(task, **CAMERA)
        simulator.reset(4)
        seen, state = simulator.observation(), simulator.state.copy()
        mujoco.mj_forward(simulator.env.model, simulator.env.data)
        assert seen["image"] == simulator.observation()["image"]
        assert np.array_equal(state[:18], simulator.env._get_curr_obs_combined_no_goal())


def test_the_tail_ends_when_the_time_is_up(monkeypatch):
    recording, reset = {**RECORDING, "action_repeat": 1}, Simulator.reset
    plain = make_dataset.record("reach-v3", 1, recording)["steps"]

    def late(self, seed):
        reset(self, seed)
        self.steps = self.env.curr_path_length = 500 - len(plain) - 3

    monkeypatch.setattr(Simulator, "reset", late)
    assert len(make_dataset.record("reach-v3", 1, {**recording, "tail": 8})["steps"]) == len(plain) + 3


def test_an_interrupted_recording_goes_on_to_the_same_bytes(tmp_path):
    def arguments(out):
        return ["--tasks", "reach-v3", "coffee-button-v3", "--episodes", "12", "--val_episodes", "1",
                "--workers", "2", "--image_size", "32", "--action_repeat", "4", "--noise", "0.1", "--name",
                "mw", "--out", out]

    python("make_dataset.py", *arguments(tmp_path / "whole"))
    command = [sys.executable, str(EXAMPLE / "make_dataset.py"), *map(str, arguments(tmp_path / "cut"))]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    scratch = tmp_path / "cut/.mw.episodes"
    while process.poll() is None and len(list(scratch.glob("reach-v3-*"))) < 3:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert scratch.exists() and not (tmp_path / "cut/mw").exists()
    other = python("make_dataset.py", *arguments(tmp_path / "cut"), "--noise", "0.5", check=False)
    assert other.returncode == 1 and "recorded with other options" in other.stderr
    python("make_dataset.py", *arguments(tmp_path / "cut"))

    def digests(out):
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (out / "mw/1.0.0").iterdir()
                if p.is_file()}

    assert digests(tmp_path / "whole") == digests(tmp_path / "cut")
    recording = json.loads((tmp_path / "cut/mw/1.0.0/recording.json").read_text())
    assert recording["noise"] == 0.1 and recording["simulator"] == rollout.closed_loop.versions(PACKAGES)
    assert not scratch.exists()
    again = python("make_dataset.py", *arguments(tmp_path / "cut"), check=False)
    assert again.returncode == 1 and "exists" in again.stderr


def test_another_seed_replaces_a_failure(tmp_path):
    """A dataset has the first seeds at which the expert succeeds, in their order, whoever recorded them."""
    recording = {**RECORDING, "cameras": [], "action_repeat": 1, "noise": 0.2}  # what succeeds is no matter of images
    succeeds = [make_dataset.record("hand-insert-v3", seed, recording) is not None for seed in range(3)]
    assert succeeds == [False, True, True]
    done = python("make_dataset.py", "--tasks", "hand-insert-v3", "--episodes", 2, "--image_size", 16, "--noise", 0.2,
                  "--workers", 2, "--name", "mw", "--out", tmp_path)
    (shard,) = (tmp_path / "mw/1.0.0").glob("*.tfrecord*")
    features = step_features(shard.parent)
    found = [int(Steps(data, offset, features)["episode_metadata/seed"][0]) for offset, data in read_records(shard)]
    assert found == [1, 2] and "attempts 3 without_episode 1" in done.stdout


def test_play_shows_the_last_frames_and_executes_chunks(tmp_path):
    """The observations of a window are those of the last steps, oldest first; finished trials stay put; the
    film has a picture for each look of the first trial, and one of its end."""
    ours, theirs = Pipe()
    player = threading.Thread(target=rollout.play, args=(theirs,), daemon=True)
    player.start()
    ours.send(("reach-v3", [7, 8], 3, CAMERA))
    simulator = Simulator("reach-v3", **CAMERA)
    simulator.reset(7)
    expected = [simulator.observation()] * 3
    actions = np.random.default_rng(0).uniform(-1, 1, (200, 4))
    kind, histories = ours.recv()
    for first in range(0, 40, 4):
        assert kind == "see" and len(histories) == 2
        for seen, wanted in zip(histories[0], expected[-3:], strict=True):
            assert seen["image"] == wanted["image"] and np.array_equal(seen["state"], wanted["state"])
        ours.send(np.stack([actions[first : first + 4]] * 2))
        for action in actions[first : first + 4]:
            simulator.step(action)
            expected.append(simulator.observation())
        kind, histories, *_ = ours.recv()
    while kind == "see":
        ours.send(np.zeros((2, 4, 4)))
        kind, film, *results = ours.recv()
    assert kind == "done" and [trial["seed"] for trial in results[0]] == [7, 8]
    assert all(trial["success_at"] == trial["steps"] or trial["steps"] == MAX_STEPS for trial in results[0])
    ours.send(None)
    player.join(30)
    (tmp_path / "film.webp").write_bytes(film)
    film = rollout.closed_loop.read_film(tmp_path / "film.webp", rollout.SIDE)
    assert len(film) == -(-results[0][0]["steps"] // 16) + 1  # 4 actions, each held for 4 steps
    simulator.reset(7)
    pictures, sheet = [], Sheet(simulator.env.model, 2 * rollout.SIDE, side=1)
    rollout.take_picture(simulator, sheet, pictures)
    sheet.read()
    first, last = (np.abs(np.subtract(pictures[0], x, dtype=float)).mean() for x in (film[0], film[-1]))
    assert first < 3 < last


def tiny_run(folder: Path) -> Path:
    """A few steps of training on the demonstrations in the repository, with chunks and the robot's state."""
    changes = {"run_root_dir": str(folder), "run_id": "run", "max_steps": 2, "use_proprio": True,
               "action_chunk": 4, "parallel_decoding": True, "window_size": 2, "image_size": 32,
               "vision_backbone": {"vit": {"model": "vit_tiny_r_s16_p8_224", "patch_size": 2, "embed_dim": 32,
                                           "depth": 2, "num_heads": 2}}}  # convolutions first, as in MT50's
    (folder / "tiny.yaml").write_text(yaml.safe_dump({**TINY, **changes}))
    done = launch(folder / "tiny.yaml", launcher="python")
    assert done.returncode == 0, done.text
    return folder / "run"


def test_rollouts_do_not_depend_on_what_else_is_played(tmp_path_factory):
    """Twice the same command, one of them cut in two and with other tasks beside: the same results."""
    folder = tmp_path_factory.mktemp("rollout")
    run = tiny_run(folder)
    recording = folder / "recording.json"  # long actions, so that the hopeless episodes are soon over
    recording.write_text(json.dumps({"image_size": 32, "jpeg_quality": 90, "action_repeat": 25,
                                     "simulator": "mujoco 3.1.0 metaworld 3.1.1"}))
    common = ["--checkpoint", run, "--trials", "2", "--recording", recording, "--device", "cpu", "--execute"]
    python("rollout.py", *common, "3", "--tasks", "reach-v3", "--out", folder / "alone")
    python("rollout.py", *common, "3", "--tasks", "coffee-button-v3", "--out", folder / "together")
    done = python("rollout.py", *common, "3", "--tasks", "coffee-button-v3", "reach-v3", "drawer-close-v3",
                  "--out", folder / "together", "--workers", "3")
    alone, together = (json.loads((folder / name / "reach-v3-0.json").read_text())
                       for name in ("alone", "together"))
    assert alone == together
    assert [trial["seed"] for trial in alone] == [200_000, 200_001]
    summary = json.loads((folder / "together/summary.json").read_text())
    assert summary["execute"] == 3 and summary["per_task_average"]["trials"] == 6
    assert done.stdout.count("per_task_average ") == 1 and "macro_average" not in done.stdout  # one group
    simulator = summary["simulator"]
    assert simulator.startswith("mujoco 3") and " metaworld 3" in simulator
    assert all(line.endswith(simulator) for line in done.stdout.splitlines() if "_average" in line)
    assert summary["tasks"]["reach-v3"]["instruction"] == INSTRUCTIONS["reach-v3"]
    (warning,) = (line for line in done.stdout.splitlines() if "warning" in line)
    assert simulator in warning and "recorded with mujoco 3.1.0" in warning
    pictures = {path.name for path in (folder / "together").iterdir()}
    assert {"success.png", "rollouts.webp", "rollouts_end.png"} <= pictures
    refused = python("rollout.py", *common, "1", "--tasks", "reach-v3", "--out", folder / "alone",
                     check=False)
    assert refused.returncode == 1 and "other conditions" in refused.stderr

    questions = []  # tasks that are answered together, as on a GPU
    for task in ("reach-v3", "coffee-button-v3", "drawer-close-v3"):
        simulator = Simulator(task, **{**CAMERA, "cameras": ["image"]})
        simulator.reset(1)
        looks = []
        for action in np.random.default_rng(0).uniform(-1, 1, (3, 4)):
            simulator.step(action)
            looks.append(simulator.observation())
        questions.append((task, [looks[:2], looks[1:]]))  # two trials
    (folder / "questions").write_bytes(pickle.dumps(questions))
    # in a process of its own: it imports PyTorch's compiler, and this one has drawn with Mesa
    program = f"""
import pickle, sys
sys.path[:0] = [{str(EXAMPLE)!r}, {str(ROOT)!r}]
import numpy as np, rollout
from pathlib import Path
questions = pickle.loads(Path({str(folder / "questions")!r}).read_bytes())
player = rollout.Player({str(run)!r}, Path({str(recording)!r}), 3, "cpu", 2)
alone = [player.act([question])[0] for question in questions]
player.batch = 4
together = player.act(questions)
assert [actions.shape for actions in together] == [(2, 3, 4)] * 3
assert np.array_equal(alone, together) and np.ptp(alone, axis=0).max() > 0
other = rollout.Player({str(run)!r}, Path({str(recording)!r}), 3, "cpu", 6, paraphrases=True)
asked, answer = [], other.policy.predict_action
other.policy.predict_action = lambda images, texts, *rest: asked.extend(texts) or answer(images, texts, *rest)
task, looks = questions[0]
other.act([(task, looks * 3)])  # six trials, five wordings
assert len(set(asked)) == 5 and asked[5] == asked[0] and rollout.INSTRUCTIONS[task] not in asked, asked"""
    done = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True, timeout=300,
                          env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr


CEILING = """
import runpy, sys
import simulator
simulator.TASKS["mt50"] = ["reach-v3"]  # whose demonstrations set the statistics
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_the_ceiling_of_a_task():
    """In a process of its own: it imports PyTorch's compiler, and this one has drawn with Mesa."""
    code = f"import sys; sys.path.insert(0, {str(EXAMPLE)!r}); sys.argv[0] = {str(EXAMPLE / 'ceiling.py')!r}{CEILING}"
    done = subprocess.run([sys.executable, "-c", code, "--tasks", "reach-v3", "--seeds", "1"], text=True,
                          capture_output=True, timeout=600, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split()[:2] == ["reach-v3", "1"]  # the replayed demonstration succeeds


def test_averages():
    def episodes(*success_at):
        return [{"seed": i, "steps": at or 500, "success_at": at} for i, at in enumerate(success_at)]

    results = {("reach-v3", 0): episodes(10, 20), ("window-open-v3", 0): episodes(450, None),
               ("push-v3", 0): episodes(None, None), ("push-v3", 1): episodes(30, 30, 30, 30)}
    summary = rollout.summarize(results)
    assert summary["groups"]["easy"]["rate"] == 0.75 and summary["groups"]["hard"]["rate"] == 4 / 6
    assert summary["macro_average"]["rate"] == pytest.approx((3 / 4 + 4 / 6) / 2)
    assert summary["per_task_average"]["rate"] == 7 / 10 and summary["per_task_average_400"]["rate"] == 6 / 10
    assert summary["macro_average_400"]["rate"] == pytest.approx((2 / 4 + 4 / 6) / 2)
    assert summary["seeds"]["1"]["macro_average"]["rate"] == 1
    text = rollout.table(summary, "mujoco 3.3.0")
    assert "seed 1 per_task_average 100.0% macro_average 100.0%  mujoco 3.3.0" in text
    assert [text.count(word) for word in ("\neasy ", "\nhard ", "\nmacro_average", "_400 ")] == [1, 1, 2, 2]
    alone = rollout.table(rollout.summarize({("reach-v3", 0): episodes(10, None)}), "")
    assert [line.split()[0] for line in alone.splitlines()] == ["reach-v3", "per_task_average"]
    assert rollout.closed_loop.wilson(8, 10) == pytest.approx([0.4902, 0.9433], abs=1e-4)  # SciPy's figures
    assert rollout.closed_loop.wilson(0, 10)[0] == 0 and rollout.closed_loop.wilson(10, 10)[1] == 1


@pytest.mark.slow
def test_a_speed_run_continues_where_it_stopped(tmp_path):
    small = {"vision_backbone": {"vit": {"model": "vit_tiny_r_s16_p8_224", "patch_size": 2, "embed_dim": 32,
                                         "depth": 2, "num_heads": 2}},
             "llm_backbone": TINY["llm_backbone"], "image_size": 32, "max_steps": 2, "compile": False,
             "global_batch_size": 4, "per_device_batch_size": 4, "num_workers": 0, "eval_samples": 4}
    changes = " ".join(f"{key}={json.dumps(value, separators=(',', ':'))}" for key, value in small.items())
    tasks = "--tasks reach-v3 coffee-button-v3"
    command = [str(EXAMPLE / "recipe.sh"), "speedrun", "--out", str(tmp_path / "run"),
               "--record", f"{tasks} --episodes 2 --val_episodes 1 --image_size 32 --action_repeat 10",
               "--train", f"{changes} --deepspeed_config ds_configs/cpu.json",
               "--play", f"{tasks} --trials 1 --device cpu"]
    path = Path(sys.executable).parent
    environment = {**ENVIRONMENT, "PATH": f"{path}:{os.environ['PATH']}"}
    begun = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
    clock = tmp_path / "run/clock.json"
    while begun.poll() is None and not (clock.exists() and "record" in json.loads(clock.read_text())):
        time.sleep(0.1)
    os.killpg(begun.pid, signal.SIGKILL)
    begun.wait()
    first = json.loads(clock.read_text())
    assert list(first) == ["start", "seeds", "record"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    times = json.loads(clock.read_text())
    assert times.items() > first.items() and set(times) - set(first) == {"train", "play"}
    told = {line.split()[0]: [float(word) for word in line.split()[1:]] for line in done.stdout.splitlines()
            if line.startswith(("record ", "train ", "play "))}
    for stage, before in (("record", "start"), ("train", "record"), ("play", "train")):
        expected = times[stage] - times[before], times[stage] - times["start"]
        assert told[stage] == pytest.approx(expected, abs=0.06)
    summary = json.loads((tmp_path / "run/rollouts/summary.json").read_text())
    assert [*summary["seeds"]] == [str(seed) for seed in times["seeds"]] and min(times["seeds"]) > 2
    row = (tmp_path / "run/row.md").read_text()
    header = next(line for line in done.stdout.splitlines() if line.startswith("| date"))
    assert row.count("|") == header.count("|") and row in done.stdout
    assert header in (EXAMPLE / "README.md").read_text()
