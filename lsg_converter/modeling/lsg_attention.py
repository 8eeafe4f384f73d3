"""Local-Sparse-Global attention (arXiv 2210.15497): one operation, its kernels, and the choice between them.

A global query attends to all keys. A text query in block `i` attends, in one softmax, to the global keys, to the text
keys of the blocks `i - 1`, `i`, `i + 1`, and to the sparse keys on either side of them. A text of at most two blocks
gets ordinary full attention. In the causal form a text query sees no key behind it, and a global query none at all.
"""

import logging
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F

from .lsg_bias import Bias, RelativeEmbeddings, added_scores, full_scores, products
from .lsg_cpu import cpu_attention, cpu_kernel_serves
from .lsg_layout import (
    KeyValues,
    LSGLayout,
    SparseKeys,
    is_exporting,
    pad_to_multiple,
    require,
    take_first,
    take_windows,
)
from .lsg_sparsity import check_sparsity, sparsify
from .lsg_triton import fused_attention, triton_serves


logger = logging.getLogger(__name__)

# What `attn_implementation` may be, and the kernels that "sdpa" chooses from.
ATTN_IMPLEMENTATIONS = ("eager", "sdpa")
KERNELS = ("cpu", "portable", "triton")

Probabilities = tuple[torch.Tensor, torch.Tensor]
# Softmax attention to all keys: of query, key, value, mask, dropout and what is added to scores, it gives output and
# probabilities.
Attend = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


def lsg_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    num_global_tokens: int = 1,
    block_size: int = 128,
    sparse_block_size: int = 128,
    sparsity_factor: int = 2,
    sparsity_type: str | None = "norm",
    full_attention_length: int | None = None,
    causal: bool = False,
    lsh_num_pre_rounds: int = 1,
    lsh_seed: int = 0,
    dropout: float = 0.0,
    kernel: str = "sdpa",
    seqlens: list[int] | None = None,
    bias: Bias | None = None,
) -> tuple[torch.Tensor, Probabilities | None]:
    """Attend, with scores scaled by `1 / sqrt(head_dim)`.

    Args:
        query, key, value: shape (batch, heads, g + t, head_dim): `g = num_global_tokens` globals, then `t` text tokens.
        attention_mask: boolean, shape (batch, g + t): True where a token may be attended to.
        full_attention_length: up to how many tokens of text a row gets full attention, counted up to its last that is
            not masked; at least `2 * block_size`.
        causal: whether a token of text sees none behind it; the output of a global token is then its query.
        dropout: the probability with which a probability is dropped.
        kernel: "eager", which is the plain reference and also returns its probabilities; "sdpa", which takes what
            `choose_kernel` says; or one of `KERNELS` by its name.
        seqlens: the tokens of each row, the globals included, where a batch of one holds rows end to end. The "cpu"
            kernel alone takes them.

    Returns:
        The output, of the shape of `query`. It is zero where a query has no key, and means nothing behind the last
        token of a row that is not masked. With "eager" also the probabilities, before dropout: those of the text
        queries and those of the global queries, of shapes (batch, heads, t, keys) and (batch, heads, g, g + t). The
        keys of a text query in block `i` are the globals, the text blocks `i - 1`, `i`, `i + 1`, the sparse keys on the
        left and those on the right; where all of the batch gets full attention they are all `g + t` keys. Of a row that
        gets it beside longer ones, and is longer than two blocks, they are not a number (NaN). In the causal form there
        are no keys of the block `i + 1` and on the right, and those of the global queries are zero.

    Raises:
        ValueError: where a shape or a size does not fit, `kernel` or `sparsity_type` is unknown, a kernel takes no
            `seqlens`, or a causal one is to give longer texts full attention.
    """
    batch, _, length, _ = query.shape
    if key.shape != query.shape or value.shape != query.shape or attention_mask.shape != (batch, length):
        raise ValueError(
            f"key and value must have the shape of query, {tuple(query.shape)}, and attention_mask {(batch, length)}; "
            f"got {tuple(key.shape)}, {tuple(value.shape)} and {tuple(attention_mask.shape)}"
        )
    if attention_mask.dtype != torch.bool:
        raise ValueError(
            f"attention_mask: got {attention_mask.dtype}; it must be boolean, True for a token to attend to"
        )
    require("num_global_tokens", num_global_tokens, num_global_tokens >= 0, "at least 0")
    require("full_attention_length", full_attention_length, (full_attention_length or 0) >= 0, "at least 0, or none")
    check_sparsity(block_size, sparse_block_size, sparsity_factor, sparsity_type)
    sizes = num_global_tokens, block_size, sparse_block_size, sparsity_factor
    layout = LSGLayout.from_fields(*sizes, sparsity_type, full_attention_length, causal)
    kernel = choose_kernel(query, kernel, layout, dropout, bias)
    if seqlens is not None and not (kernel == "cpu" and batch == 1 and sum(seqlens) == length):
        raise ValueError(
            f"seqlens: got {seqlens} for the {kernel!r} kernel and query of shape {tuple(query.shape)}; they go with "
            "'cpu' and a batch of one, and add up to its tokens"
        )
    attend = eager_kernel if kernel == "eager" else sdpa_kernel

    g = num_global_tokens
    if seqlens is None and layout.is_short(length - g):
        mask = attention_mask[:, None, None]
        if causal:
            place = torch.arange(length, device=query.device)
            mask = mask & ((place < g) | (place <= place[:, None]))
        added = None if bias is None else full_scores(bias, query, key, g)
        output, probabilities = attend(query, key, value, mask, dropout, added)
        if causal:
            output = torch.cat([query[:, :, :g], output[:, :, g:]], dim=2)
        if probabilities is None:
            return output, None
        to_all = probabilities[:, :, :g]
        return output, (probabilities[:, :, g:], torch.zeros_like(to_all) if causal else to_all)

    shorten = partial(
        sparsify,
        layout=layout,
        sparsity_type=sparsity_type,
        lsh_num_pre_rounds=lsh_num_pre_rounds,
        lsh_seed=lsh_seed,
        fused=kernel == "triton",
        in_place=kernel in ("cpu", "triton"),
        with_place=bias is not None,
    )
    tokens = query, key, value, attention_mask[:, None]
    if kernel == "cpu":
        packed = sparsify_packed(tokens, seqlens or [length], layout, shorten)
        return cpu_attention(query, key, value, attention_mask, packed, seqlens, layout, dropout, bias), None
    sparse = shorten(*tokens)
    if kernel == "triton":
        return fused_attention(query, key, value, attention_mask, sparse, layout, dropout, bias), None
    return blockwise_attention(query, key, value, attention_mask, sparse, layout, dropout, attend, bias)


def sparsify_packed(
    tokens: tuple[torch.Tensor, ...],
    seqlens: list[int],
    layout: LSGLayout,
    shorten: Callable[..., SparseKeys | None],
) -> SparseKeys | None:
    """The sparse keys of rows that stand end to end, joined: those of the rows that are not short. `tokens` are
    queries, keys, values and mask."""
    first = 0
    parts: list[SparseKeys] = []
    for row in zip(*(x.split(seqlens, dim=2) for x in tokens), strict=True):
        length = row[0].shape[2]
        sparse = None if layout.is_short(length - layout.num_global_tokens) else shorten(*row)
        if sparse is not None:
            places = {name: getattr(sparse, name) for name in ("token_index", "place")}
            parts.append(sparse._replace(**{name: x + first for name, x in places.items() if x is not None}))
        first += length
    if len(parts) < 2:
        return parts[0] if parts else None
    masks, *states = zip(*parts, strict=True)
    return SparseKeys(torch.cat(masks, dim=2), *(None if x[0] is None else torch.cat(x, dim=2) for x in states))


def choose_kernel(
    query: torch.Tensor, kernel: str, layout: LSGLayout, dropout: float = 0.0, bias: Bias | None = None
) -> str:
    """Which kernel computes the attention of texts of more than two blocks, if `kernel` is asked for.

    "sdpa" leaves the choice: "cpu" (`lsg_cpu`) on a CPU, row by row and block by block; "triton" (`lsg_triton`) on a
    GPU where a first trial gives what it should; else, and in an exported model, "portable", which is torch's fused
    attention on all blocks at once.

    Args:
        query, dropout, bias: as `lsg_attention` takes them.

    Raises:
        ValueError: where `kernel` is unknown, or cannot run here.
    """
    known = (*ATTN_IMPLEMENTATIONS, *KERNELS)
    if kernel not in known:
        raise ValueError(f"kernel: got {kernel!r}; use one of {', '.join(known)}")
    reason = None
    if kernel == "sdpa":
        kernel = "portable"
        if cpu_kernel_serves(query):
            kernel = "cpu"
        elif triton_serves(query, layout) is None and not is_exporting():
            training = query.requires_grad and torch.is_grad_enabled()
            added = None
            if bias is not None:
                keys, queries, _ = bias if isinstance(bias, RelativeEmbeddings) else (None, None, None)
                added = keys is not None, queries is not None
            arguments = query.device, query.dtype, query.shape[-1], layout, training, dropout > 0, added
            fault = triton_fault(*arguments)
            kernel = "triton" if fault is None else "portable"
    elif kernel == "cpu" and not cpu_kernel_serves(query):
        reason = f"it runs on a CPU, and not in an exported model; got {query.device.type}"
    elif kernel == "triton":
        reason = triton_serves(query, layout)
    if reason is not None:
        raise ValueError(f"kernel: got {kernel!r}, and {reason}; leave the choice open (attention_kernel=None)")
    if not torch.compiler.is_compiling():
        tell_kernel(kernel, query.device.type)
    return kernel


@lru_cache
def tell_kernel(kernel: str, device_type: str) -> None:
    """Say which kernel runs, once."""
    logger.info(f"LSG attention: the {kernel!r} kernel, on {device_type}")


@lru_cache
def try_triton(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    layout: LSGLayout,
    training: bool,
    dropping: bool,
    added: tuple[bool, bool] | None = None,
) -> str | None:
    """Try the kernel "triton" on a short text, against "portable": what is wrong with it here, or None. Triton needs a
    compiler and a driver that suit it, and a GPU with room for its tiles. `added` says of a bias whether it has
    embeddings for queries, and for keys; a table has neither.
    """
    g, block, chunk = layout.num_global_tokens, layout.block_size, layout.chunk_size
    even = chunk and chunk % layout.sparsity_factor == 0 and block % chunk == 0
    options: dict[str, Any] = layout._asdict() | {"sparsity_type": "norm" if even else "stride"}
    generator = torch.Generator(device).manual_seed(0)
    fault = None
    try:
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.inference_mode(False),
            torch.set_grad_enabled(training),
            torch.autocast(device.type, enabled=False),
        ):
            # A row that is long, and one that may get full attention beside it.
            full = max(2 * block, layout.full_attention_length)
            shape = (3, 2, 2, g + full + block + 1, head_dim)
            tokens = torch.randn(shape, generator=generator, device=device).to(dtype)
            seqused = torch.tensor([[shape[3] - block // 2], [g + full]], device=device)
            mask = torch.arange(shape[3], device=device) < seqused

            rows, tables = torch.arange(2 * layout.reach + 1, device=device), []
            if added is not None:
                sizes = (2, len(rows), head_dim) if any(added) else (2, len(rows))
                tables = list(torch.randn((sum(added) or 1, *sizes), generator=generator, device=device).to(dtype))

            def run(kernel: str, dropout: float = 0.0) -> list[torch.Tensor]:
                leaves = [x.clone().requires_grad_(training) for x in (*tokens, *tables)]
                states, given, bias = leaves[:3], iter(leaves[3:]), None
                if added is not None:
                    keys, queries = (next(given) if has else None for has in added)
                    bias = RelativeEmbeddings(keys, queries, rows) if any(added) else next(given)
                output, _ = lsg_attention(
                    states[0], states[1], states[2], mask, **options, dropout=dropout, kernel=kernel, bias=bias
                )
                output = output * mask[:, None, :, None]
                return [output, *(torch.autograd.grad(output.float().square().sum(), leaves) if training else ())]

            for fused, plain in zip(run("triton"), run("portable"), strict=True):
                error = (fused.float() - plain.float()).norm() / plain.float().norm()
                if not error < 0.02:
                    fault = f"its numbers are {float(error):.0%} off"
            if dropping and not all(x.isfinite().all() for x in run("triton", dropout=0.1)):
                fault = "with dropout its numbers are not finite"
    except Exception as error:  # of a compiler, a driver or a device: whatever it is, there is another kernel
        fault = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
    if fault is not None:
        logger.warning(f"LSG attention: the 'triton' kernel does not work on {device}, so 'portable' is taken; {fault}")
    return fault


@torch.compiler.assume_constant_result
def triton_fault(*arguments: Any) -> str | None:
    """What `try_triton` says, which `torch.compile` is to take as it is, and not to look into."""
    return try_triton(*arguments)


def blockwise_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    sparse: SparseKeys | None,
    layout: LSGLayout,
    dropout: float,
    attend: Attend,
    bias: Bias | None = None,
) -> tuple[torch.Tensor, Probabilities | None]:
    """LSG attention by a call of `attend` for the text, and one for the globals: the form for every device, for
    compiling and for export. What each block sees is gathered, all blocks at once. Shapes as in `lsg_attention`."""
    g, (_, heads, length, _) = layout.num_global_tokens, query.shape

    def whole_blocks(tokens: torch.Tensor) -> torch.Tensor:
        """The text, padded."""
        return pad_to_multiple(tokens[:, :, g:], layout.block_size, dim=2)

    mask = attention_mask[:, None]
    sequences = [
        KeyValues(key[:, :, :g], value[:, :, :g], mask[:, :, :g], (layout.global_window,)),
        KeyValues(whole_blocks(key), whole_blocks(value), whole_blocks(mask), (layout.local_window,)),
    ]
    if sparse is not None and sparse.key is not None and sparse.value is not None:
        sequences.append(KeyValues(sparse.key, sparse.value, sparse.mask, layout.sparse_windows))
    text_query = whole_blocks(query)
    num_blocks = text_query.shape[2] // layout.block_size
    # What each block sees, part by part: keys, values and mask of shape (batch, heads, blocks, keys of the part, ...).
    seen = [
        [take_windows(x, window, num_blocks) for x in (sequence.key, sequence.value, sequence.mask)]
        for sequence in sequences
        for window in sequence.windows
        if window.size  # An exporter to ONNX may not join what is empty.
    ]

    def joined(parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The parts of what is seen, of which an exported graph would make the order in memory a condition."""
        return torch.cat([x.flatten(1, 2) for x in parts], 2) if is_exporting() else torch.cat(parts, 3).flatten(1, 2)

    # Blocks join the heads, so that one call of four dimensions serves all of them.
    seen_key, seen_value = (joined(parts) for parts in list(zip(*seen, strict=True))[:2])
    seen_mask = torch.cat([part[2].expand(-1, heads, -1, -1) for part in seen], dim=3).flatten(1, 2)
    blocks = text_query.unflatten(2, (num_blocks, layout.block_size)).flatten(1, 2)
    block_mask = seen_mask[:, :, None]
    if layout.causal:
        column, row = (torch.arange(size, device=query.device) for size in (seen_mask.shape[2], layout.block_size))
        own = column - g - layout.block_size  # the place in the block of the keys of its own tokens
        block_mask = block_mask & ((own <= row[:, None]) | (own >= layout.block_size))
    added = None
    if bias is not None:
        added = blockwise_bias(bias, text_query, sequences[1].key, sparse, layout, length)
    text_output, text_probabilities = attend(blocks, seen_key, seen_value, block_mask, dropout, added)
    text_output = take_first(text_output.view(text_query.shape), length - g)

    if layout.causal:
        global_output, shape = query[:, :, :g], (*query.shape[:2], g, length)
        global_probabilities = None if text_probabilities is None else text_probabilities.new_zeros(shape)
    else:
        global_output, global_probabilities = attend(query[:, :, :g], key, value, mask[:, :, None], dropout)
    output = torch.cat([global_output, text_output], dim=2)
    probabilities = None
    if text_probabilities is not None and global_probabilities is not None:
        text_probabilities = text_probabilities.view(*text_query.shape[:3], -1)[:, :, : length - g]
        probabilities = text_probabilities, global_probabilities
    if not layout.mixes_full_attention:
        return output, probabilities

    # Both forms for all rows, so that the graph of `torch.compile` stays whole; each row then takes its own.
    stop = g + layout.full_attention_length
    place = torch.arange(length, device=query.device)  # no slices, which depend on whether the text goes so far

    def goes_on(places: int) -> torch.Tensor:
        """Whether a row has more tokens than that, up to its last that is not masked."""
        return (attention_mask & (place >= places)).any(dim=1)[:, None, None, None]

    short = ~goes_on(stop)
    start = [take_first(x, stop) for x in (query, key, value)]
    # In an exported graph the text may end before `stop`.
    start_mask = take_first(mask, stop) & (torch.arange(stop, device=query.device) < length)
    added = None if bias is None else full_scores(bias, start[0], start[1], g)
    full_output, _ = attend(*start, start_mask[:, :, None], dropout, added)
    output = torch.where(short, full_output.index_select(2, place.clamp(max=stop - 1)), output)
    if probabilities is not None:
        other_keys = short & goes_on(g + 2 * layout.block_size)
        probabilities = probabilities[0].masked_fill(other_keys, torch.nan), probabilities[1]
    return output, probabilities


def blockwise_bias(
    bias: Bias,
    query: torch.Tensor,
    key: torch.Tensor,
    sparse: SparseKeys | None,
    layout: LSGLayout,
    length: int,
) -> torch.Tensor:
    """What is added to the scores of each block of queries with the keys that it sees.

    Args:
        query, key: of the text in whole blocks, (batch, heads, tokens, head_dim).
        sparse: the sparse keys, with their places.
        length: the tokens of a row, the globals included.

    Returns:
        Shape (batch, heads * blocks, block_size, keys).
    """
    g, block, (batch, heads) = layout.num_global_tokens, layout.block_size, query.shape[:2]
    num_blocks = query.shape[2] // block
    of_query, of_key = products(bias, query, key)
    of_blocks = None if of_query is None else of_query.unflatten(2, (num_blocks, block))
    window, place = layout.local_window, torch.arange(block, device=query.device)
    key_place = window.offset + torch.arange(window.size, device=query.device)
    distance = (place[:, None] - key_place)[None, None, None]
    seen = None if of_key is None else take_windows(of_key, window, num_blocks)

    def joined(scores: torch.Tensor) -> torch.Tensor:
        return scores.expand(batch, heads, num_blocks, -1, -1).flatten(1, 2)

    # Parts are joined last: of the order in memory that they then have an exported graph would make a condition.
    local = F.pad(joined(added_scores(bias, of_blocks, seen, distance)), (g, 0))
    if sparse is None or sparse.place is None or sparse.key is None:
        return local
    first = length * torch.arange(batch, device=query.device)[:, None, None] + g
    start = block * torch.arange(num_blocks, device=query.device)[:, None, None]
    _, of_key = products(bias, query[:, :, :0], sparse.key)
    parts = [local]
    for window in layout.sparse_windows:
        key_place = take_windows(sparse.place - first, window, num_blocks)[:, :, :, None]
        seen = None if of_key is None else take_windows(of_key, window, num_blocks)
        parts.append(joined(added_scores(bias, of_blocks, seen, start + place[:, None] - key_place)))
    return torch.cat(parts, dim=-1)


def eager_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    dropout: float,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Softmax attention, step by step; `mask` is (batch, heads or 1, 1, keys), `bias` (..., heads, queries, keys)."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    probabilities = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    probabilities = probabilities.masked_fill(~mask, 0).to(value.dtype)
    return F.dropout(probabilities, dropout) @ value, probabilities


def sdpa_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    dropout: float,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same by torch's fused attention, which keeps no scores. (With dropout on a CPU torch has no fused form.)"""
    if bias is not None:
        mask = bias.to(query.dtype).masked_fill(~mask, -torch.inf)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout), None
