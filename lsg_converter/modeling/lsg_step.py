"""A step of the causal form: what the last tokens of a text see of it, by a window of its keys and values."""

from typing import Any

import torch
import torch.nn.functional as F

from .lsg_attention import eager_kernel, sdpa_kernel
from .lsg_layout import LSGLayout
from .lsg_sparsity import sparsify


def repeat_heads(states: torch.Tensor, heads: int) -> torch.Tensor:
    """Keys or values, (batch, heads, tokens, head_dim), of which each head serves several of the queries'."""
    return states if states.shape[1] == heads else states.repeat_interleave(heads // states.shape[1], dim=1)


def take_tokens(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Of (batch, heads, tokens, head_dim) the tokens of each row at `index`, (batch, n)."""
    row = torch.arange(index.shape[0], device=index.device)[:, None]
    return states.transpose(1, 2)[row, index].transpose(1, 2)


def step_attention(
    query: torch.Tensor,
    global_states: tuple[torch.Tensor, torch.Tensor],
    cached: tuple[torch.Tensor, torch.Tensor],
    length: int | torch.Tensor,
    text_mask: torch.Tensor,
    first: torch.Tensor | None,
    first_query: torch.Tensor,
    arguments: dict[str, Any],
    global_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What new tokens see: the global tokens, and of the cache, which holds them too, their windows.

    Args:
        query: of the new tokens, (batch, heads, n, head_dim).
        global_states, cached: keys and values, (batch, heads, tokens, head_dim); those of the cache may have fewer
            heads, each of which serves several queries' heads.
        length, text_mask, first: `length`, `mask` and `first_token` of the `Past` of `lsg_generation`.
        first_query: of the first token of the text, (batch, heads, head_dim).
        arguments: those of `lsg_attention`, dropout included.
        global_mask: boolean, shape (batch, g): True where a global token may be attended to; None for all.
    """
    options = dict(arguments)
    dropout, kernel = options.pop("dropout"), options.pop("kernel")
    sparsity = {name: options[name] for name in ("sparsity_type", "lsh_num_pre_rounds", "lsh_seed")}
    sizes = ("num_global_tokens", "block_size", "sparse_block_size", "sparsity_factor", "sparsity_type")
    layout = LSGLayout.from_fields(**{name: options[name] for name in sizes}, causal=True)
    layout = layout._replace(num_global_tokens=0)
    attend = eager_kernel if kernel == "eager" else sdpa_kernel
    (rows, heads, new, head_dim), block, device = query.shape, layout.block_size, query.device
    g = global_states[0].shape[2]
    if global_mask is None:
        global_mask = text_mask.new_ones(rows, g)
    in_line = first is None
    if first is None:
        first = torch.zeros(rows, dtype=torch.int64, device=device)
    # Counted from the first token of each row.
    place = length + torch.arange(new, device=device) - first[:, None]

    if isinstance(length, int) and length + new <= 2 * block:
        total = length + new
        text = (repeat_heads(x[:, :, :total], heads) for x in cached)
        states = [torch.cat([x, y], dim=2) for x, y in zip(global_states, text, strict=True)]
        behind = torch.arange(total, device=device) > length + torch.arange(new, device=device)[:, None]
        mask = text_mask[:, None, :total] & ~behind
        mask = torch.cat([global_mask[:, None].expand(-1, new, -1), mask], dim=2)[:, None]
        return attend(query, states[0], states[1], mask, dropout)

    # The new tokens of a row lie in `num_blocks` blocks at most; a block sees those of `before` blocks in front of the
    # one before it through their sparse keys.
    num_blocks = 1 if new == 1 else (new + block - 2) // block + 1
    before = -(-layout.sparse_block_size * layout.sparsity_factor // block)
    first_block = place[:, :1].div(block, rounding_mode="floor")
    index = first[:, None] + (first_block - 1 - before) * block
    index = index + torch.arange((before + 1 + num_blocks) * block, device=device)
    exists = (index >= first[:, None]) & (index < length + new)
    index = index.clamp(min=0, max=cached[0].shape[2] - 1)
    exists = exists & text_mask.gather(1, index.clamp(max=text_mask.shape[1] - 1))
    if in_line and isinstance(length, int):
        # The same place in all rows: a slice, with zeros for what does not exist.
        start = (length // block - 1 - before) * block
        end = start + index.shape[1]
        seen = [F.pad(x, (0, 0, -start, end - x.shape[2])) for x in cached]
    else:
        seen = [take_tokens(x, index) for x in cached]
    seen = [repeat_heads(x, heads) for x in seen]

    def windows(sequence: torch.Tensor, start: int, size: int, step: int) -> torch.Tensor:
        """What each block sees: (batch, heads, blocks, size, ...)."""
        parts = sequence[:, :, start : start + (num_blocks - 1) * step + size].unfold(2, size, step)
        return parts if sequence.dim() == 3 else parts.transpose(-1, -2)

    # How far behind the start of the block before its own a key stands that a query still sees.
    reach = block + place % block if new < block else block + torch.arange(block, device=device)[None]
    visible = torch.arange(2 * block, device=device) <= reach[..., None]
    local = windows(exists[:, None], before * block, 2 * block, block)
    masks = [global_mask[:, None, None, None], local[:, :, :, None] & visible[:, None, None]]
    parts: list[list[torch.Tensor]] = [
        [x[:, :, None].expand(-1, -1, num_blocks, -1, -1), windows(y, before * block, 2 * block, block)]
        for x, y in zip(global_states, seen, strict=True)
    ]
    key, value, mask = (x[:, :, : (before + num_blocks - 1) * block] for x in (*seen, exists[:, None]))
    shortened = sparsify(first_query[:, :, None], key, value, mask, layout, **sparsity)
    if shortened is not None and shortened.key is not None and shortened.value is not None:
        size, step = layout.sparse_block_size, layout.sparse_step
        start = before * step - size
        masks.append(windows(shortened.mask, start, size, step)[:, :, :, None])
        for part, merged in zip(parts, (shortened.key, shortened.value), strict=True):
            part.append(windows(merged, start, size, step))
    tile = visible.shape[1]
    mask = torch.cat([x.expand(rows, heads, num_blocks, tile, -1) for x in masks], dim=-1).flatten(1, 2)
    keys, values = (torch.cat(part, dim=3).flatten(1, 2) for part in parts)

    # A query's place among those of the tiles: by its place in its block, or, where they are few, by its number.
    column = place % block if new >= block else torch.arange(new, device=device)
    row = torch.arange(rows, device=device)[:, None]
    slot = (place.div(block, rounding_mode="floor") - first_block) * tile + column
    tiles = query.new_zeros(rows, num_blocks * tile, heads, head_dim).index_put((row, slot), query.transpose(1, 2))
    queries = tiles.unflatten(1, (num_blocks, tile)).permute(0, 3, 1, 2, 4).flatten(1, 2)
    output, probabilities = attend(queries, keys, values, mask, dropout)

    def of_queries(states: torch.Tensor) -> torch.Tensor:
        """(batch, heads * blocks, queries of a tile, n) to (batch, heads, new tokens, n)."""
        return states.unflatten(1, (heads, num_blocks)).flatten(2, 3).transpose(1, 2)[row, slot].transpose(1, 2)

    return of_queries(output), None if probabilities is None else of_queries(probabilities)
