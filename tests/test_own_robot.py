"""A robot of one's own, where OpenVLA has no rule: its data are right, or refused by name."""

import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import tensorflow_datasets as tfds
import yaml
from conftest import RLDS, ROOT, TINY, open_mixture
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from act import Policy, load_vla
from action_tokenizer import load_tokenizer, unnormalize
from data import Mixture
from machinery import oxe
from machinery.config import Recipe, TrainConfig, UserError, load_config
from machinery.convention import convention, recorded
from machinery.fields import check_recipe
from machinery.frames import DataError, FrameTable, find_dataset
from machinery.images import decode_native
from machinery.inspect_data import draw, find_subjects
from machinery.recipes import Feature, action_masks, standardize
from machinery.rlds import build_frame_table, statistics, write_rlds
from machinery.survey import round_trip, survey
from machinery.wire import parse_request
from model import VLA

pytestmark = pytest.mark.usefixtures("index_here")
F = tfds.features
PNG, JPEG = (F.Image(shape=(None, None, 3), encoding_format=kind) for kind in ("png", "jpeg"))
GRAY = np.full((16, 16, 3), 128, np.uint8)
TOKENIZER = load_tokenizer(TINY["tokenizer"], True)


def write_arm(root: Path, actions: list[np.ndarray], name: str = "arm", split: str = "train",
              version: str = "1.0.0", observation=(), step=(), episode=()) -> Path:
    """A dataset with actions (T, A), one for each episode, a gray picture `image` and the text "open".

    observation, step, episode: {key: (feature, value)} instead or in addition, None to leave it out; a value
    may be a function of the episode's and the step's number."""
    kind = F.Tensor(shape=actions[0].shape[1:], dtype=np.float32)
    of_step = {"action": (kind, lambda e, t: np.float32(actions[e][t])), **dict(step)}
    of_step = {"language_instruction": (F.Text(), "open"), **of_step}
    of_step = {key: entry for key, entry in of_step.items() if entry}
    seen = {"image": (PNG, GRAY), **dict(observation)}
    seen = {key: entry for key, entry in seen.items() if entry}

    def kinds(entries) -> dict:
        return {key: feature for key, (feature, _) in dict(entries).items()}

    def values(entries, *where) -> dict:
        return {key: value(*where) if callable(value) else value
                for key, (_, value) in dict(entries).items()}

    features = {"steps": F.Dataset({**({"observation": kinds(seen)} if seen else {}), **kinds(of_step)}),
                **kinds(episode)}
    episodes = [{"steps": [{**({"observation": values(seen, e, t)} if seen else {}), **values(of_step, e, t)}
                           for t in range(len(rows))], **values(episode, e)}
                for e, rows in enumerate(actions)]
    return write_rlds(root, name, version, features, {split: episodes})


def random_actions(dims: int, episodes: int = 4, steps: int = 8) -> list[np.ndarray]:
    return list(np.random.RandomState(dims).randn(episodes, steps, dims))


@pytest.fixture
def opened(data_config, tmp_path):
    """Open datasets of tmp_path as a YAML's `datasets:` describes them -> Mixture."""

    def make(recipe=(), data_mix="arm", datasets=None, tokenizer=TOKENIZER, **changes) -> Mixture:
        own = datasets or {"arm": {"primary": "image", **dict(recipe)}}
        values = {"data_root_dir": str(tmp_path), "data_mix": data_mix, "datasets": own, "image_size": 28}
        return open_mixture(data_config(**values | changes), tokenizer)

    return make


def index(directory: Path, recipe: Recipe | None = None, load_proprio: bool = False, skip_bad: bool = False
          ) -> FrameTable:
    """What rlds.py does, in this process: to start another takes a second."""
    recipe = recipe or Recipe(primary="image")
    keys, path = recipe.camera_keys([*recipe.camera_names]), directory / "table"
    build_frame_table(directory, path, recipe, keys, load_proprio, skip_bad, {})
    return FrameTable(path, directory)


# ------------------------------------------------------------------------------------------------------------
# 1. Actions come back


DRAW = np.random.RandomState(0)
N = 3000
OPEN_OR_CLOSED = DRAW.randint(0, 2, N)


def rare(value: float, every: int) -> np.ndarray:
    return np.where(np.arange(N) % every == 7, value, 0.0)


class Episode(dict):
    """An episode's features, as rlds.Steps gives them."""

    def __init__(self, features: dict[str, np.ndarray]):
        length = len(next(iter(features.values())))
        super().__init__(features, language_instruction=[b"open"] * length)
        self.features = {"language_instruction": Feature((), np.dtype(object), "Text")}


def standard_form(actions: np.ndarray, recipe: Recipe) -> dict:
    """What a recipe makes of an episode that has nothing but actions."""

    return standardize(Episode({"action": np.float32(actions)}), recipe, [], False)


def as_table(actions: np.ndarray, lengths: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Actions of episodes of these lengths -> (frames, episodes) as a frame table has them."""
    frames = np.zeros(len(actions), [("action", "<f4", actions.shape[1:])])
    frames["action"] = actions
    episodes = np.zeros(len(lengths), [("first", "<i8"), ("count", "<u4")])
    episodes["count"], episodes["first"] = lengths, np.cumsum(lengths) - lengths
    return frames, episodes


def noise(episode: int, step: int) -> np.ndarray:
    return np.random.RandomState(100 * episode + step).randint(0, 256, (16, 16, 3)).astype(np.uint8)


def notes(mixture: Mixture) -> list[str]:
    """Findings about numbers and words that a training's log warns of."""
    cfg = mixture.cfg
    found = survey(mixture.tables[0], cfg.action_normalization, cfg.action_chunk)
    pictures = ("held_out_seen", "episode_twice", "camera_hung", "equal_cameras", "blank")
    return [str(finding) for finding in found if finding.severity == "high" and finding.kind not in pictures]


def test_training_and_inspecting_say_so(opened, commands, plain_run, tiny, tmp_path):
    """A dimension that moves in less than 1 % of the frames is trained as -1 or 1 and never moves again;
    `normal` cuts off a third of every Gaussian."""
    draw = np.random.RandomState(0)
    rows = np.array([np.r_[draw.randn(5), 0.5 if t % 300 == 7 else 0.0, t % 2] for t in range(1200)])
    directory = write_arm(tmp_path, list(rows.reshape(60, 20, 7)), observation={"image": (PNG, noise)})
    done = plain_run(tiny(data_root_dir=str(tmp_path), data_mix="arm", datasets={"arm": {"primary": "image"}},
                          max_steps=1, save_interval=0, eval_samples=16), "--deepspeed_config",
                     "ds_configs/cpu.json")
    assert done.returncode == 0, done.text
    arguments = ["--inspect", directory, "--out", tmp_path / "sheet.png"]
    ((status, seen),) = commands(("", {}, "data.py", arguments))
    assert status == 0, seen
    for text in (done.text, seen):
        assert sum("warning" in line and "dimension" in line for line in text.splitlines()) == 1, text
        assert any("warning" in line and "dimension 5" in line for line in text.splitlines())

    for kind, most in (("bounds_q99", 0.05), ("bounds", 0.0), ("normal", 1.0)):
        mixture = opened(action_normalization=kind)
        frames = np.arange(1000)
        recorded_ = mixture.tables[0].frames["action"][frames]
        tokens = mixture.action_tokenizer
        stats = mixture.statistics["arm"]["action"]
        back = unnormalize(tokens.decode(tokens.encode(mixture.actions(0, frames)[:, 0])), stats, kind)
        lost = (np.abs(back - recorded_)[:, :6] > 0.05).mean()
        warned = [line for line in notes(mixture) if f"{kind!r} clips" in line]
        assert lost <= most and (lost > 0.1) == bool(warned), (kind, lost, notes(mixture))


# ------------------------------------------------------------------------------------------------------------
# 2. Target or change, normalized or raw


def joints(speed: float = 0.3) -> list[np.ndarray]:
    """40 episodes of 14 absolute joint angles in radians, each in a range of its own."""
    joint, time = np.arange(14), np.arange(8)[:, None]
    return [(joint - 6.5) / 4.5 + np.sin(0.3 * e + speed * time + joint) for e in range(40)]


@pytest.mark.parametrize("recipe", [
    {"action": "action target"}, {"absolute": 0, "targets": 14},
    {"action": "action[:3] target, action[3:] target"}])
def test_absolute_joints_in_chunks(recipe, opened, tmp_path):
    write_arm(tmp_path, joints())
    mixture = opened(recipe, action_chunk=5)
    assert (np.abs(mixture.actions(0, np.arange(320))) > 1).mean() < 0.05
    chunk = mixture.actions(0, np.array([7]))[0]  # the last frame of an episode, and four steps past its end
    np.testing.assert_allclose(chunk[1:], chunk[:1].repeat(4, 0))
    assert np.ptp(chunk[0]) > 0.1 and not notes(mixture)
    before = mixture.actions(0, np.array([5]))[0]
    np.testing.assert_array_equal(before[2:], chunk[:1].repeat(3, 0))


@pytest.mark.parametrize("speed, named", [(0.05, range(14)), (0.3, [0, 13])])
def test_absolute_joints_said_to_be_changes_are_warned_of(speed, named, opened, tmp_path):
    write_arm(tmp_path, joints(speed))
    mixture = opened({"absolute": 0}, action_chunk=5)
    assert (mixture.actions(0, np.array([7]))[0, 1:] == 0).all()
    (line,) = [line for line in notes(mixture) if "like targets" in line]
    spans = re.findall(r"(\d+)(?:-(\d+))?", line.partition("like")[0])  # 0-2, 7
    assert {*named} <= {joint for first, last in spans for joint in range(int(first), int(last or first) + 1)}
    assert not notes(opened({"absolute": 0}))  # one action at a time: there is nothing past the end


@pytest.mark.parametrize("changes", [True, False])
def test_held_velocities_are_no_places(changes, opened, tmp_path):
    """Smooth, both: a velocity that is held for long, with what the arm did of it, noisily; and places on a
    circle, which the arm is late to reach, so that the change of its y is like their x."""
    random = np.random.RandomState(3)
    phase = [0.1 * np.arange(80)[:, None] - np.pi / 2 * np.arange(2) + e for e in range(20)]
    if changes:
        actions = [np.clip(4 * np.sin(angle), -1, 1) for angle in phase]
        states = [np.cumsum(rows + 0.3 * random.randn(*rows.shape), 0) - rows for rows in actions]
    else:
        actions, states = [np.cos(angle) for angle in phase], [np.cos(angle - 0.5) for angle in phase]
    write_arm(tmp_path, actions, observation={
        "state": (F.Tensor(shape=(2,), dtype=np.float32), lambda e, t: np.float32(states[e][t]))})
    mixture = opened({"action": "action", "state": "state", "absolute": 0}, action_chunk=4, use_proprio=True)
    assert ["dimensions 0-1: look" in line for line in notes(mixture)] == [True] * (not changes)


@pytest.mark.parametrize("action, target, raw", [
    ("action[:2], action[2:5] target, action[5:6] target raw, action[6:]", "..tttt.", ".....r."),
    ("action[:1] target raw, action[1:]", "t......", "r......"),
    ("action[:3] raw, action[3:] target", "...tttt", "rrr...."),
    ("action", "......t", "......r"),  # as OpenVLA: a gripper at the end
])
def test_labels_past_the_end(action, target, raw, opened, tmp_path):
    actions = list(np.random.RandomState(1).uniform(-1, 1, (4, 6, 7)))
    write_arm(tmp_path, actions)
    mixture = opened({"action": action}, action_chunk=3)
    is_target, is_raw = np.array([*target]) == "t", np.array([*raw]) == "r"
    np.testing.assert_array_equal(mixture.statistics["arm"]["action"]["mask"], ~is_raw)
    for last in (5, 11):
        chunk = mixture.actions(0, np.array([last - 1]))[0]
        np.testing.assert_array_equal(chunk[2], np.where(is_target, chunk[1], 0))
        assert (chunk[1] != 0).all()
        np.testing.assert_array_equal(chunk[1][is_raw], np.float32(actions[last // 6][-1])[is_raw])


@pytest.mark.parametrize("normalized, absolute, recipe", [  # as OpenVLA's masks are called
    ("ttttttf", "fffffft", {}), ("ttttttf", "fffffft", {"absolute": 1}),
    ("tttttttf", "tttttttt", {"absolute": 1, "targets": 8}),  # its JOINT_POS
    ("tttttttfttttttttf", "fffffffttttttttttt"[:17], None),
    ("tttttt", "ffffff", {"absolute": 0}), ("fft", "tft", {"action": "a target raw, b raw, c target"}),
    ("ttttttf", "fffffft", {"action": "a[:6], b target raw"}),
])
def test_openvlas_two_masks_map_one_to_one(normalized, absolute, recipe):
    normalized, absolute = (np.array([letter == "t" for letter in mask]) for mask in (normalized, absolute))
    if recipe is None:  # any two masks: a field for each dimension
        words = [" target" * int(a) + " raw" * int(not n) for n, a in zip(normalized, absolute, strict=True)]
        recipe = {"action": ", ".join(f"joint_{i}{word}" for i, word in enumerate(words))}
    fields = Recipe(**recipe).action.split(",")
    widths = [len(normalized)] if len(fields) == 1 else [len(normalized) - len(fields) + 1]
    target, raw, _ = action_masks(Recipe(**recipe), widths + [1] * (len(fields) - 1))
    np.testing.assert_array_equal(target, absolute)
    np.testing.assert_array_equal(~raw, normalized)


@pytest.mark.parametrize("recipe, message", [
    ({"action": "a target, b", "absolute": 1}, "arm: remove absolute and targets"),
    ({"action": "a raw, b", "targets": 1}, "arm: remove absolute and targets"),
    ({"state": "joints target"}, "arm: state: remove target and raw"),
    ({"action": "a tarjet"}, "unknown helper 'tarjet'; did you mean 'target'?"),
    ({"action": "a *0"}, r"unknown helper '\*0'"), ({"action": "a / 255"}, "unknown helper '/'"),
])
def test_words_that_contradict_each_other(recipe, message):
    with pytest.raises(UserError, match=message):
        check_recipe("arm", Recipe(**recipe))


# ------------------------------------------------------------------------------------------------------------
# 3. Actions leave in the convention in which they came


def apply_and_undo(recipe: str, features: dict[str, np.ndarray]) -> tuple:
    """Recorded features {name: (T, k)} -> (standard actions, what the robot gets of them, its labels)."""

    recipe = Recipe(action=recipe, state="0")
    episode = standardize(Episode(features), recipe, [], False)
    frames, _ = as_table(episode["action"], [len(episode["action"])])
    stats = statistics(frames, 1, ~np.zeros(frames["action"].shape[1], bool))
    robot = recorded(recipe, {name: value.shape[1] for name, value in features.items()}, stats)
    got = robot.to_robot(episode["action"].astype(np.float64))
    np.testing.assert_allclose(robot.actions_from_robot(got), episode["action"], rtol=1e-5, atol=1e-5)
    return episode["action"], got, robot.action


POSE = DRAW.uniform(-1, 1, (20, 6)).astype(np.float32)
GRIP = DRAW.uniform(0, 1, (20, 1)).astype(np.float32)
TURN = DRAW.randn(20, 4)
TURN = (TURN / np.linalg.norm(TURN, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("recipe, features, expected, labels", [
    ("pose, grip invert target raw", {"pose": POSE, "grip": GRIP}, [POSE, GRIP], "pose[0] pose[5] grip"),
    ("pose, grip /255 clip invert target raw", {"pose": POSE, "grip": 255 * GRIP}, [POSE, 255 * GRIP],
     "grip"),
    ("grip *12.5 target raw, pose *1000", {"pose": POSE, "grip": 0.08 * GRIP}, [0.08 * GRIP, POSE],
     "pose[5]"),
    ("pose[3:], pose[:3], grip", {"pose": POSE, "grip": GRIP}, [POSE, GRIP], "pose[0] grip"),
    ("pose[:3], 0*3, grip invert", {"pose": POSE, "grip": GRIP}, [POSE[:, :3], GRIP], "pose[2] grip"),
    ("pose[1:3], grip, pose[1:4]", {"pose": POSE, "grip": GRIP}, [POSE[:, 1:4], GRIP], "pose[1] pose[3]"),
    ("pose *-1", {"pose": POSE}, [POSE], "pose[0]"),
    ("pose[-2:], pose[:-2] /0.5 invert *3", {"pose": POSE}, [POSE], "pose[5]"),
])
def test_what_a_recipe_does_is_undone(recipe, features, expected, labels):
    standard, got, names = apply_and_undo(recipe, features)
    np.testing.assert_allclose(got, np.concatenate(expected, axis=1), atol=1e-4)
    assert len(names) == got.shape[1] and set(labels.split()) <= set(names), names
    if "invert" in recipe and "grip" in recipe:
        assert not np.allclose(standard[:, -1], got[:, -1])


@pytest.mark.parametrize("recipe, standard_ones, labels", [
    ("pose, grip rel2abs", [6], ["grip rel2abs[0]"]), ("pose delta, grip invert", range(6), ["grip"]),
    ("pose[:2], turn euler, pose[2:3], grip", [2, 3, 4], ["turn euler[2]", "pose[2]", "grip"]),
])
def test_what_cannot_be_undone_stays_in_standard_form(recipe, standard_ones, labels):
    standard, got, names = apply_and_undo(recipe, {"pose": POSE, "grip": GRIP, "turn": TURN})
    assert got.shape == standard.shape and set(labels) <= set(names), names
    ones = [*standard_ones]
    np.testing.assert_array_equal(got[:, ones], standard[:, ones])
    if "grip invert" in recipe:
        np.testing.assert_allclose(got[:, 6:], GRIP, atol=1e-6)


def tiny_policy(mixture: Mixture, **changes) -> Policy:
    """An untrained model for a mixture."""
    keys = {key: value for key, value in TINY.items() if key not in ("data_mix", "data_root_dir", "datasets")}
    values = {**keys, **{key: getattr(mixture.cfg, key) for key in mixture.cfg.model_fields_set}}
    cfg = TrainConfig(**{**values, "image_size": 28, **changes})
    return Policy(VLA(cfg, TOKENIZER).eval(), TOKENIZER, mixture.statistics)


def test_a_closed_gripper_stays_closed(opened, tmp_path):
    """README's robot says 1 = closed; the model, 1 = open. What it gets is what it recorded."""
    actions = [np.column_stack([row[:, :6], (row[:, 6] > 0) * 200.0 + 20]) for row in random_actions(7)]
    state = (F.Tensor(shape=(3,), dtype=np.float32), lambda e, t: np.float32([e, t, 100 + t]))
    write_arm(tmp_path, actions, observation={"state": state})
    mixture = opened({"action": "action[:6], action[6:] /255 invert target raw",
                      "state": "state[2:] /10, state[:1]"}, use_proprio=True)
    policy = tiny_policy(mixture)
    view, asked = GRAY.repeat(2, 0), np.array([2.0, 5.0, 105.0])
    got = policy.predict_action(view, "open", proprio=asked)
    tokens = policy.generate(*policy.prepare([view], ["open"], None, [[10.5, 2.0]]))
    standard = policy.actions(tokens, None)[0]
    np.testing.assert_allclose(got, [*standard[:6], 255 * (1 - standard[6])])
    robot = policy.convention("arm")
    assert robot.action == [f"action[{i}]" for i in range(7)]
    assert robot.gripper(7) == [0, 255]  # open and closed
    assert robot.state == ["state[0]", "state[1]", "state[2]"]
    np.testing.assert_allclose(robot.from_robot(asked[None]), [[10.5, 2.0]])
    indexed = mixture.tables[0].frames["proprio"][2 * 8 + 5]
    np.testing.assert_allclose(indexed, [10.5, 2.0])
    with pytest.raises(UserError, match=r"expected 3 numbers, as recorded: state\[0\]"):
        policy.predict_action(view, "open", proprio=asked[:2])


def test_openvlas_datasets_speak_the_standard_form(data_config):
    mixture = open_mixture(data_config(data_mix="viola"), TOKENIZER)  # whose recipe turns the gripper
    assert mixture.cfg.features == {}
    robot = convention(mixture.cfg, "viola", mixture.statistics["viola"])
    actions = mixture.tables[0].frames["action"][:5]
    np.testing.assert_array_equal(robot.to_robot(actions), actions)
    assert robot.action[-1] == "gripper(1=open)" and robot.gripper(7) == [1, 0]


# ------------------------------------------------------------------------------------------------------------
# 4. A feature gives one value for each step


TWO = ["open", "pull"]


@pytest.mark.parametrize("features, name, recipe", [
    ({"step": {"language_instruction": (F.Tensor(shape=(2,), dtype=np.str_), np.array(TWO, object))}},
     "language_instruction", {}),
    ({"step": {"language_instruction": (F.Sequence(F.Text()), TWO)}}, "language_instruction", {}),
    ({"step": {"language_instruction": (F.Tensor(shape=(3, 4), dtype=np.int64), np.ones((3, 4), int))}},
     "language_instruction", {}),
    ({"step": {"language_instruction": (F.Tensor(shape=(), dtype=np.float32), np.float32(1))}},
     "language_instruction", {}),
    ({"observation": {"image": (F.Sequence(PNG), [GRAY, GRAY])}}, "observation/image", {}),
    ({"observation": {"image": (F.Sequence(PNG, length=2), [GRAY, GRAY])}}, "observation/image", {}),
    ({"observation": {"image": (F.Tensor(shape=(16, 16, 3), dtype=np.uint8), GRAY)}}, "observation/image",
     {}),
    ({"observation": {"image": (F.Text(), "picture.png")}}, "observation/image", {}),
    ({"observation": {"state": (F.Text(), "ready")}}, "observation/state", {"state": "state"}),
    ({"observation": {"state": (F.Sequence(np.float32), [1.0, 2.0])}}, "observation/state",
     {"state": "state"}),
    ({"step": {"force": (F.Tensor(shape=(None, 2), dtype=np.float32), np.ones((3, 2), np.float32))}}, "force",
     {"action": "action[:6], force"}),
    ({"episode": {"goal": (F.Tensor(shape=(3,), dtype=np.float32), np.ones(3, np.float32))}}, "goal",
     {"action": "action[:6], goal"}),
])
def test_what_gives_not_one_value_is_refused_by_name(features, name, recipe, tmp_path):
    directory = write_arm(tmp_path, random_actions(7), **features)
    with pytest.raises(DataError, match=f"{directory}: the feature '{name}' is .*(must be|needs)"):
        index(directory, Recipe(primary="image", **recipe), "state" in recipe)


@pytest.mark.parametrize("name, features", [
    ("language_instruction", {"step": {"language_instruction": (
        F.Tensor(shape=(2,), dtype=np.str_), np.array(TWO, object))}}),
    ("observation/image", {"observation": {"image": (F.Tensor(shape=(16, 16, 3), dtype=np.uint8), GRAY)}}),
])
def test_training_refuses_it_when_it_indexes(name, features, opened, tmp_path):
    write_arm(tmp_path, random_actions(7), **features)
    with pytest.raises(DataError, match=name):
        opened()


def test_texts_of_episodes_and_images_beside_the_observation(opened, tmp_path):
    red = (PNG, lambda e, t: np.full((16, 16, 3), [200 + t, 0, 0], np.uint8))
    directory = write_arm(tmp_path, random_actions(7), step={"language_instruction": None, "view": red},
                          episode={"episode_metadata": (F.FeaturesDict({"task": F.Text()}),
                                                        lambda e: {"task": f"open door {e}"})})
    mixture = opened({"primary": "/view", "instruction": "episode_metadata/task"})
    table = mixture.tables[0]
    assert [table.instructions[i] for i in table.frames["instruction"]] == \
           [f"open door {e}" for e in range(4) for _ in range(8)]
    assert (mixture.sample(0, 11)["images"][0] == [203, 0, 0]).all()
    with pytest.raises(DataError, match=r"no 'language_instruction'.*; they have .*episode_m") as error:
        index(directory, Recipe(primary="/view"))
    assert "skip_bad_episodes" not in str(error.value)


def jpeg(image: np.ndarray) -> bytes:
    return simplejpeg.encode_jpeg(image, quality=90)


def png(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "png")
    return out.getvalue()


NOISE = DRAW.randint(0, 256, (48, 64, 3)).astype(np.uint8)  # fine detail: decoders differ on it
COMMENT = b"\xff\xfe\x00\x08camera"  # a segment that may come first
AFTER = {"nothing": jpeg(NOISE), "zeros": jpeg(NOISE) + bytes(64), "text": jpeg(NOISE) + b"exposure=3;\n",
         "one more": jpeg(NOISE) + jpeg(255 - NOISE), "its end twice": jpeg(NOISE) + b"\xff\xd9",
         "a comment first": b"\xff\xd8" + COMMENT + jpeg(NOISE)[2:] + b"\0\0",
         "a png": png(NOISE) + bytes(10)}


@pytest.mark.parametrize("after", AFTER)
def test_bytes_after_a_picture_change_nothing(after):
    import tensorflow as tf

    theirs = tf.io.decode_image(AFTER[after], channels=3).numpy()
    np.testing.assert_array_equal(decode_native(AFTER[after]), theirs)


# ------------------------------------------------------------------------------------------------------------
# 5. Cameras: any number, any names


def color(red: int, green: int, blue: int) -> tuple:
    return PNG, np.full((16, 16, 3), [red, green, blue], np.uint8)


VIEWS = {"image": color(9, 0, 0), "cam_high": color(50, 0, 0), "cam_left": color(0, 60, 0),
         "hand": color(0, 0, 70), "torso": color(80, 80, 0)}
NAMED = {"cameras": {"top": "cam_high", "left": "cam_left", "torso camera": "torso"}, "wrist": "hand"}


@pytest.mark.parametrize("cameras", [["top", "left", "wrist"],
                                     ["torso camera", "wrist", "primary", "left", "top"]])
def test_cameras_have_any_names(cameras, opened, tmp_path):
    write_arm(tmp_path, random_actions(7), observation=VIEWS)
    mixture = opened(NAMED, cameras=cameras)
    keys = {"top": "cam_high", "left": "cam_left", "wrist": "hand", "torso camera": "torso",
            "primary": "image"}
    expected = [VIEWS[keys[name]][1][0, 0] for name in cameras]
    np.testing.assert_array_equal(mixture.sample(0, 3)["images"][:, 0, 0], expected)

    policy = tiny_policy(mixture)
    views = {name: VIEWS[keys[name]][1] for name in cameras}
    shuffled = dict(reversed(views.items()))
    shown, *_ = policy.prepare([shuffled], ["open"], None, None)
    np.testing.assert_array_equal(shown[0, :, 0, 0], expected)  # in the order of training
    by_order = policy.predict_action([*views.values()], "open")
    np.testing.assert_array_equal(policy.predict_action(shuffled, "open"), by_order)
    body = {"images": {name: view.tolist() for name, view in shuffled.items()}, "instruction": "open"}
    query = parse_request(json.dumps(body).encode(), policy)  # what the server makes of it
    assert all(np.array_equal(a, b) for a, b in zip(query.views, views.values(), strict=True))
    body["images"]["botom"] = body["images"].pop(cameras[0])
    with pytest.raises(UserError, match=f"botom.*{', '.join(cameras)}"):
        parse_request(json.dumps(body).encode(), policy)
    with pytest.raises(UserError, match=f"botom: expected {', '.join(cameras)}"):
        policy.predict_action({**dict([*views.items()][1:]), "botom": GRAY}, "open")


@pytest.mark.parametrize("cameras, known", [(["secondary"], "left, primary, top, torso camera, wrist"),
                                            (["primary", "Top"], "left, primary, top")])
def test_a_camera_that_no_dataset_has_is_an_error(cameras, known, opened, tmp_path):
    write_arm(tmp_path, random_actions(7), observation=VIEWS)
    with pytest.raises(UserError, match=f"cameras: no dataset has '{cameras[-1]}'.*{known}"):
        opened(NAMED, cameras=cameras)


def test_a_camera_is_black_only_where_another_dataset_has_it(opened, tmp_path):
    for name in ("arm", "other"):
        write_arm(tmp_path, random_actions(7), name, observation=VIEWS)
    mixture = opened(data_mix={"arm": 1.0, "other": 1.0}, cameras=["primary", "top"],
                     datasets={"arm": {"primary": "image"}, "other": {"primary": "image", **NAMED}})
    assert mixture.sample(0, 0)["images"][:, 0, 0].tolist() == [[9, 0, 0], [0, 0, 0]]
    assert mixture.sample(1, 0)["images"][:, 0, 0].tolist() == [[9, 0, 0], [50, 0, 0]]


# ------------------------------------------------------------------------------------------------------------
# 7. Found when indexing


BROKEN = {"cut short": png(NOISE)[:900], "no picture": b"no picture at all",
          "a damaged jpeg": b"\xff\xd8" + bytes(200), "empty": b""}


def test_check_lists_bad_episodes_which_are_then_left_out(opened, commands, tmp_path):
    bad = dict(zip((2, 5, 6, 8), BROKEN, strict=True))
    wrist = (JPEG, lambda e, t: BROKEN[bad[e]] if e in bad and t == 3 else jpeg(NOISE))
    directory = write_arm(tmp_path, random_actions(7, 9), observation={"wrist": wrist})
    with pytest.raises(DataError, match=r"record 2: .*frame 3"):
        opened({"wrist": "wrist"}, cameras=["primary", "wrist"]).sample(0, 2 * 8 + 3)
    arguments = ["--check", tmp_path, "--data_mix", "arm", "--index_dir", tmp_path / "index"]
    ((status, text),) = commands(("", {}, "data.py", arguments))
    assert status == 1 and "checked arm episodes 9 frames 72 bad_episodes 4" in text, text
    for record in bad:
        said = rf"bad episode {directory}/arm-train\S+: record {record}: wrist of frame 3: ."
        assert re.search(said, text)
    assert "record 8: wrist of frame 3: it is empty" in text
    recipe, two = {"wrist": "wrist"}, {"cameras": ["primary", "wrist"]}
    mixture = opened(recipe, skip_bad_episodes=True, **two)
    assert mixture.tables[0].episodes["record"].tolist() == [0, 1, 3, 4, 7]
    assert any("4 bad episodes" in line for line in notes(mixture))
    with pytest.raises(DataError, match=r"record 2: wrist of frame 3.*skip_bad_episodes: true leaves"):
        opened(recipe, **two)
    # once they are mended, none is left out
    shutil.rmtree(directory)
    write_arm(tmp_path, random_actions(7, 9), observation={"wrist": (JPEG, jpeg(NOISE))})
    assert len(opened(recipe, skip_bad_episodes=True, **two).tables[0].episodes) == 9


def test_each_version_has_its_own_list_of_bad_episodes(commands, opened, tmp_path):
    for version, picture in (("1.0.0", b"no picture"), ("2.0.0", jpeg(NOISE))):
        wrist = (JPEG, lambda e, t, picture=picture: picture if (e, t) == (2, 3) else jpeg(NOISE))
        write_arm(tmp_path, random_actions(7), version=version, observation={"wrist": wrist})
    for version, status in (("1.0.0", 1), ("2.0.0", 0)):  # one after the other
        arguments = ["--check", tmp_path / "arm" / version, "--index_dir", tmp_path / "index"]
        assert commands(("", {}, "data.py", arguments))[0][0] == status
    mixture = opened(data_mix={"arm:1.0.0": 1}, recipe={"wrist": "wrist"}, skip_bad_episodes=True,
                     index_dir=str(tmp_path / "index"))
    assert mixture.tables[0].episodes["record"].tolist() == [0, 1, 3]


# What a recipe cannot mean is refused, and what a robot cannot do told


@pytest.mark.parametrize("feature, values, recipe, message", [
    (np.float32, (0, 255), "action[:6], action[6:] clip invert", r"clip: .* 255: divide first"),
    (np.float32, (0, 1), "action[:8]", r"'action': has 7 columns.*\[0:8\]"),
    (np.float32, (0, 1), "action[3:12] target", r"'action': has 7 columns.*\[3:12\]"),
    (np.float32, (0, 230), "action[:6], action[6:] invert clip", "clip: .* 229: divide first"),
    (np.float32, (0, 230), "action[:6], action[6:] binarize", "binarize: .* 230: divide first, as in"),
    (np.float32, (-100, 100), "action[:6], action[6:] rel2abs", "rel2abs: .* 100: divide first"),
])
def test_what_helpers_cannot_do(feature, values, recipe, message, tmp_path):
    actions = [np.random.RandomState(e).choice(values, (6, 7)) for e in range(3)]
    with pytest.raises(DataError, match=message):
        index(write_arm(tmp_path, actions), Recipe(primary="image", action=recipe))


@pytest.mark.parametrize("kind, low, high", [(np.uint8, 0, 200), (np.uint16, 0, 200), (np.bool_, 0, 2),
                                             (np.int8, -100, 100), (np.int16, -32000, 32000)])
def test_differences_of_small_whole_numbers(kind, low, high, tmp_path):
    ticks = np.random.RandomState(0).randint(low, high, (4, 9, 3))
    directory = write_arm(tmp_path, random_actions(7, 4, 9), step={
        "ticks": (F.Tensor(shape=(3,), dtype=kind), lambda e, t: ticks[e, t].astype(kind))})
    table = index(directory, Recipe(primary="image", action="ticks delta"))
    np.testing.assert_array_equal(table.frames["action"].reshape(4, -1, 3)[:, :8], np.diff(ticks, axis=1))


def test_a_guess_gives_every_camera_one_name(tmp_path):
    picture = {"image": None} | {name: (PNG, GRAY) for name in ("front", "gripper", "primary", "wrist")}
    (subject,) = find_subjects(write_arm(tmp_path, random_actions(7), observation=picture).parent, None, None)
    assert subject.recipe.camera_names == {"primary": "primary", "secondary": "front", "wrist": "wrist",
                                           "gripper": "gripper"}


def test_a_broken_picture_is_named(tmp_path):
    broken = bytearray(png(NOISE[:24, :32]))
    broken[35] ^= 1  # the length of a part
    with pytest.raises(ValueError, match="JPEG or PNG"):
        decode_native(bytes(broken))
    directory = write_arm(tmp_path, random_actions(7), observation={
        "image": (PNG, lambda e, t: bytes(broken) if (e, t) == (0, 0) else GRAY)})
    (subject,) = find_subjects(directory.parent, None, None)
    with pytest.raises(DataError, match=r"record 0: .*JPEG or PNG.*--check"):
        draw(subject.table(None, False), subject.recipe, tmp_path / "sheet.png")


def test_missing_pictures_and_words_are_told(opened, tmp_path):
    black = (JPEG, lambda e, t: b"" if t % 2 else jpeg(NOISE))
    texts = (F.Text(), lambda e, t: " \n" if e == 1 or (e, t) == (2, 3) else "open")
    write_arm(tmp_path, random_actions(7), observation={"wrist": black}, step={"language_instruction": texts})
    mixture = opened({"wrist": "wrist"}, cameras=["primary", "wrist"])
    found = "\n".join(map(str, survey(mixture.tables[0])))
    assert re.search("wrist .* 16 of 32 frames", found), found
    assert "1 frames have no instruction" in found
    assert mixture.tables[0].episodes["labeled"].tolist() == [True, False, True, True]


def test_a_state_that_never_moved(opened, tmp_path):
    write_arm(tmp_path, random_actions(7), observation={
        "state": (F.Tensor(shape=(2,), dtype=np.float32), lambda e, t: np.float32([0.1, e + t]))})
    for kind, told in (("normal", True), ("bounds_q99", False)):
        mixture = opened({"state": "state"}, use_proprio=True, action_normalization=kind)
        assert any("state dimension 0: never change" in line for line in notes(mixture)) == told


@pytest.mark.parametrize("recipe, message", [
    ({"skip_idle": True}, "datasets: arm: skip_idle: remove it"),
    ({"cameras": {"primary": "top"}}, "datasets: arm: the camera primary .*`cameras`: remove"),
])
def test_keys_that_cannot_help(recipe, message, opened, tmp_path):
    write_arm(tmp_path, random_actions(7))
    with pytest.raises(UserError, match=message):
        opened(recipe)


def test_a_version_belongs_in_the_mixture(opened, tmp_path):
    write_arm(tmp_path, random_actions(7))
    assert opened(data_mix="arm:1.0.0").sizes[0]


def test_each_of_three_cameras_is_drawn(opened, tmp_path):
    write_arm(tmp_path, random_actions(7), observation={key: (PNG, GRAY) for key in "abc"})
    mixture = opened({"primary": "a|b|c"})
    drawn = [mixture.cameras_shown(0, row, epoch)[0] for row in (0, 8, 16) for epoch in range(100)]
    assert all(80 < drawn.count(key) < 120 for key in "abc"), drawn


def test_a_picture_of_floats_is_no_camera(opened, tmp_path):
    """TFDS puts each number's four bytes in a PNG, as if they were colors."""
    depth = np.linspace(0.5, 2, 256, dtype=np.float32).reshape(16, 16)
    png = io.BytesIO()
    Image.fromarray(depth.view(np.uint8).reshape(16, 16, 4)).save(png, "PNG")
    kind = F.Image(shape=(16, 16, 4), encoding_format="png")
    arm = write_arm(tmp_path, random_actions(7), observation={"depth": (kind, png.getvalue())})
    path = arm / "features.json"
    declared = json.loads(path.read_text())
    steps = declared["featuresDict"]["features"]["steps"]["sequence"]["feature"]["featuresDict"]["features"]
    image = steps["observation"]["featuresDict"]["features"]["depth"]["image"]
    image["dtype"], image["shape"]["dimensions"] = "float32", ["16", "16", "1"]
    path.write_text(json.dumps(declared))
    with pytest.raises(UserError, match=r"'observation/depth' is Image of floats .*: a camera must be an Image"):
        opened({"primary": "depth"})
    assert opened().sizes[0]


def test_inspecting_reads_what_is_there(commands, tmp_path):
    """The version that is asked for, by its own recipe; a guess that can be read; a picture's name first."""
    depth = {"depth": (PNG, GRAY), "state": (F.Sequence(np.float32), [1.0, 2.0])}
    write_arm(tmp_path, random_actions(7), observation=depth)
    write_arm(tmp_path, random_actions(4), "other", version="1.0.0")
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump({
        **TINY, "data_mix": {"arm": 1, "other": 1},
        "datasets": {"arm": {"primary": "image"}, "other": {"primary": "image"}}}))
    jobs = [["--inspect", tmp_path / "other/1.0.0", "--config", tmp_path / "mix.yaml"],
            ["--inspect", tmp_path / "arm"],
            ["--inspect", tmp_path / "arm", "--out", tmp_path / "mix.yaml/a.png"], ["--inspect", tmp_path]]
    (_, one), (status, guess), (late, early), (bad, line) = commands(
        *(("", {}, "data.py", [*job, *["--out", tmp_path / "a.png"] * ("--out" not in job)]) for job in jobs))
    assert one.count("\ndataset ") + one.startswith("dataset ") == 1 and "other/1.0.0" in one, one
    assert status == 0 and "primary: image" in guess, guess
    assert bad == 1 and f"{tmp_path}: no TFDS dataset" in line and "--data_mix" in line and "Traceback" not in line
    assert late == 1 and "mix.yaml'" in early and "dataset" not in early and "Traceback" not in early, early


def test_only_x_y_z_are_versions(tmp_path):
    directory = write_arm(tmp_path, random_actions(7))
    for suffix in (".bak", ".old", ".incomplete4XYZ", ".1234.tmp", "_copy", "-old", "-rc1", ".1", "\n"):
        shutil.copytree(directory, tmp_path / f"arm/1.0.0{suffix}")
    for other in ("2", "2.0", "latest", "v2.0.0", "9.9.x", " 3.0.0"):
        shutil.copytree(directory, tmp_path / f"arm/{other}")
    assert find_dataset(tmp_path, "arm") == directory
    assert find_dataset(tmp_path, "arm:latest").name == "latest"  # what is asked for by name is meant
    shutil.rmtree(directory)
    with pytest.raises(DataError, match=r"arm/1.0.0/features.json: set data_root_dir"):
        find_dataset(tmp_path, "arm")


def pointers(file: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123456789\n")


def gzipped(file: Path) -> None:
    import gzip

    file.write_bytes(gzip.compress(file.read_bytes()))


@pytest.mark.parametrize("change, message", [
    (pointers, "damaged header at byte 0: .*`git lfs pull`"),
    (gzipped, "damaged header at byte 0: .*compressed"),
    (lambda file: file.write_bytes(file.read_bytes()[:-3]), "cut short"),
])
def test_files_that_are_something_else_are_said_to_be_it(change, message, tmp_path):
    directory = write_arm(tmp_path, random_actions(7))
    change(next(directory.glob("*.tfrecord*")))
    with pytest.raises(DataError, match=message) as error:
        index(directory)
    assert str(directory) in str(error.value) and "skip_bad" not in str(error.value)


def test_a_dataset_without_a_split_to_train_on(opened, tmp_path):
    directory = write_arm(tmp_path, random_actions(7), split="test")
    with pytest.raises(DataError, match=f"{directory}: no training frame.* test"):
        opened()
    assert any("split test" in str(finding) for finding in survey(index(directory)))


@pytest.mark.parametrize("bad, advised", [([0, 1, 2, 3], False), ([3], True), ([0], True)])
def test_skipping_is_advised_only_where_other_episodes_are_fine(bad, advised, tmp_path):
    actions = random_actions(7)
    for number in bad:
        actions[number][4, 2] = np.nan
    directory = write_arm(tmp_path, actions)
    with pytest.raises(DataError, match=f"record {bad[0]}: its action is not finite") as error:
        index(directory)
    assert ("skip_bad_episodes" in str(error.value)) == advised
    if advised:
        assert len(index(directory, skip_bad=True).episodes) == 4 - len(bad)


@pytest.mark.parametrize("mix", [{"arm": 1.0, "again": 1.0}, {"arm": 1.0, "arm:1.0.0": 1.0}])
def test_one_folder_is_one_dataset(mix, opened, tmp_path):
    write_arm(tmp_path, random_actions(7))
    (tmp_path / "again").symlink_to(tmp_path / "arm")
    own = {name: {"primary": "image"} for name in ("arm", "again")}
    first, second = mix
    with pytest.raises(UserError, match=f"{first} and {second} are the same files, .*remove one"):
        opened(data_mix=mix, datasets=own)
    with pytest.raises(UserError, match="arm and again are the same files"):  # the folder of one dataset
        opened(data_mix={"arm": 1.0, "again": 1.0}, datasets=own, data_root_dir=str(tmp_path / "arm/1.0.0"))


def test_two_versions_are_two_datasets(opened, tmp_path):
    write_arm(tmp_path, random_actions(7))
    write_arm(tmp_path, random_actions(7), version="1.1.0")
    assert len(opened(data_mix={"arm:1.0.0": 1.0, "arm:1.1.0": 1.0}).tables) == 2


# ------------------------------------------------------------------------------------------------------------
# 8. Mixtures mean what they say; 9. with some datasets missing


def test_weights_are_shares_or_multiply_frames(opened, tmp_path):
    write_arm(tmp_path, random_actions(7, 30), "arm")
    write_arm(tmp_path, random_actions(7, 10), "other")
    own = {name: {"primary": "image"} for name in ("arm", "other")}
    for balance, weights, shares in ((False, (1.0, 3.0), (0.25, 0.75)), (True, (1.0, 3.0), (0.5, 0.5)),
                                     (False, (2.0, 0.5), (0.8, 0.2)), (True, (1.0, 1.0), (0.75, 0.25))):
        mix = dict(zip(own, weights, strict=True))
        mixture = opened(data_mix=mix, datasets=own, balance_weights=balance)
        np.testing.assert_allclose(mixture.shares, shares)
        drawn = np.bincount(mixture.draw(0, 4000)[0]) / 4000
        np.testing.assert_allclose(drawn, shares, atol=1e-3)
        assert mixture.epoch_length == int(240 / shares[0])  # `arm`, of weight 1 or the largest, is seen once


def test_if_all_is_missing_the_folder_is_named(opened, tmp_path):
    with pytest.raises(DataError, match=f"{tmp_path}/hand: .*set data_root_dir"):
        opened(data_mix={"arm": 1.0, "hand": 2.0}, datasets={"arm": {"primary": "image"}, "hand": {"primary": "image"}})


@pytest.mark.parametrize("here", [["arm", "leg"], ["leg"]])
def test_all_that_is_missing_and_all_that_is_there_are_listed(here, opened, tmp_path):
    for name in here:
        write_arm(tmp_path, random_actions(7), name)
    weights = {"arm": 1.0, "hand": 2.0, "leg": 0.5, "bridge_orig": 1.0}
    own = {name: {"primary": "image"} for name in ("arm", "hand", "leg")}
    with pytest.raises(DataError) as error:
        opened(data_mix=weights, datasets=own)
    missing = ", ".join(name for name in weights if name not in here)
    assert f"{4 - len(here)} of 4 datasets are missing: {missing}: download" in str(error.value)
    line = ", ".join(f"{name!r}: {weights[name]:g}" for name in here)
    assert f"with data_mix: {{{line}}}" in str(error.value)
    told = str(error.value).partition("data_mix: ")[2]  # the line works
    assert opened(data_mix=yaml.safe_load(told), datasets=own).names == (*here,)


def test_oxe_yaml_with_some_of_its_datasets(tmp_path):
    """The real one, before any weights are fetched."""
    for name in ("viola", "bridge_orig"):
        (tmp_path / name).symlink_to(RLDS / "data" / name)
    cfg = load_config(ROOT / "configs/oxe.yaml", [f"data_root_dir={tmp_path}"])
    with pytest.raises(DataError, match=r"datasets are missing: .*fractal20220817_data.*: download") as error:
        oxe.find_datasets(cfg.data_root_dir, cfg.data_mix, cfg.datasets, cfg.cameras)
    assert re.search(r"data_mix: \{.*'viola': \d", str(error.value)), error.value


# ------------------------------------------------------------------------------------------------------------
# Random recipes on random data


@st.composite
def robots(draw):
    """-> (recipe of the action; for each of its fields the key, columns, helpers, words and dimensions in
    standard form; {feature: recorded (T, k)}; the episodes' lengths)."""
    rng = np.random.RandomState(draw(st.integers(0, 2**31)))
    lengths = draw(st.lists(st.integers(1, 9), min_size=3, max_size=6))
    frames, wanted, fields, features = sum(lengths), draw(st.integers(4, 26)), [], {}
    while wanted:
        width = draw(st.integers(1, min(wanted, 7)))
        wanted -= width
        kind = draw(st.sampled_from(["recorded", "recorded", "recorded", "parts", "constant", "one way"]))
        raw, target = draw(st.booleans()), draw(st.booleans())
        key, words = f"part_{len(fields)}", " target" * target + " raw" * raw
        if kind == "constant":
            fields.append((f"{draw(st.integers(0, 1))}*{width}", [], [], words, width))
            continue
        helpers = draw(st.sampled_from([[], ["invert"], ["/255"], ["*0.01"], ["*-2"], ["invert", "*3"],
                                        ["/255", "clip", "invert"]]))
        values = rng.uniform(0 if "clip" in helpers else -1, 1, (frames, width))
        if not (raw or "clip" in helpers):
            values = rng.uniform(-5, 5) + 10 ** rng.uniform(-2, 2) * values
        if draw(st.integers(0, 5)) == 0:
            values[:, 0] = values[0, 0]  # it never changes
        for helper in reversed(helpers):  # back to what was recorded
            match helper[0]:
                case "i":
                    values = 1 - values
                case "*":
                    values = values / float(helper[1:])
                case "/":
                    values = values * float(helper[1:])
        features[key] = np.float32(values)
        if kind == "one way":
            fields.append((key, [*range(width)], [*helpers, "delta"], words, width))
        elif kind == "parts" and width > 1:  # its columns in another order; a column before is left out
            cut = draw(st.integers(1, width - 1))
            features[key] = np.column_stack([rng.randn(frames), features[key]]).astype(np.float32)
            fields.append((f"{key}[{cut + 1}:]", [*range(cut + 1, width + 1)], helpers, words, width - cut))
            fields.append((f"{key}[1:{cut + 1}]", [*range(1, cut + 1)], helpers, words, cut))
        else:
            fields.append((key, [*range(width)], helpers, words, width))
    assume(features)
    recipe = ", ".join(" ".join([key, *helpers]) + words for key, _, helpers, words, _ in fields)
    return recipe, fields, features, lengths


STATES = {"joints": 5, "force": 1}
STATE_RECIPE = "force /10, 1*2, joints[3:] invert, joints[:2] *-1"


@settings(max_examples=60)
@given(robots(), st.integers(1, 6), st.sampled_from(["bounds_q99", "bounds", "normal"]))
def test_random_robots(tmp_path_factory, robot, chunk, kind):
    """Labels past the end, actions that come back, and what the robot gets."""
    recipe, fields, features, lengths = robot
    tmp_path = tmp_path_factory.mktemp("robot")
    starts, widths = np.cumsum(lengths) - lengths, [width for *_, width in fields]
    draw = np.random.RandomState(len(recipe))
    states = {key: draw.randn(sum(lengths), width).astype(np.float32) for key, width in STATES.items()}

    def entries(arrays) -> dict:
        return {key: (F.Tensor(shape=values.shape[1:], dtype=np.float32),
                      lambda e, t, values=values: values[starts[e] + t]) for key, values in arrays.items()}

    write_arm(tmp_path, [np.zeros((length, 1)) for length in lengths],
              step={"action": None, **entries(features)}, observation=entries(states))
    # all words count where there is one; else the last dimension is a gripper
    spoken = any(words for *_, words, _ in fields)
    target = np.repeat([" target" in words for *_, words, _ in fields], widths)
    raw = np.repeat([" raw" in words for *_, words, _ in fields], widths)
    if not spoken:
        target[-1] = raw[-1] = True
    cfg = TrainConfig(data_root_dir=str(tmp_path), data_mix="arm", index_dir=str(tmp_path / "index"),
                      datasets={"arm": {"primary": "image", "action": recipe, "state": STATE_RECIPE}},
                      image_size=28, use_proprio=True, action_chunk=chunk, action_normalization=kind)
    mixture = open_mixture(cfg, TOKENIZER)
    table, stats = mixture.tables[0], mixture.statistics["arm"]["action"]
    standard = np.array(table.frames["action"])
    assert standard.shape == (sum(lengths), sum(widths))

    # labels: those of the frames that follow, then changes 0, and targets the last again
    rows = np.arange(sum(lengths))
    labels = mixture.actions(0, rows)
    constant = np.array(stats["min"]) == np.array(stats["max"])
    low, high = {"bounds_q99": ("q01", "q99"), "bounds": ("min", "max"), "normal": (None, None)}[kind]
    if kind == "normal":
        center, reach = np.array(stats["mean"]), np.array(stats["std"]) + 1e-8
    else:
        center, reach = ((np.array(stats[high]) + sign * np.array(stats[low])) / 2 for sign in (1, -1))
    expected = np.where(raw, standard, (standard - center) / np.where(reach > 0, reach, 1))
    expected = expected if kind == "normal" else np.where(raw, expected, expected.clip(-1, 1))
    expected = expected if kind == "normal" else np.where(constant, 0, expected)
    sharp = ~constant if kind == "normal" else np.ones(len(raw), bool)  # of no deviation, it says nothing
    for start, length in zip(starts, lengths, strict=True):
        for t in range(length):
            for step in range(chunk):
                inside = t + step < length
                wanted = expected[start + min(t + step, length - 1)]
                wanted = wanted if inside else np.where(target, wanted, 0)
                np.testing.assert_allclose(labels[start + t, step][sharp], wanted[sharp], atol=2e-3)

    # tokens: within half a bin, where nothing was cut off
    tokens = mixture.action_tokenizer
    back = unnormalize(tokens.decode(tokens.encode(labels[:, 0])), stats, kind)
    half_bin = np.where(raw, 1, np.abs(reach)) / 255
    slack = half_bin * 1e-3 + 2e-6 * np.abs(standard).max(0)
    cut = np.abs(np.where(raw, standard, (standard - center) / np.where(reach > 0, reach, 1))) > 1 + 1e-6
    fine = ~cut & ~constant
    assert (np.abs(back - standard) <= half_bin + slack)[fine].all()
    report = round_trip(standard, stats, kind)
    assert (report["error"] <= half_bin + 2 * slack).all()
    near = np.abs(np.abs(back - standard) - half_bin) < 3 * slack + half_bin * 0.01  # cut off, but by nothing
    wrong = np.abs(back - standard) > half_bin
    assert ((wrong & ~near).mean(0) <= report["clipped"] + 1e-9).all()
    assert (report["clipped"] <= (wrong | near).mean(0) + 1e-9).all()

    # the robot gets what was recorded, in its own order, and tells its state as it was recorded
    cfg = cfg.model_copy(update={"features": mixture.cfg.features})
    speaks = convention(cfg, "arm", mixture.statistics["arm"])
    np.testing.assert_allclose(speaks.to_robot(standard.astype(np.float64)),
                               as_recorded(fields, features, standard), rtol=1e-4, atol=1e-4)
    again = speaks.actions_from_robot(speaks.to_robot(standard.astype(np.float64)))
    np.testing.assert_allclose(again[:, ~constant], standard[:, ~constant], rtol=1e-4, atol=1e-4)
    asked = np.concatenate([states["force"], states["joints"]], axis=1)
    assert speaks.state == ["force", *(f"joints[{i}]" for i in range(5))]
    np.testing.assert_array_equal(speaks.from_robot(asked), table.frames["proprio"])
    shutil.rmtree(tmp_path)


def as_recorded(fields: list, features: dict, standard: np.ndarray) -> np.ndarray:
    """What a robot recorded: features in the order in which the recipe first names them, each column once;
    or, where a field goes one way only, field for field."""
    place = np.cumsum([0, *(width for *_, width in fields)])
    if any("delta" in helpers for _, _, helpers, *_ in fields):
        parts = [features[key.partition("[")[0]][:, columns] if columns and "delta" not in helpers
                 else standard[:, place[i] : place[i + 1]]
                 for i, (key, columns, helpers, *_) in enumerate(fields)]
        return np.concatenate(parts, axis=1)
    columns: dict[str, set] = {}
    for key, taken, *_ in fields:
        if taken:
            columns.setdefault(key.partition("[")[0], set()).update(taken)
    if not columns:
        return standard[:, :0]
    return np.concatenate([features[key][:, sorted(taken)] for key, taken in columns.items()], axis=1)


# ------------------------------------------------------------------------------------------------------------
# Whole robots, with the commands that a user gives


def moving(rng, steps: int, dims: int) -> np.ndarray:
    """Smooth positions (T, dims) in radians."""
    return rng.uniform(-1, 1, dims) + 0.5 * np.sin(0.4 * np.arange(steps)[:, None] + rng.uniform(0, 6, dims))


def write_robot(root: Path, name: str) -> dict:
    """Record `bimanual` (ALOHA: 14 absolute joints, of which two are grippers that open 0..0.08 m; three
    cameras) or `hand` (an arm that is told changes, and 20 finger joints targets) -> its keys of a YAML."""
    rng, steps = np.random.RandomState(7), 14
    keys = {"bimanual": ["cam_high", "cam_left_wrist", "cam_right_wrist"],
            "hand": ["palm_view", "side_view"]}[name]
    shots = {key: (JPEG, lambda e, t, i=i: np.tile(noise(e + 20 * i, t), (2, 2, 1))[:24])
             for i, key in enumerate(keys)}
    number = F.Tensor(shape=(20 if name == "hand" else 14,), dtype=np.float32)
    poses = [moving(rng, steps + 1, number.shape[0]) for _ in range(12)]
    if name == "bimanual":
        for pose in poses:
            pose[:, [6, 13]] = 0.04 + 0.04 * np.sign(pose[:, [6, 13]])
        write_arm(root, [pose[1:] for pose in poses], name, observation={
            "image": None, **shots, "qpos": (number, lambda e, t: np.float32(poses[e][t]))})
        recipe = {"cameras": {"top": keys[0], "left": keys[1], "right": keys[2]}, "state": "qpos",
                  "action": "action[:6] target, action[6:7] *12.5 target raw, "
                            "action[7:13] target, action[13:] *12.5 target raw"}
        cameras = ["top", "left", "right"]
    else:
        tactile = (F.Tensor(shape=(3,), dtype=np.float32), lambda e, t: np.float32([e, t, 1023]))
        arm = (F.Tensor(shape=(6,), dtype=np.float32), lambda e, t: rng.randn(6).astype(np.float32))
        fingers = (number, lambda e, t: np.float32(57.3 * poses[e][t + 1]))  # degrees
        write_arm(root, [np.zeros((steps, 1))] * 12, name,
                  step={"action": None, "arm_change": arm, "fingers": fingers},
                  observation={"image": None, **shots, "tactile": tactile,
                               "fingers": (number, lambda e, t: np.float32(poses[e][t]))})
        recipe = {"cameras": {"palm": keys[0]}, "secondary": keys[1], "state": "fingers, tactile /1023",
                  "action": "arm_change, fingers /57.3 target"}
        cameras = ["palm", "secondary"]
    return {"data_root_dir": str(root), "data_mix": name, "datasets": {name: recipe}, "cameras": cameras,
            "use_proprio": True, "action_chunk": 8}


@pytest.mark.parametrize("name, dims, state", [("bimanual", 14, 14), ("hand", 26, 23)])
def test_a_whole_robot(name, dims, state, commands, plain_run, tiny, tmp_path):
    """Trained, continued, evaluated, and asked for an action in its own words."""
    config = tiny(**write_robot(tmp_path, name), run_id="robot", save_interval=2, eval_samples=16,
                  parallel_decoding=name == "hand", global_batch_size=8,
                  per_device_batch_size=4)
    for steps in (2, 4):
        done = plain_run(config, "--deepspeed_config", "ds_configs/cpu.json", "--set", f"max_steps={steps}")
        assert done.returncode == 0 and f"done steps {steps}" in done.text, done.text
        assert "warning" not in done.text, done.text
    assert "resumed" in done.text
    run = tmp_path / "runs/robot"
    ((status, text),) = commands(("", {}, "eval_vla.py", ["--checkpoint", run]))
    assert status == 0 and "agreement 1.0000" in text, text
    facts = json.loads((run / "eval.json").read_text())
    held_out = 14 * 1  # one of 12 episodes
    assert facts["frames"] == held_out
    assert len(facts["datasets"][name]["inference"]["l1_units_per_dim"]) == dims
    assert Image.open(run / "eval.png").height > 120 * dims

    policy = load_vla(run)
    robot, views = policy.convention(None), [np.full((24, 32, 3), [40 * i, 0, 0], np.uint8) for i in range(3)]
    asked = dict(zip(policy.cfg.cameras, views, strict=False))
    now = np.linspace(-0.5, 0.5, state)
    got = policy.predict_action(asked, "open", proprio=now)
    assert got.shape == (8, dims) and len(robot.action) == dims and len(robot.state) == state
    np.testing.assert_array_equal(got, policy.predict_action([*asked.values()], "open", proprio=now))
    # within what was recorded, in its units: a gripper in meters, fingers in degrees
    stats, scale = policy.norm_stats[name]["action"], np.ones(dims)
    if name == "bimanual":
        scale[[6, 13]] = 0.08
        assert robot.action == [f"action[{i}]" for i in range(14)] and np.ptp(stats["q99"]) > 0.1
        assert (got[:, [6, 13]] <= 0.08).all() and stats["max"][6] == pytest.approx(1)
    else:
        scale[6:] = 57.3
        assert robot.action[5:7] == ["arm_change[5]", "fingers[0]"] and robot.state[-1] == "tactile[2]"
        assert np.abs(got[:, 6:]).max() > 5 and np.max(stats["max"]) < 5
    low, high = (np.where(stats["mask"], stats[key], raw) * scale for key, raw in (("q01", -1), ("q99", 1)))
    assert (got >= low - 1e-6).all() and (got <= high + 1e-6).all()
