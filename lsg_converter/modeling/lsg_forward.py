"""LSG attention as an attention module of Transformers calls it: of a text alone, with all that a model may ask for.

What LSG can honour it does; what it cannot raises, and names it.
"""

import logging
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch

from .lsg_attention import sdpa_kernel
from .lsg_layout import Window, is_exporting, pad_to_multiple, take_windows
from .lsg_step import repeat_heads
from .lsg_text import key_mask, lsg_arguments, text_attention


logger = logging.getLogger(__name__)

# What some models hand to their attention, and LSG has no place for.
REFUSED = {
    "position_bias": "it adds no bias to scores",
    "softcap": "it does not cap scores",
    "s_aux": "it has no attention sinks",
    "sinks": "it has no attention sinks",
    "indices": "it chooses its keys itself",
    "block_indices": "it chooses its keys itself",
    "cu_seq_lens_q": "it takes no texts that stand end to end",
    "output_attentions": "it returns no probabilities",
}


def lsg_forward(
    fields: Mapping[str, Any],
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What a model's attention module calls, as `AttentionInterface` has it.

    Args:
        fields: by their names in `FIELDS`; those of a dictionary `lsg` in the model's configuration count before them.
        query, key, value: shape (batch, heads, tokens, head_dim); keys and values may have fewer heads and more tokens.
        attention_mask: of the keys, as `key_mask` takes it, and of the text so far. One of four dimensions says all
            that a query sees, so that it is not causal.
        is_causal: whether a token sees none behind it; None for what the module says.
        sliding_window: tokens up to which a key may be away, this number not included.

    Returns:
        Shape (batch, tokens, heads, head_dim), and None in the place of probabilities.

    Raises:
        ValueError: where the model's attention does what LSG cannot.
    """
    for name, reason in REFUSED.items():
        given = kwargs.get(name)
        if given is not None and given is not False:
            raise ValueError(f"{name}: {type(module).__name__} asks its attention for it; LSG cannot: {reason}")
    if getattr(getattr(module, "config", None), "output_attentions", False):
        raise ValueError("output_attentions: the configuration asks for it; LSG cannot: it returns no probabilities")
    if type(kwargs.get("cache")).__name__ == "PagedAttentionCache":
        raise ValueError("cache: LSG cannot read a paged one; use generate() without continuous batching")
    causal = getattr(module, "is_causal", None) if is_causal is None else is_causal
    if attention_mask is not None and attention_mask.dim() == 4:
        causal = False
    elif causal is None:
        raise ValueError(f"is_causal: {type(module).__name__} does not say whether a token sees those behind it")
    queries, keys = query.shape[2], key.shape[2]
    mask = key_mask(attention_mask, key)
    if causal and mask.shape[1] < keys:  # of a static cache, whose keys are yet to come
        keys = mask.shape[1]
        key, value = key[:, :, :keys], value[:, :, :keys]
    dense = not causal and (keys != queries or is_cross_attention(module))
    own = getattr(getattr(module, "config", None), "lsg", None) or {}
    if not isinstance(own, Mapping):
        raise ValueError(f"lsg: got {own!r} in the configuration; it must be a dictionary of fields of LSG attention")
    arguments = lsg_arguments({**fields, **own})
    if sliding_window is not None and not dense:
        reach = 2 * arguments["block_size"] + arguments["sparse_block_size"] * arguments["sparsity_factor"]
        if sliding_window > reach:
            warn_of_window(sliding_window, reach)
        mask = mask[:, mask.shape[1] - keys :]  # its cache forgets
        output = sliding_attention(query, key, value, mask, sliding_window, causal, scaling, dropout)
    elif mask.shape[1] != keys:
        raise ValueError(
            f"attention_mask: got {mask.shape[1]} tokens for {keys} keys in {type(module).__name__}; LSG needs the "
            "keys of the whole text"
        )
    elif dense:
        output = ordinary_attention(query, key, value, mask[:, None, None], scaling, dropout)
    else:
        output = text_attention(query, key, value, mask, causal=causal, scaling=scaling, dropout=dropout, **arguments)
    return output.transpose(1, 2).contiguous(), None


def require_tensor(holds: torch.Tensor | bool, message: str) -> None:
    """Raise ValueError unless it holds. A graph of `torch.compile`, which cannot depend on a tensor, checks it when
    it runs and raises RuntimeError; Inductor takes no double quotes in the message."""
    if isinstance(holds, torch.Tensor) and torch.compiler.is_compiling():
        torch._assert_async(holds, message)
    elif not holds:
        raise ValueError(message)


@lru_cache
def warn_of_window(window: int, reach: int) -> None:
    """Say once that a sliding window stays, though LSG would see less."""
    logger.warning(
        f"LSG attention: a layer keeps its sliding window of {window} tokens; LSG would look back {reach} at most"
    )


def is_cross_attention(module: torch.nn.Module) -> bool:
    """Whether a module, which is not causal, attends from one text to another."""
    is_part_of_decoder = getattr(module, "is_decoder", False) and not getattr(module, "is_causal", True)
    return is_part_of_decoder or getattr(module, "is_cross_attention", False) or "Cross" in type(module).__name__


def ordinary_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    """Softmax attention under a mask, (batch, 1, queries or 1, keys)."""
    key, value = (repeat_heads(x, query.shape[1]) for x in (key, value))
    if scaling is not None:
        query = query * (scaling * query.shape[3] ** 0.5)
    return sdpa_kernel(query, key, value, mask, dropout)[0]


def sliding_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    window: int,
    causal: bool,
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    """What a layer with a sliding window has instead of LSG: a query sees the keys that are less than `window` away; in
    the causal form those that are not behind it. The queries are the last of the keys' tokens. Its cost grows with the
    length times the window."""
    queries, keys = query.shape[2], key.shape[2]

    def band(queries: int, keys: int, first_query: int) -> torch.Tensor:
        """Which keys are near, by their places and those of queries that begin at that of `first_query`."""
        query_place, key_place = (torch.arange(size, device=query.device) for size in (queries, keys))
        distance = query_place[:, None] + first_query - key_place
        return (distance < window) & (distance >= (0 if causal else 1 - window))

    block = -(-max(window - 1, 1) // 16) * 16  # what is farther away than a block is not seen
    if queries < keys or (not is_exporting() and keys <= 2 * block):
        keys = min(keys, queries + window - 1) if causal else keys
        key, value, mask = key[:, :, -keys:], value[:, :, -keys:], mask[:, -keys:]
        near = band(queries, keys, keys - queries)
        return ordinary_attention(query, key, value, near & mask[:, None, None], scaling, dropout)
    # Blocks join the batch.
    seen = Window(offset=-block, size=(2 if causal else 3) * block, step=block)
    own = pad_to_multiple(query, block, dim=2)
    num_blocks = own.shape[2] // block
    own = own.unflatten(2, (num_blocks, block)).transpose(1, 2).flatten(0, 1)
    seen_key, seen_value, seen_mask = (
        take_windows(pad_to_multiple(x, block, dim=2), seen, num_blocks).transpose(1, 2).flatten(0, 1)
        for x in (key, value, mask[:, None])
    )
    near = band(block, seen.size, block) & seen_mask[:, :, None]
    output = ordinary_attention(own, seen_key, seen_value, near, scaling, dropout)
    return output.unflatten(0, (-1, num_blocks)).transpose(1, 2).flatten(2, 3)[:, :, :keys]
