"""examples/lerobot: datasets of both versions, written here with pyarrow and av, converted as a user does.

A picture carries its camera, episode and frame as sixteen black or white squares, so that one at the wrong
place shows. check_lerobot.py, in the same folder as the converter, does the like with LeRobot's own package.
"""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml
from conftest import ROOT, TINY, launch, read_metrics
from PIL import Image

import act
from config import load_config
from inspect_data import main as inspect_main
from oxe import find_datasets
from recipes import standardize
from rlds import Steps, read_records, step_features

av = pytest.importorskip("av")
pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402

EXAMPLE = ROOT / "examples/lerobot"
sys.path.insert(0, str(EXAMPLE))
import actions  # noqa: E402
import lerobot_format  # noqa: E402

SO101 = [f"{joint}.pos" for joint in ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex",
                                      "wrist_roll", "gripper")]
SIZES = {"front": (96, 128), "wrist": (64, 64), "top": (80, 80)}  # (height, width): cameras differ
TEXTS = ["pick up the cube", "leg den Würfel in die Schale", "把方块放进碗里"]

# ---- Writing ------------------------------------------------------------------------------------------------


def pattern(camera: int, episode: int, frame: int, size: tuple[int, int]) -> np.ndarray:
    """A picture that says which it is, on a colour that drifts from frame to frame."""
    bits = np.array([*f"{camera:02b}{episode:05b}{frame:09b}"], np.uint8).reshape(4, 4)
    rows, columns = (np.arange(side) * 4 // side for side in size)
    light = 40 + 170 * bits[rows][:, columns]
    return np.stack([light, light, np.full(size, 60 + frame % 100)], axis=-1).astype(np.uint8)


def read_pattern(image: np.ndarray) -> tuple[int, int, int]:
    """(camera, episode, frame) of a picture of any size."""
    centres = [[(2 * i + 1) * side // 8 for i in range(4)] for side in image.shape[:2]]
    bits = "".join("01"[int(image[y, x, 0]) > 125] for y in centres[0] for x in centres[1])
    return int(bits[:2], 2), int(bits[2:7], 2), int(bits[7:], 2)


def encode(pictures: list[np.ndarray], fps: int, codec: str) -> bytes:
    """Pictures -> an mp4. (SVT-AV1 at preset 12, LeRobot's default, shows some of these pictures twice.)"""
    file, (height, width, _) = io.BytesIO(), pictures[0].shape
    options = {"libx264": {"crf": "18", "g": "12", "bf": "2"}, "libsvtav1": {"crf": "20", "g": "2", "preset": "8"}}
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream(codec, fps, options=options[codec], width=width, height=height,
                                      pix_fmt="yuv420p")
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def concatenate(videos: list[bytes], path) -> None:
    """mp4s, one after the other, as LeRobot does it: packets are copied."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if len(videos) == 1:
        path.write_bytes(videos[0])
        return
    with av.open(str(path), "w", format="mp4") as container:
        stream, offset = None, 0
        for data in videos:
            with av.open(io.BytesIO(data)) as part:
                (source,) = part.streams.video
                stream = stream or container.add_stream_from_template(source, opaque=True)
                for packet in part.demux(source):
                    if packet.dts is not None:
                        packet.pts, packet.dts, packet.stream = packet.pts + offset, packet.dts + offset, stream
                        container.mux(packet)
                offset += source.duration


def write_json(path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


class Source:
    """A LeRobot dataset and what was written into it. kinds: {camera: "video" or "image"}; tasks: per episode,
    the task_index of each of its frames, or of all."""

    def __init__(self, root, version="v2.1", lengths=(7, 5, 9), kinds=None, width=6, names=SO101, fps=10,
                 codec="libx264", tasks=None, texts=TEXTS, action=None, splits=None, **changes):
        self.root, self.version, self.lengths, self.fps = root / "source", version, lengths, fps
        self.kinds = kinds or {"front": "video", "wrist": "video"}
        self.texts, self.codec = texts, codec
        draw = np.random.default_rng(3)
        self.state, self.action, self.task = [], [], []
        for episode, length in enumerate(lengths):
            path = np.cumsum(draw.normal(0, 1, (length + 1, width)), axis=0).astype(np.float32) + 5
            self.state.append(path[:-1])
            self.action.append(action(episode, length) if action else path[1:])
            self.task.append(np.broadcast_to(tasks[episode] if tasks else episode % len(texts), length))
        self.videos = {camera: [encode(self.pictures(camera, e), fps, codec) for e, n in enumerate(lengths) if n]
                       for camera, kind in self.kinds.items() if kind == "video"}
        cameras = {f"observation.images.{camera}": {
            "dtype": kind, "shape": [3, *SIZES[camera]], "names": ["channels", "height", "width"],
            **({"info": {"video.fps": fps, "video.is_depth_map": False}} if kind == "video" else {})}
            for camera, kind in self.kinds.items()}
        vector = {"dtype": "float32", "shape": [width], "names": names}
        plain = {"dtype": "int64", "shape": [1], "names": None}
        self.info = {
            "codebase_version": version, "robot_type": "so101", "total_episodes": len(lengths),
            "total_frames": sum(lengths), "total_tasks": len(texts), "chunks_size": 2, "fps": fps,
            "splits": splits or {"train": f"0:{len(lengths)}"},
            "features": {"action": {**vector, "shape": [self.action[0].shape[1]]}, "observation.state": vector,
                         **cameras, "timestamp": {**plain, "dtype": "float32"},
                         **dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), plain)}, **changes}
        self.write_v2() if version.startswith("v2") else self.write_v3()
        write_json(self.root / "meta/info.json", self.info)

    def pictures(self, camera: str, episode: int) -> list[np.ndarray]:
        number = [*self.kinds].index(camera)
        return [pattern(number, episode, frame, SIZES[camera]) for frame in range(self.lengths[episode])]

    def table(self, episode: int) -> pa.Table:
        """The rows of an episode."""
        length = self.lengths[episode]
        columns = {
            "action": pa.array(self.action[episode].tolist(), pa.list_(pa.float32())),
            "observation.state": pa.FixedSizeListArray.from_arrays(
                pa.array(self.state[episode].reshape(-1)), self.state[episode].shape[1]),
            "timestamp": pa.array(np.arange(length, dtype=np.float32) / np.float32(self.fps)),
            "frame_index": pa.array(np.arange(length)), "episode_index": pa.array(np.full(length, episode)),
            "index": pa.array(np.arange(length) + sum(self.lengths[:episode])),
            "task_index": pa.array(self.task[episode])}
        for camera, kind in self.kinds.items():
            if kind == "image":
                rows = []
                for frame, picture in enumerate(self.pictures(camera, episode)):
                    Image.fromarray(picture).save(file := io.BytesIO(), "png")
                    rows.append({"bytes": file.getvalue(), "path": f"frame-{frame:06d}.png"})
                columns[f"observation.images.{camera}"] = pa.array(
                    rows, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
        return pa.table(columns)

    def write_v2(self) -> None:
        self.info |= {
            "total_chunks": 2, "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
            "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"}
        write_json(self.root / "meta/tasks.jsonl", {})
        lines = [{"task_index": i, "task": text} for i, text in enumerate(self.texts)]
        (self.root / "meta/tasks.jsonl").write_text("\n".join(json.dumps(x, ensure_ascii=False) for x in lines),
                                                    encoding="utf-8")
        lines = [{"episode_index": e, "length": n, "tasks": []} for e, n in enumerate(self.lengths)]
        (self.root / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
        place = 0
        for episode, length in enumerate(self.lengths):
            where = {"episode_chunk": episode // 2, "episode_index": episode}
            path = self.root / self.info["data_path"].format(**where)
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(self.table(episode), path)
            for camera, videos in self.videos.items() if length else ():
                key = f"observation.images.{camera}"
                concatenate([videos[place]], self.root / self.info["video_path"].format(video_key=key, **where))
            place += length > 0

    def write_v3(self) -> None:
        """Numbers three episodes a file; the first camera's videos two a file, the second's all in one."""
        self.info |= {"data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
                      "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"}
        (self.root / "meta").mkdir(parents=True)
        pq.write_table(pa.table({"task_index": pa.array(range(len(self.texts))),
                                 "__index_level_0__": pa.array(self.texts, pa.large_string())}),
                       self.root / "meta/tasks.parquet")
        rows, first = [], 0
        for episode, length in enumerate(self.lengths):
            rows.append({"episode_index": episode, "length": length, "tasks": [TEXTS[0]],
                         "data/chunk_index": 0, "data/file_index": episode // 3, "dataset_from_index": first,
                         "dataset_to_index": first + length, "stats/action/min": [0.0]})
            first += length
        for file in range(-(-len(rows) // 3)):
            path = self.root / self.info["data_path"].format(chunk_index=0, file_index=file)
            path.parent.mkdir(parents=True, exist_ok=True)
            part = [self.table(episode) for episode in range(3 * file, min(3 * file + 3, len(rows)))]
            with pq.ParquetWriter(path, part[0].schema) as writer:
                for table in part:
                    writer.write_table(table)  # a row group each
        for number, (camera, videos) in enumerate(self.videos.items()):
            key, size = f"observation.images.{camera}", [2, 99][number]
            for file in range(-(-len(rows) // size)):
                part, seconds = range(file * size, min(file * size + size, len(rows))), 0.0
                for episode in part:
                    rows[episode] |= {f"videos/{key}/chunk_index": 0, f"videos/{key}/file_index": file,
                                      f"videos/{key}/from_timestamp": seconds,
                                      f"videos/{key}/to_timestamp": (seconds := seconds + self.lengths[episode] / self.fps)}
                whole = [videos[sum(n > 0 for n in self.lengths[:e])] for e in part if self.lengths[e]]
                concatenate(whole, self.root / self.info["video_path"].format(
                    video_key=key, chunk_index=0, file_index=file))
        for file, part in enumerate((rows[:2], rows[2:])):  # these, too, may be several
            path = self.root / f"meta/episodes/chunk-000/file-{file:03d}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            if part:
                pq.write_table(pa.Table.from_pylist(part), path)

    def edit(self, **changes) -> None:
        write_json(self.root / "meta/info.json", self.info | changes)


def convert(source: Source, out, *arguments, check=True) -> str:
    """Run the converter as a user does -> what it printed."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLE / "convert.py"), "--source", str(source.root), "--out", str(out),
         "--name", "my_robot", "--image_size", "64", *map(str, arguments)], text=True, capture_output=True,
        timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert (done.returncode == 0) == check, done.stdout + done.stderr
    if not check:
        assert re.fullmatch(r"error: [^\n]+\n", done.stderr), done.stderr
        assert not out.exists() or not [*out.rglob("*.tfrecord*"), *out.rglob("*info.json")]
    return done.stdout if check else done.stderr


def read_back(out, split="train") -> list[dict]:
    """The episodes of a converted dataset."""
    directory, found = out / "my_robot/1.0.0", []
    features = step_features(directory)
    for path in sorted(directory.glob(f"*-{split}.tfrecord*")):
        for offset, data in read_records(path):
            steps, whole = Steps(data, offset, features), path.read_bytes()
            episode = {name: steps[name] for name, feature in features.items() if feature.kind != "Image"}
            for name, feature in features.items():
                if feature.kind == "Image":
                    episode[name] = [np.array(Image.open(io.BytesIO(whole[i : i + n]))) for i, n in steps.spans(name)]
            found.append(episode)
    return found


def recipe_of(printed: str) -> dict:
    """The YAML that was printed."""
    return yaml.safe_load(printed.partition("copy and correct:\n")[2])


def compare(source: Source, episodes: list[dict], numbers=None, keep=slice(None)) -> None:
    """Every number and text equal, and every picture in its place and like the one that was encoded."""
    numbers = [e for e, n in enumerate(source.lengths) if n] if numbers is None else numbers
    assert [e["episode_metadata/episode_index"].item() for e in episodes] == numbers
    for number, episode in zip(numbers, episodes, strict=True):
        frames = np.arange(source.lengths[number])[keep]
        assert np.array_equal(episode["observation/state"], source.state[number][frames])
        assert np.array_equal(episode["action"], source.action[number][frames])
        texts = [source.texts[task] for task in source.task[number][frames]]
        assert [text.decode() for text in episode["language_instruction"]] == texts
        for c, camera in enumerate(source.kinds):
            assert [read_pattern(image) for image in episode[f"observation/{camera}"]] == [
                (c, number, frame) for frame in frames]
            for frame, image in zip(frames, episode[f"observation/{camera}"], strict=True):
                want = Image.fromarray(pattern(c, number, frame, SIZES[camera])).resize((64, 64), 1)
                error = np.abs(image.astype(int) - np.array(want)).mean()
                assert error < 6, (camera, number, frame, error)


# ---- Both versions ------------------------------------------------------------------------------------------

VIDEOS, MIXED = {"front": "video", "wrist": "video"}, {"wrist": "image", "front": "video", "top": "image"}


@pytest.mark.parametrize("version, kinds, width, codec", [
    ("v2.1", VIDEOS, 6, "libx264"), ("v2.1", MIXED, 14, "libsvtav1"), ("v3.0", VIDEOS, 6, "libsvtav1"),
    ("v3.0", MIXED, 14, "libx264"), ("v3.0", VIDEOS, 6, "libx264")])
def test_everything_arrives(tmp_path, version, kinds, width, codec):
    names = SO101 if width == 6 else {"motors": [f"joint_{i}" for i in range(width)]}
    source = Source(tmp_path, version, (7, 5, 9, 6), kinds, width, names, codec=codec,
                    tasks=[0, [1, 1, 1, 2, 2], 2, 1])
    printed = convert(source, tmp_path / "out")
    compare(source, read_back(tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["my_robot"]
    assert f"version {version} fps 10 episodes 4 frames 27\n" in printed
    told = recipe_of(printed)
    recipe = told["datasets"]["my_robot"]
    assert recipe["wrist"] == "wrist" and recipe["primary"] == "front" and recipe["action"] == "action target"
    assert recipe.get("secondary") == ("top" if "top" in kinds else None)
    assert told["cameras"] == ["primary", "secondary", "wrist"] if "top" in kinds else ["primary", "wrist"]


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_some_episodes_and_fewer_frames(tmp_path, version):
    source = Source(tmp_path, version, (70, 10, 33, 40), fps=30)
    printed = convert(source, tmp_path / "out", "--episodes", "0,2-3", "--fps", "10")
    compare(source, read_back(tmp_path / "out"), [0, 2, 3], slice(None, None, 3))
    assert "fps 10 episodes 3 frames 49 idle_frames 0 (0.0%)" in printed
    line = convert(source, tmp_path / "more", "--fps", "31", check=False)
    assert line == "error: --fps 31: the dataset has 30: choose that or fewer\n"
    line = convert(source, tmp_path / "more", "--episodes", "2,9", check=False)
    assert "has no frames of episode 9; it has 0 to 3" in line


def test_videos_encoded_in_one_piece(tmp_path):
    """No episode but the first begins with a key frame: as other programs write them."""
    source = Source(tmp_path, "v3.0", (7, 30, 9), {"front": "image", "wrist": "video"})
    whole = [picture for e in range(3) for picture in source.pictures("wrist", e)]
    for path in source.root.rglob("*.mp4"):
        path.unlink()
    path = source.root / "videos/observation.images.wrist/chunk-000/file-000.mp4"
    path.write_bytes(encode(whole, 10, "libx264"))
    for meta in (source.root / "meta/episodes").rglob("*.parquet"):  # one file, though written as two a file
        rows = pq.read_table(meta).to_pylist()
        for row in rows:
            row["videos/observation.images.wrist/file_index"] = 0
            row["videos/observation.images.wrist/from_timestamp"] = sum(source.lengths[: row["episode_index"]]) / 10
        pq.write_table(pa.Table.from_pylist(rows), meta)
    convert(source, tmp_path / "out")
    compare(source, read_back(tmp_path / "out"))


def test_a_split_is_kept(tmp_path):
    source = Source(tmp_path, "v2.1", (5, 6, 7), splits={"train": "0:2", "test": "2:3"})
    convert(source, tmp_path / "out")
    compare(source, read_back(tmp_path / "out"), [0, 1])
    compare(source, read_back(tmp_path / "out", "val"), [2])


def test_pictures_may_stay_as_they_are(tmp_path):
    source = Source(tmp_path, "v3.0", (3, 4))
    convert(source, tmp_path / "out", "--image_size", 0)
    for camera in source.kinds:
        assert read_back(tmp_path / "out")[1][f"observation/{camera}"][0].shape == (*SIZES[camera], 3)
