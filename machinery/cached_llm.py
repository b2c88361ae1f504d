"""A language model that continues a sequence: the keys and values of earlier tokens are kept.

Only acting needs it. act.tokens_of fills the cache.
"""

import inspect
from collections.abc import Callable

from torch import nn
from transformers import StaticCache

from machinery.backbones import check_window


def make_cache(llm: nn.Module, batch: int, slots: int) -> StaticCache:
    """Room for the keys and values of `slots` tokens, on the llm's device and in its dtype."""
    config = llm.config
    check_window(config, slots)
    cache = StaticCache(config, max_cache_len=slots)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache.early_initialization(batch, heads, width, llm.dtype, llm.device)
    return cache


def cached_forward(llm: nn.Module) -> Callable:
    """Returns forward(inputs, mask, positions, cache) -> hidden states (B, S, hidden).

    inputs (B, S, hidden) follow the tokens in the cache; mask (B, 1, S, slots), positions (B, S).
    """
    base = llm.base_model
    parameters = inspect.signature(base.forward).parameters
    name = "cache" if "cache" in parameters else "past_key_values"  # depends on the version

    def forward(inputs, mask, positions, cache):
        return base(inputs_embeds=inputs, attention_mask=mask, position_ids=positions,
                    use_cache=True, **{name: cache}).last_hidden_state

    return forward
