"""Blocks and windows: which keys a block of queries sees (arXiv 2210.15497, section 3).

A text of `t` tokens is cut into blocks of `B`. The queries of block `i` see the text keys of the blocks
`i - 1`, `i`, `i + 1`, and, in the sparse sequence of `t / f` keys, the `S` keys that end where this local
window begins and the `S` keys that begin where it ends.
"""

import hashlib
import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F


def operator_namespace(module: str) -> str:
    """Where the operators of a module belong, one of which is `attention`.

    Several checkpoints, each with its own copy of these files, may be loaded in one process, and one of them anew: each
    has its own operators. To define one again would take it away from the models that use it.
    """
    first = name = f"lsg_{hashlib.sha256(module.encode()).hexdigest()[:16]}"
    for number in itertools.count(2):
        if not hasattr(getattr(torch.ops, name), "attention"):
            break
        name = f"{first}_{number}"
    return name


class Window(NamedTuple):
    """The keys that each block sees of one sequence: block `i` sees `[offset + i * step, ... + size)`.

    A step of 0 means that all blocks see the same.
    """

    offset: int
    size: int
    step: int


class Sequence(NamedTuple):
    """Keys and values that blocks see through `windows`: (batch, heads, length, head_dim) each, and `keep`, which is
    boolean, of shape (batch, heads or 1, length)."""

    key: torch.Tensor
    value: torch.Tensor
    keep: torch.Tensor
    windows: tuple[Window, ...]


def local_window(block_size: int) -> Window:
    """The three text blocks around a block."""
    return Window(offset=-block_size, size=3 * block_size, step=block_size)


def sparse_windows(block_size: int, sparse_block_size: int, sparsity_factor: int) -> tuple[Window, Window]:
    """The sparse keys on the left and on the right of the local window."""
    step = block_size // sparsity_factor
    return (
        Window(offset=-step - sparse_block_size, size=sparse_block_size, step=step),
        Window(offset=2 * step, size=sparse_block_size, step=step),
    )


def pad_to_multiple(sequence: torch.Tensor, multiple: int, dim: int) -> torch.Tensor:
    """Pad `sequence` with zeros (or False) at the end of `dim`, to a multiple of `multiple`."""
    missing = -sequence.shape[dim] % multiple
    if missing == 0:
        return sequence
    return F.pad(sequence, [0, 0] * (sequence.dim() - 1 - dim % sequence.dim()) + [0, missing])


def flat_rows(index: torch.Tensor) -> torch.Tensor:
    """Where in a tensor (tokens, heads, head_dim), with its first two dimensions made one, the tokens at `index` stand:
    (batch, heads, n) to (batch * n * heads)."""
    heads = index.shape[1]
    return (index * heads + torch.arange(heads, device=index.device)[:, None]).transpose(1, 2).flatten()


def take_rows(tokens: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The tokens whose places are `rows`, as `flat_rows` gives them: of (batch, heads, tokens, head_dim) those of shape
    (batch, heads, n, head_dim)."""
    batch, heads, _, head_dim = tokens.shape
    # As (batch, tokens, heads, head_dim), which is how the projections lay them down, whole rows are copied.
    taken = tokens.transpose(1, 2).reshape(-1, head_dim).index_select(0, rows)
    return taken.view(batch, -1, heads, head_dim).transpose(1, 2)


def take_windows(sequence: torch.Tensor, window: Window, num_blocks: int) -> torch.Tensor:
    """Lay out what each block sees of a sequence.

    Args:
        sequence: shape (batch, heads, length, ...), with at most one more dimension.
        window: which part of it block `i` sees.
        num_blocks: how many blocks of queries there are.

    Returns:
        Shape (batch, heads, num_blocks, window.size, ...). What lies outside the sequence is zero, or False.
    """
    if window.step == 0:
        same = sequence[:, :, None, window.offset : window.offset + window.size]
        return same.expand(-1, -1, num_blocks, *same.shape[3:])
    end = window.offset + (num_blocks - 1) * window.step + window.size
    trailing = [0, 0] * (sequence.dim() - 3)
    # A negative amount of padding cuts: a window on the right does not begin where the sequence does.
    padded = F.pad(sequence, [*trailing, -window.offset, end - sequence.shape[2]])
    windows = padded.unfold(2, window.size, window.step)
    return windows if sequence.dim() == 3 else windows.transpose(-1, -2)
