"""What a recipe means: which episodes are held out, where they end, and what is trained also acts."""

import dataclasses
import json
import re
import shutil
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow_datasets as tfds
import yaml
from conftest import RLDS, ROOT, TINY, open_mixture
from hypothesis import given, settings
from hypothesis import strategies as st
from test_own_robot import GRAY, PNG, Episode, index, opened, random_actions, tiny_policy, write_arm

from action_tokenizer import load_tokenizer, prompt_ids
from machinery import oxe
from machinery.config import Recipe, UserError
from machinery.convention import dimension_names, recorded
from machinery.fields import check_recipe, parse_fields, write_recipe
from machinery.frames import DataError, find_dataset, frame_table
from machinery.guess import action_fields, state_fields
from machinery.inspect_data import find_subjects, guess_action
from machinery.recipes import Feature, check_features, euler, executions, standardize, unzipped
from machinery.rlds import statistics

pytestmark = pytest.mark.usefixtures("index_here")
F = tfds.features
__all__ = ["opened"]  # a fixture


# ------------------------------------------------------------------------------------------------------------
# Held-out episodes


def table_of(texts: list[list[str]], openvla_rules: bool = False) -> SimpleNamespace:
    """A frame table of episodes whose frames have these instructions."""
    known = sorted({text for episode in texts for text in episode})
    frames = np.zeros(sum(map(len, texts)), [("instruction", "<u4")])
    frames["instruction"] = [known.index(text) for episode in texts for text in episode]
    episodes = np.zeros(len(texts), [("first", "<i8"), ("count", "<u4"), ("labeled", "?"), ("split", "u1")])
    episodes["count"] = [len(episode) for episode in texts]
    episodes["first"] = np.cumsum(episodes["count"]) - episodes["count"]
    episodes["labeled"] = [any(text.strip() for text in episode) for episode in texts]
    return SimpleNamespace(episodes=episodes, frames=frames, instructions=known, splits=["train"],
                           openvla_rules=openvla_rules)


def draw_held_out(texts: list[list[str]]) -> np.ndarray:
    return oxe.held_out(table_of(texts), np.ones(len(texts), bool))


def words(texts: list[str]) -> set[str]:
    return {" ".join(text.lower().split()) for text in texts} - {""}


EPISODES = st.lists(st.lists(st.sampled_from(["open", "Open ", "pull", "push it", "go", "a", "b", " "]),
                             min_size=1, max_size=3), min_size=1, max_size=120)


@settings(max_examples=200)
@given(EPISODES)
def test_every_instruction_is_trained_on_and_frequent_ones_are_held_out(texts):
    held = draw_held_out(texts)
    np.testing.assert_array_equal(held, draw_held_out(texts))
    labeled = [episode for episode in texts if words(episode)]
    trained = set().union(*(words(episode) for episode, out in zip(texts, held, strict=True) if not out))
    kept_out = [words(episode) for episode, out in zip(texts, held, strict=True) if out]
    counts = {word: sum(word in words(episode) for episode in labeled) for word in set().union(*map(words, labeled))}
    assert all(kept_out)  # none without an instruction
    if max(counts.values(), default=0) > 1:
        assert trained == {*counts}
    for word, count in counts.items():
        alone = [episode for episode in labeled if words(episode) == {word}]
        if len(alone) == count >= 5:  # each of its episodes has only this one
            assert {word} in kept_out, (word, count)


@settings(max_examples=100)
@given(st.lists(st.sampled_from("abcdefgh"), min_size=20, max_size=200), st.lists(st.sampled_from("abij"), max_size=3))
def test_appended_episodes_change_little(tasks, more):
    before = draw_held_out([[task] for task in tasks])
    after = draw_held_out([[task] for task in tasks + more])[: len(tasks)]
    assert (before != after).sum() <= 3 * len(more)


def test_the_share_that_is_held_out():
    for tasks, of_each in ((50, 50), (10, 20), (20, 5), (1, 400)):
        held = draw_held_out([[f"task {e // of_each}"] for e in range(tasks * of_each)])
        per_task = held.reshape(tasks, of_each).sum(1)
        assert (per_task == -(-of_each // 20)).all()  # 5%, and one at least
    assert draw_held_out([[f"text {e}"] for e in range(40)]).sum() == 2  # nothing else can be held out
    assert draw_held_out([[f"text {e // 3}"] for e in range(300)]).sum() == 15
    assert not draw_held_out([["open"]] * 4).any()


def test_openvlas_rule_is_the_last_twentieth():
    held = oxe.held_out(table_of([["open"]] * 30, openvla_rules=True), np.ones(30, bool))
    assert np.flatnonzero(held).tolist() == [28, 29]
    assert all(recipe.openvla_rules for recipe in oxe.DATASETS.values())


def test_a_dataset_recorded_task_after_task(opened, tmp_path):
    """Each task is trained and evaluated on, whatever the number of ranks, and no frame is in both."""
    texts = (F.Text(), lambda e, t: f"task {e // 5}")
    write_arm(tmp_path, random_actions(7, 100, 2), step={"language_instruction": texts})
    mixture = opened()
    table, parts = mixture.tables[0], []
    for train in (True, False):
        first, count = oxe.kept_episodes(table, train)
        parts.append({*first.tolist()})
        rows = np.concatenate([np.arange(f, f + c) for f, c in zip(first, count, strict=True)])
        assert len({*table.frames["instruction"][rows].tolist()}) == 20
    assert not parts[0] & parts[1] and parts[0] | parts[1] == {*range(0, 200, 2)}


TEXTS = ["Open the drawer", "open the  door", "打开抽屉", "Push it"]


def text_of(episode: int, step: int) -> str:
    """In each tenth episode it changes in the middle."""
    return TEXTS[(episode + (episode % 10 == 9 and step > 1)) % 4]


@pytest.mark.parametrize("rules", [False, True])
@pytest.mark.parametrize("patterns, chosen", [
    (["open the drawer"], {0}), (["Open *"], {0, 1}), (["!*drawer"], {1, 2, 3}), (["open *", "!*door"], {0}),
    (["打开*", "push it"], {2, 3})])
def test_only_frames_with_chosen_instructions(patterns, chosen, rules, opened, tmp_path):
    """Are trained and evaluated on, and counted. Held out are the same episodes, and the table is the same."""
    directory = write_arm(tmp_path, random_actions(7, 80, 4), step={"language_instruction": (F.Text(), text_of)})
    every = opened({"openvla_rules": rules})
    some = opened({"openvla_rules": rules, "instructions": patterns})
    table = some.tables[0]
    assert table.path == every.tables[0].path
    texts = np.array([TEXTS.index(text) for text in table.instructions])[table.frames["instruction"]]
    wanted = np.isin(texts, [*chosen])
    for train in (True, False):
        rows = [np.concatenate([np.arange(f, f + c) for f, c in zip(*oxe.kept_episodes(mixture.tables[0], train), strict=True)])
                for mixture in (every, some)]
        np.testing.assert_array_equal(rows[0][wanted[rows[0]]], rows[1])
        assert len(rows[1])
    actions, stats = table.frames["action"][wanted], some.statistics["arm"]
    assert stats["num_transitions"] == len(actions) == some.epoch_length
    assert stats["num_trajectories"] == len({*table.episode_of(np.flatnonzero(wanted)).tolist()})
    np.testing.assert_array_equal(stats["action"]["max"], actions.max(0))
    np.testing.assert_allclose(stats["action"]["q01"], np.quantile(actions, 0.01, axis=0), rtol=1e-5)
    assert stats["action"]["mask"] == every.statistics["arm"]["action"]["mask"]
    write_recipe(directory, Recipe(primary="image", names={"action": [*"abcdefg"]}))  # for all other keys
    beside = opened(datasets={"arm": {"instructions": patterns}})
    assert beside.recipes[0] == Recipe(primary="image", names={"action": [*"abcdefg"]}, instructions=patterns)


@pytest.mark.parametrize("patterns, named", [(["opne *"], "opne"), (["open*", "!"], "'!' matches none"), (["!*"], "leave none")])
def test_instructions_that_choose_nothing_are_named(patterns, named, opened, tmp_path):
    write_arm(tmp_path, random_actions(7, 2, 2))
    with pytest.raises(DataError, match=re.escape(named)):
        opened({"instructions": patterns})


def test_chosen_instructions_of_openvlas_datasets(data_config):
    """Their recipe is the registered one, and their actions stay in OpenVLA's form."""
    name = "bridge_orig"
    plain = open_mixture(data_config(data_mix=name))
    texts = plain.tables[0].instructions
    some = open_mixture(data_config(data_mix=name, datasets={name: {"instructions": texts[:1]}}))
    assert some.recipes[0] == dataclasses.replace(oxe.DATASETS[name], instructions=texts[:1])
    assert some.tables[0].path == plain.tables[0].path and not some.cfg.features
    assert 0 < some.epoch_length <= plain.epoch_length


# ------------------------------------------------------------------------------------------------------------
# Executions inside a record


def bounds(**flags: str) -> list[tuple[int, int]]:
    """The executions of a record with these flags, "1" for true."""
    values = {name: np.array([letter == "1" for letter in text]) for name, text in flags.items()}
    steps = Episode({"action": np.zeros((len(next(iter(values.values()))), 1)), **values})
    steps.features |= {name: Feature((), np.dtype(bool), "Tensor") for name in flags}
    length = len(steps["action"])
    return [part.span.indices(length)[:2] if hasattr(part, "span") else (0, length)
            for part in executions(steps)]


@pytest.mark.parametrize("first, last, expected", [
    ("100000", "000001", [(0, 6)]), ("100100", "001001", [(0, 3), (3, 6)]),
    ("100100", "000000", [(0, 3), (3, 6)]), ("000000", "001000", [(0, 3), (3, 6)]),
    ("111111", "000000", [(0, 6)]),  # a flag that means nothing
    ("100000", "000111", [(0, 6)]),  # "done" from there on
    ("110011", "000000", [(0, 4), (4, 6)]), ("101010", "010101", [(0, 2), (2, 4), (4, 6)]),
    ("100101", "001011", [(0, 3), (3, 5), (5, 6)]),
])
def test_where_executions_end(first, last, expected):
    assert bounds(is_first=first, is_last=last) == expected


def flags_every(steps: int) -> dict:
    """Of executions of so many steps, one after the other in a record."""
    return {"is_first": (np.bool_, lambda e, t: t % steps == 0),
            "is_last": (F.Tensor(shape=(1,), dtype=np.bool_), lambda e, t: np.array([t % steps == steps - 1]))}


def test_executions_of_a_record_are_episodes(opened, tmp_path):
    """For chunks, windows, differences, and frames that are trimmed: the same as one record for each."""
    actions = random_actions(7, 6, 4)
    state = {"state": (F.Tensor(shape=(2,), dtype=np.float32), None)}
    recipe = {"action": "action[:6] delta, action[6:] target", "state": "state", "trim": True}
    opens, pulls = F.Text(), ["open", "pull"]
    found = {}
    for name, records in (("one", actions), ("three", [np.concatenate(actions[:3]), np.concatenate(actions[3:])])):
        per = len(records[0]) // 4
        seen = {key: (kind, lambda e, t, per=per: np.float32([e * per + t // 4, t % 4]))
                for key, (kind, _) in state.items()}
        image = (PNG, lambda e, t, per=per: np.full((16, 16, 3), e * per * 4 + t, np.uint8))
        text = (opens, lambda e, t, per=per: pulls[(e * per + t // 4) % 2])
        write_arm(tmp_path, records, name, step={"language_instruction": text, **flags_every(4)},
                  observation={**seen, "image": image})
        found[name] = opened(data_mix=name, datasets={name: {"primary": "image", **recipe}}, action_chunk=3,
                             window_size=2, use_proprio=True)
    one, three = found["one"], found["three"]
    assert one.statistics["one"] == three.statistics["three"]
    np.testing.assert_array_equal(one.tables[0].episodes["first"], three.tables[0].episodes["first"])
    assert three.tables[0].episodes["record"].tolist() == [0, 0, 0, 1, 1, 1]
    for row in range(len(one.tables[0].frames)):
        samples = [mixture.sample(0, row) for mixture in (one, three)]
        for key in samples[0]:
            np.testing.assert_array_equal(samples[0][key], samples[1][key], err_msg=key)


def test_openvlas_datasets_are_read_record_by_record(tmp_path):
    directory = write_arm(tmp_path, random_actions(7, 2, 6), step=flags_every(3))
    assert index(directory, Recipe(primary="image")).episodes["record"].tolist() == [0, 0, 1, 1]
    (directory / "table").rename(directory / "other")
    recipe = Recipe(primary="image", openvla_rules=True)
    assert index(directory, recipe).episodes["record"].tolist() == [0, 1]


def test_a_bad_execution_is_named_by_its_record(tmp_path):
    rows = random_actions(7, 3, 6)
    rows[1][4, 0] = np.nan
    directory = write_arm(tmp_path, rows, step=flags_every(3))
    with pytest.raises(DataError, match=r"record 1: its action is not finite"):
        index(directory)
    (directory / "table").exists()
    table = index(directory, skip_bad=True)
    assert table.episodes["record"].tolist() == [0, 0, 2, 2] and len(table.bad) == 1


# ------------------------------------------------------------------------------------------------------------
# What training takes acts


KEYS = ["action", "/action", "action/arm", "/action/arm", "a.b-c", "observation/joints", "0", "/0"]
HELPED = ["", " invert", " /2", " *-0.5", " clip", " binarize", " delta", " rel2abs", " target", " change",
          " raw", " invert *3 target", " target raw", " wxyz", " wxyz target", " euler", " wxyz euler", " unzip"]


@st.composite
def recipes(draw) -> tuple[str, dict[str, int]]:
    """A field list, and the width of each feature of a dataset."""
    widths = {key.strip("/"): draw(st.integers(1, 8)) for key in KEYS if key != "0"}
    fields = []
    for key in draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=4)):
        columns = draw(st.sampled_from(["", "[:2]", "[1:]", "[-4:]", "[:4]", "[1:5]", "[2:2]", "[-1:]"]))
        fields.append(key + columns * (key != "0") + draw(st.sampled_from(HELPED)))
    return ", ".join(fields), widths


def accepted(recipe: Recipe, features: dict, values: dict, load_proprio: bool) -> tuple[dict, dict]:
    """The widths of its features, and an episode in standard form, as indexing makes them. Raises UserError."""
    features = features | {"language_instruction": Feature((), np.dtype(object), "Text")}
    check_recipe("arm", recipe)
    widths = check_features(features, recipe, [], load_proprio)
    return widths, standardize(Episode(values), recipe, [], load_proprio)


@settings(max_examples=300)
@given(recipes(), st.integers(0, 99))
def test_what_training_takes_acts(drawn, seed):
    """Or it is refused when the YAML is read, or when the data are."""
    action, widths = drawn
    draw = np.random.RandomState(seed)
    recipe = Recipe(primary="image", action=action, state="0")
    zipped = {field.key for field in parse_fields(action) if "unzip" in field.helpers}
    features, values = {}, {}
    for name, width in widths.items():
        kind = Feature((width,), np.dtype("f4"), "Tensor")
        values[name] = draw.uniform(0.1, 0.9, (6, width)).astype(np.float32)
        if name in zipped:
            kind = Feature((), np.dtype(object), "Tensor")
            values[name] = [compress(row) for row in values[name]]
        features[name] = kind
    try:
        numbers, episode = accepted(recipe, features, values, load_proprio=False)
    except UserError:
        return
    numbers |= unzipped(recipe, episode["widths"])
    frames = np.zeros(6, [("action", "<f4", episode["action"].shape[1:])])
    frames["action"] = episode["action"]
    stats = statistics(frames, 1, np.ones(episode["action"].shape[1], bool))
    robot = recorded(recipe, numbers, stats)
    names, _ = dimension_names(recipe, numbers)
    assert len(names) == episode["action"].shape[1]
    got = robot.to_robot(episode["action"].astype(np.float64))
    assert got.shape == (6, len(robot.action))
    back = robot.actions_from_robot(got)
    moved = np.ptp(episode["action"], axis=0) > 0
    if " binarize" not in action:
        np.testing.assert_allclose(back[:, moved], episode["action"][:, moved], atol=1e-4)
    for label, column in zip(robot.action, got.T, strict=True):  # what is named as recorded is as recorded
        name, _, number = label.removesuffix("]").partition("[")
        exact = not any(word in action for word in ("clip", "binarize", "delta", "rel2abs", "euler", "unzip"))
        if exact and name in values:
            np.testing.assert_allclose(column, values[name][:, int(number or 0)], atol=1e-4)


@settings(max_examples=200)
@given(recipes(), st.integers(0, 99))
def test_states_come_in_as_they_were_recorded(drawn, seed):
    """The robot sends its own state, or the standard form if the recipe cannot make that of one step."""
    state, widths = drawn
    draw = np.random.RandomState(seed)
    recipe = Recipe(primary="image", action="action", state=state)
    values = {name: draw.uniform(0.1, 0.9, (6, width)).astype(np.float32) for name, width in widths.items()}
    values = {f"observation/{name}": rows for name, rows in values.items()} | values
    features = {name: Feature(rows.shape[1:], np.dtype("f4"), "Tensor") for name, rows in values.items()}
    try:
        numbers, episode = accepted(recipe, features, values, load_proprio=True)
    except UserError:
        return
    frames = np.zeros(6, [(key, "<f4", episode[key].shape[1:]) for key in ("action", "proprio")])
    for key in ("action", "proprio"):
        frames[key] = episode[key]
    robot = recorded(recipe, numbers, statistics(frames, 1, np.ones(episode["action"].shape[1], bool)))
    names, width = dimension_names(recipe, numbers)[1], episode["proprio"].shape[1]
    assert len(names) == width
    if robot.state[0] == "proprio[0]":
        assert len(robot.state) == width
        return
    sent = []
    for key in dict.fromkeys(field.key for field in parse_fields(state, "observation/") if not field.constant):
        sent.append(values[key])
    sent = np.concatenate(sent, axis=1)
    assert len(robot.state) == sent.shape[1]
    np.testing.assert_allclose(robot.from_robot(sent), episode["proprio"], atol=1e-5)


def compress(row: np.ndarray) -> bytes:
    return zlib.compress(row.astype("<f4").tobytes())


@pytest.mark.parametrize("recipe, message", [
    ({"action": "0*7"}, "arm: action: name a feature"), ({"action": "a, 1 invert"}, "do nothing"),
    ({"state": "s, 0[1:2]"}, "do nothing"), ({"action": "a target change, b"}, "target or change"),
    ({"state": "s change"}, "state: remove"), ({"action": "a change", "absolute": 1}, "remove absolute"),
])
def test_recipes_that_mean_nothing(recipe, message):
    with pytest.raises(UserError, match=message):
        check_recipe("arm", Recipe(**recipe))


@pytest.mark.parametrize("action", ["action[:3] euler", "action wxyz", "action[1:3] wxyz target"])
def test_a_quaternion_has_four_numbers(action, tmp_path):
    with pytest.raises(DataError, match="'action': a quaternion has 4 columns, not"):
        index(write_arm(tmp_path, random_actions(7)), Recipe(primary="image", action=action))


def test_quaternions_with_w_first(opened, tmp_path):
    """The model sees x y z w; the robot gets and sends w x y z."""
    draw = np.random.RandomState(0)
    turns = draw.randn(4, 8, 4)
    turns = np.float32(turns / np.linalg.norm(turns, axis=-1, keepdims=True))  # w x y z
    pose = (F.Tensor(shape=(7,), dtype=np.float32), lambda e, t: np.float32([1, 2, 3, *turns[e, t]]))
    actions = [np.column_stack([rows[:, :3], turn, rows[:, 3:4]]) for rows, turn in zip(random_actions(4), turns, strict=True)]
    write_arm(tmp_path, actions, observation={"pose": pose})
    mixture = opened({"action": "action[:3] change, action[3:7] wxyz target, action[7:] raw",
                      "state": "pose[:3], pose[3:7] wxyz euler"}, use_proprio=True)
    table = mixture.tables[0]
    flat = turns.reshape(-1, 4)
    np.testing.assert_array_equal(table.frames["action"][:, 3:7], flat[:, [1, 2, 3, 0]])
    np.testing.assert_array_equal(table.frames["proprio"][:, 3:], np.concatenate([euler(turn[:, [1, 2, 3, 0]]) for turn in turns]))
    robot = tiny_policy(mixture).convention("arm")
    back = robot.to_robot(table.frames["action"].astype(np.float64))
    np.testing.assert_allclose(back, np.concatenate(actions), atol=1e-6)
    assert robot.action == [f"action[{i}]" for i in range(8)]
    asked = np.column_stack([np.tile([1, 2, 3], (32, 1)), flat])
    np.testing.assert_allclose(robot.from_robot(asked), table.frames["proprio"], atol=1e-5)
    names = dimension_names(mixture.recipes[0], table.features)
    assert names[0][3:7] == ["action[4]", "action[5]", "action[6]", "action[3]"]
    assert table.declared.tolist() == [True] * 7 + [False]
    assert table.targets.tolist() == [False] * 3 + [True] * 4 + [False]


# ------------------------------------------------------------------------------------------------------------
# The recipe and the names beside a dataset


NAMES = {"action": ["x", "y", "z", "grip"], "observation/state": ["shoulder", "höhe"]}


def write_named(root: Path, **recipe) -> Path:
    state = {"state": (F.Tensor(shape=(2,), dtype=np.float32), lambda e, t: np.float32([e, t]))}
    directory = write_arm(root, random_actions(4, 24), observation=state)
    write_recipe(directory, Recipe(**{"primary": "image", "action": "action[:3] change, action[3:] invert target",
                                      "names": NAMES, **recipe}))
    return directory


@pytest.mark.parametrize("datasets", [{}, {"arm": {}}])
def test_the_recipe_beside_a_dataset_is_enough(datasets, opened, tmp_path):
    directory = write_named(tmp_path)
    mixture = opened(datasets=datasets or {"other": {}}, use_proprio=True)
    robot = tiny_policy(mixture).convention("arm")
    assert robot.action == NAMES["action"] and robot.state == NAMES["observation/state"]
    assert mixture.cfg.datasets["arm"] == oxe.read_recipe(directory)
    assert dimension_names(mixture.recipes[0], mixture.tables[0].features) == (*NAMES.values(),)
    (subject,) = find_subjects(directory.parent, None, None)
    assert subject.recipe == mixture.recipes[0] and subject.source == str(directory / "recipe.yaml")
    config = {**TINY, "data_root_dir": str(tmp_path), "data_mix": {"arm": 1.0}, "datasets": datasets}
    (tmp_path / "arm.yaml").write_text(yaml.safe_dump(config))
    (subject,) = find_subjects(directory.parent, None, str(tmp_path / "arm.yaml"))
    assert subject.recipe.action == mixture.recipes[0].action


def test_a_recipe_in_the_yaml_comes_first_and_keeps_the_names(opened, tmp_path):
    write_named(tmp_path)
    mixture = opened({"action": "action[1:] target"})
    assert mixture.recipes[0].action == "action[1:] target"
    assert tiny_policy(mixture).convention("arm").action == ["y", "z", "grip"]
    other = {"names": {"action": ["a", "b", "c", "d"]}}
    (only_names,) = opened(datasets={"arm": other}).recipes
    assert only_names.primary == "image" and only_names.names == other["names"]
    renamed = opened({"action": "action[1:] target", **other})
    assert tiny_policy(renamed).convention("arm").action == ["b", "c", "d"]
    assert renamed.tables[0].path == mixture.tables[0].path  # nothing is indexed again


def test_the_same_name_in_two_features():
    names = {"left": ["motor_0", "grip"], "right": ["motor_0", "motor_1"], "observation/left": ["grip", "motor_0"]}
    recipe = Recipe(action="right target, left target, 0*2", state="left", names=names)
    stats = {key: [0.0] * 6 for key in ("min", "mean")} | {"max": [1.0] * 6}
    widths = dict.fromkeys(names, 2)
    robot = recorded(recipe, widths, {"action": stats, "proprio": stats})
    assert robot.action == ["right.motor_0", "motor_1", "left.motor_0", "grip"]
    assert robot.state == ["grip", "motor_0"]
    assert dimension_names(recipe, widths)[0] == [*robot.action, "0*2", "0*2"]


@pytest.mark.parametrize("text, message", [
    ("primary: image\nnames: {action: [x]}", r"arm/1.0.0: names: action has 4 numbers and 1 names"),
    ("primry: image", r"arm/1.0.0/recipe.yaml: .*primry: unknown key; did you mean 'primary'"),
    ("primary: [", r"arm/1.0.0/recipe.yaml: "), ("primary: image\naction: action tarjet", "tarjet"),
])
def test_a_recipe_that_does_not_fit_is_named(text, message, opened, tmp_path):
    directory = write_arm(tmp_path, random_actions(4))
    (directory / "recipe.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        opened(datasets={"other": {}})


def test_openvlas_recipe_stays_its_own(data_config, tmp_path):
    shutil.copytree(RLDS / "data/viola", tmp_path / "viola")
    write_recipe(find_dataset(tmp_path, "viola"), Recipe(primary="other"))
    cfg = oxe.read_recipes(data_config(data_mix="viola", data_root_dir=str(tmp_path)))
    assert cfg.datasets == {}


def test_training_by_the_recipe_beside_the_data(tiny, plain_run, tmp_path):
    write_named(tmp_path)
    done = plain_run(tiny(data_root_dir=str(tmp_path), data_mix="arm", datasets={}, max_steps=1, save_interval=0,
                          eval_samples=16), "--deepspeed_config", "ds_configs/cpu.json")
    assert done.returncode == 0, done.text
    (run,) = (tmp_path / "runs").iterdir()
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["datasets"]["arm"]["names"] == NAMES


# ------------------------------------------------------------------------------------------------------------
# What is recorded and not used; names of features


def numbers(*names: str, width: int = 7) -> dict[str, Feature]:
    return {name: Feature((width,), np.dtype("f4"), "Tensor") for name in names}


@pytest.mark.parametrize("names, state, action", [
    (["state", "actions"], "/state", "actions"),  # openpi
    (["observation/state", "observation/qvel", "action"], "state", "action"),
    (["observation/states", "actions"], "states", "actions"),
    (["observation/states/joint/position", "observation/states/effector/position", "actions/joint/position",
      "actions/effector/position"], "states/joint/position, states/effector/position",
     "actions/joint/position, actions/effector/position"),  # AgiBot
    (["states_joint_position", "states_effector_position", "actions_joint_position"],
     "/states_joint_position, /states_effector_position", "actions_joint_position"),
    (["state.left_arm", "state.left_hand", "action.left_arm", "action.left_hand"],
     "/state.left_arm, /state.left_hand", "action.left_arm, action.left_hand"),  # GR00T
    (["observation/qpos", "observation/qvel", "observation/effort", "action"], "qpos", "action"),  # ALOHA
    (["observation/joint_position", "observation/gripper_position", "actions"],
     "joint_position, gripper_position", "actions"),
    (["observation/proprio", "action"], "proprio", "action"), (["observation/ee_pose", "action"], "ee_pose", "action"),
    (["observation/joint_velocity", "action", "reward", "observation/timestamp"], "0", "action"),
    (["observation/jointPositions", "observation/jointVelocities", "action"], "jointPositions", "action"),
    (["observation/arm", "observation/left_fingers", "action"], "arm, left_fingers", "action"),
    (["observation/state"], "state", None),
])
def test_names_that_converters_give(names, state, action):
    assert state_fields(numbers(*names)) == state and action_fields(numbers(*names)) == action


def test_what_is_not_numbers_is_not_guessed():
    others = {"observation/state": Feature((None,), np.dtype("f4"), "Sequence"),
              "observation/pose_embedding": Feature((512,), np.dtype("f4"), "Tensor"),
              "observation/joint_image": Feature((), np.dtype(object), "Image"),
              "action": Feature((), np.dtype(object), "Text")}
    assert state_fields(others) == "0" and action_fields(others) is None


def test_what_is_recorded_and_not_used_is_listed(tmp_path):
    more = {"depth": (PNG, GRAY), "qvel": (F.Tensor(shape=(7,), dtype=np.float32), np.zeros(7, np.float32)),
            "state": (F.Tensor(shape=(2,), dtype=np.int64), np.zeros(2, np.int64))}
    step = {"reward": (np.float32, np.float32(0)), "index_finger": (np.float32, np.float32(0)),
            "next_done": (np.bool_, False), "frame_index": (np.int64, 0), "language_embedding": (F.Tensor(shape=(512,), dtype=np.float32),
            np.zeros(512, np.float32)), "action_abs": (F.Tensor(shape=(3,), dtype=np.float32), np.zeros(3, np.float32))}
    directory = write_arm(tmp_path, random_actions(7), observation=more, step={**step, **flags_every(8)})
    table = index(directory)
    assert table.unused == ["action_abs (3 numbers)", "index_finger (1 number)",
                            "observation/depth (Image)", "observation/qvel (7 numbers)", "observation/state (2 numbers)"]
    recipe = Recipe(primary="image", wrist="depth", action="action, action_abs, index_finger")
    assert frame_table(directory, recipe, ["image"], False, index_dir=tmp_path / "index").unused == [
        "observation/depth (Image)", "observation/qvel (7 numbers)", "observation/state (2 numbers)"]


def test_the_guess_takes_several_features(tmp_path):
    draw = np.random.RandomState(0)
    arm = (F.Tensor(shape=(6,), dtype=np.float32), lambda e, t: np.float32(np.sin(0.05 * t + np.arange(6) + e)))
    hand = (F.Tensor(shape=(1,), dtype=np.float32), lambda e, t: np.float32([t % 2]))
    base = (F.Tensor(shape=(2,), dtype=np.float32), lambda e, t: np.float32(draw.randn(2)))
    text = (F.Tensor(shape=(), dtype=np.str_), "open")
    directory = write_arm(tmp_path, [np.zeros((40, 1))] * 6, step={
        "action": None, "actions/arm": arm, "actions/hand": hand, "actions/base": base, "language_instruction": text})
    (subject,) = find_subjects(directory.parent, None, None)
    assert subject.recipe.action == "actions/arm, actions/base, actions/hand"
    guessed, _ = guess_action(subject.recipe, subject.table(str(tmp_path / "index"), False))
    assert guessed.action == "actions/arm target, actions/base change, actions/hand clip target raw"


# ------------------------------------------------------------------------------------------------------------
# Texts


def test_texts_have_one_form(opened, tmp_path):
    """Decomposed letters (a Mac's file names) and a byte order mark are the same instruction."""
    forms = ["öffne", "o\u0308ffne", "\ufefföffne"]
    texts = (F.Text(), lambda e, t: forms[e % 3])
    write_arm(tmp_path, random_actions(7, 6), step={"language_instruction": texts})
    mixture = opened()
    assert mixture.tables[0].instructions == ["öffne"]
    tokenizer = load_tokenizer(TINY["tokenizer"], True)
    assert prompt_ids(tokenizer, forms[0]) == prompt_ids(tokenizer, forms[1])
    assert prompt_ids(tokenizer, forms[1]) == mixture.prompt(forms[0])


def test_texts_in_ascii_are_unchanged():
    text = json.loads((ROOT / "datasets/metaworld_demo/1.0.0/dataset_info.json").read_text())["name"]
    tokenizer = load_tokenizer(TINY["tokenizer"], True)
    assert tokenizer.decode(prompt_ids(tokenizer, f"  {text}\n")).count(f"  {text}\n") == 1
