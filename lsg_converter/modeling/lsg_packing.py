"""Rows end to end: the real tokens of a batch, without its padding, as one row."""

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from .lsg_cpu import cpu_kernel_serves


def find_row_lengths(attention_mask: torch.Tensor, kernel: str) -> list[int] | None:
    """How many tokens each row of a batch has up to its last real one, the globals included; None where all rows have
    as many, or where the kernel cannot do with the real tokens alone. `attention_mask` is (batch, 1, 1, g + t)."""
    if kernel not in ("sdpa", "cpu") or torch.compiler.is_compiling() or not cpu_kernel_serves(attention_mask):
        return None
    keep = attention_mask[:, 0, 0]
    lengths = (keep * torch.arange(1, keep.shape[1] + 1)).amax(dim=1).clamp(min=1).tolist()
    return None if min(lengths) == keep.shape[1] else lengths


def pack_rows(
    states: torch.Tensor, attention_mask: torch.Tensor, row_lengths: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put the real tokens of rows end to end: states to (1, all tokens, width), the mask to (1, 1, 1, all tokens)."""
    rows = zip(states.unbind(), attention_mask[:, 0, 0].unbind(), row_lengths, strict=True)
    packed, keep = zip(*((row[:length], mask[:length]) for row, mask, length in rows), strict=True)
    return torch.cat(packed)[None], torch.cat(keep)[None, None, None]


def unpack_rows(states: torch.Tensor, row_lengths: list[int] | None, length: int) -> torch.Tensor:
    """The reverse, with zeros behind the real tokens: (1, all tokens, width) to (batch, length, width). Nothing to do
    where `row_lengths` is None."""
    if row_lengths is None:
        return states
    padded = pad_sequence(states[0].split(row_lengths), batch_first=True)
    return F.pad(padded, (0, 0, 0, length - padded.shape[1]))
