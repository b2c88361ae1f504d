"""Models, tokenizers, checkpoints, machines and disks as people have them: what begins works, and what cannot
work is refused by name before it begins."""

import fcntl
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT, TINY, open_mixture
from test_own_robot import random_actions, write_arm
from test_serve import Client

import export_vla
import serve_vla
from act import load_vla
from machinery import config
from machinery.checkpoint import CheckpointError
from machinery.config import UserError, set_rank_env
from machinery.files import take_lock
from machinery.weights import open_weights

IMAGE = np.random.RandomState(0).randint(0, 255, (28, 28, 3)).astype(np.uint8)
ON_CPU = ("--deepspeed_config", "ds_configs/cpu.json")


@pytest.fixture(scope="module")
def run(plain_run, tmp_path_factory) -> Path:
    """A run of two steps."""
    path = tmp_path_factory.mktemp("start")
    values = {**TINY, "max_steps": 2, "save_interval": 2, "run_root_dir": str(path / "runs"),
              "run_id": "tiny"}
    (path / "tiny.yaml").write_text(yaml.safe_dump(values))
    done = plain_run(path / "tiny.yaml", *ON_CPU)
    assert done.returncode == 0, done.text
    return path / "runs/tiny"


@pytest.fixture
def exported(run, tmp_path) -> Path:
    """The same as OpenVLA's Hugging Face class has it."""
    export_vla.export(str(run), tmp_path / "hf", "hf")
    return tmp_path / "hf"


# ---- Checkpoints that are more, or other, than what is loaded ----------------------------------------------


@pytest.mark.parametrize("key", ["my_robot", "bridge_orig"])
def test_openvlas_finetuned_statistics_count(key, exported):
    """Its finetune.py leaves the base model's in config.json; those of its own data lie beside it, also where
    the base model knew data of that name."""
    facts = json.loads((exported / "config.json").read_text())
    base = facts["norm_stats"].pop("metaworld_demo")
    facts["norm_stats"] = {"bridge_orig": base, "viola": base}
    (exported / "config.json").write_text(json.dumps(facts))
    mine = json.loads(json.dumps(base))
    mine["action"]["q99"] = [2 * value for value in base["action"]["q99"]]
    (exported / "dataset_statistics.json").write_text(json.dumps({key: mine}))
    policy = load_vla(exported)
    assert policy.norm_stats[key]["action"]["q99"] == mine["action"]["q99"]
    assert policy.norm_stats["viola"] == base
    mine, theirs = (policy.predict_action(IMAGE, "open", name) for name in (key, "viola"))
    assert not np.allclose(mine, theirs)


@pytest.mark.parametrize("names, part", [
    (["noisy_action_projector--1.pt"], "diffusion head"),  # OpenVLA-OFT's other parts: test_oft.py
    (["adapter_config.json", "adapter_model.safetensors"], "export_vla.py --format hf"),
])
def test_a_checkpoint_with_parts_that_would_be_left_out(names, part, exported, run):
    for name in names:
        (exported / name).write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=f"{exported}: .*{part}.*act nonsense"):
        load_vla(exported)
    for name in names:
        (exported / name).unlink()
    (exported / "lora_adapter").mkdir()  # what a merged one leaves beside itself hurts nobody
    assert load_vla(exported).predict_action(IMAGE, "open").shape == (4,)


# ------------------------------------------------------------------------------------------------------------
# 12. Where files live


@pytest.mark.parametrize("file, content", [
    ("config.json", "[]"), ("config.json", "{}"), ("config.json", '{"model_type": "openvla"}'),
    ("config.json", '{"a_key_of_2030": 1}'), ("dataset_statistics.json", "[]")])
@pytest.mark.parametrize("form", ["run", "hf"])
def test_descriptions_of_models_that_are_none(file, content, form, run, exported, tmp_path):
    shutil.copytree({"run": run, "hf": exported}[form], tmp_path / "copy")
    if content == '{"a_key_of_2030": 1}':
        values = json.loads((tmp_path / "copy" / file).read_text())
        (values if form == "run" else values["zerovla"])["a_key_of_2030"] = 1
        content = json.dumps(values)
    if not (tmp_path / "copy" / file).exists():
        pytest.skip("is a part of config.json there")
    (tmp_path / "copy" / file).write_text(content)
    with pytest.raises(CheckpointError):
        open_weights(tmp_path / "copy")


def test_a_full_disk_ends_in_one_line(tiny, tmp_path, commands):
    """Where the run is continued: its first line of the log does not fit any more."""
    disk = tmp_path / "disk"
    config = tiny(max_steps=1, run_root_dir=str(disk), run_id="run")
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=64k none {disk} && head -c 65536 /dev/zero > {disk}/full; true"
    ((status, text),) = commands((mount, {}, "train_vla.py", ["--config", config, *ON_CPU]))
    assert status == 1 and "Traceback" not in text, text
    assert "error: " in text and "No space left on device" in text, text


def test_a_folder_for_runs_that_is_none(tiny, tmp_path, plain_run):
    (tmp_path / "file").write_text("")
    done = plain_run(tiny(run_root_dir=str(tmp_path / "file/runs")), *ON_CPU)
    assert done.returncode == 1 and re.search(f"error: .*Not a directory: .{tmp_path}/file", done.text), done.text
    assert "memory" not in done.text


@pytest.mark.parametrize("path", ["~/runs", "$SCRATCH/runs", "${SCRATCH}/a/runs"])
def test_what_a_shell_would_expand_is_expanded(path, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setenv("INDEX", str(tmp_path))
    cfg = config.load_config(tiny(run_root_dir=path, index_dir="$INDEX/index"))
    expected = path.replace("~", "$HOME").replace("${SCRATCH}", "$SCRATCH")
    for name in ("HOME", "SCRATCH"):
        expected = expected.replace(f"${name}", os.environ[name])
    assert config.run_directory(cfg).parent == Path(expected) and cfg.index_dir == str(tmp_path / "index")


@pytest.mark.parametrize("format, room", [("hf", 0.5), ("native", 0.5), ("native", 1.5), ("hf", 1.02),
                                          ("native", 2.02)])
def test_exporting_to_a_full_disk(format, room, run, tmp_path, commands):
    """room: for how many copies of the tensors. It ends at once, or in the middle where other files came
    between; in one line, and leaves nothing."""
    tensors = open_weights(run).tensors
    copy = sum(tensors.whole(name).nbytes for name in tensors.shapes)
    disk = tmp_path / "disk"
    disk.mkdir()
    left = tmp_path / "left"
    mount = f"mount -t tmpfs -o size={int(room * copy) // 4096 * 4}k tmpfs {disk}"
    ((status, text),) = commands((mount, {}, "export_vla.py", [run, disk / "out", "--format", format]))
    commands((f"ls -A {disk} > {left}", {}, "export_vla.py", [run, run, "--format", format]))
    assert status == 1 and "Traceback" not in text and left.read_text() == "", text
    assert re.search("error: .*[Nn]o space left", text), text


@pytest.mark.parametrize("umask, readable", [(0o022, stat.S_IRGRP | stat.S_IROTH), (0o027, stat.S_IRGRP)])
@pytest.mark.parametrize("format", ["hf", "native"])
def test_exports_are_readable_by_the_umask(format, umask, readable, run, tmp_path):
    before = os.umask(umask)
    try:
        export_vla.export(str(run), tmp_path / "out", format)
    finally:
        os.umask(before)
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            assert path.stat().st_mode & 0o077 == readable, path


def test_a_file_system_without_hard_links(run, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(1, "Operation not permitted")  # as exFAT and some network file systems say

    monkeypatch.setattr(os, "link", refuse)
    export_vla.export(str(run), tmp_path / "out", "native")
    first, second = sorted((tmp_path / "out/checkpoints").iterdir())
    assert first.name == "latest-checkpoint.pt" and first.read_bytes() == second.read_bytes()
    assert load_vla(tmp_path / "out").predict_action(IMAGE, "open").shape == (4,)


def test_a_file_system_without_locks(tmp_path, monkeypatch, capfd, data_config):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    assert take_lock(tmp_path / "lock") is None
    assert "cannot be locked" in capfd.readouterr().err
    write_arm(tmp_path, random_actions(7))
    mixture = open_mixture(data_config(data_root_dir=str(tmp_path), data_mix="arm",
                                  datasets={"arm": {"primary": "image"}}))
    assert len(mixture.tables[0].frames) == 32 and "start one job at a time" in capfd.readouterr().err


@pytest.mark.parametrize("command", ["train_vla.py --config {tiny} --deepspeed_config ds_configs/cpu.json",
                                     "data.py --inspect {data}/arm --out {tmp}/sheet.png",
                                     "data.py --check {data}/arm"])
def test_read_only_data_and_no_home(command, tiny, tmp_path, commands):
    """Containers and SLURM have it so: the cure is named. With it, it works."""
    write_arm(tmp_path / "from", random_actions(7))
    (tmp_path / "data").mkdir()
    config = tiny(data_root_dir=str(tmp_path / "data"), data_mix="arm", max_steps=1, save_interval=0,
                  datasets={"arm": {"primary": "image"}}, eval_samples=8)
    script, *arguments = command.format(tiny=config, data=tmp_path / "data", tmp=tmp_path).split()
    mount = (f"mount -t tmpfs tmpfs {tmp_path}/data && cp -r {tmp_path}/from/* {tmp_path}/data && "
             f"mount -o remount,ro {tmp_path}/data")
    index_dir = tmp_path / "index"
    cure = ["--set", f"index_dir={index_dir}"] if script == "train_vla.py" else ["--index_dir", index_dir]
    ((status, text),) = commands((mount, {"HOME": "/proc/nohome"}, script, arguments))
    assert status == 1 and "Traceback" not in text, text
    assert re.search("error: .*arm/1.0.0: no frame table can be written to .*: set index_dir", text), text
    ((status, text),) = commands(("true", {"HOME": "/proc/nohome"}, script, [*arguments, *cure]))
    assert status == 0, text


def test_read_only_data_with_a_table_of_their_own(tmp_path, commands):
    """Which somebody made who could write there."""
    directory = write_arm(tmp_path, random_actions(7))
    inspect = ["--inspect", directory, "--out", tmp_path / "sheet.png"]
    ((status, first),) = commands(("", {}, "data.py", inspect))
    assert status == 0 and len(list(directory.glob(".frame_table/*/table.json"))) == 2
    mount = f"mount --bind {directory} {directory} && mount -o remount,bind,ro {directory}"
    ((status, text),) = commands((mount, {"HOME": "/proc/nohome"}, "data.py", inspect))
    assert status == 0 and text == first
    another = ["--check", directory]  # which looks at no states
    ((status, text),) = commands(("", {"HOME": "/proc/nohome"}, "data.py", another))
    assert status == 1 and "no frame table can be written to" in text and "set index_dir" in text, text


def test_small_shared_memory(tiny, commands):
    """Docker gives 64 MB of it, and with large batches that is little."""
    config = tiny(max_steps=3, save_interval=0, num_workers=2, global_batch_size=64, per_device_batch_size=64,
                  eval_samples=8)
    ((status, text),) = commands(("mount -t tmpfs -o size=64k tmpfs /dev/shm", {}, "train_vla.py",
                                  ["--config", config, *ON_CPU]))
    commands(("umount -l /dev/shm", {}, "train_vla.py", ["--config", "none"]))
    assert "Traceback" not in text, text
    told = [line for line in text.splitlines() if "/dev/shm" in line and "lower num_workers" in line]
    assert status == 0 or len(told) == 1, text


# ---- How jobs start ----------------------------------------------------------------------------------------


OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
SLURM = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1",
         "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}
PYTORCH = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node7"}


@pytest.mark.parametrize("environ, expected", [
    ({}, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}),
    ({"MASTER_PORT": "4"}, {"RANK": "0", "MASTER_PORT": "4"}),
    (PYTORCH, {**PYTORCH, "LOCAL_RANK": "0", "MASTER_PORT": "29500"}),  # Kubeflow: a process in each pod
    ({**PYTORCH, "LOCAL_RANK": "1", "MASTER_PORT": "5"}, {"LOCAL_RANK": "1", "MASTER_PORT": "5"}),
    ({**OPEN_MPI, "MASTER_ADDR": "node7"},
     {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node7"}),
    ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, {"RANK": "3", "MASTER_ADDR": "127.0.0.1"}),
    ({**OPEN_MPI, **PYTORCH}, {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node7"}),  # torchrun within
    ({"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
     {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1"}),
    ({**SLURM, "MASTER_ADDR": "node7"},
     {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}),
    ({**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, {"RANK": "0", "WORLD_SIZE": "1"}),
])
def test_ranks_under_any_launcher(environ, expected):
    environ = dict(environ)
    set_rank_env(environ)
    assert {name: environ[name] for name in expected} == expected
    assert {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= environ.keys()


@pytest.mark.parametrize("environ, missing", [
    ({"RANK": "2"}, "WORLD_SIZE"), ({"RANK": "2", "WORLD_SIZE": "4"}, "MASTER_ADDR"),
    (SLURM, "MASTER_ADDR"), (OPEN_MPI, "MASTER_ADDR"),
])
def test_a_variable_that_a_launcher_did_not_set_is_named(environ, missing):
    with pytest.raises(UserError, match=f"{missing}.* set it"):
        set_rank_env(dict(environ))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("ranks, variables", [
    (1, {"RANK": "{rank}", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}),
    (2, {name: {"SIZE": "2", "RANK": "{rank}"}[name.rpartition("_")[2]] for name in OPEN_MPI}),
], ids=["kubernetes", "mpirun"])
def test_a_job_of_another_launcher_trains(ranks, variables, tiny, commands):
    arguments = ["--config", tiny(max_steps=1, save_interval=0, eval_samples=8, run_id="job"), *ON_CPU]
    environs = [{"MASTER_PORT": str(free_port()), **variables}] * ranks
    environs = [{key: value.format(rank=rank) for key, value in environ.items()}
                for rank, environ in enumerate(environs)]
    done = commands(*(("", environ, "train_vla.py", [*arguments, "--local-rank=0"]) for environ in environs))
    assert all(status == 0 for status, _ in done), done
    assert f"ranks {ranks} " in done[0][1] and "done steps 1" in done[0][1]


@pytest.mark.parametrize("variables", [{"RANK": "0", "WORLD_SIZE": "1"}, {"RANK": "0", "WORLD_SIZE": "2"},
                                       {**OPEN_MPI, "OMPI_COMM_WORLD_RANK": "0"}])
def test_a_port_in_use_ends_the_job_and_is_named(variables, tiny, commands):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        ((status, text),) = commands(("", {**variables, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
                                      "train_vla.py", ["--config", tiny(), *ON_CPU]))
    assert status == 1 and f"port: {port}" in text and "address already in use" in text.lower(), text


# ------------------------------------------------------------------------------------------------------------
# 13. The server lets in who belongs there


@pytest.mark.parametrize("arguments, message", [
    (["--host", "0.0.0.0"], "--host 0.0.0.0.*--token"),
    (["--host", "::"], "--host ::.*--token"),
    (["--host", "nosuch.invalid"], "--host nosuch.invalid.*--token"),
    (["--token", "NOT_SET_ANYWHERE"], "--token: 'NOT_SET_ANYWHERE'.*environment variable"),
    (["--host", "0.0.0.0", "--token", "EMPTY"], "--token: 'EMPTY' is empty"),
    (["--token", "{tmp}/blank"], "--token.*empty"),
])
def test_a_server_without_a_password_stays_on_this_machine(arguments, message, tmp_path, monkeypatch):
    monkeypatch.setenv("EMPTY", "")
    (tmp_path / "blank").write_text("\n")
    arguments = [word.format(tmp=tmp_path) for word in arguments]
    monkeypatch.setattr(sys, "argv", ["serve_vla.py", "--checkpoint", str(tmp_path / "no model"), *arguments])
    with pytest.raises(SystemExit, match=message):
        serve_vla.main()


def test_an_address_is_taken_before_a_model_is_loaded(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        words = ["serve_vla.py", "--checkpoint", str(tmp_path / "no model"), "--port",
                 str(other.getsockname()[1])]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit, match="Address already in use"):
            serve_vla.main()


@pytest.fixture(scope="module")
def server(run, tmp_path_factory):
    """A server on all addresses with the token of a file -> its port."""
    path = tmp_path_factory.mktemp("server")
    (path / "password").write_text("open sesame\n")
    log = path / "log"
    with open(log, "w") as out:
        process = subprocess.Popen(
            [sys.executable, "serve_vla.py", "--checkpoint", run, "--host", "0.0.0.0", "--port", "0",
             "--device", "cpu", "--token", path / "password"],
            cwd=ROOT, stdout=out, stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        while not (found := re.search(r"serving http://0\.0\.0\.0:(\d+) model ", log.read_text())):
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield int(found[1])
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0 and "Traceback" not in log.read_text(), log.read_text()
    finally:
        process.kill()
        process.wait()


BODY = json.dumps({"image": IMAGE.tolist(), "instruction": "open"}).encode()


def ask(port: int, path: str = "/act", **headers) -> tuple[int, object]:
    client = Client(port)
    client.http.request("POST" if path == "/act" else "GET", path, BODY if path == "/act" else None, headers)
    reply = client.http.getresponse()
    return reply.status, json.loads(reply.read())


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer open"}, {"Authorization": "open sesame"},
                                     {"Authorization": "Basic open sesame"}, {"Authorization": "Bearer "},
                                     {"Authorization": "Bearer open sesame2"}, {"X-Token": "open sesame"}])
def test_who_has_no_password_is_not_answered(headers, server):
    status, reply = ask(server, **headers)
    assert status == 401 and "Authorization: Bearer" in reply["error"]
    assert ask(server, "/health", **headers) == (200, {"status": "ok"})  # that it lives, and nothing more


def test_who_has_it_is(server, run):
    known = {"Authorization": "Bearer open sesame"}
    status, action = ask(server, **known)
    assert status == 200
    np.testing.assert_allclose(action, load_vla(run).predict_action(IMAGE, "open"), atol=1e-6)
    facts = ask(server, "/health", **known)[1]
    assert facts["cameras"] == ["primary"]
    assert facts["action"] == {"metaworld_demo": [f"action[{i}]" for i in range(4)]}


def test_many_silent_connections_keep_nobody_out(server):
    silent = [socket.create_connection(("127.0.0.1", server), timeout=30)
              for _ in range(serve_vla.MAX_CLIENTS + 1)]
    try:
        assert ask(server, Authorization="Bearer open sesame")[0] == 200
    finally:
        for connection in silent:
            connection.close()
