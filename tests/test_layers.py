"""Attention of a text alone, and the layers made of it: against the statement of the specification, and torch's own."""

import oracle
import pytest
import torch
import torch.nn.functional as F

from lsg_converter import lsg_attention
from lsg_converter.layers import BlockLocalAttention, BlockLocalSelfAttention, LSGAttention, LSGSelfAttention
from lsg_converter.modeling.lsg_sparsity import SPARSITY_TYPES


pytestmark = pytest.mark.newest
BLOCK, HEADS, WIDTH = 4, 4, 8
FIELDS = {"block_size": BLOCK, "sparse_block_size": 4, "sparsity_factor": 2}
STATED = [kind for kind in SPARSITY_TYPES if kind != "lsh"]  # by the oracle


def states(tokens, batch=1, heads=HEADS):
    """Queries, keys and values of a text, in float64."""
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(3, batch, heads, tokens, WIDTH, generator=generator, dtype=torch.float64).unbind()


def layer(**arguments):
    return LSGAttention(**{**FIELDS, **arguments}).eval()


def close(actual, expected, atol=1e-12):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("kind", STATED)
def test_a_layer_is_what_the_specification_says(kind, causal):
    """Whose causal global tokens pass their queries through; here they are tokens of the text, and attend in order."""
    for g, length in ((0, 30), (1, 30), (1, 9), (1, 1), (3, 29), (3, 2)):
        q, k, v = states(length)
        output = layer(sparsity_type=kind, is_causal=causal, num_global_tokens=g)(q, k, v)[0]
        options = {"block": BLOCK, "sparse": 4, "factor": 2, "kind": kind, "causal": causal, "g": min(g, length)}
        expected = oracle.attention(q[0], k[0], v[0], torch.ones(length, dtype=torch.bool), **options)
        if causal:
            expected[:, :g] = F.scaled_dot_product_attention(q, k, v, is_causal=True)[0, :, :g]
        close(output, expected)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_blocks_longer_than_the_text_are_ordinary_attention(causal):
    q, k, v = (x.requires_grad_() for x in states(30, batch=2))
    outputs = [
        layer(block_size=16, is_causal=causal)(q, k, v),
        F.scaled_dot_product_attention(q, k, v, is_causal=causal),
    ]
    close(*outputs)
    for mine, expected in zip(*(torch.autograd.grad(x.square().sum(), (q, k, v)) for x in outputs), strict=True):
        close(mine, expected)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("kind", SPARSITY_TYPES)
def test_padding_on_either_side_changes_nothing(kind, causal):
    q, k, v = states(40, batch=3)
    mask = torch.ones(3, 40, dtype=torch.bool)
    mask[0, 33:] = mask[1, :13] = mask[2, :25] = mask[2, 32:] = False
    attend = layer(sparsity_type=kind, is_causal=causal)
    additive = torch.zeros(3, 1, 1, 40).masked_fill(~mask[:, None, None], torch.finfo(torch.float32).min)
    outputs = [attend(q, k, v, form) for form in (mask, mask.int(), mask[:, None, None], additive)]
    for row, kept in enumerate(mask):
        alone = attend(*(x[row : row + 1, :, kept] for x in (q, k, v)))
        for output in outputs:
            close(output[row : row + 1, :, kept], alone)


@pytest.mark.parametrize("kernel", ["eager", "portable", "cpu"])
def test_keys_of_fewer_heads_and_other_widths(kernel):
    """As if the keys were repeated, with scores scaled by the width of the queries."""
    q, k, v = states(30)
    v = v[..., :5]
    for causal in (False, True):
        attend = layer(is_causal=causal, attention_kernel=kernel)
        output = attend(q, k[:, :2], v[:, :2])
        assert output.shape == (1, HEADS, 30, 5)
        repeated = attend(q, *(x[:, :2].repeat_interleave(2, dim=1) for x in (k, v)))
        padded, _ = lsg_attention(
            q, *(F.pad(x[:, [0, 0, 1, 1]], (0, WIDTH - x.shape[3])) for x in (k, v)), torch.ones(1, 30).bool(),
            **FIELDS, causal=causal, kernel="eager",
        )  # fmt: skip
        close(output, repeated)
        close(output[:, :, 1:], padded[:, :, 1:, :5], atol=1e-10)


@pytest.mark.parametrize("kind", [kind for kind in SPARSITY_TYPES if kind != "bos_pooling"])
@pytest.mark.parametrize("g", [0, 1, 3])
def test_a_step_gives_what_the_whole_text_gives(kind, g):
    """Of one token and of several, also where a row begins late, has just begun, or has a hole among its first ones."""
    q, k, v = states(40, batch=4)
    k, v = k[:, :2], v[:, :2]
    whole_mask = torch.ones(4, 40, dtype=torch.bool)
    padded = whole_mask.clone()
    padded[1, :7] = padded[2, :19] = padded[3, 1] = False
    for mask, hide in ((padded, False), (padded, True), (whole_mask, False)):
        attend = layer(sparsity_type=kind, is_causal=True, num_global_tokens=g, mask_first_token=hide)
        whole = attend(q, k, v, mask)
        for start, stop in ((1, 2), (8, 9), (9, 10), (20, 21), (20, 27), (21, 22), (12, 40), (39, 40)):
            step = attend(q[:, :, start:stop], k[:, :, :stop], v[:, :, :stop], mask[:, :stop])
            kept = mask[:, None, start:stop, None]
            close(step * kept, whole[:, :, start:stop] * kept)


def test_the_first_token_can_be_hidden():
    q, k, v = states(30)
    other = [x.clone().index_fill_(2, torch.tensor([0]), 7.0) for x in (k, v)]
    for causal in (False, True):
        for g in (True, False):
            attend = layer(mask_first_token=True, compute_global_attention=g, is_causal=causal)
            close(attend(q, *other), attend(q, k, v))
    assert not torch.allclose(layer()(q, *other), layer()(q, k, v))


def test_dropout_is_for_training():
    q, k, v = states(30)
    attend = layer(attention_dropout_prob=0.5, is_causal=True)
    close(attend(q, k, v), layer(is_causal=True)(q, k, v))
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(attend.train()(q, k, v))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])
    # The first token attends to itself alone: it is kept and scaled, or dropped.
    assert {round(float(x), 9) for x in (outputs[0] / v)[0, :, 0].flatten()} <= {0.0, 2.0}


def test_the_published_names():
    """With the published arguments in their order; the sparse keys on a side are as many as a block has tokens."""
    q, k, v = states(30)
    mask = torch.zeros(1, 1, 1, 30)
    local, sparse = (
        BlockLocalSelfAttention(None, 4, False, True, 0.3),
        LSGSelfAttention(None, 4, 2, "stride", True, False),
    )
    assert local.attention_dropout_prob == 0.3 and sparse.attention_dropout_prob == 0.1
    expected = BlockLocalAttention(4, compute_global_attention=False, is_causal=True)
    close(local.eval()(q, k, v, mask), expected.eval()(q, k, v))
    close(sparse.eval()(q, k, v, mask), layer(sparsity_type="stride")(q, k, v))
    swapped = BlockLocalSelfAttention(preprocessing_function=lambda q, k, v, mask, **kwargs: (q, v, k, mask))
    close(swapped.eval()(q, k, v, name=1), F.scaled_dot_product_attention(q, v, k))


@pytest.mark.parametrize("causal", [pytest.param(False, marks=pytest.mark.full), True])
def test_a_layer_compiles_to_two_graphs(causal):
    """For short and for long texts of every length, with any padding."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    attend = layer(is_causal=causal)
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="eager")
    for length in (9, 30, 7):
        q, k, v = states(length, batch=2)
        mask = torch.ones(2, 1, 1, length, dtype=torch.bool)
        mask[1, ..., :3] = False
        kept = mask[:, :, 0, :, None]
        close(compiled(q, k, v, mask) * kept, attend(q, k, v, mask) * kept)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    torch._dynamo.reset()


def test_errors_say_what_is_allowed():
    q, k, v = states(30)
    with pytest.raises(ValueError, match=r"attention_mask: got shape \(1, 1, 30, 30\); .*\(batch, 1, 1, tokens\)"):
        layer()(q, k, v, torch.ones(1, 1, 30, 30, dtype=torch.bool))
    with pytest.raises(ValueError, match="adds no bias"):
        layer()(q, k, v, torch.linspace(-3, 0, 30)[None, None, None])
    with pytest.raises(ValueError, match=r"got torch.int64 of four dimensions; use booleans"):
        layer()(q, k, v, torch.ones(1, 1, 1, 30, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"got \(1, 4, 1, 8\), \(1, 4, 30, 8\)"):
        layer()(q[:, :, :1], k, v)
    with pytest.raises(ValueError, match=r"^sparsity_type: got 'bos_pooling', .*use_cache=False"):
        layer(sparsity_type="bos_pooling", is_causal=True)(q[:, :, :1], k, v)
    with pytest.raises(ValueError, match=r"^block_size: got 5; allowed is a multiple of sparsity_factor, 2$"):
        layer(block_size=5)
    with pytest.raises(ValueError, match=r"^window: no field of LSG attention; use num_global_tokens, block_size"):
        layer(window=5)
    with pytest.raises(ValueError, match=r"neither 0 nor very negative"):
        layer()(q, k, v, torch.full((1, 1, 1, 30), torch.nan))
    with pytest.raises(ValueError, match=r"whole numbers that are neither 0 nor 1"):
        layer()(q, k, v, torch.full((1, 30), 2))
    with pytest.raises(ValueError, match=r"must have one head_dim, key and value the same"):
        layer()(q, k[..., :4], v)
    with pytest.raises(ValueError, match=r"must have one head_dim, key and value the same"):
        layer()(q, k, v[:, :, :20])
    with pytest.raises(ValueError, match=r"got torch.float32, torch.float16 and torch.float32; .* one floating dtype"):
        layer()(q.float(), k.half(), v.float())
    with pytest.raises(ValueError, match=r"^attention_dropout_prob: got 'a'; allowed is 0 to 1"):
        layer(attention_dropout_prob="a")
    with pytest.raises(ValueError, match=r"^attention_dropout_prob: got 2; allowed is 0 to 1"):
        layer(attention_dropout_prob=2)
    with pytest.raises(ValueError, match=r"^kernel: got 'triton', and it runs"):
        layer(attention_kernel="triton")(q, k, v)
