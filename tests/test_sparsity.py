"""What the comparison with the specification cannot show of the sparsifiers."""

import pytest
import torch

from lsg_converter.modeling.lsg_layout import LSGLayout
from lsg_converter.modeling.lsg_sparsity import cluster_by_lsh, sparsify


pytestmark = pytest.mark.newest


def lsh(key, value, keep, rounds=1, seed=0):
    return cluster_by_lsh(key, value, keep, LSGLayout(0, 8, 8, 2), num_pre_rounds=rounds, seed=seed)


def test_lsh_gives_the_means_of_what_is_alike():
    """Opposite keys never share a bucket, equal ones always do: two clusters a chunk, the other buckets masked."""
    direction = torch.randn(1, 2, 1, 16, generator=torch.Generator().manual_seed(0))
    sign = torch.tensor([1.0, 1, -1, 1, -1, 1, 1, -1] * 2)[None, None, :, None]
    value = torch.arange(16.0)[None, None, :, None].expand(1, 2, 16, 4)
    keep = torch.ones(1, 1, 16, dtype=torch.bool)
    keep[..., 15] = False
    for rounds in (0, 1, 2):
        kept, key, mean, *_ = lsh(direction * sign, value, keep, rounds)
        assert key.shape == (1, 2, 8, 16) and kept.shape == (1, 2, 8)
        assert kept.unflatten(-1, (2, 4)).sum(-1).eq(2).all()
        for head in range(2):
            means = mean[0, head, kept[0, head]][:, 0].unflatten(0, (2, 2)).sort(-1).values
            plus, minus = [sum([0, 1, 3, 5, 6]) / 5, sum([2, 4, 7]) / 3], [8 + 15 / 5, 8 + 6 / 2]
            expected = torch.tensor([sorted(plus), sorted(minus)])
            torch.testing.assert_close(means, expected)
            clusters = key[0, head, kept[0, head]]
            torch.testing.assert_close(clusters.abs(), direction[0, head].abs().expand(4, -1))


def test_lsh_is_reproducible_and_leaves_the_random_state_alone():
    generator = torch.Generator().manual_seed(0)
    key, value = torch.randn(2, 2, 3, 32, 16, generator=generator)
    keep = torch.ones(2, 1, 32, dtype=torch.bool)
    before = torch.get_rng_state()
    first, again, other = lsh(key, value, keep), lsh(key, value, keep), lsh(key, value, keep, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first[:3], again[:3], strict=True))
    assert not torch.equal(first.key, other.key)


def test_lsh_rotations_look_normal():
    from lsg_converter.modeling.lsg_sparsity import _random_normal

    draws = [_random_normal((64, 512), seed, torch.device("cpu")).double() for seed in range(3)]
    for a in draws:
        assert abs(a.mean()) < 0.02 and abs(a.std() - 1) < 0.02 and abs((a**4).mean() - 3) < 0.15
    for i in range(3):
        for j in range(i):
            assert abs((draws[i] * draws[j]).mean()) < 0.02


def test_norm_ranks_in_float32():
    """Two keys whose norms bfloat16 cannot tell apart."""
    key = torch.zeros(1, 1, 4, 2, dtype=torch.bfloat16)
    key[0, 0, :, 0] = torch.tensor([1.0, 16.0, 16.0, 1.0])
    key[0, 0, 2, 1] = 0.25  # sqrt(256.0625) rounds to 16 in bfloat16
    mask = torch.ones(1, 1, 4, dtype=torch.bool)
    sparse = sparsify(key, key, key, mask, LSGLayout(0, 4, 4, 4), sparsity_type="norm")
    assert sparse.key[0, 0, 0].tolist() == [16.0, 0.25]


def test_norm_has_no_gradient_through_the_choice():
    key = torch.randn(1, 1, 8, 4, requires_grad=True)
    value = torch.randn(1, 1, 8, 4, requires_grad=True)
    mask = torch.ones(1, 1, 8, dtype=torch.bool)
    sparse = sparsify(key, key, value, mask, LSGLayout(0, 4, 4, 2), sparsity_type="norm")
    sparse.value.sum().backward()
    assert key.grad is None and value.grad.sum() == 4 * 4


def test_factor_one_changes_nothing_and_lsh_may_be_bos_pooling():
    key, value = torch.randn(2, 1, 2, 8, 4, generator=torch.Generator().manual_seed(0))
    keep = torch.ones(1, 1, 8, dtype=torch.bool)
    same = sparsify(key, key, value, keep, LSGLayout(0, 4, 4, 1), sparsity_type="lsh")
    assert torch.equal(same.key, key) and torch.equal(same.value, value)
    pooled = [
        sparsify(key, key, value, keep, LSGLayout(0, 4, 4, 4), sparsity_type=kind) for kind in ("lsh", "bos_pooling")
    ]
    assert torch.equal(pooled[0].key, pooled[1].key)
