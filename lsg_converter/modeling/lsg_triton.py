"""LSG attention on a GPU, fused: forward and backward, with dropout, packed rows, and as operators that compile."""

import math
from typing import Any, NamedTuple

import torch

from .lsg_bias import Bias, in_line
from .lsg_layout import LSGLayout, SparseKeys, flat_rows, operator_namespace, take_rows
from .lsg_triton_kernels import (
    Inputs,
    Keys,
    Plan,
    Strided,
    backward_keys,
    backward_queries,
    choose,
    combine,
    forward,
    is_installed,
    scan_mask,
    triton,
)


GLOBAL_CHUNK = 512  # tokens per program where global rows face all tokens; fixed, so that results are too
WIDE_TYPES = (torch.float32,)  # whose tiles are smaller
LARGEST_CHUNK = 256  # beyond this `choose_largest_norm` no longer pays


def _new_chosen(
    key: torch.Tensor, mask: torch.Tensor, num_global_tokens: int, block_size: int, chunk_size: int, factor: int
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, length, _ = key.shape
    chosen = -(-(length - num_global_tokens) // block_size) * block_size // factor
    index = key.new_empty((batch, chosen, heads), dtype=torch.int64).transpose(1, 2)  # as `flat_rows` lays it out
    return index, key.new_empty((batch, heads, chosen), dtype=torch.bool)


def _choose_largest_norm(
    key: torch.Tensor, mask: torch.Tensor, num_global_tokens: int, block_size: int, chunk_size: int, factor: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `1 / factor` of the keys of each chunk of text with the largest norm; of equal ones the first, masked last.

    Args:
        key: shape (batch, heads, g + t, head_dim).
        mask: boolean, shape (batch, 1, g + t).
        chunk_size: at most `LARGEST_CHUNK`; it divides `block_size`, to whole numbers of which the text is padded.

    Returns:
        Which tokens, ascending, counted through all rows, int64, and their mask, of shapes (batch, heads, T / factor).
        What pads the text is masked, and points to a token.
    """
    outputs = _new_chosen(key, mask, num_global_tokens, block_size, chunk_size, factor)
    batch, heads, chosen = outputs[0].shape
    key, mask = _token_major(key), mask.contiguous().view(torch.uint8)
    plan = Plan(key.shape[3], triton.next_power_of_2(key.shape[3]), num_global_tokens=num_global_tokens)
    with torch.cuda.device_of(key):
        choose[(chosen * factor // chunk_size, heads, batch)](
            Strided(key, *key.stride()[:3]),
            Strided(mask, mask.stride(0), 0, 1),
            Strided(outputs[0], *outputs[0].stride()),
            Strided(outputs[1].view(torch.uint8), *outputs[1].stride()),
            key.shape[2],
            chunk_size,
            triton.next_power_of_2(chunk_size),
            chunk_size // factor,
            plan,
            num_warps=4 if chunk_size <= 128 else 8,
        )
    return outputs


def triton_serves(query: torch.Tensor, layout: LSGLayout) -> str | None:
    """Why `fused_attention` cannot do what is asked, or None where it can."""
    if not is_installed:
        return "Triton is not installed"
    if query.device.type != "cuda" and not _interpreted():
        return f"it runs on CUDA devices; got {query.device.type}"
    if query.device.type == "cuda" and torch.cuda.get_device_capability(query.device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or above"
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it takes float32, bfloat16 and float16; got {query.dtype}"
    if query.shape[-1] not in (16, 32, 64, 80, 96, 128):
        return f"it takes a head_dim of 16, 32, 64, 80, 96 or 128; got {query.shape[-1]}"
    if layout.block_size % 32:
        return f"it takes a block_size that is a multiple of 32; got {layout.block_size}"
    if not 0 <= layout.num_global_tokens <= 512:
        return f"it takes 0 to 512 global tokens; got {layout.num_global_tokens}"
    if layout.block_size % layout.sparsity_factor:
        return f"block_size must be a multiple of sparsity_factor; got {layout.block_size} and {layout.sparsity_factor}"
    return None


def fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    sparse: SparseKeys | None,
    layout: LSGLayout,
    dropout: float = 0.0,
    bias: Bias | None = None,
    *,
    seed: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    cu_sparse: torch.Tensor | None = None,
) -> torch.Tensor:
    """LSG attention, scores scaled by `1 / sqrt(head_dim)`; differentiable in queries, keys, values, sparse ones, bias.

    Args:
        query, key, value: shape (batch, heads, g + t, head_dim), of any strides: `g = num_global_tokens` globals, then
            `t` text tokens, any number of them. A text of at most two blocks gets ordinary full attention, or, as
            `layout` says, causal attention.
        attention_mask: boolean, shape (batch, g + t), True where a token may be attended to; None where all may.
        sparse: the `layout.num_sparse_keys(t)` sparse keys, or None.
        dropout: the probability with which a probability is dropped.
        bias: added by distance; then `sparse` says the places of its keys, each of which lies in the block of text that
            the key is made of. Each pass takes, for a while, room for `2 * layout.reach` numbers for each token and
            head that is multiplied with embeddings, and for each sparse key that is no token; the backward pass for as
            many in float32, and for those of a table too.
        seed: int64, shape (1,), on the device, from which the dropout follows; drawn where it is None.
        cu_seqlens: int32, shape (rows + 1,), on the device, for packed rows: `batch` is 1, and row `r`, its globals
            followed by its text, is the tokens `[cu_seqlens[r], cu_seqlens[r + 1])`.
        max_seqlen: for packed rows, a bound of `g + t` over them.
        cu_sparse: int32, shape (rows + 1,): the sparse keys `[cu_sparse[r], cu_sparse[r + 1])` are those of the packed
            row `r`. By default rows have as many as `sparse` says above, one row's after the other's.

    Returns:
        The shape of `query`, token-major in memory: (batch, g + t, heads, head_dim). Zero where a query has no key, and
        behind the last token of a row that is not masked, where rows are not packed: those take no part (a text's first
        token always does). Of a causal global token it is the query.

    Raises:
        ValueError: where `cu_seqlens` comes without `max_seqlen`, or a bias without the places of sparse keys.
    """
    if dropout > 0.0 and seed is None:
        seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=query.device)
    if not layout.sparse_block_size:
        sparse = None
    if cu_seqlens is not None and max_seqlen is None:
        raise ValueError("cu_seqlens needs max_seqlen, a bound of the lengths of its rows")
    if cu_seqlens is not None and sparse is not None and cu_sparse is None:
        blocks = (cu_seqlens.diff() - layout.num_global_tokens + layout.block_size - 1) // layout.block_size
        cu_sparse = torch.zeros_like(cu_seqlens)
        cu_sparse[1:] = (blocks * layout.sparse_step).cumsum(0)
    if bias is not None and sparse is not None and sparse.place is None:
        raise ValueError("sparse: got no places of its keys, which a bias by distance needs; see `SparseKeys.place`")
    sparse_mask, sparse_key, sparse_value, index, place = sparse or (None, None, None, None, None)
    tensors = (query, key, value, attention_mask, sparse_key, sparse_value, sparse_mask)
    by_query, by_key = (None, None) if bias is None else in_line(bias, layout.reach)
    places = None if bias is None else place
    others = (seed if dropout > 0.0 else None, cu_seqlens, cu_sparse, index, by_query, by_key, places)
    sizes = [query.shape[2] if max_seqlen is None else max_seqlen, *layout]
    return _attention_operator(*tensors, *others, sizes, dropout)[0]


def dropout_keep_mask(
    seed: torch.Tensor, batch_heads: int, queries: torch.Tensor, keys: torch.Tensor, dropout: float
) -> torch.Tensor:
    """Which probabilities `fused_attention` keeps: boolean, shape (batch_heads, queries, keys).

    Args:
        seed: int64, shape (1,).
        queries: the places of queries among the `g + t` tokens of their row.
        keys: those of keys; sparse key `s` has the place `FIRST_SPARSE_ID + s`.
    """

    def multiply(bits: torch.Tensor, factor: int = 0x45D9F3B) -> torch.Tensor:
        return (bits * factor) & 0xFFFFFFFF

    def mix(state: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        bits = ((state ^ value) + 0x9E3779B9) & 0xFFFFFFFF
        for _ in range(2):
            bits = multiply(bits ^ (bits >> 16))
        return bits ^ (bits >> 16)

    state = mix(seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF)
    state = mix(state, torch.arange(batch_heads, device=seed.device))[:, None, None]
    bits = multiply(mix(state, queries[:, None]) ^ multiply(keys, 0x9E3779B1))
    return multiply(bits ^ (bits >> 16)) >> 1 >= _threshold(dropout)


def _threshold(dropout: float) -> int:
    return min(round(dropout * 2**31), 2**31 - 1)


def _interpreted() -> bool:
    return not isinstance(forward, triton.runtime.JITFunction)


def _token_major(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` where it lies, if the numbers of a head are next to each other."""
    return tensor if tensor.stride(-1) == 1 else tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _precision() -> str:
    """How products of float32 are taken: exactly, unless torch's own may use TensorFloat-32."""
    # Not `torch.get_float32_matmul_precision`, which raises where somebody uses the newer setting.
    return "tf32" if getattr(torch.backends.cuda.matmul, "fp32_precision", "ieee") == "tf32" else "ieee"


class _Scans(NamedTuple):
    """What `scan_mask` finds in the masks of a call: it is looked for once, and kept for the backward pass.

    Attributes:
        seqused: int32, shape (rows,): the tokens of each row up to the last that is not masked.
        full_tiles, sparse_full_tiles: int8, shape (rows, heads of the mask, tiles): whether no key of a tile is masked;
            of text, and of sparse keys.
    """

    seqused: torch.Tensor
    full_tiles: torch.Tensor
    sparse_full_tiles: torch.Tensor


def _key_tile(query: torch.Tensor) -> int:
    """The keys of a tile that queries go through."""
    return 32 if query.dtype in WIDE_TYPES else 64


def _new_scans(*arguments: Any) -> _Scans:
    query, mask, sparse_mask, cu_seqlens, sizes = (arguments[i] for i in (0, 3, 6, _CU_SEQLENS, _SIZES))
    max_seqlen, layout = sizes[0], LSGLayout(*sizes[1:])
    text_length = max_seqlen - layout.num_global_tokens
    rows = query.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1

    def full_tiles(heads: int, keys: int) -> torch.Tensor:
        # One tile more is read than there are.
        return query.new_empty((rows, heads, -(-keys // _key_tile(query)) + 1), dtype=torch.int8)

    return _Scans(
        # A row has its first token, also where that one is no key.
        query.new_full((0 if mask is None else rows,), layout.num_global_tokens + 1, dtype=torch.int32),
        full_tiles(0 if mask is None else 1, layout.num_blocks(text_length) * layout.block_size),
        full_tiles(0 if sparse_mask is None else sparse_mask.shape[1], layout.num_sparse_keys(text_length)),
    )


class _Lines(NamedTuple):
    """What is added by distance for each query, or for each key: products of states, (batch, heads, tokens, head_dim),
    with embeddings of distances, a table of shape (heads, distances, head_dim); or the same for all, a table of shape
    (heads, distances). Without a table nothing is, and the states have the address of what is not read.
    """

    states: torch.Tensor
    table: torch.Tensor | None

    def added(self) -> torch.Tensor:
        """To scores that are not scaled: (batch, heads, tokens, distances)."""
        if self.table is None:
            return self.states
        if self.table.dim() == 3:
            return self.states @ self.table.transpose(1, 2).to(self.states.dtype)
        table = self.table.float().contiguous() * self.states.shape[3] ** 0.5
        return table[None, :, None].expand(*self.states.shape[:3], -1)

    def new_grads(self) -> torch.Tensor:
        """Zeros, for the gradients that follow for scaled scores, of that shape."""
        if self.table is None:
            return self.states
        return self.states.new_zeros((*self.states.shape[:3], self.table.shape[1]), dtype=torch.float32)

    def add_grads(
        self, grads: torch.Tensor, scale: float, of_states: torch.Tensor, of_table: torch.Tensor | None
    ) -> None:
        """Add what follows of these, times `scale`, to the gradients of states and, in float32, of the table."""
        if self.table is None or of_table is None:
            return
        if self.table.dim() == 2:
            of_table += grads.sum((0, 2)) * scale
            return
        grads = (grads * (scale * self.states.shape[3] ** -0.5)).to(self.states.dtype)
        of_states += grads @ self.table.to(grads.dtype)
        of_table += (grads.transpose(2, 3) @ self.states).sum(0, dtype=torch.float32)


class _Call:
    """The kernels of one call of `_attention`, whose arguments these are, with what they share."""

    def __init__(
        self,
        scans: _Scans,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        sparse_key: torch.Tensor | None,
        sparse_value: torch.Tensor | None,
        sparse_mask: torch.Tensor | None,
        seed: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
        cu_sparse: torch.Tensor | None,
        index: torch.Tensor | None,
        by_query: torch.Tensor | None,
        by_key: torch.Tensor | None,
        sparse_place: torch.Tensor | None,
        sizes: list[Any],
        dropout: float,
    ) -> None:
        max_seqlen, layout = sizes[0], LSGLayout(*sizes[1:])
        self.packed, self.scans, self.g = cu_seqlens is not None, scans, layout.num_global_tokens
        self.adds = by_query is not None or by_key is not None  # something by distance
        self.heads, self.head_dim = query.shape[1], query.shape[3]
        self.num_rows = query.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        self.wide, self.large = query.dtype in WIDE_TYPES, self.head_dim > 64
        sparse_length = 0 if sparse_mask is None else sparse_mask.shape[2]

        any_keys = Keys(*[self.strided(_token_major(query))] * len(Keys._fields))
        # Of sparse keys that are tokens, those of the tokens.
        of_sparse = _Lines(query, None) if sparse_key is None else _Lines(sparse_key, by_key)
        self.lines = _Lines(query, by_query), _Lines(key, by_key), of_sparse
        query_lines, key_lines, sparse_lines = (self.strided(lines.added()) for lines in self.lines)
        sparse = any_keys._replace(lines=sparse_lines)
        if sparse_place is not None:
            sparse = sparse._replace(place=self.strided(sparse_place))
        if index is not None:
            rows = flat_rows(index)
            sparse_key, sparse_value = take_rows(key, rows), take_rows(value, rows)
            sparse = sparse._replace(token_index=self.strided(index))
        if sparse_key is not None and sparse_value is not None and sparse_mask is not None:
            parts = [self.strided(_token_major(tensor)) for tensor in (sparse_key, sparse_value)]
            sparse = sparse._replace(key=parts[0], value=parts[1], mask=self.strided_mask(sparse_mask))
            sparse = sparse._replace(full_tiles=self.strided_tiles(scans.sparse_full_tiles))
        parts = [self.strided(_token_major(tensor)) for tensor in (key, value)]
        tokens = sparse._replace(key=parts[0], value=parts[1], lines=key_lines)
        if mask is not None:
            full_tiles = self.strided_tiles(scans.full_tiles)
            tokens = tokens._replace(mask=self.strided_mask(mask[:, None]), full_tiles=full_tiles)
        self.inputs = Inputs(
            query=any_keys.key,
            tokens=tokens,
            sparse=sparse,
            length=query.shape[2],
            sparse_length=sparse_length,
            cu_seqlens=query if cu_seqlens is None else cu_seqlens,
            cu_sparse=query if cu_sparse is None else cu_sparse,
            seqused=query if mask is None else scans.seqused,
            seed=query if seed is None else seed,
            query_lines=query_lines,
            threshold=_threshold(dropout),
            keep_scale=1 / (1 - dropout) if dropout < 1.0 else 0.0,
        )
        self.plan = Plan(
            self.head_dim,
            triton.next_power_of_2(self.head_dim),
            heads=self.heads,
            num_global_tokens=self.g,
            block_size=layout.block_size,
            sparse_block_size=layout.sparse_block_size if sparse_length else 0,
            sparsity_factor=layout.sparsity_factor if sparse_length else 1,
            scale=self.head_dim**-0.5,
            scale_log2e=self.head_dim**-0.5 * math.log2(math.e),
            causal=bool(layout.causal),
            full_length=layout.full_attention_length if layout.mixes_full_attention else 0,
            masked=mask is not None,
            sparse=sparse_length > 0,
            indexed=index is not None,
            dropout=dropout > 0.0,
            lines_of_queries=by_query is not None,
            lines_of_keys=by_key is not None,
            reach=layout.reach if self.adds else 0,
            packed=self.packed,
            precision=_precision(),
            chunk=GLOBAL_CHUNK,
        )
        self.text = layout.num_blocks(max_seqlen - self.g) * layout.block_size
        self.sparse_text = self.text // self.plan.sparsity_factor
        self.chunks = max(-(-self.text // GLOBAL_CHUNK), 1)
        self.largest_tile = layout.block_size & -layout.block_size  # of what a program gives, which lies in one block
        self.key_tile = _key_tile(query)

    def scan(self) -> None:
        """Fill the scans."""
        plan = self.plan._replace(masked=False, key_tile=self.key_tile)

        def launch(keys: Keys, heads: int, tokens: int, result: torch.Tensor, of_sparse: bool) -> None:
            grid = (-(-tokens // plan.chunk), heads, self.num_rows)
            if all(grid):
                scan_mask[grid](self.inputs, keys, result, OF_SPARSE=of_sparse, PLAN=plan)

        sparse_full_tiles = self.scans.sparse_full_tiles
        if self.plan.sparse:
            launch(self.inputs.sparse, sparse_full_tiles.shape[1], self.sparse_text, sparse_full_tiles, True)
        if self.plan.masked:
            launch(self.inputs.tokens, 1, self.text, self.scans.seqused, False)

    def strided(self, tensor: torch.Tensor) -> Strided:
        """`tensor` of shape (batch, heads, tokens[, head_dim]); packed rows are told apart by their tokens alone."""
        # Along a dimension of one torch may have any stride; Triton, where it is 1, loses it.
        sizes = zip(tensor.shape[:3], tensor.stride()[:3], strict=True)
        batch, head, token = (0 if size == 1 else stride for size, stride in sizes)
        return Strided(tensor, 0 if self.packed else batch, head, token)

    def strided_mask(self, mask: torch.Tensor) -> Strided:
        """A mask of shape (batch, 1 or heads, tokens)."""
        return self.strided((mask if mask.stride(-1) == 1 else mask.contiguous()).view(torch.uint8))

    def strided_tiles(self, full_tiles: torch.Tensor) -> Strided:
        """What says which tiles are full, of shape (rows, 1 or heads, tiles)."""
        return Strided(full_tiles, full_tiles.stride(0), full_tiles.stride(1) if full_tiles.shape[1] > 1 else 0, 1)

    def launch(
        self, kernel: Any, tokens: int, tiles: tuple[int, int], *arguments: Any, chunks: int = 1, **options: Any
    ) -> None:
        """Run a kernel for `tokens` of each row and head, at most with these tiles of queries and of keys.

        The tiles are those with which the compiler, for sm_90, needs no more registers than there are.
        """
        query_tile, key_tile = tiles
        if self.wide:
            query_tile, key_tile, options["num_warps"] = min(query_tile, 32), min(key_tile, 32), 8
        if kernel is backward_keys:
            own = key_tile = min(key_tile, self.largest_tile)
        else:
            own = query_tile = min(query_tile, self.largest_tile)
        grid = (-(-tokens // own) * chunks, self.heads, self.num_rows)
        plan = self.plan._replace(query_tile=query_tile, key_tile=key_tile)
        if options.get("GLOBAL", True) and options.get("KIND", "global") == "global":
            plan = plan._replace(lines_of_queries=False, lines_of_keys=False, reach=0)
        if all(grid):
            kernel[grid](*arguments, PLAN=plan, **options)

    def global_rows(self) -> tuple[int, int]:
        return self.g, 16 if self.g <= 16 else 32

    def pass_globals(self, source: Strided, target: Strided) -> None:
        """Copy the global tokens: a causal one gives its query as it is, and the gradient of that."""
        places: Any = slice(self.g)
        if self.packed:
            firsts = self.inputs.cu_seqlens[:-1, None]
            places = (firsts + torch.arange(self.g, device=firsts.device)).flatten()
        target.data[:, :, places] = source.data[:, :, places]

    def part(self, head_dim: int) -> Strided:
        """Room for what each chunk gives for the global tokens, of shape (rows, heads, chunks * g, head_dim)."""
        shape = (self.num_rows, self.heads, self.chunks * self.g, head_dim)
        part = torch.empty(shape, dtype=torch.float32, device=self.inputs.query.data.device)
        return Strided(part, *part.stride()[:3])

    def forward(self, output: Strided, lse: Strided) -> None:
        settings: dict[str, Any] = {"num_stages": 2 if self.large else 3}
        of_text = settings
        if self.plan.block_size % 128 == 0:
            # 128 registers leave room for two programs on a multiprocessor.
            of_text = settings | {"num_warps": 8, "maxnreg": None if self.large or self.adds else 128}
        self.launch(forward, self.text, (128, self.key_tile), self.inputs, output, lse, GLOBAL=False, **of_text)
        if self.plan.causal:
            self.pass_globals(self.inputs.query, output)
        elif self.g:
            g, tile = self.global_rows()
            part, weights = self.part(self.head_dim), self.part(1)
            arguments = ((tile, self.key_tile), self.inputs, part, weights)
            self.launch(forward, g, *arguments, chunks=self.chunks, GLOBAL=True, **settings)
            self.launch(combine, g, (tile, 16), part, weights, self.inputs, output, lse, WEIGHTED=True)

    def backward(
        self, states: list[Strided], grads: list[torch.Tensor], grad_tables: list[torch.Tensor | None]
    ) -> None:
        """`states` are the output, its gradient, the `lse`, and room for the statistics that keys need of a query. To
        `grad_tables`, in float32, is added."""
        grad_output, lse, query_stats = states[1:]
        grad_query, grad_key, grad_value, *sparse_grads = map(self.strided, grads)
        inputs, g, tile = self.inputs, *self.global_rows()
        keep_scale = inputs.keep_scale if self.plan.dropout else 1.0
        settings = {"num_warps": 8 if self.large else 4, "num_stages": 2}
        of_globals = {"chunks": self.chunks, "num_stages": 2}
        # Queries first: they leave the statistics.
        of_queries = (inputs, *states)
        tiles = 64, self.key_tile
        query_lines, key_lines, sparse_lines = self.lines
        lines = query_lines.new_grads()
        targets = grad_query, self.strided(lines)
        self.launch(backward_queries, self.text, tiles, *of_queries, *targets, GLOBAL=False, **settings)
        if self.plan.causal:
            self.pass_globals(grad_output, grad_query)
        elif g:
            part = self.part(self.head_dim)
            self.launch(backward_queries, g, (tile, self.key_tile), *of_queries, part, part, GLOBAL=True, **of_globals)
            self.launch(combine, g, (tile, 16), part, part, inputs, grad_query, lse, WEIGHTED=False)
        query_lines.add_grads(lines, keep_scale, grads[0], grad_tables[0])
        lines, lines_of_sparse = key_lines.new_grads(), sparse_lines.new_grads()
        query_tile = 32 if self.large else 64
        of_keys = (inputs, grad_output, query_stats)

        def launch(tokens: int, tiles: tuple[int, int], *targets: Strided, KIND: str, **options: Any) -> None:
            if self.adds and KIND != "global":
                options["num_warps"] = 8
                tiles = min(tiles[0], 32), tiles[1]
            own = lines_of_sparse if KIND == "sparse" and not self.plan.indexed else lines
            self.launch(backward_keys, tokens, tiles, *of_keys, *targets, self.strided(own), KIND=KIND, **options)

        launch(self.text, (query_tile, 64), grad_key, grad_value, KIND="text", **settings)
        if g:
            parts = self.part(self.head_dim), self.part(self.head_dim)
            launch(g, (64, tile), *parts, KIND="global", **of_globals)
            for part, target in zip(parts, (grad_key, grad_value), strict=True):
                self.launch(combine, g, (tile, 16), part, part, inputs, target, lse, WEIGHTED=False)
        if self.plan.sparse:
            # Chosen tokens have a gradient by now, to which is added.
            of_sparse = sparse_grads or (grad_key, grad_value)
            tiles = min(query_tile, self.largest_tile), 64  # Its mask is for queries of one block.
            launch(self.sparse_text, tiles, *of_sparse, KIND="sparse", **settings)
        key_lines.add_grads(lines, keep_scale, grads[1], grad_tables[1])
        if sparse_grads:
            sparse_lines.add_grads(lines_of_sparse, keep_scale, grads[3], grad_tables[1])


_NAMESPACE = operator_namespace(__name__)
_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? attention_mask, Tensor? sparse_key, Tensor? sparse_value, "
    "Tensor? sparse_mask, Tensor? seed, Tensor? cu_seqlens, Tensor? cu_sparse, Tensor? index, "
    "Tensor? by_query, Tensor? by_key, Tensor? sparse_place, SymInt[] sizes, float dropout"
)
_CU_SEQLENS, _SIZES = 8, 14  # among them
_STATES, _TABLES = (0, 1, 2, 4, 5), (11, 12)  # which have gradients
_SAVED = "Tensor output, Tensor lse, Tensor seqused, Tensor full_tiles, Tensor sparse_full_tiles"


def _new_outputs(*arguments: Any) -> tuple[torch.Tensor, ...]:
    query = arguments[0]
    output, lse = _new_token_major(query, arguments), query.new_empty(query.shape[:3], dtype=torch.float32)
    return output, lse, *_new_scans(*arguments)


def _new_grads(grad_output: torch.Tensor, *saved_and_arguments: Any) -> list[torch.Tensor]:
    """For queries, keys, values, and, if there are any, sparse keys and values, and what is added by distance."""
    arguments = saved_and_arguments[2 + len(_Scans._fields) :]
    grads = [_new_token_major(arguments[i], arguments) for i in _STATES if arguments[i] is not None]
    return grads + [torch.empty_like(arguments[i]) for i in _TABLES if arguments[i] is not None]


def _new_token_major(like: torch.Tensor, arguments: tuple[Any, ...]) -> torch.Tensor:
    batch, heads, tokens, head_dim = like.shape
    # Between and behind packed rows there may be gaps, which no kernel writes.
    new = like.new_empty if arguments[_CU_SEQLENS] is None else like.new_zeros
    return new((batch, tokens, heads, head_dim)).transpose(1, 2)


def _attention(*arguments: Any) -> tuple[torch.Tensor, ...]:
    """The output, and what the backward pass needs beside it; `sizes` are max_seqlen and the layout's."""
    outputs = _new_outputs(*arguments)
    output, lse, *scans = outputs
    with torch.cuda.device_of(output), torch.autocast(output.device.type, enabled=False):
        call = _Call(_Scans(*scans), *arguments)
        call.scan()
        call.forward(call.strided(output), call.strided(lse))
    return outputs


def _attention_backward(
    grad_output: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    seqused: torch.Tensor,
    full_tiles: torch.Tensor,
    sparse_full_tiles: torch.Tensor,
    *arguments: Any,
) -> list[torch.Tensor]:
    scans = _Scans(seqused, full_tiles, sparse_full_tiles)
    grads = _new_grads(grad_output, output, lse, *scans, *arguments)
    states = (output, _token_major(grad_output), lse, lse.new_empty((*lse.shape, 4)))
    grad_tables = [
        None if arguments[i] is None else torch.zeros_like(arguments[i], dtype=torch.float32) for i in _TABLES
    ]
    of_states = grads[: len(grads) - sum(x is not None for x in grad_tables)]
    with torch.cuda.device_of(output), torch.autocast(output.device.type, enabled=False):
        call = _Call(scans, *arguments)
        call.backward([call.strided(x) for x in states], of_states, grad_tables)
    for grad, table in zip(grads[len(of_states) :], [x for x in grad_tables if x is not None], strict=True):
        grad.copy_(table)
    return grads


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *tensors, ctx.sizes, ctx.dropout = inputs
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*output, *tensors)


def _differentiate(ctx: Any, grad_output: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    saved = ctx.saved_tensors
    grads = iter(_attention_backward_operator(grad_output, *saved, ctx.sizes, ctx.dropout))
    arguments = saved[2 + len(_Scans._fields) :]
    given = {i: next(grads) for i in (*_STATES, *_TABLES) if arguments[i] is not None}
    return tuple(given.get(i) for i in range(_SIZES + 2))


choose_largest_norm = torch.library.custom_op(
    f"{_NAMESPACE}::choose_largest_norm",
    _choose_largest_norm,
    mutates_args=(),
    schema="(Tensor key, Tensor mask, SymInt num_global_tokens, SymInt block_size, SymInt chunk_size, SymInt factor) "
    "-> (Tensor, Tensor)",
)
choose_largest_norm.register_fake(_new_chosen)
_attention_operator = torch.library.custom_op(
    f"{_NAMESPACE}::attention",
    _attention,
    mutates_args=(),
    schema=f"({_ARGUMENTS}) -> ({', '.join(['Tensor'] * (2 + len(_Scans._fields)))})",
)
_attention_backward_operator = torch.library.custom_op(
    f"{_NAMESPACE}::attention_backward",
    _attention_backward,
    mutates_args=(),
    schema=f"(Tensor grad_output, {_SAVED}, {_ARGUMENTS}) -> Tensor[]",
)
_attention_operator.register_fake(_new_outputs)
_attention_backward_operator.register_fake(_new_grads)
_attention_operator.register_autograd(_differentiate, setup_context=_save)
