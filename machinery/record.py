"""serve_vla.py --record DIR: requests and their answers, as an RLDS dataset.

    python serve_vla.py --checkpoint runs/demo+n1+b32+x7 --record seen
    python data.py --inspect seen

A step is an answered request: `observation` holds the newest image of each of the model's cameras
(files unchanged, arrays as PNG) and the robot's state, `chunk` the answer, `action` its first step.
An episode holds the requests of one client with one value of the field `episode`. It ends when its
websocket closes or after SILENCE. Without that field, another instruction also begins another one.

A process of its own writes, so that answers do not wait, and outlives a killed server. Each episode
is a file that appears complete, and then counts. A server of the same model appends.
"""

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgpack
import numpy as np

from machinery.config import UserError, exit_with_one_line
from machinery.files import atomic, read_json, take_lock, write_json
from machinery.frames import start_program
from machinery.images import encode
from machinery.rlds import serializer, write_record

SILENCE = 10  # seconds after which an episode has ended
MAX_WAITING = 64  # requests; more are not recorded
MAX_BYTES = 128 << 20  # of an episode's images; a longer one is continued in another


# ---- The server's side -------------------------------------------------------------------------


class Recorder(threading.Thread):
    """Hands requests to the process that writes. Raises UserError if it cannot write to `folder`.

    facts: wire.describe
    """

    def __init__(self, folder: Path, facts: dict):
        super().__init__(daemon=True)
        self.cameras = len(facts["cameras"])
        self.waiting: queue.Queue[dict | None] = queue.Queue(MAX_WAITING)
        self.warned = False
        self.process = start_program(  # it outlives the server, and Ctrl-C is for the server
            "machinery.record", str(folder), json.dumps(facts), stdin=subprocess.PIPE, text=False,
            preexec_fn=None, start_new_session=True)
        if not self.process.stdout.readline():
            raise UserError(f"--record {folder}: cannot be written: see above")
        self.start()

    def add(self, client: str, query, action: np.ndarray) -> None:
        """Record a request (wire.Query) and its answer."""
        images = []
        for view, file in list(zip(query.views, query.files, strict=True))[-self.cameras :]:
            images.append(file or {"shape": view.shape, "data": view.tobytes()})
        self.put({
            "client": client, "episode": query.episode, "time": time.time_ns(), "images": images,
            "state": None if query.proprio is None else query.proprio.tolist(),
            "unused_state": json.dumps(query.unused_state),
            "instruction": query.instruction, "unnorm_key": query.unnorm_key,
            "prefix": len(query.prefix), "chunk": action.reshape(-1, action.shape[-1]).tolist()})

    def end(self, client: str) -> None:
        """A client has left."""
        self.put({"client": client, "time": time.time_ns()})

    def put(self, message: dict) -> None:
        try:
            self.waiting.put_nowait(message)
        except queue.Full:
            if not self.warned:
                print("warning: --record cannot keep up: requests are left out", flush=True)
            self.warned = True

    def run(self) -> None:
        message: dict | None = {}
        while message is not None:
            try:
                self.process.stdin.write(msgpack.packb(message or {"time": time.time_ns()}))
                self.process.stdin.flush()
                message = self.waiting.get(timeout=1)
            except queue.Empty:
                message = {}  # episodes also end when nobody asks
            except OSError:
                print("warning: --record: the process that writes has ended", flush=True)
                return

    def close(self) -> None:
        """Write all episodes."""
        self.waiting.put(None)
        self.join()
        self.process.stdin.close()
        self.process.wait()


# ---- The process that writes -------------------------------------------------------------------


class Dataset:
    """A TFDS dataset that grows by an episode at a time."""

    def __init__(self, folder: Path, facts: dict, action: int, state: int):
        import tensorflow_datasets as tfds  # here: the server needs only the class above
        from google.protobuf.json_format import MessageToDict

        f = tfds.features
        observation = {camera: f.Image(shape=(None, None, 3), encoding_format="png")
                       for camera in facts["cameras"]}
        if state:
            observation["state"] = f.Tensor(shape=(state,), dtype=np.float32)
        self.features = f.FeaturesDict({
            "steps": f.Dataset({
                "observation": observation,
                "action": f.Tensor(shape=(action,), dtype=np.float32),
                "chunk": f.Tensor(shape=(facts["action_shape"][0], action), dtype=np.float32),
                "prefix": f.Scalar(np.int64),  # how many steps of the chunk the robot had chosen
                "unused_state": f.Text(),  # JSON: of a robot whose model does not take its state
                "language_instruction": f.Text(), "unnorm_key": f.Text(),
                "time": f.Scalar(np.int64)}),  # nanoseconds since 1970
            "episode_metadata": {"client": f.Text(), "episode": f.Text(), "model": f.Text()}})
        self.serialize = serializer(self.features)
        self.name = re.sub(r"\W", "_", folder.name)
        self.folder = folder / "1.0.0"
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self.lock = take_lock(self.folder / ".lock", wait=False)
        except BlockingIOError as error:
            raise UserError(f"--record {folder}: another server records there") from error
        self.count = 0  # episodes
        self.bytes = 0
        if not (self.folder / "features.json").exists():
            self.describe()
            self.features.save_config(self.folder)
            return
        if read_json(self.folder / "features.json") != MessageToDict(self.features.to_proto()):
            raise UserError(f"--record {folder}: holds requests to a model of other cameras, "
                            "states or actions: choose another folder")
        (split,) = read_json(self.folder / "dataset_info.json")["splits"]
        self.count = len(split["shardLengths"])
        self.bytes = int(split["numBytes"])

    def describe(self) -> None:
        """Write dataset_info.json: an episode counts from now on."""
        split = {"name": "train", "shardLengths": ["1"] * self.count, "numBytes": str(self.bytes),
                 "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}"}
        info = {"name": self.name, "version": "1.0.0", "fileFormat": "tfrecord", "splits": [split]}
        write_json(self.folder / "dataset_info.json", info)

    def append(self, episode: dict) -> None:
        data = self.serialize(episode)
        path = self.folder / f"{self.name}-train.tfrecord-{self.count:05d}"
        with atomic(path) as scratch, open(scratch, "wb") as file:
            write_record(file, data)
        self.count += 1
        self.bytes += len(data)
        self.describe()


class Writer:
    """Sorts steps into episodes."""

    def __init__(self, folder: Path, facts: dict):
        self.facts = facts
        self.datasets: dict[str, Dataset] = {}  # {unnorm_key: its own}
        known: dict[tuple[int, int], Dataset] = {}
        for key, action in facts["action"].items():
            widths = len(action), len(facts["state"][key]) if facts["proprio"] else 0
            if widths not in known:  # robots of other widths get other folders
                own = folder.with_name(f"{folder.name}-{key}") if known else folder
                known[widths] = Dataset(own, facts, *widths)
            self.datasets[key] = known[widths]
        self.open: dict[tuple, dict] = {}  # the episodes under way

    def take(self, message: dict) -> None:
        """A step, or the end of a client, or an empty message."""
        client = message.get("client")
        for place, episode in list(self.open.items()):
            silent = message["time"] - episode["time"] > SILENCE * 10**9
            if silent or (place[0] == client and "images" not in message):
                self.end(place)
        if "images" not in message:
            return
        place = (client, message["episode"], message["unnorm_key"])
        episode = self.open.get(place)
        if episode and message["episode"] is None:
            if episode["steps"][-1]["language_instruction"] != message["instruction"]:
                self.end(place)
        if episode and episode["bytes"] > MAX_BYTES:
            self.end(place)
        episode = self.open.setdefault(place, {"steps": [], "bytes": 0})
        images = [as_file(image) for image in message["images"]]
        observation = dict(zip(self.facts["cameras"], images, strict=True))
        if message["state"] is not None:
            observation["state"] = np.array(message["state"], np.float32)
        chunk = np.array(message["chunk"], np.float32)
        episode["steps"].append({
            "observation": observation, "action": chunk[0], "chunk": chunk,
            "unused_state": message["unused_state"], "prefix": message["prefix"],
            "language_instruction": message["instruction"], "unnorm_key": message["unnorm_key"],
            "time": message["time"]})
        episode["time"] = message["time"]
        episode["bytes"] += sum(map(len, images))

    def end(self, place: tuple) -> None:
        """Write an episode."""
        client, name, key = place
        about = {"client": client, "episode": "" if name is None else str(name),
                 "model": self.facts["model"]}
        steps = self.open.pop(place)["steps"]
        try:
            self.datasets[key].append({"steps": steps, "episode_metadata": about})
        except OSError as error:
            print(f"warning: --record: an episode of {len(steps)} steps is lost: {error}",
                  file=sys.stderr, flush=True)


def as_file(image: bytes | dict) -> bytes:
    """A file, or an array that becomes a PNG file."""
    if isinstance(image, bytes):
        return image
    array = np.frombuffer(image["data"], np.uint8).reshape(image["shape"])
    return encode(array, "png", compress_level=1)


def main() -> None:
    """Write the messages on standard input, until it ends."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.nice(10)
    with exit_with_one_line():
        writer = Writer(Path(sys.argv[1]), json.loads(sys.argv[2]))
    print("ready", flush=True)
    # raw: a buffered file waits for more
    for message in msgpack.Unpacker(sys.stdin.buffer.raw, max_buffer_size=1 << 30):
        writer.take(message)
    for place in list(writer.open):
        writer.end(place)


if __name__ == "__main__":
    main()
