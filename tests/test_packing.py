"""Rows end to end."""

import torch
from hypothesis import given
from strategies import batches
from torch.nn.utils.rnn import pad_sequence

from lsg_converter.modeling.lsg_packing import find_seqlens, pack_rows, unpack_rows


@given(batch=batches("norm"))
def test_packing_leaves_out_what_pads_rows_on_the_right(batch):
    _, rows = batch
    mask = pad_sequence(rows, batch_first=True)
    tokens = mask.shape[1]
    states = torch.randn(*mask.shape, 2, generator=torch.Generator().manual_seed(0))
    expected = [max([i + 1 for i, kept in enumerate(row.tolist()) if kept], default=1) for row in rows]
    seqlens = find_seqlens(mask[:, None, None], "sdpa")
    if seqlens is None:
        assert expected == [tokens] * len(rows)
        return
    assert seqlens == expected != [tokens] * len(rows)
    packed, packed_mask = pack_rows(states, mask[:, None, None], seqlens)
    assert packed.shape == (1, sum(expected), 2)
    assert packed_mask.shape == (1, 1, 1, sum(expected)) and packed_mask.sum() == mask.sum()
    unpacked = unpack_rows(packed, seqlens, tokens)
    inside = torch.arange(tokens) < torch.tensor(seqlens)[:, None]
    assert torch.equal(unpacked, states * inside[:, :, None])


def test_what_takes_no_packed_rows():
    mask = torch.tensor([[True, True], [True, False]])[:, None, None]
    assert find_seqlens(mask, "cpu") == [2, 1]
    assert find_seqlens(mask, "eager") is None and find_seqlens(mask, "portable") is None
    states = torch.randn(2, 2, 3)
    assert unpack_rows(states, None, 2) is states
