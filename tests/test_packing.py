"""Where the rows of a batch lie for the layers."""

import torch
from hypothesis import given, strategies as st
from strategies import batches
from torch.nn.utils.rnn import pad_sequence

from lsg_converter.modeling.lsg_packing import pack_batch


def first_tokens(mask, g):
    return mask[:, g:].int().argmax(dim=1)


@given(batch=batches("norm"), aligned=st.booleans())
def test_rows_stand_end_to_end_without_their_padding(batch, aligned):
    fields, rows = batch
    g = fields["num_global_tokens"]
    mask = pad_sequence(rows, batch_first=True)
    mask[:, :g] = True
    first = first_tokens(mask, g) if aligned else torch.zeros(len(rows), dtype=torch.int64)
    states = torch.randn(*mask.shape, 2, generator=torch.Generator().manual_seed(0))
    kept = torch.zeros_like(mask)
    for row, own in enumerate(mask.tolist()):
        last = max([place for place, real in enumerate(own) if real and place >= g], default=None)
        kept[row, :g] = True
        start = g + int(first[row])  # a row has its first token, also where it is masked
        kept[row, start : max(start, start if last is None else last) + 1] = True
    packing = pack_batch(mask[:, None, None], first if aligned else None, g, "sdpa")
    if packing is None:
        assert kept.all()
        return
    assert packing.seqlens == kept.sum(dim=1).tolist()
    packed = packing.pack(states)
    assert torch.equal(packed[0], states[kept]) and torch.equal(packing.mask[0, 0, 0], mask[kept])
    assert torch.equal(packing.unpack(packed), states * kept[:, :, None])


@given(batch=batches("norm"))
def test_or_begin_with_their_first_token(batch):
    """For kernels that take no rows end to end."""
    fields, rows = batch
    g = fields["num_global_tokens"]
    mask = pad_sequence(rows, batch_first=True)
    mask[:, :g] = True
    first = first_tokens(mask, g)
    states = torch.randn(*mask.shape, 2, generator=torch.Generator().manual_seed(0))
    packing = pack_batch(mask[:, None, None], first, g, "portable")
    packed = packing.pack(states)
    for row, start in enumerate(first.tolist()):
        assert torch.equal(packed[row, :g], states[row, :g])
        assert torch.equal(packed[row, g:], states[row, g:].roll(-start, dims=0))
        assert torch.equal(packing.mask[row, 0, 0, g:], mask[row, g:].roll(-start))
    assert torch.equal(packing.unpack(packed), states)


def test_what_stays_as_it_is():
    mask = torch.tensor([[True, True], [True, False]])[:, None, None]
    assert pack_batch(mask, None, 0, "cpu").seqlens == [2, 1]
    assert pack_batch(mask, None, 0, "eager") is None and pack_batch(mask, None, 0, "portable") is None
    assert pack_batch(torch.ones_like(mask), None, 0, "cpu") is None
