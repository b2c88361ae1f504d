"""The language model, any of transformers' causal ones that this project can both train and let act, and the
file of its tokenizer.

Training needs little of it: embeddings in, hidden states out, decoder blocks in a list. Acting needs more: a
cache of keys and values of fixed size, in which prompts of several lengths stand with padding after them
(act.Policy.tokens_of). Not every architecture has one, so `check_llm` tries it before anything is trained.
"""

import inspect
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from sentencepiece import SentencePieceProcessor
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    StaticCache,
)

from machinery.config import UserError, nearest, one_line, out_of_reach


def llm_config(spec: dict | str, num_tokens: int) -> PretrainedConfig:
    """The language model's transformers config. spec: its fields with model_type, or a directory or hub id
    to read them from. The vocabulary is num_tokens, rounded up to a multiple of 64. There is no dropout: a
    step depends on its batch alone, and recomputation finds the same activations again."""
    try:
        config = (AutoConfig.for_model(**spec) if isinstance(spec, dict)
                  else AutoConfig.from_pretrained(spec, local_files_only=out_of_reach(spec)))
    except Exception as error:  # transformers has many kinds for a wrong field
        raise UserError(f"llm_backbone: transformers makes no config of {spec!r}: {one_line(error)}") from error
    for key in spec if isinstance(spec, dict) else ():  # transformers keeps unknown ones, without effect
        known = {*vars(type(config)()), *config.attribute_map}
        if key not in known and (close := nearest(key, known, 0.85)):  # others may be of older files
            raise UserError(f"llm_backbone: unknown key {key!r}{close}")
    config.vocab_size = -(-num_tokens // 64) * 64
    if (getattr(config, "pad_token_id", None) or 0) >= config.vocab_size:
        with suppress(Exception):  # a few must have one: then transformers says so
            config.pad_token_id = None  # of a larger vocabulary; the tokenizer says what padding is
    for key, value in vars(config).items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    return config


def build_llm(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A causal language model with random weights. Raises UserError."""
    try:
        llm = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    except Exception as error:
        raise UserError(f"llm_backbone: transformers makes no {config.model_type}: {one_line(error)}") from error
    if not len(getattr(llm.base_model, "layers", ())):
        raise UserError(f"llm_backbone: {config.model_type} has no decoder blocks in `layers`, as Llama has")
    return llm


def check_llm(config: PretrainedConfig, longest: int, cached: bool) -> None:
    """Raise UserError for a language model that cannot train, or would train and then could not act.

    longest: the most tokens it may have to look back upon; cached: whether it will act token by token. It
    answers, and then acts, once on the meta device, where weights and activations take no memory or time.
    """
    with torch.device("meta"), torch.no_grad():
        llm, window = build_llm(config, torch.bfloat16), getattr(config, "sliding_window", None) or longest
        if any("position" in name and isinstance(part, nn.Embedding) for name, part in llm.named_modules()):
            window = min(window, config.max_position_embeddings)  # learned: there are no more of them
        if longest > window:
            raise UserError(f"llm_backbone: {config.model_type} looks back {window} tokens only; images, "
                            f"text of max_length and action may be {longest}: lower max_length, or take "
                            "another model, fewer cameras or smaller images")
        heads, shared = (getattr(config, f"num_{kind}_heads", None) for kind in ("attention", "key_value"))
        if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
            raise UserError(f"llm_backbone: {heads} num_attention_heads cannot share {shared} "
                            "num_key_value_heads: set a multiple of it")
        if getattr(config, "hidden_size_per_layer_input", 0):
            raise UserError(f"llm_backbone: {config.model_type} has a second embedding of each word, which "
                            "images have not: set hidden_size_per_layer_input: 0")
        # given, because transformers makes them by looking at numbers, which nothing here has
        mask, positions = torch.ones(1, 1, 8, 64, dtype=torch.bool), torch.arange(8)[None]
        try:
            inputs = torch.empty(1, 8, config.hidden_size, dtype=llm.dtype)
            llm.base_model(inputs_embeds=inputs, attention_mask=mask[..., :8], position_ids=positions,
                           use_cache=False)
        except Exception as error:  # each architecture fails in its own way
            if "meta" not in str(error):  # else it asked for numbers, and nothing is known
                raise UserError(f"llm_backbone: {config.model_type} fails where it is given embeddings, as "
                                f"images come: {one_line(error)}: take another, as Qwen3") from error
        if not cached:
            return
        acts = False
        with suppress(Exception):
            cache, forward = make_cache(llm, batch=1, slots=64), cached_forward(llm)
            for step in (slice(0, 8), slice(0, 1)):  # a prompt, then one token
                forward(inputs[:, step], mask[:, :, step], positions[:, step], cache)
            # a running state has no slots: the padding after a shorter prompt would become part of it
            plain = [hasattr(layer, "keys") and not hasattr(layer, "conv_states") for layer in cache.layers]
            acts = all(plain) and "recurrent" not in getattr(config, "block_types", ())
    if not acts:
        raise UserError(f"llm_backbone: {config.model_type} could be trained here, but then not act: it "
                        "keeps no plain keys and values of what it has seen (linear, hybrid or latent "
                        "attention?). Take one that does, as Llama, Qwen3 or Gemma")


def make_cache(llm: nn.Module, batch: int, slots: int) -> StaticCache:
    """Room for the keys and values of `slots` tokens, on the language model's device and of its dtype."""
    config, cache = llm.config, StaticCache(llm.config, max_cache_len=slots)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache.early_initialization(batch, heads, width, llm.dtype, llm.device)
    return cache


def cached_forward(llm: nn.Module) -> Callable:
    """-> a function of inputs (B, S, hidden), which come after what is in the cache; mask (B, 1, S, slots),
    positions (B, S) and the cache -> hidden states (B, S, hidden)."""
    base = llm.base_model
    parameters = inspect.signature(base.forward).parameters
    name = "cache" if "cache" in parameters else "past_key_values"  # as it was called formerly

    def forward(inputs, mask, positions, cache):
        return base(inputs_embeds=inputs, attention_mask=mask, position_ids=positions, **{name: cache},
                    use_cache=True).last_hidden_state

    return forward


def open_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory or hub id. Raises UserError when there is none, or it would not begin a
    text as its own file says: with the space that Llama's has before a first word, or without."""
    offline = out_of_reach(path)
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=offline)
        file = Path(tokenizer.init_kwargs.get("vocab_file") or "")
        if file.suffix != ".model" or file.with_name("tokenizer.json").exists():
            return tokenizer
        # sentencepiece's file alone: older transformers know that space only of the class that is named
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=offline)
        first = SentencePieceProcessor(model_file=str(file)).encode("In", out_type=str)[0]
    except Exception as error:  # transformers raises many kinds
        why = "the hub does not answer" if offline else one_line(error)
        raise UserError(f"tokenizer: {path!r} is none: {why}") from error
    if (begins := tokenizer.tokenize("In")[0])[0] != first[0]:
        raise UserError(f"tokenizer: {path!r}: transformers begins a text with {begins!r}, {file.name} with "
                        f"{first!r}: name its tokenizer_class (LlamaTokenizer?) in tokenizer_config.json")
    return tokenizer
