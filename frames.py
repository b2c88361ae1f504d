"""Where a dataset's frames are: one small row for each, and the images read straight from the dataset's
files.

Robot datasets (Open X-Embodiment, LIBERO, ...) come as TFDS directories in the RLDS format: shards of
TFRecords hold an episode per record, and an image lies encoded (JPEG or PNG) inside its episode. So an
episode is big, and a training sample is a small piece of it. rlds.py reads each dataset once and writes a
*frame table*: a row per frame (44 bytes with one camera and a 7-D action) that says where in which file its
images lie, and holds its standardised action. From then on a training sample is one row of the table and one
`pread` of one JPEG, in any order, in constant memory.
"""

import ctypes
import fcntl
import functools
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np

from config import PROJECT, Recipe, UserError


class DataError(UserError):
    """Broken or unsuitable data. The message names the file, and the record where there is one."""


def find_dataset(data_root_dir: str | Path, name: str) -> Path:
    """The directory with the newest version of dataset `name` ("name" or "name:version"), or data_root_dir
    itself if it is one. Raises DataError when there is none."""
    root = Path(data_root_dir)
    if (root / "features.json").exists():
        return root
    name, _, version = name.partition(":")
    root /= name
    found = [d for d in root.glob(version or "*") if (d / "features.json").exists()]
    if not found:
        expected = f"{root}/{version or '<version>'}/features.json"
        raise DataError(f"{root}: no TFDS dataset there: expected {expected}: set "
                        f"data_root_dir to the folder that holds the folder {name!r}")
    return max(found, key=lambda d: [int(part) if part.isdigit() else -1 for part in d.name.split(".")])


class FrameTable:
    """A dataset's index, memory-mapped: opening it costs nothing, and all processes share one copy.

    frames: per frame  `offset`, `length` (one each per camera; length 0 = no image), `instruction` (number),
            `action` (float32, standardised but not normalised) and, if asked for, `proprio`
    episodes: per episode  `split`, `shard`, `record` (numbers), `first`, `count` (its frames), `labeled`
    """

    def __init__(self, path: Path, directory: Path):
        """path: the table; directory: the dataset, which may have moved since it was indexed."""
        meta = json.loads((path / "table.json").read_text())
        self.path, self.directory = path, directory
        self.splits, self.shards, self.cameras = meta["splits"], meta["shards"], meta["cameras"]
        self.instructions, self.statistics = meta["instructions"], meta["statistics"]
        self.bad = meta["bad_episodes"]
        frame = np.dtype([(name, kind, tuple(shape)) for name, kind, shape in meta["frame"]])
        self.frames = np.memmap(path / "frames.bin", frame, "r")
        self.episodes = np.load(path / "episodes.npy")
        self.first_frames = np.ascontiguousarray(self.episodes["first"], np.int64)

    def episode_of(self, rows: np.ndarray) -> np.ndarray:
        """Frame numbers (any shape) -> episode numbers."""
        return np.searchsorted(self.first_frames, rows, side="right") - 1

    def read_image(self, row: int, camera: int) -> bytes:
        """The encoded image of one frame, read straight from its shard; b"" where the camera has none."""
        frame = self.frames[row]
        length = int(frame["length"][camera])
        if length == 0:
            return b""
        shard = self.directory / self.shards[self.episodes["shard"][self.episode_of(row)]]
        data = os.pread(_open_shard(shard).fileno(), length, int(frame["offset"][camera]))
        if len(data) < length:
            raise DataError("the file is shorter than it was when it was indexed")
        return data

    def where(self, row: int) -> str:
        """File and record of a frame, for error messages."""
        episode = self.episodes[self.episode_of(row)]
        return f"{self.directory / self.shards[episode['shard']]}: record {episode['record']}"


@functools.lru_cache(maxsize=256)  # an evicted file is closed by garbage collection
def _open_shard(path: Path) -> io.FileIO:
    return open(path, "rb", buffering=0)


def frame_table(directory: Path, recipe: Recipe, cameras: list[str | None], load_proprio: bool, code: str, *,
                index_dir: str | None = None, skip_bad_episodes: bool = False) -> FrameTable:
    """Open the frame table of the TFDS dataset in `directory`, and let rlds.py make it where there is none.

    cameras: keys of the images, see Recipe.camera_keys; code: text that changes whenever a recipe is carried
    out otherwise; index_dir: where tables are kept, by default in the dataset's directory, or
    ~/.cache/zerovla if that is read-only and has none.

    The table's name is a hash of all that goes into it, and of the names, sizes and modification times of the
    data files, so a stale table is never used. It appears by one rename. Safe when many processes call it at
    once: one builds, the others wait for its lock (not inside a collective, so nothing times out however long
    it takes). The lock is one that forked processes do not inherit.
    """
    directory = directory.resolve()
    listing = sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in directory.iterdir()
                     if ".tfrecord" in p.name or p.name in ("features.json", "dataset_info.json"))
    job = {"recipe": asdict(recipe), "cameras": cameras, "load_proprio": load_proprio,
           "skip_bad": skip_bad_episodes}
    key = repr((job, code, (PROJECT / "rlds.py").read_text().partition("# ---- Writing")[0], listing))
    root = Path(index_dir) / directory.parent.name if index_dir else directory / ".frame_table"
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    writable = os.access(root if root.exists() else root.parent, os.W_OK)
    if not index_dir and not (root / name).exists() and not writable:
        root = Path.home() / ".cache/zerovla" / hashlib.sha256(str(directory).encode()).hexdigest()[:16]
    path = root / name
    if not path.exists():
        root.mkdir(parents=True, exist_ok=True)
        with open(root / f"{name}.lock", "w") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)
            if not path.exists():
                for leftover in root.glob(f"{name}.*.tmp"):  # of a process that was killed
                    shutil.rmtree(leftover)
                index(job | {"directory": str(directory), "path": str(path)})
    return FrameTable(path, directory)


def index(job: dict) -> None:
    """Run rlds.py: a process without PyTorch, from which many can be forked cheaply. Raises DataError with
    its message."""
    done = subprocess.run([sys.executable, str(PROJECT / "rlds.py")], input=json.dumps(job), text=True,
                          stdout=subprocess.PIPE)
    if done.returncode:
        raise DataError(done.stdout.strip() or "rlds.py was ended: see above; was there enough memory?")


def end_with_parent() -> None:
    """Call it in a child process: it will be killed with its parent, and not wait for work for ever."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
