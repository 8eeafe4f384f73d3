"""Blocks and windows, against what the words say of them, key by key."""

import torch
from hypothesis import given, strategies as st
from strategies import KINDS, lengths, lsg_fields

from lsg_converter.modeling.lsg_layout import LSGLayout, take_windows


def runs(text, size):
    """The text, cut into runs of `size` tokens."""
    return [text[start : start + size] for start in range(0, len(text), size)]


@given(data=st.data(), fields=st.sampled_from(KINDS).flatmap(lsg_fields))
def test_windows(data, fields):
    layout = LSGLayout.from_fields(**fields)
    length = 2 * layout.block_size + data.draw(lengths(layout.block_size))
    g, size = layout.num_global_tokens, layout.sparse_block_size
    padded = list(range(-(-length // layout.block_size) * layout.block_size))
    blocks = runs(padded, layout.block_size)
    assert layout.num_blocks(length) == len(blocks)
    assert layout.is_short(2 * layout.block_size) and not layout.is_short(length)
    sparse_keys = runs(padded, layout.sparsity_factor) if size else []
    assert layout.num_sparse_keys(length) == len(sparse_keys)

    def seen(sequence, window):
        """What each block sees through a window, of keys that are numbered from 1."""
        numbers = torch.arange(1, sequence + 1)[None, None]
        return [[key - 1 for key in row if key] for row in take_windows(numbers, window, len(blocks))[0, 0].tolist()]

    assert seen(g, layout.global_window) == [list(range(g))] * len(blocks)
    local = [[token for block in blocks[max(i - 1, 0) : i + 2] for token in block] for i in range(len(blocks))]
    assert seen(len(padded), layout.local_window) == local
    sides = [seen(len(sparse_keys), window) for window in layout.sparse_windows]
    for i in range(len(blocks) if size else 0):
        before = [key for key, tokens in enumerate(sparse_keys) if tokens[-1] < local[i][0]]
        behind = [key for key, tokens in enumerate(sparse_keys) if tokens[0] > local[i][-1]]
        assert [side[i] for side in sides] == [before[-size:], behind[:size]]
