"""LSG attention on a GPU as fused Triton kernels: forward, backward, attention dropout, and packed rows.

No scores and no gathered windows are ever stored. What queries see is at most four ranges of keys: the globals, the
local blocks, and the sparse keys on the left and on the right; a kernel walks through them in one loop, tile by tile.
Gradients of queries are gathered by tiles of queries, those of keys by tiles of keys: every number is written once, so
that the result is the same bit by bit from run to run. Where few rows face all tokens (global queries, and the
gradients of global keys), programs share the tokens in chunks, and `_combine` merges their parts.

Softmax is computed with powers of two. A query's normalizer is the logarithm, to base two, of the sum of its
exponentials; it is infinite where a query has no key, which gives it probabilities of zero.
"""

import hashlib
import math
from typing import Any, NamedTuple

import torch


class _Absent:
    """Stands in for Triton where it is not installed, so that the kernels below can be defined."""

    def __getattr__(self, name: str) -> "_Absent":
        return self

    def __call__(self, function: Any) -> Any:
        return function


try:
    import triton  # type: ignore
    import triton.language as tl  # type: ignore
except ImportError:
    triton = tl = _Absent()


GLOBAL_CHUNK = 512  # tokens per program where global rows face all tokens; fixed, so that results are too
SPARSE_IDENTITY = 2**30  # added to the places of sparse keys, to tell them from tokens in the dropout's hash


class Strided(NamedTuple):
    """A tensor of shape (batch, heads, tokens[, head_dim]) as kernels take it: with its strides."""

    data: Any  # a tensor; in a kernel a pointer
    batch: int
    head: int
    token: int


class Keys(NamedTuple):
    """Keys, values and their mask."""

    key: Strided
    value: Strided
    keep: Strided


class Inputs(NamedTuple):
    """What every kernel reads. What is not there is not read, but has an address: that of something else.

    Rows lie where their number says, or, where they are packed, where the running sums of their lengths say. A
    probability survives the dropout where its 31 random bits reach `threshold`.
    """

    query: Strided
    tokens: Keys
    sparse: Keys
    length: int
    sparse_length: int
    cu_seqlens: torch.Tensor
    cu_sparse: torch.Tensor
    seed: torch.Tensor
    threshold: int
    survivor_scale: float


class Plan(NamedTuple):
    """What a kernel is compiled for."""

    head_dim: int
    padded_head_dim: int
    heads: int = 0
    num_global_tokens: int = 0
    block_size: int = 0
    sparse_block_size: int = 0
    sparsity_factor: int = 1
    scale: float = 1.0
    scale_log2e: float = 1.0
    masked: bool = False
    sparse: bool = False
    dropout: bool = False
    packed: bool = False
    precision: str = "ieee"
    chunk: int = 0
    query_tile: int = 0
    key_tile: int = 0


@triton.jit
def _place(inputs: Inputs, PLAN: tl.constexpr) -> tl.tensor:
    """The row and the head of this program, its first token and first sparse token, and how many of both there are."""
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    first, length = row * 0, inputs.length
    sparse_first, sparse_length = row * 0, inputs.sparse_length
    if PLAN.packed:
        first = tl.load(inputs.cu_seqlens + row).to(tl.int64)
        length = (tl.load(inputs.cu_seqlens + row + 1) - first).to(tl.int32)
        if PLAN.sparse:
            sparse_first = tl.load(inputs.cu_sparse + row).to(tl.int64)
            sparse_length = (tl.load(inputs.cu_sparse + row + 1) - sparse_first).to(tl.int32)
    return row, head, first, sparse_first, length, sparse_length


@triton.jit
def _base(tensor: Strided, row: tl.tensor, head: tl.tensor, first: tl.tensor) -> tl.tensor:
    return tensor.data + row * tensor.batch + head * tensor.head + first * tensor.token


@triton.jit
def _load_tile(
    base: tl.tensor, stride: tl.tensor, start: tl.tensor, end: tl.tensor, SIZE: tl.constexpr, PLAN: tl.constexpr
) -> tl.tensor:
    """Tokens `[start, start + SIZE)`, of shape (SIZE, padded_head_dim); zero from `end` on."""
    rows, columns = tl.arange(0, SIZE), tl.arange(0, PLAN.padded_head_dim)
    mask = (rows < end - start)[:, None]
    if PLAN.head_dim < PLAN.padded_head_dim:
        mask = mask & (columns < PLAN.head_dim)[None, :]
    pointers = base + start.to(tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _store_tile(
    tile: tl.tensor, target: Strided, base: tl.tensor, start: tl.tensor, end: tl.tensor, PLAN: tl.constexpr
) -> tl.tensor:
    rows, columns = tl.arange(0, tile.shape[0]), tl.arange(0, PLAN.padded_head_dim)
    mask = (rows < end - start)[:, None] & (columns < PLAN.head_dim)[None, :]
    pointers = base + start.to(tl.int64) * target.token + rows[:, None] * target.token + columns[None, :]
    tl.store(pointers, tile.to(target.data.dtype.element_ty), mask=mask)


@triton.jit
def _count(ranges: tl.tensor, SIZE: tl.constexpr) -> tl.tensor:
    """How many tiles of SIZE cover four ranges."""
    a, a_end, b, b_end, c, c_end, d, d_end = ranges
    return tl.cdiv(a_end - a, SIZE) + tl.cdiv(b_end - b, SIZE) + tl.cdiv(c_end - c, SIZE) + tl.cdiv(d_end - d, SIZE)


@triton.jit
def _tile(number: tl.tensor, ranges: tl.tensor, SIZE: tl.constexpr) -> tl.tensor:
    """Where a tile of four ranges begins, where its range ends, and the number of the range."""
    a, a_end, b, b_end, c, c_end, d, d_end = ranges
    in_b = number - tl.cdiv(a_end - a, SIZE)
    in_c = in_b - tl.cdiv(b_end - b, SIZE)
    in_d = in_c - tl.cdiv(c_end - c, SIZE)
    start = tl.where(in_b < 0, a + number * SIZE, b + in_b * SIZE)
    start = tl.where(in_c < 0, start, c + in_c * SIZE)
    start = tl.where(in_d < 0, start, d + in_d * SIZE)
    end = tl.where(in_c < 0, tl.where(in_b < 0, a_end, b_end), tl.where(in_d < 0, c_end, d_end))
    return start, end, (in_b >= 0).to(tl.int32) + (in_c >= 0).to(tl.int32) + (in_d >= 0).to(tl.int32)


@triton.jit
def _query_tile(length: tl.tensor, sparse_length: tl.tensor, GLOBAL: tl.constexpr, PLAN: tl.constexpr) -> tl.tensor:
    """The chunk of this program, where its queries begin and end, and the ranges of keys that they see.

    This is where it is said what a query sees; `_backward_keys` says the same from the side of the keys. A causal form
    would cut these ranges, and mask the scores of a block with itself.
    """
    G: tl.constexpr = PLAN.num_global_tokens
    B: tl.constexpr = PLAN.block_size
    S: tl.constexpr = PLAN.sparse_block_size
    step: tl.constexpr = B // PLAN.sparsity_factor
    zero = tl.program_id(0) * 0
    if GLOBAL:
        tiles: tl.constexpr = (G + PLAN.query_tile - 1) // PLAN.query_tile
        chunk = tl.program_id(0) // tiles
        start = (tl.program_id(0) % tiles) * PLAN.query_tile
        low = tl.minimum(chunk * PLAN.chunk, length)
        high = tl.minimum(low + PLAN.chunk, length)
        return chunk, start, zero + G, (low, high, zero, zero, zero, zero, zero, zero)
    else:
        start = tl.program_id(0) * PLAN.query_tile
        block = start // B
        low = G + tl.maximum(block - 1, 0) * B
        high = tl.minimum(G + (block + 2) * B, length)
        left, left_end, right, right_end = zero, zero, zero, zero
        if PLAN.sparse:
            left_end = tl.minimum(tl.maximum(block - 1, 0) * step, sparse_length)
            left = tl.maximum((block - 1) * step - S, 0)
            right = tl.minimum((block + 2) * step, sparse_length)
            right_end = tl.minimum((block + 2) * step + S, sparse_length)
        return zero, G + start, length, (zero, zero + G, low, high, left, left_end, right, right_end)


@triton.jit
def _key_tile(
    start: tl.tensor, end: tl.tensor, of_sparse: tl.tensor, inputs: Inputs, place: tl.tensor, PLAN: tl.constexpr
) -> tl.tensor:
    """Keys and values of a tile, what is added to their scores, and their identities for the dropout."""
    row, head, first, sparse_first = place
    tokens, sparse = inputs.tokens, inputs.sparse
    key, key_stride = _base(tokens.key, row, head, first), tokens.key.token
    value, value_stride = _base(tokens.value, row, head, first), tokens.value.token
    keep = _base(tokens.keep, row, head, first)
    places = start + tl.arange(0, PLAN.key_tile)
    kept = places < end
    read = kept
    identities = places
    if PLAN.sparse:
        # One loop over keys of both kinds, instead of one for each, keeps the loads ahead of the products throughout.
        key = tl.where(of_sparse, _base(sparse.key, row, head, sparse_first), key)
        key_stride = tl.where(of_sparse, sparse.key.token, key_stride)
        value = tl.where(of_sparse, _base(sparse.value, row, head, sparse_first), value)
        value_stride = tl.where(of_sparse, sparse.value.token, value_stride)
        keep = tl.where(of_sparse, _base(sparse.keep, row, head, sparse_first), keep)
        identities = places + tl.where(of_sparse, 1 << 30, 0)
        if not PLAN.masked:
            read = kept & of_sparse
    if PLAN.masked or PLAN.sparse:
        kept = kept & (tl.load(keep + places, mask=read, other=1) != 0)
    key_tile = _load_tile(key, key_stride, start, end, PLAN.key_tile, PLAN)
    value_tile = _load_tile(value, value_stride, start, end, PLAN.key_tile, PLAN)
    return key_tile, value_tile, tl.where(kept, 0.0, float("-inf")), identities


@triton.jit
def _mix(state: tl.tensor, value: tl.tensor) -> tl.tensor:
    """Hash `value` into `state`, 32 bits each."""
    bits = (state ^ value) + 0x9E3779B9
    bits = (bits ^ (bits >> 16)) * 0x45D9F3B
    bits = (bits ^ (bits >> 16)) * 0x45D9F3B
    return bits ^ (bits >> 16)


@triton.jit
def _query_bits(seed: tl.tensor, row: tl.tensor, head: tl.tensor, queries: tl.tensor, HEADS: tl.constexpr) -> tl.tensor:
    seed = tl.load(seed)
    state = _mix(_mix(seed.to(tl.uint32), (seed >> 32).to(tl.uint32)), (row * HEADS + head).to(tl.uint32))
    return _mix(state, queries.to(tl.uint32))


@triton.jit
def _survives(query_bits: tl.tensor, identities: tl.tensor, threshold: tl.tensor) -> tl.tensor:
    """Which probabilities the dropout leaves; the shapes of queries and of keys are broadcast."""
    return (_mix(query_bits, identities.to(tl.uint32) * 0x9E3779B1) >> 1).to(tl.int32) >= threshold


@triton.jit
def _forward(inputs: Inputs, output: Strided, normalizer: Strided, GLOBAL: tl.constexpr, PLAN: tl.constexpr) -> None:
    """The output of a tile of queries: of text, or, if GLOBAL, of globals over one chunk of the tokens."""
    SIZE: tl.constexpr = PLAN.query_tile
    D: tl.constexpr = PLAN.padded_head_dim
    row, head, first, sparse_first, length, sparse_length = _place(inputs, PLAN)
    chunk, start, end, ranges = _query_tile(length, sparse_length, GLOBAL, PLAN)
    if (start >= end) | (chunk * PLAN.chunk >= length):
        return

    q = _load_tile(_base(inputs.query, row, head, first), inputs.query.token, start, end, SIZE, PLAN)
    places = start + tl.arange(0, SIZE)
    if PLAN.dropout:
        query_bits = _query_bits(inputs.seed, row, head, places, PLAN.heads)
    accumulated = tl.zeros((SIZE, D), tl.float32)
    largest = tl.full((SIZE,), float("-inf"), tl.float32)
    total = tl.zeros((SIZE,), tl.float32)
    for number in range(_count(ranges, PLAN.key_tile)):
        key_start, key_end, part = _tile(number, ranges, PLAN.key_tile)
        k, v, bias, identities = _key_tile(
            key_start, key_end, part >= 2, inputs, (row, head, first, sparse_first), PLAN
        )
        scores = tl.dot(q, tl.trans(k), input_precision=PLAN.precision) * PLAN.scale_log2e + bias[None, :]
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        # Without a key so far all is -inf, of which no difference may be taken.
        reference = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        probabilities = tl.exp2(scores - reference[:, None])
        correction = tl.exp2(largest - reference)
        total = total * correction + tl.sum(probabilities, 1)
        if PLAN.dropout:
            survive = _survives(query_bits[:, None], identities[None, :], inputs.threshold)
            probabilities = tl.where(survive, probabilities, 0.0)
        accumulated = accumulated * correction[:, None]
        accumulated = tl.dot(probabilities.to(v.dtype), v, accumulated, input_precision=PLAN.precision)
        largest = new_largest

    if PLAN.dropout:
        accumulated = accumulated * inputs.survivor_scale
    # A query without a key must weigh nothing when chunks are combined, and have no probabilities in the backward pass.
    none = float("-inf") if GLOBAL else float("inf")
    some_total = tl.where(total == 0.0, 1.0, total)
    normalizers = tl.where(total == 0.0, none, largest + tl.log2(some_total))
    if GLOBAL:
        first = chunk.to(tl.int64) * PLAN.num_global_tokens
    _store_tile(accumulated / some_total[:, None], output, _base(output, row, head, first), start, end, PLAN)
    tl.store(_base(normalizer, row, head, first) + places, normalizers, mask=places < end)


@triton.jit
def _combine(
    part: Strided,
    part_normalizer: Strided,
    inputs: Inputs,
    output: Strided,
    normalizer: Strided,
    WEIGHTED: tl.constexpr,
    PLAN: tl.constexpr,
) -> None:
    """Merge what the chunks gave for global tokens: the sum, or, if WEIGHTED, the mean by their normalizers."""
    SIZE: tl.constexpr = PLAN.query_tile
    D: tl.constexpr = PLAN.padded_head_dim
    row, head, first, _, length, _ = _place(inputs, PLAN)
    start = tl.program_id(0) * SIZE
    end = start * 0 + PLAN.num_global_tokens
    places = start + tl.arange(0, SIZE)
    accumulated = tl.zeros((SIZE, D), tl.float32)
    largest = tl.full((SIZE,), float("-inf"), tl.float32)
    total = tl.zeros((SIZE,), tl.float32)
    for chunk in range(tl.cdiv(length, PLAN.chunk)):
        offset = row * 0 + chunk * PLAN.num_global_tokens
        tile = _load_tile(_base(part, row, head, offset), part.token, start, end, SIZE, PLAN)
        if WEIGHTED:
            pointers = _base(part_normalizer, row, head, offset) + places
            normalizers = tl.load(pointers, mask=places < end, other=float("-inf"))
            new_largest = tl.maximum(largest, normalizers)
            reference = tl.where(new_largest == float("-inf"), 0.0, new_largest)
            weight, correction = tl.exp2(normalizers - reference), tl.exp2(largest - reference)
            accumulated = accumulated * correction[:, None] + tile * weight[:, None]
            total = total * correction + weight
            largest = new_largest
        else:
            accumulated += tile
    if WEIGHTED:
        some_total = tl.where(total == 0.0, 1.0, total)
        accumulated = accumulated / some_total[:, None]
        normalizers = tl.where(total == 0.0, float("inf"), largest + tl.log2(some_total))
        tl.store(_base(normalizer, row, head, first) + places, normalizers, mask=places < end)
    _store_tile(accumulated, output, _base(output, row, head, first), start, end, PLAN)


@triton.jit
def _backward_queries(
    inputs: Inputs,
    output: Strided,
    grad_output: Strided,
    normalizer: Strided,
    delta: Strided,
    grad_query: Strided,
    GLOBAL: tl.constexpr,
    PLAN: tl.constexpr,
) -> None:
    """The gradient of a tile of queries, cut as in `_forward`, and their delta = sum(output * grad_output)."""
    SIZE: tl.constexpr = PLAN.query_tile
    D: tl.constexpr = PLAN.padded_head_dim
    row, head, first, sparse_first, length, sparse_length = _place(inputs, PLAN)
    chunk, start, end, ranges = _query_tile(length, sparse_length, GLOBAL, PLAN)
    if (start >= end) | (chunk * PLAN.chunk >= length):
        return

    q = _load_tile(_base(inputs.query, row, head, first), inputs.query.token, start, end, SIZE, PLAN)
    o = _load_tile(_base(output, row, head, first), output.token, start, end, SIZE, PLAN)
    do = _load_tile(_base(grad_output, row, head, first), grad_output.token, start, end, SIZE, PLAN)
    places = start + tl.arange(0, SIZE)
    inside = places < end
    normalizers = tl.load(_base(normalizer, row, head, first) + places, mask=inside, other=float("inf"))
    deltas = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(_base(delta, row, head, first) + places, deltas, mask=inside & (chunk == 0))
    if PLAN.dropout:
        query_bits = _query_bits(inputs.seed, row, head, places, PLAN.heads)
    accumulated = tl.zeros((SIZE, D), tl.float32)
    for number in range(_count(ranges, PLAN.key_tile)):
        key_start, key_end, part = _tile(number, ranges, PLAN.key_tile)
        k, v, bias, identities = _key_tile(
            key_start, key_end, part >= 2, inputs, (row, head, first, sparse_first), PLAN
        )
        scores = tl.dot(q, tl.trans(k), input_precision=PLAN.precision) * PLAN.scale_log2e + bias[None, :]
        probabilities = tl.exp2(scores - normalizers[:, None])
        grads = tl.dot(do, tl.trans(v), input_precision=PLAN.precision)
        if PLAN.dropout:
            survive = _survives(query_bits[:, None], identities[None, :], inputs.threshold)
            grads = tl.where(survive, grads * inputs.survivor_scale, 0.0)
        grads = probabilities * (grads - deltas[:, None])
        accumulated = tl.dot(grads.to(k.dtype), k, accumulated, input_precision=PLAN.precision)
    if GLOBAL:
        first = chunk.to(tl.int64) * PLAN.num_global_tokens
    _store_tile(accumulated * PLAN.scale, grad_query, _base(grad_query, row, head, first), start, end, PLAN)


@triton.jit
def _backward_keys(
    inputs: Inputs,
    grad_output: Strided,
    normalizer: Strided,
    delta: Strided,
    grad_key: Strided,
    grad_value: Strided,
    KIND: tl.constexpr,
    PLAN: tl.constexpr,
) -> None:
    """The gradients of a tile of keys and values: "text", "sparse", or "global" over one chunk of the queries."""
    SIZE: tl.constexpr = PLAN.key_tile
    D: tl.constexpr = PLAN.padded_head_dim
    G: tl.constexpr = PLAN.num_global_tokens
    B: tl.constexpr = PLAN.block_size
    S: tl.constexpr = PLAN.sparse_block_size
    step: tl.constexpr = B // PLAN.sparsity_factor
    row, head, first, sparse_first, length, sparse_length = _place(inputs, PLAN)
    zero = tl.program_id(0) * 0
    chunk = zero
    start = tl.program_id(0) * SIZE
    end = length
    out_first = first
    if KIND == "text":
        block = start // B
        start += G
        low = G + tl.maximum(block - 1, 0) * B
        high = tl.minimum(G + (block + 2) * B, length)
        ranges = (zero, zero + G, low, high, zero, zero, zero, zero)
    elif KIND == "sparse":
        end = sparse_length
        out_first = sparse_first
        last = tl.minimum(start + SIZE, end) - 1
        # Sparse key s is on the left of the blocks [s // step + 2, (s + S) // step + 2), and on the right of the
        # blocks [(s - S) // step - 1, s // step - 1).
        left_high = tl.minimum(G + ((last + S) // step + 2) * B, length)
        left_low = tl.minimum(G + (start // step + 2) * B, left_high)
        right_high = tl.minimum(G + tl.maximum(last // step - 1, 0) * B, length)
        right_low = tl.minimum(G + tl.maximum(tl.maximum(start - S, 0) // step - 1, 0) * B, right_high)
        ranges = (zero, zero, left_low, left_high, right_low, right_high, zero, zero)
    else:
        tiles: tl.constexpr = (G + SIZE - 1) // SIZE
        chunk = tl.program_id(0) // tiles
        start = (tl.program_id(0) % tiles) * SIZE
        end = zero + G
        out_first = chunk.to(tl.int64) * G
        low = tl.minimum(chunk * PLAN.chunk, length)
        ranges = (low, tl.minimum(low + PLAN.chunk, length), zero, zero, zero, zero, zero, zero)
    if (start >= end) | (chunk * PLAN.chunk >= length):
        return

    of_sparse = zero < (1 if KIND == "sparse" else 0)
    k, v, bias, identities = _key_tile(start, end, of_sparse, inputs, (row, head, first, sparse_first), PLAN)
    places = start + tl.arange(0, SIZE)
    key_sum = tl.zeros((SIZE, D), tl.float32)
    value_sum = tl.zeros((SIZE, D), tl.float32)
    query_base, grad_base = _base(inputs.query, row, head, first), _base(grad_output, row, head, first)
    for number in range(_count(ranges, PLAN.query_tile)):
        query_start, query_end, part = _tile(number, ranges, PLAN.query_tile)
        q = _load_tile(query_base, inputs.query.token, query_start, query_end, PLAN.query_tile, PLAN)
        do = _load_tile(grad_base, grad_output.token, query_start, query_end, PLAN.query_tile, PLAN)
        queries = query_start + tl.arange(0, PLAN.query_tile)
        inside = queries < query_end
        normalizers = tl.load(_base(normalizer, row, head, first) + queries, mask=inside, other=float("inf"))
        deltas = tl.load(_base(delta, row, head, first) + queries, mask=inside, other=0.0)
        seen = bias
        if KIND == "sparse" and (step % SIZE != 0 or S % step != 0):
            # The keys of a tile are not all seen by the same blocks.
            query_block = (query_start - G) // B
            window_end = tl.where(part == 1, (query_block - 1) * step, (query_block + 2) * step + S)
            seen = tl.where((places < window_end) & (places >= window_end - S), bias, float("-inf"))
        scores = tl.dot(k, tl.trans(q), input_precision=PLAN.precision) * PLAN.scale_log2e + seen[:, None]
        probabilities = tl.exp2(scores - normalizers[None, :])
        grads = tl.dot(v, tl.trans(do), input_precision=PLAN.precision)
        survivors = probabilities
        if PLAN.dropout:
            query_bits = _query_bits(inputs.seed, row, head, queries, PLAN.heads)
            survive = _survives(query_bits[None, :], identities[:, None], inputs.threshold)
            survivors = tl.where(survive, probabilities * inputs.survivor_scale, 0.0)
            grads = tl.where(survive, grads * inputs.survivor_scale, 0.0)
        value_sum = tl.dot(survivors.to(do.dtype), do, value_sum, input_precision=PLAN.precision)
        grads = probabilities * (grads - deltas[None, :])
        key_sum = tl.dot(grads.to(q.dtype), q, key_sum, input_precision=PLAN.precision)
    _store_tile(key_sum * PLAN.scale, grad_key, _base(grad_key, row, head, out_first), start, end, PLAN)
    _store_tile(value_sum, grad_value, _base(grad_value, row, head, out_first), start, end, PLAN)


@triton.jit
def _choose(
    key: Strided,
    keep: Strided,
    index: tl.tensor,
    kept: tl.tensor,
    length: tl.tensor,
    per_head: tl.tensor,
    CHUNK: tl.constexpr,
    PADDED: tl.constexpr,
    CHOSEN: tl.constexpr,
    PLAN: tl.constexpr,
) -> None:
    """The places of the largest norms of one chunk, in ascending order."""
    chunk, head, row = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    within = tl.arange(0, PADDED)
    places = chunk * CHUNK + within
    end = tl.minimum(chunk * CHUNK + CHUNK, length)
    tile = _load_tile(_base(key, row, head, row * 0), key.token, chunk * CHUNK, end, PADDED, PLAN).to(tl.float32)
    real = tl.load(_base(keep, row, head, row * 0) + places, mask=places < end, other=0) != 0
    norm = tl.where(real, tl.sum(tile * tile, 1), tl.where(within < CHUNK, -1.0, -2.0))
    larger = (norm[None, :] > norm[:, None]) | ((norm[None, :] == norm[:, None]) & (within[None, :] < within[:, None]))
    chosen = tl.sum(larger.to(tl.int32), 1) < CHOSEN
    target = (row * tl.num_programs(1) + head) * per_head + chunk * CHOSEN + tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(index + target, tl.minimum(places, length - 1).to(tl.int64), mask=chosen)
    tl.store(kept + target, real.to(tl.int8), mask=chosen)


def choose_largest_norm(
    key: torch.Tensor, keep: torch.Tensor, chunk_size: int, factor: int, padded_length: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `1 / factor` of the keys of each chunk with the largest norm; of equal ones the first, masked ones last.

    Args:
        key: shape (batch, heads, t, head_dim).
        keep: boolean, shape (batch, 1, t).
        chunk_size: at most `LARGEST_CHUNK`, above which this form no longer pays.
        padded_length: to which multiple of `chunk_size` the text is thought to be padded; by default the next one.

    Returns:
        Places in the text, ascending in each chunk, and whether they are kept: (batch, heads, padded_length / factor),
        int64 and boolean. What is chosen of the padding is not kept, and has the place of the last token.
    """
    batch, heads, length, head_dim = key.shape
    chunks = -(-(padded_length or length) // chunk_size)
    per_head = chunks * (chunk_size // factor)
    index = torch.empty(batch, heads, per_head, dtype=torch.int64, device=key.device)
    kept = torch.empty(batch, heads, per_head, dtype=torch.bool, device=key.device)
    key, mask = _token_major(key), keep.contiguous().view(torch.uint8)
    plan = Plan(head_dim, triton.next_power_of_2(head_dim))
    with torch.cuda.device_of(key):
        _choose[(chunks, heads, batch)](
            Strided(key, *key.stride()[:3]),
            Strided(mask, mask.stride(0), 0, 1),
            index,
            kept.view(torch.uint8),
            length,
            per_head,
            chunk_size,
            triton.next_power_of_2(chunk_size),
            chunk_size // factor,
            plan,
            num_warps=4 if chunk_size <= 128 else 8,
        )
    return index, kept


LARGEST_CHUNK = 256


def triton_serves(
    query: torch.Tensor, *, num_global_tokens: int, block_size: int, sparse_block_size: int, sparsity_factor: int
) -> str | None:
    """Why `fused_attention` cannot do what is asked, or None where it can."""
    if isinstance(triton, _Absent):
        return "Triton is not installed"
    if query.device.type != "cuda" and not _interpreted():
        return f"it runs on CUDA devices; got {query.device.type}"
    if query.device.type == "cuda" and torch.cuda.get_device_capability(query.device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or above"
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16; got {query.dtype}"
    if query.shape[-1] not in (16, 32, 64, 80, 96, 128):
        return f"it takes a head_dim of 16, 32, 64, 80, 96 or 128; got {query.shape[-1]}"
    if block_size % 32:
        return f"it takes a block_size that is a multiple of 32; got {block_size}"
    if not 0 <= num_global_tokens <= 512:
        return f"it takes 0 to 512 global tokens; got {num_global_tokens}"
    if sparse_block_size and sparsity_factor and block_size % sparsity_factor:
        return f"block_size must be a multiple of sparsity_factor; got {block_size} and {sparsity_factor}"
    return None


def fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keep: torch.Tensor | None,
    sparse: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    *,
    num_global_tokens: int,
    block_size: int,
    sparse_block_size: int,
    sparsity_factor: int,
    dropout: float = 0.0,
    seed: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    cu_sparse: torch.Tensor | None = None,
) -> torch.Tensor:
    """LSG attention, scores scaled by `1 / sqrt(head_dim)`; differentiable in queries, keys, values and sparse ones.

    Args:
        query, key, value: shape (batch, heads, g + t, head_dim), of any strides: `g = num_global_tokens` globals, then
            `t` text tokens, any number of them. A text of at most two blocks gets ordinary full attention.
        keep: boolean, shape (batch, g + t), True where a token may be attended to; None where all may.
        sparse: the sparse keys, values and their mask, which is boolean, of shapes (batch, heads, s, head_dim) and
            (batch, 1 or heads, s), with `s = ceil(t / block_size) * block_size / sparsity_factor`; or None.
        dropout: the probability with which a probability is dropped.
        seed: int64, shape (1,), on the device, from which the dropout follows; drawn where it is None.
        cu_seqlens: int32, shape (rows + 1,), on the device, for packed rows: `batch` is 1, and row `r`, its globals
            followed by its text, is the tokens `[cu_seqlens[r], cu_seqlens[r + 1])`.
        max_seqlen: for packed rows, a bound of `g + t` over them.
        cu_sparse: int32, shape (rows + 1,): the sparse tokens `[cu_sparse[r], cu_sparse[r + 1])` are those of the
            packed row `r`. By default rows have as many as `s` above, one row's after the other's.

    Returns:
        The shape of `query`, token-major in memory: (batch, g + t, heads, head_dim). Zero where a query has no key.
    """
    if dropout > 0.0 and seed is None:
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=query.device)
    if not (sparse_block_size and sparsity_factor):
        sparse = None
    if cu_seqlens is not None and max_seqlen is None:
        raise ValueError("cu_seqlens needs max_seqlen, a bound of the lengths of its rows")
    if cu_seqlens is not None and sparse is not None and cu_sparse is None:
        blocks = (cu_seqlens.diff() - num_global_tokens + block_size - 1) // block_size
        cu_sparse = torch.zeros_like(cu_seqlens)
        cu_sparse[1:] = (blocks * (block_size // sparsity_factor)).cumsum(0)
    sparse_key, sparse_value, sparse_keep = sparse if sparse is not None else (None, None, None)
    states = (query, key, value, keep, sparse_key, sparse_value, sparse_keep)
    sizes = [
        query.shape[2] if max_seqlen is None else max_seqlen,
        num_global_tokens,
        block_size,
        sparse_block_size,
        sparsity_factor,
    ]
    return _attention_operator(*states, seed if dropout > 0.0 else None, cu_seqlens, cu_sparse, sizes, dropout)[0]


def dropout_keep_mask(
    seed: torch.Tensor, batch_heads: int, queries: torch.Tensor, keys: torch.Tensor, dropout: float
) -> torch.Tensor:
    """Which probabilities `fused_attention` keeps: boolean, shape (batch_heads, queries, keys).

    Args:
        seed: int64, shape (1,).
        queries: the places of queries among the `g + t` tokens of their row.
        keys: those of keys; sparse key `s` has the place `SPARSE_IDENTITY + s`.
    """

    def mix(state: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        bits = ((state ^ value) + 0x9E3779B9) & 0xFFFFFFFF
        for _ in range(2):
            bits = ((bits ^ (bits >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
        return bits ^ (bits >> 16)

    state = mix(seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    state = mix(state, torch.arange(batch_heads, device=seed.device))[:, None, None]
    state = mix(state, queries[:, None])
    return mix(state, (keys * 0x9E3779B1) & 0xFFFFFFFF) >> 1 >= _threshold(dropout)


def _threshold(dropout: float) -> int:
    return min(round(dropout * 2**31), 2**31 - 1)


def _interpreted() -> bool:
    return not isinstance(_forward, triton.runtime.JITFunction)


def _token_major(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` where it lies, if the numbers of a head are next to each other."""
    return tensor if tensor.stride(-1) == 1 else tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _precision() -> str:
    """How products of float32 are taken: exactly, unless torch's own may use TensorFloat-32."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


class _Call:
    """The kernels of one call of `_attention`, whose arguments these are, with what they share."""

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        keep: torch.Tensor | None,
        sparse_key: torch.Tensor | None,
        sparse_value: torch.Tensor | None,
        sparse_keep: torch.Tensor | None,
        seed: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
        cu_sparse: torch.Tensor | None,
        sizes: list[int],
        dropout: float,
    ) -> None:
        max_seqlen, self.g, block_size, sparse_block_size, sparsity_factor = sizes
        self.packed = cu_seqlens is not None
        self.heads, self.head_dim = query.shape[1], query.shape[3]
        self.num_rows = query.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        self.wide, self.large = query.dtype == torch.float32, self.head_dim > 64
        has_sparse = sparse_key is not None and sparse_key.shape[2] > 0

        any_keys = Keys(*[self.strided(_token_major(query))] * 3)
        sparse = any_keys
        if has_sparse and sparse_key is not None and sparse_value is not None and sparse_keep is not None:
            parts = [self.strided(_token_major(tensor)) for tensor in (sparse_key, sparse_value)]
            sparse = Keys(parts[0], parts[1], self.strided_mask(sparse_keep))
        parts = [self.strided(_token_major(tensor)) for tensor in (key, value)]
        self.inputs = Inputs(
            query=any_keys.key,
            tokens=Keys(parts[0], parts[1], sparse.keep if keep is None else self.strided_mask(keep[:, None])),
            sparse=sparse,
            length=query.shape[2],
            sparse_length=sparse_key.shape[2] if sparse_key is not None else 0,
            cu_seqlens=query if cu_seqlens is None else cu_seqlens,
            cu_sparse=query if cu_sparse is None else cu_sparse,
            seed=query if seed is None else seed,
            threshold=_threshold(dropout),
            survivor_scale=1 / (1 - dropout) if dropout < 1.0 else 0.0,
        )
        self.plan = Plan(
            self.head_dim,
            triton.next_power_of_2(self.head_dim),
            heads=self.heads,
            num_global_tokens=self.g,
            block_size=block_size,
            sparse_block_size=sparse_block_size if has_sparse else 0,
            sparsity_factor=sparsity_factor if has_sparse else 1,
            scale=self.head_dim**-0.5,
            scale_log2e=self.head_dim**-0.5 * math.log2(math.e),
            masked=keep is not None,
            sparse=has_sparse,
            dropout=dropout > 0.0,
            packed=self.packed,
            precision=_precision(),
            chunk=GLOBAL_CHUNK,
        )
        text = -(-max(max_seqlen - self.g, 0) // block_size) * block_size
        self.text, self.sparse_text = text, text // self.plan.sparsity_factor
        self.chunks = -(-max_seqlen // GLOBAL_CHUNK)
        self.largest_tile = block_size & -block_size  # tiles of text must lie in one block

    def strided(self, tensor: torch.Tensor) -> Strided:
        """`tensor` of shape (batch, heads, tokens[, head_dim]); packed rows are told apart by their tokens alone."""
        return Strided(tensor, 0 if self.packed else tensor.stride(0), tensor.stride(1), tensor.stride(2))

    def strided_mask(self, keep: torch.Tensor) -> Strided:
        """A mask of shape (batch, 1 or heads, tokens)."""
        mask = self.strided((keep if keep.stride(-1) == 1 else keep.contiguous()).view(torch.uint8))
        return mask if keep.shape[1] > 1 else mask._replace(head=0)

    def launch(
        self, kernel: Any, tokens: int, query_tile: int, key_tile: int, *arguments: Any, chunks: int = 1, **options: Any
    ) -> None:
        """Run a kernel for `tokens` of each row and head, at most with these tiles.

        The tiles are those with which the compiler, for sm_90, needs no more registers than there are.
        """
        if self.wide:
            query_tile, key_tile, options["num_warps"] = min(query_tile, 32), min(key_tile, 32), 8
        query_tile, key_tile = min(query_tile, self.largest_tile), min(key_tile, self.largest_tile)
        own = key_tile if kernel is _backward_keys else query_tile
        grid = (-(-tokens // own) * chunks, self.heads, self.num_rows)
        plan = self.plan._replace(query_tile=query_tile, key_tile=key_tile)
        if all(grid):
            kernel[grid](*arguments, PLAN=plan, **options)

    def global_rows(self) -> tuple[int, int]:
        return self.g, 16 if self.g <= 16 else 32

    def part(self, head_dim: int) -> Strided:
        """Room for what each chunk gives for the global tokens, of shape (rows, heads, chunks * g, head_dim)."""
        shape = (self.num_rows, self.heads, self.chunks * self.g, head_dim)
        part = torch.empty(shape, dtype=torch.float32, device=self.inputs.query.data.device)
        return Strided(part, *part.stride()[:3])

    def forward(self, output: Strided, normalizer: Strided) -> None:
        stages = 2 if self.large else 3
        arguments = (128, 64, self.inputs, output, normalizer)
        self.launch(_forward, self.text, *arguments, GLOBAL=False, num_warps=8, num_stages=stages)
        if self.g:
            g, tile = self.global_rows()
            part, weights = self.part(self.head_dim), self.part(1)
            arguments = (tile, 64, self.inputs, part, weights)
            self.launch(_forward, g, *arguments, chunks=self.chunks, GLOBAL=True, num_stages=stages)
            self.launch(_combine, g, tile, 16, part, weights, self.inputs, output, normalizer, WEIGHTED=True)

    def backward(self, states: list[Strided], grads: list[Strided]) -> None:
        """`states` are the output, its gradient, the normalizers, and room for the deltas."""
        output, *of_output = states
        grad_query, grad_key, grad_value, *sparse_grads = grads
        inputs, g, tile = self.inputs, *self.global_rows()
        settings = {"num_warps": 8 if self.large else 4, "num_stages": 2}
        # Queries first: they leave the deltas, which the keys need.
        arguments = (inputs, output, *of_output)
        self.launch(_backward_queries, self.text, 64, 64, *arguments, grad_query, GLOBAL=False, **settings)
        if g:
            part = self.part(self.head_dim)
            self.launch(_backward_queries, g, tile, 64, *arguments, part, chunks=self.chunks, GLOBAL=True, num_stages=2)
            self.launch(_combine, g, tile, 16, part, part, inputs, grad_query, of_output[1], WEIGHTED=False)
        query_tile = 32 if self.large or self.plan.dropout else 64
        of_keys = (inputs, *of_output)
        self.launch(_backward_keys, self.text, query_tile, 64, *of_keys, grad_key, grad_value, KIND="text", **settings)
        if sparse_grads:
            self.launch(
                _backward_keys, self.sparse_text, query_tile, 64, *of_keys, *sparse_grads, KIND="sparse", **settings
            )
        if g:
            parts = self.part(self.head_dim), self.part(self.head_dim)
            self.launch(_backward_keys, g, 64, tile, *of_keys, *parts, chunks=self.chunks, KIND="global", num_stages=2)
            for part, target in zip(parts, (grad_key, grad_value), strict=True):
                self.launch(_combine, g, tile, 16, part, part, inputs, target, of_output[1], WEIGHTED=False)


# Several copies of this file may be loaded in one process, from checkpoints: each has operators of its own.
_NAMESPACE = "lsg_" + hashlib.sha256(__name__.encode()).hexdigest()[:16]
_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? keep, Tensor? sparse_key, Tensor? sparse_value, "
    "Tensor? sparse_keep, Tensor? seed, Tensor? cu_seqlens, Tensor? cu_sparse, SymInt[] sizes, float dropout"
)
_CU_SEQLENS = 8


def _new_outputs(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    query = arguments[0]
    return _new_token_major(query, arguments), query.new_empty(query.shape[:3], dtype=torch.float32)


def _new_grads(
    grad_output: torch.Tensor, output: torch.Tensor, normalizer: torch.Tensor, *arguments: Any
) -> list[torch.Tensor]:
    """For queries, keys, values, and, if there are any, sparse keys and values."""
    return [_new_token_major(arguments[i], arguments) for i in (0, 1, 2, 4, 5) if arguments[i] is not None]


def _new_token_major(like: torch.Tensor, arguments: tuple[Any, ...]) -> torch.Tensor:
    batch, heads, tokens, head_dim = like.shape
    # Between and behind packed rows there may be gaps, which no kernel writes.
    new = like.new_empty if arguments[_CU_SEQLENS] is None else like.new_zeros
    return new((batch, tokens, heads, head_dim)).transpose(1, 2)


def _attention(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and the normalizers; `sizes` are max_seqlen, g, block_size, sparse_block_size and sparsity_factor."""
    outputs = _new_outputs(*arguments)
    call = _Call(*arguments)
    with torch.cuda.device_of(arguments[0]):
        call.forward(*(call.strided(tensor) for tensor in outputs))
    return outputs


def _attention_backward(
    grad_output: torch.Tensor, output: torch.Tensor, normalizer: torch.Tensor, *arguments: Any
) -> list[torch.Tensor]:
    grads = _new_grads(grad_output, output, normalizer, *arguments)
    call = _Call(*arguments)
    states = (output, _token_major(grad_output), normalizer, torch.empty_like(normalizer))
    with torch.cuda.device_of(output):
        call.backward([call.strided(state) for state in states], [call.strided(grad) for grad in grads])
    return grads


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, ctx.sizes, ctx.dropout = inputs
    ctx.save_for_backward(*output, *tensors)


def _differentiate(ctx: Any, grad_output: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grads = _attention_backward_operator(grad_output, *ctx.saved_tensors, ctx.sizes, ctx.dropout)
    sparse_grads = grads[3:] or [None, None]
    return (*grads[:3], None, *sparse_grads, *[None] * 6)


_attention_operator = torch.library.custom_op(
    f"{_NAMESPACE}::attention", _attention, mutates_args=(), schema=f"({_ARGUMENTS}) -> (Tensor, Tensor)"
)
_attention_backward_operator = torch.library.custom_op(
    f"{_NAMESPACE}::attention_backward",
    _attention_backward,
    mutates_args=(),
    schema=f"(Tensor grad_output, Tensor output, Tensor normalizer, {_ARGUMENTS}) -> Tensor[]",
)
_attention_operator.register_fake(_new_outputs)
_attention_backward_operator.register_fake(_new_grads)
_attention_operator.register_autograd(_differentiate, setup_context=_save)
