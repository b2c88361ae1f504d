"""examples/lerobot: datasets of both versions, written here with pyarrow and av, converted as a user does.

A picture carries its camera, episode and frame as sixteen black or white squares, so that one at the wrong
place shows. check_lerobot.py, in the same folder as the converter, does the like with LeRobot's own package.
"""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import mobile
import numpy as np
import pytest
import yaml
from conftest import ROOT, TINY, launch, read_metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import act
from action_tokenizer import ActionTokenizer, normalize, unnormalize
from machinery import inspect_data, oxe
from machinery.config import Recipe, TrainConfig, UserError
from machinery.convention import undo
from machinery.fields import parse_fields
from machinery.guess import Dimension, assumptions, field_list, kind_by_name
from machinery.inspect_data import TO_TRAIN
from machinery.recipes import action_masks, read_fields
from machinery.rlds import Steps, read_records, step_features

av = pytest.importorskip("av")
pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402

EXAMPLE = ROOT / "examples/lerobot"
sys.path.insert(0, str(EXAMPLE))
import convert as converter  # noqa: E402
from resample import lost_commands, resample  # noqa: E402

SO101 = [f"{joint}.pos" for joint in ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex",
                                      "wrist_roll", "gripper")]
SIZES = {"front": (96, 128), "wrist": (64, 64), "top": (80, 80), "image": (64, 64)}  # (height, width)
TEXTS = ["pick up the cube", "leg den Würfel in die Schale", "把方块放进碗里"]

# ---- Writing -----------------------------------------------------------------------------------------------


def pattern(camera: int, episode: int, frame: int, size: tuple[int, int]) -> np.ndarray:
    """A picture that says which it is; its color drifts from frame to frame."""
    bits = np.array([*f"{camera:02b}{episode:05b}{frame:09b}"], np.uint8).reshape(4, 4)
    rows, columns = (np.arange(side) * 4 // side for side in size)
    light = 40 + 170 * bits[rows][:, columns]
    return np.stack([light, light, np.full(size, 60 + frame % 100)], axis=-1).astype(np.uint8)


def read_pattern(image: np.ndarray) -> tuple[int, int, int]:
    """(camera, episode, frame) of a picture of any size."""
    centers = [[(2 * i + 1) * side // 8 for i in range(4)] for side in image.shape[:2]]
    bits = "".join("01"[int(image[y, x, 0]) > 125] for y in centers[0] for x in centers[1])
    return int(bits[:2], 2), int(bits[2:7], 2), int(bits[7:], 2)


def encode(pictures: list[np.ndarray], fps: int, codec: str) -> bytes:
    """Pictures -> an mp4. (SVT-AV1 at preset 12, LeRobot's default, shows some of these pictures twice.)"""
    file, (height, width, _) = io.BytesIO(), pictures[0].shape
    options = {"libx264": {"crf": "18", "g": "12", "bf": "2"},
               "libsvtav1": {"crf": "20", "g": "2", "preset": "8"}}
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
                        packet.pts, packet.dts = packet.pts + offset, packet.dts + offset
                        packet.stream = stream
                        container.mux(packet)
                offset += source.duration


def write_json(path, *values) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(x, ensure_ascii=False) + "\n" for x in values), encoding="utf-8")


ALL = slice(None)


class Source:
    """A LeRobot dataset and what was written into it. kinds: {camera: "video" or "image"}; tasks: for each
    episode, the task_index of each of its frames, or of all; action: (episode, length) -> its actions;
    parts: {feature: (which, its columns)} of action and state; more: {feature: (episode, length) -> it}."""

    def __init__(self, root, version="v2.1", lengths=(7, 5, 9), kinds=None, width=6, names=SO101, fps=10,
                 codec="libx264", tasks=None, texts=TEXTS, action=None, splits=None, parts=None, more=None,
                 images="observation.images.", **changes):
        self.root, self.version, self.lengths, self.fps = root / "source", version, lengths, fps
        self.parts = parts or {"action": ("action", ALL), "observation.state": ("state", ALL)}
        self.more, self.images = more or {}, images
        self.kinds = kinds or {"front": "video", "wrist": "video"}
        self.texts, self.codec = texts, codec
        draw = np.random.default_rng(3)
        self.state, self.action, self.task = [], [], []
        for episode, length in enumerate(lengths):
            path = np.cumsum(draw.normal(0, 1, (length + 1, width)), axis=0).astype(np.float32) + 5
            self.action.append(action(episode, length) if action else path[1:])
            self.state.append(np.concatenate([self.action[-1][:1], self.action[-1][:-1]]))  # the arm follows
            self.task.append(np.broadcast_to(tasks[episode] if tasks else episode % len(texts), length))
        self.videos = {camera: {e: encode(self.pictures(camera, e), fps, codec)
                                for e, length in enumerate(lengths) if length}
                       for camera, kind in self.kinds.items() if kind == "video"}
        cameras = {f"{self.images}{camera}": {
            "dtype": kind, "shape": [3, *SIZES[camera]], "names": ["channels", "height", "width"],
            "info": {"video.fps": fps, "video.is_depth_map": False} if kind == "video" else None}
            for camera, kind in self.kinds.items()}
        vectors = {}
        for key, (_, columns) in self.parts.items():
            named = names[columns] if isinstance(names, list) else names
            vectors[key] = {"dtype": "float32", "shape": [len(range(width)[columns])], "names": named}
        for key, make in self.more.items():
            values = make(0, lengths[0])
            vectors[key] = {"dtype": str(values.dtype), "shape": [*values.shape[1:]] or [1], "names": None}
        plain = {"dtype": "int64", "shape": [1], "names": None}
        self.info = {
            "codebase_version": version, "robot_type": "so101", "total_episodes": len(lengths),
            "total_frames": sum(lengths), "total_tasks": len(texts), "chunks_size": 2, "fps": fps,
            "splits": splits or {"train": f"0:{len(lengths)}"},
            "features": {**vectors, **cameras,
                         "timestamp": {**plain, "dtype": "float32"},
                         **dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), plain)},
            **changes}
        self.write_v2() if version.startswith("v2") else self.write_v3()
        write_json(self.root / "meta/info.json", self.info)

    def pictures(self, camera: str, episode: int) -> list[np.ndarray]:
        number = [*self.kinds].index(camera)
        return [pattern(number, episode, frame, SIZES[camera]) for frame in range(self.lengths[episode])]

    def table(self, episode: int) -> pa.Table:
        """The rows of an episode: lists in one column, lists of a fixed size in another."""
        length = self.lengths[episode]
        columns = {}
        for key, (which, part) in self.parts.items():
            values = getattr(self, which)[episode][:, part]
            columns[key] = (
                pa.array(values.tolist(), pa.list_(pa.float32())) if which == "action" else
                pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1]))
        columns |= {key: pa.array(make(episode, length).tolist()) for key, make in self.more.items()}
        columns |= {
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
                columns[f"{self.images}{camera}"] = pa.array(
                    rows, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
        return pa.table(columns)

    def write_v2(self) -> None:
        self.info |= {
            "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
            "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"}
        write_json(self.root / "meta/tasks.jsonl", *(
            {"task_index": i, "task": text} for i, text in enumerate(self.texts)))
        write_json(self.root / "meta/episodes.jsonl", *(
            {"episode_index": e, "length": n, "tasks": []} for e, n in enumerate(self.lengths)))
        for episode, length in enumerate(self.lengths):
            where = {"episode_chunk": episode // 2, "episode_index": episode}
            path = self.root / self.info["data_path"].format(**where)
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(self.table(episode), path)
            for camera, videos in self.videos.items() if length else ():
                key = f"{self.images}{camera}"
                path = self.root / self.info["video_path"].format(video_key=key, **where)
                concatenate([videos[episode]], path)

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
            key, size = f"{self.images}{camera}", [2, 99][number]
            for file in range(-(-len(rows) // size)):
                part, seconds = range(file * size, min(file * size + size, len(rows))), 0.0
                for episode in part:
                    rows[episode] |= {f"videos/{key}/chunk_index": 0, f"videos/{key}/file_index": file,
                                      f"videos/{key}/from_timestamp": seconds}
                    seconds += self.lengths[episode] / self.fps
                path = self.info["video_path"].format(video_key=key, chunk_index=0, file_index=file)
                concatenate([videos[e] for e in part if e in videos], self.root / path)
        for file, part in enumerate((rows[:2], rows[2:])):  # these, too, may be several
            path = self.root / f"meta/episodes/chunk-000/file-{file:03d}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            if part:
                pq.write_table(pa.Table.from_pylist(part), path)

    def edit(self, **changes) -> None:
        write_json(self.root / "meta/info.json", self.info | changes)


def command(source: Source, out, *arguments) -> dict:
    """What subprocess needs to know to run the converter as a user does."""
    words = ["--source", source.root, "--out", out, "--name", "my_robot", "--image_size", 64, *arguments]
    return {"args": [sys.executable, str(EXAMPLE / "convert.py"), *map(str, words)], "text": True,
            "env": {**os.environ, "OMP_NUM_THREADS": "1"}}


def convert(source: Source, out, *arguments) -> str:
    """Run the converter in this process -> what it printed."""
    _, *words = command(source, out, *arguments)["args"]
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        converter.main()
    return printed.getvalue()


def refused(source: Source, out, fps=None, episodes=None) -> str:
    """What the converter says, in one line, instead of writing anything."""
    with pytest.raises(UserError) as error:
        converter.convert(source.root, out, "my_robot", 64, fps, episodes, None, 2)
    assert not [path for path in out.rglob("*") if path.is_file()] and "\n" not in str(error.value)
    return str(error.value)


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
                    episode[name] = [np.array(Image.open(io.BytesIO(whole[i : i + n])))
                                     for i, n in steps.spans(name)]
            found.append(episode)
    return found


def recipe_of(printed: str) -> dict:
    """The YAML that was printed."""
    return yaml.safe_load(printed.partition(f"{TO_TRAIN}\n")[2].partition("\nwrote ")[0])


def compare(source: Source, episodes: list[dict], numbers=None, keep=slice(None)) -> None:
    """Every number and text equal, and every picture in its place and like the one that was encoded. An action
    is the last target before the next frame."""
    numbers = [e for e, n in enumerate(source.lengths) if n] if numbers is None else numbers
    assert [e["episode_metadata/episode_index"].item() for e in episodes] == numbers
    for number, episode in zip(numbers, episodes, strict=True):
        frames = np.arange(source.lengths[number])[keep]
        assert np.array_equal(episode["observation/state"], source.state[number][frames])
        ends = np.append(frames[1:], source.lengths[number]) - 1
        assert np.array_equal(episode["action"], source.action[number][ends])
        texts = [source.texts[task] for task in source.task[number][frames]]
        assert [text.decode() for text in episode["language_instruction"]] == texts
        for c, camera in enumerate(source.kinds):
            assert [read_pattern(image) for image in episode[f"observation/{camera}"]] == [
                (c, number, frame) for frame in frames]
            for frame, image in zip(frames, episode[f"observation/{camera}"], strict=True):
                want = Image.fromarray(pattern(c, number, frame, SIZES[camera])).resize((64, 64), 1)
                error = np.abs(image.astype(int) - np.array(want)).mean()
                assert error < 6, (camera, number, frame, error)


# ---- Both versions -----------------------------------------------------------------------------------------

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
    assert "fps 10 episodes 3 frames 49\n" in printed
    line = refused(source, tmp_path / "more", fps=31.0)
    assert line == "--fps 31: the dataset has 30: choose that or fewer"
    assert "has no frames of episode 9; it has 0 to 3" in refused(source, tmp_path / "more", episodes="2,9")
    assert "'3-x' is no number or range" in refused(source, tmp_path / "more", episodes="3-x")
    assert "'²' is no number or range" in refused(source, tmp_path / "more", episodes="²")
    assert "has no frames of episode 4" in refused(source, tmp_path / "more", episodes=f"0-{10**15}")
    source.info["chunks_size"] = 0
    write_json(source.root / "meta/info.json", source.info)
    assert "chunks_size is 0: it must be" in refused(source, tmp_path / "more")


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
            start = sum(source.lengths[: row["episode_index"]]) / 10
            row["videos/observation.images.wrist/from_timestamp"] = start
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


def test_an_interrupted_conversion_goes_on(tmp_path):
    source = Source(tmp_path, "v3.0", (9,) * 12)
    job = subprocess.Popen(**command(source, tmp_path / "out", "--workers", 1), stdout=subprocess.DEVNULL)
    scratch, until = tmp_path / "out/.my_robot.episodes", time.monotonic() + 120
    while not scratch.exists() or len([*scratch.iterdir()]) < 2:
        assert job.poll() is None and time.monotonic() < until
        time.sleep(0.001)
    job.send_signal(signal.SIGKILL)
    job.wait()
    made = {path: path.stat().st_mtime_ns for path in scratch.iterdir() if not path.suffix}
    assert not [*tmp_path.glob("out/my_robot/1.0.0/*")]
    for path in made:
        os.utime(path, ns=(0, 0))
    followed = []

    def look(*arguments):
        followed.append({path for path in made if path.stat().st_mtime_ns == 0})
        return write(*arguments)

    write = converter.write_rlds
    converter.write_rlds = look
    try:
        converter.convert(source.root, tmp_path / "out", "my_robot", 64, None, None, None, 2)
    finally:
        converter.write_rlds = write
    assert followed == [set(made)] and not scratch.exists()
    compare(source, read_back(tmp_path / "out"))


# ---- What is broken is named -------------------------------------------------------------------------------

LEAVE_OUT = "leave the episode out with --episodes"


def test_cut_off_videos(tmp_path):
    """Wherever an mp4 is cut, even with its index in front, so that its header promises all frames."""
    source = Source(tmp_path, "v2.1", (30, 5))
    path = source.root / "videos/chunk-000/observation.images.front/episode_000000.mp4"
    whole = path.read_bytes()
    with av.open(io.BytesIO(whole)) as old, av.open(str(path), "w", format="mp4",
                                                   options={"movflags": "faststart"}) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                new.mux(packet)
    front = path.read_bytes()
    assert front.index(b"moov") < front.index(b"mdat") and whole.index(b"moov") > whole.index(b"mdat")
    for data in (front[:-1], front[:-200], front[: len(front) // 2]):
        path.write_bytes(data)
        assert re.search(rf"{path}: has \d+ of the 30 frames of episode 0.*{LEAVE_OUT}",
                         refused(source, tmp_path / "out"))
    for data in (whole[: len(whole) // 2], b"", b"version https://git-lfs.github.com/spec/v1\n"):
        path.write_bytes(data)
        assert f"{path}: not a readable video" in refused(source, tmp_path / "out")
    assert "git lfs pull" in refused(source, tmp_path / "out")
    path.unlink()
    assert f"{path}: missing" in refused(source, tmp_path / "out")
    printed = convert(source, tmp_path / "out", "--episodes", 1)
    assert "episodes 1 frames 5\n" in printed


def test_damaged_pictures(tmp_path, capsys):
    """What only decoding finds: the episodes before it are kept, for the next command."""
    source = Source(tmp_path, "v2.1", (5, 30), codec="libsvtav1")
    path = source.root / "videos/chunk-000/observation.images.front/episode_000001.mp4"
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 60
    data[start : start + 400] = bytes(400)
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"{path}: frame \d+ of episode 1 cannot be decoded: {LEAVE_OUT}"):
        converter.convert(source.root, tmp_path / "out", "my_robot", 64, None, None, None, 2)
    assert not [*(tmp_path / "out/my_robot").iterdir()]
    assert len([*(tmp_path / "out/.my_robot.episodes").iterdir()]) == 1
    assert "finished episodes are kept" in capsys.readouterr().out


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_missing_files_and_wrong_counts(tmp_path, version):
    source, out = Source(tmp_path, version, (4, 3, 5, 6)), tmp_path / "out"
    for key, says in (("total_frames", 19), ("total_episodes", 5)):
        source.edit(**{key: says})
        have = source.info[key]
        line = refused(source, out)
        assert f"says {key} {says}, but the episodes that are listed make {have}" in line
    source.edit(fps=20)
    assert "has the timestamp 0.1 s, but at 20 fps it is due at 0.05 s" in refused(source, out)
    source.edit()
    path = max(source.root.glob("data/*/*.parquet"))
    data = path.read_bytes()
    table = pq.read_table(path)
    pq.write_table(table.slice(0, len(table) - 1), path)
    line = refused(source, out)
    assert f"{path}: has 5 frames of episode 3, the metadata say 6" in line and LEAVE_OUT in line
    path.write_bytes(data[:-50])
    assert f"{path}: not a readable parquet file" in refused(source, out)
    path.unlink()
    assert refused(source, out) == f"{path}: missing, but the metadata list it (incomplete download?)"
    path.write_bytes(data)
    (path := max(source.root.glob("meta/episodes*"))).rename(tmp_path / "aside")
    assert f"{path}: " in (line := refused(source, out)) and "incomplete download" in line
    (tmp_path / "aside").rename(path)
    if version == "v3.0":
        next(path.glob("*/file-000.parquet")).unlink()
        assert "episode 0 is not listed, and 1 others" in refused(source, out)


def test_frames_that_are_no_frames(tmp_path):
    source, out = Source(tmp_path, "v2.1", (4, 3)), tmp_path / "out"
    path = source.root / "data/chunk-000/episode_000001.parquet"
    table = pq.read_table(path)

    def edited(name, values):
        pq.write_table(table.set_column(table.column_names.index(name), name, pa.array(values)), path)
        return refused(source, out)

    assert "task_index 7 in episode 1 has no text" in edited("task_index", [1, 7, 1])
    assert "does not count from 0 to 2" in edited("frame_index", [0, 1, 3])
    line = edited("action", [[0.0] * 6, [1.0] * 6, [np.nan] * 6])
    assert "action of episode 1 is not finite at frame 2" in line
    line = edited("action", [[0.0] * 6, [1.0] * 6, [2.0] * 5])
    assert "action of episode 1 is not a row of numbers" in line
    line = edited("action", [[0.0] * 7, [1.0] * 6, [2.0] * 5])  # as many numbers as there should be
    assert "action of episode 1 is not a row of numbers" in line
    line = edited("action", [[0.0] * 5, [1.0] * 5, [2.0] * 5])
    assert "action of episode 1 has 5 numbers, meta/info.json names 6" in line
    assert "has the timestamp nan s" in edited("timestamp", pa.array([0.0, np.nan, 0.2], pa.float32()))
    pq.write_table(table.drop_columns(["action"]), path)
    assert f"{path}: has no column action; it has observation.state" in refused(source, out)


def test_what_is_no_dataset(tmp_path):
    source = Source(tmp_path, "v2.1", (3, 4))
    (source.root / "meta/info.json").write_text("{")
    assert "not readable as JSON" in refused(source, tmp_path / "out")
    source.edit(video_path=None)
    assert "/meta: not as LeRobot writes it: " in refused(source, tmp_path / "out")
    for fps in (0, None, "30", -1):
        source.edit(fps=fps)
        assert f"fps: {fps!r}: must be the frames a second" in refused(source, tmp_path / "out")
    source.edit(fps=10)
    source.info.pop("data_path")
    source.edit()
    assert "has no data_path: not LeRobot v2.x or v3.x" in refused(source, tmp_path / "out")
    (source.root / "meta/info.json").unlink()
    line = refused(source, tmp_path / "out")
    assert "--source must be the folder of a LeRobot dataset" in line


def test_what_is_only_told(tmp_path):
    """Two tasks with one text, an episode without frames, and names that say nothing."""
    for version in ("v2.1", "v3.0"):
        source = Source(tmp_path / version, version, (4, 0, 5), names=None, texts=[*TEXTS[:2], TEXTS[0]])
        printed = convert(source, tmp_path / version / "out")
        notes = [line for line in printed.splitlines() if line.startswith("note: ")]
        assert notes == [
            f"note: tasks 0 and 2 have one text, {TEXTS[0]!r}: they become one instruction",
            *(f"note: {key}: names: null in meta/info.json does not name each of its dimensions: ranges "
              "alone tell what they are" for key in ("action", "observation.state")),
            "note: episode 1 has no frames: it is left out"]
        compare(source, read_back(tmp_path / version / "out"))
    line = refused_where_it_exists(source, tmp_path / "v3.0/out")
    assert f"{tmp_path / 'v3.0/out/my_robot/1.0.0'} exists: remove it" in line


def refused_where_it_exists(source: Source, out) -> str:
    with pytest.raises(UserError) as error:
        converter.convert(source.root, out, "my_robot", 64, None, None, None, 2)
    return str(error.value)


# ---- What features are called ------------------------------------------------------------------------------

JOINTS, GRIP = slice(0, 5), slice(5, 6)
STYLES = {  # of whose datasets: (features, the recipe's state, its action's keys)
    "openpi": ({"actions": ("action", ALL), "state": ("state", ALL)}, "/state", ["actions"]),
    "openpi, of DROID": ({"actions": ("action", ALL), "joint_position": ("state", JOINTS),
                          "gripper_position": ("state", GRIP)}, "/gripper_position, /joint_position",
                         ["actions"]),
    "AgiBot": ({"observation.states.joint.position": ("state", JOINTS),
                "actions.joint.position": ("action", JOINTS),
                "observation.states.effector.position": ("state", GRIP),
                "actions.effector.position": ("action", GRIP)},
               "states_effector_position, states_joint_position",
               ["actions_joint_position", "actions_effector_position"]),
    "ALOHA": ({"action": ("action", ALL), "observation.qpos": ("state", ALL),
               "observation.effort": ("state", ALL)}, "qpos", ["action"]),
    "DROID": ({"action": ("action", ALL), "action.joint_position": ("action", JOINTS),
               "observation.state": ("state", ALL), "observation.state.joint_position": ("state", JOINTS)},
              "state", ["action"]),
    "nobody": ({"action": ("action", ALL), "numbers": ("state", ALL)}, "0", ["action"]),
}


@pytest.mark.parametrize("style", STYLES)
def test_the_state_has_many_names(style, tmp_path):
    """It is in the recipe, or a line says that there is none; and each feature is in one of the two."""
    parts, state, keys = STYLES[style]
    source = Source(tmp_path, lengths=(20, 21), kinds={"image": "image"}, parts=parts, images="",
                    more={"next.done": lambda e, n: np.arange(n) == n - 1})
    printed = convert(source, tmp_path / "out")
    told = recipe_of(printed)
    recipe = Recipe(**told["datasets"]["my_robot"])
    assert recipe.state == state and told["use_proprio"] == (state != "0")
    assert [*dict.fromkeys(field.key for field in parse_fields(recipe.action))] == keys
    notes = [line for line in printed.splitlines() if line.startswith("note: ")]
    assert any("no state" in line for line in notes) == (state == "0")
    unused = "".join(re.findall("^unused (.*)", printed, re.MULTILINE))
    used = {field.key for field in parse_fields(recipe.action) + parse_fields(recipe.state, "observation/")}
    kept = {converter.rlds_name(key) for key in parts} - used
    assert {part.partition(" ")[0] for part in unused.split(", ")} - {"", "next_done"} == kept
    episode = read_back(tmp_path / "out")[0]
    assert np.array_equal(np.hstack([episode[key] for key in keys]), source.action[0])
    states = read_fields(recipe.state, episode, "observation/", 0, 20)
    if state != "0":
        assert np.array_equal(np.sort(np.hstack(states)), np.sort(source.state[0]))
    assert episode["next_done"].ravel().tolist() == [0] * 19 + [1]


def test_gr00ts_slices_and_annotations(tmp_path):
    """modality.json names the dimensions, and the task is the human's, not that of task_index."""
    source = Source(tmp_path, lengths=(20, 21), kinds={"front": "image"}, names=[f"motor_{i}" for i in range(6)],
                    more={"annotation.human.action.task_description": lambda e, n: np.full(n, 1 + e),
                          "annotation.human.validity": lambda e, n: np.zeros(n, int)})
    arm, hand = {"start": 0, "end": 5}, {"start": 5, "end": 6}
    write_json(source.root / "meta/modality.json", {
        "state": {"arm": arm, "gripper": hand}, "action": {"gripper": hand, "arm": {**arm, "absolute": False}}})
    printed = convert(source, tmp_path / "out")
    assert "action 0 name delta_arm[0] kind change" in printed and "action 5 name gripper kind target" in printed
    assert re.search("^unused .*annotation_human_validity", printed, re.MULTILINE)
    texts = [episode["language_instruction"][0].decode() for episode in read_back(tmp_path / "out")]
    assert texts == TEXTS[1:]


def test_a_feature_with_faults_is_left_out_with_a_line(tmp_path):
    """Unless the robot acts by it."""
    source = Source(tmp_path, lengths=(9, 8), kinds={"front": "image"}, more={
        "observation.effort": lambda e, n: np.full((n, 2), np.nan if e else 1, np.float32),
        "observation.extrinsics": lambda e, n: np.zeros((n, 3, 3), np.float32),
        "notes": lambda e, n: np.full(n, "good")})
    source.info["features"].pop("notes")
    source.edit()
    printed = convert(source, tmp_path / "out")
    for key in ("observation.effort", "observation.extrinsics", "notes"):
        assert re.search(f"note: {key}.* left out", printed), printed
    assert {name for name in read_back(tmp_path / "out")[0] if name.startswith("observation")} == {
        "observation/state", "observation/front"}


def test_videos_with_more_frames_than_their_episodes(tmp_path):
    source = Source(tmp_path, "v2.1", (7, 9), {"front": "video"})
    path = source.root / "videos/chunk-000/observation.images.front/episode_000001.mp4"
    path.write_bytes(encode([*source.pictures("front", 1), *source.pictures("front", 0)], 10, "libx264"))
    printed = convert(source, tmp_path / "out")
    assert f"warning: 1 videos have more frames than their episodes, the first {path} (16, its episodes 9)" in printed


# ---- What actions mean -------------------------------------------------------------------------------------

XYZ = ["x", "y", "z", "roll", "pitch", "yaw"]


def walk(episode: int, length: int, low, high, width: int) -> np.ndarray:
    """Numbers that move slowly through a range, as a joint does."""
    phases = np.random.default_rng(episode).uniform(0, 6, width)
    wave = np.sin(np.arange(length)[:, None] / 9 + phases)
    return (low + (np.array(high) - low) * (wave + 1) / 2).astype(np.float32)


def grip(episode: int, length: int, opened=1.0, closed=0.0) -> np.ndarray:
    """One that opens and closes."""
    return np.where(np.arange(length)[:, None] // (9 + episode) % 2, opened, closed).astype(np.float32)


def steps_of(episode: int, length: int, width: int, size: float) -> np.ndarray:
    return np.random.default_rng(episode).normal(0, size, (length, width)).astype(np.float32)


ROBOTS = {  # name: (names, actions, the recipe)
    "so101": (SO101, lambda e, n: np.append(walk(e, n, -100, 100, 5), walk(e, n, 1, 99, 1), 1),
              "action[:5] target, action[5:] /100 clip target raw"),
    "so101, gripper hardly moves": (
        SO101, lambda e, n: np.append(walk(e, n, -100, 100, 5), walk(e, n, 1, 30, 1), 1),
        "action target"),
    "aloha, no names": (14, lambda e, n: walk(e, n, -1.5, 1.5, 14), "action target"),
    "aloha, names": ([f"{side}_{joint}" for side in ("left", "right") for joint in (
        "waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper")],
        lambda e, n: np.hstack([walk(e, n, -1.5, 1.5, 6), walk(e, n, 0, 1, 1)] * 2),
        "action[:6] target, action[6:7] clip target raw, action[7:13] target, action[13:] clip target raw"),
    "pose": ([*XYZ, "gripper"], lambda e, n: np.append(walk(e, n, 0.2, 0.7, 6), grip(e, n), 1),
             "action[:6] target, action[6:] clip target raw"),
    "steps": ([*XYZ, "gripper"], lambda e, n: np.append(steps_of(e, n, 6, 0.01), grip(e, n, 1, -1), 1),
              "action[:6] change, action[6:] target raw"),
    "steps, no names": (7, lambda e, n: np.append(steps_of(e, n, 6, 0.01), grip(e, n), 1),
                        "action[:6] change, action[6:] clip target raw"),
    "steps, 1 is closed": ([*XYZ, "close_gripper"],
                           lambda e, n: np.append(steps_of(e, n, 6, 0.01), grip(e, n, 1, -1), 1),
                           "action[:6] change, action[6:] /-1 target raw"),
    "deltas by name": ([f"delta_{axis}" for axis in XYZ], lambda e, n: walk(e, n, 0.1, 0.2, 6),
                       "action change"),
    "a base that drives": (["arm_shoulder_pan.pos", "arm_gripper_closed.pos", "x.vel", "theta.vel"],
                           lambda e, n: np.append(walk(e, n, 0, 100, 2), steps_of(e, n, 2, 1), 1),
                           "action[:1] target, action[1:2] /100 clip invert target raw, action[2:] change"),
}


def described(names: list[str] | int, *arguments) -> tuple[str, list]:
    """-> (the recipe's action, the dimensions)."""
    names = [f"action[{i}]" for i in range(names)] if isinstance(names, int) else names
    dimensions = converter.describe(names, *arguments)
    return field_list({"action": len(names)}, dimensions), dimensions


@pytest.mark.parametrize("robot", ROBOTS)
def test_actions_come_back_in_the_robots_own_units(robot):
    """Described, made standard, turned into tokens and back, and given to the robot."""
    names, make, expected = ROBOTS[robot]
    recorded = [make(episode, 120) for episode in range(4)]
    action, dimensions = described(names, recorded)
    assert action == expected
    recipe, every = Recipe(action=action), np.concatenate(recorded)
    columns = read_fields(recipe.action, {"action": every}, "", 0, len(every))
    standard = np.concatenate(columns, axis=1)
    _, raw, _ = action_masks(recipe, [column.shape[1] for column in columns])
    stats = {"min": standard.min(0), "max": standard.max(0), "mask": ~raw}
    tokenizer = ActionTokenizer(512)
    tokens = tokenizer.encode(normalize(standard, stats, "bounds"))
    _, to_robot, from_robot = undo(recipe, {"action": every.shape[1]}, stats)
    back = to_robot(unnormalize(tokenizer.decode(tokens), stats, "bounds"))
    np.testing.assert_allclose(to_robot(from_robot(back)), back, atol=1e-6)
    scales = np.array([dimension.scale for dimension in dimensions])
    half_bin = np.where(scales > 0, scales, np.ptp(every, axis=0) / 2) / 255
    assert (np.abs(back - every) <= 1.01 * half_bin + 1e-6).all()
    unknown = sum(dimension.scale > 0 and dimension.closed is None for dimension in dimensions)
    assert len(assumptions(dimensions)) == unknown


def test_the_user_knows_better():
    """A keyboard's steps of -1, 0 and 1 are no gripper; what is said holds for all but grippers."""
    keys = np.random.default_rng(0).integers(-1, 2, (200, 3)).astype(np.float32)
    action = np.append(keys, grip(0, 200), 1)
    assert described(4, [action])[0] == "action[:3] change, action[3:] clip target raw"
    joints = np.append(walk(0, 200, -1, 1, 3), grip(0, 200), 1)
    for said in ("target", "change"):
        names = ["x", "y", "z", "gripper"]
        assert described(names, [joints], None, said)[0] == f"action[:3] {said}, action[3:] clip target raw"


@pytest.mark.parametrize("name, kind", [
    ("joint_velocities_0", "velocity"), ("wrist.vx", "velocity"), ("wrist_yaw_rate", "velocity"),
    ("eef_dpos_x", "change"), ("waist.rel", "change"), ("rel_x", "change"), ("d_x", "change"),
    ("dx", "change"), ("shoulder_pan.pos", "target"), ("joint_0", "target"), ("x", None), ("base_vx", "velocity"),
    ("ee_quat_w", "target"), ("left_hand_finger_1", "target"), ("actions_effector_position[0]", "target"),
    ("v_x", "velocity"), ("angular.z", "velocity"), ("delta_joint_1", "change"), ("omega", "velocity"),
    ("base_linear", "velocity"), ("base_angular", "velocity"), ("base_pose_x", "target")])
def test_what_names_say(name, kind):
    assert kind_by_name(name) == kind


def test_held_out_episodes_alone_are_refused_at_once(tmp_path):
    source = Source(tmp_path, "v2.1", (12,) * 5, splits={"train": "0:4", "val": "4:5"})
    assert "--episodes 4: none of them is in the split train" in refused(source, tmp_path / "out", None, "4")


def test_fewer_frames_a_second():
    names = ["joint.pos", "delta_x", "x.vel", "gripper"]
    values = np.stack([np.arange(8), np.ones(8), np.arange(8), np.arange(8) % 2], axis=1).astype(np.float32)
    _, dimensions = described(names, [values])
    kinds = np.array([dimension.kind for dimension in dimensions])
    assert kinds.tolist() == ["target", "change", "velocity", "target"]
    slower = resample(values, kinds, converter.kept_frames(8, 3.0))  # 0, 3, 6, and 2 are left
    assert slower.tolist() == [[2, 3, 1, 0], [5, 3, 4, 1], [7, 2, 6.5, 1]]
    assert resample(values, kinds, np.arange(8)).tolist() == values.tolist()
    assert converter.kept_frames(8, 1.0).tolist() == [*range(8)]
    assert converter.kept_frames(10, 2.5).tolist() == [0, 2, 5, 8]  # 20 to 8 a second
    assert converter.frame_step(30.0, 10.0) == 3 and converter.frame_step(30.0, None) == 1


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.floats(1, 9), st.integers(0, 9))
def test_a_slower_recording_arrives_at_the_same_place(length, step, seed):
    """Changes and velocities cover the same way, targets end where the robot was sent last."""
    values = np.random.default_rng(seed).normal(size=(length, 3))
    frames = converter.kept_frames(length, step)
    slower = resample(values, np.array(["target", "change", "velocity"]), frames)
    ends = np.append(frames[1:], length)
    assert np.array_equal(slower[:, 0], values[ends - 1, 0])
    np.testing.assert_allclose(slower[:, 1].sum(), values[:, 1].sum(), atol=1e-9)
    np.testing.assert_allclose((slower[:, 2] * (ends - frames)).sum(), values[:, 2].sum(), atol=1e-9)


def test_a_command_shorter_than_a_written_frame_is_named(tmp_path):
    """A button that is pressed for one frame, and not the joint that moves on."""

    def action(episode: int, length: int) -> np.ndarray:
        pressed = np.isin(np.arange(length), [4, 10])[:, None]  # of 3 to 5, and 9 to 11
        return np.hstack([walk(episode, length, -90, 90, 5), 100 * pressed]).astype(np.float32)

    source = Source(tmp_path, lengths=(30, 31), kinds={"front": "image"}, fps=30, action=action)
    printed = convert(source, tmp_path / "out", "--fps", 10)
    (line,) = [line for line in printed.splitlines() if "shorter than" in line]
    assert re.match("warning: gripper.pos .* 4 .*--fps", line)
    assert "shorter than" not in convert(source, tmp_path / "all")


@pytest.mark.parametrize("values, lost", [
    ([0, 0, 0, 0, 1, 0, 0, 0, 0, 0, -1, -1], 1),  # + opens, - closes: 1 of the 2 commands
    ([0, 30, 60, 60, 60, 60, 60, 60, 60, 0, 0, 0], 0),  # goes far at once, and stays
    ([0, 0, 0, 0, 60, 60, 60, 0, 0, 0, 0, 0], 0),  # three frames, one of which is the last before the next
    ([0, 60, 0, 0, 0, 0, 0, 0, 60, 60, 60, 60], 1)])
def test_which_commands_are_lost(values, lost):
    values = np.array(values, np.float32)[:, None]
    dimension = Dimension("gripper", "target", 0, None, float(values.min()), float(values.max()))
    assert lost_commands(values, [dimension], np.arange(0, 12, 3)).tolist() == [lost]


# ---- From a recording to a robot that acts -----------------------------------------------------------------


def test_a_robot_that_nobody_has_seen(tmp_path, monkeypatch, capsys, plain_run):
    """Converted from v3.0 at 10 of 30 frames a second, inspected and trained without an edit."""
    monkeypatch.setattr(sys.modules[__name__], "SIZES", mobile.SIZES)
    source = Source(tmp_path, "v3.0", (60,) * 10, {"head": "video", "hand": "video"}, names=mobile.NAMES, fps=30,
                    width=11, action=mobile.actions, texts=mobile.TEXTS,
                    parts={"action": ("action", ALL), "observation.state": ("state", slice(3, 11))})
    config = tmp_path / "mobile.yaml"
    printed = convert(source, tmp_path / "out", "--fps", 10, "--yaml", config)
    assert "warning" not in printed and "assuming" not in printed, printed
    told = recipe_of(printed)
    assert told["datasets"] == {"my_robot": mobile.RECIPE}
    monkeypatch.setattr(sys, "argv", ["data.py", "--inspect", str(tmp_path / "out/my_robot"), "--out",
                                      str(tmp_path / "sheet.png")])
    inspect_data.main()
    inspected = capsys.readouterr().out
    assert recipe_of(inspected.partition("contact_sheet")[0]) == told and "warning" not in inspected
    done = plain_run(config, "--deepspeed_config", "ds_configs/cpu.json", "--set", "max_steps=1", "run_id=one",
                     f"run_root_dir={tmp_path}/runs", "num_workers=0")
    assert done.returncode == 0 and "warning: " not in done.text, done.text
    (subject,) = inspect_data.find_subjects(tmp_path / "out/my_robot", None, None)
    recorded = np.concatenate([episode["action"] for episode in read_back(tmp_path / "out")])
    assert np.array_equal(recorded[:20, 3:], source.action[0][2::3, 3:])
    mobile.check(act.load_vla(tmp_path / "runs/one"), subject.table(None, False), recorded)
    with pytest.raises(UserError, match=f"{config} exists"):
        converter.convert(source.root, tmp_path / "two", "my_robot", 64, None, None, None, 2, config)


@pytest.mark.parametrize("folder, mix", [("source", None), ("source", "source"), ("", "source")])
def test_a_lerobot_folder_is_sent_to_the_converter(tmp_path, folder, mix):
    source = Source(tmp_path, lengths=(2, 3), kinds={"front": "image"})
    with pytest.raises(UserError, match=rf"convert\.py --source {source.root} .*--name source --yaml source.yaml"):
        inspect_data.find_subjects(tmp_path / folder, mix, None)
    with pytest.raises(UserError, match=rf"convert\.py --source {source.root} "):
        oxe.read_recipes(TrainConfig(data_root_dir=str(tmp_path / folder), data_mix=mix or "bridge"))


@pytest.mark.slow
def test_so101_from_a_recording_to_acting(tmp_path):
    """Convert at 10 of 30 frames a second, inspect, train 200 steps on chunks of 8, act in degrees."""

    def action(episode: int, length: int) -> np.ndarray:
        time_ = np.arange(length)[:, None] / length
        joints = 80 * np.cos(np.pi * time_ * np.arange(1, 6))
        return np.append(joints, 100 * (time_ > 0.5), axis=1).astype(np.float32)

    source = Source(tmp_path, "v3.0", (90,) * 20, fps=30, action=action, texts=TEXTS[:1], codec="libsvtav1")
    printed = convert(source, tmp_path / "out", "--fps", 10)
    told = recipe_of(printed)
    assert told["datasets"]["my_robot"]["action"] == "action[:5] target, action[5:] /100 clip target raw"
    config = {**TINY, **told, "action_chunk": 8, "max_steps": 200, "run_id": "so101", "learning_rate": 3e-3,
              "log_interval": 50, "run_root_dir": str(tmp_path / "runs")}
    (tmp_path / "so101.yaml").write_text(yaml.safe_dump(config))
    inspected = subprocess.run(
        [sys.executable, "data.py", "--inspect", str(tmp_path / "out"), "--config",
         str(tmp_path / "so101.yaml"), "--out", str(tmp_path / "sheet.png")], cwd=ROOT, text=True,
        capture_output=True)
    assert "frames 600 frames_per_episode 30..30" in inspected.stdout, inspected.stdout + inspected.stderr
    done = launch(tmp_path / "so101.yaml", "--deepspeed_config", "ds_configs/cpu.json", launcher="python")
    assert done.returncode == 0, done.text
    metrics = read_metrics(tmp_path / "runs")

    policy = act.load_vla(tmp_path / "runs/so101")
    assert policy.convention(None).action == SO101
    errors, constant = [], []
    for episode in read_back(tmp_path / "out")[-1:]:
        for frame in range(0, 22, 3):
            images = {camera: episode[f"observation/{key}"][frame]
                      for camera, key in (("primary", "front"), ("wrist", "wrist"))}
            predicted = policy.predict_action(images, TEXTS[0], proprio=episode["observation/state"][frame])
            wanted = source.action[19][3 * frame + 2 : 3 * frame + 26 : 3]  # the last before the next frame
            errors.append(np.abs(predicted - wanted).mean(0))
            constant.append(np.abs(np.median(source.action[19], axis=0) - wanted).mean(0))
    errors, constant = np.mean(errors, axis=0), np.mean(constant, axis=0)
    print(f"\nso101 loss {metrics[50]['loss']:.3f} .. {metrics[200]['loss']:.3f} degrees_off "
          f"{errors[:5].round(1)} of_always_the_median {constant[:5].round(1)} gripper_percent_off "
          f"{errors[5]:.1f} of_always_the_median {constant[5]:.1f}")
    print(printed, inspected.stdout, sep="")
    assert errors[:5].mean() < 0.5 * constant[:5].mean() and errors[5] < 25
