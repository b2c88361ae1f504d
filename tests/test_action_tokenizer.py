"""Actions and prompts as OpenVLA tokenizes them."""

import json

import numpy as np
import pytest
from conftest import GOLDEN_MODEL, LLAMA_TOKENIZER, ROOT
from hypothesis import given
from hypothesis import strategies as st

from action_tokenizer import ActionTokenizer, load_tokenizer, prompt_ids

TABLES = json.loads((GOLDEN_MODEL / "action_tokenizer.json").read_text())
PROMPTS = json.loads((GOLDEN_MODEL / "prompts_tokens.json").read_text())["builders"]


@pytest.mark.parametrize("vocab_size", sorted(TABLES, key=int))
def test_encode_and_decode_equal_openvla(vocab_size):
    tokenizer, golden = ActionTokenizer(int(vocab_size)), TABLES[vocab_size]
    assert tokenizer.first_id == golden["action_token_begin_idx"] + 1
    for table, key, dtype in (("encode", "actions_float64", np.float64),
                              ("encode_float32_inputs", "actions_float32", np.float32)):
        actions = np.array([float(text) for text in golden[table][key]], dtype)
        finite = np.isfinite(actions)  # OpenVLA clips infinities; we refuse them
        expected = np.array(golden[table]["token_ids"])
        np.testing.assert_array_equal(tokenizer.encode(actions[finite]), expected[finite])
    for table in ("decode", "decode_out_of_range"):
        expected = np.array([float(value) for value in golden[table]["actions"]])
        np.testing.assert_array_equal(tokenizer.decode(golden[table]["token_ids"]), expected)
    batch = golden["batch_2d"]
    actions = np.array([[float(value) for value in row] for row in batch["actions"]])
    np.testing.assert_array_equal(tokenizer.encode(actions), batch["token_ids"])


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=30), st.sampled_from([300, 448, 32000, 151643]))
def test_decoding_an_encoded_action_is_off_by_at_most_half_a_bin(values, vocab_size):
    tokenizer = ActionTokenizer(vocab_size)
    ids = tokenizer.encode(np.array(values))
    assert ids.min() >= vocab_size - 256 and ids.max() < vocab_size
    np.testing.assert_allclose(tokenizer.decode(ids), values, atol=1 / 255 + 1e-12)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_actions_are_refused(value):
    with pytest.raises(ValueError, match="non-finite"):
        ActionTokenizer(32000).encode(np.array([[0.0, value]]))


def test_prompts_actions_and_labels_equal_openvla():
    tokenizer = load_tokenizer(str(LLAMA_TOKENIZER))
    actions = ActionTokenizer(tokenizer.action_vocab_size)
    assert (tokenizer.action_vocab_size, tokenizer.pad_token_id, len(tokenizer)) == (32000, 32000, 32001)
    for style, builder in PROMPTS.items():
        for case in builder["cases"]:
            prompt = prompt_ids(tokenizer, case["instruction"], style)
            assert [*prompt, *actions.encode(case["action"]), tokenizer.eos_token_id] == case["input_ids"]
            # OpenVLA's evaluation scripts forget to remove "<image>"; we ask as we trained
            if "<image>" not in case["instruction"]:
                assert prompt == case["inference_ids_after_append"]


def test_added_action_tokens_come_after_the_vocabulary():
    tokenizer = load_tokenizer(str(ROOT / "configs/demo_tokenizer"), add_action_tokens=True)
    assert tokenizer.action_vocab_size == 512 + 256
    assert tokenizer.pad_token_id == 768
    ids = ActionTokenizer(tokenizer.action_vocab_size).encode(np.array([-1.0, 1.0]))
    assert tokenizer.convert_ids_to_tokens(ids.tolist()) == ["<action_255>", "<action_0>"]
