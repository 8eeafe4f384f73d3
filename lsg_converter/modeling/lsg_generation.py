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
from .lsg_sparsity import weighs_by_query
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
        is_step = isinstance(length, torch.Tensor) or length > 0
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
    first_query = text[0][:, :, 0]
    if weighs_by_query(*(arguments[name] for name in ("sparsity_type", "sparsity_factor", "sparse_block_size"))):
        first_query = find_first_query(cache.layers[layer_idx], text[0], cached[0], past)
    if not past.is_step:
        return None
    place = past.length, past.mask, past.first_token
    output, probabilities = step_attention(
        text[0], (key[:, :, :g], value[:, :, :g]), cached, *place, first_query, arguments
    )
    output = torch.cat([query[:, :, :g], output], dim=2)
    if probabilities is None:
        return output, None
    return output, (probabilities, probabilities.new_zeros(*query.shape[:2], g, probabilities.shape[3]))


def find_first_query(layer: Any, query: torch.Tensor, cached_key: torch.Tensor, past: Past) -> torch.Tensor:
    """The query of the first token of each text, by which "bos_pooling" weighs: (batch, heads, head_dim).

    It is kept in the layer of the cache when the text begins, with the key of that token. By the key it is found again,
    whatever became of the rows since.

    Args:
        query: of the new tokens, (batch, heads, n, head_dim).
        cached_key: all that the cache holds, (batch, heads, tokens, head_dim).

    Raises:
        ValueError: where the cache holds a text that began elsewhere.
    """
    rows = torch.arange(len(query), device=query.device)
    first = torch.zeros_like(rows) if past.first_token is None else past.first_token
    first_key = cached_key[rows, :, first].detach()
    first_query = query[rows, :, first.clamp(max=query.shape[2] - 1)].detach()
    kept: tuple[torch.Tensor, torch.Tensor] | None = getattr(layer, "first_token", None)
    if past.is_step:
        if kept is not None:
            same = (first_key[:, None] == kept[1]).flatten(2).all(dim=2)
            kept_query = kept[0][same.int().argmax(dim=1)]
        if isinstance(past.length, int):
            if kept is None or not (torch.compiler.is_compiling() or bool(same.any(dim=1).all())):
                raise ValueError(
                    "past_key_values: got a cache with a text whose first token this model has not read, and whose "
                    "query it needs; read the text from its start, or take another sparsity_type"
                )
            return kept_query
        if kept is not None:  # In a graph for a static cache, where a text begins if the cache is empty.
            first_query = torch.where(past.length == 0, first_query, kept_query)
    layer.first_token = first_query, first_key
    return first_query
