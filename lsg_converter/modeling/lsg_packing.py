"""Rows end to end: a batch without its padding, as one row."""

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from .lsg_cpu import cpu_kernel_serves


def find_seqlens(attention_mask: torch.Tensor, kernel: str) -> list[int] | None:
    """How many tokens each row of a batch has up to its last that is not masked, the globals included; None where all
    rows have as many, or where the kernel takes no packed rows. `attention_mask` is (batch, 1, 1, g + t)."""
    if kernel not in ("sdpa", "cpu") or torch.compiler.is_compiling() or not cpu_kernel_serves(attention_mask):
        return None
    mask = attention_mask[:, 0, 0]
    seqlens = (mask * torch.arange(1, mask.shape[1] + 1)).amax(dim=1).clamp(min=1).tolist()
    return None if min(seqlens) == mask.shape[1] else seqlens


def pack_rows(
    states: torch.Tensor, attention_mask: torch.Tensor, seqlens: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put rows end to end, without their padding: states to (1, tokens, width), the mask to (1, 1, 1, tokens)."""
    rows = zip(states.unbind(), attention_mask[:, 0, 0].unbind(), seqlens, strict=True)
    packed, masks = zip(*((row[:length], mask[:length]) for row, mask, length in rows), strict=True)
    return torch.cat(packed)[None], torch.cat(masks)[None, None, None]


def unpack_rows(states: torch.Tensor, seqlens: list[int] | None, length: int) -> torch.Tensor:
    """The reverse, with zeros for padding: (1, tokens, width) to (batch, length, width). Nothing to do where `seqlens`
    is None."""
    if seqlens is None:
        return states
    padded = pad_sequence(states[0].split(seqlens), batch_first=True)
    return F.pad(padded, (0, 0, 0, length - padded.shape[1]))
