"""LSG attention over a text alone, whose own first tokens serve as the global ones: for models that are not converted.

The text begins at the first token of a row that is not masked, from which its blocks count. In the causal form its
first tokens attend as in ordinary attention, so that no token looks ahead, and all that come after see them.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from .lsg_attention import KERNELS, eager_kernel, lsg_attention, sdpa_kernel
from .lsg_layout import require
from .lsg_sparsity import SPARSITY_FIELDS, check_sparsity, weighs_by_query
from .lsg_step import repeat_heads, step_attention, take_tokens


# The fields that say what is seen, and the types of each: a whole number, or a name, some of which may be none.
NUMBER, NUMBER_OR_NONE, NAME_OR_NONE = (int,), (int, type(None)), (str, type(None))
FIELDS: dict[str, tuple[type, ...]] = {
    "num_global_tokens": NUMBER,
    "block_size": NUMBER,
    "sparse_block_size": NUMBER,
    "sparsity_factor": NUMBER,
    "sparsity_type": NAME_OR_NONE,
    "full_attention_length": NUMBER_OR_NONE,
    "lsh_num_pre_rounds": NUMBER,
    "lsh_seed": NUMBER,
    "attention_kernel": NAME_OR_NONE,
}
_PARAMETERS = inspect.signature(lsg_attention).parameters
DEFAULTS = {name: _PARAMETERS[name].default for name in FIELDS if name in _PARAMETERS}
# An additive mask that hides a token has less than this; a bias does not.
HIDDEN = -1000.0


def lsg_arguments(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What `text_attention` takes, of fields by their names in `FIELDS`. "attention_kernel" may be "eager" too.

    Raises:
        ValueError: where a field is unknown, or its value is not allowed.
    """
    for name, value in fields.items():
        if name not in FIELDS:
            raise ValueError(f"{name}: no field of LSG attention; use {', '.join(FIELDS)}")
        words = "a name, or none" if str in FIELDS[name] else "a whole number"
        require(name, value, type(value) in FIELDS[name], words)
    arguments = DEFAULTS | dict(fields)
    for name in ("num_global_tokens", "lsh_num_pre_rounds", "full_attention_length"):
        require(name, arguments[name], (arguments[name] or 0) >= 0, "at least 0")
    check_sparsity(**{name: arguments[name] for name in SPARSITY_FIELDS})
    kernel = arguments.pop("attention_kernel", None)
    known = ("eager", *KERNELS)
    require("attention_kernel", kernel, kernel in (None, *known), f"one of {', '.join(known)}, or none")
    return arguments | {"kernel": kernel or "sdpa"}


def key_mask(attention_mask: torch.Tensor | None, key: torch.Tensor) -> torch.Tensor:
    """Which keys may be attended to: boolean, shape (batch, tokens).

    Args:
        attention_mask: of shape (batch or 1, tokens) or (batch or 1, 1, 1, tokens): boolean or, of two dimensions, of
            integers, where True or 1 is a token to attend to; or additive, 0 for those and very negative for others.
        key: shape (batch, heads, tokens, head_dim).

    Raises:
        ValueError: where it has another shape, or is a bias.
    """
    if attention_mask is None:
        return torch.ones(key.shape[0], key.shape[2], dtype=torch.bool, device=key.device)
    shape = tuple(attention_mask.shape)
    if not (len(shape) == 2 or (len(shape) == 4 and shape[1:3] == (1, 1))):
        raise ValueError(
            f"attention_mask: got shape {shape}; LSG attention takes one of the keys, (batch, tokens) or (batch, 1, 1, "
            "tokens), and none for each query"
        )
    if shape[0] not in (1, key.shape[0]):
        raise ValueError(f"attention_mask: got {shape[0]} rows, for {key.shape[0]} texts; give a row for each, or one")
    mask = attention_mask.reshape(shape[0], shape[-1])
    if mask.is_floating_point():
        kept = mask == 0
        if may_be_wrong(~kept & ~(mask <= HIDDEN)):
            raise ValueError(
                "attention_mask: got numbers that are neither 0 nor very negative; LSG attention adds no bias to scores"
            )
        mask = kept
    elif mask.dtype != torch.bool and len(shape) == 2 and may_be_wrong((mask != 0) & (mask != 1)):
        raise ValueError("attention_mask: got whole numbers that are neither 0 nor 1; 1 is a token to attend to")
    elif mask.dtype != torch.bool and len(shape) == 4:
        raise ValueError(f"attention_mask: got {mask.dtype} of four dimensions; use booleans, or numbers to be added")
    return mask.to(device=key.device, dtype=torch.bool).expand(key.shape[0], -1)


def may_be_wrong(fault: torch.Tensor) -> bool:
    """Whether a mask has a fault anywhere; a graph takes it as it is."""
    return not torch.compiler.is_compiling() and bool(fault.any())


def text_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    *,
    causal: bool = False,
    scaling: float | None = None,
    dropout: float = 0.0,
    hide_first_token: bool = False,
    num_global_tokens: int = 1,
    kernel: str = "sdpa",
    **arguments: Any,
) -> torch.Tensor:
    """Attend to a text, its first tokens being the global ones.

    Args:
        query: shape (batch, heads, queries, head_dim). In the causal form they may be the last ones of the text alone,
            as in a step with a cache.
        key: shape (batch, key heads, tokens, head_dim), where `heads` is a multiple of `key heads`.
        value: as `key`; its head_dim may be another.
        mask: boolean, shape (batch, tokens): True where a token may be attended to.
        scaling: what scores are multiplied by; None for `1 / sqrt(head_dim)`.
        hide_first_token: whether no token sees the first one.
        arguments: as `lsg_attention` takes them.

    Returns:
        Shape (batch, heads, queries, head_dim of `value`). It means nothing at what pads a row.

    Raises:
        ValueError: where a shape does not fit, or a step cannot give what the whole text gives.
    """
    if query.dim() != 4 or key.dim() != 4 or not key.shape[2]:
        raise ValueError(
            f"query and key: got {tuple(query.shape)} and {tuple(key.shape)}; they must be (batch, heads, tokens, "
            "head_dim), of one token or more"
        )
    (batch, heads, queries, head_dim), (_, key_heads, length, _) = query.shape, key.shape
    if mask.shape != (batch, length) or heads % key_heads or not (queries == length or (causal and queries < length)):
        raise ValueError(
            f"query, key and mask: got {tuple(query.shape)}, {tuple(key.shape)} and {tuple(mask.shape)}; they must be "
            "(batch, heads, tokens, head_dim), with as many heads or a part of them, and (batch, tokens)"
        )
    if head_dim != key.shape[3] or value.dim() != 4 or value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"query, key and value: got {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}; query and "
            "key must have one head_dim, key and value the same batch, heads and tokens"
        )
    alike = query.dtype == key.dtype == value.dtype or torch.is_autocast_enabled(query.device.type)
    if not query.is_floating_point() or not alike:
        raise ValueError(
            f"query, key and value: got {query.dtype}, {key.dtype} and {value.dtype}; they must have one floating dtype"
        )
    value_dim = value.shape[3]
    width = max(head_dim, value_dim)
    factor = (head_dim**-0.5 if scaling is None else scaling) * width**0.5
    if abs(factor - 1) > 1e-9:
        query = query * factor
    query, key, value = (x if x.shape[3] == width else F.pad(x, (0, width - x.shape[3])) for x in (query, key, value))
    options = arguments | {"num_global_tokens": min(num_global_tokens, length), "kernel": kernel, "dropout": dropout}

    place = torch.arange(length, device=query.device)
    first = mask.int().argmax(dim=1)  # 0 where all is masked
    if hide_first_token:
        mask = mask & (place != first[:, None])
    if queries < length:
        return attend_in_step(query, key, value, mask, first, options)[..., :value_dim]
    key, value = (repeat_heads(x, heads) for x in (key, value))
    starts_late = may_be(first > 0)
    if starts_late:
        # What pads on the left goes behind.
        index = (place + first[:, None]) % length
        query, key, value = (take_tokens(x, index) for x in (query, key, value))
        mask = mask.gather(1, index)
    output, _ = lsg_attention(query, key, value, mask, causal=causal, **options)
    g = options["num_global_tokens"]
    if causal and g:
        start = attend_to_the_start(query[:, :, :g], key[:, :, :g], value[:, :, :g], mask[:, :g], place[:g], options)
        output = torch.cat([start, output[:, :, g:]], dim=2)
    if starts_late:
        output = take_tokens(output, (place - first[:, None]) % length)
    return output[..., :value_dim]


def may_be(condition: torch.Tensor) -> bool:
    """Whether it holds anywhere. A graph is not to depend on it, and does what is right in both cases."""
    return torch.compiler.is_compiling() or bool(condition.any())


def attend_to_the_start(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    place: torch.Tensor,
    options: Mapping[str, Any],
) -> torch.Tensor:
    """Ordinary causal attention of queries, whose places are (batch or nothing, queries), to the first tokens."""
    attend = eager_kernel if options["kernel"] == "eager" else sdpa_kernel
    seen = torch.arange(key.shape[2], device=place.device) <= place[..., None]
    seen = (seen if seen.dim() == 3 else seen[None]) & mask[:, None]
    return attend(query, key, value, seen[:, None], options["dropout"])[0]


def attend_in_step(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    first: torch.Tensor,
    options: dict[str, Any],
) -> torch.Tensor:
    """What the last tokens of a text see in the causal form: the first ones, and a window of the keys. Shapes as in
    `text_attention`; `first` is the place where each row's text begins."""
    (_, heads, queries, _), length, g = query.shape, key.shape[2], options["num_global_tokens"]
    kind, factor = options["sparsity_type"], options["sparsity_factor"]
    if weighs_by_query(kind, factor, options["sparse_block_size"]):
        raise ValueError(
            f"sparsity_type: got {kind!r}, which weighs by the first query, and a cache holds none; use another "
            "sparsity_type, or use_cache=False"
        )
    place = length - queries + torch.arange(queries, device=query.device)
    if length - g <= 2 * options["block_size"]:
        return attend_to_the_start(query, repeat_heads(key, heads), repeat_heads(value, heads), mask, place, options)
    index = first[:, None] + torch.arange(g, device=query.device)
    index = index.clamp(max=length - 1)
    start_key, start_value = (repeat_heads(take_tokens(x, index), heads) for x in (key, value))
    start_mask = mask.gather(1, index)
    before, text = length - queries, first + g
    if before >= g and not may_be(first > 0):
        past = (key[:, :, g:], value[:, :, g:]), before - g, mask[:, g:], None
    else:
        past = (key, value), before, mask & (torch.arange(length, device=query.device) >= text[:, None]), text
    output, _ = step_attention(query, (start_key, start_value), *past, query[:, :, 0], options, global_mask=start_mask)
    place = place - first[:, None]
    among = place < g
    if may_be(among):  # in a row whose text has just begun
        start = attend_to_the_start(query, start_key, start_value, start_mask, place, options)
        output = torch.where(among[:, None, :, None], start, output)
    return output
