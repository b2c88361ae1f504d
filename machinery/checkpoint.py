"""Tensors in files: one reader for every source, and checkpoints for any number of GPUs.

ZeRO cuts every parameter's float32 weight and its two AdamW moments into slices and spreads them
over the ranks. A checkpoint is simply those slices, written by each rank unchanged: flat
safetensors named "weight/<parameter>@<first element>". A reader takes the elements it needs:

    <run>/checkpoints/step-000200-epoch-01-loss=2.3456/
        checkpoint.json            step, shapes, and the other files with sizes and checksums
        rank00000-000.safetensors
        ...

Why not DeepSpeed's own format: it is pickles (loading them runs code), is tied to stage and world
size until converted, has lost frozen weights (DeepSpeed#5439), and a job killed while saving leaves
a partial checkpoint.

Read Tensors, then save_checkpoint. zero.py knows where a sharded model keeps each slice.
"""

import functools
import json
import math
import os
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors

from machinery.config import UserError
from machinery.connect import gather, progress
from machinery.files import remove
from machinery.zero import (
    MOMENTS,
    describe_parameters,
    local_tensors,
    set_optimizer_step,
    set_tensors,
)

FILE_BYTES = 1 << 30  # a rank gathers this much in host memory, then writes it
NAME = re.compile(r"step-\d+-epoch-\d+-loss=\d+\.\d+")  # made by Run.save


class CheckpointError(UserError):
    """A checkpoint that cannot be written or read. The message names it and the cure."""


# ---- Reading -----------------------------------------------------------------------------------


class Tensors:
    """The tensors of a model on disk, whatever its format.

    `shapes`, {parameter: shape}, is known without reading them. `read` reads a part of one.
    """

    def __init__(self, where: str | Path):
        self.where = where
        self.shapes: dict[str, list[int]] = {}
        self.trained: dict[str, bool] = {}  # was a parameter trained? Known to our own format only
        self.base: dict | None = None  # a checkpoint of adapters: the weights it is based on
        # (kind, parameter) -> its pieces: (first element, the one after the last, their reader)
        self.pieces: dict[tuple[str, str], list[tuple[int, int, Callable]]] = {}

    def add(self, name: str, shape: list[int], read: Callable[[int, int], torch.Tensor]) -> None:
        """A parameter in one piece; read(start, stop) gives elements [start, stop), flattened."""
        self.shapes[name] = list(shape)
        self.pieces["weight", name] = [(0, math.prod(shape), read)]

    def read(self, name: str, start: int, stop: int, kind: str = "weight") -> torch.Tensor | None:
        """Elements [start, stop) of a flattened parameter, in the dtype on disk.

        kind: "weight", or one of its moments, "exp_avg" and "exp_avg_sq". Returns None if there is
        no such tensor. Raises CheckpointError if some elements are missing.
        """
        if (kind, name) not in self.pieces:
            return None
        pieces = [read(max(start, first) - first, min(stop, end) - first)
                  for first, end, read in self.pieces[kind, name] if first < stop and end > start]
        if len(pieces) == 1:
            tensor = pieces[0]  # not copied: the file is mapped into memory
        else:
            tensor = torch.cat(pieces) if pieces else torch.empty(0)
        if len(tensor) != stop - start:
            raise CheckpointError(f"{self.where}: {kind} {name}: only {len(tensor)} of elements "
                                  f"{start}..{stop} are there")
        return tensor

    def whole(self, name: str) -> torch.Tensor:
        """A parameter in its shape."""
        shape = self.shapes[name]
        return self.read(name, 0, math.prod(shape)).view(shape)

    def check(self, module: torch.nn.Module, resume: bool = False) -> list[str]:
        """Raise CheckpointError if parameters are missing, unexpected or of another shape.

        Returns modules of which nothing is there, such as the projector beside a plain language
        model: they keep their values. To resume, nothing may be missing, and the same parameters
        must be trained.
        """
        ours = describe_parameters(module)
        if self.base:
            ours = {name: facts for name, facts in ours.items() if facts[1]}  # the trained ones
        present = {name.split(".")[0] for name in self.shapes}
        problems = []
        for name, (shape, trained) in ours.items():
            if name not in self.shapes:
                if resume or name.split(".")[0] in present:
                    problems.append(f"missing {name}")
            elif self.shapes[name] != shape:
                problems.append(f"{name}: shape {self.shapes[name]}, this model has {shape}")
            elif resume and self.trained.get(name, trained) != trained:
                problems.append(f"{name}: was {'frozen' if trained else 'trained'}, now it is not")
        # tied parameters, such as a head that is the embedding table, have two names
        names = {name for name, _ in module.named_parameters(remove_duplicate=False)}
        problems += [f"unexpected {name}" for name in self.shapes.keys() - names]
        if problems:
            shown = "; ".join(sorted(problems)[:20])
            raise CheckpointError(f"{self.where} does not fit this model ({len(problems)} "
                                  f"problems): {shown}")
        return sorted({name.split(".")[0] for name in ours} - present)


class SafetensorsFile:
    """A safetensors file, mapped into memory."""

    def __init__(self, path: Path):
        try:
            self.file = safe_open(path, "pt")
        except SafetensorError as error:
            raise CheckpointError(f"{path}: damaged, or a Git LFS pointer that was not pulled: "
                                  f"{error}") from error
        slices = {key: self.file.get_slice(key) for key in self.file.keys()}
        self.shapes = {key: part.get_shape() for key, part in slices.items()}
        self.dtypes = {key: part.get_dtype() for key, part in slices.items()}

    def read(self, key: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of a flattened tensor."""
        row = math.prod(self.shapes[key][1:])
        first = start // row
        rows = self.file.get_slice(key)[first : -(-stop // row)]
        return rows.reshape(-1)[start - first * row : stop - first * row]


def plain_name(name: str) -> str:
    """The name of a file that another file lists. Raises CheckpointError for a path: the list may
    have come from elsewhere."""
    if "/" in name or name in ("", ".", ".."):
        raise CheckpointError(f"{name!r} is not a file's name")
    return name


class Checkpoint(Tensors):
    """A checkpoint of this project: weights, moments, and `meta`, the content of checkpoint.json.

    run_dir: the folder of its run. `path` may also be a link to a checkpoint, or the checkpoint may
    have been moved to another disk and left a link in its run.
    """

    def __init__(self, path: Path):
        super().__init__(path)
        self.path = Path(path)
        self.run_dir = Path(os.path.abspath(path)).parent.parent
        if not (self.run_dir / "config.json").exists():
            self.run_dir = self.path.resolve().parent.parent
        try:
            self.meta = json.loads((self.path / "checkpoint.json").read_text())
            self.meta["step"] = int(self.meta["step"])
            self.base = self.meta.get("base")
            for name, facts in self.meta["tensors"].items():
                self.shapes[name] = facts["shape"]
                self.trained[name] = facts["trainable"]
            for name in self.meta["files"]:
                file = SafetensorsFile(self.path / plain_name(name))
                for key, (count,) in file.shapes.items():
                    kind_and_parameter, _, first = key.rpartition("@")
                    piece = (int(first), int(first) + count, functools.partial(file.read, key))
                    self.pieces.setdefault(tuple(kind_and_parameter.split("/")), []).append(piece)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            # a CheckpointError is a ValueError, too
            raise CheckpointError(f"{path}: not a readable checkpoint: {error}") from error
        for pieces in self.pieces.values():
            pieces.sort(key=lambda piece: piece[0])

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Compare the checksums of every parts-th file. Raises CheckpointError."""
        for file, facts in list(self.meta["files"].items())[part::parts]:
            if google_crc32c.value((self.path / file).read_bytes()) != facts["crc32c"]:
                raise CheckpointError(f"{self.path / file}: checksum mismatch, the file is damaged")


def list_checkpoints(directory: Path) -> list[Path]:
    """All checkpoints in a run's checkpoints directory, oldest step first.

    Their names match NAME exactly. Partial (.tmp), renamed (.bak) and packed (.tar.gz) ones do not.
    """
    found = [path for path in Path(directory).glob("step-*") if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def load_checkpoint(engine, checkpoint: Checkpoint) -> None:
    """Restore weights, moments and step count, written at any stage and number of ranks.

    Every rank reads only the elements it owns. Raises CheckpointError on all ranks if the
    checkpoint does not fit.
    """
    checkpoint.check(engine.module, resume=True)
    set_tensors(engine, checkpoint.read, ("weight", *MOMENTS))
    set_optimizer_step(engine, checkpoint.meta["step"])


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint to resume, on all ranks, with its checksums verified.

    Raises CheckpointError on all ranks if it is damaged. The message lists the run's others.
    """
    def open_verified() -> Checkpoint:
        checkpoint = Checkpoint(path)
        checkpoint.verify(dist.get_rank(), dist.get_world_size())  # each rank takes some files
        return checkpoint

    try:
        return on_all_ranks(open_verified)
    except CheckpointError as error:
        others = [other.name for other in list_checkpoints(path.parent) if other != path]
        raise CheckpointError(f"{error}. To resume from the newest of the run's others ("
                              f"{', '.join(others) or 'none'}): `mv {path} {path}.damaged`"
                              ) from None


# ---- Saving ------------------------------------------------------------------------------------


def save_checkpoint(engine, directory: Path, tag: str, meta: dict, keep: int) -> Path:
    """On every rank: write <directory>/<tag>, then delete all but the newest `keep` (0 keeps all).

    If any rank fails, because of a full disk for example, raises CheckpointError on all of them.
    Then nothing new is left behind, and the older checkpoints are untouched. A killed job leaves at
    most directories "*.tmp", which are never read and which the next save removes.
    """
    final = directory / tag
    scratch = directory / f"{tag}.tmp"  # one for all ranks, so files.atomic is not for this
    rank = dist.get_rank()
    progress.at(f"save {tag}")

    def make_room():
        if rank == 0:
            for leftover in directory.glob("*.tmp"):
                remove(leftover)
            scratch.mkdir(parents=True)

    def write():
        return write_local_files(engine, scratch, rank, frozen=not meta.get("base"))

    def publish():
        if rank == 0:
            tensors = {name: {"shape": shape, "trainable": trainable}
                       for name, (shape, trainable) in describe_parameters(engine.module).items()
                       if trainable or not meta.get("base")}
            merged = {name: facts for part in files for name, facts in part.items()}
            contents = json.dumps({**meta, "tensors": tensors, "files": merged})
            write_durably(scratch / "checkpoint.json", contents.encode())
            scratch.rename(final)
            for old in list_checkpoints(directory)[:-keep] if keep else []:
                remove(old.rename(f"{old}.tmp"))

    try:
        on_all_ranks(make_room)
        mine = on_all_ranks(write)
        files = gather(mine)
        on_all_ranks(publish)
    except CheckpointError as error:
        if rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)
        raise CheckpointError(f"could not save {final}: {error}; older checkpoints are untouched"
                              ) from None
    return final


def on_all_ranks(action: Callable[[], object]):
    """Call `action` on every rank and return its result.

    If it fails on any rank (OSError, UserError), raises CheckpointError with the first
    failure on all of them, so that none waits for a rank that gave up.
    """
    result = None
    error = None
    try:
        result = action()
    except (OSError, UserError) as problem:
        error = f"rank {dist.get_rank()}: {problem} (on {socket.gethostname()})"
    errors = [*filter(None, gather(error))]
    if errors:
        raise CheckpointError(errors[0])
    return result


def write_local_files(engine, scratch: Path, rank: int, frozen: bool) -> dict[str, dict]:
    """Write this rank's slices. Returns {file name: {"bytes": size, "crc32c": checksum}}.

    Raises CheckpointError if a number is not finite: the checkpoint could not be trained further.
    """
    files = {}
    batch = {}
    size = 0

    def flush():
        name = f"rank{rank:05d}-{len(files):03d}.safetensors"
        data = to_safetensors(batch)
        write_durably(scratch / name, data)
        files[name] = {"bytes": len(data), "crc32c": google_crc32c.value(data)}

    for key, tensor in local_tensors(engine, frozen):
        if not tensor.isfinite().all():
            raise CheckpointError(f"{key} is not finite")
        batch[key] = tensor.detach().to("cpu", copy=True)
        size += tensor.numel() * tensor.element_size()
        if size >= FILE_BYTES:
            flush()
            batch.clear()
            size = 0
    flush()
    return files


def write_durably(path: Path, data: bytes) -> None:
    """Write, and wait until the data are on the disk: a full disk then fails before the rename."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
