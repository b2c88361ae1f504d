"""Every rule of OpenVLA's data pipeline, against arrays made by running it (tests/fixtures/rlds)."""

import hashlib
import json

import numpy as np
import pytest
from conftest import RLDS, open_mixture
from hypothesis import given
from hypothesis import strategies as st

from action_tokenizer import normalize
from machinery import oxe, recipes
from machinery.config import Recipe, UserError
from machinery.fields import check_recipe
from machinery.frames import DataError, find_dataset, frame_table
from machinery.survey import survey

GOLDEN = {p.stem: json.loads(p.read_text()) for p in sorted((RLDS / "golden").glob("*.json"))}
SUPPORTED = [name for name, golden in GOLDEN.items() if "refused" not in golden]
PRIMITIVES = json.loads((RLDS / "primitives.json").read_text())
MIXTURES = json.loads((RLDS / "mixtures.json").read_text())


pytestmark = pytest.mark.usefixtures("index_here")


class Tokenizer:  # Mixture needs no more of one here
    action_vocab_size = 32000


def column(values) -> np.ndarray:
    return np.array(values, np.float32)[:, None]


def episode_rows(table, split: str, number: int) -> np.ndarray:
    """Frame numbers of the number-th episode of a split."""
    episode = table.episodes[table.episodes["split"] == table.splits.index(split)][number]
    return np.arange(episode["first"], episode["first"] + episode["count"])


# ------------------------------------------------------------------------------------------------------------
# Whole datasets


@pytest.mark.parametrize("name", SUPPORTED)
def test_dataset_equals_openvla_bit_for_bit(name, data_config):
    golden, arrays = GOLDEN[name], np.load(RLDS / f"golden/{name}.npz")
    for kind, key in (("bounds_q99", "action_q99"), ("bounds", "action_bounds"), ("normal", "action_normal")):
        config = data_config(data_mix=name, use_proprio=True, action_normalization=kind)
        mixture = open_mixture(config, Tokenizer())
        table, kept = mixture.tables[0], []
        assert mixture.statistics[name] == golden["statistics_with_proprio"]
        for k in range(len(table.episodes)):  # all splits, in the order the statistics are made
            rows = np.arange(table.first_frames[k], table.first_frames[k] + table.episodes["count"][k])
            np.testing.assert_array_equal(table.frames["action"][rows], arrays[f"all{k}/action_std"])
        for e, expected in enumerate(golden["train_episode_data"]):
            rows = episode_rows(table, *expected["source"])
            kept += [] if expected["unlabeled"] else rows.tolist()
            actions = arrays[f"ep{e}/{key}"].reshape(len(rows), -1)
            np.testing.assert_array_equal(mixture.actions(0, rows)[:, 0], actions)
            np.testing.assert_array_equal(table.frames["proprio"][rows], arrays[f"ep{e}/proprio_raw"])
            if kind == "bounds_q99":
                proprio = normalize(table.frames["proprio"][rows], mixture.statistics[name]["proprio"], kind)
                np.testing.assert_array_equal(proprio, arrays[f"ep{e}/proprio_q99"])
            text = [table.instructions[i] for i in table.frames["instruction"][rows]]
            assert text == expected.get("language_per_step", [expected["language"]] * len(rows))
        shown = mixture.rows(np.zeros(mixture.sizes[0], int), np.arange(mixture.sizes[0]))
        assert shown.tolist() == kept and len(kept) == golden["skip_unlabeled"]["frames"]


@pytest.mark.parametrize("name", SUPPORTED)
def test_statistics_without_proprio(name, data_config):
    mixture = open_mixture(data_config(data_mix=name), Tokenizer())
    assert mixture.statistics[name] == GOLDEN[name]["statistics_no_proprio"]


@pytest.mark.parametrize("name", SUPPORTED)
def test_images_are_the_same_bytes(name, tmp_path):
    golden, recipe = GOLDEN[name], oxe.DATASETS[name]
    wanted = [camera for camera in ("primary", "secondary", "wrist")
              if f"{camera}_sha256_first_last" in str(golden) or camera == "primary"]
    keys = recipe.camera_keys(wanted)
    table = frame_table(find_dataset(RLDS / "data", name), recipe, keys, False, index_dir=tmp_path)

    def hashes(rows, camera):
        """One list per key that the camera may show (DROID: two)."""
        for key in (getattr(recipe, camera) or "").split("|"):
            images = [table.read_image(row, keys.index(key or None)) for row in rows]
            yield [hashlib.sha256(image).hexdigest() if image else None for image in images]

    for expected in golden["train_episode_data"]:
        rows = episode_rows(table, *expected["source"])
        assert expected["primary_sha256"] in hashes(rows, "primary")
        for camera in wanted:
            if (ends := expected.get(f"{camera}_sha256_first_last")) and len(rows):
                assert ends in hashes(rows[[0, -1]], camera)


CHUNKED = [name for name in SUPPORTED if "ep0/chunk8_q99" in np.load(RLDS / f"golden/{name}.npz").files]


@pytest.mark.parametrize("name", CHUNKED)
def test_action_chunks(name, data_config):
    arrays = np.load(RLDS / f"golden/{name}.npz")
    mixture = open_mixture(data_config(data_mix=name, action_chunk=8), Tokenizer())
    checked = 0
    for e, expected in enumerate(GOLDEN[name]["train_episode_data"]):
        if f"ep{e}/chunk8_q99" in arrays.files:
            rows = episode_rows(mixture.tables[0], *expected["source"])
            np.testing.assert_array_equal(mixture.actions(0, rows), arrays[f"ep{e}/chunk8_q99"])
            checked += 1
    assert checked


@pytest.mark.parametrize("name", SUPPORTED)
def test_held_out_episodes(name, data_config):
    config = data_config(data_mix=name)
    table = open_mixture(config, Tokenizer()).tables[0]
    rows = [row for source in GOLDEN[name]["val_episodes"] for row in episode_rows(table, *source)
            if table.episodes["labeled"][table.episode_of(row)]]
    if not rows:
        with pytest.raises(DataError, match=f"{name}.*: no held-out frame"):
            open_mixture(config, Tokenizer(), train=False)
        return
    mixture = open_mixture(config, Tokenizer(), train=False)
    assert mixture.rows(np.zeros(mixture.sizes[0], int), np.arange(mixture.sizes[0])).tolist() == rows


def test_droid_drops_frames_without_motion(data_config):
    """With the statistics that OpenVLA's constants belong to, idle frames go; with others, none."""
    golden = GOLDEN["droid"]
    override = golden["chunk_filter_statistics_override"]
    for label, statistics in (("own_statistics", None), ("override", override)):
        for case in (key for key in golden["chunk_filter"] if label in key):
            chunk = 1 + int(case.rsplit("future", 1)[1])
            mixture = open_mixture(data_config(data_mix="droid", action_chunk=chunk), Tokenizer())
            if statistics:
                mixture.statistics["droid"]["action"] = {**statistics["action"], "mask": [True] * 6 + [False]}
                mixture.stretches = [mixture._stretches(0)]
            size = mixture.stretches[0][2][-1]
            kept = mixture.rows(np.zeros(size, int), np.arange(size))
            expected = []
            for episode in golden["chunk_filter"][case]["episodes"]:
                source = golden["train_episode_data"][episode["episode_index"]]["source"]
                rows = episode_rows(mixture.tables[0], *source)
                expected += np.delete(rows, episode["dropped_frames"]).tolist()
            assert kept.tolist() == expected, case
            assert len(kept) == golden["chunk_filter"][case]["frames_after_filter"]


def test_droid_draws_one_of_its_cameras_per_episode(data_config):
    mixture = open_mixture(data_config(data_mix="droid", cameras=["primary", "secondary"]), Tokenizer())
    seen = set()
    for row in mixture.tables[0].first_frames:
        for epoch in range(8):
            primary, secondary = drawn = mixture.cameras_shown(0, row, epoch)
            assert drawn == mixture.cameras_shown(0, row + 1, epoch)  # in all of the episode
            seen.add((primary, secondary))
    one, two = "exterior_image_1_left", "exterior_image_2_left"
    assert seen == {(one, two), (two, one)}


# ------------------------------------------------------------------------------------------------------------
# Helpers


def test_gripper_helpers_and_text_equal_openvla():
    for case in PRIMITIVES["binarize"]:
        np.testing.assert_array_equal(recipes.binarize(column(case["in"])), column(case["out"]))
    for case in PRIMITIVES["rel2abs"]:
        np.testing.assert_array_equal(recipes.rel2abs(column(case["in"])), column(case["out"]))
    for case in PRIMITIVES["language_table"]:
        points = np.zeros(512, "<i4")
        points[: len(case["codepoints"])] = case["codepoints"]
        assert recipes.decode_code_points(points.tobytes()).hex() == case["out_hex"]
    for case in PRIMITIVES["euler_from_quaternion"]:
        angles = recipes.euler(np.float32([case["q_xyzw"]]))[0]
        np.testing.assert_array_equal(angles, np.float32(case["euler_xyz"]))


def gripper_values(thresholds: list[float]):
    """Lists of anything, often of values at the thresholds."""
    return st.lists(st.one_of(st.sampled_from(thresholds), st.floats(-2, 2, width=32)), min_size=1)


@given(gripper_values([0.0, 0.05, 0.5, 0.95, 1.0]))
def test_binarize_is_the_backward_scan(values):
    x = column(values)
    expected, carry = np.empty_like(x), x[-1, 0]
    for i in reversed(range(len(x))):
        if x[i, 0] > np.float32(0.95) or x[i, 0] < np.float32(0.05):
            carry = np.float32(x[i, 0] > np.float32(0.95))
        expected[i] = carry
    np.testing.assert_array_equal(recipes.binarize(x), expected)


@given(gripper_values([0.0, 0.1, -0.1, 1.0, -1.0]))
def test_rel2abs_is_the_forward_scan(values):
    x = column(values)
    command = np.where(x < np.float32(-0.1), 1, np.where(x > np.float32(0.1), -1, 0))[:, 0]
    state = -command[np.argmax(command != 0)] or 1
    expected = []
    for c in command:
        state = c or state
        expected.append(state / 2 + 0.5)
    np.testing.assert_array_equal(recipes.rel2abs(x), column(expected))


@given(st.lists(st.floats(-1, 1, width=32), min_size=4, max_size=4).filter(lambda q: np.linalg.norm(q) > 0.1),
       st.integers(1, 20))
def test_euler_angles_are_those_of_the_rotation(q, repeat):
    q = np.float64(q) / np.linalg.norm(q)
    angles = recipes.euler(np.float32([q] * repeat))  # packets of eight and the rest are computed differently
    np.testing.assert_allclose(angles, angles[:1].repeat(repeat, 0), atol=2e-6)

    def rotation(axis, angle):
        c, s = np.cos(angle), np.sin(angle)
        a, b = [(1, 2), (2, 0), (0, 1)][axis]
        m = np.eye(3)
        m[a, a], m[b, b], m[a, b], m[b, a] = c, c, -s, s
        return m

    x, y, z, w = q
    expected = np.array([[1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
                         [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
                         [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)]])
    roll, pitch, yaw = np.float64(angles[0])
    got = rotation(2, yaw) @ rotation(1, pitch) @ rotation(0, roll)
    np.testing.assert_allclose(got, expected, atol=3e-3)  # near straight up, float32 angles are that coarse


# ------------------------------------------------------------------------------------------------------------
# Names and mixtures


def test_named_mixtures_equal_openvla():
    for name, expected in MIXTURES["named_mixtures_filtered"].items():
        assert [[dataset, weight] for dataset, weight, _ in oxe.resolve_mixture(name)] == expected
    assert [*oxe.left_out("rtx_franka")] == ["berkeley_rpt_converted_externally_to_rlds"]
    registered = set(oxe.DATASETS) | set(oxe.REFUSED)
    assert len(registered) == 73 and set(MIXTURES["refused"]) == set(oxe.REFUSED)


@pytest.mark.parametrize("name", MIXTURES["interleaved"])
def test_shares_and_epoch_length_equal_openvla(name):
    case = MIXTURES["interleaved"][name]
    shares, length = oxe.mixture_shares(np.array(case["input_weights"]), np.array(case["dataset_sizes"]))
    assert shares.tolist() == case["sample_weights"] and length == case["dataset_len"]


@pytest.mark.parametrize("name", sorted(oxe.REFUSED))
def test_refused_datasets_leave_an_empty_mixture(name):
    with pytest.raises(UserError, match=f"is empty.*{name}.*(its actions are joint|OpenVLA has no)"):
        oxe.resolve_mixture(name)


def test_unknown_names_and_fields_are_explained():
    with pytest.raises(UserError, match="'brige'; did you mean 'bridge'"):
        oxe.resolve_mixture("brige")
    with pytest.raises(UserError, match=r"'libero_spatial'; did you mean 'libero_spatial_no_noops'.*`data"):
        oxe.resolve_mixture({"bridge_orig": 1.0, "libero_spatial": 1.0})
    with pytest.raises(UserError, match=r"'my_robot_42'; describe your own"):  # nothing is near
        oxe.resolve_mixture("my_robot_42")
    with pytest.raises(UserError, match="bridge_orig: the weight 0 is not positive"):
        oxe.resolve_mixture({"bridge_orig": 0})
    for nothing in ({}, "roboset:1.0.0"):
        with pytest.raises(UserError, match="the mixture is empty"):
            oxe.resolve_mixture(nothing)
    with pytest.raises(UserError, match="unknown helper 'flip'"):
        check_recipe("robot", Recipe(action="action[:6], action[-1:] flip"))


def test_a_users_dataset_comes_before_a_mixture_of_its_name():
    ((name, _, recipe),) = oxe.resolve_mixture("bridge", {"bridge": {"primary": "front"}})
    assert name == "bridge" and recipe.primary == "front"


def test_columns_that_are_not_there_are_named(data_config):
    own = {"bridge_orig": {"primary": "image_0", "action": "action[:6], action[7:8] clip"}}
    with pytest.raises(DataError, match="field 'action': has 7 columns"):
        open_mixture(data_config(data_mix="bridge_orig", datasets=own), Tokenizer())
    own = {"bridge_orig": {"primary": "image_0", "absolute": 8}}
    with pytest.raises(DataError, match="8 absolute action dimensions of 7"):
        open_mixture(data_config(data_mix="bridge_orig", datasets=own), Tokenizer())


def test_a_dataset_without_the_camera_is_warned_of(data_config):
    mixture = open_mixture(data_config(data_mix="berkeley_gnm_recon"), Tokenizer())
    assert survey(mixture.tables[0])[0].kind == "no_camera"


def test_a_registered_dataset_that_lacks_a_key_is_named(data_config):
    message = r"bridge_oxe/.*its steps have no 'observation/image_1', which the recipe names; they have"
    with pytest.raises(DataError, match=message):
        open_mixture(data_config(data_mix="bridge_oxe", cameras=["secondary"]), Tokenizer())


def test_mixed_action_dimensions_are_refused(data_config):
    own = {"bridge_orig": {"primary": "image_0", "action": "action[:3]"}}
    with pytest.raises(ValueError, match=r"different action dimensions.*'bridge_orig': 3"):
        open_mixture(data_config(data_mix={"bridge_orig": 1.0, "viola": 1.0}, datasets=own), Tokenizer())
