"""The Triton kernels behind `lsg_triton`: attention of queries to ranges of keys, and its gradients.

What queries see is at most four ranges of keys: the globals, the local blocks, and the sparse keys on the left and on
the right. A kernel walks through them in one loop, tile by tile; no scores and no gathered windows are ever stored.
Gradients of queries are gathered by tiles of queries, those of keys by tiles of keys: every number is written by one
program, so that results are the same bit by bit from run to run. (A token that is a sparse key too gets its share as
such later, by another kernel.) Where few rows face all tokens (global queries, and the gradients of global keys),
programs share the tokens in chunks, and `combine` merges their parts.

In the causal form the ranges are fewer and shorter, and where a tile of queries meets its own tokens, scores are cut
along the diagonal. There a global query sees nothing, and no kernel runs for it.

What counts in a loop is how many instructions it has: with all of softmax and dropout they take longer than the
products. Masks are looked at in tiles that they cut alone, and what is the same in every turn is brought before it.

What is added by distance is read from lines, each in the order of distances, as far as windows reach: every query has
one, or every key, or both; where it is a table all keys have the same. Gradients are written to lines of this form, one
of each query or key, which meets a distance once: a key that is a sparse one too has one line for both. But several
merged keys may stand at one place: there the line of a query is added to in any order.

Softmax is computed with powers of two. The `lse` of a query is the logarithm, to base two, of the sum of its
exponentials; it is infinite where a query has no key, which gives it probabilities of zero.
"""

from typing import Any, NamedTuple


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

is_installed = not isinstance(triton, _Absent)


FIRST_SPARSE_ID = 2**30  # added to the places of sparse keys, to tell them from tokens in the dropout's hash


class Strided(NamedTuple):
    """A tensor of shape (batch, heads, tokens[, head_dim]) as kernels take it: with its strides."""

    data: Any  # a tensor; in a kernel a pointer
    batch: int
    head: int
    token: int


class Keys(NamedTuple):
    """Keys, values, their mask, and which of its tiles are full (no key in them is masked): of text, or of sparse keys.

    Where sparse keys are tokens, `token_index` says which, counted through all rows. Where something is added by
    distance, `place` says likewise where they stand, each in the block of text that it is made of. `lines` are what
    is added for a key, as `query_lines` of `Inputs` for a query.
    """

    key: Strided
    value: Strided
    mask: Strided
    full_tiles: Strided
    token_index: Strided
    place: Strided
    lines: Strided


class Inputs(NamedTuple):
    """What every kernel reads. What is not there is not read, but has an address: that of something else.

    Rows lie where their number says, or, where they are packed, where the running sums of their lengths say. Of a row
    with a mask `seqused` tokens take part, those up to the last of text that is not masked. Dropout keeps a probability
    where its 31 highest random bits reach `threshold`. `query_lines`, (batch, heads, tokens, 2 * reach), are added to
    scores that are not scaled, from the distance `-reach` to `reach - 1`.
    """

    query: Strided
    tokens: Keys
    sparse: Keys
    length: int
    sparse_length: int
    cu_seqlens: Any
    cu_sparse: Any
    seqused: Any
    seed: Any
    query_lines: Strided
    threshold: int
    keep_scale: float


class Plan(NamedTuple):
    """What a kernel is compiled for."""

    head_dim: int
    padded_head_dim: int
    heads: int = 0
    num_global_tokens: int = 0
    block_size: int = 0
    sparse_block_size: int = 0
    sparsity_factor: int = 1
    causal: bool = False
    full_length: int = 0  # rows with a text of at most so many tokens get full attention
    scale: float = 1.0
    scale_log2e: float = 1.0
    masked: bool = False
    sparse: bool = False
    indexed: bool = False
    dropout: bool = False
    lines_of_queries: bool = False
    lines_of_keys: bool = False
    reach: int = 0  # of these
    packed: bool = False
    precision: str = "ieee"
    chunk: int = 0
    query_tile: int = 0
    key_tile: int = 0


@triton.jit
def _place(inputs: Inputs, PLAN: tl.constexpr) -> tl.tensor:
    """The row and the head of this program, its first token and first sparse token, and how many of both take part."""
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    first, length = row * 0, inputs.length
    sparse_first, sparse_length = row * 0, inputs.sparse_length
    if PLAN.packed:
        first = tl.load(inputs.cu_seqlens + row).to(tl.int64)
        length = (tl.load(inputs.cu_seqlens + row + 1) - first).to(tl.int32)
        if PLAN.sparse:
            sparse_first = tl.load(inputs.cu_sparse + row).to(tl.int64)
            sparse_length = (tl.load(inputs.cu_sparse + row + 1) - sparse_first).to(tl.int32)
    elif PLAN.masked:
        length = tl.load(inputs.seqused + row)
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
def _store_rows(
    tile: tl.tensor,
    target: Strided,
    base: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    row_end: tl.tensor,
    PLAN: tl.constexpr,
) -> tl.tensor:
    """As `_store_tile`, and zeros from `end` on to `row_end`: nobody else writes there."""
    inside = start + tl.arange(0, tile.shape[0]) < end
    _store_tile(tl.where(inside[:, None], tile, 0.0), target, base, start, tl.maximum(end, row_end), PLAN)


@triton.jit
def _add_rows(
    tile: tl.tensor, target: Strided, base: tl.tensor, places: tl.tensor, inside: tl.tensor, PLAN: tl.constexpr
) -> tl.tensor:
    """Add to the tokens at `places`, no two of which are the same."""
    columns = tl.arange(0, PLAN.padded_head_dim)
    mask = inside[:, None] & (columns < PLAN.head_dim)[None, :]
    pointers = base + places[:, None] * target.token + columns[None, :]
    total = tl.load(pointers, mask=mask, other=0.0).to(tl.float32) + tile
    tl.store(pointers, total.to(target.data.dtype.element_ty), mask=mask)


@triton.jit
def _num_tiles(ranges: tl.tensor, SIZE: tl.constexpr) -> tl.tensor:
    """How many tiles of SIZE cover four ranges."""
    a, a_end, b, b_end, c, c_end, d, d_end = ranges
    return tl.cdiv(a_end - a, SIZE) + tl.cdiv(b_end - b, SIZE) + tl.cdiv(c_end - c, SIZE) + tl.cdiv(d_end - d, SIZE)


@triton.jit
def _locate_tile(number: tl.tensor, ranges: tl.tensor, SIZE: tl.constexpr) -> tl.tensor:
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
def _chunk_ranges(number: tl.tensor, length: tl.tensor, PLAN: tl.constexpr) -> tl.tensor:
    """The ranges of a chunk of the text, the first of which has the globals too, but for causal ones."""
    zero = tl.program_id(0) * 0
    num_globals: tl.constexpr = 0 if PLAN.causal else PLAN.num_global_tokens
    low = tl.minimum(PLAN.num_global_tokens + number * PLAN.chunk, length)
    high = tl.minimum(low + PLAN.chunk, length)
    return zero, tl.where(number == 0, num_globals, 0), low, high, zero, zero, zero, zero


@triton.jit
def _num_chunks(length: tl.tensor, PLAN: tl.constexpr) -> tl.tensor:
    return tl.maximum(tl.cdiv(length - PLAN.num_global_tokens, PLAN.chunk), 1)


@triton.jit
def _query_ranges(length: tl.tensor, sparse_length: tl.tensor, GLOBAL: tl.constexpr, PLAN: tl.constexpr) -> tl.tensor:
    """The chunk of this program, where its queries begin and end, and the ranges of keys that they see.

    This is where it is said what a query sees; `backward_keys` says the same from the side of the keys. In the causal
    form `_scores` then cuts the diagonal.
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
        return chunk, start, zero + G, _chunk_ranges(chunk, length, PLAN)
    else:
        start = tl.program_id(0) * PLAN.query_tile
        block = start // B
        low = G + tl.maximum(block - 1, 0) * B
        high = tl.minimum(G + (start + PLAN.query_tile if PLAN.causal else (block + 2) * B), length)
        left, left_end, right, right_end = zero, zero, zero, zero
        if PLAN.sparse:
            left_end = tl.minimum(tl.maximum(block - 1, 0) * step, sparse_length)
            left = tl.maximum((block - 1) * step - S, 0)
            if not PLAN.causal:
                right = tl.minimum((block + 2) * step, sparse_length)
                right_end = tl.minimum((block + 2) * step + S, sparse_length)
        if PLAN.full_length > 0:
            full = length - G <= PLAN.full_length
            low, high = tl.where(full, G, low), tl.where(full, length, high)
            left_end, right_end = tl.where(full, left, left_end), tl.where(full, right, right_end)
        return zero, G + start, length, (zero, zero + G, low, high, left, left_end, right, right_end)


@triton.jit
def _load_key_tile(
    start: tl.tensor, end: tl.tensor, of_sparse: tl.tensor, inputs: Inputs, place: tl.tensor, PLAN: tl.constexpr
) -> tl.tensor:
    """Keys and values of a tile."""
    row, head, first, sparse_first = place
    tokens, sparse = inputs.tokens, inputs.sparse
    key, key_stride = _base(tokens.key, row, head, first), tokens.key.token
    value, value_stride = _base(tokens.value, row, head, first), tokens.value.token
    if PLAN.sparse:
        # One loop over keys of both kinds, instead of one for each, keeps the loads ahead of the products throughout.
        key = tl.where(of_sparse, _base(sparse.key, row, head, sparse_first), key)
        key_stride = tl.where(of_sparse, sparse.key.token, key_stride)
        value = tl.where(of_sparse, _base(sparse.value, row, head, sparse_first), value)
        value_stride = tl.where(of_sparse, sparse.value.token, value_stride)
    key_tile = _load_tile(key, key_stride, start, end, PLAN.key_tile, PLAN)
    value_tile = _load_tile(value, value_stride, start, end, PLAN.key_tile, PLAN)
    return key_tile, value_tile


@triton.jit
def _is_full(
    start: tl.tensor, end: tl.tensor, of_sparse: tl.tensor, inputs: Inputs, place: tl.tensor, PLAN: tl.constexpr
) -> tl.tensor:
    """Whether no key of a tile is masked, as nearly always: then nothing is spent on a mask."""
    row, head, _, _ = place
    full = start + PLAN.key_tile <= end
    if PLAN.masked or PLAN.sparse:
        flags, low = _base(inputs.tokens.full_tiles, row, head, row * 0), start - PLAN.num_global_tokens
        full = full & ((low >= 0) | of_sparse)
        read = full
        if PLAN.sparse:
            flags = tl.where(of_sparse, _base(inputs.sparse.full_tiles, row, head, row * 0), flags)
            low = tl.where(of_sparse, start, low)
            if not PLAN.masked:
                read = full & of_sparse
        # A tile of a range may lie across two of the mask.
        full = full & (tl.load(flags + low // PLAN.key_tile, mask=read, other=1) != 0)
        full = full & (tl.load(flags + (low + PLAN.key_tile - 1) // PLAN.key_tile, mask=read, other=1) != 0)
    return full


@triton.jit
def _load_mask(
    start: tl.tensor, end: tl.tensor, of_sparse: tl.tensor, inputs: Inputs, place: tl.tensor, PLAN: tl.constexpr
) -> tl.tensor:
    """Which keys of a tile may be attended to."""
    row, head, first, sparse_first = place
    places = start + tl.arange(0, PLAN.key_tile)
    kept = places < end
    if PLAN.masked or PLAN.sparse:
        mask, read = _base(inputs.tokens.mask, row, head, first), kept
        if PLAN.sparse:
            mask = tl.where(of_sparse, _base(inputs.sparse.mask, row, head, sparse_first), mask)
            if not PLAN.masked:
                read = kept & of_sparse
        kept = kept & (tl.load(mask + places, mask=read, other=1) != 0)
    return kept


@triton.jit
def _key_places(
    start: tl.tensor, end: tl.tensor, of_sparse: tl.tensor, inputs: Inputs, place: tl.tensor, PLAN: tl.constexpr
) -> tl.tensor:
    """Where in their row the keys of a tile stand; those that are not there, where the last does."""
    row, head, first, sparse_first = place
    places = tl.minimum(start + tl.arange(0, PLAN.key_tile), end - 1)
    if PLAN.sparse:
        pointers = _base(inputs.sparse.place, row, head, sparse_first) + places * inputs.sparse.place.token
        tokens = tl.load(pointers, mask=of_sparse, other=0)
        tokens -= first if PLAN.packed else row * inputs.length
        places = tl.where(of_sparse, tokens.to(tl.int32), places)
    return places


@triton.jit
def _columns(
    query_start: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    of_sparse: tl.tensor,
    inputs: Inputs,
    place: tl.tensor,
    BY_KEYS: tl.constexpr,
    PLAN: tl.constexpr,
) -> tl.tensor:
    """Where in lines the distance of each query from each key is: (queries, keys), or, if BY_KEYS, (keys, queries)."""
    queries = query_start + tl.arange(0, PLAN.query_tile)
    keys = _key_places(start, end, of_sparse, inputs, place, PLAN)
    distances = queries[None, :] - keys[:, None] if BY_KEYS else queries[:, None] - keys[None, :]
    # That of a key that a query does not see may be any.
    return tl.minimum(tl.maximum(distances, -PLAN.reach), PLAN.reach - 1) + PLAN.reach


@triton.jit
def _query_lines(
    lines: Strided, query_start: tl.tensor, inputs: Inputs, place: tl.tensor, PLAN: tl.constexpr
) -> tl.tensor:
    """Pointers to the lines of the queries of a tile; of those that are not there, to others."""
    row, head, first, _ = place
    numbers = tl.minimum(first + query_start + tl.arange(0, PLAN.query_tile), inputs.length - 1)
    return _base(lines, row, head, row * 0) + numbers * lines.token


@triton.jit
def _key_lines(
    lines: Strided,
    sparse_lines: Strided,
    start: tl.tensor,
    end: tl.tensor,
    of_sparse: tl.tensor,
    inputs: Inputs,
    place: tl.tensor,
    PLAN: tl.constexpr,
) -> tl.tensor:
    """Pointers to the lines of the keys of a tile; those of sparse keys that are tokens are the tokens'."""
    row, head, first, sparse_first = place
    base = _base(lines, row, head, first)
    if PLAN.sparse and not PLAN.indexed:
        numbers = tl.minimum(start + tl.arange(0, PLAN.key_tile), end - 1)
        base = tl.where(of_sparse, _base(sparse_lines, row, head, sparse_first), base)
    else:
        numbers = _key_places(start, end, of_sparse, inputs, place, PLAN)
    return base + numbers.to(tl.int64) * lines.token


@triton.jit
def _add_lines(
    scores: tl.tensor,
    query_start: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    of_sparse: tl.tensor,
    of_text: tl.tensor,
    inputs: Inputs,
    place: tl.tensor,
    BY_KEYS: tl.constexpr,
    PLAN: tl.constexpr,
) -> tl.tensor:
    """To scores that are not scaled add what the distance says, but to those of global tokens."""
    # No branch for these: with one the compiler needs more registers than there are.
    if PLAN.lines_of_queries or PLAN.lines_of_keys:
        columns = _columns(query_start, start, end, of_sparse, inputs, place, BY_KEYS, PLAN)
    if PLAN.lines_of_queries:
        queries = _query_lines(inputs.query_lines, query_start, inputs, place, PLAN)
        scores += tl.load((queries[None, :] if BY_KEYS else queries[:, None]) + columns, mask=of_text, other=0.0)
    if PLAN.lines_of_keys:
        keys = _key_lines(inputs.tokens.lines, inputs.sparse.lines, start, end, of_sparse, inputs, place, PLAN)
        scores += tl.load((keys[:, None] if BY_KEYS else keys[None, :]) + columns, mask=of_text, other=0.0)
    return scores


@triton.jit
def _scores(
    q: tl.tensor,
    query_start: tl.tensor,
    k: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    part: tl.tensor,
    inputs: Inputs,
    place: tl.tensor,
    PLAN: tl.constexpr,
) -> tl.tensor:
    """Of a tile of queries to a tile of keys, not yet scaled; -inf where a key may not be attended to."""
    of_sparse = part >= 2
    scores = tl.dot(q, tl.trans(k), input_precision=PLAN.precision)
    scores = _add_lines(scores, query_start, start, end, of_sparse, part > 0, inputs, place, BY_KEYS=False, PLAN=PLAN)
    full = _is_full(start, end, of_sparse, inputs, place, PLAN)
    if PLAN.causal:
        # Globals are in front of all text, and the number of a sparse key on the left is below that of any query.
        full = full & (start + PLAN.key_tile <= query_start + 1)
    if not full:
        kept = _load_mask(start, end, of_sparse, inputs, place, PLAN)[None, :]
        if PLAN.causal:
            queries = query_start + tl.arange(0, q.shape[0])
            kept = kept & (start + tl.arange(0, PLAN.key_tile)[None, :] <= queries[:, None])
        scores = tl.where(kept, scores, float("-inf"))
    return scores


@triton.jit
def _key_ids(start: tl.tensor, of_sparse: tl.tensor, PLAN: tl.constexpr) -> tl.tensor:
    """By which the dropout tells the keys of a tile."""
    return start + tl.arange(0, PLAN.key_tile) + tl.where(of_sparse, 1 << 30, 0)  # FIRST_SPARSE_ID


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
def _dropout_keeps(query_bits: tl.tensor, key_ids: tl.tensor, threshold: tl.tensor) -> tl.tensor:
    """Which probabilities the dropout leaves; the shapes of queries and of keys are broadcast."""
    # Of `_mix` only as much as the highest bits need: this is done for every probability.
    bits = (query_bits ^ (key_ids.to(tl.uint32) * 0x9E3779B1)) * 0x45D9F3B
    bits = (bits ^ (bits >> 16)) * 0x45D9F3B
    return bits >= threshold.to(tl.uint32) * 2


@triton.jit
def forward(inputs: Inputs, output: Strided, lse: Strided, GLOBAL: tl.constexpr, PLAN: tl.constexpr) -> None:
    """The output of a tile of queries: of text, or, if GLOBAL, of globals over one chunk of the tokens."""
    SIZE: tl.constexpr = PLAN.query_tile
    D: tl.constexpr = PLAN.padded_head_dim
    row, head, first, sparse_first, length, sparse_length = _place(inputs, PLAN)
    chunk, start, end, ranges = _query_ranges(length, sparse_length, GLOBAL, PLAN)
    row_end = end if GLOBAL or PLAN.packed else inputs.length
    if (start >= end) | (chunk >= _num_chunks(length, PLAN)):
        if not GLOBAL:
            nothing = tl.zeros((SIZE, D), tl.float32)
            _store_rows(nothing, output, _base(output, row, head, first), start, end, row_end, PLAN)
        return

    place = (row, head, first, sparse_first)
    q = _load_tile(_base(inputs.query, row, head, first), inputs.query.token, start, end, SIZE, PLAN)
    places = start + tl.arange(0, SIZE)
    if PLAN.dropout:
        query_bits = _query_bits(inputs.seed, row, head, places, PLAN.heads)
    accumulated = tl.zeros((SIZE, D), tl.float32)
    largest = tl.full((SIZE,), float("-inf"), tl.float32)
    total = tl.zeros((SIZE,), tl.float32)
    for number in range(_num_tiles(ranges, PLAN.key_tile)):
        key_start, key_end, part = _locate_tile(number, ranges, PLAN.key_tile)
        k, v = _load_key_tile(key_start, key_end, part >= 2, inputs, place, PLAN)
        scores = _scores(q, start, k, key_start, key_end, part, inputs, place, PLAN)
        new_largest = tl.maximum(largest, tl.max(scores, 1) * PLAN.scale_log2e)
        # Without a key so far all is -inf, of which no difference may be taken.
        reference = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        probabilities = tl.exp2(scores * PLAN.scale_log2e - reference[:, None])
        correction = tl.exp2(largest - reference)
        total = total * correction + tl.sum(probabilities, 1)
        if PLAN.dropout:
            key_ids = _key_ids(key_start, part >= 2, PLAN)
            survives = _dropout_keeps(query_bits[:, None], key_ids[None, :], inputs.threshold)
            probabilities = tl.where(survives, probabilities, 0.0)
        accumulated = accumulated * correction[:, None]
        accumulated = tl.dot(probabilities.to(v.dtype), v, accumulated, input_precision=PLAN.precision)
        largest = new_largest

    if PLAN.dropout:
        accumulated = accumulated * inputs.keep_scale
    # A query without a key must weigh nothing when chunks are combined, and have no probabilities in the backward pass.
    none = float("-inf") if GLOBAL else float("inf")
    some_total = tl.where(total == 0.0, 1.0, total)
    lses = tl.where(total == 0.0, none, largest + tl.log2(some_total))
    if GLOBAL:
        first = chunk.to(tl.int64) * PLAN.num_global_tokens
    _store_rows(accumulated / some_total[:, None], output, _base(output, row, head, first), start, end, row_end, PLAN)
    tl.store(_base(lse, row, head, first) + places, lses, mask=places < end)


@triton.jit
def combine(
    part: Strided,
    part_lse: Strided,
    inputs: Inputs,
    output: Strided,
    lse: Strided,
    WEIGHTED: tl.constexpr,
    PLAN: tl.constexpr,
) -> None:
    """Merge what the chunks gave for global tokens: the sum, or, if WEIGHTED, the mean by their `lse`."""
    SIZE: tl.constexpr = PLAN.query_tile
    D: tl.constexpr = PLAN.padded_head_dim
    row, head, first, _, length, _ = _place(inputs, PLAN)
    start = tl.program_id(0) * SIZE
    end = start * 0 + PLAN.num_global_tokens
    places = start + tl.arange(0, SIZE)
    accumulated = tl.zeros((SIZE, D), tl.float32)
    largest = tl.full((SIZE,), float("-inf"), tl.float32)
    total = tl.zeros((SIZE,), tl.float32)
    for chunk in range(_num_chunks(length, PLAN)):
        offset = row * 0 + chunk * PLAN.num_global_tokens
        tile = _load_tile(_base(part, row, head, offset), part.token, start, end, SIZE, PLAN)
        if WEIGHTED:
            pointers = _base(part_lse, row, head, offset) + places
            lses = tl.load(pointers, mask=places < end, other=float("-inf"))
            new_largest = tl.maximum(largest, lses)
            reference = tl.where(new_largest == float("-inf"), 0.0, new_largest)
            weight, correction = tl.exp2(lses - reference), tl.exp2(largest - reference)
            accumulated = accumulated * correction[:, None] + tile * weight[:, None]
            total = total * correction + weight
            largest = new_largest
        else:
            accumulated += tile
    if WEIGHTED:
        some_total = tl.where(total == 0.0, 1.0, total)
        accumulated = accumulated / some_total[:, None]
        lses = tl.where(total == 0.0, float("inf"), largest + tl.log2(some_total))
        tl.store(_base(lse, row, head, first) + places, lses, mask=places < end)
    _store_tile(accumulated, output, _base(output, row, head, first), start, end, PLAN)


@triton.jit
def backward_queries(
    inputs: Inputs,
    output: Strided,
    grad_output: Strided,
    lse: Strided,
    query_stats: Strided,
    grad_query: Strided,
    grad_lines: Strided,
    GLOBAL: tl.constexpr,
    PLAN: tl.constexpr,
) -> None:
    """The gradient of a tile of queries, cut as in `forward`, and their delta = sum(output * grad_output)."""
    SIZE: tl.constexpr = PLAN.query_tile
    D: tl.constexpr = PLAN.padded_head_dim
    row, head, first, sparse_first, length, sparse_length = _place(inputs, PLAN)
    chunk, start, end, ranges = _query_ranges(length, sparse_length, GLOBAL, PLAN)
    row_end = end if GLOBAL or PLAN.packed else inputs.length
    if (start >= end) | (chunk >= _num_chunks(length, PLAN)):
        if not GLOBAL:
            nothing = tl.zeros((SIZE, D), tl.float32)
            _store_rows(nothing, grad_query, _base(grad_query, row, head, first), start, end, row_end, PLAN)
        return

    place = (row, head, first, sparse_first)
    q = _load_tile(_base(inputs.query, row, head, first), inputs.query.token, start, end, SIZE, PLAN)
    o = _load_tile(_base(output, row, head, first), output.token, start, end, SIZE, PLAN)
    do = _load_tile(_base(grad_output, row, head, first), grad_output.token, start, end, SIZE, PLAN)
    places = start + tl.arange(0, SIZE)
    inside = places < end
    lses = tl.load(_base(lse, row, head, first) + places, mask=inside, other=float("inf"))
    deltas = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if PLAN.dropout:
        deltas = deltas / inputs.keep_scale  # by which the whole gradient is multiplied
    pointers, inside = _base(query_stats, row, head, first) + places * query_stats.token, inside & (chunk == 0)
    tl.store(pointers, lses, mask=inside)
    tl.store(pointers + 1, deltas, mask=inside)
    if PLAN.dropout:
        query_bits = _query_bits(inputs.seed, row, head, places, PLAN.heads)
        tl.store(pointers + 2, query_bits.to(tl.float32, bitcast=True), mask=inside)
    accumulated = tl.zeros((SIZE, D), tl.float32)
    for number in range(_num_tiles(ranges, PLAN.key_tile)):
        key_start, key_end, part = _locate_tile(number, ranges, PLAN.key_tile)
        k, v = _load_key_tile(key_start, key_end, part >= 2, inputs, place, PLAN)
        scores = _scores(q, start, k, key_start, key_end, part, inputs, place, PLAN)
        probabilities = tl.exp2(scores * PLAN.scale_log2e - lses[:, None])
        grads = tl.dot(do, tl.trans(v), input_precision=PLAN.precision)
        if PLAN.dropout:
            key_ids = _key_ids(key_start, part >= 2, PLAN)
            survives = _dropout_keeps(query_bits[:, None], key_ids[None, :], inputs.threshold)
            grads = tl.where(survives, grads, 0.0)
        grads = probabilities * (grads - deltas[:, None])
        accumulated = tl.dot(grads.to(k.dtype), k, accumulated, input_precision=PLAN.precision)
        if PLAN.lines_of_queries:
            lines = _query_lines(grad_lines, start, inputs, place, PLAN)[:, None]
            lines += _columns(start, key_start, key_end, part >= 2, inputs, place, False, PLAN)
            written = (part > 0) & (grads != 0.0)
            if PLAN.sparse and not PLAN.indexed:
                tl.atomic_add(lines, grads, mask=written & (part >= 2))
                written = written & (part == 1)
            tl.store(lines, grads, mask=written)
    accumulated = accumulated * PLAN.scale
    if PLAN.dropout:
        accumulated = accumulated * inputs.keep_scale
    if GLOBAL:
        first = chunk.to(tl.int64) * PLAN.num_global_tokens
    _store_rows(accumulated, grad_query, _base(grad_query, row, head, first), start, end, row_end, PLAN)


@triton.jit
def backward_keys(
    inputs: Inputs,
    grad_output: Strided,
    query_stats: Strided,
    grad_key: Strided,
    grad_value: Strided,
    grad_lines: Strided,
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
        low = start if PLAN.causal else G + tl.maximum(block - 1, 0) * B
        high = tl.minimum(G + (block + 2) * B, length)
        if PLAN.full_length > 0:
            full = length - G <= PLAN.full_length
            low, high = tl.where(full, G, low), tl.where(full, length, high)
        ranges = (zero, zero + (0 if PLAN.causal else G), low, high, zero, zero, zero, zero)
    elif KIND == "sparse":
        end = sparse_length
        out_first = sparse_first
        last = tl.minimum(start + SIZE, end) - 1
        # Sparse key s is on the left of the blocks [s // step + 2, (s + S) // step + 2), and on the right of the
        # blocks [(s - S) // step - 1, s // step - 1).
        left_high = tl.minimum(G + ((last + S) // step + 2) * B, length)
        left_low = tl.minimum(G + (start // step + 2) * B, left_high)
        right_low, right_high = zero, zero
        if not PLAN.causal:
            right_high = tl.minimum(G + tl.maximum(last // step - 1, 0) * B, length)
            right_low = tl.minimum(G + tl.maximum(tl.maximum(start - S, 0) // step - 1, 0) * B, right_high)
        if PLAN.full_length > 0:
            full = length - G <= PLAN.full_length
            left_low, right_low = tl.where(full, left_high, left_low), tl.where(full, right_high, right_low)
        ranges = (zero, zero, left_low, left_high, right_low, right_high, zero, zero)
    else:
        tiles: tl.constexpr = (G + SIZE - 1) // SIZE
        chunk = tl.program_id(0) // tiles
        start = (tl.program_id(0) % tiles) * SIZE
        end = zero + G
        out_first = chunk.to(tl.int64) * G
        ranges = _chunk_ranges(chunk, length, PLAN)
    row_end = end
    if KIND == "text" and not PLAN.packed:
        row_end = inputs.length
    if (start >= end) | (chunk >= _num_chunks(length, PLAN)):
        if KIND == "text":
            nothing = tl.zeros((SIZE, D), tl.float32)
            _store_rows(nothing, grad_key, _base(grad_key, row, head, out_first), start, end, row_end, PLAN)
            _store_rows(nothing, grad_value, _base(grad_value, row, head, out_first), start, end, row_end, PLAN)
        return

    of_sparse = zero < (1 if KIND == "sparse" else 0)
    place = (row, head, first, sparse_first)
    k, v = _load_key_tile(start, end, of_sparse, inputs, place, PLAN)
    kept = _load_mask(start, end, of_sparse, inputs, place, PLAN)
    if PLAN.dropout:
        key_ids = _key_ids(start, of_sparse, PLAN)
    places = start + tl.arange(0, SIZE)
    key_sum = tl.zeros((SIZE, D), tl.float32)
    value_sum = tl.zeros((SIZE, D), tl.float32)
    query_base, grad_base = _base(inputs.query, row, head, first), _base(grad_output, row, head, first)
    stats_base, lines = _base(query_stats, row, head, first), tl.arange(0, PLAN.query_tile)[:, None]
    columns = tl.arange(0, 4 if PLAN.dropout else 2)[None, :]
    if PLAN.lines_of_keys:
        key_lines = _key_lines(grad_lines, grad_lines, start, end, of_sparse, inputs, place, PLAN)
    for number in range(_num_tiles(ranges, PLAN.query_tile)):
        query_start, query_end, part = _locate_tile(number, ranges, PLAN.query_tile)
        q = _load_tile(query_base, inputs.query.token, query_start, query_end, PLAN.query_tile, PLAN)
        do = _load_tile(grad_base, grad_output.token, query_start, query_end, PLAN.query_tile, PLAN)
        # Where there is no query all is zero, of which nothing follows.
        pointers = stats_base + query_start.to(tl.int64) * query_stats.token + lines * query_stats.token + columns
        loaded = tl.load(pointers, mask=query_start + lines < query_end, other=0.0)
        if PLAN.dropout:
            evens, odds = tl.split(tl.reshape(loaded, (PLAN.query_tile, 2, 2)))
            lses, query_bits = tl.split(evens)
            deltas, _ = tl.split(odds)
        else:
            lses, deltas = tl.split(loaded)
        scores = tl.dot(k, tl.trans(q), input_precision=PLAN.precision)
        if PLAN.lines_of_queries or PLAN.lines_of_keys:
            # A query that is not there has zeros only, but a distance.
            lses = tl.where(query_start + tl.arange(0, PLAN.query_tile) < query_end, lses, float("inf"))
        scores = _add_lines(
            scores, query_start, start, end, of_sparse, part > 0, inputs, place, BY_KEYS=True, PLAN=PLAN
        )
        scores = scores * PLAN.scale_log2e - lses[None, :]
        if KIND == "sparse" and (step % SIZE or S % step):
            # The keys of a tile are not all seen by the same blocks.
            query_block = (query_start - G) // B
            window_end = tl.where(part == 1, (query_block - 1) * step, (query_block + 2) * step + S)
            seen = (places < window_end) & (places >= window_end - S)
            scores = tl.where(seen[:, None], scores, float("-inf"))
        if KIND == "text" and PLAN.causal:  # noqa: SIM102  what is compiled and what runs are not of one kind
            if query_start + 1 < start + SIZE:
                behind = places[:, None] > query_start + tl.arange(0, PLAN.query_tile)[None, :]
                scores = tl.where(behind, float("-inf"), scores)
        probabilities = tl.exp2(scores)
        grads = tl.dot(v, tl.trans(do), input_precision=PLAN.precision)
        survivors = probabilities
        if PLAN.dropout:
            query_bits = query_bits.to(tl.uint32, bitcast=True)
            survives = _dropout_keeps(query_bits[None, :], key_ids[:, None], inputs.threshold)
            # Not a plain zero: the compiler would round before it chooses, which takes more instructions.
            survivors = tl.where(survives, probabilities, inputs.keep_scale * 0.0)
            grads = tl.where(survives, grads, 0.0)
        value_sum = tl.dot(survivors.to(do.dtype), do, value_sum, input_precision=PLAN.precision)
        grads = probabilities * (grads - deltas[None, :])
        key_sum = tl.dot(grads.to(q.dtype), q, key_sum, input_precision=PLAN.precision)
        if PLAN.lines_of_keys:
            targets = key_lines[:, None] + _columns(query_start, start, end, of_sparse, inputs, place, True, PLAN)
            # A tile of queries may come twice, and see a key in one turn only: it is zero in the other.
            tl.store(targets, grads, mask=(part > 0) & (kept[:, None] & (grads != 0.0)))
    key_sum = key_sum * PLAN.scale
    if PLAN.dropout:
        key_sum, value_sum = key_sum * inputs.keep_scale, value_sum * inputs.keep_scale
    if KIND == "sparse" and PLAN.indexed:
        pointers = _base(inputs.sparse.token_index, row, head, sparse_first) + places * inputs.sparse.token_index.token
        # In the row of this program, which has its tokens from `first` on.
        tokens = tl.load(pointers, mask=kept, other=0) - (first if PLAN.packed else row * inputs.length)
        _add_rows(key_sum, grad_key, _base(grad_key, row, head, first), tokens, kept, PLAN)
        _add_rows(value_sum, grad_value, _base(grad_value, row, head, first), tokens, kept, PLAN)
    else:
        key_sum, value_sum = tl.where(kept[:, None], key_sum, 0.0), tl.where(kept[:, None], value_sum, 0.0)
        _store_rows(key_sum, grad_key, _base(grad_key, row, head, out_first), start, end, row_end, PLAN)
        _store_rows(value_sum, grad_value, _base(grad_value, row, head, out_first), start, end, row_end, PLAN)


@triton.jit
def scan_mask(inputs: Inputs, keys: Keys, seqused: tl.tensor, OF_SPARSE: tl.constexpr, PLAN: tl.constexpr) -> None:
    """Which tiles of a mask are full, and, of text, how many tokens each row has up to the last that is not masked."""
    SIZE: tl.constexpr = PLAN.chunk // PLAN.key_tile
    row, head, first, sparse_first, length, sparse_length = _place(inputs, PLAN)
    tiles = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    places = tiles[:, None] * PLAN.key_tile + tl.arange(0, PLAN.key_tile)[None, :]
    if OF_SPARSE:
        first, length = sparse_first, sparse_length
    else:
        first, length = first + PLAN.num_global_tokens, length - PLAN.num_global_tokens
    kept = tl.load(_base(keys.mask, row, head, first) + places, mask=places < length, other=1) != 0
    full = tl.min(kept.to(tl.int32), 1)
    tl.store(_base(keys.full_tiles, row, head, row * 0) + tiles, full.to(tl.int8), mask=tiles * PLAN.key_tile < length)
    if not OF_SPARSE and not PLAN.packed:
        last = tl.max(tl.max(tl.where(kept & (places < length), places + 1, 0), 1), 0)
        tl.atomic_max(seqused + row, last + PLAN.num_global_tokens)


@triton.jit
def choose(
    key: Strided,
    mask: Strided,
    index: Strided,
    index_mask: Strided,
    length: tl.tensor,
    CHUNK: tl.constexpr,
    PADDED: tl.constexpr,
    CHOSEN: tl.constexpr,
    PLAN: tl.constexpr,
) -> None:
    """Which tokens of one chunk of text have the largest norms, in ascending order, and the mask of these."""
    chunk, head, row = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    within = tl.arange(0, PADDED)
    start = PLAN.num_global_tokens + chunk * CHUNK
    end = tl.minimum(start + CHUNK, length)
    places = start + within
    tile = _load_tile(_base(key, row, head, row * 0), key.token, start, end, PADDED, PLAN).to(tl.float32)
    kept = tl.load(_base(mask, row, head, row * 0) + places, mask=places < end, other=0) != 0
    norm = tl.where(kept, tl.sum(tile * tile, 1), tl.where(within < CHUNK, -1.0, -2.0))
    larger = (norm[None, :] > norm[:, None]) | ((norm[None, :] == norm[:, None]) & (within[None, :] < within[:, None]))
    chosen = tl.sum(larger.to(tl.int32), 1) < CHOSEN
    target = chunk * CHOSEN + tl.cumsum(chosen.to(tl.int32), 0) - 1
    tokens = row * length + tl.minimum(places, length - 1)
    tl.store(_base(index, row, head, row * 0) + target * index.token, tokens, mask=chosen)
    tl.store(_base(index_mask, row, head, row * 0) + target, kept.to(tl.uint8), mask=chosen)
