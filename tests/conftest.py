"""What the tests share: the fixtures' places, a tiny model, and the real launcher.

tests/fixtures holds data made by running the official OpenVLA code (see its README); nothing in it is ours.
"""

import contextlib
import fcntl
import gc
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

# before numpy and torch: the tests' tensors are tiny, and further threads would only spin
os.environ.setdefault("OMP_NUM_THREADS", "1")

import forks
import numpy as np
import psutil
import pytest
import yaml
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

from machinery import frames
from machinery.config import TrainConfig
from machinery.rlds import write_rlds

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT / "tests/fixtures"
RLDS = FIXTURES / "rlds"
GOLDEN_MODEL = FIXTURES / "model"
LLAMA_TOKENIZER = GOLDEN_MODEL / "tokenizer_llama"

# It runs by its name, alone: a process that has drawn with Mesa and has TensorFlow, as other tests have, ends
# in a segmentation fault (in either order; metaworld 3.1.1, Mesa 22.3, TensorFlow 2.21).
collect_ignore = ["test_metaworld.py"]



def pytest_configure() -> None:
    frames.index = forks.index


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()  # forks.py, imported above, has disabled it


def pytest_xdist_make_scheduler(config, log) -> LoadScopeScheduling:
    """Files with a fixture for the whole module run on one worker, the largest first; the tests of other
    files run anywhere. (xdist's own loadgroup does not group with pytest 9.2.)"""
    class ByModuleFixture(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if file in shared else nodeid

    shared = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").glob("test_*.py")
              if 'scope="module"' in path.read_text()}
    return ByModuleFixture(config, log)


settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")

# a VLA of some 100,000 parameters on the demonstrations in the repository; seconds a run
TINY = {
    "vla_id": "tiny", "data_root_dir": str(ROOT / "datasets"), "data_mix": "metaworld_demo",
    "datasets": {"metaworld_demo": {"primary": "image"}}, "image_size": 28,
    "vision_backbone": {
        "dino": {"model": "vit_small_patch14_reg4_dinov2", "embed_dim": 32, "depth": 3, "num_heads": 2},
        "siglip": {"model": "vit_base_patch16_siglip_224", "patch_size": 14, "embed_dim": 32, "depth": 3,
                   "num_heads": 2},
    },
    "arch_specifier": "no-align+fused-gelu-mlp",
    "llm_backbone": {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64,
                     "num_hidden_layers": 3, "num_attention_heads": 2},
    "tokenizer": str(ROOT / "configs/demo_tokenizer"), "add_action_tokens": True,
    "max_steps": 20, "global_batch_size": 16, "per_device_batch_size": 8, "learning_rate": 1e-3,
    "num_workers": 0, "log_interval": 1, "eval_interval": 0, "eval_samples": 32, "save_interval": 1000,
}


@pytest.fixture
def tiny(tmp_path):
    """Write the tiny model's YAML, with changes, and return its path."""

    def write(**changes) -> Path:
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump({**TINY, "run_root_dir": str(tmp_path / "runs"), **changes}))
        return path

    return write


@pytest.fixture
def data_config(tmp_path):
    """The keys that data.Mixture reads, for the fixtures' datasets."""

    def make(**changes) -> TrainConfig:
        values = {
            "data_root_dir": str(RLDS / "data"), "datasets": {}, "cameras": ["primary"], "use_proprio": False,
            "window_size": 1, "action_chunk": 1, "action_normalization": "bounds_q99", "image_size": 224,
            "image_aug": False, "seed": 7, "index_dir": str(tmp_path / "index"), "skip_bad_episodes": False,
            "prompt_style": "pure",
        }
        return TrainConfig(**{**values, **changes})

    return make


def open_mixture(cfg: TrainConfig, tokenizer=None, train: bool = True):
    """As a training opens its data."""
    from data import Mixture, open_tables
    from machinery.oxe import read_recipes
    from machinery.run import data_facts

    cfg = read_recipes(cfg)
    tables = open_tables(cfg)
    return Mixture(cfg.model_copy(update=data_facts(cfg, tables)), tables, tokenizer, train)


@pytest.fixture(scope="module")
def index_here():
    """Index without the process of frames.index, which takes a second to start."""
    from machinery import frames
    from machinery.config import Recipe
    from machinery.rlds import build_frame_table

    def index(job: dict) -> None:
        places = {key: Path(job[key]) for key in ("directory", "path")}
        build_frame_table(**{**job, **places, "recipe": Recipe(**job["recipe"])})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frames, "index", index)
        yield


def ds_json(path: Path, stage: int, bf16: bool = True, **changes) -> Path:
    """One of the repository's JSONs, possibly in float32 or with other keys, as a new file."""
    config = json.loads((ROOT / f"ds_configs/zero{stage}.json").read_text())
    path.write_text(json.dumps({**config, "bf16": {"enabled": bf16}, **changes}))
    return path


def launch(config: Path, *arguments, timeout: int = 600, **how):
    """Run train_vla.py as a user does -> the finished process, with .text, all it printed."""
    done = subprocess.run(**launch_command(config, *arguments, **how), timeout=timeout, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    done.text = done.stdout
    return done


def launch_command(config: Path, *arguments, ranks: int = 1, launcher: str = "deepspeed",
                   script: str = "train_vla.py") -> dict:
    """What subprocess needs to know to run train_vla.py as a user does."""
    script = [str(ROOT / script), "--config", str(config), *map(str, arguments)]
    bin_dir = Path(sys.executable).parent
    port = str(20000 + os.getpid() % 20000)
    command = {
        "deepspeed": [str(bin_dir / "deepspeed"), "--num_gpus", str(ranks), "--master_port", port, *script],
        "torchrun": [str(bin_dir / "torchrun"), f"--nproc-per-node={ranks}", f"--master-port={port}",
                     *script],
        "python": [sys.executable, *script],
    }[launcher]
    env = {**os.environ, "PATH": f"{bin_dir}:{os.environ['PATH']}"}
    return {"args": command, "env": env, "cwd": ROOT}


class Commands:
    """The project's commands as forks of one process, which all xdist workers share (see forks.py).

    A job is (shell command to run before, which may mount, environment, script, arguments).
    """

    def __init__(self, shared: Path, outputs: Path):
        self.outputs = outputs
        self.numbers = itertools.count()
        self.log = shared / "commands.log"
        self.may_mount = not subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode
        self.connection = socket.socket(socket.AF_UNIX)
        path = shared / "commands"
        with open(shared / "commands.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                self.connection.connect(str(path))
            except OSError:  # nobody has started it, or it has ended
                path.unlink(missing_ok=True)
                self.start_server(path)
                self.connection.connect(str(path))
        self.lines = self.connection.makefile("rw")

    def start_server(self, path: Path) -> None:
        private = ["unshare", "-rm"] if self.may_mount else []
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        with socket.socket(socket.AF_UNIX) as listener, open(self.log, "a") as log:
            listener.bind(str(path))
            listener.listen()
            number = listener.fileno()
            subprocess.Popen([*private, sys.executable, ROOT / "tests/forks.py", str(number)], cwd=ROOT,
                             env=env, pass_fds=[number], stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def ask(self, request: str, values):
        reply = ""
        with contextlib.suppress(ConnectionError):
            print(json.dumps([request, values], default=str), file=self.lines, flush=True)
            reply = self.lines.readline()
        assert reply, f"tests/forks.py ended: {self.log.read_text()}"
        return json.loads(reply)

    def new_output(self) -> Path:
        path = self.outputs / f"output{next(self.numbers)}"
        path.touch()
        return path

    def start(self, *jobs) -> list[int]:
        """jobs: as above, with the file that the output is appended to -> their process ids"""
        if any(shell for shell, *_ in jobs) and not self.may_mount:
            pytest.skip("may not mount file systems")
        return self.ask("start", list(jobs))

    def wait(self, pids: list[int]) -> list[int]:
        """-> the exit statuses; below 0 the signal that killed a process"""
        return self.ask("wait", pids)

    def shell(self, command: str) -> None:
        """Run a shell command that may mount; the jobs that follow see its mounts, this process does not."""
        if not self.may_mount:
            pytest.skip("may not mount file systems")
        assert self.ask("shell", command) == 0, self.log.read_text()

    def __call__(self, *jobs) -> list[tuple[int, str]]:
        """Run jobs at the same time -> (exit status, all that was printed) of each"""
        outputs = [self.new_output() for _ in jobs]
        started = self.start(*([*job, output] for job, output in zip(jobs, outputs, strict=True)))
        return list(zip(self.wait(started), map(printed, outputs), strict=True))


def printed(output: Path) -> str:
    return output.read_text().replace("\r", "\n")


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """The folder that all xdist workers of a session see."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def commands(shared, tmp_path_factory):
    commands = Commands(shared, tmp_path_factory.mktemp("commands"))
    yield commands
    commands.connection.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def places(count: int) -> list[dict[str, str]]:
    """The environment of each rank of a job, as a launcher sets it."""
    job = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
           "MASTER_PORT": str(free_port())}
    return [{**job, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


@pytest.fixture(scope="session")
def ranks(commands):
    """Train on several ranks without a launcher, for every test that is not about one -> the exit status (of
    the first rank that failed) and the text of all."""

    def run(count: int, config, *arguments, script: str = "train_vla.py", environ: dict | None = None
            ) -> SimpleNamespace:
        output = commands.new_output()
        arguments = ["--config", config, *arguments]
        started = commands.start(*(("", {**place, **(environ or {})}, script, arguments, output)
                                   for place in places(count)))
        failed = [status for status in commands.wait(started) if status]
        return SimpleNamespace(returncode=failed[0] if failed else 0, text=printed(output))

    return run


@pytest.fixture(scope="session")
def plain_run(commands):
    """Run train_vla.py without a launcher -> its exit status and text."""

    def run(config, *arguments) -> SimpleNamespace:
        ((returncode, text),) = commands(("", {}, "train_vla.py", ["--config", config, *arguments]))
        return SimpleNamespace(returncode=returncode, text=text)

    return run


class Program:
    """A program in a fork, with the methods of subprocess.Popen that tests need."""

    def __init__(self, commands, script: str, *arguments):
        self.commands, self.log, self.returncode = commands, commands.new_output(), None
        (self.pid,) = commands.start(("", {}, script, arguments, self.log))

    def poll(self) -> int | None:
        if self.returncode is None and psutil.Process(self.pid).status() == "zombie":
            (self.returncode,) = self.commands.wait([self.pid])
        return self.returncode

    def wait(self, seconds: float = 60) -> int:
        stop = time.time() + seconds
        while self.poll() is None:
            assert time.time() < stop, printed(self.log)
            time.sleep(0.05)
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


@pytest.fixture(scope="session")
def serving(commands):
    """Start serve_vla.py -> (process, port, path of its log); stop it with Ctrl-C. test_start.py's starts as a
    user does."""

    @contextlib.contextmanager
    def serving(run, *options, port: int = 0):
        process = Program(commands, "serve_vla.py", "--checkpoint", run, "--device", "cpu", "--port", port, *options)
        log = process.log
        try:
            while not (found := re.search(r"serving http://127\.0\.0\.1:(\d+) model ", log.read_text())):
                assert process.poll() is None, log.read_text()
                time.sleep(0.1)
            yield process, int(found[1]), log
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                assert process.wait(30) == 0 and log.read_text().endswith("stopped\n")
                assert "Traceback" not in log.read_text()
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()

    return serving


def read_metrics(runs: Path) -> dict[int, dict]:
    """{step: values} of the only run below a directory."""
    (path,) = runs.glob("*/metrics.jsonl")
    steps: dict[int, dict] = {}
    for line in path.read_text().splitlines():
        values = json.loads(line)
        steps.setdefault(values["step"], {}).update(values)
    return steps


# ------------------------------------------------------------------------------------------------------------
# Jobs to which a test does something while they run


class Job:
    """A job that runs while the test does something to it."""

    def __init__(self, path: Path, **command):
        self.output = path
        with open(path, "w") as output:
            self.process = subprocess.Popen(**command, stdout=output, stderr=subprocess.STDOUT,
                                            start_new_session=True)
        self.sessions = [self.process.pid]

    def ranks(self) -> list[psutil.Process]:
        """The processes that train, rank 0 first: children of `deepspeed`'s only child."""
        (launcher,) = psutil.Process(self.process.pid).children()
        return sorted(launcher.children(), key=lambda rank: rank.environ()["RANK"])

    def members(self) -> list[psutil.Process]:
        """Its living processes."""
        found = []
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) in self.sessions and process.status() != "zombie":
                    found.append(process)
            except (ProcessLookupError, psutil.NoSuchProcess):
                pass
        return found

    def running(self) -> bool:
        return self.process.poll() is None

    def send(self, number: signal.Signals) -> None:
        """To every process, as a terminal and SLURM do."""
        for process in self.members():
            process.send_signal(number)

    def wait(self, seconds: float = 300) -> tuple[int, str, float]:
        """-> (exit status, all it printed, how long it took)"""
        start = time.time()
        while self.running() or self.members():  # ranks may outlive the launcher, workers their rank
            assert time.time() - start < seconds, self.output.read_text()
            time.sleep(0.1)
        return self.status(), printed(self.output), time.time() - start

    def status(self) -> int:
        return self.process.wait()

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.status()


class Forked(Job):
    """The same without a launcher: ranks that the commands' server has forked."""

    def __init__(self, commands, count: int, config, *arguments, script="train_vla.py", environ=None):
        self.commands, self.output, self.statuses = commands, commands.new_output(), None
        arguments = ["--config", config, *arguments]
        environs = places(count) if count > 1 else [{}]
        self.sessions = commands.start(*(("", {**place, **(environ or {})}, script, arguments, self.output)
                                         for place in environs))

    def ranks(self) -> list[psutil.Process]:
        return [psutil.Process(pid) for pid in self.sessions]

    def running(self) -> bool:
        return all(process.status() != "zombie" for process in self.ranks())

    def status(self) -> int:
        """The first that is not 0."""
        if self.statuses is None:
            self.statuses = self.commands.wait(self.sessions)
        return next(filter(None, self.statuses), 0)


@pytest.fixture
def start(tmp_path):
    """Start a job as a user does; whatever is left of it when the test ends is killed."""
    jobs = []

    def start(**command) -> Job:
        jobs.append(Job(tmp_path / f"output{len(jobs)}", **command))
        return jobs[-1]

    yield start
    for job in jobs:
        job.kill()


@pytest.fixture
def fork(commands):
    """Start a job without a launcher: fork(ranks, config, *arguments)."""
    jobs = []

    def start(*job, **how) -> Forked:
        jobs.append(Forked(commands, *job, **how))
        return jobs[-1]

    yield start
    for job in jobs:
        job.kill()


def wait_for_steps(runs: Path, steps: int, job: Job) -> None:
    """Until the only run below `runs` has logged so many steps."""
    for _ in range(6000):
        logs = list(runs.glob("*/metrics.jsonl"))
        if logs and logs[0].read_text().count("\n") >= steps:
            return
        assert job.running(), job.output.read_text()
        time.sleep(0.1)
    raise AssertionError(job.output.read_text())


# ------------------------------------------------------------------------------------------------------------
# A model that has learned to look, for what acts with it


def write_colors(root: Path, name: str, scale: float, cameras: int = 1) -> Path:
    """A dataset whose actions tell what the model saw: dimension 0 is +-scale for the image's red, 1 for its
    blue, and the gripper's 0 or 1 comes from the instruction. The color is in the outer quarters of a wide
    image, so cropping that away or swapping red and blue shows."""
    import tensorflow_datasets as tfds  # here: it takes a second

    f = tfds.features
    names, draw = ["image", "wrist"][:cameras], np.random.RandomState(len(name))
    features = {"steps": f.Dataset({
        "observation": {**{key: f.Image(shape=(32, 64, 3), encoding_format="jpeg") for key in names},
                        "state": f.Tensor(shape=(2,), dtype=np.float32)},
        "action": f.Tensor(shape=(3,), dtype=np.float32), "language_instruction": f.Text()})}

    def episode() -> dict:
        grip, steps = draw.randint(2), []
        for red, blue in draw.randint(0, 2, (8, 2)):
            image = draw.randint(100, 150, (32, 64, 3)).astype(np.uint8)
            image[:, np.r_[:16, 48:64]] = [30 + 200 * red, 30, 30 + 200 * blue]
            action = np.array([scale * (2 * red - 1), 3 * scale * (2 * blue - 1), grip], np.float32)
            observation = {**dict.fromkeys(names, image), "state": draw.randn(2).astype(np.float32)}
            steps.append({"observation": observation, "action": action,
                          "language_instruction": ["let go", "hold it"][grip]})
        return {"steps": steps}

    return write_rlds(root, name, "1.0.0", features,
                      {"train": [episode() for _ in range(40)], "val": [episode() for _ in range(8)]})


@pytest.fixture(scope="session")
def colors(shared, plain_run):
    """A run in float32 that has learned two datasets of write_colors, `cold` and `warmer`, well. One xdist
    worker trains it for all."""
    path = shared / "colors"
    with open(shared / "colors.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            path.mkdir()
            for name, scale in (("cold", 0.1), ("warmer", 0.3)):
                write_colors(path, name, scale)
            config = {**TINY, "data_root_dir": str(path), "data_mix": {"cold": 1.0, "warmer": 1.0},
                      "datasets": {name: {"primary": "image"} for name in ("cold", "warmer")},
                      "per_device_batch_size": 16, "learning_rate": 3e-3, "max_steps": 100, "log_interval": 5,
                      "run_root_dir": str(path / "runs"), "run_id": "colors"}
            (path / "colors.yaml").write_text(yaml.safe_dump(config))
            done = plain_run(path / "colors.yaml", "--deepspeed_config", "ds_configs/cpu.json")
            assert done.returncode == 0, done.text
    return path / "runs/colors"
