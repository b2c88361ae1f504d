"""Where a dataset's frames are: a small row for each, and images read straight from the dataset's files.

Robot datasets (Open X-Embodiment, LIBERO, ...) come as TFDS directories in the RLDS format: shards of
TFRecords hold an episode per record, and an image lies encoded (JPEG or PNG) inside its episode. So an
episode is big, and a training sample is a small piece of it. rlds.py reads each dataset once and writes a
*frame table*: a row per frame (44 bytes with one camera and a 7-D action) that says where in which file its
images lie, and holds its standardised action. From then on a training sample is one row of the table and one
`pread` of one JPEG, in any order, in constant memory.
"""

import contextlib
import ctypes
import functools
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np

from machinery.config import PROJECT, Recipe, UserError
from machinery.files import take_lock


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
    folders = [d for d in (root.iterdir() if root.is_dir() else ()) if (d / "features.json").exists()]
    found = [d for d in folders if (d.name == version if version else VERSION.fullmatch(d.name))]
    if not found:
        others = f"; there are {', '.join(sorted(d.name for d in folders))}" if folders else ""
        raise DataError(f"{root}: no TFDS dataset there: expected {root}/{version or '1.0.0 (say)'}/"
                        f"features.json{others}: set data_root_dir to the folder that holds the folder "
                        f"{name!r}")
    return max(found, key=lambda d: [int(part) for part in d.name.split(".") if part.isdigit()])


VERSION = re.compile(r"\d+\.\d+\.\d+")  # copies (1.0.0.bak) and what TFDS is still writing are none


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
        self.bad, self.warnings = meta["bad_episodes"], meta["warnings"]  # see checks.table_warnings
        self.targets = np.array(meta["targets"])  # which of an action's dimensions are targets, (A,) bool
        self.features = meta["features"]  # {feature: numbers in a step} of those that the recipe names
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


def frame_table(directory: Path, recipe: Recipe, cameras: list[str | None], load_proprio: bool, *,
                index_dir: str | None = None, skip_bad_episodes: bool = False) -> FrameTable:
    """Open the frame table of the TFDS dataset in `directory`, and let rlds.py make it where there is none.

    cameras: keys of the images, see Recipe.camera_keys; index_dir: where tables are kept, by default in the
    dataset's directory, or ~/.cache/zerovla if that is read-only and has none.

    The table's name is a hash of all that goes into it, of the code that makes it, and of the names, sizes
    and modification times of the data files, so a stale table is never used. It appears by one rename. Safe
    when many processes call it at once: one builds, the others wait for its lock (not inside a collective, so
    nothing times out however long it takes).
    """
    directory = directory.resolve()
    listing, roots = data_files(directory), index_roots(directory, index_dir)
    job = {"recipe": asdict(recipe), "cameras": cameras, "load_proprio": load_proprio,
           "skip_bad": skip_bad_episodes, "known_bad": known_bad_episodes(roots, listing)}
    code = "".join((PROJECT / "machinery" / file).read_text().partition("# ---- Writing")[0] for file in CODE)
    name = hashlib.sha256(repr((job, code, listing)).encode()).hexdigest()[:16]
    path = next((root / name for root in roots if (root / name).exists()), None)
    if path is None:
        path = writable_root(directory, roots) / name
        with (lock := take_lock(path.with_suffix(".lock"))) or contextlib.nullcontext():
            if not path.exists():
                for leftover in path.parent.glob(f"{name}.*.tmp") if lock else ():  # of one that was killed
                    shutil.rmtree(leftover)
                index(job | {"directory": str(directory), "path": str(path)})
    return FrameTable(path, directory)


CODE = ("rlds.py", "fields.py", "recipes.py", "checks.py")  # what makes a frame table


def data_files(directory: Path) -> list[tuple[str, int, int]]:
    """A dataset's files: (name, size, time of the last change)."""
    return sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in directory.iterdir()
                  if "record" in p.name or p.name in ("features.json", "dataset_info.json"))


def index_roots(directory: Path, index_dir: str | None) -> list[Path]:
    """The folders in which a dataset's frame tables may be, the first that is writable for new ones."""
    if index_dir:
        return [Path(index_dir) / directory.parent.name]
    name = hashlib.sha256(str(directory).encode()).hexdigest()[:16]
    return [directory / ".frame_table", Path(os.path.expanduser("~/.cache/zerovla")) / name]


def writable_root(directory: Path, roots: list[Path]) -> Path:
    """The first of the folders that can be written to, made. Raises DataError when none can."""
    for root in roots:
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(root, os.W_OK):
            return root
    raise DataError(f"{directory}: no frame table can be written to {' or '.join(map(str, roots))}: set "
                    "index_dir to a folder that is writable")


def known_bad_episodes(roots: list[Path], listing: list[tuple]) -> dict[str, dict[str, str]]:
    """What `data.py --check` found of just these files, {file: {record: reason}}."""
    found = (bad_episodes_file(root, listing) for root in roots)
    return next((json.loads(file.read_text()) for file in found if file.exists()), {})


def bad_episodes_file(root: Path, listing: list[tuple]) -> Path:
    """Where `data.py --check` keeps what it finds; an index_dir may hold several versions of a dataset."""
    return root / f"bad_episodes-{hashlib.sha256(repr(listing).encode()).hexdigest()[:16]}.json"


def index(job: dict) -> None:
    """Run rlds.py, a process without PyTorch, so that many can be forked cheaply. Raises its DataError."""
    path = os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    done = subprocess.run([sys.executable, "-P", "-m", "machinery.rlds"], input=json.dumps(job), text=True,
                          stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path})
    if done.returncode:
        raise DataError(done.stdout.strip() or "rlds.py was ended: see above; was there enough memory?")


STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # see ranks.Preemption


def end_with_parent() -> None:
    """Call it in a child process: it will be killed with its parent, and not wait for work for ever."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def follow_rank(worker: int) -> None:
    """For DataLoader workers: ignore signals to the job, and end at once with the rank.

    A worker that outlived its rank would keep the rank's connections open.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()
