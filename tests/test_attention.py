"""The kernels: eager against a statement of the specification in float64, every other kernel against eager."""

from unittest import mock

import oracle
import pytest
import torch

from lsg_converter.modeling import lsg_attention as module, lsg_cpu
from lsg_converter.modeling.lsg_packing import pack_batch, promote
from lsg_converter.modeling.lsg_sparsity import SPARSITY_TYPES


pytestmark = pytest.mark.newest
HEADS, WIDTH = 3, 8
# block_size, sparse_block_size, sparsity_factor
SHAPES = [(4, 4, 2), (8, 8, 4), (8, 4, 2), (4, 8, 2), (4, 4, 1), (6, 6, 2), (6, 3, 3), (4, 0, 2), (4, 4, 0), (4, 4, 4)]
# By this name the tests ask for the "cpu" kernel as it is on CPUs that multiply half precision as fast.
NATIVE = "native"
FORMS = ["eager", "cpu", "portable", NATIVE]


def lsg_attention(*tensors, kernel="sdpa", **kwargs):
    if kernel == NATIVE:
        with mock.patch.object(lsg_cpu, "product_dtype", lambda dtype: dtype):
            return module.lsg_attention(*tensors, kernel="sdpa", **kwargs)
    return module.lsg_attention(*tensors, kernel=kernel, **kwargs)


@pytest.fixture(params=["cpu", "cpu, head by head", "portable"])
def kernel(request, monkeypatch):
    """Every kernel but eager; that for CPUs also as it is where the scores of few heads fit into the caches."""
    if request.param.endswith("head by head"):
        monkeypatch.setattr(lsg_cpu, "THREAD_SCORES", 1)
    return request.param.split(",")[0]


def arguments(shape, kind, g=1):
    block, sparse, factor = shape
    return {
        "num_global_tokens": g,
        "block_size": block,
        "sparse_block_size": sparse,
        "sparsity_factor": factor,
        "sparsity_type": kind,
    }


def inputs(length, g=1, batch=3, dtype=torch.float32, seed=0):
    """Queries, keys, values, and a mask: one row whole, one padded on the right, one on the left and with a hole."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, batch, HEADS, g + length, WIDTH, generator=generator).to(dtype)
    keep = torch.ones(batch, g + length, dtype=torch.bool)
    keep[1, g + (2 * length + 2) // 3 :] = False
    keep[2, g : g + length // 4] = False
    keep[2, g + length // 2] = False
    return q.clone(), k.clone(), v.clone(), keep


def lengths(block):
    return [1, 2 * block - 1, 2 * block, 2 * block + 1, 3 * block, 3 * block + 1, 7 * block - 2]


@pytest.mark.parametrize("kind", [kind for kind in SPARSITY_TYPES if kind != "lsh"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_eager_agrees_with_the_specification(shape, kind):
    block, sparse, factor = shape
    for length in lengths(block):
        g = length % 3
        q, k, v, keep = inputs(length, g, dtype=torch.float64)
        output, _ = lsg_attention(q, k, v, keep, **arguments(shape, kind, g), kernel="eager")
        for row in range(len(q)):
            expected = oracle.attention(
                q[row], k[row], v[row], keep[row], g=g, block=block, sparse=sparse, factor=factor, kind=kind
            )
            torch.testing.assert_close(output[row], expected, rtol=0, atol=1e-12)


def counts(keep):
    """Where the output means something: up to the last token of a row that is kept. Shape (batch, 1, tokens, 1)."""
    behind = keep.flip(1).cumsum(1).flip(1) == 0
    return ~behind[:, None, :, None]


@pytest.mark.parametrize("kind", SPARSITY_TYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_agree_with_eager(shape, kind, kernel):
    for length in lengths(shape[0]):
        g = (length + 2) % 3
        *tensors, keep = inputs(length, g=g)
        weight = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1)) * counts(keep)
        results = []
        for name in ("eager", kernel):
            leaves = [tensor.clone().requires_grad_() for tensor in tensors]
            output, _ = lsg_attention(*leaves, keep, **arguments(shape, kind, g), kernel=name)
            (output * weight).sum().backward()
            results.append([output.detach() * counts(keep), *(leaf.grad for leaf in leaves)])
        for expected, actual in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


class Mask:
    """What dropout keeps, by row, head, query and key, whichever kernel asks. A key is a token or a sparse token."""

    def __init__(self, batch, g, length, shape):
        self.block, self.sparse, self.factor = shape
        self.g, self.tokens = g, g + length
        padded = g + -(-length // self.block) * self.block
        self.kept = torch.rand(batch, HEADS, padded, 2, padded, generator=torch.Generator().manual_seed(3)) >= 0.25

    def eager(self, probabilities, dropout):
        queries, keys = probabilities.shape[2:]
        if probabilities.shape[1] == HEADS:  # not by blocks: all keys
            return probabilities * self.kept[:, :, :queries, 0, :keys] / 0.75
        block, g = torch.arange((self.kept.shape[2] - self.g) // self.block)[:, None], self.g
        step = self.block // self.factor if self.factor else 0
        local, side = torch.arange(3 * self.block), torch.arange(self.sparse if self.factor else 0)
        columns = [torch.arange(g) + 0 * block, g + (block - 1) * self.block + local]
        if keys > g + 3 * self.block:
            columns += [(block - 1) * step - self.sparse + side, (block + 2) * step + side]
        kind = torch.cat([torch.full((len(c[0]),), int(i > 1)) for i, c in enumerate(columns)])
        column = torch.cat(columns, dim=1).clamp(0, self.kept.shape[4] - 1)
        query = g + block * self.block + torch.arange(self.block)
        kept = self.kept[:, :, query[:, :, None], kind, column[:, None]]
        return probabilities * kept.view(probabilities.shape) / 0.75

    def cpu(self, attention, number):
        tile, heads = attention.tiles[number], slice(attention.first_head, attention.first_head + attention.heads)
        first = tile.start // self.tokens * self.tokens
        mask = torch.zeros(attention.heads, tile.stop - tile.start, tile.num_columns, dtype=attention.dtype)
        for columns, keys in zip(tile.split(mask, dim=2), tile.key_ranges, strict=False):
            sparse = keys.tensor == lsg_cpu.SPARSE
            length = attention.tensors[keys.tensor].shape[1] * self.tokens // attention.tensors[0].shape[1]
            start = keys.start - first // self.tokens * length
            kept = self.kept[first // self.tokens, heads, tile.start - first : tile.stop - first, int(sparse)]
            columns.copy_(kept[:, :, start : start + keys.stop - keys.start])
        return mask


@pytest.mark.parametrize("kind", SPARSITY_TYPES)
@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
def test_dropout_agrees_with_eager(shape, kind, kernel):
    """What is dropped is given from outside, the same to both."""
    for length in lengths(shape[0])[2:]:
        *tensors, keep = inputs(length, g=2)
        mask = Mask(len(keep), 2, length, shape)
        weight = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1)) * counts(keep)
        results = []
        for name in ("eager", kernel):
            leaves = [tensor.clone().requires_grad_() for tensor in tensors]
            with (
                mock.patch.object(module.F, "dropout", mask.eager),
                mock.patch.object(
                    lsg_cpu.TiledAttention, "dropout_mask", lambda self, number, mask=mask: mask.cpu(self, number)
                ),
                mock.patch.object(module, "sdpa_kernel", module.eager_kernel),  # torch's own draws cannot be given
            ):
                output, _ = lsg_attention(*leaves, keep, **arguments(shape, kind, 2), dropout=0.25, kernel=name)
                (output * weight).sum().backward()
            results.append([output.detach() * counts(keep), *(leaf.grad for leaf in leaves)])
        for expected, actual in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_dropout_is_drawn(kernel):
    """As often as asked, by torch's seed, and alike in both passes."""
    tokens, g, block = 192, 1, 32
    query = key = torch.zeros(1, 1, g + tokens, g + tokens)  # all keys weigh the same
    value, keep = torch.eye(g + tokens)[None, None], torch.ones(1, g + tokens, dtype=torch.bool)

    def draw(seed, dropout, value=value):
        torch.manual_seed(seed)
        options = arguments((block, 0, 2), "none")
        return lsg_attention(query, key, value, keep, **options, dropout=dropout, kernel=kernel)[0][0, 0]

    whole = draw(0, 0.0)
    first, again, other = draw(0, 0.1), draw(0, 0.1), draw(1, 0.1)
    assert torch.equal(first, again) and not torch.equal(first, other)
    for dropped, p in ((first, 0.1), (draw(0, 0.7), 0.7), (draw(0, 1.0), 1.0)):
        share = (dropped[whole > 0] == 0).double().mean()
        assert abs(share - p) < 0.02
        torch.testing.assert_close(dropped[dropped > 0], (whole / max(1 - p, 1e-9))[dropped > 0], rtol=1e-4, atol=0)
    # No two queries are dropped alike, and no key is dropped more often than others.
    dropped = (first == 0)[g:].double()[whole[g:] > 0].view(-1)
    assert abs(torch.corrcoef(torch.stack([dropped[:-97], dropped[97:]]))[0, 1]) < 0.05
    assert all(abs(dropped[i::4].mean() - 0.1) < 0.02 for i in range(4))


@pytest.mark.parametrize("kind", ["norm", "lsh"])
def test_gradients_are_those_of_the_output(kind):
    """By finite differences, with dropout, whose draws the backward pass has to repeat."""
    *tensors, keep = inputs(14, dtype=torch.float64)
    leaves = [tensor[1:, :2, :, :2].clone().requires_grad_() for tensor in tensors]

    def attend(*leaves):
        torch.manual_seed(0)
        return lsg_attention(*leaves, keep[1:], **arguments((4, 4, 2), kind), dropout=0.25)[0]

    assert torch.autograd.gradcheck(attend, leaves)


@pytest.mark.parametrize("kernel", FORMS)
@pytest.mark.parametrize("kind", SPARSITY_TYPES)
def test_rows_up_to_a_length_get_full_attention(kind, kernel):
    """Each by its own length, whatever stands beside it; the gradients too."""
    g, block, full = 1, 4, 19
    options = arguments((block, 4, 2), kind, g) | {"full_attention_length": full, "kernel": kernel}
    *tensors, _ = inputs(41, g, batch=6, dtype=torch.float64)
    lengths = torch.tensor([3, 8, 18, 19, 20, 41])
    mask = torch.arange(g + 41) < g + lengths[:, None]
    mask[2, 1:4] = False
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    output, probabilities = lsg_attention(*leaves, mask, **options)
    (output * counts(mask)).square().sum().backward()
    for row, length in enumerate((g + lengths).tolist()):
        own = [tensor[row : row + 1, :, :length].clone().requires_grad_() for tensor in tensors]
        own_mask = mask[row : row + 1, :length]
        if length - g <= full:
            expected = torch.nn.functional.scaled_dot_product_attention(*own, attn_mask=own_mask[:, None, None])
        else:
            expected, _ = lsg_attention(*own, own_mask, **arguments((block, 4, 2), kind, g), kernel="eager")
        torch.testing.assert_close(output[row : row + 1, :, :length], expected, rtol=0, atol=1e-9)
        expected.square().sum().backward()
        for leaf, alone in zip(leaves, own, strict=True):
            torch.testing.assert_close(leaf.grad[row : row + 1, :, :length], alone.grad, rtol=0, atol=1e-9)
    if kernel == "eager":
        assert probabilities[0].isnan().any(-1).any(-1).any(-1).tolist() == [False, False, True, True, False, False]


@pytest.mark.parametrize("seqlens", [None, [31, 42]], ids=["rows", "packed"])
def test_promoted_tokens_see_all_and_are_seen_by_all(seqlens):
    """Against one softmax over all tokens under a mask; a token counts once, wherever it is seen from."""
    g, block = 2, 4
    options = arguments((block, 0, 2), "none", g)
    lengths = seqlens or [42, 42]
    batch, most = len(lengths), max(lengths)
    q, k, v = torch.randn(3, batch, HEADS, most, WIDTH, generator=torch.Generator().manual_seed(0)).double()
    mask = torch.arange(most) < torch.tensor(lengths)[:, None]
    mask[0, 9] = False
    promoted = torch.zeros(batch, most - g, dtype=torch.bool)
    promoted[0, [0, 7, 12, 13]] = promoted[1, 20] = True
    packing = pack_batch(mask[:, None, None], None, g, "cpu" if seqlens else "eager")
    promotion = promote(promoted, mask[:, None, None], packing, g)
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    heads = [packing.pack(x) if packing else x for x in heads]
    heads = [promotion.insert(x.transpose(1, 2)) for x in heads]
    options |= {"num_global_tokens": g + promotion.copies, "kernel": "cpu" if seqlens else "eager"}
    output, _ = lsg_attention(*heads, promotion.mask, **options, seqlens=promotion.seqlens)
    output = promotion.remove(output).transpose(1, 2)
    if packing:
        output = packing.unpack(output.flatten(2)).unflatten(2, (HEADS, WIDTH))
    place = torch.arange(most) - g
    near = (place[:, None].div(block, rounding_mode="floor") - place.div(block, rounding_mode="floor")).abs() <= 1
    everywhere = (place < 0) | torch.nn.functional.pad(promoted & mask[:, g:], (g, 0))
    seen = (near | everywhere[:, :, None] | everywhere[:, None]) & mask[:, None]
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None]).transpose(1, 2)
    torch.testing.assert_close(output[mask], expected[mask], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", SPARSITY_TYPES)
@pytest.mark.parametrize("g", [0, 1, 5])
def test_rows_end_to_end_are_rows_alone(kind, g):
    """A batch of one that holds rows end to end, short ones too, and one with a hole and padding on the left."""
    seqlens = [g + t for t in (30, 3, 9, 8, 17, 1)]
    generator = torch.Generator().manual_seed(0)
    tensors = torch.randn(3, 1, HEADS, sum(seqlens), WIDTH, generator=generator, dtype=torch.float64)
    keep = torch.ones(1, sum(seqlens), dtype=torch.bool)
    keep[0, g : g + 2] = keep[0, g + 14] = False
    options = arguments((4, 4, 2), kind, g)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    packed, _ = lsg_attention(*leaves, keep, **options, seqlens=seqlens)
    packed.square().sum().backward()
    others = [tensor.clone().requires_grad_() for tensor in tensors]
    split = zip(*(x.split(seqlens, 2) for x in others), keep.split(seqlens, 1), strict=True)
    alone = torch.cat([lsg_attention(*row, **options, kernel="eager")[0] for row in split], dim=2)
    alone.square().sum().backward()
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-9)
    for leaf, other in zip(leaves, others, strict=True):
        torch.testing.assert_close(leaf.grad, other.grad, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kernel", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", SPARSITY_TYPES)
def test_half_precision_is_finite(kind, dtype, kernel):
    for length in (8, 30):
        q, k, v, keep = inputs(length, dtype=dtype)
        keep[1] = False  # a row that is all padding, and has no global token either
        leaves = [x.requires_grad_() for x in (q * 6, k * 6, v * 30)]
        output, _ = lsg_attention(*leaves, keep, **arguments((4, 4, 2), kind), kernel=kernel)
        output.float().square().mean().backward()
        assert output.dtype == dtype
        assert output.isfinite().all()
        assert all(leaf.grad.isfinite().all() for leaf in leaves)
        assert not output[1].any()


@pytest.mark.parametrize("kernel", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["none", "pooling", "bos_pooling", "stride", "block_stride"])
def test_half_precision_is_near(kind, dtype, kernel):
    *tensors, keep = inputs(30, dtype=dtype)
    options = arguments((4, 4, 2), kind)
    output, _ = lsg_attention(*tensors, keep, **options, kernel=kernel)
    exact, _ = lsg_attention(*(x.double() for x in tensors), keep, **options, kernel="eager")
    torch.testing.assert_close(output.double() * counts(keep), exact * counts(keep), rtol=0, atol=0.03)


@pytest.mark.parametrize("kernel", FORMS)
@pytest.mark.parametrize("kind", SPARSITY_TYPES)
def test_what_is_masked_is_not_seen(kind, kernel):
    q, k, v, keep = inputs(30, dtype=torch.float64)
    hidden = ~keep[:, None, :, None]
    options = {**arguments((4, 4, 2), kind), "kernel": kernel}
    output, _ = lsg_attention(q, k, v, keep, **options)
    other, _ = lsg_attention(q, k.masked_fill(hidden, 1e4), v.masked_fill(hidden, -1e4), keep, **options)
    torch.testing.assert_close(other * counts(keep), output * counts(keep), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kernel", FORMS)
@pytest.mark.parametrize("shape", [(4, 4, 2), (8, 8, 4), (8, 4, 2)], ids=str)
@pytest.mark.parametrize("kind", SPARSITY_TYPES)
def test_padding_on_the_right_changes_nothing(kind, shape, kernel):
    q, k, v, _ = inputs(61, dtype=torch.float64)
    options = {**arguments(shape, kind), "kernel": kernel}
    for length in (1, 2 * shape[0] - 1, 2 * shape[0], 2 * shape[0] + 1, 30, 33):
        total = 1 + length
        alone, _ = lsg_attention(q[:, :, :total], k[:, :, :total], v[:, :, :total], keep_all(3, total), **options)
        keep = keep_all(3, 62)
        keep[:, total:] = False
        padded, _ = lsg_attention(q, k, v, keep, **options)
        torch.testing.assert_close(padded[:, :, :total], alone, rtol=0, atol=1e-9)


def keep_all(batch, length):
    return torch.ones(batch, length, dtype=torch.bool)


@pytest.mark.parametrize("kind", SPARSITY_TYPES)
def test_compiles_as_one_graph(kind):
    *tensors, keep = inputs(30)
    options = arguments((4, 4, 2), kind)
    compiled = torch.compile(module.lsg_attention, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*tensors, keep, **options)[0], lsg_attention(*tensors, keep, **options)[0])
    torch._dynamo.reset()


@pytest.mark.parametrize("length", [8, 9, 30])
def test_probabilities(length):
    q, k, v, keep = inputs(length, g=2, dtype=torch.float64)
    output, (text, to_all) = lsg_attention(q, k, v, keep, **arguments((4, 6, 2), "pooling", 2), kernel="eager")
    keys = 2 + length if length <= 8 else 2 + 3 * 4 + 2 * 6
    assert text.shape == (3, HEADS, length, keys)
    assert to_all.shape == (3, HEADS, 2, 2 + length)
    torch.testing.assert_close(text.sum(-1), torch.ones(3, HEADS, length, dtype=text.dtype))
    torch.testing.assert_close(to_all @ v, output[:, :, :2])
    assert not to_all.masked_select(~keep[:, None, None]).any()


def test_blocks_keep_nothing_that_grows_with_the_windows():
    """What is kept for the backward pass is a few times the inputs, and less than the keys that the blocks see."""
    q, k, v, keep = inputs(400)
    options = arguments((4, 8, 2), "stride")

    def kept(kernel):
        sizes = {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            lsg_attention(*(x.clone().requires_grad_() for x in (q, k, v)), keep, **options, kernel=kernel)
        return sum(sizes.values())

    assert kept("sdpa") < 8 * q.nbytes < kept("portable")


def test_no_probabilities_from_a_fused_kernel():
    for length in (8, 30):
        *tensors, keep = inputs(length)
        assert lsg_attention(*tensors, keep, **arguments((4, 4, 2), "norm"), kernel="sdpa")[1] is None


def test_errors_say_what_is_allowed():
    *tensors, keep = inputs(30)
    with pytest.raises(ValueError, match=r"kernel: got 'flash'; use one of eager, sdpa, cpu, portable, triton"):
        lsg_attention(*tensors, keep, kernel="flash")
    with pytest.raises(ValueError, match=r"sparsity_type: got 'best'; use one of none, norm"):
        lsg_attention(*tensors, keep, **arguments((4, 4, 2), "best"))
    with pytest.raises(ValueError, match=r"attention_mask \(3, 31\); got .* and \(3, 30\)"):
        lsg_attention(*tensors, keep[:, 1:])
