"""Every command that the documentation prints: run as printed, in a fresh clone, or left out for a reason.

    python tests/test_commands.py        lists them all: what is run, and why the rest is not
    pytest -m slow tests/test_commands.py

The trainings among them take some fifteen minutes on two idle cores. With TRAINED=runs in the environment,
that folder's runs are copied into the clone first, and what is trained already is not trained again.
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENT = runpy.run_path(str(ROOT / "docs/experiment.py"))
LEFT_OUT = {  # pattern: why; the first that is found in a command
    r"^pip |^make \.venv": "downloads packages",
    r"hf-mirror|HF_HUB_OFFLINE": "changes the reader's machine",
    r"openvla/openvla-7b|my-bridge|--openvla ": "needs OpenVLA's weights or code",
    r"configs/oxe.yaml|SBATCH": "needs Open X-Embodiment and several machines",
    r"--own_data": "fourteen minutes; tests/test_zero.py compares the JSONs",
    r"^python bench/(train_throughput|act_latency|big_checkpoint|scaling)": "needs a GPU",
    r"recipe\.sh": "needs MuJoCo; tests/test_metaworld.py",
    r"serve_vla|drive\.py": "a server, which does not end; tests/test_serve.py",
    r"my_robot|record\.py": "needs MuJoCo; tests/test_own_robot_example.py",
    r"lora|lerobot": "needs downloaded weights or data",
    r"^export OMP": "belongs to what follows it",
}


def commands() -> list[tuple[str, str, str]]:
    """(page, command, what it is said to print) of every bash block; none twice."""
    found = {}
    for folder in ("", "docs/", "bench/", "ds_configs/", "examples/*/"):
        for page in sorted(ROOT.glob(f"{folder}*.md")):
            text = page.read_text()
            for block, printed in re.findall(r"```bash\n(.*?)```(?:\n\n```text\n(.*?)```)?", text, re.DOTALL):
                whole = re.search(r"^(for |#!)", block, re.MULTILINE)
                lines = [block] if whole else block.replace("\\\n", " ").splitlines()
                for line in lines:
                    if line.strip() and not line.startswith("# "):
                        found.setdefault(" ".join(line.split()) if not whole else line.strip(),
                                         (page.relative_to(ROOT).as_posix(), printed))
    return [(page, command, printed) for command, (page, printed) in found.items()]


def why_not(command: str) -> str | None:
    """The reason for which a command is not run here."""
    command = re.sub(r" +# .*", "", command)
    return next((why for pattern, why in LEFT_OUT.items() if re.search(pattern, command)), None)


RUN = [(command, printed) for _, command, printed in commands() if not why_not(command)]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The project as someone else gets it."""
    folder = tmp_path_factory.mktemp("clone") / "zerovla"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
    if trained := os.environ.get("TRAINED"):
        shutil.copytree(trained, folder / "runs")
    return folder


def run(command: str, folder: Path) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=folder, env=environment,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def test_commands_are_found():
    assert len(RUN) >= 7 and len(commands()) > 30
    every = [command for _, command, _ in commands()]
    unused = {pattern for pattern in LEFT_OUT if not any(re.search(pattern, command) for command in every)}
    assert unused <= {"lora|lerobot"}


@pytest.mark.slow
@pytest.mark.parametrize(("command", "printed"), RUN, ids=[command[:60] for command, _ in RUN])
def test_command(clone, command, printed):
    output = run(command, clone)
    assert {*printed.splitlines()} <= {*output.splitlines()}


@pytest.mark.slow
@pytest.mark.parametrize("number", EXPERIMENT["experiments"]())
def test_experiment(number):
    _, code, printed = EXPERIMENT["experiments"]()[number]
    assert EXPERIMENT["run"](code) == printed


if __name__ == "__main__":
    for page, command, _ in commands():
        print(f"{page:<32}{why_not(command) or 'RUN':<55}{command.splitlines()[0][:90]}")
