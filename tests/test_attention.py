"""The kernels: eager against a statement of the specification in float64, every other kernel against eager."""

import contextlib
from unittest import mock

import oracle
import pytest
import torch
from hypothesis import given, strategies as st
from strategies import KINDS, batches
from torch.nn.utils.rnn import pad_sequence

from lsg_converter.modeling import lsg_attention as module, lsg_cpu
from lsg_converter.modeling.lsg_bias import RelativeEmbeddings
from lsg_converter.modeling.lsg_packing import pack_batch, promote
from lsg_converter.modeling.lsg_sparsity import SPARSITY_TYPES


pytestmark = pytest.mark.newest
HEADS, WIDTH = 3, 8
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
        monkeypatch.setattr(lsg_cpu, "MAX_KINDS", 0)  # nor are biases kept from one tile to another
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


def random_states(batch, tokens, dtype=torch.float64):
    """Queries, keys and values."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, batch, HEADS, tokens, WIDTH, generator=generator, dtype=torch.float64).to(dtype).unbind()


def inputs(length, g=1, batch=3, dtype=torch.float32):
    """Queries, keys, values, and a mask: one row whole, one padded on the right, one on the left and with a hole."""
    keep = torch.ones(batch, g + length, dtype=torch.bool)
    keep[1, g + (2 * length + 2) // 3 :] = False
    keep[2, g : g + length // 4] = False
    keep[2, g + length // 2] = False
    return *random_states(batch, g + length, dtype), keep


def close(actual, expected, atol=1e-10):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def cover(keep, *tensors):
    """The tensors with great numbers under the mask, which must not be seen."""
    return [tensor.masked_fill(~keep[:, None, :, None], 1e4) for tensor in tensors]


def counts(keep):
    """Where the output means something: up to the last token of a row that is kept. Shape (batch, 1, tokens, 1)."""
    behind = keep.flip(1).cumsum(1).flip(1) == 0
    return ~behind[:, None, :, None]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lsh"])
@given(data=st.data())
def test_eager_agrees_with_the_specification(data, kind):
    """Which states the rows alone, without padding."""
    fields, rows = data.draw(batches(kind, max_rows=2))
    g, block, sparse, factor, kind = fields.values()
    keep = pad_sequence(rows, batch_first=True)
    q, k, v = random_states(*keep.shape)
    output, _ = lsg_attention(q, *cover(keep, k, v), keep, **fields, kernel="eager")
    for i, row in enumerate(rows):
        alone = (x[i, :, : len(row)] for x in (q, k, v))
        expected = oracle.attention(*alone, row, g=g, block=block, sparse=sparse, factor=factor, kind=kind)
        close(output[i, :, : len(row)], expected, atol=1e-12)


def biases(reach):
    """A table of biases, by head."""
    return torch.randn(HEADS, 2 * reach + 1, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def relative(reach, terms):
    """Embeddings of distances, by head, and which stand for a distance; what they add, for `oracle`."""
    generator = torch.Generator().manual_seed(5)
    number = min(2 * reach + 1, 9)
    tensors = torch.randn(2, HEADS, number, WIDTH, generator=generator, dtype=torch.float64).unbind()
    keys, queries = (x if name in terms else None for name, x in zip(("c2p", "p2c"), tensors, strict=True))
    rows = torch.randint(number, (2 * reach + 1,), generator=generator).sort().values

    def added(head, query, key, distance):
        row = rows[reach + min(max(distance, -reach), reach)]
        products = [] if keys is None else [query @ keys[head, row]]
        products += [] if queries is None else [key @ queries[head, row]]
        return sum(products) / WIDTH**0.5

    return RelativeEmbeddings(keys, queries, rows), added


TERMS = st.sampled_from([("c2p", "p2c"), ("c2p",), ("p2c",)])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lsh"])
@given(data=st.data(), reach=st.integers(0, 40), causal=st.booleans(), terms=TERMS)
def test_terms_of_distance_agree_with_the_specification(data, kind, reach, causal, terms):
    fields, rows = data.draw(batches(kind, max_rows=2))
    g, block, sparse, factor, kind = fields.values()
    keep = pad_sequence(rows, batch_first=True)
    q, k, v = random_states(*keep.shape)
    bias, added = relative(reach, terms)
    output, _ = lsg_attention(q, *cover(keep, k, v), keep, **fields, causal=causal, bias=bias, kernel="eager")
    options = {"g": g, "block": block, "sparse": sparse, "factor": factor, "kind": kind, "causal": causal}
    for i, row in enumerate(rows):
        alone = (x[i, :, : len(row)] for x in (q, k, v))
        close(output[i, :, : len(row)], oracle.attention(*alone, row, **options, bias=added), atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@given(
    data=st.data(),
    reach=st.integers(0, 40),
    causal=st.booleans(),
    full=st.sampled_from([None, 13, 40]),
    terms=TERMS,
)
def test_terms_of_distance_are_alike_in_all_kernels(data, kernel, kind, reach, causal, full, terms):
    """Also in their gradients, and whatever stands under the mask."""
    fields, rows = data.draw(batches(kind))
    keep = pad_sequence(rows, batch_first=True)
    weight = torch.randn(*keep.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight = weight[:, None, :, None] * counts(keep)
    options = fields | {"causal": causal, "full_attention_length": None if causal else full}
    (*tables, columns), _ = relative(reach, terms)
    q, k, v = random_states(*keep.shape)
    results = []
    for name, tensors in (("eager", (q, k, v)), (kernel, (q, *cover(keep, k, v)))):
        leaves = [None if x is None else x.clone().requires_grad_() for x in (*tensors, *tables)]
        bias = RelativeEmbeddings(*leaves[3:], columns)
        output, _ = lsg_attention(*leaves[:3], keep, **options, bias=bias, kernel=name)
        (output * weight).sum().backward()
        leaves = [leaf for leaf in leaves if leaf is not None]
        grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        results.append([output.detach() * counts(keep), *grads])
    for expected, actual in zip(*results, strict=True):
        close(actual, expected)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lsh"])
@given(data=st.data(), reach=st.integers(0, 40), causal=st.booleans())
def test_a_bias_by_distance_agrees_with_the_specification(data, kind, reach, causal):
    fields, rows = data.draw(batches(kind, max_rows=2))
    g, block, sparse, factor, kind = fields.values()
    keep = pad_sequence(rows, batch_first=True)
    q, k, v = random_states(*keep.shape)
    options = {"bias": biases(reach), "causal": causal}
    output, _ = lsg_attention(q, *cover(keep, k, v), keep, **fields, **options, kernel="eager")
    for i, row in enumerate(rows):
        alone = (x[i, :, : len(row)] for x in (q, k, v))
        expected = oracle.attention(*alone, row, g=g, block=block, sparse=sparse, factor=factor, kind=kind, **options)
        close(output[i, :, : len(row)], expected, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), reach=st.integers(0, 40), causal=st.booleans(), full=st.sampled_from([None, 13, 40]))
def test_a_bias_by_distance_is_alike_in_all_kernels(data, kernel, kind, reach, causal, full):
    """Also in its gradients."""
    fields, rows = data.draw(batches(kind))
    keep = pad_sequence(rows, batch_first=True)
    weight = torch.randn(*keep.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight = weight[:, None, :, None] * counts(keep)
    options = fields | {"causal": causal, "full_attention_length": None if causal else full}
    results = []
    for name in ("eager", kernel):
        leaves = [tensor.clone().requires_grad_() for tensor in (*random_states(*keep.shape), biases(reach))]
        output, _ = lsg_attention(*leaves[:3], keep, **options, bias=leaves[3], kernel=name)
        (output * weight).sum().backward()
        grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        results.append([output.detach() * counts(keep), *grads])
    for expected, actual in zip(*results, strict=True):
        close(actual, expected)


def test_places_of_merged_tokens():
    """Those of clusters are the means of the places of their tokens, whichever rounds merged them."""
    *tensors, keep = inputs(64, g=0, dtype=torch.float64)
    key = tensors[1]
    marks = torch.eye(64, dtype=torch.float64).expand(3, HEADS, -1, -1)  # as values: shares of tokens
    options = {"sparsity_type": "lsh", "with_place": True}
    layout = module.LSGLayout.from_fields(0, 16, 16, 4, "lsh")
    sparse = module.sparsify(key, key, marks, keep[:, None], layout, **options)
    expected = (sparse.value @ torch.arange(64, dtype=torch.float64)).round().long()
    first = 64 * torch.arange(3)[:, None, None]
    assert torch.equal((sparse.place - first)[sparse.mask], expected[sparse.mask])


class Mask:
    """What dropout keeps, by row, head, query and key, whichever kernel asks. A key is a token or a sparse token."""

    def __init__(self, fields, batch, total, dropout):
        self.g, self.block, self.sparse, self.factor, _ = fields.values()
        self.tokens, self.dropout = total, dropout
        padded = self.g + -(-(total - self.g) // self.block) * self.block
        generator = torch.Generator().manual_seed(3)
        self.kept = torch.rand(batch, HEADS, padded, 2, padded, generator=generator) >= dropout

    def eager(self, probabilities, _):
        queries, keys = probabilities.shape[2:]
        if probabilities.shape[1] == HEADS:  # not by blocks: all keys
            return probabilities * self.kept[:, :, :queries, 0, :keys] / (1 - self.dropout)
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
        return probabilities * kept.view(probabilities.shape) / (1 - self.dropout)

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


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), dropout=st.sampled_from([0.0, 0.25]))
def test_kernels_agree_with_eager(data, kernel, kind, dropout):
    """Also in gradients, and whatever stands under the mask. What is dropped is given from outside, alike."""
    fields, rows = data.draw(batches(kind))
    keep = pad_sequence(rows, batch_first=True)
    q, k, v = random_states(*keep.shape)
    mask = Mask(fields, *keep.shape, dropout)
    weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(1), dtype=q.dtype) * counts(keep)
    results = []
    for name, tensors in (("eager", (q, k, v)), (kernel, (q, *cover(keep, k, v)))):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        with contextlib.ExitStack() as stack:
            if dropout:
                stack.enter_context(mock.patch.object(module.F, "dropout", mask.eager))
                stack.enter_context(
                    mock.patch.object(lsg_cpu.TiledAttention, "dropout_mask", lambda *place: mask.cpu(*place))
                )
                # torch's own draws cannot be given.
                stack.enter_context(mock.patch.object(module, "sdpa_kernel", module.eager_kernel))
            output, _ = lsg_attention(*leaves, keep, **fields, dropout=dropout, kernel=name)
            (output * weight).sum().backward()
        results.append([output.detach() * counts(keep), *(leaf.grad for leaf in leaves)])
    for expected, actual in zip(*results, strict=True):
        close(actual, expected)


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
    leaves = [tensor[1:, :1, :, :2].clone().requires_grad_() for tensor in tensors]

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


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_rows_are_the_same_alone_padded_and_end_to_end(data, kind):
    fields, rows = data.draw(batches(kind, min_rows=2, max_rows=4))
    keep, seqlens = pad_sequence(rows, batch_first=True), [len(row) for row in rows]
    states = random_states(*keep.shape)

    def outputs_and_grads(attend):
        leaves = [x.clone().requires_grad_() for x in states]
        outputs = [x * counts(row[None]) for x, row in zip(attend(*leaves), rows, strict=True)]
        sum(x.square().sum() for x in outputs).backward()
        return [*outputs, *(x.grad for x in leaves)]

    def split(*tensors):
        return [[x[i : i + 1, :, : len(row)] for x in tensors] for i, row in enumerate(rows)]

    def alone(*states):
        parts = zip(split(*states), rows, strict=True)
        return [lsg_attention(*part, row[None], **fields, kernel="eager")[0] for part, row in parts]

    def padded(*states):
        return [part[0] for part in split(lsg_attention(*states, keep, **fields, kernel="eager")[0])]

    def end_to_end(*states):
        packed = [torch.cat(x, dim=2) for x in zip(*split(*states), strict=True)]
        output, _ = lsg_attention(*packed, torch.cat(rows)[None], **fields, seqlens=seqlens)
        return output.split(seqlens, dim=2)

    expected = outputs_and_grads(alone)
    for way in (padded, end_to_end):
        for one, other in zip(outputs_and_grads(way), expected, strict=True):
            close(one, other)


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
    with pytest.raises(ValueError, match=r"sparsity_type: got 'best'; allowed is one of none, norm"):
        lsg_attention(*tensors, keep, **arguments((4, 4, 2), "best"))
    with pytest.raises(ValueError, match=r"attention_mask: got torch.float32; it must be boolean"):
        lsg_attention(*tensors, keep.float())
    with pytest.raises(ValueError, match=r"num_global_tokens: got -1; allowed is at least 0"):
        lsg_attention(*tensors, keep, num_global_tokens=-1)
    with pytest.raises(ValueError, match=r"full_attention_length: got -1; allowed is at least 0"):
        lsg_attention(*tensors, keep, full_attention_length=-1)
    with pytest.raises(ValueError, match=r"attention_mask \(3, 31\); got .* and \(3, 30\)"):
        lsg_attention(*tensors, keep[:, 1:])
