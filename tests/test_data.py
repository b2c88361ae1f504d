"""The sampler, batches and images."""

import hashlib
import json
import shutil

import numpy as np
import psutil
import pytest
from conftest import LLAMA_TOKENIZER, RLDS, open_mixture
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from action_tokenizer import load_tokenizer
from data import TrainBatches, collate, interleave, make_loader, permute
from machinery.config import TrainConfig
from machinery.frames import DataError
from machinery.images import augment, decode_image, draw_augmentation

pytestmark = pytest.mark.usefixtures("index_here")
TOKENIZER = load_tokenizer(str(LLAMA_TOKENIZER))

# ------------------------------------------------------------------------------------------------------------
# Which frame comes when


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(n, key):
    assert sorted(permute(np.arange(n), np.array(n), np.uint64(key)).tolist()) == list(range(n))


def test_permute_looks_random():
    n = 10_000
    orders = [permute(np.arange(n), np.array(n), data.mix_bits(7, 0, epoch)) for epoch in range(2)]
    for order in orders:
        assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 0.04
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.04
    assert (orders[0] == orders[1]).sum() < 10  # about one element stays in place by chance


weights = st.lists(st.floats(1e-4, 1), min_size=1, max_size=27).map(lambda w: np.array(w) / np.sum(w))


@settings(max_examples=200)
@given(weights, st.integers(0, 10**7), st.integers(1, 500), st.integers(0, 500))
def test_any_stretch_equals_the_same_stretch_of_a_longer_one(w, first, count, before):
    before = min(before, first)
    dataset, visit = interleave(w, first, count)
    longer = interleave(w, first - before, count + before)
    np.testing.assert_array_equal(dataset, longer[0][before:])
    np.testing.assert_array_equal(visit, longer[1][before:])


def test_the_example_in_its_docstring():
    shares = np.array([0.75, 0.25])
    assert interleave(shares, 0, 8)[0].tolist() == [0, 0, 0, 1, 0, 0, 0, 1]
    assert [part.tolist() for part in interleave(shares, 2, 3)] == [[0, 1, 0], [2, 0, 3]]


@settings(max_examples=50)
@given(weights)
def test_shares_are_exact_and_visits_are_counted(w):
    dataset, visit = interleave(w, 0, 2000)
    for d in range(len(w)):
        np.testing.assert_array_equal(visit[dataset == d], np.arange((dataset == d).sum()))
    drawn = np.cumsum(np.eye(len(w))[dataset], axis=0)
    off = np.abs(drawn - np.arange(1, 2001)[:, None] * w)
    assert (off <= 1 + w * len(w) / 2 + 1e-6).all()  # at every moment, not only in the end


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    config = TrainConfig(
        data_root_dir=str(RLDS / "data"), data_mix={"bridge_orig": 1.0, "viola": 2.0, "dobbe": 0.2},
        datasets={}, cameras=["primary"], use_proprio=False, window_size=1, action_chunk=1,
        action_normalization="bounds_q99", image_size=32, image_aug=True, seed=7, skip_bad_episodes=False,
        index_dir=str(tmp_path_factory.mktemp("index")), prompt_style="pure")
    return open_mixture(config, TOKENIZER)


def test_every_frame_once_per_epoch(mixture):
    dataset, rows, epoch = mixture.draw(0, 3000)
    for d, size in enumerate(mixture.sizes):
        mine, turns = rows[dataset == d], epoch[dataset == d]
        everything = mixture.rows(np.full(size, d), np.arange(size)).tolist()
        for turn in range(int(turns.max())):  # all complete epochs
            assert sorted(mine[turns == turn].tolist()) == sorted(everything)
        assert len(set(mine[turns == turns.max()].tolist())) == (turns == turns.max()).sum()


def digest(sample_images) -> list[str]:
    return [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in sample_images]


def global_batch(mixture, step: int, ranks: int, micro: int, size: int = 24) -> list[tuple]:
    """What all ranks see at a step, as (image hash, token ids, dataset), in the order of the global batch."""
    accumulation = size // (micro * ranks)
    parts = {}
    for rank in range(ranks):
        batches = TrainBatches(mixture, size, micro, rank, ranks)
        for a in range(accumulation):
            batch = batches[step * accumulation + a]
            for i, image in enumerate(digest(batch["images"])):
                ids = tuple(batch["input_ids"][i][batch["input_ids"][i] != TOKENIZER.pad_token_id].tolist())
                parts[(a * ranks + rank) * micro + i] = (image, ids, int(batch["dataset"][i]))
    assert sorted(parts) == list(range(size))  # disjoint, and together the whole
    return [parts[i] for i in range(size)]


@pytest.mark.parametrize("ranks, micro", [(2, 12), (3, 4), (8, 3), (2, 3)])
def test_the_global_batch_does_not_depend_on_ranks(mixture, ranks, micro):
    for step in (0, 5):
        assert global_batch(mixture, step, ranks, micro) == global_batch(mixture, step, 1, 24)


def test_batch_k_is_a_function_of_seed_and_k(mixture):
    assert global_batch(mixture, 3, 1, 24) == global_batch(mixture, 3, 1, 24)
    other = open_mixture(mixture.cfg.model_copy(update={"seed": 8}), TOKENIZER)
    assert global_batch(mixture, 3, 1, 24) != global_batch(other, 3, 1, 24)


@pytest.mark.parametrize("workers", [0, 2])
def test_batch_k_reached_by_iterating_is_batch_k(mixture, workers):
    """Through the training loop's loader, from the start and from step 3, and asked for by its number."""
    batches = TrainBatches(mixture, 24, 12, 1, 2)
    iterated = list(make_loader(batches, workers, range(6)))
    resumed = iterated[:3] + list(make_loader(batches, workers, range(3, 6)))
    for k in range(6):
        for other in (iterated[k], resumed[k]):
            assert batches[k].keys() == other.keys()
            for key, value in batches[k].items():
                np.testing.assert_array_equal(value, other[key])


# ------------------------------------------------------------------------------------------------------------
# Samples and batches


def test_collated_batches_equal_openvla():
    golden = json.loads((RLDS.parent / "model/prompts_tokens.json").read_text())["builders"]
    for builder in golden.values():
        expected = builder["collated"]["batch_first4"]
        cases = [builder["cases"][i] for i in expected["case_indices"]]
        samples = [{"input_ids": np.array(case["input_ids"]),
                    "labels": np.array(case["labels_predict_stop_token_true"])} for case in cases]
        batch = collate(samples, 32000)
        np.testing.assert_array_equal(batch["input_ids"], expected["input_ids"])
        np.testing.assert_array_equal(batch["labels"], expected["labels"])
        np.testing.assert_array_equal(batch["input_ids"] != 32000, expected["attention_mask"])


def test_a_sample_is_what_it_says(mixture):
    d, row = 1, int(mixture.stretches[1][0][0])
    sample = mixture.sample(d, row)
    assert sample["images"].shape == (1, 32, 32, 3) and sample["images"].dtype == np.uint8
    learned = sample["labels"] != data.IGNORE_INDEX
    assert learned.sum() == 8 and learned[-8:].all()
    np.testing.assert_array_equal(sample["labels"][learned], sample["input_ids"][-8:])
    assert sample["input_ids"][-1] == TOKENIZER.eos_token_id
    decoded = mixture.action_tokenizer.decode(sample["input_ids"][-8:-1])
    np.testing.assert_allclose(decoded, mixture.actions(d, np.array([row]))[0, 0], atol=1 / 255 + 1e-6)


def test_windows_and_cameras(data_config):
    golden = np.load(RLDS / "golden/viola.npz")
    config = data_config(data_mix="viola", window_size=3, cameras=["primary", "wrist"], use_proprio=True,
                         image_size=32)
    mixture = open_mixture(config, TOKENIZER)
    first = int(mixture.tables[0].first_frames[0])
    one = open_mixture(data_config(data_mix="viola", image_size=32), TOKENIZER)
    for frame in range(4):
        sample = mixture.sample(0, first + frame)
        assert sample["images"].shape == (6, 32, 32, 3) and sample["proprio"].shape == (mixture.cfg.proprio_dim,)
        for i in range(3):  # the past first; before the beginning, the first frame again
            expected = one.sample(0, first + max(frame - 2 + i, 0))["images"][0]
            np.testing.assert_array_equal(sample["images"][2 * i], expected)
        np.testing.assert_array_equal(sample["proprio"], golden["ep0/proprio_q99"][frame])


def test_undecodable_images_are_named(data_config, tmp_path):
    """A shard is damaged after it was indexed."""
    shutil.copytree(RLDS / "data/viola", tmp_path / "viola")
    mixture = open_mixture(data_config(data_mix="viola", data_root_dir=str(tmp_path)), TOKENIZER)
    row = int(mixture.stretches[0][0][0])
    with open(next((tmp_path / "viola").rglob("*-train.tfrecord*")), "r+b") as file:
        file.seek(mixture.tables[0].frames[row]["offset"][0])
        file.write(b"no JPEG at all")
    with pytest.raises(DataError, match=r"viola-train.*record 0: frame 0: "):
        mixture.sample(0, row)


def test_worker_memory_stays_flat(mixture):
    """Thousands of samples leave nothing behind."""
    batches = TrainBatches(mixture, 32, 32, 0, 1)
    for i in range(20):
        batches[i]
    before = psutil.Process().memory_info().rss
    for i in range(20, 120):
        batches[i]
    assert psutil.Process().memory_info().rss - before < 15e6


# ------------------------------------------------------------------------------------------------------------
# Images

IMAGES = np.load(RLDS / "images.npz")
IMAGE_FACTS = json.loads((RLDS / "images.json").read_text())


def within_one(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Share of values that differ by at most one."""
    return float((np.abs(ours.astype(int) - theirs.astype(int)) <= 1).mean())


@pytest.mark.parametrize("i", range(len(IMAGE_FACTS["frames"])))
def test_decoding_and_resizing_equal_tensorflow(i):
    raw = IMAGES[f"f{i}/raw_bytes"].tobytes()
    height, width, _ = IMAGE_FACTS["frames"][i]["shape"]
    if f"f{i}/decoded" in IMAGES.files and height == width:
        np.testing.assert_array_equal(decode_image(raw, height), IMAGES[f"f{i}/decoded"])
    share = within_one(decode_image(raw, 224), IMAGES[f"f{i}/resized224"])
    shrinks = min(height, width) >= 224
    assert share > (0.999 if shrinks else 0.98)


@pytest.mark.parametrize("case", IMAGE_FACTS["augment"], ids=lambda case: str(case["index"]))
def test_augmentation_equals_openvla(case):
    params = case["params"]
    crop = params["random_resized_crop"]
    ours = augment(IMAGES[f"f{case['input_frame']}/resized224"], crop["h_offset"], crop["w_offset"],
                   params["random_brightness"]["delta"], params["random_contrast"]["factor"],
                   params["random_saturation"]["factor"], params["random_hue"]["delta"])
    assert within_one(ours, IMAGES[f"a{case['index']}/output"]) > 0.9999


def test_augmentation_is_drawn_from_openvlas_ranges():
    draws = np.array([list(draw_augmentation(data.mix_bits(seed, 0, np.arange(6)) / 2.0**64).values())
                      for seed in range(4000)])
    low, high = [0, 0, -0.2, 0.8, 0.8, -0.05], [0.0513167, 0.0513167, 0.2, 1.2, 1.2, 0.05]
    assert (draws >= low).all() and (draws <= high).all()
    spread = np.array(high) - low
    np.testing.assert_allclose(draws.mean(0), np.mean([low, high], 0), atol=0.02 * spread.max())
    assert np.abs(np.corrcoef(draws.T) - np.eye(6)).max() < 0.06  # crops leave the diagonal, unlike OpenVLA's


def test_no_image_is_black():
    assert decode_image(b"", 16).shape == (16, 16, 3) and not decode_image(b"", 16).any()
