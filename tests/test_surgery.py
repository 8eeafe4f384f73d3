"""Tables of tensors, beside what the recorded conversions show."""

import pytest
import torch

from lsg_converter.surgery import draw_words, global_embeddings, global_words, longer_positions


def test_positions_repeat_after_the_offset():
    table = torch.arange(6.0)[:, None]
    assert longer_positions(table, 9, offset=2)[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 2]
    assert longer_positions(table, 3)[:, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("positions", "stride", "step", "jump"),
    [(512, 64, 1, 64), (1024, 64, 2, 32), (1536, 64, 3, 16), (300, 64, 1, 64), (2048, 1, 4, 1), (700, 512, 1, 512)],
)
def test_the_positions_of_global_rows(positions, stride, step, jump):
    """Row 1 starts `jump` thinned rows after row 0; every thinned row is used once."""
    table = torch.arange(float(positions))[:, None]
    rows = global_embeddings(table, torch.zeros(512, 1), None, stride)[:, 0]
    thinned = [index * step % positions for index in range(512)]
    assert rows.tolist() == [thinned[start] for first in range(jump) for start in range(first, 512, jump)]


def test_words():
    words = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    table = global_words(words, 3, 5, None)
    assert torch.equal(table[0], words[3]) and torch.equal(table[1:], words[5].expand(511, -1))
    table = global_words(words, None, None, None)
    assert torch.equal(table[0], words.mean(0)) and torch.equal(table[511], words.mean(0))


def test_drawn_words_have_the_mean_and_covariance_of_the_vocabulary():
    generator = torch.Generator().manual_seed(0)
    words = torch.randn(1000, 4, generator=generator) @ torch.randn(4, 4, generator=generator) + 5
    state = torch.get_rng_state()
    drawn = draw_words(words, 20000, seed=1)
    torch.testing.assert_close(drawn.mean(0), words.mean(0), rtol=0, atol=0.1)
    torch.testing.assert_close(drawn.T.cov(), words.T.cov(), rtol=0.1, atol=0.2)
    assert torch.equal(drawn, draw_words(words, 20000, seed=1))
    assert not torch.equal(drawn, draw_words(words, 20000, seed=2))
    assert torch.equal(state, torch.get_rng_state())
    assert draw_words(words[:3], 7, seed=1).isfinite().all()  # fewer words than it takes for a full covariance
    table = global_words(words, 3, 5, 1)
    assert torch.equal(table[0], words[3]) and len(table[1:].unique(dim=0)) == 511


def test_half_precision_rounds_once():
    generator = torch.Generator().manual_seed(0)
    positions, words, kind = (torch.randn(512, 4, generator=generator).bfloat16() for _ in range(3))
    table = global_embeddings(positions, words.float(), kind[0], 512)
    assert table.dtype == torch.bfloat16
    assert torch.equal(table, (positions.float() + words.float() + kind[0].float()).bfloat16())
