"""A machine on which nothing has been compiled or cached yet, or cannot be."""

import json
import re
import signal
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT

JSONS = sorted(path.name for path in (ROOT / "ds_configs").glob("*.json"))
PARTIAL = ("--deepspeed_config", "ds_configs/zero3_partial_offload.json")
ON_CPU = ("--deepspeed_config", "ds_configs/cpu.json")


@pytest.mark.parametrize("environ, missing", [
    ({"CXX": "/nowhere/c++"}, r"needs a C\+\+ compiler.*apt install g\+\+"),
    ({"TORCH_EXTENSIONS_DIR": "/proc/nowhere"}, "set TORCH_EXTENSIONS_DIR"),
    ({"TORCH_EXTENSIONS_DIR": "{tmp}/file"}, "set TORCH_EXTENSIONS_DIR"),
    ({"TORCH_EXTENSIONS_DIR": "{tmp}", "CXX": "{tmp}/c++"}, "could not be compiled: .*broken on this machine"),
])
def test_what_cannot_be_compiled_is_one_line(environ, missing, tiny, tmp_path, commands):
    (tmp_path / "file").touch()
    (tmp_path / "c++").write_text("#!/bin/sh\ncase \"$*\" in *-c*) echo 'x.cpp:1: error: broken on this machine' >&2; exit 1;; esac\n"
                                  "exec c++ \"$@\"\n")
    (tmp_path / "c++").chmod(0o755)
    environ = {key: value.format(tmp=tmp_path) for key, value in environ.items()}
    ((status, text),) = commands(("", environ, "train_vla.py", ["--config", tiny(), *PARTIAL]))
    assert status == 1 and "Traceback" not in text, text
    (line,) = re.findall("^error: (.*)$", text, re.MULTILINE)
    assert re.search(r"DeepSpeed's AdamW \(cpu_adam\) .*" + missing, line), text
    assert "torch_adam" in line or "TORCH_EXTENSIONS_DIR" in line


@pytest.mark.parametrize("environ, message", [
    ({"CXX": "/nowhere/c++"}, r"compile needs a C\+\+ compiler.*set compile: false"),
    ({"TORCHINDUCTOR_CACHE_DIR": "/proc/nowhere"}, "compile: .*set TORCHINDUCTOR_CACHE_DIR")])
def test_what_torch_compile_needs(environ, message, tiny, commands):
    ((status, text),) = commands(("", environ, "train_vla.py", ["--config", tiny(compile=True), *ON_CPU]))
    assert status == 1 and "Traceback" not in text and re.search("error: " + message, text), text


# ---- Everything, from nothing ------------------------------------------------------------------------------


def few_ranks(name: str, folder: Path) -> Path:
    """A JSON of ds_configs/ for two ranks: hpZ's groups are machines of 8 GPUs."""
    values = json.loads((ROOT / "ds_configs" / name).read_text())
    zero = values["zero_optimization"]
    if "zero_hpz_partition_size" in zero:
        zero["zero_hpz_partition_size"] = 2
    path = folder / name
    path.write_text(json.dumps(values))
    return path


def empty_caches(folder: Path) -> dict:
    return {**{name: str(folder / name) for name in (
        "TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "HF_HOME")}, "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_all_jsons_train_the_demo_on_a_fresh_machine(tmp_path, ranks, fork):
    """After a build that was killed half-way, which leaves the lock of PyTorch before 2.14 behind, two ranks
    build it at once."""
    environ = empty_caches(tmp_path)
    job = fork(1, ROOT / "configs/demo.yaml", *PARTIAL, environ=environ)
    built = Path(environ["TORCH_EXTENSIONS_DIR"]) / "cpu_adam"
    while not [process for process in psutil.Process(job.sessions[0]).children(recursive=True)
               if process.name() in ("cc1plus", "as")]:
        assert job.running(), job.output.read_text()
        time.sleep(0.05)
    job.send(signal.SIGKILL)
    job.wait()
    assert "takes minutes, once" in job.output.read_text() and not (built / "cpu_adam.so").exists()
    (built / "lock").touch()
    losses = {}
    for name in JSONS[::-1]:  # the one that compiles first
        done = ranks(2, ROOT / "configs/demo.yaml", "--deepspeed_config", few_ranks(name, tmp_path), "--set",
                     "max_steps=2", "eval_interval=0", "save_interval=0", "eval_samples=8", "num_workers=0",
                     "global_batch_size=8", "per_device_batch_size=4", "log_interval=1",
                     f"run_root_dir={tmp_path}/runs", f"run_id={name}", f"index_dir={tmp_path / 'index'}",
                     environ=environ)
        assert done.returncode == 0 and "done steps 2" in done.text, f"{name}: {done.text}"
        assert done.text.count("takes minutes, once") == (name == JSONS[::-1][0]), done.text
        losses[name] = float(re.search(r"step 2 loss ([\d.]+)", done.text)[1])
    assert max(losses.values()) - min(losses.values()) < 0.05, losses


@pytest.mark.slow
def test_two_ranks_compile_the_model_on_a_fresh_machine(tiny, tmp_path, ranks):
    done = ranks(2, tiny(max_steps=1, eval_samples=8, compile=True), *ON_CPU, environ=empty_caches(tmp_path))
    assert done.returncode == 0 and "done steps 1" in done.text, done.text
    assert any(Path(tmp_path / "TORCHINDUCTOR_CACHE_DIR").iterdir())
