"""The frame table of a dataset: a small row per frame, and images read straight from its files.

Robot datasets (Open X-Embodiment, LIBERO, ...) come as TFDS directories in the RLDS format. Shards
of TFRecords hold one episode per record, with each image encoded (JPEG or PNG) inside its episode.
So an episode is big, and a training sample is a small part of it. rlds.py reads each dataset once
and writes a *frame table*: a row per frame (44 bytes with one camera and a 7-D action) with the
place of its images in the files and its standardized action. From then on, a training sample is
one row of the table and one `pread` of one JPEG, in any order, in constant memory.

Read FrameTable, then frame_table.
"""

import contextlib
import ctypes
import fnmatch
import functools
import hashlib
import io
import json
import multiprocessing.queues
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
from machinery.files import read_json, take_lock

TABLE_VERSION = 2  # change it when a table would hold other numbers (tests/frame_tables.json)


class DataError(UserError):
    """Broken or unsuitable data. The message names the file, and the record if there is one."""


def find_dataset(data_root_dir: str | Path, name: str) -> Path:
    """The directory of dataset `name` ("name": its newest version, or "name:version"), or
    data_root_dir if that is one itself. Raises DataError if there is none."""
    root = Path(data_root_dir)
    if (root / "features.json").exists():
        return root
    name, _, version = name.partition(":")
    refuse_lerobot(root, root / name)
    found = {}  # {version numbers: directory}
    for path in (root / name).glob("*/features.json"):
        directory = path.parent
        if directory.name == version:
            return directory
        if re.fullmatch(r"\d+\.\d+\.\d+", directory.name):  # no copies, and nothing half written
            found[tuple(map(int, directory.name.split(".")))] = directory
    if version or not found:
        expected = root / name / (version or "1.0.0") / "features.json"
        raise DataError(f"{root / name}: no TFDS dataset there: expected {expected}: set "
                        f"data_root_dir to the folder that holds {name!r}")
    return found[max(found)]


def without_version(name: str) -> str:
    """"bridge_orig:1.0.0" -> "bridge_orig"."""
    return name.partition(":")[0]


def refuse_lerobot(*folders: Path) -> None:
    """Raise UserError if one of the folders is a LeRobot dataset."""
    for folder in folders:
        if (folder / "meta/info.json").exists():
            name = folder.resolve().name
            raise UserError(f"{folder} is a LeRobot dataset: convert it to RLDS first: python "
                            f"{PROJECT / 'examples/lerobot/convert.py'} --source {folder} --out "
                            f"datasets --name {name} --yaml {name}.yaml")


class FrameTable:
    """A dataset's index, memory-mapped: it opens at once, and all processes share one copy.

    frames: per frame  `offset`, `length` (one each per camera; length 0: no image), `instruction`
            (number), `action` (float32, standardized but not normalized), `proprio` if asked for
    episodes: per episode  `split`, `shard`, `record` (numbers; several episodes of one if it holds
            several executions), `first`, `count` (its frames), `labeled` (has it an instruction?)
    """

    def __init__(self, path: Path, directory: Path):
        """path: the table; directory: the dataset, which may have moved since it was indexed."""
        meta = read_json(path / "table.json")
        self.path = path
        self.directory = directory
        # statistics of the data that a policy learned first: its tokens keep their meaning
        self.given = directory / "normalization.json"
        self.splits = meta["splits"]
        self.shards = meta["shards"]
        self.cameras = meta["cameras"]  # keys of the images
        self.instructions = meta["instructions"]
        self.statistics = meta["statistics"]  # of all frames, or of those that are `chosen`
        self.chosen = None  # (frames,) bool: those with one of the recipe's `instructions`
        self.bad = meta["bad_episodes"]  # which were left out, and why
        self.targets = np.array(meta["targets"])  # (A,) bool: is the action's dimension a target?
        self.declared = np.array(meta["declared"])  # (A,) bool: does the recipe call it one or not?
        self.features = meta["features"]  # {feature of the recipe: its numbers per step}
        self.unused = meta["unused"]  # what the steps hold besides
        self.openvla_rules = meta["openvla_rules"]  # see Recipe
        row = np.dtype([(name, kind, tuple(shape)) for name, kind, shape in meta["frame"]])
        self.frames = np.memmap(path / "frames.bin", row, "r")
        self.episodes = np.load(path / "episodes.npy")
        self.first_frames = np.ascontiguousarray(self.episodes["first"], np.int64)

    def choose(self, patterns: list[str]) -> None:
        """Choose the frames with certain instructions. For each text, the last pattern that matches
        it counts. Raises DataError for a pattern that matches none."""
        texts = [plain(text) for text in self.instructions]
        chosen = np.full(len(texts), patterns[0].startswith("!"))
        for pattern in patterns:
            glob = plain(pattern.removeprefix("!"))
            found = [fnmatch.fnmatchcase(text, glob) for text in texts]
            if not any(found):
                raise DataError(f"{self.directory}: instructions: {pattern!r} matches none of "
                                f"{len(texts)}, such as {texts[0]!r}: correct or remove it")
            chosen[found] = not pattern.startswith("!")
        if not chosen.any():
            raise DataError(f"{self.directory}: instructions: {patterns} leave none: correct them")
        self.chosen = chosen[self.frames["instruction"]]
        rows = np.flatnonzero(self.chosen)
        mask = np.array(self.statistics["action"]["mask"])
        self.statistics = statistics(self.frames[rows], len({*self.episode_of(rows)}), mask)

    def episode_of(self, rows: np.ndarray) -> np.ndarray:
        """Frame numbers (any shape) -> episode numbers."""
        return np.searchsorted(self.first_frames, rows, side="right") - 1

    def read_image(self, row: int, camera: int) -> bytes:
        """The encoded image of one frame, read from its shard. b"" if there is none."""
        frame = self.frames[row]
        length = int(frame["length"][camera])
        if length == 0:
            return b""
        shard = self.shards[self.episodes["shard"][self.episode_of(row)]]
        file = _open_shard(self.directory / shard)
        data = os.pread(file.fileno(), length, int(frame["offset"][camera]))
        if len(data) < length:  # or a frame without data would be black
            raise DataError("the file is shorter than it was when it was indexed")
        return data

    def where(self, row: int) -> str:
        """File and record of a frame, for error messages."""
        episode = self.episodes[self.episode_of(row)]
        return f"{self.directory / self.shards[episode['shard']]}: record {episode['record']}"


def plain(text: str) -> str:
    """An instruction in lower case and without double spaces."""
    return " ".join(text.lower().split())


def statistics(frames: np.ndarray, num_trajectories: int, mask: np.ndarray) -> dict:
    """The content of OpenVLA's dataset_statistics.json, over all splits of a dataset, bit for bit.

    mask: which of an action's dimensions are normalized, (A,) bool. Mean and deviation are float32
    sums in file order. Without proprio, OpenVLA writes zeros of the action's size.
    """
    action = np.ascontiguousarray(frames["action"])
    proprio = np.zeros_like(action)
    if "proprio" in frames.dtype.names:
        proprio = np.ascontiguousarray(frames["proprio"])
    result: dict = {"num_transitions": len(frames), "num_trajectories": num_trajectories}
    for name, values in (("action", action), ("proprio", proprio)):
        result[name] = {
            "mean": values.mean(0).tolist(),
            "std": values.std(0).tolist(),
            "max": values.max(0).tolist(),
            "min": values.min(0).tolist(),
            "q01": quantile(values, 0.01).tolist(),
            "q99": quantile(values, 0.99).tolist(),
        }
    result["action"]["mask"] = mask.tolist()
    return result


def quantile(values: np.ndarray, q: float) -> np.ndarray:
    """Linear quantile over axis 0 with the rounding of NumPy 1.26, OpenVLA's version: the
    neighbors' difference in float32, the rest in float64 (newer versions stay in float32)."""
    position = (len(values) - 1) * q
    low = int(position)
    high = min(low + 1, len(values) - 1)
    t = position - low
    ordered = np.partition(values, (low, high), axis=0)
    a, b = ordered[low], ordered[high]
    difference = (b - a).astype(np.float64)
    return a + difference * t if t < 0.5 else b - difference * (1 - t)


@functools.lru_cache(maxsize=256)  # an evicted file is closed by garbage collection
def _open_shard(path: Path) -> io.FileIO:
    return open(path, "rb", buffering=0)


# ---- Making a table, once ------------------------------------------------------------------------


def frame_table(directory: Path, recipe: Recipe, cameras: list[str | None], load_proprio: bool, *,
                index_dir: str | None = None, skip_bad_episodes: bool = False) -> FrameTable:
    """Open the frame table of the TFDS dataset in `directory`. If there is none, rlds.py makes it.

    cameras: keys of the images, see Recipe.camera_keys; index_dir: folder for the tables of all
    datasets. By default they are in each dataset's directory. Raises DataError.

    A table's name is a hash of TABLE_VERSION, of everything that was asked for, and of the names,
    sizes and modification times of the data files, so a stale table is never used. It appears by
    one rename. Many processes may call this at once: one indexes, and the others wait for its lock
    (not in a collective, so nothing times out however long it takes).
    """
    directory = directory.resolve()
    known_bad = read_json(bad_episodes_file(directory, index_dir), {})
    read = {**asdict(recipe), "names": {}}  # `instructions` and names do not change the table
    del read["instructions"]
    job = {"recipe": read, "cameras": cameras,
           "load_proprio": load_proprio, "skip_bad": skip_bad_episodes, "known_bad": known_bad}
    name = digest((TABLE_VERSION, job, data_files(directory)))
    path = table_folder(directory, index_dir) / name
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = take_lock(path.with_suffix(".lock"))
        except OSError as error:
            raise DataError(f"{directory}: no frame table can be written to {path.parent}: set "
                            f"index_dir to a folder that is writable ({error})") from error
        with lock or contextlib.nullcontext():  # None: a file system without locks
            if not path.exists():
                if lock:  # nobody else is indexing: remove the rest of a killed process
                    for leftover in path.parent.glob(f"{name}.*.tmp"):
                        shutil.rmtree(leftover)
                index(job | {"directory": str(directory), "path": str(path)})
    table = FrameTable(path, directory)
    if recipe.instructions:
        table.choose(recipe.instructions)
    table.statistics |= read_json(table.given, {})
    for name, labels in recipe.names.items():
        width = table.features.get(name, len(labels))
        if len(labels) != width:
            raise DataError(f"{directory}: names: {name} has {width} numbers and {len(labels)} "
                            "names in its recipe: correct them")
    return table


def data_files(directory: Path) -> list[tuple[str, int, int]]:
    """A dataset's files: (name, size, time of the last change)."""
    listing = []
    for path in directory.iterdir():
        if "record" in path.name or path.name in ("features.json", "dataset_info.json"):
            listing.append((path.name, path.stat().st_size, path.stat().st_mtime_ns))
    return sorted(listing)


def table_folder(directory: Path, index_dir: str | None) -> Path:
    """Where the tables of a dataset are. In an index_dir, all versions share the folder."""
    return Path(index_dir) / directory.parent.name if index_dir else directory / ".frame_table"


def bad_episodes_file(directory: Path, index_dir: str | None) -> Path:
    """Where `data.py --check` lists the bad episodes of these files: {file: {record: reason}}."""
    name = f"bad_episodes-{digest(data_files(directory))}.json"
    return table_folder(directory, index_dir) / name


def digest(values) -> str:
    """A name for values with a meaningful repr: 16 hex digits."""
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


def index(job: dict) -> None:
    """Run rlds.py in its own process, which has no PyTorch and so can fork many cheaply. Raises its
    DataError."""
    with start_program("machinery.rlds", stdin=subprocess.PIPE) as process:
        error, _ = process.communicate(json.dumps(job))
    if process.returncode:
        raise DataError(error.strip()
                        or "indexing failed: see above, or was it killed for its memory?")


def start_program(module: str, *arguments: str, **how) -> subprocess.Popen:
    """Start a module of this project as a program whose output is read. It ends with this process,
    unless `how`, other arguments of Popen, says otherwise."""
    path = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))
    how = {"text": True, "stdout": subprocess.PIPE, "preexec_fn": end_with_parent, **how}
    return subprocess.Popen([sys.executable, "-P", "-m", module, *arguments],
                            env={**os.environ, "PYTHONPATH": path}, **how)


# ---- Processes that end with their parent --------------------------------------------------------


STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # see ranks.Preemption


def end_with_parent() -> None:
    """In a child process: be killed when the parent ends, instead of waiting forever for work."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def follow_rank(worker: int) -> None:
    """For DataLoader workers: ignore signals to the job, and end at once with the rank.

    A worker that outlived its rank would keep the rank's connections open.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()
    # by default, if threads of a worker fail, it prints a traceback, and the rank waits forever
    multiprocessing.queues.Queue._on_queue_feeder_error = send_error
    sys.excepthook = lambda *error: os._exit(1)


FULL = ("(memory or /dev/shm is full, which in Docker has 64 MB, or too many files are open: lower "
        "num_workers, or use docker run --shm-size 16g --ulimit nofile=65536)")


def send_error(queue: multiprocessing.queues.Queue, error: Exception, item: tuple) -> None:
    """In a DataLoader worker: send a DataError in the place of `item`, a batch's number and the
    batch, which it could not send."""
    number, batch = item
    if isinstance(batch, Exception):
        os._exit(1)
    queue.put((number, DataError(f"DataLoader worker could not send its batch: {error} {FULL}")))
