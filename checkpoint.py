"""Checkpoints: save on any number of GPUs and any ZeRO stage, resume on any other.

ZeRO cuts every parameter's float32 weight and its two AdamW moments into slices and spreads them over the
ranks; each stage keeps them elsewhere. `find_slice` knows where. A checkpoint is simply those slices, written
by each rank as they are: flat safetensors named "weight/<parameter>@<first element>". Whoever reads it takes
the elements it needs:

    <run>/checkpoints/step-000200-epoch-01-loss=2.3456/
        checkpoint.json            step, shapes, and the other files with sizes and checksums
        rank00000-000.safetensors
        ...

Why not DeepSpeed's own format: it is pickles (code that runs on loading), is tied to stage and world size
until converted, has lost frozen weights (DeepSpeed#5439), and a job killed while saving leaves it
half-written.
"""

import contextlib
import json
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors

from ranks import patient_group
from zero import MOMENTS, describe_parameters, local_tensors, set_optimizer_step, set_tensors

FILE_BYTES = 1 << 30  # a rank gathers this much in host memory, then writes it


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read. The message names it and says what to do."""


# ------------------------------------------------------------------------------------------------------------
# Saving


def save_checkpoint(engine, directory: Path, tag: str, meta: dict, keep: int) -> Path:
    """Write <directory>/<tag>, then delete all but the newest `keep` checkpoints (0: keep all). Call it on
    every rank.

    Raises CheckpointError on every rank when any rank fails (a full disk, say); then nothing new is left
    behind and the older checkpoints are untouched. A killed job leaves at most directories "*.tmp", which
    nobody reads and the next save removes.
    """
    final, scratch = directory / tag, directory / f"{tag}.tmp"
    rank = dist.get_rank()

    def make_room():
        if rank == 0:
            for leftover in directory.glob("*.tmp"):
                shutil.rmtree(leftover)
            scratch.mkdir(parents=True)

    def publish():
        if rank == 0:
            tensors = {name: {"shape": shape, "trainable": trainable}
                       for name, (shape, trainable) in describe_parameters(engine.module).items()}
            merged = {name: facts for part in files for name, facts in part.items()}
            contents = json.dumps({**meta, "tensors": tensors, "files": merged})
            write_durably(scratch / "checkpoint.json", contents.encode())
            scratch.rename(final)
            for old in list_checkpoints(directory)[:-keep] if keep else []:
                shutil.rmtree(old.rename(f"{old}.tmp"))

    try:
        together(make_room)
        files = together(lambda: write_local_files(engine, scratch, rank))
        together(publish)
    except CheckpointError as error:
        if rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)
        raise CheckpointError(f"could not save {final}: {error}; older checkpoints are untouched") from None
    return final


def together(action: Callable[[], object]) -> list:
    """Do something on every rank -> the results of all. When it fails anywhere (OSError, CheckpointError),
    CheckpointError with the first failure on all, so that nobody waits for a rank that gave up."""
    result, error, reports = None, None, [None] * dist.get_world_size()
    try:
        result = action()
    except (OSError, CheckpointError) as problem:
        error = f"rank {dist.get_rank()}: {problem}"
    dist.all_gather_object(reports, (result, error), group=patient_group())
    if errors := [problem for _, problem in reports if problem]:
        raise CheckpointError(errors[0])
    return [result for result, _ in reports]


def write_local_files(engine, scratch: Path, rank: int) -> dict[str, dict]:
    """Write this rank's slices -> {file name: {"bytes": size, "crc32c": checksum}}. Raises CheckpointError
    rather than write a number that is not finite."""
    files, batch, size = {}, {}, 0

    def flush():
        name, data = f"rank{rank:05d}-{len(files):03d}.safetensors", to_safetensors(batch)
        write_durably(scratch / name, data)
        files[name] = {"bytes": len(data), "crc32c": google_crc32c.value(data)}

    for key, tensor in local_tensors(engine):
        if not tensor.isfinite().all():
            raise CheckpointError(f"{key} is not finite")
        batch[key] = tensor.detach().to("cpu", copy=True)
        size += tensor.numel() * tensor.element_size()
        if size >= FILE_BYTES:
            flush()
            batch, size = {}, 0
    flush()
    return files


def write_durably(path: Path, data: bytes) -> None:
    """Write and wait until the disk has it, so that a full disk is noticed before the rename."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


# ------------------------------------------------------------------------------------------------------------
# Reading


def list_checkpoints(directory: Path) -> list[Path]:
    """All checkpoints in a run's checkpoints directory, oldest step first, without those half written."""
    found = [p for p in directory.glob("step-[0-9]*") if p.suffix != ".tmp"]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.split("-")[1])


class CheckpointReader:
    """Random access to the tensors of a checkpoint, a slice at a time."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.meta = json.loads((path / "checkpoint.json").read_text())
            self.slices: dict[str, list[tuple]] = {}  # "weight/name" -> [(first, stop, file, key), ...]
            for file, facts in self.meta["files"].items():
                if (size := (path / file).stat().st_size) != facts["bytes"]:
                    raise CheckpointError(f"{path / file}: {size} bytes, expected {facts['bytes']}")
                with safe_open(path / file, "pt") as tensors:
                    for key in tensors.keys():
                        name, _, first = key.rpartition("@")
                        count = tensors.get_slice(key).get_shape()[0]
                        self.slices.setdefault(name, []).append((int(first), int(first) + count, file, key))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError, CheckpointError) as error:
            raise CheckpointError(f"{path}: not a readable checkpoint: {error}") from error

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Compare the checksums of every parts-th file. Raises CheckpointError naming a damaged one."""
        for file, facts in list(self.meta["files"].items())[part::parts]:
            if google_crc32c.value((self.path / file).read_bytes()) != facts["crc32c"]:
                raise CheckpointError(f"{self.path / file}: checksum mismatch, the file is damaged")

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened tensor "weight/<parameter>", "exp_avg/..." or
        "exp_avg_sq/..."."""
        pieces = []
        for first, end, file, key in sorted(self.slices[name]):
            if first < stop and end > start:
                with safe_open(self.path / file, "pt") as tensors:
                    pieces.append(tensors.get_slice(key)[max(start, first) - first : min(stop, end) - first])
        tensor = torch.cat(pieces) if pieces else torch.empty(0)
        if len(tensor) != stop - start:
            raise CheckpointError(f"{self.path}: {name} has only {len(tensor)} of elements {start}..{stop}")
        return tensor

    def weight(self, name: str) -> torch.Tensor:
        """One parameter, whole, in the dtype it was trained in (float32; frozen ones may be bf16)."""
        shape = self.meta["tensors"][name]["shape"]
        return self.read(f"weight/{name}", 0, int(torch.Size(shape).numel())).view(shape)


def check_same_parameters(reader: CheckpointReader, module: torch.nn.Module) -> None:
    """Raise CheckpointError listing what is missing, extra, of another shape, or frozen in one and trained
    in the other."""
    ours = describe_parameters(module)
    theirs = {name: (facts["shape"], facts["trainable"]) for name, facts in reader.meta["tensors"].items()}
    problems = [f"missing {name}" for name in ours.keys() - theirs.keys()]
    problems += [f"unexpected {name}" for name in theirs.keys() - ours.keys()]
    for name in ours.keys() & theirs.keys():
        (shape, trainable), (saved_shape, saved_trainable) = ours[name], theirs[name]
        if shape != saved_shape:
            problems.append(f"{name}: shape {saved_shape}, this model has {shape}")
        elif trainable != saved_trainable:
            was = "trained" if saved_trainable else "frozen"
            problems.append(f"{name}: was {was}, the config now says otherwise")
    if problems:
        raise CheckpointError(f"{reader.path} does not fit this model: " + "; ".join(sorted(problems)[:20]))


def load_checkpoint(engine, path: Path) -> dict:
    """Restore weights, moments and step count from any stage and number of ranks; returns the checkpoint's
    meta data.

    Every rank reads just the elements it owns. Raises CheckpointError on all ranks when the checkpoint does
    not fit, or is damaged; then the message says how to go on from the newest intact one before it.
    """
    try:
        verify_together(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}. {suggest_older(path)}") from None
    reader = CheckpointReader(path)
    check_same_parameters(reader, engine.module)
    set_tensors(engine, reader.read, ("weight", *MOMENTS))
    set_optimizer_step(engine, reader.meta["step"])
    return reader.meta


def verify_together(path: Path) -> None:
    """Check all files of a checkpoint, divided among the ranks. Raises CheckpointError on all of them."""
    together(lambda: CheckpointReader(path).verify(dist.get_rank(), dist.get_world_size()))


def suggest_older(damaged: Path) -> str:
    """How to continue from the newest intact checkpoint before a damaged one, if there is one."""
    older = list_checkpoints(damaged.parent)
    for path in reversed(older[: older.index(damaged)] if damaged in older else []):
        with contextlib.suppress(CheckpointError):
            verify_together(path)
            aside = damaged.with_name(f"damaged-{damaged.name}")
            return (f"{path} is intact: to continue from there, start again after "
                    f"`mv {shlex.quote(str(damaged))} {shlex.quote(str(aside))}`")
    return "There is no intact checkpoint before it"
