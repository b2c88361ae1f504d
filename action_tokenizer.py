"""What the language model reads and writes: the prompt, and robot actions as token ids.

Read this file first: it is the whole difference between a vision-language model and a
vision-language-action model. A VLA writes an action the way it would write words. Each dimension,
normalized to [-1, 1], falls into one of 256 bins, and each bin is one of the last 256 ids of the
language model's vocabulary. A training sequence is

    <s> In: What action should the robot take to {instruction}?\nOut:  a1 a2 a3 a4 a5 a6 a7 </s>

The rules and their quirks are OpenVLA's (prismatic/vla/action_tokenizer.py), so that its
checkpoints keep their meaning:

    id = vocab_size - bin,   bin in 1..256     -1.0 -> the last id,  +1.0 -> the 256th from the end

256 edges enclose only 255 intervals: bin 256, which only +1.0 reaches, decodes like bin 255.
"""

import unicodedata
from collections.abc import Mapping

import numpy as np
from transformers import PreTrainedTokenizerBase

from machinery.backbones import open_tokenizer
from machinery.config import UserError, load_table

PROMPTS = load_table("prismatic")["prompts"]  # how each base model is asked; `pure` is above
SENTENCEPIECE_SPACE = "\u2581"  # Llama's vocabulary writes a space as this character
IGNORE_INDEX = -100  # label of tokens that are not learned, cross_entropy's default
MAX_PROMPT = 512  # tokens; Open X-Embodiment's longest prompts have about 100


def load_tokenizer(path: str, add_action_tokens: bool = False) -> PreTrainedTokenizerBase:
    """The text tokenizer in a directory or under a hub id.

    It gets one attribute that is ours: `action_vocab_size`, the vocab_size for ActionTokenizer.
    Llama's last 256 ids are rare characters, so actions take them over. If a vocabulary ends in
    useful words, add_action_tokens appends 256 new ids instead. Raises UserError without </s>.
    """
    tokenizer = open_tokenizer(path)
    if tokenizer.eos_token_id is None:  # else every label at the end of an action would be None
        raise UserError(f"tokenizer {path!r}: set its eos_token in tokenizer_config.json")
    tokenizer.action_vocab_size = tokenizer.vocab_size
    if add_action_tokens:
        tokenizer.add_tokens([f"<action_{i}>" for i in range(256)])
        tokenizer.action_vocab_size = tokenizer.convert_tokens_to_ids("<action_255>") + 1
    tokenizer.add_special_tokens({"pad_token": "<PAD>"})  # after the action ids; 32000 in OpenVLA
    return tokenizer


def prompt_ids(tokenizer: PreTrainedTokenizerBase, instruction: str,
               prompt_style: str = "pure") -> list[int]:
    """Token ids from <s> up to where the action begins, the same for training and acting."""
    question = f"What action should the robot take to {instruction.lower()}?"
    question = question.replace("<image>", "")  # as Prismatic does: it marks an image in a chat
    text = unicodedata.normalize("NFC", PROMPTS[prompt_style].format(question=question))
    ids = tokenizer(text, add_special_tokens=True).input_ids
    begin = tokenizer.bos_token_id  # <s>: the image patches will follow this token
    if begin is None:  # some vocabularies, such as Qwen's, have none
        begin = tokenizer.eos_token_id
    if ids[0] != begin:
        ids = [begin, *ids]
    # OpenVLA tokenizes "Out: " + action; Llama's tokenizer makes that last space a token of its own
    space = tokenizer.convert_tokens_to_ids(SENTENCEPIECE_SPACE)
    if space not in (None, tokenizer.unk_token_id):
        ids = [*ids, space]
    if len(ids) > MAX_PROMPT:
        raise UserError(f"prompt of {len(ids)} tokens: shorten {instruction[:100]!r}")
    return ids


class ActionTokenizer:
    """Turns actions into the last `n_bins` ids below `vocab_size`, and back.

    vocab_size: ids that the text tokenizer knows, without padding (Llama-2: 32000, not 32064)
    """

    def __init__(self, vocab_size: int, n_bins: int = 256):
        if vocab_size <= n_bins:  # else ids would be negative, and index from the other end
            raise UserError(f"vocab_size {vocab_size} is too small for {n_bins} action tokens")
        self.vocab_size = vocab_size
        self.n_bins = n_bins
        self.first_id = vocab_size - n_bins  # the smallest action id; it means +1
        self.bins = np.linspace(-1.0, 1.0, n_bins)  # edges, float64
        self.bin_centers = (self.bins[:-1] + self.bins[1:]) / 2.0  # one fewer than edges

    def encode(self, actions: np.ndarray) -> np.ndarray:
        """Normalized actions (..., action_dim) float -> token ids of the same shape, int64.

        Clips to [-1, 1], as OpenVLA does. Raises UserError for NaN and infinity, which clipping
        would turn into a confident command at full speed.
        """
        actions = np.asarray(actions)
        if not np.isfinite(actions).all():
            raise UserError(f"cannot tokenize a non-finite action: {actions.tolist()}")
        bin_numbers = np.digitize(np.clip(actions, -1.0, 1.0), self.bins)  # 1..256
        return self.vocab_size - bin_numbers

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """Token ids of any shape -> bin centers of the same shape, float64 in (-1, 1).

        Ids that are not action tokens count as the nearest one, as in OpenVLA.
        """
        return self.bin_centers[self.bin_index(np.asarray(ids))]

    def bin_index(self, ids):
        """Token ids (NumPy array, or tensor on any device) -> index of the center, 0..n_bins-2."""
        return (self.vocab_size - ids - 1).clip(0, self.n_bins - 2)


# ---- Normalization ---------------------------------------------------------------------------

BOUNDS = {"bounds_q99": ("q01", "q99"), "bounds": ("min", "max")}  # what becomes -1 and +1


def normalize(values: np.ndarray, stats: Mapping, kind: str) -> np.ndarray:
    """(..., D) float32 -> the same shape, in [-1, 1] ("bounds_q99", "bounds"), or with mean 0 and
    deviation 1 ("normal"). Bit for bit as OpenVLA does.

    stats: "action" or "proprio" of dataset_statistics.json. Dimensions whose mask is false, such
    as a gripper in 0..1, pass unchanged. With bounds, constant dimensions become 0, masked or not.
    """
    mask = np.array(stats.get("mask", [True] * values.shape[-1]))
    if kind == "normal":
        mean = np.asarray(stats["mean"], np.float32)
        std = np.asarray(np.array(stats["std"]) + 1e-8, np.float32)
        return np.where(mask, (values - mean) / std, values)
    low, high = (np.array(stats[key]) for key in BOUNDS[kind])  # float64
    width = np.asarray(high - low + 1e-8, np.float32)
    scaled = np.float32(2) * (values - np.asarray(low, np.float32)) / width - np.float32(1)
    normalized = np.where(mask, np.clip(scaled, -1, 1), values)
    constant = np.array(stats["min"]) == np.array(stats["max"])
    return np.where(constant, np.float32(0), normalized)


def unnormalize(actions: np.ndarray, stats: Mapping, kind: str) -> np.ndarray:
    """Undo normalize for actions (..., D) float64, as OpenVLA's predict_action does.

    Dimensions whose mask is false pass unchanged, so a constant one among them stays 0.
    """
    mask = np.array(stats.get("mask", [True] * actions.shape[-1]))
    if kind == "normal":
        scaled = actions * (np.array(stats["std"]) + 1e-8) + np.array(stats["mean"])
    else:
        low, high = (np.array(stats[key]) for key in BOUNDS[kind])
        scaled = 0.5 * (actions + 1) * (high - low) + low
    return np.where(mask, scaled, actions)
