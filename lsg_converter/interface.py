"""LSG attention for any model of Transformers whose attention goes through its `AttentionInterface`.

A model hands over queries, keys and values, a mask of the keys, and what else its attention does. What LSG can honour
it does; what it cannot raises, and names it.
"""

import sys
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from transformers import MODEL_MAPPING, AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .modeling.lsg_forward import lsg_forward, require_tensor
from .modeling.lsg_text import lsg_arguments


# Parts of a name that Transformers takes for something else.
RESERVED = ("flash", "sdpa", "eager", "flex", "paged", "/", ":", "|")


def register_attention(name: str = "lsg", **fields: Any) -> None:
    """Let models of Transformers have LSG attention: `from_pretrained(..., attn_implementation=name)`.

    The first `num_global_tokens` tokens of a text serve as its global ones. Where the configuration of a model has a
    dictionary `lsg`, the fields in it count before those given here. A converted checkpoint is not touched.

    Args:
        name: what the attention is called, in this process. To register a name again is to change its fields.
        fields: `block_size`, `sparse_block_size`, `sparsity_factor`, `sparsity_type`, `num_global_tokens`,
            `full_attention_length`, `lsh_num_pre_rounds`, `lsh_seed` and `attention_kernel`, as in the configuration of
            a converted checkpoint; that kernel may be "eager" too.

    Raises:
        ValueError: where the name is taken or holds what Transformers reads as another attention, or a field is unknown
            or not allowed.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"name: got {name!r}; give a text, such as 'lsg'")
    reserved = next((part for part in RESERVED if part in name), None)
    if reserved is not None:
        raise ValueError(f"name: got {name!r}; Transformers takes {reserved!r} in it for another attention")
    known = ALL_ATTENTION_FUNCTIONS.get(name)
    if known is not None and getattr(known, "func", None) is not lsg_forward:
        raise ValueError(f"name: got {name!r}, which is another attention; use a new one")
    lsg_arguments(fields)
    AttentionInterface.register(name, partial(lsg_forward, fields))
    AttentionMaskInterface.register(name, text_mask)


def text_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **kwargs: Any,
) -> torch.Tensor:
    """The mask that a model makes for its layers, as `AttentionMaskInterface` has it: that of the keys alone.

    Returns:
        Boolean, True where a token may be attended to. Of a causal model, shape (batch, tokens), of all tokens of the
        text so far, also where a cache holds fewer of them, or has room for more. Else (batch, 1, 1, tokens).

    Raises:
        ValueError: where the model hides more than padding, what comes after, and what is far away; computes its
            attention itself; or is asked for its probabilities.
    """
    if not torch.compiler.is_compiling():
        refuse_other_attention(config.__class__)
        refuse_attentions()
    device = device if attention_mask is None else attention_mask.device
    start = int(q_offset)
    causal = "allow_is_bidirectional_skip" not in kwargs  # Masks of both sides, and these alone, are made with it.
    if mask_function not in (causal_mask_function, bidirectional_mask_function):
        known = not use_vmap and sees_as_expected(
            mask_function, causal, batch_size, start, q_length, local_size, device
        )
        require_tensor(known, OTHER_MASK)
    tokens = start + q_length if causal else kv_offset + kv_length
    if attention_mask is None:
        mask = torch.ones(batch_size, tokens, dtype=torch.bool, device=device)
    elif attention_mask.shape[1] >= tokens:
        mask = attention_mask[:, :tokens].to(torch.bool)
    else:
        raise ValueError(
            f"attention_mask: got shape {tuple(attention_mask.shape)}; it must be (batch, tokens of the cache and new "
            f"ones), {(batch_size, tokens)}"
        )
    return mask if causal else mask[:, None, None]


OTHER_MASK = (
    "attention_mask: the model asks for one in which some tokens see what others do not, as for texts that stand end "
    "to end, for chunks, or for a start that sees itself; LSG cannot follow it: use attn_implementation='sdpa'"
)


def sees_as_expected(
    mask_function: Callable[..., Any],
    causal: bool,
    batch_size: int,
    start: int,
    q_length: int,
    local_size: int | None,
    device: torch.device | str,
) -> torch.Tensor:
    """Whether a mask function hides what comes after a query if it is causal, what is farther away than a window of
    `local_size` tokens, and nothing else: tried at the keys beside each query, at the first one, and at the edges of
    the window. A boolean without dimensions, since no graph may depend on it."""
    window = None if local_size is None else local_size if causal else local_size + 1
    expected: dict[int | None, bool] = {0: True, -1: window is None or window > 1, 1: not causal}
    if window is None:
        expected[None] = True  # the first one
    else:
        expected |= {1 - window: True, -window: False}
        if not causal:
            expected |= {window - 1: True, window: False}
    row = torch.arange(batch_size, device=device)[:, None]
    head = torch.zeros((), dtype=torch.int64, device=device)
    stop = start + q_length
    place = torch.arange(start, stop, device=device)
    as_expected = []
    for ahead, expectation in expected.items():
        key = torch.zeros_like(place) if ahead is None else place + ahead
        seen = mask_function(row, head, place[None], key.clamp(0, stop - 1)[None])
        as_expected.append((seen == expectation) | (key < 0) | (key >= stop))
    return torch.stack([seen.all() for seen in as_expected]).all()


def refuse_attentions() -> None:
    """Raise where a model is asked for its probabilities. Some, such as GPT-2, do not tell their attention, and would
    return none.

    Raises:
        ValueError: which names the argument.
    """
    # Private, so it may be gone; the model then returns none.
    collector = getattr(sys.modules.get("transformers.utils.output_capturing"), "_active_collector", None)
    if collector is not None and "attentions" in (collector.get() or ()):
        raise ValueError("output_attentions: the model is asked for it; LSG cannot: it returns no probabilities")


@lru_cache
def refuse_other_attention(config_class: Any) -> None:
    """Raise where the model of a configuration does not go through `AttentionInterface`, and so would keep its own
    attention without a word.

    Raises:
        ValueError: which names the model.
    """
    found: Any = MODEL_MAPPING.get(config_class, None)
    for model in found if isinstance(found, tuple) else (found,) if found else ():
        if not hasattr(sys.modules[model.__module__], "ALL_ATTENTION_FUNCTIONS"):
            raise ValueError(
                f"attn_implementation: {model.__name__} computes its attention itself, and LSG cannot take its place; "
                "leave it out, or put a layer of lsg_converter.layers into a model of your own"
            )
