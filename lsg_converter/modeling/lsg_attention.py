"""Local-Sparse-Global attention (arXiv 2210.15497): one operation, its kernels, and the choice between them.

A global query attends to all keys. A text query in block `i` attends, in one softmax, to the global keys, to the text
keys of the blocks `i - 1`, `i`, `i + 1`, and to the sparse keys on either side of them. A text of at most two blocks
gets ordinary full attention.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from transformers.utils import logging

from .lsg_cpu import cpu_attention, cpu_kernel_serves
from .lsg_layout import Sequence, Window, local_window, pad_to_multiple, sparse_windows, take_windows
from .lsg_sparsity import sparsify
from .lsg_triton import fused_attention, triton_serves


logger = logging.get_logger(__name__)

Probabilities = tuple[torch.Tensor, torch.Tensor]


def lsg_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keep: torch.Tensor,
    *,
    num_global_tokens: int = 1,
    block_size: int = 128,
    sparse_block_size: int = 128,
    sparsity_factor: int = 2,
    sparsity_type: str | None = "norm",
    lsh_num_pre_rounds: int = 1,
    lsh_seed: int = 0,
    dropout: float = 0.0,
    kernel: str = "sdpa",
    row_lengths: list[int] | None = None,
) -> tuple[torch.Tensor, Probabilities | None]:
    """Attend, with scores scaled by `1 / sqrt(head_dim)`.

    Args:
        query, key, value: shape (batch, heads, g + t, head_dim): `g = num_global_tokens` globals, then `t` text tokens.
        keep: boolean, shape (batch, g + t): True where a token may be attended to.
        dropout: the probability with which a probability is dropped.
        kernel: "eager", which is the plain reference and also returns its probabilities; "sdpa", which takes what
            `choose_kernel` says; or one of these by its name.
        row_lengths: where a batch of one holds rows end to end, how many tokens each has, the globals included; with
            the kernel for CPUs alone.

    Returns:
        The output, of the shape of `query`; it is zero where a query has no key, and means nothing behind the last
        token of a row that is kept. With "eager" also the probabilities, before dropout: those of the text queries and
        those of the global queries, of shapes (batch, heads, t, keys) and (batch, heads, g, g + t). The keys of a text
        query in block `i` are the globals, the text blocks `i - 1`, `i`, `i + 1`, the `S` sparse keys on the left and
        the `S` on the right; for `t <= 2 * block_size` they are all `g + t` keys.

    Raises:
        ValueError: where a shape does not fit, `kernel` or `sparsity_type` is unknown, or the kernel has no rows end
            to end.
    """
    batch, _, length, _ = query.shape
    if key.shape != query.shape or value.shape != query.shape or keep.shape != (batch, length):
        raise ValueError(
            f"key and value must have the shape of query, {tuple(query.shape)}, and keep {(batch, length)}; "
            f"got {tuple(key.shape)}, {tuple(value.shape)} and {tuple(keep.shape)}"
        )
    g, sizes = num_global_tokens, (num_global_tokens, block_size, sparse_block_size, sparsity_factor)
    kernel = choose_kernel(query, kernel, sizes, dropout)
    if row_lengths is not None and not (kernel == "cpu" and batch == 1 and sum(row_lengths) == length):
        raise ValueError(
            f"row_lengths: got {row_lengths} for the {kernel!r} kernel and query of shape {tuple(query.shape)}; they "
            "go with 'cpu' and a batch of one, and add up to its tokens"
        )
    attend = eager_kernel if kernel == "eager" else sdpa_kernel

    if row_lengths is None and length - g <= 2 * block_size:
        output, probabilities = attend(query, key, value, keep[:, None, None], dropout)
        return output, probabilities if probabilities is None else (probabilities[:, :, g:], probabilities[:, :, :g])

    def whole_blocks(tokens: torch.Tensor) -> torch.Tensor:
        """The text, padded."""
        return pad_to_multiple(tokens[:, :, g:], block_size, dim=2)

    shorten = partial(
        sparsify,
        num_global_tokens=g,
        block_size=block_size,
        sparse_block_size=sparse_block_size,
        sparsity_factor=sparsity_factor,
        sparsity_type=sparsity_type,
        lsh_num_pre_rounds=lsh_num_pre_rounds,
        lsh_seed=lsh_seed,
        fused=kernel == "triton",
        in_place=kernel in ("cpu", "triton"),
    )
    tokens = query, key, value, keep[:, None]
    if kernel == "cpu":
        joined = sparse_end_to_end(tokens, row_lengths or [length], g + 2 * block_size, shorten)
        return cpu_attention(query, key, value, keep, joined, row_lengths, sizes, dropout), None
    sparse = shorten(*tokens)
    if kernel == "triton":
        return fused_attention(query, key, value, keep, sparse, sizes, dropout), None
    text_key, text_value, text_keep = map(whole_blocks, tokens[1:])
    sequences = [
        Sequence(key[:, :, :g], value[:, :, :g], keep[:, None, :g], (Window(offset=0, size=g, step=0),)),
        Sequence(text_key, text_value, text_keep, (local_window(block_size),)),
    ]
    if sparse is not None:
        sparse_key, sparse_value, sparse_keep = sparse
        windows = sparse_windows(block_size, sparse_block_size, sparsity_factor)
        sequences.append(Sequence(sparse_key, sparse_value, sparse_keep, windows))
    output, probabilities = all_at_once(whole_blocks(query), sequences, block_size, dropout, attend)
    output = output[:, :, : length - g]

    global_output, global_probabilities = attend(query[:, :, :g], key, value, keep[:, None, None], dropout)
    output = torch.cat([global_output, output], dim=2)
    if probabilities is None or global_probabilities is None:
        return output, None
    return output, (probabilities[:, :, : length - g], global_probabilities)


def sparse_end_to_end(
    tokens: tuple[torch.Tensor, ...],
    row_lengths: list[int],
    short: int,
    shorten: Callable[..., tuple[torch.Tensor, ...] | None],
) -> list[torch.Tensor]:
    """What `shorten` gives for the rows that stand end to end and have more than `short` tokens, joined; nothing where
    it gives nothing. `tokens` are queries, keys, values and mask."""
    first = 0
    each: list[tuple[torch.Tensor, ...]] = []
    for row in zip(*(x.split(row_lengths, dim=2) for x in tokens), strict=True):
        sparse = shorten(*row) if row[0].shape[2] > short else None
        if sparse is not None:
            # Where there are no keys and values, there are places.
            each.append(sparse if len(sparse) > 2 else (first + sparse[0], sparse[1]))
        first += row[0].shape[2]
    return [torch.cat(parts, dim=2) if len(parts) > 1 else parts[0] for parts in zip(*each, strict=True)]


def choose_kernel(query: torch.Tensor, kernel: str, sizes: tuple[int, int, int, int], dropout: float = 0.0) -> str:
    """Which kernel computes the attention of texts of more than two blocks, if `kernel` is asked for.

    "sdpa" leaves the choice: "cpu" (`lsg_cpu`) on a CPU, row by row and block by block; "triton" (`lsg_triton`) on a
    GPU where a first trial gives what it should; else, and in an exported model, "portable", which is torch's fused
    attention on all blocks at once.

    Args:
        query, dropout: as `lsg_attention` takes them.
        sizes: `num_global_tokens`, `block_size`, `sparse_block_size`, `sparsity_factor`.

    Raises:
        ValueError: where `kernel` is unknown, or cannot run here.
    """
    if kernel not in (*KERNELS, *CHOICES):
        raise ValueError(f"kernel: got {kernel!r}; use one of {', '.join((*KERNELS, *CHOICES))}")
    reason = None
    if kernel == "sdpa":
        kernel = "portable"
        if cpu_kernel_serves(query):
            kernel = "cpu"
        elif triton_serves(query, sizes) is None and not torch.compiler.is_exporting() and not torch.jit.is_tracing():
            training = query.requires_grad and torch.is_grad_enabled()
            fault = triton_fault(query.device, query.dtype, query.shape[-1], sizes, training, dropout > 0)
            kernel = "triton" if fault is None else "portable"
    elif kernel == "cpu" and not cpu_kernel_serves(query):
        reason = f"it runs on a CPU, and not in an exported model; got {query.device.type}"
    elif kernel == "triton":
        reason = triton_serves(query, sizes)
    if reason is not None:
        raise ValueError(f"kernel: got {kernel!r}, and {reason}; leave the choice open with 'sdpa'")
    if not torch.compiler.is_compiling():
        logger.info_once(f"LSG attention: the {kernel!r} kernel, on {query.device.type}")
    return kernel


@lru_cache
def try_triton(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    sizes: tuple[int, int, int, int],
    training: bool,
    dropping: bool,
) -> str | None:
    """Try the kernel "triton" on a short text, against "portable": what is wrong with it here, or None. Triton needs a
    compiler and a driver that suit it, and a GPU with room for its tiles."""
    g, block, sparse, factor = sizes
    chunk = min(block, sparse)
    even = factor and chunk and chunk % factor == 0 and block % chunk == 0
    names = ("num_global_tokens", "block_size", "sparse_block_size", "sparsity_factor")
    options: dict[str, Any] = dict(zip(names, sizes, strict=True))
    options["sparsity_type"] = "norm" if even else "stride"
    generator = torch.Generator(device).manual_seed(0)
    fault = None
    try:
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.inference_mode(False),
            torch.set_grad_enabled(training),
            torch.autocast(device.type, enabled=False),
        ):
            shape = (3, 1, 2, g + 3 * block + 1, head_dim)
            tokens = torch.randn(shape, generator=generator, device=device).to(dtype)
            keep = torch.arange(shape[3], device=device)[None] < shape[3] - block // 2

            def run(kernel: str, dropout: float = 0.0) -> list[torch.Tensor]:
                leaves = [x.clone().requires_grad_(training) for x in tokens]
                output, _ = lsg_attention(
                    leaves[0], leaves[1], leaves[2], keep, **options, dropout=dropout, kernel=kernel
                )
                output = output[:, :, : shape[3] - block // 2]
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


def all_at_once(
    query: torch.Tensor,
    sequences: list[Sequence],
    block_size: int,
    dropout: float,
    attend: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention of text queries, whole blocks of shape (batch, heads, t, head_dim), by one call of `attend`: the
    form for every device, for compiling and for export."""
    heads, num_blocks = query.shape[1], query.shape[2] // block_size
    # What each block sees, part by part: keys, values and mask of shape (batch, heads, blocks, keys of the part, ...).
    seen = [
        [take_windows(x, window, num_blocks) for x in (sequence.key, sequence.value, sequence.keep)]
        for sequence in sequences
        for window in sequence.windows
    ]
    # Blocks join the heads, so that one call of four dimensions serves all of them.
    key, value = (torch.cat(parts, dim=3).flatten(1, 2) for parts in list(zip(*seen, strict=True))[:2])
    keep = torch.cat([part[2].expand(-1, heads, -1, -1) for part in seen], dim=3).flatten(1, 2)
    blocks = query.unflatten(2, (num_blocks, block_size)).flatten(1, 2)
    output, probabilities = attend(blocks, key, value, keep[:, :, None], dropout)
    if probabilities is not None:
        probabilities = probabilities.view(*query.shape[:3], -1)
    return output.view(query.shape), probabilities


def eager_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, keep: torch.Tensor, dropout: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Softmax attention, step by step; `keep` is (batch, heads or 1, 1, keys)."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    scores = scores.masked_fill(~keep, torch.finfo(scores.dtype).min)
    probabilities = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    probabilities = probabilities.masked_fill(~keep, 0).to(value.dtype)
    return F.dropout(probabilities, dropout) @ value, probabilities


def sdpa_kernel(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, keep: torch.Tensor, dropout: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same by torch's fused attention, which keeps no scores. (With dropout on a CPU torch has no fused form.)"""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=keep, dropout_p=dropout), None


# What `attn_implementation` may be, and what "sdpa" may stand for.
KERNELS = ("eager", "sdpa")
CHOICES = ("cpu", "portable", "triton")
