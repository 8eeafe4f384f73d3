"""Generation with a cache: what a decoder reads of the text before its new tokens.

A cache of Transformers holds the keys and values of the text. Those of the global tokens are computed at each step:
they see nothing, so they never change. A new token in block `i` sees the blocks `i - 1` and `i` up to itself, and the
sparse keys of the blocks before. Those blocks are complete and never change again, so that a step gives what the pass
over the whole text gives. It reads a window of the cache, however long the text is.
"""

from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache

from .lsg_packing import Packing
from .lsg_step import step_attention


CACHE_NAMES = ("past_key_values", "cache")  # "cache" from Transformers 5.24 on


def given_cache(arguments: Any) -> Any:
    """The cache of a self-attention's keys and values among the arguments of a forward, by either name that
    Transformers has; or None."""
    cache = next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)
    return getattr(cache, "self_attention_cache", cache)


class LSGCacheLayer(DynamicLayer):
    """A layer of a `DynamicCache` with room for tokens to come, so that a step does not copy what is there."""

    keys: Any
    values: Any
    room: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values, (batch, heads, tokens, head_dim), and return all."""
        new, length = (key_states, value_states), self.get_seq_length()
        if length == 0 or (torch.is_grad_enabled() and any(x.requires_grad for x in (*new, self.keys))):
            self.room = None
            return super().update(key_states, value_states, *args, **kwargs)
        end = length + key_states.shape[2]
        if not self.has_room(end):
            shapes = [(*x.shape[:2], end + end // 4 + 64, x.shape[3]) for x in (self.keys, self.values)]
            key_room, value_room = (x.new_empty(shape) for x, shape in zip(new, shapes, strict=True))
            self.room = key_room, value_room
            for room, held in zip(self.room, (self.keys, self.values), strict=True):
                room[:, :, :length] = held
        for room, states in zip(self.room or (), new, strict=True):
            room[:, :, length:end] = states
        self.keys, self.values = (room[:, :, :end] for room in self.room or ())
        return self.keys, self.values

    def has_room(self, end: int) -> bool:
        """Whether keys and values stand at the start of tensors with room for `end` tokens: what reorders, moves or
        repeats a cache puts others in their place."""
        return self.room is not None and all(
            held.data_ptr() == room.data_ptr()
            and held.device == room.device
            and held.shape[:2] == room.shape[:2]
            and end <= room.shape[2]
            for room, held in zip(self.room, (self.keys, self.values), strict=True)
        )

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """As in Transformers, in place."""
        if self.get_seq_length() > 0:
            for held in (self.keys, self.values):
                held.copy_(held.index_select(0, beam_idx.to(held.device)))


class Past(NamedTuple):
    """What is known, in front of the layers, of a text whose keys and values a cache holds.

    Attributes:
        length: tokens of text in the cache; a tensor in the graph of a step.
        mask: boolean, shape (batch, tokens): True where a token may be attended to; of all tokens in the cache and the
            new ones, or of as many as the cache has room for.
        first_token: the place of each row's first token, from which blocks count, shape (batch,); None for 0.
        is_step: whether the new tokens are read by `step_attention`; else they are the start of the text.
        packing: how the layers see the start of the text, where it is packed.
    """

    length: int | torch.Tensor
    mask: torch.Tensor
    first_token: torch.Tensor | None
    is_step: bool
    packing: Packing | None = None

    @classmethod
    def of(cls, cache: Cache, mask: torch.Tensor | None, first_token: torch.Tensor | None, new: torch.Tensor) -> "Past":
        """Of a cache, the mask that a model is given, and new tokens, (batch, tokens, ...).

        Raises:
            ValueError: where the mask does not fit.
        """
        length, (rows, tokens) = cache.get_seq_length(), new.shape[:2]
        if torch.compiler.is_compiling():
            # A layer of a static cache counts in place.
            length = length.clone() if isinstance(length, torch.Tensor) else length
            room = getattr(cache.layers[0], "max_cache_len", length + tokens) if cache.layers else tokens
        else:
            length = int(length)
            room = length + tokens
        if mask is None:
            mask = torch.ones(rows, room, dtype=torch.bool, device=new.device)
        elif mask.dim() != 2 or mask.shape[0] != rows or mask.shape[1] < room:
            raise ValueError(
                f"attention_mask: got shape {tuple(mask.shape)}; beside a cache it must be (batch, tokens of the cache "
                f"and new ones), {(rows, room)}"
            )
        is_step = torch.compiler.is_compiling() or length > 0
        return cls(length, mask.to(device=new.device, dtype=torch.bool), first_token, is_step)

    def hide(self, first_token: bool) -> "Past":
        """With the first token of the text hidden as a key, or as it is."""
        if not first_token:
            return self
        first = 0 if self.first_token is None else self.first_token[:, None]
        return self._replace(mask=self.mask & (torch.arange(self.mask.shape[1], device=self.mask.device) != first))


def prepare_cache(cache: Any, with_cross_attention: bool) -> Any:
    """A cache whose steps cost the same however long the text is: the given one, if there is one."""
    if cache is None:
        cache = DynamicCache()
        if with_cross_attention:
            cache = EncoderDecoderCache(cache, DynamicCache())
    own = getattr(cache, "self_attention_cache", cache)
    if getattr(own, "layer_class_to_replicate", None) is DynamicLayer:
        own.layer_class_to_replicate = LSGCacheLayer
    for layer in own.layers:
        if type(layer) is DynamicLayer:
            layer.__class__ = LSGCacheLayer
    return cache


def cached_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: Cache,
    layer_idx: int,
    past: Past,
    arguments: dict[str, Any],
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None] | None:
    """Put keys and values of new tokens into a cache and, in a step, attend.

    Args:
        query, key, value: of the global tokens and the new ones, as the layers see them: (batch, heads, g + n,
            head_dim) in a step.
        arguments: those of `lsg_attention`, dropout included.

    Returns:
        None for the start of a text, which has nothing in front; else as `lsg_attention`. The keys of the
        probabilities are those of the cache, or, in longer texts than two blocks, those that `lsg_attention` names.
    """
    g = arguments["num_global_tokens"]
    new = query, key, value
    if past.packing is not None:
        heads, packing = query.shape[1], past.packing
        new = tuple(packing.unpack(x.transpose(1, 2).flatten(2)).unflatten(2, (heads, -1)).transpose(1, 2) for x in new)
    text = [x[:, :, g:] for x in new]
    cached = cache.update(text[1], text[2], layer_idx)
    layer: Any = cache.layers[layer_idx]
    if not past.is_step:
        # "bos_pooling" weighs by the first token's query. (Beams of one text have the same.)
        first = torch.zeros_like(past.mask[:, 0], dtype=torch.int64) if past.first_token is None else past.first_token
        layer.first_query = text[0][torch.arange(len(first), device=first.device), :, first].detach()
        return None
    first_query = layer.first_query
    if len(first_query) != len(query):
        first_query = first_query.repeat_interleave(len(query) // len(first_query), dim=0)
    place = past.length, past.mask, past.first_token
    output, probabilities = step_attention(
        text[0], (key[:, :, :g], value[:, :, :g]), cached, *place, first_query, arguments
    )
    output = torch.cat([query[:, :, :g], output], dim=2)
    if probabilities is None:
        return output, None
    return output, (probabilities, probabilities.new_zeros(*query.shape[:2], g, probabilities.shape[3]))
