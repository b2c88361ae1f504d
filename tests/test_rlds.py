"""Reading, indexing and writing the RLDS format."""

import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import psutil
import pytest
import tensorflow_datasets as tfds
from conftest import RLDS, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from machinery import oxe
from machinery.config import Recipe
from machinery.frames import (
    TABLE_VERSION,
    DataError,
    FrameTable,
    find_dataset,
    frame_table,
    quantile,
)
from machinery.images import decode_native
from machinery.inspect_data import guess_recipe
from machinery.rlds import (
    Steps,
    build_frame_table,
    masked_crc,
    read_records,
    step_features,
    write_rlds,
)

DEMO = ROOT / "datasets/metaworld_demo/1.0.0"
F = tfds.features
FEATURES = {
    "steps": F.Dataset({
        "observation": {"image": F.Image(shape=(None, None, 3), encoding_format="png"),
                        "wrist": F.Image(shape=(None, None, 3), encoding_format="jpeg"),
                        "state": F.Tensor(shape=(3,), dtype=np.float32)},
        "action": F.Tensor(shape=(7,), dtype=np.float64), "gripper": np.float32, "count": np.int64,
        "language_instruction": F.Text(), "is_first": np.bool_,
    }),
    "episode_metadata": {"seed": np.int64},
}


def make_episode(seed: int, length: int = 5, text: str = "pick up the cup") -> dict:
    rng = np.random.default_rng(seed)
    steps = [{
        "observation": {"image": rng.integers(0, 256, (12, 16, 3), dtype=np.uint8),
                        "wrist": rng.integers(0, 256, (8, 8, 3), dtype=np.uint8),
                        "state": rng.standard_normal(3).astype(np.float32)},
        "action": rng.uniform(-1, 1, 7), "gripper": np.float32(rng.random()),
        "count": int(rng.integers(-9, 1 << 40)), "language_instruction": text, "is_first": i == 0,
    } for i in range(length)]
    return {"steps": steps, "episode_metadata": {"seed": seed}}


@pytest.fixture
def written(tmp_path) -> Path:
    """A dataset of five shards in train and one in val."""
    return write_rlds(tmp_path / "data", "robot", "1.2.0", FEATURES,
                      {"train": [make_episode(i) for i in range(9)], "val": [make_episode(100, 3, "ü ☕")]},
                      shard_bytes=12_000)


def open_table(directory: Path, index_dir: Path | None = None, **options) -> FrameTable:
    recipe = Recipe(primary="image", wrist="wrist")
    return frame_table(directory, recipe, ["image", "wrist"], True, index_dir=index_dir, **options)


def all_steps(directory: Path) -> list[Steps]:
    features = step_features(directory)
    return [Steps(data, offset, features) for file in sorted(directory.glob("*.tfrecord*"))
            for offset, data in read_records(file)]


# ------------------------------------------------------------------------------------------------------------
# TensorFlow reads what we write, and we read what TensorFlow reads


@pytest.mark.parametrize("which", ["committed", "written"])
def test_tensorflow_reads_the_same(which, request):
    directory = DEMO if which == "committed" else request.getfixturevalue("written")
    builder = tfds.builder_from_directory(directory)
    ours = iter(all_steps(directory))
    features = {key: feature for key, feature in step_features(directory).items() if feature.of_step}
    keys, images = list(features), [key for key, feature in features.items() if feature.kind == "Image"]
    decoders = {"steps": {"observation": {k.split("/")[1]: tfds.decode.SkipDecoding() for k in images}}}
    episodes = 0
    for split in builder.info.splits:  # alphabetical, like the files
        dataset = builder.as_dataset(split=split, shuffle_files=False, decoders=decoders)
        for theirs in tfds.as_numpy(dataset):
            steps, episodes = next(ours), episodes + 1
            theirs = list(theirs["steps"])
            for key in keys:
                flat = [{**step, **{f"observation/{k}": v for k, v in step["observation"].items()}}
                        for step in theirs]
                values = [step[key] for step in flat]
                if key in images:
                    mine = [steps.data[start - steps.offset :][:size] for start, size in steps.spans(key)]
                else:
                    mine = steps[key]
                assert len(mine) == len(values) > 0
                for a, b in zip(mine, values, strict=True):
                    assert np.array_equal(a, b), key
                    assert isinstance(a, bytes) or a.dtype == np.asarray(b).dtype, key
    assert next(ours, None) is None and episodes == sum(s.num_examples for s in builder.info.splits.values())


def test_written_values_come_back(written):
    assert [p.name for p in sorted(written.glob("*.tfrecord*"))] == [
        *(f"robot-train.tfrecord-0000{i}-of-00005" for i in range(5)), "robot-val.tfrecord-00000-of-00001"]
    steps = all_steps(written)[0]
    expected = make_episode(0)["steps"]
    np.testing.assert_array_equal(steps["action"], np.float32([step["action"] for step in expected]))
    assert steps["action"].dtype == np.float64  # declared so, although tf.train.Example keeps float32
    np.testing.assert_array_equal(steps["count"], [step["count"] for step in expected])
    assert steps["language_instruction"] == [b"pick up the cup"] * 5


def test_the_core_never_imports_tensorflow(tmp_path):
    """As if TensorFlow were not installed: import everything, index a dataset, write one."""
    code = f"""
import sys
from importlib.machinery import PathFinder
from pathlib import Path

class NoTensorFlow(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] == "tensorflow" else super().find_spec(name, path, target)

sys.meta_path = [NoTensorFlow if finder is PathFinder else finder for finder in sys.meta_path]
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]
import eval_vla, export_vla, serve_vla, train_vla
from machinery import inspect_data, rlds
import test_rlds
episodes = {{"train": [test_rlds.make_episode(0)]}}
path = rlds.write_rlds(Path({str(tmp_path)!r}), "robot", "1.0.0", test_rlds.FEATURES, episodes)
(subject,) = inspect_data.find_subjects(path, None, None)
inspect_data.inspect_dataset(subject, None, Path({str(tmp_path / 'sheet.png')!r}))
assert "tensorflow" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "frames 5" in done.stdout and (tmp_path / "sheet.png").exists()


# ------------------------------------------------------------------------------------------------------------
# The frame table


def test_table_holds_every_frame(written, tmp_path):
    table = open_table(written, tmp_path / "index")
    assert table.splits == ["train", "val"] and len(table.frames) == 9 * 5 + 3
    assert table.statistics["num_transitions"] == 48 and table.statistics["num_trajectories"] == 10
    row = 0
    for seed, length in [*((i, 5) for i in range(9)), (100, 3)]:
        for step in make_episode(seed, length)["steps"]:
            frame = table.frames[row]
            np.testing.assert_array_equal(frame["action"], np.float32(step["action"]))
            np.testing.assert_array_equal(frame["proprio"], step["observation"]["state"])
            png = table.read_image(row, 0)
            assert png.startswith(b"\x89PNG") and table.read_image(row, 1).startswith(b"\xff\xd8")
            row += 1
    assert table.instructions == ["pick up the cup", "ü ☕"]
    assert table.frames["instruction"][-1] == 1


def test_bytes_per_frame(tmp_path):
    recipe = oxe.DATASETS["bridge_orig"]
    directory = find_dataset(RLDS / "data", "bridge_orig")
    table = frame_table(directory, recipe, ["image_0"], False, index_dir=str(tmp_path))
    assert table.frames.dtype.itemsize == 44


def test_a_table_of_many_frames_stays_small(commands):
    """All files of the index together; bench/many_frames.py also times opening two million frames."""
    ((status, text),) = commands(("", {}, "bench/many_frames.py", ["--frames", "80000"]))
    assert status == 0 and "open frames 80000" in text, text
    assert float(re.search(r"per_frame (\S+)", text)[1]) <= 64


TABLES = json.loads((ROOT / "tests/frame_tables.json").read_text())  # {version: {dataset: SHA-256}}


def table_digest(name: str, path: Path) -> str:
    """SHA-256 of all numbers and texts in a dataset's frame table, which is made at `path`."""
    if name == "metaworld_demo":
        directory, recipe = DEMO, Recipe(primary="image")
    else:
        directory, recipe = find_dataset(RLDS / "data", name), oxe.DATASETS[name]
    cameras = recipe.camera_keys([*recipe.camera_names])
    build_frame_table(directory, path, recipe, cameras, name != "metaworld_demo", False, {})
    facts = json.loads((path / "table.json").read_text())
    del facts["unused"]  # only printed
    hashed = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    hashed.update((path / "frames.bin").read_bytes())
    hashed.update(np.load(path / "episodes.npy").tobytes())
    return hashed.hexdigest()


@pytest.mark.parametrize("name", ["metaworld_demo", "bridge_orig", "droid", "kuka", "language_table", "viola",
                                  "furniture_bench_dataset_converted_externally_to_rlds"])
def test_a_table_with_other_contents_has_another_version(name, tmp_path):
    """If this fails, old tables would be used that the code would now make otherwise. Increase
    frames.TABLE_VERSION and add its digests (from table_digest) to frame_tables.json."""
    assert table_digest(name, tmp_path / "table") == TABLES[str(TABLE_VERSION)][name]


def test_a_word_changed_in_the_code_indexes_nothing_again(written, tmp_path):
    index_dir = tmp_path / "index"
    table = open_table(written, index_dir)
    shutil.copytree(ROOT / "machinery", tmp_path / "copy/machinery")
    shutil.copytree(ROOT / "configs", tmp_path / "copy/configs")
    shutil.copy(ROOT / "action_tokenizer.py", tmp_path / "copy")
    for name in ("survey", "rlds", "recipes", "fields"):
        file = tmp_path / f"copy/machinery/{name}.py"
        file.write_text(file.read_text().replace("never", "at no time") + "\n")
    code = (f"import sys; sys.path[:0] = [{str(tmp_path / 'copy')!r}]\n"
            "from pathlib import Path\nfrom machinery import frames, survey\n"
            "from machinery.config import Recipe\n"
            f"table = frames.frame_table(Path({str(written)!r}), Recipe(primary='image', wrist='wrist'), "
            f"['image', 'wrist'], True, index_dir={str(index_dir)!r})\nprint(survey.__file__, table.path)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.split() == [str(tmp_path / "copy/machinery/survey.py"), str(table.path)], done.stderr
    assert len(list(index_dir.rglob("table.json"))) == 1


def test_a_stale_table_is_never_used(written, tmp_path):
    first = open_table(written, tmp_path / "index")
    assert open_table(written, tmp_path / "index").path == first.path
    assert open_table(written, tmp_path / "index", skip_bad_episodes=True).path != first.path
    shard = next(iter(sorted(written.glob("*train*"))))
    os.utime(shard, ns=(1, 1))
    assert open_table(written, tmp_path / "index").path != first.path


def test_many_processes_build_one_table(written, tmp_path, commands):
    script = tmp_path / "open.py"
    script.write_text(
        "from pathlib import Path; import test_rlds\n"
        f"table = test_rlds.open_table(Path({str(written)!r}), Path({str(tmp_path / 'index')!r}))\n"
        "print(table.path, table.path.stat().st_ctime_ns, len(table.frames))")
    done = commands(*(("", {}, script, []) for _ in range(4)))
    assert all(status == 0 for status, _ in done) and len({text for _, text in done}) == 1, done
    assert not list((tmp_path / "index").rglob("*.tmp"))


def test_a_moved_dataset_is_read_where_it_is(written, tmp_path):
    """Its table goes with it, and something else may stand in its old place by now."""
    before = open_table(written)
    moved = tmp_path / "elsewhere/robot/1.2.0"
    moved.parent.mkdir(parents=True)
    written.rename(moved)
    write_rlds(tmp_path / "data", "robot", "1.2.0", FEATURES, {"train": [make_episode(50)]})
    after = open_table(moved)
    assert after.path.name == before.path.name and after.directory == moved
    first = next(iter(all_steps(moved)))
    (offset, length), *_ = first.spans("observation/image").tolist()
    assert after.read_image(0, 0) == sorted(moved.glob("*.tfrecord*"))[0].read_bytes()[offset:][:length]


def test_a_killed_index_stops_nobody(written, tmp_path):
    """Its workers must not go on, holding what others wait for. A file that is a pipe keeps them busy."""
    shard = sorted(written.glob("*train*"))[0]
    data, index = shard.read_bytes(), tmp_path / "index"
    shard.unlink()
    os.mkfifo(shard)
    code = (f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
            f"from pathlib import Path; import test_rlds\n"
            f"test_rlds.open_table(Path({str(written)!r}), Path({str(index)!r}))")
    builder = subprocess.Popen([sys.executable, "-c", code])
    while not list(index.rglob("frames.bin")):
        assert builder.poll() is None
        time.sleep(0.05)
    time.sleep(0.5)  # its workers are under way
    workers = psutil.Process(builder.pid).children(recursive=True)
    assert len(workers) > 1
    builder.kill()
    builder.wait()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive
    second = subprocess.Popen([sys.executable, "-c", code])
    shard.write_bytes(data)  # waits for a reader
    assert second.wait(60) == 0
    assert not list(index.rglob("*.tmp")) and list(index.rglob("table.json"))


def test_a_file_that_shrank_is_no_black_image(written, tmp_path):
    table = open_table(written, tmp_path / "index")
    shard = written / table.shards[0]
    os.truncate(shard, 100)
    with pytest.raises(DataError, match="shorter than"):
        table.read_image(0, 0)


@settings(max_examples=200)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=300), st.sampled_from([0.01, 0.5, 0.99]))
def test_quantile_agrees_with_numpy(values, q):
    values = np.array(values, np.float32)[:, None]
    exact = np.quantile(values.astype(np.float64), q, axis=0)
    np.testing.assert_allclose(quantile(values, q), exact, atol=1e-6 * np.abs(values).max())


# ------------------------------------------------------------------------------------------------------------
# Damage is found and named


def damage(path: Path, position: int, value: bytes | None = None) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0xFF
    path.write_bytes(data)


def second_record(path: Path) -> int:
    return 16 + struct.unpack("<Q", path.read_bytes()[:8])[0]


@pytest.mark.parametrize("what, message", [
    ("header", "record 1: damaged header at byte"),
    ("payload", "record 1: .*checksum"),
    ("truncated", "record 1: .*cut short"),
    ("truncated_header", "record 1: damaged header"),
    ("lost_record", "has 1 records, but 2 .*dataset_info.json"),
    ("missing", "No such file"),
])
def test_damaged_shards_are_named(written, tmp_path, what, message):
    shard = sorted(written.glob("*train*"))[1]
    start = second_record(shard)
    match what:
        case "header":
            damage(shard, start)
        case "payload":
            damage(shard, start + 40)
        case "truncated":
            shard.write_bytes(shard.read_bytes()[:-9])
        case "truncated_header":
            shard.write_bytes(shard.read_bytes()[: start + 5])
        case "lost_record":
            shard.write_bytes(shard.read_bytes()[:start])
        case "missing":
            shard.unlink()
    with pytest.raises(DataError, match=message) as error:
        open_table(written, tmp_path / "index")
    assert shard.name in str(error.value)
    left = [p for p in (tmp_path / "index").rglob("*") if p.is_dir() and p.name != "robot"]
    assert not left  # nothing half-written


@pytest.mark.parametrize("key", ["action", "proprio"])
def test_bad_episodes_stop_the_index_or_are_counted(key, tmp_path):
    bad = make_episode(3)
    step = bad["steps"][2]
    (step["action"] if key == "action" else step["observation"]["state"])[1] = np.nan
    episodes = {"train": [make_episode(0), bad, make_episode(1)]}
    directory = write_rlds(tmp_path, "robot", "1.0.0", FEATURES, episodes)
    with pytest.raises(DataError, match=f"robot-train.*record 1: its {key} is not finite.*skip_bad"):
        open_table(directory, tmp_path / "index")
    table = open_table(directory, tmp_path / "index", skip_bad_episodes=True)
    assert len(table.frames) == 10 and len(table.bad) == 1 and "record 1" in table.bad[0]


def test_an_instruction_that_is_no_utf8_is_a_bad_episode(tmp_path):
    bad = make_episode(3, text=b"caf\xe9")
    directory = write_rlds(tmp_path, "robot", "1.0.0", FEATURES, {"train": [make_episode(0), bad]})
    with pytest.raises(DataError, match=r"robot-train.*record 1: 'utf-8' codec"):
        open_table(directory, tmp_path / "index")
    assert len(open_table(directory, tmp_path / "index", skip_bad_episodes=True).bad) == 1
    directory = write_rlds(tmp_path, "robot", "1.0.1", FEATURES, {"train": [bad]})
    with pytest.raises(DataError, match=r"no usable frame .*'utf-8' codec"):
        open_table(directory, tmp_path / "index", skip_bad_episodes=True)


def test_depth_images(tmp_path):
    """Sixteen bits are kept; seen as a camera they are the upper eight, as TensorFlow's decode_image."""
    image = F.Image(shape=(4, 4, 1), dtype=np.uint16, encoding_format="png")
    features = {"steps": F.Dataset({"depth": image})}
    depth = np.arange(0, 16000, 1000, dtype=np.uint16).reshape(4, 4, 1)
    directory = write_rlds(tmp_path, "robot", "1.0.0", features, {"train": [{"steps": [{"depth": depth}]}]})
    (steps,) = all_steps(directory)
    (image,) = steps["depth"]
    assert (decode_native(image) == depth >> 8).all()
    with pytest.raises(ValueError, match=r"shape \(5, 4, 1\).* \(4, 4, 1\)"):
        write_rlds(tmp_path, "robot", "1.0.1", features,
                   {"train": [{"steps": [{"depth": np.zeros((5, 4, 1), np.uint16)}]}]})


def test_a_missing_camera_is_named(written, tmp_path):
    recipe = Recipe(primary="image_9")
    with pytest.raises(DataError, match=r"robot/1.2.0: its steps have no 'observation/image_9'.*wrist"):
        frame_table(written, recipe, ["image_9"], False, index_dir=tmp_path / "index")


def test_not_a_dataset(tmp_path):
    with pytest.raises(DataError, match="no TFDS dataset there"):
        find_dataset(tmp_path, "bridge_orig")


def test_writing_leaves_nothing_half_done(tmp_path):
    def episodes():
        yield make_episode(0)
        raise RuntimeError("the robot fell over")

    with pytest.raises(RuntimeError, match="fell over"):
        write_rlds(tmp_path, "robot", "1.0.0", FEATURES, {"train": episodes()})
    assert not any((tmp_path / "robot").iterdir())
    write_rlds(tmp_path, "robot", "1.0.0", FEATURES, {"train": [make_episode(0)]})
    with pytest.raises(FileExistsError, match="another version"):
        write_rlds(tmp_path, "robot", "1.0.0", FEATURES, {"train": [make_episode(0)]})
    with pytest.raises(ValueError, match="has no episodes"):
        write_rlds(tmp_path, "robot", "1.0.1", FEATURES, {"train": []})


def test_the_newest_version_is_found(tmp_path):
    for version in ("1.0.0", "1.10.0", "1.9.0"):
        write_rlds(tmp_path, "robot", version, FEATURES, {"train": [make_episode(0)]})
    assert find_dataset(tmp_path, "robot").name == "1.10.0"
    assert find_dataset(tmp_path, "robot:1.9.0").name == "1.9.0"
    newest = find_dataset(tmp_path, "robot")
    assert guess_recipe(newest).primary == "image"


def test_crc_is_that_of_tfrecord():
    # the first record's length field in a file written by TensorFlow
    header = next((RLDS / "data").rglob("*.tfrecord*")).open("rb").read(12)
    assert masked_crc(header[:8]) == struct.unpack("<I", header[8:])[0]
    assert masked_crc(b"") != zlib.crc32(b"")


@pytest.fixture(autouse=True)
def no_tables_beside_the_fixtures():
    yield
    for folder in (RLDS / "data").rglob(".frame_table"):
        shutil.rmtree(folder)
