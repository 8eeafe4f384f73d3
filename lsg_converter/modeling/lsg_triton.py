"""LSG attention on a GPU, fused: forward and backward, with dropout, packed rows, and as operators that compile."""

import math
from typing import Any

import torch

from .lsg_layout import flat_rows, operator_namespace, take_rows
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
    measure,
    triton,
)


GLOBAL_CHUNK = 512  # tokens per program where global rows face all tokens; fixed, so that results are too
WIDE_TYPES = (torch.float32,)  # whose tiles are smaller
LARGEST_CHUNK = 256  # beyond this `choose_largest_norm` no longer pays


def _new_chosen(
    key: torch.Tensor, keep: torch.Tensor, num_global_tokens: int, block_size: int, chunk_size: int, factor: int
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, length, _ = key.shape
    chosen = -(-(length - num_global_tokens) // block_size) * block_size // factor
    index = key.new_empty((batch, chosen, heads), dtype=torch.int64).transpose(1, 2)  # as `flat_rows` lays it out
    return index, key.new_empty((batch, heads, chosen), dtype=torch.bool)


def _choose_largest_norm(
    key: torch.Tensor, keep: torch.Tensor, num_global_tokens: int, block_size: int, chunk_size: int, factor: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `1 / factor` of the keys of each chunk of text with the largest norm; of equal ones the first, masked last.

    Args:
        key: shape (batch, heads, g + t, head_dim).
        keep: boolean, shape (batch, 1, g + t).
        chunk_size: at most `LARGEST_CHUNK`; it divides `block_size`, to whole numbers of which the text is padded.

    Returns:
        Which tokens, ascending, counted through all rows, int64, and which of them are kept, of shapes
        (batch, heads, T / factor). What pads the text is not kept, and points to a token.
    """
    outputs = _new_chosen(key, keep, num_global_tokens, block_size, chunk_size, factor)
    batch, heads, chosen = outputs[0].shape
    key, mask = _token_major(key), keep.contiguous().view(torch.uint8)
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


def triton_serves(query: torch.Tensor, sizes: tuple[int, int, int, int]) -> str | None:
    """Why `fused_attention` cannot do what is asked, or None where it can."""
    num_global_tokens, block_size, sparse_block_size, sparsity_factor = sizes
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
    sparse: tuple[torch.Tensor, ...] | None,
    sizes: tuple[int, int, int, int],
    dropout: float = 0.0,
    *,
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
            (batch, 1 or heads, s), with `s = ceil(t / block_size) * block_size / sparsity_factor`; or None. Instead of
            keys and values, where they are tokens: which, counted through all rows, (batch, heads, s), int64. No two
            that are kept are the same.
        sizes: `num_global_tokens`, `block_size`, `sparse_block_size`, `sparsity_factor`.
        dropout: the probability with which a probability is dropped.
        seed: int64, shape (1,), on the device, from which the dropout follows; drawn where it is None.
        cu_seqlens: int32, shape (rows + 1,), on the device, for packed rows: `batch` is 1, and row `r`, its globals
            followed by its text, is the tokens `[cu_seqlens[r], cu_seqlens[r + 1])`.
        max_seqlen: for packed rows, a bound of `g + t` over them.
        cu_sparse: int32, shape (rows + 1,): the sparse tokens `[cu_sparse[r], cu_sparse[r + 1])` are those of the
            packed row `r`. By default rows have as many as `s` above, one row's after the other's.

    Returns:
        The shape of `query`, token-major in memory: (batch, g + t, heads, head_dim). Zero where a query has no key, and
        behind the last token of a row that is kept, where rows are not packed: those take no part.
    """
    num_global_tokens, block_size, sparse_block_size, sparsity_factor = sizes
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
    sparse_key = sparse_value = sparse_keep = index = None
    if sparse is not None and len(sparse) > 2:
        sparse_key, sparse_value, sparse_keep = sparse
    elif sparse is not None:
        index, sparse_keep = sparse
    states = (query, key, value, keep, sparse_key, sparse_value, sparse_keep)
    numbers = [query.shape[2] if max_seqlen is None else max_seqlen, *sizes]
    others = (seed if dropout > 0.0 else None, cu_seqlens, cu_sparse, index)
    return _attention_operator(*states, *others, numbers, dropout)[0]


def dropout_keep_mask(
    seed: torch.Tensor, batch_heads: int, queries: torch.Tensor, keys: torch.Tensor, dropout: float
) -> torch.Tensor:
    """Which probabilities `fused_attention` keeps: boolean, shape (batch_heads, queries, keys).

    Args:
        seed: int64, shape (1,).
        queries: the places of queries among the `g + t` tokens of their row.
        keys: those of keys; sparse key `s` has the place `SPARSE_IDENTITY + s`.
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
        index: torch.Tensor | None,
        sizes: list[int],
        dropout: float,
    ) -> None:
        max_seqlen, self.g, block_size, sparse_block_size, sparsity_factor = sizes
        self.packed = cu_seqlens is not None
        self.heads, self.head_dim = query.shape[1], query.shape[3]
        self.num_rows = query.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
        self.wide, self.large = query.dtype in WIDE_TYPES, self.head_dim > 64
        sparse_length = 0 if sparse_keep is None else sparse_keep.shape[2]

        any_keys = Keys(*[self.strided(_token_major(query))] * 5)
        sparse = any_keys
        if index is not None:
            rows = flat_rows(index)
            sparse_key, sparse_value = take_rows(key, rows), take_rows(value, rows)
            sparse = sparse._replace(chosen=self.strided(index))
        if sparse_key is not None and sparse_value is not None and sparse_keep is not None:
            parts = [self.strided(_token_major(tensor)) for tensor in (sparse_key, sparse_value)]
            sparse = sparse._replace(key=parts[0], value=parts[1], keep=self.strided_mask(sparse_keep))
        parts = [self.strided(_token_major(tensor)) for tensor in (key, value)]
        mask = sparse.keep if keep is None else self.strided_mask(keep[:, None])
        self.inputs = Inputs(
            query=any_keys.key,
            tokens=sparse._replace(key=parts[0], value=parts[1], keep=mask),
            sparse=sparse,
            length=query.shape[2],
            sparse_length=sparse_length,
            cu_seqlens=query if cu_seqlens is None else cu_seqlens,
            cu_sparse=query if cu_sparse is None else cu_sparse,
            real_lengths=query,
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
            sparse_block_size=sparse_block_size if sparse_length else 0,
            sparsity_factor=sparsity_factor if sparse_length else 1,
            scale=self.head_dim**-0.5,
            scale_log2e=self.head_dim**-0.5 * math.log2(math.e),
            masked=keep is not None,
            sparse=sparse_length > 0,
            chosen=index is not None,
            dropout=dropout > 0.0,
            packed=self.packed,
            precision=_precision(),
            chunk=GLOBAL_CHUNK,
        )
        text = -(-max(max_seqlen - self.g, 0) // block_size) * block_size
        self.text, self.sparse_text = text, text // self.plan.sparsity_factor
        self.chunks = max(-(-text // GLOBAL_CHUNK), 1)
        self.largest_tile = block_size & -block_size  # of what a program gives, which must lie in one block
        self.key_tile = 32 if self.wide else 64  # that queries read, and of which `measure` says whether it is whole
        if sparse_keep is not None:
            sparse = self.measure(sparse, sparse_keep.shape[1], self.sparse_text, None)
        tokens, real_lengths = self.inputs.tokens._replace(whole=sparse.whole), query
        if keep is not None:
            real_lengths = query.new_full((self.num_rows,), self.g, dtype=torch.int32)
            tokens = self.measure(tokens, 1, self.text, real_lengths)
        self.inputs = self.inputs._replace(tokens=tokens, sparse=sparse, real_lengths=real_lengths)

    def measure(self, keys: Keys, heads: int, tokens: int, real_lengths: torch.Tensor | None) -> Keys:
        """`keys`, of at most so many tokens in a row, with what says which tiles are kept as a whole.

        Without `real_lengths`, which grow to the last token that is kept, these are sparse keys.
        """
        tiles = -(-tokens // self.key_tile) + 1  # one more is read
        whole = torch.empty(self.num_rows, heads, tiles, dtype=torch.int8, device=keys.keep.data.device)
        keys = keys._replace(whole=Strided(whole, whole.stride(0), whole.stride(1) if heads > 1 else 0, 1))
        plan = self.plan._replace(masked=False, key_tile=self.key_tile)
        grid = (-(-tokens // plan.chunk), heads, self.num_rows)
        if all(grid):
            of_sparse = real_lengths is None
            measure[grid](self.inputs, keys, whole if of_sparse else real_lengths, OF_SPARSE=of_sparse, PLAN=plan)
        return keys

    def strided(self, tensor: torch.Tensor) -> Strided:
        """`tensor` of shape (batch, heads, tokens[, head_dim]); packed rows are told apart by their tokens alone."""
        # Along a dimension of one torch may have any stride; Triton, where it is 1, loses it.
        sizes = zip(tensor.shape[:3], tensor.stride()[:3], strict=True)
        batch, head, token = (0 if size == 1 else stride for size, stride in sizes)
        return Strided(tensor, 0 if self.packed else batch, head, token)

    def strided_mask(self, keep: torch.Tensor) -> Strided:
        """A mask of shape (batch, 1 or heads, tokens)."""
        return self.strided((keep if keep.stride(-1) == 1 else keep.contiguous()).view(torch.uint8))

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
        settings: dict[str, Any] = {"num_stages": 2 if self.large else 3}
        of_text = settings
        if self.plan.block_size % 128 == 0:
            # 128 registers leave room for two programs on a multiprocessor.
            of_text = settings | {"num_warps": 8, "maxnreg": None if self.large else 128}
        self.launch(forward, self.text, (128, self.key_tile), self.inputs, output, normalizer, GLOBAL=False, **of_text)
        if self.g:
            g, tile = self.global_rows()
            part, weights = self.part(self.head_dim), self.part(1)
            arguments = ((tile, self.key_tile), self.inputs, part, weights)
            self.launch(forward, g, *arguments, chunks=self.chunks, GLOBAL=True, **settings)
            self.launch(combine, g, (tile, 16), part, weights, self.inputs, output, normalizer, WEIGHTED=True)

    def backward(self, states: list[Strided], grads: list[Strided]) -> None:
        """`states` are the output, its gradient, the normalizers, and room for the facts that keys need of a query."""
        grad_output, normalizer, facts = states[1:]
        grad_query, grad_key, grad_value, *sparse_grads = grads
        inputs, g, tile = self.inputs, *self.global_rows()
        settings = {"num_warps": 8 if self.large else 4, "num_stages": 2}
        of_globals = {"chunks": self.chunks, "num_stages": 2}
        # Queries first: they leave the facts.
        of_queries = (inputs, *states)
        tiles = 64, self.key_tile
        self.launch(backward_queries, self.text, tiles, *of_queries, grad_query, GLOBAL=False, **settings)
        if g:
            part = self.part(self.head_dim)
            self.launch(backward_queries, g, (tile, self.key_tile), *of_queries, part, GLOBAL=True, **of_globals)
            self.launch(combine, g, (tile, 16), part, part, inputs, grad_query, normalizer, WEIGHTED=False)
        query_tile = 32 if self.large else 64
        of_keys = (inputs, grad_output, facts)
        self.launch(backward_keys, self.text, (query_tile, 64), *of_keys, grad_key, grad_value, KIND="text", **settings)
        if g:
            parts = self.part(self.head_dim), self.part(self.head_dim)
            self.launch(backward_keys, g, (64, tile), *of_keys, *parts, KIND="global", **of_globals)
            for part, target in zip(parts, (grad_key, grad_value), strict=True):
                self.launch(combine, g, (tile, 16), part, part, inputs, target, normalizer, WEIGHTED=False)
        if self.plan.sparse:
            # Chosen tokens have a gradient by now, to which is added.
            of_sparse = sparse_grads or (grad_key, grad_value)
            tiles = min(query_tile, self.largest_tile), 64  # Its mask is for queries of one block.
            self.launch(backward_keys, self.sparse_text, tiles, *of_keys, *of_sparse, KIND="sparse", **settings)


_NAMESPACE = operator_namespace(__name__)
_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? keep, Tensor? sparse_key, Tensor? sparse_value, "
    "Tensor? sparse_keep, Tensor? seed, Tensor? cu_seqlens, Tensor? cu_sparse, Tensor? index, SymInt[] sizes, "
    "float dropout"
)
_CU_SEQLENS = 8  # among them


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
    with torch.cuda.device_of(outputs[0]):
        call = _Call(*arguments)
        call.forward(*(call.strided(tensor) for tensor in outputs))
    return outputs


def _attention_backward(
    grad_output: torch.Tensor, output: torch.Tensor, normalizer: torch.Tensor, *arguments: Any
) -> list[torch.Tensor]:
    grads = _new_grads(grad_output, output, normalizer, *arguments)
    states = (output, _token_major(grad_output), normalizer, normalizer.new_empty((*normalizer.shape, 4)))
    with torch.cuda.device_of(output):
        call = _Call(*arguments)
        call.backward([call.strided(state) for state in states], [call.strided(grad) for grad in grads])
    return grads


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, ctx.sizes, ctx.dropout = inputs
    ctx.save_for_backward(*output, *tensors)


def _differentiate(ctx: Any, grad_output: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grads = _attention_backward_operator(grad_output, *ctx.saved_tensors, ctx.sizes, ctx.dropout)
    sparse_grads = grads[3:] or [None, None]
    return (*grads[:3], None, *sparse_grads, *[None] * 7)


choose_largest_norm = torch.library.custom_op(
    f"{_NAMESPACE}::choose_largest_norm",
    _choose_largest_norm,
    mutates_args=(),
    schema="(Tensor key, Tensor keep, SymInt num_global_tokens, SymInt block_size, SymInt chunk_size, SymInt factor) "
    "-> (Tensor, Tensor)",
)
choose_largest_norm.register_fake(_new_chosen)
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
