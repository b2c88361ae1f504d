"""What a machine compiles when it first trains: DeepSpeed's AdamW, and torch.compile's code."""

import contextlib
import os
import shutil
import sysconfig
import tempfile
from pathlib import Path

from deepspeed.accelerator import get_accelerator
from deepspeed.git_version_info import installed_ops

from machinery.config import UserError, one_line
from machinery.files import take_lock


def check_compiler(key: str, cure: str) -> None:
    """Raise UserError unless C++ for Python can be compiled here. It would be noticed only after
    the data are indexed and the weights loaded, in a long traceback."""
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not (shutil.which(os.environ.get("CXX", "c++")) and header.exists()):
        raise UserError(f"{key} needs a C++ compiler (g++) and Python's headers ({header}): apt "
                        f"install g++ python3-dev, or {cure}")


def check_compile() -> None:
    """Raise UserError unless torch.compile can compile, and keep what it made."""
    check_compiler("compile", "set compile: false")
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or tempfile.gettempdir()
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"compile: its cache cannot be written: set TORCHINDUCTOR_CACHE_DIR to "
                        f"another folder: {error}") from error


def build_adam(ds_config: dict) -> None:
    """Compile DeepSpeed's AdamW, unless it is there, or the JSON uses PyTorch's. Other processes
    wait meanwhile. Raises UserError."""
    if ds_config["optimizer"].get("params", {}).get("torch_adam"):
        return
    from torch.utils import cpp_extension  # here: importing it takes a moment

    offload = ds_config.get("zero_optimization", {}).get("offload_optimizer") or {}
    on_gpu = offload.get("device", "none") == "none"
    kind = "FusedAdamBuilder" if on_gpu else "CPUAdamBuilder"
    builder = get_accelerator().create_op_builder(kind)
    if installed_ops.get(builder.name):
        return
    key = f"--deepspeed_config: optimizer: DeepSpeed's AdamW ({builder.name})"
    cure = 'set "torch_adam": true (without a ratio in offload_optimizer)'
    check_compiler(key, cure)
    os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")  # ninja, if not activated
    try:
        folder = Path(cpp_extension._get_build_directory(builder.name, False))
        with take_lock(folder / "build.lock") or contextlib.nullcontext():
            if hasattr(cpp_extension, "FileBaton"):  # PyTorch before 2.14: a process that is
                (folder / "lock").unlink(missing_ok=True)  # killed while building leaves its lock
            if not (folder / f"{builder.name}.so").exists():
                print(f"compiling {builder.name} in {folder}: takes minutes, once", flush=True)
            builder.load(verbose=False)
    except OSError as error:
        raise UserError(f"{key} is compiled in a folder that cannot be written: set "
                        f"TORCH_EXTENSIONS_DIR to another: {error}") from error
    except Exception as error:  # DeepSpeed, PyTorch and ninja raise many kinds, with long logs
        lines = [line for line in str(error).splitlines() if "error" in line.lower()]
        raise UserError(f"{key} could not be compiled: {one_line(error)[:100]}: "
                        f"{' '.join(lines[1:2])[:200]}: {cure}") from error
