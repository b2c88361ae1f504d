"""Tensors in files: one reader for every source, and checkpoints that any number of GPUs writes and reads.

ZeRO cuts every parameter's float32 weight and its two AdamW moments into slices and spreads them over the
ranks. A checkpoint is simply those slices, written by each rank as they are: flat safetensors named
"weight/<parameter>@<first element>". Whoever reads it takes the elements it needs:

    <run>/checkpoints/step-000200-epoch-01-loss=2.3456/
        checkpoint.json            step, shapes, and the other files with sizes and checksums
        rank00000-000.safetensors
        ...

Why not DeepSpeed's own format: it is pickles (code that runs on loading), is tied to stage and world size
until converted, has lost frozen weights (DeepSpeed#5439), and a job killed while saving leaves a half.

Read Tensors, then save_checkpoint. Which slice lives where in a sharded model is zero.py's business.
"""

import contextlib
import functools
import json
import math
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors

from machinery.config import UserError
from machinery.ranks import patient_group
from machinery.zero import (
    MOMENTS,
    describe_parameters,
    local_tensors,
    set_optimizer_step,
    set_tensors,
)

FILE_BYTES = 1 << 30  # a rank gathers this much in host memory, then writes it
NAME = re.compile(r"step-\d+-epoch-\d+-loss=\d+\.\d+")  # as Run.save makes it


class CheckpointError(UserError):
    """A checkpoint that cannot be written or read. The message names it and says what to do."""


# ---- Reading -----------------------------------------------------------------------------------------------


class Tensors:
    """The tensors of a model on disk, whatever its format: `shapes`, {parameter: shape}, is known without
    reading any, and `read` reads a part of one."""

    def __init__(self, where: str | Path):
        self.where, self.shapes = where, {}
        self.trained: dict[str, bool] = {}  # was a parameter trained? Where nobody knows, it is not there
        self.base: dict | None = None  # what else the model needs, where only what was trained is here
        # (kind, parameter) -> its pieces: (first element, the one after the last, what reads elements of it)
        self.pieces: dict[tuple[str, str], list[tuple[int, int, Callable[[int, int], torch.Tensor]]]] = {}

    def add(self, name: str, shape: list[int], read: Callable[[int, int], torch.Tensor]) -> None:
        """A parameter in one piece; read(start, stop) gives elements [start, stop) of it, flattened."""
        self.shapes[name] = list(shape)
        self.pieces["weight", name] = [(0, math.prod(shape), read)]

    def read(self, name: str, start: int, stop: int, kind: str = "weight") -> torch.Tensor | None:
        """Elements [start, stop) of a flattened parameter or, by its `kind`, of its "exp_avg" or "exp_avg_sq"
        in the dtype on disk; None where there are none. Raises CheckpointError if some are missing."""
        if (kind, name) not in self.pieces:
            return None
        pieces = [read(max(start, first) - first, min(stop, end) - first)
                  for first, end, read in self.pieces[kind, name] if first < stop and end > start]
        tensor = pieces[0] if len(pieces) == 1 else torch.cat(pieces) if pieces else torch.empty(0)
        if len(tensor) != stop - start:
            raise CheckpointError(f"{self.where}: {kind} {name} has only {len(tensor)} of elements "
                                  f"{start}..{stop}")
        return tensor

    def whole(self, name: str) -> torch.Tensor:
        """A parameter in its shape."""
        return self.read(name, 0, math.prod(self.shapes[name])).view(self.shapes[name])

    def check(self, module: torch.nn.Module, resume: bool = False) -> list[str]:
        """Raise CheckpointError listing parameters that are missing, extra or of another shape. Modules of
        which nothing is there, such as the projector beside a plain language model, are returned: they stay
        as they are. To resume, nothing may be missing, and what was trained must be trained now."""
        problems, present = [], {name.split(".")[0] for name in self.shapes}
        ours = describe_parameters(module)
        ours = {name: facts for name, facts in ours.items() if facts[1] or not self.base}
        for name, (shape, trained) in ours.items():
            if name not in self.shapes and (resume or name.split(".")[0] in present):
                problems.append(f"missing {name}")
            elif name in self.shapes and self.shapes[name] != shape:
                problems.append(f"{name}: shape {self.shapes[name]}, this model has {shape}")
            elif resume and self.trained.get(name, trained) != trained:
                problems.append(f"{name}: was {'frozen' if trained else 'trained'}, now it is not")
        tied = {name for name, _ in module.named_parameters(remove_duplicate=False)}  # a head that is a table
        problems += [f"unexpected {name}" for name in self.shapes.keys() - tied]
        if problems:
            shown = "; ".join(sorted(problems)[:20])
            raise CheckpointError(f"{self.where} does not fit this model ({len(problems)} problems): {shown}")
        return sorted({name.split(".")[0] for name in ours} - present)


class SafetensorsFile:
    """A safetensors file, mapped into memory."""

    def __init__(self, path: Path):
        try:
            self.file = safe_open(path, "pt")
        except SafetensorError as error:
            raise CheckpointError(f"{path}: no safetensors file ({error}): damaged, or a Git LFS pointer "
                                  "that was not pulled") from error
        self.shapes = {key: self.file.get_slice(key).get_shape() for key in self.file.keys()}

    def read(self, key: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of a flattened tensor."""
        row = math.prod(self.shapes[key][1:])
        first = start // row
        rows = self.file.get_slice(key)[first : -(-stop // row)]
        return rows.reshape(-1)[start - first * row : stop - first * row]


class Checkpoint(Tensors):
    """A checkpoint of this project: weights, moments, and `meta`, the content of checkpoint.json. run_dir:
    the run's folder, around this place or around where a link leads."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.path, here = Path(path), Path(os.path.abspath(path)).parent.parent
        self.run_dir = here if (here / "config.json").exists() else self.path.resolve().parent.parent
        try:
            self.meta = json.loads((self.path / "checkpoint.json").read_text())
            self.base, self.meta["step"] = self.meta.get("base"), int(self.meta["step"])
            for name, facts in self.meta["tensors"].items():
                self.shapes[name], self.trained[name] = facts["shape"], facts["trainable"]
            for name, facts in self.meta["files"].items():
                if (size := (self.path / name).stat().st_size) != facts["bytes"]:
                    raise CheckpointError(f"{self.path / name}: {size} bytes, expected {facts['bytes']}")
                file = SafetensorsFile(self.path / name)
                for key, (count,) in file.shapes.items():
                    place, _, first = key.rpartition("@")
                    piece = int(first), int(first) + count, functools.partial(file.read, key)
                    self.pieces.setdefault(tuple(place.split("/")), []).append(piece)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:  # ours is a ValueError
            raise CheckpointError(f"{path}: not a readable checkpoint: {error}") from error
        for pieces in self.pieces.values():
            pieces.sort(key=lambda piece: piece[0])

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Compare the checksums of every parts-th file. Raises CheckpointError naming a damaged one."""
        for file, facts in list(self.meta["files"].items())[part::parts]:
            if google_crc32c.value((self.path / file).read_bytes()) != facts["crc32c"]:
                raise CheckpointError(f"{self.path / file}: checksum mismatch, the file is damaged")


def list_checkpoints(directory: Path) -> list[Path]:
    """All checkpoints in a run's checkpoints directory, oldest step first: what has exactly a checkpoint's
    name. What is half written has not, nor has what somebody put aside (step-...bak) or packed (.tar.gz)."""
    found = [p for p in Path(directory).glob("step-*") if NAME.fullmatch(p.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def load_checkpoint(engine, checkpoint: Checkpoint) -> None:
    """Restore weights, moments and step count, written at any stage and number of ranks.

    Every rank reads just the elements it owns. Raises CheckpointError on all ranks if it does not fit.
    """
    checkpoint.check(engine.module, resume=True)
    set_tensors(engine, checkpoint.read, ("weight", *MOMENTS))
    set_optimizer_step(engine, checkpoint.meta["step"])


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint to continue from, its checksums verified, on all ranks. Raises CheckpointError on all
    of them when it is damaged; then the message says how to go on from the newest intact one before it."""
    def verified(path: Path) -> Checkpoint:  # the files are divided among the ranks
        checkpoint = Checkpoint(path)
        checkpoint.verify(dist.get_rank(), dist.get_world_size())
        return checkpoint

    try:
        return on_all_ranks(lambda: verified(path))
    except CheckpointError as error:
        cure, older = "There is no intact checkpoint before it", list_checkpoints(path.parent)
        for before in reversed(older[: older.index(path)] if path in older else []):
            with contextlib.suppress(CheckpointError):
                on_all_ranks(functools.partial(verified, before))
                aside = path.with_name(f"damaged-{path.name}")
                cure = (f"{before} is intact: to continue from there, start again after `mv "
                        f"{shlex.quote(str(path))} {shlex.quote(str(aside))}`")
                break
        raise CheckpointError(f"{error}. {cure}") from None


# ---- Saving ------------------------------------------------------------------------------------------------


def remove(folder: Path) -> None:
    """A folder, or the link to one that was put elsewhere."""
    folder.unlink() if folder.is_symlink() else shutil.rmtree(folder)


def save_checkpoint(engine, directory: Path, tag: str, meta: dict, keep: int) -> Path:
    """On every rank: write <directory>/<tag>, then delete all but the newest `keep`, which 0 keeps all of.

    Raises CheckpointError on every rank when any rank fails (a full disk, say); then nothing new is left
    behind and the older checkpoints are untouched. A killed job leaves at most directories "*.tmp", which
    nobody reads and the next save removes.
    """
    final, scratch = directory / tag, directory / f"{tag}.tmp"
    rank, files = dist.get_rank(), [None] * dist.get_world_size()

    def make_room():
        if rank == 0:
            for leftover in directory.glob("*.tmp"):
                remove(leftover)
            scratch.mkdir(parents=True)

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
        mine = on_all_ranks(lambda: write_local_files(engine, scratch, rank, frozen=not meta.get("base")))
        dist.all_gather_object(files, mine, group=patient_group())
        on_all_ranks(publish)
    except CheckpointError as error:
        if rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)
        raise CheckpointError(f"could not save {final}: {error}; older checkpoints are untouched") from None
    return final


def on_all_ranks(action: Callable[[], object]):
    """Do something on every rank -> its result. When it fails anywhere (OSError, CheckpointError),
    CheckpointError with the first failure on all, so that nobody waits for a rank that gave up."""
    result, error, errors = None, None, [None] * dist.get_world_size()
    try:
        result = action()
    except (OSError, CheckpointError) as problem:
        error = f"rank {dist.get_rank()}: {problem}"
    dist.all_gather_object(errors, error, group=patient_group())
    if any(errors):
        raise CheckpointError(next(filter(None, errors)))
    return result


def write_local_files(engine, scratch: Path, rank: int, frozen: bool) -> dict[str, dict]:
    """Write this rank's slices -> {file name: {"bytes": size, "crc32c": checksum}}. Raises CheckpointError
    rather than write a number that is not finite."""
    files, batch, size = {}, {}, 0

    def flush():
        name, data = f"rank{rank:05d}-{len(files):03d}.safetensors", to_safetensors(batch)
        write_durably(scratch / name, data)
        files[name] = {"bytes": len(data), "crc32c": google_crc32c.value(data)}

    for key, tensor in local_tensors(engine, frozen):
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
