"""What goes wrong in long runs, done to real ones: signals, kills, full disks, damaged files, broken data."""

import fcntl
import json
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from conftest import (
    TINY,
    Forked,
    Job,
    ds_json,
    launch_command,
    open_mixture,
    read_metrics,
    wait_for_steps,
)

from action_tokenizer import load_tokenizer
from machinery.checkpoint import Checkpoint, list_checkpoints
from machinery.config import TrainConfig
from machinery.rlds import write_rlds
from machinery.weights import open_weights


def losses(runs: Path) -> np.ndarray:
    return np.array([values["loss"] for _, values in sorted(read_metrics(runs).items())])


# ------------------------------------------------------------------------------------------------------------
# Signals


def stopped(job: Job, run: Path, signals: str) -> int:
    """Check that a job that got a signal has saved and ended -> its last step."""
    status, text, _ = job.wait()
    assert re.search(rf"stopped by ({signals}) at step \d+ of 5000: ", text), text
    assert "Traceback" not in text and "killed by signal" not in text, text
    assert status == 0 or not isinstance(job, Forked)  # else it is the launcher's own
    newest = Checkpoint(list_checkpoints(run / "checkpoints")[-1])
    newest.verify()
    assert max(read_metrics(run.parent)) == newest.meta["step"]
    return newest.meta["step"]


def test_a_signal_saves_and_ends_the_job(tiny, tmp_path, start, fork, ranks):
    """To the one process that a person started, to all ranks, as SLURM does, and to one rank. The same run is
    continued each time, and its losses are those of a run that got no signal."""
    runs, config = tmp_path / "runs", tiny(max_steps=5000, num_workers=1, run_id="run")
    job = start(**launch_command(config, ranks=2))
    wait_for_steps(runs, 3, job)
    job.process.send_signal(signal.SIGTERM)
    done = stopped(job, runs / "run", "the end of its launcher|a signal to another rank")

    job = fork(2, config)
    wait_for_steps(runs, done + 2, job)
    job.send(signal.SIGTERM)
    done = stopped(job, runs / "run", "SIGTERM|a signal to another rank")

    job = fork(2, config)
    wait_for_steps(runs, done + 2, job)
    job.ranks()[1].send_signal(signal.SIGUSR1)
    done = stopped(job, runs / "run", "a signal to another rank")

    config = tiny(max_steps=done, num_workers=1, run_id="run", run_root_dir=str(tmp_path / "straight"))
    assert ranks(2, config).returncode == 0
    assert (losses(runs) == losses(tmp_path / "straight")).all()


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["deepspeed's child", "all"])
def test_a_signal_to_more_of_deepspeeds_processes(whom, tiny, tmp_path, start):
    job = start(**launch_command(tiny(max_steps=5000, num_workers=1, run_id="run"), ranks=2))
    wait_for_steps(tmp_path / "runs", 3, job)
    if whom == "all":
        job.send(signal.SIGTERM)
    else:
        psutil.Process(job.process.pid).children()[0].send_signal(signal.SIGTERM)
    stopped(job, tmp_path / "runs/run", "SIGTERM|the end of its launcher|a signal to another rank")


def test_a_run_without_launcher_is_alone_in_its_directory_and_ends_with_status_0(tiny, tmp_path, fork, plain_run):
    job = fork(1, tiny(max_steps=5000))
    wait_for_steps(tmp_path / "runs", 2, job)
    second = plain_run(tiny(max_steps=5000))
    assert second.returncode == 1 and "another job is training there" in second.text, second.text
    job.ranks()[0].send_signal(signal.SIGUSR1)
    status, text, _ = job.wait()
    assert status == 0 and "stopped by SIGUSR1 at step" in text, text


def test_killed_in_the_middle_of_saving(tiny, tmp_path, fork, ranks):
    config = tiny(max_steps=5000, save_interval=1)
    job = fork(2, config)
    wait_for_steps(tmp_path / "runs", 3, job)
    (run,) = (tmp_path / "runs").iterdir()
    while not list(run.glob("checkpoints/*.tmp")):  # hold it while it saves, and kill it there
        job.send(signal.SIGCONT)
        time.sleep(0.01)
        job.send(signal.SIGSTOP)
    job.kill()
    newest = list_checkpoints(run / "checkpoints")[-1]
    Checkpoint(newest).verify()
    step = Checkpoint(newest).meta["step"]
    done = ranks(2, config, "--set", f"max_steps={step + 2}")
    assert done.returncode == 0 and f"resumed {newest} step {step}" in done.text, done.text
    assert sorted(read_metrics(tmp_path / "runs")) == list(range(1, step + 3))
    assert not list(run.glob("checkpoints/*.tmp"))


# ------------------------------------------------------------------------------------------------------------
# Ranks and workers that die


@pytest.mark.parametrize("victim", ["rank", "worker"])
def test_one_death_ends_all_ranks_with_the_cause_on_top(victim, tiny, tmp_path, fork):
    job = fork(2, tiny(max_steps=5000, num_workers=1))
    wait_for_steps(tmp_path / "runs", 3, job)
    rank = job.ranks()[1]
    (rank if victim == "rank" else rank.children()[0]).kill()
    status, text, seconds = job.wait()
    assert status != 0 and seconds < 60
    if victim == "rank":
        assert "rank 0 ends because rank 1 ended" in text, text
    else:
        first = re.search(r"^(error|rank|Traceback).*", text, re.MULTILINE)[0]
        assert re.match(r"error: step \d+ rank 1: DataLoader worker .*(exited|is killed|ended)", first), text
        assert "lower num_workers" in text, text


@pytest.fixture
def nodes(tmp_path, start):
    """Start a job as on two machines: a launcher for each, which know of each other only host names and a
    port."""
    (tmp_path / "hostfile").write_text("node-a slots=1\nnode-b slots=1\n")

    def begin(config) -> list[Job]:
        command = launch_command(config)
        deepspeed, _, _, *port_and_script = command.pop("args")
        options = ["--hostfile", str(tmp_path / "hostfile"), "--no_ssh", "--master_addr", "127.0.0.1"]
        return [start(args=[deepspeed, *options, "--node_rank", str(rank), *port_and_script], **command)
                for rank in range(2)]

    return begin


def test_two_nodes(tiny, tmp_path, nodes, ranks):
    """They compute what one does. A death on one ends the other."""
    jobs = nodes(tiny(max_steps=5000))
    wait_for_steps(tmp_path / "runs", 6, jobs[0])
    jobs[1].ranks()[0].kill()
    status, text, seconds = jobs[0].wait()
    assert status != 0 and seconds < 60 and "rank 0 ends because rank 1 ended" in text, text
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["tiny+n2+b8+x7"]
    done = ranks(2, tiny(max_steps=6, run_root_dir=str(tmp_path / "one_node")))
    assert done.returncode == 0, done.text
    assert (losses(tmp_path / "runs")[:6] == losses(tmp_path / "one_node")).all()


@pytest.mark.slow
def test_two_nodes_end_with_status_0(tiny, nodes):
    for job in nodes(tiny(max_steps=6)):
        status, text, _ = job.wait()
        assert status == 0, text


def test_a_slow_index_is_no_timeout(tiny, tmp_path, fork):
    """One machine finds its index ready, another needs longer for it than a collective may take."""
    config, seconds = tiny(max_steps=1), 6
    cfg = TrainConfig(**{**yaml.safe_load(config.read_text()), "index_dir": str(tmp_path / "rank0")})
    mixture = open_mixture(cfg, load_tokenizer(cfg.tokenizer, cfg.add_action_tokens))
    ready = mixture.tables[0].path
    waiting = tmp_path / "rank1" / ready.parent.name
    waiting.mkdir(parents=True)
    script = tmp_path / "train_with_timeout.py"
    script.write_text(
        "import datetime, os, sys\nimport deepspeed, train_vla\n"
        f"timeout = datetime.timedelta(seconds={seconds})\n"
        "train_vla.dist.distributed_c10d.default_pg_timeout = timeout\n"  # of DeepSpeed's further groups
        "deepspeed.init_distributed(timeout=timeout)\n"
        f"sys.argv += ['--set', 'index_dir={tmp_path}/rank' + os.environ['RANK']]\n"
        "print('connected', flush=True)\ntrain_vla.main()\n")
    with open(waiting / f"{ready.name}.lock", "w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        job = fork(2, config, script=script)
        while "connected" not in job.output.read_text():
            assert job.running(), job.output.read_text()
            time.sleep(0.2)
        time.sleep(1.5 * seconds)
        assert "total_steps" not in job.output.read_text()  # it waits
    status, text, _ = job.wait()
    assert status == 0 and "done steps 1" in text, text


# ------------------------------------------------------------------------------------------------------------
# Disks and checkpoints


def test_a_full_disk_keeps_the_old_checkpoints(tiny, tmp_path, ranks, commands):
    """A file system with room for three checkpoints, which only the commands see."""
    disk, seen = tmp_path / "disk", tmp_path / "seen"
    disk.mkdir()
    commands.shell(f"mount -t tmpfs -o size=14m tmpfs {disk}")
    config = tiny(run_root_dir=str(disk), save_interval=2, keep_checkpoints=0, max_steps=13)
    done = ranks(2, config, "--set", "on_save_error=continue")
    failed = re.findall(r"warning: could not save .*/(step-\d+).*: rank \d: .*No space left on device", done.text)
    # the last one must succeed
    assert failed and "error: could not save" in done.text and done.returncode != 0, done.text
    commands.shell(f"cp -r {disk} {seen}")
    assert sorted(read_metrics(seen)) == list(range(1, 14))
    kept = list_checkpoints(next(seen.iterdir()) / "checkpoints")
    assert len(kept) + len(failed) == 6
    for checkpoint in kept:
        Checkpoint(checkpoint).verify()
    done = ranks(2, config)  # on_save_error: stop
    assert f"resumed {disk / kept[-1].relative_to(seen)}" in done.text and done.returncode != 0, done.text
    assert "error: could not save" in done.text and "warning: could not save" not in done.text
    assert "Traceback" not in done.text
    commands.shell(f"ls {disk}/*/checkpoints > {tmp_path}/left; umount {disk}")
    assert (tmp_path / "left").read_text().split() == [checkpoint.name for checkpoint in kept]


@pytest.fixture(scope="module")
def three_checkpoints(tmp_path_factory, plain_run):
    """A run with checkpoints at steps 2, 4 and 6."""
    path = tmp_path_factory.mktemp("three")
    values = {**TINY, "run_root_dir": str(path / "runs"), "run_id": "run", "max_steps": 6, "save_interval": 2,
              "keep_checkpoints": 0}
    (path / "tiny.yaml").write_text(yaml.safe_dump(values))
    done = plain_run(path / "tiny.yaml")
    assert done.returncode == 0, done.text
    return path


def test_a_damaged_checkpoint_is_refused_and_the_others_offered(three_checkpoints, tiny, tmp_path,
                                                                plain_run, ranks):
    shutil.copytree(three_checkpoints / "runs", tmp_path / "runs")
    older, middle, newest = list_checkpoints(tmp_path / "runs/run/checkpoints")
    (newest / "checkpoint.json").unlink()
    (file,) = middle.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    config = tiny(run_id="run", max_steps=7)
    done = ranks(2, config)
    assert done.returncode != 0 and "Traceback" not in done.text
    assert f"{newest}: not a readable checkpoint" in done.text, done.text
    assert older.name in done.text and middle.name in done.text, done.text
    for damaged in (newest, middle):
        command = re.search(rf"`(mv {re.escape(str(damaged))} .*)`", done.text)[1]
        assert subprocess.run(shlex.split(command), check=False).returncode == 0
        done = plain_run(config)
    assert done.returncode == 0 and f"resumed {older} step 2" in done.text, done.text
    assert (losses(tmp_path / "runs")[:6] == losses(three_checkpoints / "runs")).all()


def test_resuming_a_given_checkpoint(three_checkpoints, tiny, tmp_path, plain_run):
    """OpenVLA's way: pretrained_checkpoint, is_resume, resume_step and resume_epoch."""
    _, middle, _ = list_checkpoints(three_checkpoints / "runs/run/checkpoints")
    config = tiny(pretrained_checkpoint=str(middle), resume_step=4, resume_epoch=0, max_steps=6)
    done = plain_run(config)
    assert done.returncode == 0 and f"resumed {middle} step 4" in done.text, done.text
    assert (losses(tmp_path / "runs") == losses(three_checkpoints / "runs")[4:]).all()
    # the new run's own checkpoint of step 6 comes before the given one of step 4
    done = plain_run(config, "--set", "max_steps=7")
    assert re.search(rf"resumed {tmp_path}.* step 6", done.text) and done.returncode == 0, done.text

    for changes, message in [
        ({"resume_step": 5}, "resume_step is 5"),
        ({"resume_epoch": 2}, "resume_epoch is 2"),
        ({"pretrained_checkpoint": None}, "resume_step is 4"),
        ({"is_resume": False}, "resume_step is 4"),
    ]:
        settings = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
        done = plain_run(config, "--set", "run_id=other", *settings)
        assert done.returncode == 1 and f"error: {message}" in done.text, done.text


def test_what_is_put_aside_is_no_checkpoint(three_checkpoints, plain_run, tiny, tmp_path):
    shutil.copytree(three_checkpoints / "runs", tmp_path / "runs")
    folder = tmp_path / "runs/run/checkpoints"
    older, middle, newest = list_checkpoints(folder)
    newest.rename(newest.with_name(newest.name + ".bak"))
    for name in ("step-000009-epoch-00-loss=1.0000.tar.gz", "step-000001.tar.gz"):
        (folder / name).write_bytes(b"packed")
    (folder / "step-9-hf").mkdir()
    assert list_checkpoints(folder) == [older, middle]
    done = plain_run(tiny(run_id="run", max_steps=5, save_interval=1), "--deepspeed_config",
                     "ds_configs/cpu.json")
    assert done.returncode == 0 and f"resumed {middle} step 4" in done.text, done.text
    assert (folder / "step-000009-epoch-00-loss=1.0000.tar.gz").read_bytes() == b"packed"


def test_checkpoints_that_were_put_elsewhere(three_checkpoints, plain_run, tiny, tmp_path):
    """A link to one is removed in its turn, and not what it leads to; where the folder of all is a link, its
    run is still where the link stands, and goes on with its own meaning alone."""
    shutil.copytree(three_checkpoints / "runs", tmp_path / "runs")
    folder = tmp_path / "runs/run/checkpoints"
    middle = list_checkpoints(folder)[1]
    kept = middle.rename(tmp_path / middle.name)
    middle.symlink_to(kept)
    done = plain_run(tiny(run_id="run", max_steps=8, keep_checkpoints=2), "--set", "save_interval=1")
    assert done.returncode == 0 and len(list_checkpoints(folder)) == 2 and not [*folder.glob("*.tmp")]
    Checkpoint(kept).verify()
    folder.rename(tmp_path / "disk")
    folder.symlink_to(tmp_path / "disk")
    newest = list_checkpoints(folder)[-1]
    assert open_weights(newest).config["prompt_style"] == "pure"
    done = plain_run(tiny(run_id="other", max_steps=9, pretrained_checkpoint=str(newest), prompt_style="phi"))
    assert done.returncode == 1 and re.search("error: .*prompt_style .*'pure'", done.text), done.text


@pytest.mark.parametrize("content", ["[]", "null", "{}", '{"step": "x"}'])
def test_a_checkpoint_that_does_not_say_what_it_is(content, three_checkpoints, plain_run, tiny, tmp_path):
    shutil.copytree(three_checkpoints / "runs", tmp_path / "runs")
    *_, middle, newest = list_checkpoints(tmp_path / "runs/run/checkpoints")
    (newest / "checkpoint.json").write_text(content)
    done = plain_run(tiny(run_id="run", max_steps=7), "--deepspeed_config", "ds_configs/cpu.json")
    assert done.returncode == 1 and "Traceback" not in done.text, done.text
    assert f"{newest}: not a readable checkpoint" in done.text and middle.name in done.text


def test_weights_that_would_mean_something_else(three_checkpoints, plain_run, tiny, tmp_path):
    """A run that goes on from another's checkpoint, with other words for actions; or with other data."""
    _, middle, _ = list_checkpoints(three_checkpoints / "runs/run/checkpoints")
    for changes in ({"add_action_tokens": not TINY.get("add_action_tokens", False)}, {"prompt_style": "phi"},
                    {"action_normalization": "bounds"}, {"window_size": 2}):
        done = plain_run(tiny(pretrained_checkpoint=str(middle), max_steps=6, **changes),
                         "--deepspeed_config", "ds_configs/cpu.json")
        (key,) = changes
        assert done.returncode == 1 and re.search(rf"error: .*{key}", done.text), done.text
    own = {"metaworld_demo": {"primary": "image", "action": "action[:3], action[3:] invert target raw"}}
    done = plain_run(tiny(pretrained_checkpoint=str(middle), max_steps=6, datasets=own),
                     "--deepspeed_config", "ds_configs/cpu.json")
    assert done.returncode == 1 and "statistics" in done.text, done.text


# ------------------------------------------------------------------------------------------------------------
# Data and numbers


def test_an_image_that_cannot_be_decoded_names_step_rank_and_record(tiny, tmp_path, ranks):
    import tensorflow_datasets as tfds

    f = tfds.features
    features = {"steps": f.Dataset({
        "observation": {"image": f.Image(shape=(32, 32, 3), encoding_format="png")},
        "action": f.Tensor(shape=(4,), dtype=np.float32), "language_instruction": f.Text()})}
    rng = np.random.default_rng(0)

    def step():
        return {"observation": {"image": rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)},
                "action": rng.uniform(-1, 1, 4).astype(np.float32), "language_instruction": "push"}

    episodes = [{"steps": [step() for _ in range(10)]} for _ in range(20)]
    episodes[13]["steps"][4]["observation"]["image"] = b"\x89PNG, but not really"
    write_rlds(tmp_path, "broken", "1.0.0", features, {"train": episodes, "val": episodes[:2]})
    config = tiny(data_root_dir=str(tmp_path), data_mix="broken", datasets={"broken": {"primary": "image"}},
                  num_workers=1)
    started = time.time()
    done = ranks(2, config)
    first = re.search(r"^(error|rank|Traceback).*", done.text, re.MULTILINE)[0]
    where = rf"{tmp_path}/broken/1.0.0/broken-train.*: record 13: .*frame 4"
    assert re.match(rf"error: step \d+ rank \d: {where}", first), done.text
    assert done.returncode != 0 and time.time() - started < 90 and "Traceback" not in done.text


@pytest.mark.parametrize("stage, bf16, count", [(0, False, 1), (2, True, 2)])
def test_a_step_that_is_not_finite_ends_the_run_at_once(stage, bf16, count, tiny, tmp_path, ranks):
    """Even between two lines of the log; and no checkpoint holds what came of it."""
    config = tiny(learning_rate=1e30, log_interval=1000, max_steps=10)
    done = ranks(count, config, "--deepspeed_config", ds_json(tmp_path / "ds.json", stage, bf16))
    assert done.returncode != 0
    message = re.search(r"^error: step 2: loss nan grad_norm \w+: the loss on rank 0 came from (.*)\. "
                        r"Nothing of this step was saved", done.text, re.MULTILINE)
    assert message, done.text
    records = [text.rpartition(": record ") for text in message[1].partition(" and ")[0].split("; ")]
    assert all(Path(file.removeprefix("metaworld_demo ")).exists() and int(number) >= 0
               for file, _, number in records)
    assert not list_checkpoints(next((tmp_path / "runs").iterdir()) / "checkpoints")


def test_weights_that_are_not_finite_are_not_saved(tiny, tmp_path, plain_run):
    done = plain_run(tiny(learning_rate=1e39, save_interval=1, on_save_error="continue"))
    assert re.search("warning: could not save .* is not finite", done.text), done.text
    assert done.returncode == 1 and "error: step 2: loss nan" in done.text, done.text
    assert not list((next((tmp_path / "runs").iterdir()) / "checkpoints").iterdir())
