"""The fused kernels against plain attention in float64: on a GPU, or, where there is none, in Triton's interpreter.

Triton decides when it is imported whether it interprets. So without a GPU one test runs this file again, in a process
of its own; and what the compiler makes of the kernels for sm_90 is looked at in the process that does not interpret.
"""

import importlib.util
import itertools
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings, strategies as st
from strategies import KINDS, lengths, masks

from lsg_converter.modeling import lsg_attention as attention, lsg_triton
from lsg_converter.modeling.lsg_attention import lsg_attention
from lsg_converter.modeling.lsg_bias import RelativeEmbeddings
from lsg_converter.modeling.lsg_layout import LSGLayout, SparseKeys, flat_rows, pad_to_multiple, take_rows
from lsg_converter.modeling.lsg_sparsity import largest_norm, sparsify
from lsg_converter.modeling.lsg_triton import (
    choose_largest_norm,
    dropout_keep_mask,
    fused_attention,
    triton_serves,
)
from lsg_converter.modeling.lsg_triton_kernels import FIRST_SPARSE_ID


triton = pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NATIVE = torch.cuda.is_available() and not INTERPRETED
DEVICE = torch.device("cuda" if NATIVE else "cpu")

if INTERPRETED:
    import numpy as np
    from torch.utils._pytree import tree_leaves
    from triton import language as tl
    from triton.runtime import interpreter

    def patch_tensor(tensor, scope, original=interpreter._patch_lang_tensor):
        """Triton 3.6 makes integers of arrays of one element, which NumPy 2.4 refuses."""
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def dot(self, a, b, *others, original=interpreter.InterpreterBuilder.create_dot):
        """It multiplies the bits of bfloat16 as if they were integers."""
        a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return original(self, a, b, *others)

    def take_arguments(self, arguments, keywords, original=interpreter.GridExecutor._init_args_hst):
        """Remember where the tensors of a launch are."""
        on_host = original(self, arguments, keywords)
        memory.clear()
        leaves = [x.untyped_storage() for x in tree_leaves(on_host) if isinstance(x, torch.Tensor)]
        memory.extend((x.data_ptr(), x.data_ptr() + x.nbytes()) for x in leaves)
        return on_host

    def within(name, size_of):
        """`InterpreterBuilder.name`, which may touch those tensors alone."""
        original = getattr(interpreter.InterpreterBuilder, name)

        def checked(self, *arguments):
            pointers, mask, size = size_of(*arguments)
            places = pointers.data[mask.data.astype(bool)]
            inside = sum((places >= start) & (places + size <= end) for start, end in memory)
            assert np.all(inside), f"{name} touches what is not in its tensors"
            return original(self, *arguments)

        setattr(interpreter.InterpreterBuilder, name, checked)

    def patch_once(function, original=interpreter._patch_lang):
        """Each call of a function within a kernel would patch the language anew, which takes a third of the time."""
        languages = [x for x in map(function.__globals__.get, ("tl", "core")) if x in (tl, tl.core)]
        patched = languages and not any(tl.core.is_builtin(language.load) for language in languages)
        return interpreter._LangPatchScope() if patched else original(function)

    memory = []
    interpreter.GridExecutor._init_args_hst = take_arguments
    within("create_masked_load", lambda ptr, mask, *_: (ptr, mask, ptr.get_element_ty().primitive_bitwidth // 8))
    within("create_masked_store", lambda ptr, value, mask, *_: (ptr, mask, value.data.itemsize))
    within("create_atomic_rmw", lambda _, ptr, value, mask, *__: (ptr, mask, value.data.itemsize))
    interpreter._patch_lang_tensor = patch_tensor
    interpreter._patch_lang = patch_once
    interpreter.InterpreterBuilder.create_dot = dot

runs = pytest.mark.skipif(not (NATIVE or INTERPRETED), reason="runs in a process of its own, interpreted")
tiles = pytest.mark.parametrize(
    "wide",
    [pytest.param((), id="large tiles"), pytest.param((torch.float32,), id="small tiles", marks=pytest.mark.full)],
)
forms = pytest.mark.parametrize("causal", [False, True], ids=["both sides", "causal"])
forms_in_full = pytest.mark.parametrize(
    "causal", [pytest.param(False, id="both sides"), pytest.param(True, id="causal", marks=pytest.mark.full)]
)
HEADS = 2


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """So that texts of these lengths have several."""
    monkeypatch.setattr(lsg_triton, "GLOBAL_CHUNK", 64)


@pytest.mark.newest
@pytest.mark.first
@pytest.mark.skipif(NATIVE or INTERPRETED, reason="the tests run in this process")
@pytest.mark.parametrize(
    "flags", [["-n", "0"], pytest.param(["-n", "2", "--full", "-m", "full"], marks=pytest.mark.full)], ids=str
)
def test_in_the_interpreter(flags):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", *flags, __file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert result.returncode == 0, result.stdout[-20000:] + result.stderr[-2000:]


def layout(block, sparse, factor, g, causal=False):
    return LSGLayout.from_fields(g, block, sparse, factor, "norm", causal=causal)


def inputs(t, g, width, dtype=torch.float32, batch=2):
    """Queries, keys and values, token-major; a row is padded on the right, another on the left, with a hole."""
    generator = torch.Generator().manual_seed(t + g)
    states = torch.randn(3, batch, g + t, HEADS, width, generator=generator).to(DEVICE, dtype)
    keep = torch.ones(batch, g + t, dtype=torch.bool)
    keep[0, g + (3 * t + 3) // 4 :] = False
    keep[1:, g : g + t // 4] = False
    keep[1:, g + 5 * t // 8] = False  # where t is 225, in a tile behind one that is full
    return [x.requires_grad_() for x in states.clone().unbind()], keep.to(DEVICE)


def sparse_inputs(t, block, factor, width, keep_heads=HEADS, dtype=torch.float32, batch=2):
    """Sparse keys, values and mask that have nothing to do with the tokens."""
    generator = torch.Generator().manual_seed(t)
    length = -(-t // block) * block // factor
    states = torch.randn(2, batch, HEADS, length, width, generator=generator).to(DEVICE, dtype)
    keep = torch.rand(batch, keep_heads, length, generator=generator).to(DEVICE) < 0.8
    return [x.requires_grad_() for x in states.clone().unbind()], keep


def dense(q, k, v, keep, sparse, *, g, block, window, factor, survive=None, dropout=0.0, causal=False):
    """The specification as one softmax over all tokens and all sparse keys, under a mask of what each query sees."""
    total, width = q.shape[2:]
    place = torch.arange(total, device=q.device)
    i = (torch.arange(total, device=q.device) - g).div(block, rounding_mode="floor")[:, None]
    j = (torch.arange(total, device=q.device) - g).div(block, rounding_mode="floor")[None]
    seen = (i < 0) | (j < 0) | ((i - j).abs() <= 1)
    if causal:
        seen = seen & ((place < g) | (place <= place[:, None]))
    seen = seen[None, None] & keep[:, None, None]
    if sparse is not None:
        k, v = torch.cat([k, sparse[0]], dim=2), torch.cat([v, sparse[1]], dim=2)
        s, step = torch.arange(sparse[0].shape[2], device=q.device)[None], block // factor
        left = (s >= (i - 1) * step - window) & (s < (i - 1) * step)
        right = (s >= (i + 2) * step) & (s < (i + 2) * step + window)
        sides = ((left if causal else left | right) & (i >= 0))[None, None] & sparse[2][:, :, None]
        seen = torch.cat([seen.expand(*sides.shape[:3], -1), sides], dim=-1)
    scores = (q @ k.transpose(-1, -2) / math.sqrt(width)).masked_fill(~seen, -1e30)
    probabilities = scores.softmax(dim=-1).masked_fill(~seen, 0)
    if survive is not None:
        probabilities = probabilities * survive.view(*q.shape[:2], *survive.shape[1:]) / (1 - dropout)
    output = probabilities @ v
    return torch.where((place < g)[:, None], q, output) if causal else output


def gradients(output, leaves):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(output.shape, generator=generator).to(output.device, output.dtype)
    return torch.autograd.grad((output * weight).sum(), leaves, retain_graph=True)


def counts(keep, g):
    """Where the output means something: up to the last token of a row that is kept, which has its first in any case.

    Shape (batch, 1, tokens, 1).
    """
    taken = keep.flip(1).cumsum(1).flip(1) > 0
    taken[:, : g + 1] = True
    return taken[:, None, :, None]


def close(actual, expected, atol=1e-5):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), e.double(), rtol=0, atol=atol)


def against_dense(
    t, block, window, factor, g, width, keep_heads=HEADS, dropout=0.0, batch=2, masked=True, causal=False
):
    states, keep = inputs(t, g, width, batch=batch)
    keep = keep if masked else torch.ones_like(keep)
    sparse, sparse_keep = sparse_inputs(t, block, factor, width, keep_heads, batch=batch) if window else ([], None)
    leaves = [*states, *sparse]
    seed = torch.tensor([2**40 + 7], device=DEVICE)
    tokens = [x.transpose(1, 2) for x in states]
    parts = SparseKeys(sparse_keep, *sparse) if window else None
    output = fused_attention(
        *tokens,
        keep if masked else None,
        parts,
        layout(block, window, factor, g, causal),
        dropout=dropout,
        seed=seed if dropout else None,
    )
    assert output.shape == tokens[0].shape and output.transpose(1, 2).is_contiguous()

    wide = [x.detach().double().requires_grad_() for x in leaves]
    survive = None
    if dropout:
        keys = torch.arange(g + t, device=DEVICE)
        keys = torch.cat([keys, FIRST_SPARSE_ID + torch.arange(sparse[0].shape[2] if window else 0, device=DEVICE)])
        survive = dropout_keep_mask(seed, batch * HEADS, torch.arange(g + t, device=DEVICE), keys, dropout)
    expected = dense(
        *(x.transpose(1, 2) for x in wide[:3]),
        keep,
        (*wide[3:], sparse_keep) if window else None,
        g=g,
        block=block,
        window=window,
        factor=factor,
        survive=survive,
        dropout=dropout,
        causal=causal,
    )
    expected = expected * counts(keep, g)
    close([output], [expected])
    close(gradients(output, leaves), gradients(expected, wide))


# t, block, sparse block, factor, globals, head_dim; the first few, which differ most, in the fast run too
SHAPES = [
    (225, 32, 32, 4, 1, 16),
    (129, 64, 32, 2, 5, 16),
    (97, 32, 0, 2, 1, 80),
    (50, 32, 32, 2, 1, 16),
    (65, 32, 32, 2, 1, 16),
    (200, 32, 64, 4, 0, 16),
    (161, 32, 48, 1, 20, 16),
    (131, 32, 16, 8, 1, 32),
    (150, 64, 64, 2, 1, 64),
]
FEW = 4
FULL = pytest.mark.full


@runs
@tiles
@pytest.mark.parametrize("shape", [*SHAPES[:FEW], *[pytest.param(x, marks=FULL) for x in SHAPES[FEW:]]], ids=str)
def test_agrees_with_plain_attention(shape, wide, monkeypatch):
    monkeypatch.setattr(lsg_triton, "WIDE_TYPES", wide)
    against_dense(*shape, keep_heads=1 if shape[4] else HEADS)


# In these a tile of queries is a part of a block, or a tile of keys is more than one; lengths are about the edges.
CAUSAL_SHAPES = [(193, 64, 32, 2, 3, 16), (127, 32, 48, 1, 0, 16)]


@runs
@tiles
@pytest.mark.parametrize("shape", [*CAUSAL_SHAPES, *[pytest.param(x, marks=FULL) for x in SHAPES]], ids=str)
def test_causal_agrees_with_plain_attention(shape, wide, monkeypatch):
    monkeypatch.setattr(lsg_triton, "WIDE_TYPES", wide)
    against_dense(*shape, keep_heads=1 if shape[4] else HEADS, causal=True)


@runs
@pytest.mark.full
@tiles
@pytest.mark.parametrize(
    ("t", "g"),
    [(1, 1), (1, 3), (31, 0), (32, 1), (33, 3), (63, 1), (64, 0), (65, 3), (95, 3), (96, 1), (97, 0), (128, 1)],
)
def test_causal_agrees_about_the_edges_of_blocks(t, g, wide, monkeypatch):
    monkeypatch.setattr(lsg_triton, "WIDE_TYPES", wide)
    against_dense(t, 32, 32, 2, g, 16, dropout=0.1, causal=True)


@runs
@forms
def test_agrees_without_a_mask(causal):
    against_dense(97, 32, 32, 2, 1, 16, batch=1, masked=False, causal=causal)


@runs
@pytest.mark.parametrize(("factor", "causal"), [(2, False), pytest.param(4, False, marks=FULL), (2, True)])
def test_agrees_at_the_default_sizes(factor, causal, monkeypatch):
    monkeypatch.setattr(lsg_triton, "WIDE_TYPES", ())
    against_dense(290, 128, 128, factor, 1, 16, batch=1, dropout=0.1, causal=causal)


@runs
@forms
@settings(max_examples=20 if settings().max_examples > 50 else 3)
@given(
    data=st.data(),
    shape=st.sampled_from([(2, 32, 32, 2), (0, 64, 32, 4), (5, 32, 48, 1)]),
    wide=st.sampled_from([(), (torch.float32,)]),
)
def test_agrees_with_eager(data, causal, shape, wide):
    """A few shapes, each of which the compiler has to see; any length, mask and sparsifier."""
    fields = ("num_global_tokens", "block_size", "sparse_block_size", "sparsity_factor")
    options = dict(zip(fields, shape, strict=True), sparsity_type=data.draw(st.sampled_from(KINDS)), causal=causal)
    g, t = shape[0], data.draw(lengths(shape[1], most=4))
    states, _ = inputs(t, g, 16, batch=1)
    keep = data.draw(masks(g + t))[None].to(DEVICE)
    precise = [x.detach().double().requires_grad_() for x in states]
    expected, _ = lsg_attention(*(x.transpose(1, 2) for x in precise), keep, **options, kernel="eager")
    with mock.patch.object(lsg_triton, "WIDE_TYPES", wide):
        output, _ = lsg_attention(*(x.transpose(1, 2) for x in states), keep, **options, kernel="triton")
        output, expected = output * counts(keep, g), expected * counts(keep, g)
        close([output], [expected])
        close(gradients(output, states), gradients(expected, precise))


@runs
@pytest.mark.parametrize("kind", ["stride", "pooling"])
def test_rows_of_both_kinds_agree_with_eager(kind):
    """One of at most `full_attention_length` tokens, one longer."""
    t, g = 97, 2
    arguments = {"block_size": 32, "sparse_block_size": 32, "num_global_tokens": g, "sparsity_type": kind}
    arguments["full_attention_length"] = 80
    states, keep = inputs(t, g, 16)
    assert 64 < keep[0, g:].sum() < 80 < t
    wide = [x.detach().double().requires_grad_() for x in states]
    output, _ = lsg_attention(*(x.transpose(1, 2) for x in states), keep, **arguments, kernel="triton")
    expected, _ = lsg_attention(*(x.transpose(1, 2) for x in wide), keep, **arguments, kernel="eager")
    close([output * counts(keep, g)], [expected * counts(keep, g)])
    close(gradients(output * counts(keep, g), states), gradients(expected * counts(keep, g), wide))


@runs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_near(dtype):
    states, keep = inputs(70, 1, 32, dtype, batch=1)
    wide = [x.detach().double().requires_grad_() for x in states]
    sparse, sparse_keep = sparse_inputs(70, 32, 2, 32, dtype=dtype, batch=1)
    wide_sparse = [x.detach().double().requires_grad_() for x in sparse]
    output = fused_attention(
        *(x.transpose(1, 2) for x in states), keep, SparseKeys(sparse_keep, *sparse), layout(32, 32, 2, 1)
    )
    expected = dense(
        *(x.transpose(1, 2) for x in wide), keep, (*wide_sparse, sparse_keep), g=1, block=32, window=32, factor=2
    )
    expected = expected * counts(keep, 1)
    assert output.dtype == dtype
    tolerance = 16 * torch.finfo(dtype).eps
    close([output], [expected], tolerance)
    close(gradients(output, [*states, *sparse]), gradients(expected, [*wide, *wide_sparse]), 2 * tolerance)


@runs
@tiles
@pytest.mark.parametrize(
    ("shape", "causal"),
    [
        ((101, 32, 32, 2, 1, 16), False),
        ((130, 32, 0, 2, 20, 16), True),
        pytest.param((130, 32, 0, 2, 20, 16), False, marks=FULL),
        pytest.param((101, 32, 32, 2, 1, 16), True, marks=FULL),
    ],
    ids=str,
)
def test_dropout_agrees_with_its_mask(shape, causal, wide, monkeypatch):
    monkeypatch.setattr(lsg_triton, "WIDE_TYPES", wide)
    against_dense(*shape, dropout=0.3, causal=causal)


@runs
def test_dropout_follows_from_the_seed():
    states, _ = inputs(40, 1, 16, batch=1)
    tokens = [x.transpose(1, 2) for x in states]

    def run(seed=None):
        return fused_attention(*tokens, None, None, layout(32, 0, 0, 1), dropout=0.5, seed=seed)

    seeds = [torch.tensor([seed], device=DEVICE) for seed in (1, 1, 2)]
    first, again, other = (run(seed) for seed in seeds)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert all(torch.equal(a, b) for a, b in zip(gradients(first, states), gradients(again, states), strict=True))
    torch.manual_seed(5)
    drawn, next_drawn = run(), run()
    torch.manual_seed(5)
    assert torch.equal(drawn, run()) and not torch.equal(drawn, next_drawn)


def test_dropout_masks_look_random():
    places = torch.arange(500)
    masks = [dropout_keep_mask(torch.tensor([seed]), 2, places, places, 0.1).double() for seed in (0, 1, 2**33)]
    masks = [mask for pair in masks for mask in pair]
    for mask in masks:
        assert abs(mask.mean() - 0.9) < 0.003
        assert mask.mean(0).std() < 0.02 and mask.mean(1).std() < 0.02
        assert abs(((mask[1:] - 0.9) * (mask[:-1] - 0.9)).mean()) < 0.002
        assert abs(((mask[:, 1:] - 0.9) * (mask[:, :-1] - 0.9)).mean()) < 0.002
    for i in range(len(masks)):
        for j in range(i):
            assert abs(((masks[i] - 0.9) * (masks[j] - 0.9)).mean()) < 0.002


@runs
@forms
def test_queries_without_keys_give_zeros(causal):
    """But a causal global token its query."""
    states, keep = inputs(70, 1, 16)
    keep[1] = False
    output = fused_attention(*(x.transpose(1, 2) for x in states), keep, None, layout(32, 0, 0, 1, causal))
    assert not output[1, :, causal:].any() and output.isfinite().all()
    grads = gradients(output, states)
    assert all(grad.isfinite().all() and not grad[1, causal:].any() for grad in grads)


@runs
@tiles
@forms
def test_packed_rows_agree_with_rows(causal, wide, monkeypatch):
    """Of three blocks and a bit, of less than two blocks (full attention), of exactly four; and a gap at the end."""
    monkeypatch.setattr(lsg_triton, "WIDE_TYPES", wide)
    g, block, window, factor, lengths = 2, 32, 32, 2, (101, 40, 128)
    rows = [inputs(t, g, 16, batch=1)[0] for t in lengths]
    sparse = [sparse_inputs(t, block, factor, 16, batch=1) for t in lengths]
    keeps = [torch.rand(1, g + t, generator=torch.Generator().manual_seed(t)).to(DEVICE) < 0.9 for t in lengths]
    gap = torch.zeros(1, 3, HEADS, 16, device=DEVICE)
    states = [torch.cat([row[i].detach() for row in rows] + [gap], dim=1).requires_grad_() for i in range(3)]
    parts = [torch.cat([pair[0][i].detach() for pair in sparse], dim=2).requires_grad_() for i in range(2)]
    sparse_keep = torch.cat([pair[1] for pair in sparse], dim=2)
    keep = torch.cat([*keeps, torch.ones(1, 3, dtype=torch.bool, device=DEVICE)], dim=1)
    ends = torch.tensor([0, *lengths]).cumsum(0) + g * torch.arange(len(lengths) + 1)
    output = fused_attention(
        *(x.transpose(1, 2) for x in states),
        keep,
        SparseKeys(sparse_keep, *parts),
        layout(block, window, factor, g, causal),
        cu_seqlens=ends.to(DEVICE, torch.int32),
        max_seqlen=140,
    )
    grads = gradients(output, [*states, *parts])

    wide = [x.detach().double().requires_grad_() for x in (*states, *parts)]
    expected, sparse_start = [], 0
    for t, start, row_keep, (_, row_sparse_keep) in zip(lengths, ends.tolist(), keeps, sparse, strict=False):
        count = row_sparse_keep.shape[2]
        row_parts = [x[:, :, sparse_start : sparse_start + count] for x in wide[3:]]
        tokens = [x[:, start : start + g + t].transpose(1, 2) for x in wide[:3]]
        numbers = {"g": g, "block": block, "window": window, "factor": factor, "causal": causal}
        expected.append(dense(*tokens, row_keep, (*row_parts, row_sparse_keep), **numbers))
        sparse_start += count
    whole = torch.cat([*expected, gap.transpose(1, 2)], dim=2)
    close([output], [whole])
    close(grads, gradients(whole, wide))


def random_bias(reach, added, dtype=torch.float32, width=16):
    """Tensors, and what makes a bias of them: a table, or embeddings for queries ("c2p"), for keys ("p2c") or both.

    Distances of 16 and more share embeddings, as DeBERTa's do, or, if "far", those from one square to the next.
    """
    generator = torch.Generator().manual_seed(reach)
    if "table" in added:
        table = torch.randn(2 * reach + 1, HEADS, generator=generator).T  # as of an embedding of numbers
        return [table.to(DEVICE).requires_grad_()], lambda table: table
    distance = torch.arange(-reach, reach + 1)
    far = distance.sign() * distance.abs().sqrt().long() + 16
    rows = (far if "far" in added else distance.clamp(-16, 15) + 16).to(DEVICE)
    names = [name if name in added else None for name in ("c2p", "p2c")]
    tables = torch.randn(2, HEADS, 33, width, generator=generator).to(DEVICE, dtype)

    def bias(*tables):
        given = iter(tables)
        return RelativeEmbeddings(*(next(given) if name else None for name in names), rows)

    return [x.clone().requires_grad_() for x, name in zip(tables, names, strict=True) if name], bias


def bias_against_eager(
    t, g, block, kind, reach, added, *, causal=False, full=None, dtype=torch.float32, tolerance=1e-5
):
    options = {"block_size": block, "sparse_block_size": 32, "num_global_tokens": g, "sparsity_type": kind}
    options |= {"causal": causal, "full_attention_length": full}
    states, keep = inputs(t, g, 16, dtype)
    tables, bias = random_bias(reach, added, dtype)
    leaves = [*states, *tables]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    output, expected = (
        lsg_attention(*(x.transpose(1, 2) for x in x[:3]), keep, **options, kernel=kernel, bias=bias(*x[3:]))[0]
        for x, kernel in ((leaves, "triton"), (wide, "eager"))
    )
    output, expected = output * counts(keep, g), expected * counts(keep, g)
    close([output], [expected], tolerance)
    grads, exact = gradients(output, leaves), gradients(expected, wide)
    close(grads[:3], exact[:3], tolerance)
    close(grads[3:], exact[3:], 10 * tolerance)  # a sum over all texts


BOTH, FAR = "c2p p2c", "far c2p p2c"


# The reach is below the block, or far beyond, where sparse keys are at many distances.
@runs
@tiles
@pytest.mark.parametrize(
    "case",
    [
        (97, 2, 32, "stride", 20, "table"),
        (129, 1, 32, "norm", 70, FAR),
        *[
            pytest.param(x, marks=FULL)
            for x in [
                (97, 0, 32, "pooling", 60, FAR),
                (128, 3, 32, "bos_pooling", 33, "p2c"),
                (127, 1, 32, "block_stride", 100, "c2p"),
                (161, 2, 32, "lsh", 90, BOTH),
                (193, 1, 64, "stride", 100, BOTH),
                (65, 1, 32, "none", 1, FAR),
                (97, 1, 32, "norm", 0, "table"),
            ]
        ],
    ],
    ids=str,
)
def test_a_bias_by_distance_agrees_with_eager(case, wide, monkeypatch):
    monkeypatch.setattr(lsg_triton, "WIDE_TYPES", wide)
    bias_against_eager(*case)


@runs
@FULL
@tiles
@pytest.mark.parametrize("case", [(129, 2, 32, "stride", 20, BOTH), (161, 1, 32, "pooling", 70, "table")], ids=str)
@pytest.mark.parametrize("options", [{"causal": True}, {"full": 128}], ids=str)
def test_a_bias_by_distance_in_other_forms(case, options, wide, monkeypatch):
    monkeypatch.setattr(lsg_triton, "WIDE_TYPES", wide)
    bias_against_eager(*case, **options)


@runs
@FULL
@pytest.mark.parametrize(("dtype", "added"), [(torch.bfloat16, FAR), (torch.float16, "table")], ids=str)
def test_a_bias_by_distance_in_half_precision(dtype, added):
    bias_against_eager(97, 1, 32, "stride", 40, added, dtype=dtype, tolerance=32 * torch.finfo(dtype).eps)


@runs
@FULL
@pytest.mark.parametrize(("added", "kind"), [(BOTH, "pooling"), (FAR, "block_stride")])
def test_a_bias_by_distance_of_packed_rows(added, kind):
    """As of each row alone."""
    g, block, reach, lengths = 2, 32, 50, (101, 40)
    numbers = layout(block, 32, 2, g)
    states = torch.randn(3, 1, HEADS, sum(lengths) + 2 * g, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    tables, bias = random_bias(reach, added)
    leaves = [*(x.clone().requires_grad_() for x in states), *tables]
    keep = torch.ones(1, states.shape[3], dtype=torch.bool, device=DEVICE)
    starts, parts, expected = [0, lengths[0] + g, states.shape[3]], [], []
    for start, stop in itertools.pairwise(starts):
        row = [x[:, :, start:stop] for x in leaves[:3]]
        options = {"sparsity_type": kind, "in_place": True, "with_place": True}
        sparse = sparsify(*row, keep[:, None, start:stop], numbers, **options)
        expected.append(fused_attention(*row, None, sparse, numbers, bias=bias(*tables)))
        index = None if sparse.token_index is None else sparse.token_index + start
        parts.append(sparse._replace(token_index=index, place=sparse.place + start))
    joined = [torch.cat(x, dim=2) if x[0] is not None else None for x in zip(*parts, strict=True)]
    ends = torch.tensor(starts, device=DEVICE, dtype=torch.int32)
    options = {"cu_seqlens": ends, "max_seqlen": 110, "bias": bias(*tables)}
    output, whole = fused_attention(*leaves[:3], keep, SparseKeys(*joined), numbers, **options), torch.cat(expected, 2)
    close([output], [whole], 1e-6)
    close(gradients(output, leaves), gradients(whole, leaves))


@runs
@FULL
@pytest.mark.parametrize("added", ["table", "c2p", "p2c"])
def test_a_bias_by_distance_with_dropout_follows_from_differences(added):
    """Its gradient, and those of queries and keys, are the slope of the loss, under one seed."""
    states, keep = inputs(100, 1, 16, batch=1)
    tokens = [x.detach().transpose(1, 2) for x in states]
    numbers, seed = layout(32, 32, 2, 1), torch.tensor([3], device=DEVICE)
    sparse = sparsify(*tokens, keep[:, None], numbers, sparsity_type="stride", with_place=True)
    (table,), bias = random_bias(40, added)
    leaves = [*tokens[:2], table.detach()]
    generator = torch.Generator().manual_seed(1)
    steps = [0.01 * torch.randn(x.shape, generator=generator).to(DEVICE) for x in leaves]

    def loss(query, key, table):
        output = fused_attention(query, key, tokens[2], keep, sparse, numbers, 0.3, bias(table), seed=seed)
        return (output * counts(keep, 1)).square().sum(dtype=torch.float64)

    with torch.enable_grad():
        leaves = [x.requires_grad_() for x in leaves]
        grads, again = (torch.autograd.grad(loss(*leaves), leaves) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(grads, again, strict=True))
    slope = sum((grad.double() * step).sum() for grad, step in zip(grads, steps, strict=True))
    with torch.no_grad():
        ahead, behind = (loss(*(x + way * step for x, step in zip(leaves, steps, strict=True))) for way in (1, -1))
    torch.testing.assert_close(slope, (ahead - behind) / 2, rtol=1e-2, atol=1e-3)


@runs
@FULL
@pytest.mark.parametrize("version", ["", "V2"])
def test_deberta_agrees_with_eager(version):
    """And so does what its embeddings of distances learn."""
    from lsg_converter.modeling import modeling_lsg_deberta, modeling_lsg_deberta_v2

    module = modeling_lsg_deberta_v2 if version else modeling_lsg_deberta
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
    sizes |= {"vocab_size": 30, "max_position_embeddings": 130, "block_size": 32, "sparse_block_size": 32}
    kind = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "sparsity_type": "pooling"}
    kind |= {"max_relative_positions": 40, **({"position_buckets": 8, "share_att_key": True} if version else {})}
    config = getattr(module, f"LSGDeberta{version}Config")(**sizes, **kind)
    torch.manual_seed(0)
    model = getattr(module, f"LSGDeberta{version}Model")(config).eval().to(DEVICE)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    tokens, results = torch.randint(1, 30, (1, 130), device=DEVICE), []
    for kernel in ("triton", "portable"):
        model.config.attention_kernel = kernel
        output = model(tokens).last_hidden_state
        learned = [parameter for name, parameter in model.named_parameters() if "rel_embeddings" in name]
        results.append([output, *gradients(output, learned)])
        assert len(learned) == 1 and learned[0].any()
    close(*results, atol=1e-3)


@runs
@pytest.mark.full
@pytest.mark.parametrize("packed", [False, True])
def test_chosen_tokens_are_read_where_they_lie(packed, monkeypatch):
    """As if they had been gathered before."""
    monkeypatch.setattr(lsg_triton, "WIDE_TYPES", ())
    g, t, batch, factor = 2, 101, 2, 4
    states, keep = inputs(t, g, 16, batch=batch)
    rows = torch.arange(batch, device=DEVICE)[:, None, None] * (g + t)
    order = torch.rand(batch, HEADS, 128, generator=torch.Generator().manual_seed(0)).argsort(-1)[..., : 128 // factor]
    order = order.to(DEVICE)
    sparse_keep = order < t
    index = rows + g + order.clamp(max=t - 1)
    options = {"dropout": 0.2, "seed": torch.tensor([3], device=DEVICE)}
    tokens = [x.transpose(1, 2) for x in states]
    if packed:
        tokens = [x.flatten(0, 1)[None].transpose(1, 2) for x in states]
        keep, index, sparse_keep = (torch.cat(x.split(1), dim=-1) for x in (keep, index, sparse_keep))
        ends = torch.arange(batch + 1, device=DEVICE, dtype=torch.int32) * (g + t)
        options |= {"cu_seqlens": ends, "max_seqlen": g + t}
    gathered = [take_rows(x, flat_rows(index)) for x in tokens[1:]]
    numbers = layout(32, 48, factor, g)
    output = fused_attention(*tokens, keep, SparseKeys(sparse_keep, token_index=index), numbers, **options)
    expected = fused_attention(*tokens, keep, SparseKeys(sparse_keep, *gathered), numbers, **options)
    close([output], [expected], 1e-6)
    close(gradients(output, states), gradients(expected, states))


@runs
@pytest.mark.full
def test_compiles_into_one_graph():
    states, keep = inputs(70, 1, 16, batch=1)
    sparse, sparse_keep = sparse_inputs(70, 32, 2, 16, batch=1)

    place = torch.arange(len(sparse_keep[0, 0]), device=DEVICE).expand(1, 1, -1) * 2 + 1
    tables, bias = random_bias(20, BOTH)

    def attend(query, key, value, sparse_key, sparse_value, *others):
        *tables, dropout = others
        tokens = (x.transpose(1, 2) for x in (query, key, value))
        sparse = SparseKeys(sparse_keep, sparse_key, sparse_value, place=place)
        return fused_attention(*tokens, keep, sparse, layout(32, 32, 2, 1), dropout, bias(*tables))

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    leaves = [*states, *sparse, *tables]
    expected, actual = (call(*leaves, 0.0) for call in (attend, compiled))
    assert torch.equal(actual, expected) and actual.stride() == expected.stride()
    assert all(torch.equal(*pair) for pair in zip(*(gradients(x, leaves) for x in (actual, expected)), strict=True))
    assert compiled(*leaves, 0.5).isfinite().all()


@runs
@FULL
def test_copies_of_the_file_live_side_by_side():
    """As when several checkpoints are loaded, or one of them twice."""
    states, keep = inputs(30, 1, 16, batch=1)
    tokens = [x.transpose(1, 2) for x in states]
    outputs = [fused_attention(*tokens, keep, None, layout(32, 0, 0, 1))]
    modules = []
    for name in ("copy_one", "copy_two", "copy_one"):
        spec = importlib.util.spec_from_file_location(f"lsg_converter.modeling.{name}", lsg_triton.__file__)
        modules.append(importlib.util.module_from_spec(spec))
        spec.loader.exec_module(modules[-1])
    assert len({module._NAMESPACE for module in modules}) == 3  # A name defined again would be lost to the first.
    outputs += [module.fused_attention(*tokens, keep, None, layout(32, 0, 0, 1)) for module in modules]
    assert all(torch.equal(output, outputs[0]) for output in outputs)
    assert all(gradients(output, states)[0].any() for output in outputs)


@runs
@pytest.mark.parametrize("shape", [(32, 2, 32, 128), (24, 3, 24, 70), (16, 16, 32, 33)], ids=str)
def test_largest_norms(shape):
    chunk, factor, block, t = shape
    g, batch = 3, 2
    states, keep = inputs(t, g, 16)
    key = states[1].detach().transpose(1, 2)
    key[0, 0, g + 5] = key[0, 0, g + 6]  # of equal norms the first is chosen
    index, kept = choose_largest_norm(key, keep[:, None], g, block, chunk, factor)
    padded = pad_to_multiple(keep[:, None, g:], block, dim=2)
    places = largest_norm(key[:, :, g:], padded, LSGLayout(g, block, chunk, factor))
    assert index.shape == places.shape and torch.equal(kept, padded.expand(-1, HEADS, -1).gather(2, places))
    places = places + g + (g + t) * torch.arange(batch, device=DEVICE)[:, None, None]
    assert torch.equal(index[kept], places[kept]) and index.min() >= 0 and index.max() < batch * (g + t)


@runs
@forms_in_full
def test_it_is_the_choice_where_a_trial_agrees(causal, monkeypatch):
    monkeypatch.setattr(attention, "cpu_kernel_serves", lambda query: False)
    query = torch.zeros(1, 2, 100, 16, device=DEVICE, requires_grad=True)

    def choose(dropout=0.0, bias=None):
        attention.try_triton.cache_clear()
        return attention.choose_kernel(query, "sdpa", layout(32, 32, 2, 1, causal), dropout, bias)

    state = (torch.cuda if NATIVE else torch).get_rng_state()
    with torch.inference_mode():
        assert choose(0.1) == "triton"
    assert torch.equal((torch.cuda if NATIVE else torch).get_rng_state(), state)
    with mock.patch.object(attention, "fused_attention", side_effect=RuntimeError("out of room")):
        assert choose() == "portable"
    tables, bias = random_bias(20, "table" if causal else BOTH)
    assert choose(bias=bias(*tables)) == "triton"
    with mock.patch.object(attention, "fused_attention", lambda query, *others: query):
        assert choose() == "portable"


@runs
def test_says_what_it_cannot_do():
    query = torch.zeros(1, 2, 100, 64, device=DEVICE)
    assert triton_serves(query, layout(32, 32, 2, 1)) is None
    assert "head_dim" in triton_serves(query[..., :48], layout(32, 32, 2, 1))
    assert "float64" in triton_serves(query.double(), layout(32, 32, 2, 1))
    assert "block_size" in triton_serves(query, layout(20, 32, 2, 1))
    assert "global" in triton_serves(query, layout(32, 32, 2, 513))
    assert triton_serves(query, layout(32, 32, 2, 1, causal=True)) is None
    with pytest.raises(ValueError, match="kernel: got 'triton', and it takes float32, bfloat16 and float16"):
        lsg_attention(*[query.double()] * 3, torch.ones(1, 100, dtype=torch.bool), kernel="triton")


@pytest.mark.skipif(INTERPRETED or NATIVE, reason="asks for a process that compiles, without a GPU")
def test_needs_a_gpu():
    assert "CUDA" in triton_serves(torch.zeros(1, 2, 100, 64), layout(32, 32, 2, 1))


class Target:
    """Stands in for the driver of a GPU that is not there."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 99  # so that what is compiled is not taken for a real one's

    def get_current_stream(self, device):
        return 0

    def is_active(self):
        return True


def compile_all(dtype, width, dropout=0.1, block=128, chosen=True, added=None, causal=False):
    """All kernels, compiled for sm_90 by the calls that would launch them; `added` is "table" or "embeddings"."""
    from triton.runtime.jit import JITFunction

    kernels = []

    def compile_only(self, *arguments, grid, warmup, run=JITFunction.run, **keywords):
        compiled = run(self, *arguments, grid=grid, warmup=True, **keywords)
        kind = keywords.get("KIND", "global" if keywords.get("GLOBAL") else "")
        kernels.append((f"{self.__name__} {kind}".strip(), compiled))

    states, keep = torch.zeros(3, 1025, 12, width, dtype=dtype), torch.ones(1, 1025, dtype=torch.bool)
    # A dimension of one may have any stride: Triton has an eye for 1.
    tokens = states.as_strided((3, 1, 12, 1025, width), (1025 * 12 * width, 1, width, 12 * width, 1)).unbind()
    index = torch.zeros(1, 512, 12, dtype=torch.int64).transpose(1, 2)
    parts, index = ((None, None), index) if chosen else ([x[:, :, :512] for x in tokens[:2]], None)
    arguments = (*tokens, keep, *parts, keep[:, None, :512], torch.ones(1, dtype=torch.int64), None, None, index)
    sizes = [1025, 1, block, block, 2, 0, causal]
    distances = 2 * LSGLayout(*sizes[1:]).reach
    tables = {
        None: (None, None),
        "table": (None, torch.zeros(12, distances)),
        "embeddings": torch.zeros(2, 12, distances, width, dtype=dtype).unbind(),
    }[added]
    place = None if added is None else torch.zeros(1, 12 if chosen else 1, 512, dtype=torch.int64)
    arguments = (*arguments, *tables, place, sizes, dropout)
    target = mock.patch.object(triton.runtime.driver, "_active", Target())
    with target, mock.patch.object(JITFunction, "run", compile_only):
        outputs = lsg_triton._attention(*arguments)
        lsg_triton._attention_backward(outputs[0], *outputs, *arguments)
        choose_largest_norm(tokens[0], keep[:, None], 1, 128, 128, 2)
    return kernels


@pytest.mark.full
@pytest.mark.skipif(INTERPRETED, reason="compiles")
@forms
@pytest.mark.parametrize(
    "case",
    [
        (torch.bfloat16, 64, 0.0),
        (torch.bfloat16, 64),
        (torch.float16, 128),
        (torch.bfloat16, 64, 0.1, 32),
        (torch.bfloat16, 64, 0.1, 128, False),
        (torch.bfloat16, 128, 0.1, 128, True, "table"),
        (torch.bfloat16, 64, 0.1, 128, False, "embeddings"),
    ],
    ids=str,
)
def test_compiled_for_sm_90_without_spills(case, causal, tmp_path):
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    kernels = compile_all(*case, causal=causal)
    assert len({name for name, _ in kernels}) == (8 if causal else 10)
    for number, (name, compiled) in enumerate(kernels):
        code = compiled.asm["ptx"]
        if name not in ("combine", "choose", "scan_mask"):
            assert "cp.async" in code, name
            small = "global" in name or 32 in case
            assert ("mma.sync" if small else "wgmma.mma_async") in code, name
        path = tmp_path / f"{number}.ptx"
        path.write_text(code)
        command = [ptxas, "-v", "-arch=sm_90a", path, "-o", path.with_suffix(".cubin")]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        print(name, *re.findall(r"Used \d+ registers|\d+ bytes spill stores", report), compiled.metadata.shared)
        assert re.findall(r"(\d+) bytes spill", report) == ["0", "0"], name
        assert compiled.metadata.shared < 113 * 1024, name  # so that two fit on a multiprocessor
