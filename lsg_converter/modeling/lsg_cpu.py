"""LSG attention of the text queries on a CPU, one block after the other, so that what a block sees stays in the cache.

The keys of a block are brought together when it is their turn, in the forward and again in the backward pass: nothing
that grows with the windows is kept. Equal to the kernels of `lsg_attention` to rounding; it has no dropout.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .lsg_layout import Sequence, Window


def cpu_kernel_serves(query: torch.Tensor, dropout: float) -> bool:
    """Whether `blockwise_attention` can do what is asked: it is neither traced nor compiled."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return query.device.type == "cpu" and dropout == 0.0 and not traced


def blockwise_attention(query: torch.Tensor, sequences: list[Sequence], block_size: int) -> torch.Tensor:
    """Attend from each block to what it sees of the `sequences`, with scores scaled by `1 / sqrt(head_dim)`.

    Args:
        query: shape (batch, heads, blocks * block_size, head_dim).

    Returns:
        The shape of `query`; zero where a query has no key.
    """
    windows = [sequence.windows for sequence in sequences]
    keeps = [sequence.keep for sequence in sequences]
    states = [states.to(query.dtype) for sequence in sequences for states in (sequence.key, sequence.value)]
    return Blockwise.apply(block_size, windows, keeps, query, *states)


def places(block: int, windows: list[tuple[Window, ...]], lengths: list[int]) -> Iterator[tuple[int, slice]]:
    """What a block sees: the numbers of sequences, and the parts of them that exist."""
    for number, (sequence_windows, length) in enumerate(zip(windows, lengths, strict=True)):
        for window in sequence_windows:
            start = window.offset + block * window.step
            part = slice(max(start, 0), min(start + window.size, length))
            if part.start < part.stop:
                yield number, part


class Blockwise(torch.autograd.Function):
    """Torch's fused attention for CPUs, called once for each block, and its backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        block_size: int,
        windows: list[tuple[Window, ...]],
        keeps: list[torch.Tensor],
        query: torch.Tensor,
        *states: torch.Tensor,
    ) -> torch.Tensor:
        output = torch.empty_like(query)
        normalizers = []
        for block in range(query.shape[2] // block_size):
            rows = slice(block * block_size, (block + 1) * block_size)
            key, value, mask = gather(block, windows, keeps, states, query)
            part, normalizer = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query[:, :, rows], key, value, attn_mask=mask
            )
            output[:, :, rows] = part
            normalizers.append(normalizer)
        ctx.save_for_backward(query, output, *normalizers, *states)
        ctx.block_size, ctx.windows, ctx.keeps = block_size, windows, keeps
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        count = len(ctx.windows)
        query, output, *rest = ctx.saved_tensors
        normalizers, states = rest[: -2 * count], rest[-2 * count :]
        grad_query = torch.empty_like(query)
        # A key's gradient is a sum over blocks, which half precision would round each time.
        wide = torch.promote_types(query.dtype, torch.float32)
        grads = [torch.zeros(tensor.shape, dtype=wide) for tensor in states]
        lengths = [keep.shape[-1] for keep in ctx.keeps]
        for block, normalizer in enumerate(normalizers):
            rows = slice(block * ctx.block_size, (block + 1) * ctx.block_size)
            key, value, mask = gather(block, ctx.windows, ctx.keeps, states, query)
            grad_rows, *grad_parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad[:, :, rows], query[:, :, rows], key, value, output[:, :, rows], normalizer, 0.0, False,
                attn_mask=mask,
            )  # fmt: skip
            grad_query[:, :, rows] = grad_rows
            start = 0
            for number, part in places(block, ctx.windows, lengths):
                size = part.stop - part.start
                for offset, grad_part in enumerate(grad_parts):
                    grads[2 * number + offset][:, :, part] += grad_part[:, :, start : start + size]
                start += size
        return None, None, None, grad_query, *(grad.to(query.dtype) for grad in grads)


def gather(
    block: int,
    windows: list[tuple[Window, ...]],
    keeps: list[torch.Tensor],
    states: tuple[torch.Tensor, ...] | list[torch.Tensor],
    query: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The keys and the values that a block sees, and what is added to its scores, or None where it sees all of them."""
    seen = list(places(block, windows, [keep.shape[-1] for keep in keeps]))
    key, value = (torch.cat([states[2 * number + i][:, :, part] for number, part in seen], dim=2) for i in (0, 1))
    if all(bool(keeps[number][:, :, part].all()) for number, part in seen):
        return key, value, None
    heads = max(keeps[number].shape[1] for number, _ in seen)
    keep = torch.cat([keeps[number][:, :, part].expand(-1, heads, -1) for number, part in seen], dim=2)
    mask = torch.zeros(keep.shape, dtype=query.dtype).masked_fill_(~keep, float("-inf"))
    return key, value, mask[:, :, None]
