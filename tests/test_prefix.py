"""predict_action(prefix=...) continues a chunk whose first actions are settled."""

import numpy as np
import pytest
import tensorflow_datasets as tfds
import torch
import yaml
from conftest import TINY, open_mixture
from test_model import tiny_policy as untrained

from act import Policy, load_vla
from action_tokenizer import load_tokenizer
from data import TrainBatches
from machinery.config import TrainConfig, UserError, load_config
from machinery.rlds import write_rlds
from model import at_positions

DRAW = np.random.default_rng(5)
IMAGES = DRAW.integers(0, 256, (3, 2, 40, 30, 3), dtype=np.uint8)
TEXTS = ["reach a goal position", "push", "Push a button on the coffee machine"]
KINDS = [{}, {"use_proprio": True, "cameras": ["primary", "wrist"], "arch_specifier": "linear"},
         {"parallel_decoding": True, "max_prefix": 3}]


def tiny_policy(**changes) -> Policy:
    policy = untrained(**changes)
    policy.norm_stats["a"]["action"]["mean"] = [0.0] * 4  # its length is the number of dimensions
    return policy


def batch(policy) -> dict:
    """Three requests with prompts of different lengths."""
    proprio = np.linspace(-1, 1, 12).reshape(3, 4) if policy.cfg.use_proprio else None
    return {"image": [[*images[: len(policy.cfg.cameras)]] for images in IMAGES], "instruction": TEXTS,
            "proprio": proprio}


@pytest.mark.parametrize("changes", KINDS[:2])
def test_a_prefix_of_its_own_actions_changes_nothing(changes):
    """Autoregressive decoding already conditions on earlier actions."""
    policy = tiny_policy(action_chunk=4, **changes)
    asked = batch(policy)
    whole = policy.predict_action(**asked)
    assert len(np.unique(whole)) > 4
    for steps in range(4):
        again = policy.predict_action(**asked, prefix=whole[:, :steps])
        np.testing.assert_array_equal(again, whole)


@pytest.mark.parametrize("changes", KINDS)
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_the_rest_is_what_training_would_predict_after_them(steps, changes):
    """Teacher-forced on the prefix and the tokens after it, or in parallel as in VLA.forward."""
    policy = tiny_policy(action_chunk=4, **changes)
    vla, asked, count = policy.vla, batch(policy), 4 * policy.cfg.action_dim
    prefix = DRAW.uniform(-1, 1, (3, steps, 4))
    known = policy.known_tokens(prefix, 3, None)
    images, prompts, proprio = policy.prepare(asked["image"], TEXTS, None, asked["proprio"])
    tokens = policy.generate(images, prompts, proprio, known)
    assert tokens.shape == (3, count) and known.shape == (3, 4 * steps)
    assert torch.equal(tokens[:, : 4 * steps], known)

    for i, prompt in enumerate(prompts):
        ids = torch.tensor([[*prompt, *tokens[i].tolist()]])
        with torch.inference_mode():
            inputs = vla.embed(images[i : i + 1], ids, None if proprio is None else proprio[i : i + 1])
            places = torch.arange(inputs.shape[1] - count, inputs.shape[1])[None]
            if policy.cfg.parallel_decoding:
                inputs = vla.insert_queries(inputs, places, torch.tensor([[4 * steps]]))
            hidden = vla.llm.base_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
            predicted = policy.best_action(at_positions(hidden, places - 1))
        assert torch.equal(predicted[0, 4 * steps :], tokens[i, 4 * steps :])

    # in the robot's units, alone as in a batch
    actions = policy.predict_action(**asked, prefix=prefix)
    np.testing.assert_allclose(actions[:, :steps], prefix, atol=1 / 255 + 1e-6)
    one = {key: None if value is None else value[1] for key, value in asked.items()}
    np.testing.assert_array_equal(policy.predict_action(**one, prefix=prefix[1]), actions[1])
    if steps == 3:
        assert not np.array_equal(policy.predict_action(**asked)[:, 3], actions[:, 3])


@pytest.mark.parametrize("changes, prefix, message", [
    ({}, np.zeros((4, 4)), "prefix of 4 steps.*up to 3"),
    ({}, np.zeros((1, 3)), r"prefix of shape \(1, 3\).*\(k, 4\).*action\[0\]"),
    ({}, np.zeros(4), r"prefix of shape \(4,\)"), ({}, np.zeros((1, 1, 1, 4)), "of shape"),
    ({}, np.full((1, 4), np.nan), "finite"), ({}, np.full((1, 4), 1e300), "finite"),
    ({"action_chunk": 1}, np.zeros((1, 4)), "up to 0"),
    ({"parallel_decoding": True}, np.zeros((1, 4)), "up to 0.*max_prefix"),
    ({"parallel_decoding": True, "max_prefix": 2}, np.zeros((3, 4)), "up to 2.*max_prefix"),
])
def test_bad_prefixes_are_refused(changes, prefix, message):
    policy = tiny_policy(**{"action_chunk": 4, **changes})
    with pytest.raises(UserError, match=message):
        policy.predict_action(IMAGES[0, 0], "push", prefix=prefix)


@pytest.mark.parametrize("image", [IMAGES[0, 0, :0], IMAGES[0, 0] / 255, IMAGES[0, 0].transpose(2, 0, 1)])
def test_bad_images_are_refused(image):
    with pytest.raises(UserError, match=r"image of shape .*uint8"):
        tiny_policy().predict_action(image, "push")


def test_out_of_range_prefixes_are_clipped_as_in_training():
    policy = tiny_policy(action_chunk=2)
    got = policy.predict_action(IMAGES[0, 0], "push", prefix=[[7, -7, 0.5, 7]])
    np.testing.assert_allclose(got[0], [1, -1, 0.5, 1], atol=1 / 255)


@pytest.mark.parametrize("changes", [{"max_prefix": 2}, {"parallel_decoding": True, "max_prefix": 8},
                                     {"parallel_decoding": True, "max_prefix": -1}])
def test_a_max_prefix_without_meaning_is_refused(changes, tiny):
    with pytest.raises(UserError, match="max_prefix"):
        load_config(tiny(action_chunk=8, **changes))


def test_prefix_length_is_a_function_of_the_sample(tmp_path):
    tokenizer = load_tokenizer(TINY["tokenizer"], add_action_tokens=True)
    values = {key: value for key, value in TINY.items() if key in TrainConfig.model_fields}
    cfg = TrainConfig(**values, action_chunk=8, parallel_decoding=True, max_prefix=3, index_dir=str(tmp_path))
    mixture = open_mixture(cfg, tokenizer)
    whole = TrainBatches(mixture, 96, 96, 0, 1)[5]["prefix_length"]
    assert whole.shape == (96, 1) and sorted(set(whole[:, 0].tolist())) == [0, 4, 8, 12]
    parts = {}
    for rank in range(2):
        batches = TrainBatches(mixture, 96, 12, rank, 2)
        for micro in range(4):
            parts[micro, rank] = batches[5 * 4 + micro]["prefix_length"]
    assert torch.equal(torch.cat([parts[key] for key in sorted(parts)]), whole)
    other = open_mixture(cfg.model_copy(update={"seed": 8}), tokenizer)
    assert not torch.equal(TrainBatches(other, 96, 96, 0, 1)[5]["prefix_length"], whole)
    assert "prefix_length" not in TrainBatches(open_mixture(cfg, tokenizer, train=False), 8, 8, 0, 1)[0]
    without = open_mixture(cfg.model_copy(update={"max_prefix": 0}), tokenizer)
    assert "prefix_length" not in TrainBatches(without, 8, 8, 0, 1)[0]


@pytest.mark.parametrize("changes", [
    pytest.param({}, marks=pytest.mark.slow), {"parallel_decoding": True, "max_prefix": 2}])
def test_it_learns_to_continue_the_prefix(changes, tmp_path, plain_run):
    """Demonstrations pass an obstacle on the left or right, and the image does not show which."""
    f, draw = tfds.features, np.random.RandomState(0)
    features = {"steps": f.Dataset({
        "observation": {"image": f.Image(shape=(32, 32, 3), encoding_format="jpeg")},
        "action": f.Tensor(shape=(2,), dtype=np.float32), "language_instruction": f.Text()})}
    gray = {"image": np.full((32, 32, 3), 120, np.uint8)}

    def episode(side: int) -> dict:
        return {"steps": [{"observation": gray, "language_instruction": "pass it", "action": np.float32(
            [side * 0.4, draw.uniform(0, 1)])} for _ in range(6)]}

    splits = {split: [episode(side) for side in (-1, 1) * count]
              for split, count in (("train", 20), ("val", 2))}
    write_rlds(tmp_path, "pass", "1.0.0", features, splits)
    config = {**TINY, "data_root_dir": str(tmp_path), "data_mix": "pass", "run_root_dir": str(tmp_path),
              "datasets": {"pass": {"primary": "image",
                                    "action": "action[:1] target, action[1:] target raw"}},
              "action_chunk": 4, "max_steps": 200, "learning_rate": 3e-3, "run_id": "run",
              "per_device_batch_size": 16, **changes}
    (tmp_path / "pass.yaml").write_text(yaml.safe_dump(config))
    done = plain_run(tmp_path / "pass.yaml", "--deepspeed_config", "ds_configs/cpu.json")
    assert done.returncode == 0, done.text
    policy = load_vla(tmp_path / "run")
    for side in (-1, 1):
        for steps in (1, 2):
            prefix = [[side * 0.4, 0.3]] * steps
            got = policy.predict_action(gray["image"], "pass it", prefix=prefix)
            np.testing.assert_allclose(got[:, 0], side * 0.4, atol=0.02)
