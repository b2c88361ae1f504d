"""Containers, done to real trainings: limits of memory, cores and open files; signals to a first process; deploy/."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import yaml
from conftest import ROOT, TINY, Job, launch_command, read_metrics, wait_for_steps
from hypothesis import given, settings
from hypothesis import strategies as st

from machinery import host
from machinery.checkpoint import Checkpoint, list_checkpoints
from machinery.config import load_config, load_ds_config

ROOT_ONLY = pytest.mark.skipif(os.getuid() != 0, reason="needs root: control groups and PID namespaces")

# ------------------------------------------------------------------------------------------------------------
# Limits


@pytest.fixture
def control_group():
    """Make a real control group: control_group(controller, {file: value}) -> its folder."""
    made = []

    def make(controller: str, files: dict[str, dict[int, object]], parent: Path | None = None) -> Path:
        parent = parent or next(host.groups(controller))
        group = parent / f"zerovla{os.getpid()}"
        try:
            group.mkdir()
            made.append(group)
            version = 2 if (group / "cgroup.controllers").exists() else 1
            for name, value in files[version].items():
                (group / name).write_text(str(value))
        except OSError as error:
            pytest.skip(f"no control group of {controller} can be made here: {error}")
        return group

    yield make
    for group in reversed(made):
        group.rmdir()


def in_group(group: Path, code: str) -> list[str]:
    """Run Python in a control group -> the words it prints."""
    enter = f"import os; open({str(group / 'cgroup.procs')!r}, 'w').write(str(os.getpid()));"
    done = subprocess.run([sys.executable, "-c", enter + code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def limit(size: int) -> dict:
    return {1: {"memory.limit_in_bytes": size}, 2: {"memory.max": size}}


def test_memory_is_that_of_the_tightest_group_less_what_others_hold(control_group):
    outer = control_group("memory", limit(500_000_000))
    inner = control_group("memory", limit(10**12), outer)
    code = "from machinery.host import memory; print(memory())"
    (free,) = map(int, in_group(inner, code))
    assert 400e6 < free < 500e6
    other = "import sys; held = bytearray(200_000_000); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", other], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          preexec_fn=lambda: (outer / "cgroup.procs").write_text(str(os.getpid()))) as neighbor:
        neighbor.stdout.readline()
        (left,) = map(int, in_group(inner, code))
        neighbor.stdin.close()
    assert 150e6 < free - left < 250e6


def test_cores_are_those_of_the_quota(control_group):
    group = control_group("cpu", {1: {"cpu.cfs_quota_us": 100_000, "cpu.cfs_period_us": 100_000},
                                  2: {"cpu.max": "100000 100000"}})
    code = "from machinery.host import cores; import os; print(cores(), len(os.sched_getaffinity(0)))"
    count, bound = map(int, in_group(group, code))
    assert count == 1 <= bound


V1 = "33 1 0:3 {root} {mount}/{name} rw - cgroup cgroup rw,{name}\n"
V2 = "35 1 0:5 {root} {mount} rw - cgroup2 cgroup2 rw,nsdelegate\n"


@pytest.mark.parametrize("line, root, path", [
    (V2, "/", "0::/kubepods/pod1/c1"), (V2, "/", "0::/"), (V2, "/../..", "0::/"),
    (V1, "/", "9:cpu,cpuacct:/docker/c1\n4:memory:/docker/c1"),
    (V1, "/docker/c1", "9:cpu,cpuacct:/docker/c1\n4:memory:/docker/c1"),  # Docker without a namespace
    (V1, "/docker/c2", "9:cpu,cpuacct:/docker/c1\n4:memory:/docker/c1"),  # and another group's mount
], ids=["v2", "v2, own namespace", "v2, a mount from above", "v1", "v1, bound", "v1, elsewhere"])
@settings(max_examples=25)
@given(quotas=st.lists(st.none() | st.integers(10_000, 10**6), min_size=3, max_size=3),
       limits=st.lists(st.none() | st.integers(10**8, 10**13), min_size=3, max_size=3))
def test_the_tightest_of_nested_groups_counts(line, root, path, quotas, limits, tmp_path_factory):
    """In both versions of control groups, and wherever a container mounts them."""
    tmp_path = tmp_path_factory.mktemp("proc")
    with pytest.MonkeyPatch.context() as patch:
        mounts = "".join(line.format(root=root, mount=tmp_path / "cgroup", name=name) for name in
                         (("memory", "cpu") if line is V1 else ("",)))
        (tmp_path / "cgroup.txt").write_text(path + "\n")
        (tmp_path / "mountinfo.txt").write_text("22 1 0:2 / /proc rw - proc proc rw\n" + mounts)
        files = {"/proc/self/cgroup": tmp_path / "cgroup.txt", "/proc/self/mountinfo": tmp_path / "mountinfo.txt"}
        patch.setattr(host, "Path", lambda *parts: files.get(*parts) or Path(*parts))
        patch.setattr(host.os, "sched_getaffinity", lambda pid: set(range(8)))
        patch.setattr(host.psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * 10**9))
        expected_cores, expected_memory = 8.0, 64 * 10**9
        for controller in ("cpu", "memory"):
            for group, quota, size in zip(host.groups(controller), quotas, limits, strict=False):
                group.mkdir(parents=True, exist_ok=True)
                if controller == "cpu":
                    expected_cores = min(expected_cores, (quota or 10**9) / 100_000)
                    write_quota(group, quota, line is V1)
                else:
                    expected_memory = min(expected_memory, (size or 10**18) - 7 * 10**7)
                    write_limit(group, size, line is V1)
        assert host.cores() == max(1, round(expected_cores))
        assert host.memory.__wrapped__() == expected_memory


def write_quota(group: Path, quota: int | None, old: bool) -> None:
    if old:
        (group / "cpu.cfs_quota_us").write_text(f"{quota or -1}\n")
        (group / "cpu.cfs_period_us").write_text("100000\n")
    else:
        (group / "cpu.max").write_text(f"{quota or 'max'} 100000\n")


def write_limit(group: Path, size: int | None, old: bool) -> None:
    """100 MB are used, 30 of them by cached files."""
    if old:
        (group / "memory.limit_in_bytes").write_text(f"{size or 9223372036854771712}\n")
        (group / "memory.usage_in_bytes").write_text("100000000\n")
        (group / "memory.stat").write_text("active_file 1\ninactive_file 1\ntotal_active_file 10000000\n"
                                           "total_inactive_file 20000000\n")
    else:
        (group / "memory.max").write_text(f"{size or 'max'}\n")
        (group / "memory.current").write_text("100000000\n")
        (group / "memory.stat").write_text("anon 1\nactive_file 10000000\ninactive_file 20000000\n")


@pytest.mark.parametrize("ds_config", ["zero2_offload", "cpu"])
def test_what_does_not_fit_in_a_container_is_refused_before_it_is_killed(ds_config, control_group, tiny, tmp_path,
                                                                         ranks):
    """28M parameters take 0.5 to 0.7 GB. The machine has them, and the container does not."""
    group = control_group("memory", limit(450_000_000))
    script = tmp_path / "in_group.py"
    script.write_text(f"import os\nopen({str(group / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n"
                      "import train_vla\ntrain_vla.main()\n")
    config = tiny(vision_backbone={"siglip": TINY["vision_backbone"]["siglip"]},
                  arch_specifier="no-align+gelu-mlp", max_steps=1, per_device_batch_size=16,
                  llm_backbone={"model_type": "llama", "hidden_size": 768, "intermediate_size": 2048,
                                "num_hidden_layers": 4, "num_attention_heads": 8})
    done = ranks(1, config, "--deepspeed_config", f"ds_configs/{ds_config}.json", script=str(script))
    assert done.returncode == 1, done.text
    assert re.search(r"^error: offloading.* takes 0.[4-7] GB.* has 0.[34]: offload less", done.text, re.MULTILINE)


FAULTS = {
    "open files": "open_now = len(os.listdir('/proc/self/fd'))\n"
                  "        resource.setrlimit(resource.RLIMIT_NOFILE, (open_now, open_now))",
    "a batch that cannot be pickled": "batch['dataset'] = lambda: 0",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_worker_that_cannot_send_ends_the_run_with_one_line(fault, tiny, tmp_path, ranks):
    script = tmp_path / "cannot_send.py"
    script.write_text(f"""
import os, resource, data, train_vla
get = data.TrainBatches.__getitem__
def broken(self, number):
    batch = get(self, number)
    if number == 9:
        {FAULTS[fault]}
    return batch
data.TrainBatches.__getitem__ = broken
train_vla.main()
""")
    done = ranks(2, tiny(num_workers=1, max_steps=5000, per_device_batch_size=2), script=str(script))
    first = re.search(r"^(error|rank|Traceback).*", done.text, re.MULTILINE)[0]
    assert done.returncode != 0 and "Traceback" not in done.text, done.text
    assert re.match(r"error: step \d rank \d: DataLoader worker .*(ulimit|nofile)", first), done.text


def test_a_full_dev_shm_ends_the_run_with_one_line(tiny, ranks, commands):
    commands.shell("mount -t tmpfs -o size=100k tmpfs /dev/shm")
    done = ranks(1, tiny(num_workers=1, max_steps=5000))
    commands.shell("umount -l /dev/shm")
    assert done.returncode == 1 and "Traceback" not in done.text, done.text
    assert re.search(r"^error: step \d rank 0: .*shm-size", done.text, re.MULTILINE), done.text


@pytest.mark.parametrize("files", [45, 60])
def test_few_open_files_end_a_run_with_one_line(files, tiny, tmp_path, ranks):
    script = tmp_path / "few_files.py"
    script.write_text(f"import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, ({files}, {files}))\n"
                      "import train_vla\ntrain_vla.main()\n")
    done = ranks(1, tiny(num_workers=3, max_steps=5000), script=str(script))
    assert done.returncode == 1 and "Traceback" not in done.text, done.text
    assert re.search(r"^error: .*Too many open files", done.text, re.MULTILINE), done.text


def test_the_soft_limit_of_open_files_is_raised(tiny, tmp_path, ranks):
    script = tmp_path / "soft.py"
    script.write_text("import resource\nhard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
                      "resource.setrlimit(resource.RLIMIT_NOFILE, (60, hard))\n"
                      "import train_vla\ntrain_vla.main()\n")
    done = ranks(1, tiny(num_workers=3, max_steps=2), script=str(script))
    assert done.returncode == 0, done.text


YIELDS = """
import os, threading, time
import torch
from machinery import ranks
torch.set_num_threads(2)
threading.Thread(target=ranks.yield_cores, daemon=True).start()
others = []
for _ in range(3 * len(os.sched_getaffinity(0))):  # keep all cores busy
    others.append(os.fork())
    while not others[-1]:
        pass
alone = len(os.listdir("/proc/self/task"))
while len(os.listdir("/proc/self/task")) <= alone:
    pass
time.sleep(1)  # until it has restored the number of threads
print("yields", torch.get_num_threads(), flush=True)
for other in others:
    os.kill(other, 9)
"""


@pytest.mark.slow
def test_threads_sleep_while_others_keep_the_cores_busy():
    """libgomp's threads spin briefly once it has more of them than cores."""
    done = subprocess.run([sys.executable, "-c", YIELDS], cwd=ROOT, timeout=300, text=True, capture_output=True)
    assert done.stdout.split()[-2:] == ["yields", "2"], done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------------------
# Signals to the first process. A rank is a process that handles SIGUSR1

RANK = """
import os, signal, sys, time
def save(number, frame):
    time.sleep(0.5)
    os.write(1, f"saved {signal.Signals(number).name}\\n".encode())  # at once: both ranks write
    sys.exit(0)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, save)
os.write(1, b"training\\n")
time.sleep(60)
"""
LAUNCHER = """
import subprocess, sys
ranks = [subprocess.Popen([sys.executable, "-c", {rank!r}]) for _ in range(2)]
print("launcher", flush=True)
sys.exit(max(rank.wait() for rank in ranks))
"""
NAMESPACE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
SUPERVISE = [sys.executable, "-m", "machinery.supervise"]


class Contained:
    """A command as the first process of a PID namespace, as in a container; or plainly."""

    def __init__(self, job: Job, namespace: bool):
        self.job = job
        self.first = psutil.Process(job.process.pid)
        while namespace and not self.first.name().startswith("python"):
            if children := self.first.children():
                self.first = children[0]
            assert job.running(), job.output.read_text()

    def wait_for(self, text: str, count: int = 1) -> None:
        while self.job.output.read_text().count(text) < count:
            assert self.job.running(), self.job.output.read_text()
            time.sleep(0.05)


@pytest.fixture(params=[True, False], ids=["first process", "plain process"])
def supervised(request, start):
    """Start a command under machinery.supervise."""

    def begin(*command) -> Contained:
        if request.param and os.getuid() != 0:
            pytest.skip("needs root: PID namespaces")
        prefix = NAMESPACE if request.param else []
        return Contained(start(args=[*prefix, *SUPERVISE, *command], cwd=ROOT), request.param)

    return begin


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_the_first_process_reaches_all_ranks_and_not_the_launcher(number, supervised):
    contained = supervised(sys.executable, "-c", LAUNCHER.format(rank=RANK))
    contained.wait_for("training", 2)
    contained.first.send_signal(number)
    status, text, _ = contained.job.wait()
    assert text.count(f"saved {number.name}") == 2 and "Traceback" not in text, text
    assert status == 128 + number  # not 0: the training is not done


def test_ranks_save_although_their_launcher_was_killed(supervised):
    contained = supervised(sys.executable, "-c", LAUNCHER.format(rank=RANK))
    contained.wait_for("training", 2)
    (launcher,) = contained.first.children()
    ranks = launcher.children()
    launcher.kill()
    for rank in ranks:
        rank.send_signal(signal.SIGUSR1)
    status, text, _ = contained.job.wait()
    assert text.count("saved SIGUSR1") == 2 and status == 128 + signal.SIGKILL, text


def test_a_signal_before_anything_trains_ends_all_at_once(supervised):
    contained = supervised(sys.executable, "-c", LAUNCHER.format(rank="import time; time.sleep(60)"))
    contained.wait_for("launcher")
    contained.first.send_signal(signal.SIGTERM)
    status, text, _ = contained.job.wait()  # which also waits for those that were killed
    assert status == 128 + signal.SIGTERM and "SIGTERM while nothing was training" in text, text


def test_the_exit_status_is_the_commands(supervised):
    for command, expected in (["true"], 0), (["sh", "-c", "exit 7"], 7), (["/no/such/program"], 1):
        contained = supervised(*command)
        assert contained.job.wait()[0] == expected


LAUNCHERS = {"deepspeed": ["--num_gpus", "2", "--master_port"], "torchrun": ["--nproc-per-node", "2", "--master-port"]}


def contain(start, launcher: str, config: Path, prefix: list) -> Contained:
    how = launch_command(config, ranks=2, launcher=launcher)
    return Contained(start(**{**how, "args": [*NAMESPACE, *prefix, *how["args"]]}), True)


@ROOT_ONLY
@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_container_that_is_stopped_resumes_at_that_step(launcher, tiny, tmp_path, start, ranks):
    """As `docker stop` stops it: SIGTERM to its first process."""
    config = tiny(max_steps=5000, num_workers=1, run_id="run")
    contained = contain(start, launcher, config, SUPERVISE)
    wait_for_steps(tmp_path / "runs", 3, contained.job)
    contained.first.send_signal(signal.SIGTERM)
    status, text, _ = contained.job.wait()
    newest = list_checkpoints(tmp_path / "runs/run/checkpoints")[-1]
    step = Checkpoint(newest).meta["step"]
    assert status == 128 + signal.SIGTERM and "Traceback" not in text, text
    assert f"stopped by SIGTERM at step {step} of 5000" in text and "saving after this step" in text, text
    assert max(read_metrics(tmp_path / "runs")) == step
    done = ranks(2, config, "--set", f"max_steps={step + 1}")
    assert done.returncode == 0 and f"resumed {newest} step {step}" in done.text, done.text


@ROOT_ONLY
@pytest.mark.slow
def test_torchrun_as_the_first_process_saves_as_well(tiny, tmp_path, start):
    contained = contain(start, "torchrun", tiny(max_steps=5000, run_id="run"), [])
    wait_for_steps(tmp_path / "runs", 3, contained.job)
    contained.first.send_signal(signal.SIGTERM)
    _, text, _ = contained.job.wait()
    newest = list_checkpoints(tmp_path / "runs/run/checkpoints")[-1]
    assert f"stopped by SIGTERM at step {Checkpoint(newest).meta['step']} of 5000" in text, text
    assert "warning: this container" not in text


@ROOT_ONLY
@pytest.mark.slow
@pytest.mark.parametrize("shell", [[], ["sh", "-c", '"$0" "$@"; true']], ids=["alone", "in a script"])
def test_deepspeed_as_the_first_process_is_warned_of(shell, tiny, start):
    how = launch_command(tiny(max_steps=2), ranks=2)
    job = start(**{**how, "args": [*NAMESPACE, *shell, *how["args"]]})
    _, text, _ = job.wait()
    assert text.count("warning: this container") == 1 and "machinery.supervise" in text, text


@pytest.mark.slow
@pytest.mark.parametrize("early", [True, False], ids=["during imports", "after two steps"])
def test_ctrl_c_of_make_demo(early, tmp_path, start):
    """A terminal sends SIGINT to the processes of the foreground: not to those that supervise starts."""
    recipe = subprocess.run(["make", "-n", "demo"], cwd=ROOT, text=True, capture_output=True, check=True)
    command = recipe.stdout.splitlines()[-1]
    assert "train_vla.py --config configs/demo.yaml" in command
    changes = f" --set run_root_dir={tmp_path}/runs log_interval=1 eval_samples=32"
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    job = start(args=["sh", "-c", "exec " + command + changes], cwd=ROOT, env=env)
    if early:
        Contained(job, False).wait_for("launcher.launch")
    else:
        wait_for_steps(tmp_path / "runs", 2, job)
    os.killpg(job.process.pid, signal.SIGINT)
    status, text, _ = job.wait()
    assert status == 128 + signal.SIGINT and "Traceback" not in text, text
    assert ("stopped by SIGINT while nothing was training" if early else "stopped by SIGINT at step") in text, text
    assert early or "saving after this step" in text


# ------------------------------------------------------------------------------------------------------------
# deploy/

DEPLOY = ROOT / "deploy"


def documents(name: str) -> list[dict]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def test_deploy_is_short():
    lines = {path.name: path.read_text().count("\n") for path in DEPLOY.iterdir()}
    assert lines["sky.yaml"] + lines["trainjob.yaml"] + lines["train.sbatch"] <= 90 and lines["Dockerfile"] <= 15


STUBS = {
    "python": 'printf "%s\\n" "$@" > "$OUT/python"; env > "$OUT/env"\necho "stopped by SIGUSR1 at step 7 of 9"',
    "srun": 'case $1 in --cpus-per-task=4) shift;; esac; exec "$@"',
    "scontrol": 'if [ "$1" = show ]; then printf "node-%s\\n" a b; else echo "$@" >> "$OUT/requeued"; fi',
    "make": "", "source": "",
}


@pytest.fixture
def run_script(tmp_path):
    """Run a script with programs that only note how they were called -> {note: its lines}."""
    for name, body in STUBS.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)

    def run(script: str, *arguments, **environ) -> dict[str, list[str]]:
        (tmp_path / ".venv/bin").mkdir(parents=True, exist_ok=True)
        (tmp_path / ".venv/bin/activate").touch()
        environ = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "OUT": str(tmp_path), **environ}
        subprocess.run(["bash", "-euc", script, "script", *arguments], cwd=tmp_path, env=environ, check=True)
        return {path.name: path.read_text().splitlines() for path in tmp_path.iterdir() if path.is_file()}

    return run


def check_training(words: list[str]) -> None:
    """Check the command line of a training with the program's own readers."""
    words = words[words.index("train_vla.py") + 1:]
    config = words[words.index("--config") + 1]
    changes = words[words.index("--set") + 1:] if "--set" in words else []
    json_file = words[words.index("--deepspeed_config") + 1] if "--deepspeed_config" in words else "zero2.json"
    load_config(ROOT / config, changes)
    load_ds_config(ROOT / "ds_configs" / Path(json_file).name)


def test_the_commands_of_deploy_are_trainings(run_script, tmp_path):
    sky = documents("sky.yaml")[0]
    partial, whole = tmp_path / "runs/run/checkpoints/step-000002", tmp_path / "runs/run/checkpoints/step-000001"
    for checkpoint in (partial, whole):
        checkpoint.mkdir(parents=True)
    (whole / "checkpoint.json").touch()
    nodes = {"SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
             "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    notes = run_script(sky["run"].replace("/runs/*", f"{tmp_path}/runs/*"), **nodes, **sky["envs"])
    assert notes["python"][:3] == ["-m", "machinery.supervise", "torchrun"]
    assert {"--nnodes=1", "--nproc_per_node=8", "--node_rank=0", "--master_addr=10.0.0.1"} <= {*notes["python"]}
    assert whole.exists() and not partial.exists()
    check_training(notes["python"])

    runtime, job = documents("trainjob.yaml")
    assert job["spec"]["runtimeRef"] == {"kind": runtime["kind"], "name": runtime["metadata"]["name"]}
    check_training(job["spec"]["trainer"]["args"])
    docker = (DEPLOY / "Dockerfile").read_text()
    assert json.loads(re.search("^ENTRYPOINT (.*)", docker, re.MULTILINE)[1])[1:] == SUPERVISE[1:]
    check_training(json.loads(re.search("^CMD (.*)", docker, re.MULTILINE)[1]))
    for copied in re.search(r"^COPY (.*) \./", docker, re.MULTILINE)[1].split():
        assert (ROOT / copied).exists()


@pytest.mark.parametrize("ends", ["stopped by SIGUSR1 at step 7 of 9", "done steps 9"])
def test_the_slurm_job_continues_in_its_next_slot(ends, run_script, tmp_path):
    run_script("true")  # writes the stubs
    python = tmp_path / "bin/python"
    python.write_text(python.read_text().replace("stopped by SIGUSR1 at step 7 of 9", ends))
    notes = run_script((DEPLOY / "train.sbatch").read_text(), "configs/oxe.yaml", "--set", "seed=8",
                       SLURM_JOB_NODELIST="node-[a-b]", SLURM_JOB_ID="12", SLURM_CPUS_PER_TASK="4")
    assert notes["python"] == ["train_vla.py", "--config", "configs/oxe.yaml", "--set", "seed=8"]
    assert {"MASTER_ADDR=node-a", "MASTER_PORT=29500"} <= {*notes["env"]}
    assert notes.get("requeued") == (["requeue 12"] if "stopped" in ends else None)
    check_training(notes["python"])


@pytest.mark.slow
def test_skypilots_own_client_reads_its_file():
    sky = pytest.importorskip("sky")
    task = sky.Task.from_yaml(str(DEPLOY / "sky.yaml"))
    assert all(resources.use_spot for resources in task.resources) and "/runs" in task.storage_mounts


@pytest.mark.slow
def test_kubeflows_own_models_read_its_file():
    models = pytest.importorskip("kubeflow_trainer_api.models")
    for document in documents("trainjob.yaml"):
        model = getattr(models, f"TrainerV1alpha1{document['kind']}").from_dict(document)
        assert model.to_dict() == document
