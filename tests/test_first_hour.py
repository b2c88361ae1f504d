"""A user's first hour: --help, keys on the command line, another Python, missing packages, any locale."""

import json
import os
import re
import runpy
import subprocess
import sys

import pytest
import tensorflow_datasets as tfds
from conftest import ROOT
from test_own_robot import random_actions, write_arm

from machinery.config import Recipe, TrainConfig

KEYS = runpy.run_path(str(ROOT / "docs/keys.py"))
PROGRAMS = ["train_vla.py", "eval_vla.py", "serve_vla.py", "export_vla.py", "doctor.py", "data.py"]
EXAMPLES = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("examples/*/*.py")
                  if "ArgumentParser" in path.read_text() and "__main__" in path.read_text()
                  and "vla_eval" not in str(path))  # it is for another environment
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PATH": "/usr/bin:/bin"}


def test_the_page_of_keys():
    """`python docs/keys.py > docs/keys.md` writes it, from the comments in config.py."""
    assert KEYS["page"]() == (ROOT / "docs/keys.md").read_text()
    for model, expected in ((TrainConfig, TrainConfig.model_fields), (Recipe, Recipe.__dataclass_fields__)):
        found = [*KEYS["keys"](model)]
        assert [key.name for key in found] == [*expected]
        assert all(key.section and key.text for key in found)


# {program: [its exit status, its options without a description, the beginning of its help]}, without these packages
HELP = """
import argparse, contextlib, io, json, os, runpy, sys
for name in ("torch", "transformers", "deepspeed", "timm", "tensorflow_datasets"):
    sys.modules[name] = None
found, folders = {}, [*sys.path]
parse = argparse.ArgumentParser.parse_args
def parse_args(parser, *arguments):
    found[program] += [action.dest for action in parser._actions if not action.help]
    return parse(parser, *arguments)
argparse.ArgumentParser.parse_args = parse_args
for program in sys.argv[1:]:
    found[program], sys.path[:] = [], [os.path.dirname(os.path.abspath(program)), *folders]
    ours = {*sys.modules}
    sys.argv = [program, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            runpy.run_path(program, run_name="__main__")
        except SystemExit as stop:
            found[program].append(stop.code)
        except ModuleNotFoundError as error:
            found[program].append(error.name)
    found[program].append(printed.getvalue())
    for name in {*sys.modules} - ours:  # robot.py, simulator.py: another example has its own
        if not getattr(sys.modules[name], "__file__", None) or "examples" in sys.modules[name].__file__:
            del sys.modules[name]
print(json.dumps(found))
"""


def test_help_needs_no_pytorch_and_describes_every_option():
    done = subprocess.run([sys.executable, "-c", HELP, *PROGRAMS, *EXAMPLES], cwd=ROOT, text=True, capture_output=True)
    found = json.loads(done.stdout)
    for program in PROGRAMS:
        *undescribed, status, text = found[program]
        assert not undescribed and status == 0 and "--" in text, (program, found[program])
    for key in [*TrainConfig.model_fields, *Recipe.__dataclass_fields__]:
        assert f"\n  {key}: " in found["train_vla.py"][-1]
    for program in EXAMPLES:  # this environment may lack a simulator
        *undescribed, status, _ = found[program]
        assert not undescribed and status != 2, (program, found[program])
    assert found["examples/lerobot/convert.py"][-2] == found["examples/lora/compare.py"][-2] == 0


@pytest.mark.parametrize("program", [*PROGRAMS, *EXAMPLES])
def test_a_python_without_packages(program):
    """As if the environment were not active: -S leaves its packages out."""
    done = subprocess.run([sys.executable, "-S", ROOT / program, "--help"], text=True, capture_output=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    own = (ROOT / program).parent / "requirements.txt"
    assert f"-r {own}" in done.stderr or not own.exists()
    assert f"-r {ROOT / 'requirements.txt'}" in done.stderr or "drive" in program


@pytest.mark.parametrize("program", PROGRAMS)
def test_an_older_python(program):
    code = f"import runpy, sys; sys.version_info = (3, 10, 9); sys.argv = [{program!r}]; " \
           f"runpy.run_path({program!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 1 and re.fullmatch("error: .* 3.11 or later\n", done.stderr)


# ------------------------------------------------------------------------------------------------------------
# UTF-8, whatever the locale


def chinese(root) -> dict:
    """A dataset with Chinese instructions, and the keys of a YAML that trains on it."""
    text = (tfds.features.Text(), lambda e, t: "打开抽屉 é")
    write_arm(root, random_actions(7, 6, 4), step={"language_instruction": text})
    return {"data_root_dir": str(root), "data_mix": "arm", "datasets": {"arm": {"primary": "image"}}}


def test_chinese_instructions_in_an_ascii_locale(tmp_path):
    chinese(tmp_path)
    arguments = ["--inspect", tmp_path / "arm", "--yaml", tmp_path / "own.yaml", "--out", tmp_path / "sheet.png"]
    done = subprocess.run([sys.executable, ROOT / "data.py", *arguments], env=ASCII, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert "'打开抽屉 é'" in done.stdout.decode()


@pytest.mark.slow
def test_training_in_an_ascii_locale(tiny, tmp_path):
    config = tiny(**chinese(tmp_path), max_steps=1, num_workers=1)
    config.write_text("# 训练\n" + config.read_text())
    arguments = ["--config", config, "--deepspeed_config", ROOT / "ds_configs/cpu.json"]
    done = subprocess.run([sys.executable, ROOT / "train_vla.py", *arguments], env=ASCII, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout.decode()
    assert "to 打开抽屉 é?" in done.stdout.decode()


# ------------------------------------------------------------------------------------------------------------
# The oldest packages that requirements.txt allows


def oldest() -> list[str]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    return [re.sub(r">=([\d.]+).*", r"==\1", line) for line in lines if line]


def test_every_requirement_has_a_lower_bound():
    """Except torchvision: each version belongs to one of torch."""
    assert [line for line in oldest() if "==" not in line] == ["torchvision"]


@pytest.mark.slow
def test_the_oldest_packages_train(tiny, tmp_path):
    """Downloads about 3 GB, unless pip has them."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "oldest"], check=True)
    python = tmp_path / "oldest/bin/python"
    subprocess.run([python, "-m", "pip", "install", "-q", *oldest()], check=True,
                   env={**os.environ, "DS_BUILD_OPS": "0"})
    arguments = ["--config", tiny(max_steps=1, save_interval=0), "--deepspeed_config", ROOT / "ds_configs/cpu.json"]
    done = subprocess.run([python, ROOT / "train_vla.py", *arguments], capture_output=True, text=True)
    assert done.returncode == 0 and "done steps 1" in done.stdout, done.stdout + done.stderr
