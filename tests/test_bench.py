"""Every script of bench/ and examples/ starts, on something small: as its documentation calls it.

Started elsewhere: many_frames.py in test_rlds.py, drive.py in test_own_robot_example.py, and the simulators' scripts in
tests of their names (speedrun.py by recipe.sh). Variables name two environments (bench/openvla_peer.py,
examples/vla_eval):

    OPENVLA=../openvla OPENVLA_PYTHON=../openvla-env/bin/python VLA_EVAL_PYTHON=../vla-eval/bin/python \\
        pytest -m slow tests/test_bench.py
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, TINY

OPENVLA = [os.environ.get(name) for name in ("OPENVLA", "OPENVLA_PYTHON")]
VLA_EVAL = os.environ.get("VLA_EVAL_PYTHON") or (importlib.util.find_spec("vla_eval") and sys.executable)
SMALL = "--config {tiny} --num_workers 0 --steps 3 --warmup 1"
GPU = torch.cuda.is_available()
STARTS = {  # script and arguments: what it prints
    "bench/many_machines.py": r"zero3_hpz \| .*",
    "bench/data_throughput.py --workers 1 --samples 64": r"loader ours .* frames_per_s \d+",
    f"bench/train_throughput.py {SMALL} --own_data --global_batch 8 --cases cpu:8 zero1:8:recompute --table "
    "--out {out}/rows.jsonl --figure {out}/curves.png":
        r"zero1:8:recompute largest_difference 0\.00\d+ .*\n(.*\n)*\| 1 x \S.* \| zero1 \| yes \|  \| 8 \| \d",
    f"bench/train_throughput.py {SMALL} --num_gpus 2 --global_batch 8 --cases zero2:4:only=gather_ahead":
        r"case zero2:4:only=gather_ahead samples_per_second \d",  # train_variant.py
    f"bench/scaling.py {SMALL} --own_data --global_batch 8 --ranks 1 2 --micro 4 --ways zero1 --out {{out}}/s.jsonl "
    "--figure {out}/scaling.png": r"losses 1 x .* largest_difference 0\b",
    "bench/small_cards.py --config {tiny} --gb 16 --micro 1 --cases lora_bf16 --steps 4 --no_compile":
        r"\| 16 \| lora_bf16 \| 1 \| \d+\.\d+ \| \d",
    "bench/kill_resume.py --cycles 2 --steps 6 --longest 2": r"identical (\d+)/\1",
    "bench/int8_agreement.py --checkpoint {colors} --samples 16": r"frames 16 median_lead \d",
    "bench/bad_demonstrations.py --out {out}/bad --config {tiny} --set max_steps=1": r"policy +overall 0\.\d+",
    "bench/act_latency.py " + ("--batch 1 --cases plain fast" if GPU else "--help"): r"fast batch 1 ms|--cases",
    "bench/big_checkpoint.py " + ("--folder {out}/big" if GPU else "--help"): r"loaded_seconds|--folder",
    "examples/break/break.py --checkpoint {demo} --frames 8": r"gripper's sign +accuracy 0\.\d+ error",
    "examples/lora/compare.py --out {out}/lora --steps 1 --tuning_steps 1": r"\| lora_int8 \| 0\.\d+",
}


def start(script: str, *arguments, python=sys.executable, status: int = 0, **environ) -> str:
    """Run a script as a user does -> what it prints."""
    command = ["bash" if script.endswith(".sh") else python, ROOT / script, *map(str, arguments)]
    folders = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(command, cwd=ROOT, text=True, timeout=3600, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env={**os.environ, "PATH": folders, "OMP_NUM_THREADS": "1", **environ})
    assert done.returncode == status, done.stdout[-5000:]
    return done.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory, colors):
    """Places for the arguments above. `demo` is a run on the demonstrations that are in the repository."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "tiny.yaml").write_text(yaml.safe_dump({**TINY, "run_root_dir": str(folder)}))
    start("train_vla.py", "--config", folder / "tiny.yaml", "--deepspeed_config", "ds_configs/cpu.json",
          "--set", "max_steps=1", "run_id=demo")
    return {"tiny": folder / "tiny.yaml", "demo": folder / "demo", "out": folder, "colors": colors}


@pytest.mark.slow
@pytest.mark.parametrize("command", STARTS)
def test_it_starts(command, runs):
    script, *arguments = (word.format(**runs) for word in command.split())
    assert re.search(STARTS[command], start(script, *arguments))


@pytest.mark.slow
@pytest.mark.parametrize("simulator, command", [
    ("mujoco", "examples/rl/reach.py --episodes 2 --val_episodes 1 --out {out}/reach"),
    ("mujoco", "examples/rl/lesson.py --help"),  # it starts rl.py, which starts worlds.py
    ("metaworld", "examples/dagger/on_metaworld.py --help"),
    ("libero", "examples/dagger/on_libero.py --help")])
def test_it_starts_with_its_simulator(simulator, command, runs):
    pytest.importorskip(simulator)
    script, *arguments = (word.format(**runs) for word in command.split())
    assert "--out" in start(script, *arguments) or "reach" in script


def test_every_script_is_started():
    """By its name in some test."""
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("*.py"))
    scripts = [path for pattern in ("bench/*.py", "examples/*/*.py", "examples/*/*.sh") for path in ROOT.glob(pattern)
               if path.suffix == ".sh" or "__main__" in path.read_text()]
    assert len(scripts) > 25
    assert [path.name for path in scripts if not re.search(rf"\b{path.name}\b", tests)] == []


@pytest.mark.slow
@pytest.mark.skipif(GPU, reason="profiles it")
def test_the_profiler_asks_for_a_gpu():
    assert "profile_step.py needs a GPU" in start("bench/profile_step.py", status=1)


@pytest.mark.slow
@pytest.mark.parametrize("name, config", [("metaworld", ""), ("metaworld", "metaworld_mt50_equal"), ("libero", "")])
def test_a_recipe_trains(name, config, runs):
    """Its data stage and its rollouts need a simulator, and are tested there."""
    small = {**TINY, "run_root_dir": str(runs["out"]), "max_steps": 1, "compile": False, "action_chunk": 2,
             "use_proprio": False, "cameras": ["primary"], "per_device_batch_size": 16}
    small = [f"{key}={json.dumps(value)}" for key, value in small.items() if key != "vla_id"]
    printed = start(f"examples/{name}/recipe.sh", "train", "--set", *small, SEED="9", CONFIG=config)
    assert "seed9" in printed and "done steps 1" in printed
    assert "rollout?" in start(f"examples/{name}/recipe.sh", "dance", status=2)


@pytest.mark.slow
def test_a_server_is_loaded_and_attacked(colors, serving):
    with serving(colors, "--dtype", "fp32") as (_, port, _):
        url = ["--url", f"http://127.0.0.1:{port}"]
        printed = start("bench/serve_load.py", *url, "--clients", 4, "--seconds", 3)
        assert re.search(r"same [1-9]\d* different 0 lost 0 ", printed)
        # a status of 1 says that others of this machine were slow
        command = [sys.executable, ROOT / "bench/serve_hostile.py", *url, "--requests", "60", "--seconds", "2"]
        printed = subprocess.run(command, text=True, capture_output=True, timeout=600).stdout
        assert printed.count("hostile ") > 5 and re.search(r"answers undisturbed [1-9]\d* disturbed [1-9]", printed)


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("LEROBOT_PYTHON"), reason="LEROBOT_PYTHON=... (bench/lerobot_read.py)")
def test_lerobots_recordings_are_compared():
    printed = start("bench/lerobot_read.py", "--lerobot_python", os.environ["LEROBOT_PYTHON"], "--check")
    assert printed.count("numbers_equal True texts_equal True") == 8


@pytest.mark.slow
@pytest.mark.skipif(not all(OPENVLA), reason="OPENVLA=... OPENVLA_PYTHON=... (bench/openvla_peer.py)")
def test_openvlas_own_class_loads_our_exports():
    """With the same prompt, pixels, logits and action as here."""
    printed = start("bench/openvla_class.py", "--openvla", OPENVLA[0], "--openvla_python", OPENVLA[1])
    models = re.split(r"(?m)^model ", printed)[1:]
    assert len(models) == 2
    for model in models:
        assert "prompt_ids equal" in model
        difference, largest = map(float, re.search(r"logits_max_difference (\S+) of (\S+)", model).groups())
        assert float(re.search(r"pixels_max_difference (\S+)", model)[1]) < 1e-5 and difference < 1e-3 * largest
        theirs, ours = (json.loads(re.search(rf"action_{who} +(.*)", model)[1]) for who in ("openvla", "ours"))
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("OFT_PYTHON"), reason="OFT=... OFT_PYTHON=... (bench/oft_class.py)")
def test_ofts_own_class_acts_and_learns_alike():
    printed = start("bench/oft_class.py", "--oft", os.environ["OFT"], "--oft_python", os.environ["OFT_PYTHON"])
    assert all(float(number) < 1e-5 for number in re.findall(r"max_difference (\S+)", printed))


# ---- examples/vla_eval -------------------------------------------------------------------------------------

DUMMY = """
import json
import numpy as np
from vla_eval.benchmarks.base import StepBenchmark, StepResult

class Dummy(StepBenchmark):  # pictures with red and blue sides, as conftest.write_colors makes them
    def __init__(self, out):
        super().__init__()
        self.out, self.told = out, []
    def get_tasks(self):
        return [{"name": "hold it"}, {"name": "let go"}]
    def reset(self, task):
        self.told.append([])
    def step(self, action):
        self.told[-1].append(np.asarray(action["actions"]).tolist())
        with open(self.out, "w") as file:
            json.dump(self.told, file)
        return StepResult(None, 0, len(self.told[-1]) == 3, {})
    def make_obs(self, raw, task):
        view = np.full((32, 64, 3), 30, np.uint8)
        view[..., 0] = 230
        view[:, 16:48] = 125
        return {"images": {"scene": view, "hand": view[..., ::-1].copy()}, "task_description": task["name"]}
    def check_done(self, result):
        return result.done
    def get_step_result(self, result):
        return {"success": True}
    def get_metadata(self):
        return {"max_steps": 9}
"""


needs_vla_eval = pytest.mark.skipif(not VLA_EVAL, reason="pip install -r examples/vla_eval/requirements.txt, there "
                                    "or in an environment whose python is VLA_EVAL_PYTHON")


def play(folder: Path, port: int, benchmark: dict, *arguments, status: int = 0) -> str:
    """Write a benchmark's YAML and play it against a server -> what is printed."""
    config = {"output_dir": str(folder / "results"), "benchmarks": [benchmark]}
    config |= {"render": "cpu"} if "libero" in benchmark["benchmark"] else {}
    (folder / "benchmark.yaml").write_text(yaml.safe_dump(config))
    url = f"http://127.0.0.1:{port}"
    return start("examples/vla_eval/server.py", folder / "benchmark.yaml", "--server", url, "--no_docker", *arguments,
                 python=VLA_EVAL, status=status, PYTHONPATH=str(folder))


@needs_vla_eval
@pytest.mark.slow
def test_vla_eval_gets_the_policys_actions_with_its_own_gripper(colors, tmp_path, serving):
    (tmp_path / "dummy.py").write_text(DUMMY)
    benchmark = {"benchmark": "dummy:Dummy", "params": {"out": str(tmp_path / "told.json")}, "episodes_per_task": 1}
    with serving(colors) as (_, port, _):
        for gripper, (opened, closed) in (([], (1, 0)), (["--gripper", -1, 1], (-1, 1))):
            play(tmp_path, port, benchmark, "--unnorm_key", "cold", *gripper)
            told = json.loads((tmp_path / "told.json").read_text())
            expected = [[[0.1, -0.3, value]] * 3 for value in (opened, closed)]  # red; hold it is 1, and 1 is open
            np.testing.assert_allclose(told, expected, atol=0.01)
        assert "--unnorm_key None: choose one of" in play(tmp_path, port, benchmark, status=1)


@needs_vla_eval
@pytest.mark.slow
def test_vla_eval_plays_libero(tmp_path, serving):
    libero = subprocess.run([VLA_EVAL, "-c", "import libero, torch"], capture_output=True)
    if libero.returncode:
        pytest.skip("VLA_EVAL_PYTHON has no LIBERO: pip install torch -r examples/libero/requirements.txt")
    sys.path.append(str(ROOT / "bench"))
    from data_throughput import write_frames

    write_frames(tmp_path, 100)
    small = {**TINY, "data_root_dir": str(tmp_path), "data_mix": "libero_spatial_no_noops", "datasets": {},
             "max_steps": 1, "run_root_dir": str(tmp_path), "run_id": "run", "action_chunk": 2}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(small))
    start("train_vla.py", "--config", tmp_path / "tiny.yaml", "--deepspeed_config", "ds_configs/cpu.json")
    benchmark = {"benchmark": "vla_eval.benchmarks.libero.benchmark:LIBEROBenchmark", "episodes_per_task": 2,
                 "max_tasks": 1, "max_steps": 4, "params": {"suite": "libero_spatial", "seed": 7}}
    with serving(tmp_path / "run") as (_, port, log):
        printed = play(tmp_path, port, benchmark)
        assert "benchmark libero unnorm_key libero_spatial_no_noops gripper (-1, 1)" in printed and "(0/2)" in printed
        assert log.read_text().count("act status 200") == 4  # 2 episodes of 4 steps, in chunks of 2
