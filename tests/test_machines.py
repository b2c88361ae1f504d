"""Several machines: those that do not share what they must, are late, or do not find each other.

Machines are network namespaces with names of their own, or ranks with other folders.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from conftest import (
    launch_command,
    places,
    printed,
    read_metrics,
    wait_for_steps,
    write_colors,
)

from machinery.checkpoint import list_checkpoints
from machinery.connect import late_ranks

# a rank on a machine of its own: host name, /etc/hosts and network; and waits of seconds
MACHINE = """
import ctypes, os, socket, subprocess, time
import train_vla
from machinery import connect
connect.PATIENCE, connect.BEAT, connect.SOON = 3, 0.2, 5
connect.LONGEST = float(os.environ.get("LONGEST", 60))

def run(command):
    subprocess.run(command, shell=True, check=True)

if "FOLDER" in os.environ:
    folder, address, name = os.environ["FOLDER"], os.environ["ADDRESS"], os.environ["MACHINE"]
    assert ctypes.CDLL(None).unshare(0x20000 | 0x4000000 | 0x40000000) == 0  # mounts, host name, network
    run(f"mount --make-rprivate / && mount --bind {folder}/hosts.{name} /etc/hosts && ip link set lo up")
    socket.sethostname(name)
    run(f"echo {os.getpid()} > {folder}/{name}.new && mv {folder}/{name}.new {folder}/{name}.pid")
    if name == "nodea":
        while not os.path.exists(f"{folder}/nodeb.pid"):
            time.sleep(0.05)
        other = open(f"{folder}/nodeb.pid").read()
        run(f"ip link add cable type veth peer name cable netns {other}")
    while "cable" not in [name for _, name in socket.if_nameindex()]:
        time.sleep(0.05)
    run("ip link add aaa type veth peer name bbb && ip addr add 192.168.77.7/24 dev aaa && ip link set aaa up")
    run(f"ip addr add {address} dev cable {'nodad' * (':' in address)} && ip link set cable up")
train_vla.main()
"""


@pytest.fixture
def machines(commands, tiny, tmp_path):
    """Start ranks of which each may have other settings and variables -> (process ids, their outputs)."""
    script = tmp_path / "machine.py"
    script.write_text(MACHINE)
    started = []

    def start(settings: list[list[str]], environs: list[dict] | None = None, json: str = "cpu", **changes):
        config = tiny(**{"max_steps": 2, "eval_samples": 8, "run_id": "run", **changes})
        outputs = [commands.new_output() for _ in settings]
        environs = environs or [{}] * len(settings)
        jobs = [("", {**place, **environ}, script,
                 ["--config", config, "--deepspeed_config", f"ds_configs/{json}.json", "--set", "seed=7", *own], output)
                for place, environ, own, output in zip(places(len(settings)), environs, settings, outputs, strict=True)]
        started.extend(commands.start(*jobs))
        return started[-len(jobs):], outputs

    yield start
    for pid in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(pid).kill()


@pytest.fixture
def together(machines, commands):
    """Run such ranks to their end -> [(exit status, text), ...]"""
    def run(*arguments, **changes) -> list[tuple[int, str]]:
        pids, outputs = machines(*arguments, **changes)
        return list(zip(commands.wait(pids), map(printed, outputs), strict=True))

    return run


def refused(done: list[tuple[int, str]], *words: str) -> None:
    """All ranks ended with one line that has these words, before the first step."""
    for status, text in done:
        assert status == 1 and "Traceback" not in text and "\nstep " not in text, text
        (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
        assert all(word in line for word in words), line


# ---- What machines must share --------------------------------------------------------------------


@pytest.mark.parametrize("begun", [False, True], ids=["new", "with a checkpoint"])
def test_a_machine_with_another_run_folder_is_named_before_the_first_step(begun, together, tmp_path, plain_run, tiny):
    if begun:
        assert plain_run(tiny(max_steps=1, run_id="run")).returncode == 0
    before = sorted((tmp_path / "runs").rglob("*"))
    done = together([[], [], [f"run_root_dir={tmp_path}/other"]])
    refused(done, "rank 2", socket.gethostname(), f"{tmp_path}/other/run", "run_root_dir")
    assert sorted((tmp_path / "runs").rglob("*")) == before


def test_a_folder_that_is_seen_late(machines, commands, tmp_path):
    """Through a link, on one of the machines."""
    pids, outputs = machines([[], [f"run_root_dir={tmp_path}/link"]])
    while "run" not in os.listdir(tmp_path / "runs" if (tmp_path / "runs").exists() else tmp_path):
        time.sleep(0.05)
    time.sleep(1)
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    assert commands.wait(pids) == [0, 0], [printed(output) for output in outputs]
    assert "done steps 2" in printed(outputs[0])


def test_rank_0_chooses_the_checkpoint(together, plain_run, tiny, tmp_path):
    """Even if another machine sees newer ones."""
    assert plain_run(tiny(max_steps=2, save_interval=1, run_id="run")).returncode == 0
    shutil.copytree(tmp_path / "runs", tmp_path / "other")
    first, newest = list_checkpoints(tmp_path / "runs/run/checkpoints")
    shutil.rmtree(newest)
    shutil.rmtree(tmp_path / "other/run/checkpoints" / first.name)
    shutil.copytree(first, tmp_path / "other/run/checkpoints" / first.name)
    done = together([[], []], max_steps=2)
    assert f"resumed {first} step 1" in done[0][1] and [status for status, _ in done] == [0, 0], done


@pytest.mark.parametrize("setting", ["seed=8", "save_interval=1", "image_aug=true"])
def test_another_yaml(setting, together):
    refused(together([[], [setting]]), setting.partition("=")[0], "rank 1", "YAML")


def test_another_json(machines, commands, tmp_path):
    pids, outputs = machines([[], ["--deepspeed_config", "ds_configs/zero2.json"]])
    refused(list(zip(commands.wait(pids), map(printed, outputs), strict=True)), "on rank 1", "JSON")


def test_other_data(together, tmp_path):
    for folder, scale in (("one", 0.1), ("another", 0.2)):
        write_colors(tmp_path / folder, "colors", scale)
    done = together([[], [f"data_root_dir={tmp_path}/another"]], data_root_dir=str(tmp_path / "one"),
                    data_mix="colors", datasets={"colors": {"primary": "image"}})
    refused(done, "dataset colors", "on rank 1", "data")


# ---- Who waits for whom --------------------------------------------------------------------------


def until(text: str, output: Path, seconds: float = 60) -> None:
    for _ in range(int(seconds / 0.1)):
        if text in printed(output):
            return
        time.sleep(0.1)
    raise AssertionError(printed(output))


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_rank_is_named_and_training_continues_with_it(frozen, machines, commands, tmp_path):
    pids, outputs = machines([[], []], max_steps=5000, save_interval=5000)
    until("\nstep 3 ", outputs[0])
    os.kill(pids[frozen], signal.SIGSTOP)
    until(f"s for rank {frozen} on {socket.gethostname()}: no answer", outputs[1 - frozen])
    os.kill(pids[frozen], signal.SIGCONT)
    step = printed(outputs[0]).count("\nstep ")
    until(f"\nstep {step + 3} ", outputs[0])
    os.kill(pids[0], signal.SIGUSR1)
    assert commands.wait(pids) == [0, 0]
    assert "Traceback" not in printed(outputs[0]) + printed(outputs[1])


def test_the_first_of_those_that_wait_names_the_others():
    hosts = ["a", "a", "b", "b"]
    before = [["7", "1", "step"], ["7", "1", "step"], ["5", "1", "load"], ["5", "1", "load"]]
    now = [[count, "9", place] for count, _, place in before]
    assert late_ranks(0, before, now, hosts) == "for ranks 2, 3 on b, at 'load'"
    assert late_ranks(1, before, now, hosts) is None  # rank 0 has printed it
    assert late_ranks(2, before, now, hosts) is None
    now[0] = before[0]
    assert late_ranks(1, before, now, hosts) == ("for rank 0 on a: no answer since 'step'; for ranks 2, 3 on b, "
                                                 "at 'load'")


# ---- How machines find each other ----------------------------------------------------------------


def test_an_address_that_is_not_known(together):
    refused(together([[], []], [{"MASTER_ADDR": "nosuch.invalid"}] * 2), "MASTER_ADDR nosuch.invalid", "set it")


@pytest.mark.parametrize("rank, address", [("1", "127.0.0.1"), ("0", "240.0.0.1")])
def test_an_address_without_rank_0(rank, address, together):
    """Which runs on another machine, or has not started."""
    done = together([[]], [{"MASTER_ADDR": address, "WORLD_SIZE": "2", "RANK": rank, "LONGEST": "3"}])
    refused(done, f"MASTER_ADDR {address}", "MASTER_PORT", f"rank {rank} on {socket.gethostname()}")


def test_too_few_machines(together):
    refused(together([[]], [{"WORLD_SIZE": "3", "LONGEST": "3"}]), "1 of 3 ranks", "ranks 1, 2")


def test_two_machines_with_the_same_rank(together):
    done = together([[]] * 3, [{}, {"RANK": "1"}, {"RANK": "1"}])
    assert all(status == 1 and "Traceback" not in text for status, text in done), done
    assert any("[0, 1, 1]" in text and "--node_rank" in text for _, text in done), done


@pytest.mark.parametrize("addresses", [("10.78.0.1/24", "10.78.0.2/24"), ("fd78::1/64", "fd78::2/64")],
                         ids=["IPv4", "IPv6"])
def test_machines_whose_own_names_are_127_0_1_1(addresses, together, tmp_path):
    """The master's, too. Each has another network that leads nowhere."""
    try_it = ["unshare", "-rmun", "ip", "link", "add", "cable", "type", "veth", "peer", "name", "other"]
    if not shutil.which("ip") or subprocess.run(try_it, capture_output=True).returncode:
        pytest.skip("may not make networks (needs iproute2, veth, and root or user namespaces)")
    master = addresses[0].partition("/")[0]
    (tmp_path / "hosts.nodea").write_text("127.0.0.1 localhost\n127.0.1.1 nodea\n")
    (tmp_path / "hosts.nodeb").write_text(f"127.0.0.1 localhost\n127.0.1.1 nodeb\n{master} nodea\n")
    environs = [{"FOLDER": str(tmp_path), "MACHINE": name, "ADDRESS": address, "LOCAL_RANK": "0",
                 "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "nodea"}
                for name, address in zip(("nodea", "nodeb"), addresses, strict=True)]
    done = together([[], []], environs)
    assert [status for status, _ in done] == [0, 0] and "done steps 2" in done[0][1], done
    assert "Traceback" not in done[0][1] + done[1][1]


# ---- Launchers that start again ------------------------------------------------------------------


@pytest.mark.slow
def test_torchrun_restarts_the_ranks_and_they_resume(tiny, tmp_path, start):
    config = tiny(max_steps=150, save_interval=20, run_id="run", num_workers=1)
    command = launch_command(config, "--deepspeed_config", "ds_configs/cpu.json", ranks=2, launcher="torchrun")
    command["args"].insert(1, "--max-restarts=1")
    job = start(**command)
    wait_for_steps(tmp_path / "runs", 22, job)
    (rank,) = [process for process in psutil.Process(job.process.pid).children()
               if process.environ().get("RANK") == "1"]
    rank.kill()
    status, text, _ = job.wait()
    assert status == 0 and "done steps 150" in text, text
    (resumed,) = re.findall(r"^resumed .* step (\d+)$", text, re.MULTILINE)
    assert int(resumed) >= 20 and sorted(read_metrics(tmp_path / "runs")) == list(range(1, 151))
