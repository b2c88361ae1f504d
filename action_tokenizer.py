"""What the language model reads and says: the prompt, and robot actions as token ids.

A VLA says a robot action as it would say words: each action dimension, normalised to [-1, 1], falls into one
of 256 bins, and each bin is one of the last 256 token ids of the language model's vocabulary. Read this file
first; it is the whole difference between a vision-language model and a vision-language-action model. A
training sequence is

    <s> In: What action should the robot take to {instruction}?\nOut:  a1 a2 a3 a4 a5 a6 a7 </s>

The rules, and their quirks, are OpenVLA's (prismatic/vla/action_tokenizer.py), so its checkpoints keep their
meaning:

    id = vocab_size - bin,   bin in 1..256        -1.0 -> the last id,   +1.0 -> the 256th id from the end

256 edges enclose only 255 intervals, so bins 255 and 256 (only +1.0 lands in 256) decode to the same centre.
"""

import functools
from collections.abc import Mapping

import numpy as np
from transformers import PreTrainedTokenizerBase

from machinery.backbones import open_tokenizer
from machinery.config import UserError, load_table

PROMPTS = load_table("prismatic")["prompts"]  # how a base model was taught to be asked; `pure` is above


def load_tokenizer(path: str, add_action_tokens: bool = False) -> PreTrainedTokenizerBase:
    """The text tokenizer of a directory or hub id, with `action_vocab_size` for ActionTokenizer.

    Llama's last 256 ids are rare characters nobody will miss; for vocabularies that do not end so,
    add_action_tokens appends 256 ids of their own. Then, as in OpenVLA, comes one for padding (there 32000).
    """
    tokenizer = open_tokenizer(path)
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer: {path!r} has no eos_token, with which every training sequence ends: "
                        "name one in its tokenizer_config.json")
    tokenizer.action_vocab_size = tokenizer.vocab_size
    if add_action_tokens:
        tokenizer.add_tokens([f"<action_{i}>" for i in range(256)])
        tokenizer.action_vocab_size = tokenizer.convert_tokens_to_ids("<action_255>") + 1
    tokenizer.add_special_tokens({"pad_token": "<PAD>"})
    return tokenizer


def prompt_ids(tokenizer: PreTrainedTokenizerBase, instruction: str, prompt_style: str = "pure") -> list[int]:
    """Token ids from <s> up to where the action begins: the same for training and acting."""
    question = f"What action should the robot take to {instruction.lower()}?".replace("<image>", "")
    ids = tokenizer(PROMPTS[prompt_style].format(question=question), add_special_tokens=True).input_ids
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids = ids if ids[0] == bos else [bos, *ids]  # the image patches follow this first token
    # OpenVLA tokenised "Out: " + action text; with Llama's tokenizer that space is a token of its own
    space = tokenizer.convert_tokens_to_ids("\u2581")
    return ids if space in (None, tokenizer.unk_token_id) else [*ids, space]


class ActionTokenizer:
    """Turns actions into the last `n_bins` ids below `vocab_size`, and back.

    vocab_size: number of ids the text tokenizer knows, without padding (Llama-2: 32000, not 32001 or 32064)
    """

    def __init__(self, vocab_size: int, n_bins: int = 256):
        if vocab_size <= n_bins:
            raise UserError(f"vocab_size {vocab_size} leaves no room for {n_bins} action tokens")
        self.vocab_size, self.n_bins = vocab_size, n_bins
        self.bins = np.linspace(-1.0, 1.0, n_bins)  # edges, float64
        self.bin_centers = (self.bins[:-1] + self.bins[1:]) / 2.0  # one fewer than edges
        self.first_id = vocab_size - n_bins  # the smallest action id; it means +1

    def encode(self, actions: np.ndarray) -> np.ndarray:
        """Normalised actions (..., action_dim) float -> token ids of the same shape, int64.

        Values beyond [-1, 1] are clipped, as OpenVLA does. NaN and infinity raise UserError: they are broken
        data, and clipping would turn them into a confident full-speed command.
        """
        actions = np.asarray(actions)
        if not np.isfinite(actions).all():
            raise UserError(f"cannot tokenise a non-finite action: {actions.tolist()}")
        return self.vocab_size - np.digitize(np.clip(actions, -1.0, 1.0), self.bins)

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """Token ids of any shape -> normalised actions of the same shape, float64 bin centres in (-1, 1).

        Ids that are no action tokens are clipped to the nearest one, exactly as OpenVLA does.
        """
        return self.bin_centers[self.bin_index(np.asarray(ids))]

    def bin_index(self, ids):
        """Token ids (NumPy array, or tensor on any device) -> index of the bin centre, 0..n_bins-2."""
        return (self.vocab_size - ids - 1).clip(0, self.n_bins - 2)


# ---- Normalisation -----------------------------------------------------------------------------------------


def normalize(values: np.ndarray, stats: Mapping, kind: str) -> np.ndarray:
    """(..., D) float32 -> the same in [-1, 1] (kind "bounds_q99", "bounds") or of unit deviation ("normal").

    stats: "action" or "proprio" of dataset_statistics.json. Bit for bit OpenVLA's, which zeroes dimensions
    that never change, even where mask is false, which else means: left alone (a gripper, always 1, is 0).
    """
    f32 = functools.partial(np.asarray, dtype=np.float32)
    mask = np.array(stats.get("mask", [True] * values.shape[-1]))
    if kind == "normal":
        return np.where(mask, (values - f32(stats["mean"])) / f32(np.array(stats["std"]) + 1e-8), values)
    low, high = (np.array(stats[key]) for key in BOUNDS[kind])
    scaled = np.clip(np.float32(2) * (values - f32(low)) / f32(high - low + 1e-8) - np.float32(1), -1, 1)
    constant = np.array(stats["min"]) == np.array(stats["max"])
    return np.where(constant, np.float32(0), np.where(mask, scaled, values))


def unnormalize(actions: np.ndarray, stats: Mapping, kind: str) -> np.ndarray:
    """Undo normalize for actions (..., D) float64, as OpenVLA's predict_action does: dimensions whose mask is
    false stay as they are (a gripper in 0..1), so constants among them that became 0 stay 0."""
    mask = np.array(stats.get("mask", [True] * actions.shape[-1]))
    if kind == "normal":
        return np.where(mask, actions * (np.array(stats["std"]) + 1e-8) + np.array(stats["mean"]), actions)
    low, high = (np.array(stats[key]) for key in BOUNDS[kind])
    return np.where(mask, 0.5 * (actions + 1) * (high - low) + low, actions)


BOUNDS = {"bounds_q99": ("q01", "q99"), "bounds": ("min", "max")}
