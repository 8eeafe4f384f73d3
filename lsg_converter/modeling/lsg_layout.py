"""Blocks and windows: which keys a block of queries sees (arXiv 2210.15497, section 3).

A text of `t` tokens is cut into blocks of `B`. The queries of block `i` see the text keys of the blocks
`i - 1`, `i`, `i + 1`, and, in the sparse sequence of `t / f` keys, the `S` keys that end where this local
window begins and the `S` keys that begin where it ends. In the causal form block `i` sees the blocks `i - 1` and `i`,
this one up to each query, and the `S` sparse keys on the left.
"""

import hashlib
import itertools
from typing import Any, NamedTuple

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


def require(field: str, value: Any, holds: bool, allowed: str) -> None:
    """Raise, unless a field's value is allowed.

    Raises:
        ValueError: which names the field, what was got and what is allowed.
    """
    if not holds:
        raise ValueError(f"{field}: got {value!r}; allowed is {allowed}")


def is_exporting() -> bool:
    """Whether a graph is being made that leaves this process and is to be right for texts of every length: by
    `torch.export`, an ONNX exporter, or `torch.jit.trace`. No branch may then depend on a length."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


class Window(NamedTuple):
    """The keys that each block of queries sees of one sequence: block `i` sees `[offset + i * step, ... + size)`.

    A step of 0 means that all blocks see the same.
    """

    offset: int
    size: int
    step: int


class LSGLayout(NamedTuple):
    """The sizes of LSG attention, and what follows from them: which keys a block of queries sees.

    Attributes:
        num_global_tokens: tokens in front of the text, which see all tokens and which all tokens see.
        block_size: tokens in a block of text.
        sparse_block_size: sparse keys that a block sees on each side; 0 where there are no sparse keys.
        sparsity_factor: tokens of text for each sparse key; 1 where there are no sparse keys.
        full_attention_length: the longest text that gets ordinary full attention; two blocks where it says less.
        causal: whether a token of text sees none behind it. Then a global token sees nothing at all: its output is its
            query, so that no text looks ahead through it.
    """

    num_global_tokens: int
    block_size: int
    sparse_block_size: int
    sparsity_factor: int
    full_attention_length: int = 0
    causal: bool = False

    @classmethod
    def from_fields(
        cls,
        num_global_tokens: int,
        block_size: int,
        sparse_block_size: int,
        sparsity_factor: int,
        sparsity_type: str | None,
        full_attention_length: int | None = None,
        causal: bool = False,
    ) -> "LSGLayout":
        """The layout that the fields of a configuration ask for. It is decided here whether there are sparse keys.

        Raises:
            ValueError: where a causal one is to give more than two blocks full attention: what a token sees would then
                depend on how long the text behind it is.
        """
        if sparsity_type in (None, "none") or not sparse_block_size or not sparsity_factor:
            sparse_block_size, sparsity_factor = 0, 1
        full = full_attention_length or 0
        if causal and full > 2 * block_size:
            raise ValueError(
                f"full_attention_length: got {full}; the causal form allows two blocks, {2 * block_size}, or none"
            )
        return cls(num_global_tokens, block_size, sparse_block_size, sparsity_factor, full, causal)

    @property
    def chunk_size(self) -> int:
        """Tokens of the chunks in which "norm" and "lsh" look for sparse keys."""
        return min(self.block_size, self.sparse_block_size)

    @property
    def sparse_step(self) -> int:
        """Sparse keys that one block of text is shortened to."""
        return self.block_size // self.sparsity_factor

    def is_short(self, text_length: int) -> bool:
        """Whether a text of so many tokens gets ordinary full attention. An exported graph has no form of its own for
        those: the one for long texts gives the same."""
        return not is_exporting() and text_length <= max(2 * self.block_size, self.full_attention_length)

    @property
    def mixes_full_attention(self) -> bool:
        """Whether a row may need full attention beside longer ones. (In one of two blocks the windows show all.)"""
        return self.full_attention_length > 2 * self.block_size

    @property
    def reach(self) -> int:
        """More than any token of text, or sparse key, is away from a query that sees it: a multiple of the block."""
        sparse_blocks = -(-self.sparse_block_size // self.sparse_step)
        full_blocks = -(-self.full_attention_length // self.block_size)
        return max(2 + sparse_blocks, full_blocks) * self.block_size

    def num_blocks(self, text_length: int) -> int:
        """Blocks of a text, the last of which may be padded."""
        return -(-text_length // self.block_size)

    def num_sparse_keys(self, text_length: int) -> int:
        """Sparse keys of a text, padded to whole blocks."""
        return self.num_blocks(text_length) * self.sparse_step if self.sparse_block_size else 0

    @property
    def global_window(self) -> Window:
        """The global tokens, which all blocks see."""
        return Window(offset=0, size=self.num_global_tokens, step=0)

    @property
    def local_window(self) -> Window:
        """Of the text: a block and the two beside it; in the causal form the one before it."""
        blocks = 2 if self.causal else 3
        return Window(offset=-self.block_size, size=blocks * self.block_size, step=self.block_size)

    @property
    def sparse_windows(self) -> tuple[Window, ...]:
        """Of the sparse sequence: the keys up to where the local window begins, and, but for the causal form, those
        from where it ends."""
        size, step = self.sparse_block_size, self.sparse_step
        if not size:
            return ()
        left = Window(offset=-step - size, size=size, step=step)
        return (left,) if self.causal else (left, Window(offset=2 * step, size=size, step=step))


class KeyValues(NamedTuple):
    """Keys and values that blocks see through `windows`: (batch, heads, length, head_dim) each, and `mask`, which is
    boolean, of shape (batch, heads or 1, length), and True where a key may be attended to."""

    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor
    windows: tuple[Window, ...]


class SparseKeys(NamedTuple):
    """The sparse sequence of a text.

    Attributes:
        mask: boolean, shape (batch, 1 or heads, sparse keys): True where one may be attended to.
        key, value: shape (batch, heads, sparse keys, head_dim); None where `token_index` says which they are.
        token_index: which tokens they are, counted through all rows of the batch, the globals included: int64, of shape
            (batch, heads, sparse keys). No two that the mask keeps are the same.
        place: where they stand, counted likewise: int64, of shape (batch, 1 or heads, sparse keys). That of a masked
            one means nothing. None where nobody asked for it.
    """

    mask: torch.Tensor
    key: torch.Tensor | None = None
    value: torch.Tensor | None = None
    token_index: torch.Tensor | None = None
    place: torch.Tensor | None = None


def pad_to_multiple(sequence: torch.Tensor, multiple: int, dim: int) -> torch.Tensor:
    """Pad `sequence` with zeros (or False) at the end of `dim`, to a multiple of `multiple`.

    A compiled or exported graph does so without a look at the length, by zero too, and so serves all; an exported one
    pads by one multiple more.
    """
    length = sequence.shape[dim]
    exporting = is_exporting()
    # Two multiples at least in an exported graph, since torch makes one for any number but 0 and 1.
    end = (length + (2 if exporting else 1) * multiple - 1) // multiple * multiple
    if not exporting and not torch.compiler.is_compiling() and end == length:
        return sequence
    return F.pad(sequence, [0, 0] * (sequence.dim() - 1 - dim % sequence.dim()) + [0, end - length])


def take_first(sequence: torch.Tensor, length: int) -> torch.Tensor:
    """The first tokens of a sequence, of shape (batch, heads, tokens, ...); it has as many, but in an exported graph,
    where the last stands in for those that it lacks."""
    if not is_exporting():
        return sequence[:, :, :length]
    # A slice would bring conditions on its length.
    place = torch.arange(length, device=sequence.device)
    return sequence.index_select(2, place.clamp(max=sequence.shape[2] - 1))


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
        sequence: shape (batch, heads, num_blocks * window.step, ...), with at most one more dimension; of any length
            where that step is 0.
        window: which part of it block `i` sees.
        num_blocks: how many blocks of queries there are.

    Returns:
        Shape (batch, heads, num_blocks, window.size, ...). What lies outside the sequence is zero, or False.
    """
    if window.step == 0:
        same = sequence[:, :, None, window.offset : window.offset + window.size]
        return same.expand(-1, -1, num_blocks, *same.shape[3:])
    before, behind = max(-window.offset, 0), max(window.offset + window.size - window.step, 0)
    padded = F.pad(sequence, [0, 0] * (sequence.dim() - 3) + [before, behind])
    first = window.offset + before
    if is_exporting():  # ONNX has no `unfold` of a length that varies.
        starts = first + window.step * torch.arange(num_blocks, device=sequence.device)
        return padded[:, :, starts[:, None] + torch.arange(window.size, device=sequence.device)]
    end = first + (num_blocks - 1) * window.step + window.size
    windows = padded[:, :, first:end].unfold(2, window.size, window.step)
    return windows if sequence.dim() == 3 else windows.transpose(-1, -2)
