"""How the rows of a batch lie while layers read them.

Either as one row that holds all, end to end and without padding, for the kernel for CPUs; or, for the others, as rows
that are rolled to the left, so that each begins with its first token. A batch is packed once in front of the layers,
and unpacked once behind them. This file also has the copies of tokens that see all.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .lsg_cpu import cpu_kernel_serves


class Packing(NamedTuple):
    """Where the tokens of a padded batch, (batch, length), lie for the layers.

    Attributes:
        tokens: int64, one-dimensional: which token of the batch stands at each place, counted through all rows.
        shape: of the packed batch, (rows, tokens).
        mask: boolean, shape (rows, 1, 1, tokens): True where a token may be attended to.
        seqlens: the tokens of each row, the globals included, where the packed batch is one row that holds them all.
        first_token: the place in the text of each row's first token, shape (batch,), where it is not always 0.
        batch_shape: (batch, length).
    """

    tokens: torch.Tensor
    shape: tuple[int, int]
    mask: torch.Tensor
    seqlens: list[int] | None
    first_token: torch.Tensor | None
    batch_shape: tuple[int, int]

    def pack(self, states: torch.Tensor) -> torch.Tensor:
        """(batch, length, ...) to (rows, tokens, ...)."""
        # Not `unflatten`: the older exporter to ONNX would take its shape for a constant.
        return states.flatten(0, 1).index_select(0, self.tokens).view(*self.shape, *states.shape[2:])

    def unpack(self, states: torch.Tensor) -> torch.Tensor:
        """The reverse, with zeros for what was left out."""
        batch, length = self.batch_shape
        padded = states.new_zeros(batch * length, states.shape[-1])
        return padded.index_copy(0, self.tokens, states.flatten(0, 1)).view(batch, length, -1)


def pack_batch(attention_mask: torch.Tensor, first_token: torch.Tensor | None, g: int, kernel: str) -> Packing | None:
    """How a batch is packed for a kernel; None where it stays as it is.

    Args:
        attention_mask: boolean, shape (batch, 1, 1, g + t), of globals and text.
        first_token: the place in the text from which on the blocks of a row count, shape (batch,); None for 0.
        g: `num_global_tokens`.
        kernel: as `lsg_attention` takes it.
    """
    mask = attention_mask[:, 0, 0]
    batch, length = mask.shape
    places = torch.arange(length, device=mask.device)
    rows = length * torch.arange(batch, device=mask.device)[:, None]
    start = g if first_token is None else g + first_token[:, None]
    if kernel in ("sdpa", "cpu") and cpu_kernel_serves(mask) and not torch.compiler.is_compiling():
        # A row keeps its first token, also where no key is left of its text.
        last = (mask * places).amax(dim=1, keepdim=True).clamp(min=start)
        kept = (places < g) | ((places >= start) & (places <= last))
        seqlens = kept.sum(dim=1).tolist()
        if min(seqlens) == length:
            return None
        tokens, shape = (rows + places)[kept], (1, sum(seqlens))
    elif first_token is not None:
        # Padding on the left goes behind the text. (No remainder, which ONNX has not of a size that varies.)
        text = g + first_token[:, None] + places[: length - g]
        text = torch.where(text < length, text, text - (length - g))
        tokens = (rows + torch.cat([places[:g].expand(batch, -1), text], dim=1)).flatten()
        shape, seqlens = (batch, length), None
    else:
        return None
    packed_mask = mask.flatten().index_select(0, tokens).view(shape)[:, None, None]
    return Packing(tokens, shape, packed_mask, seqlens, first_token, (batch, length))


class Promotion(NamedTuple):
    """Tokens of the text that see all tokens and that all tokens see, as copies which stand behind the global tokens.

    Where such a token stands in the text it is masked, so that no query sees it twice, and its output is the copy's.

    Attributes:
        copies: in each row; one with fewer such tokens has masked copies beside theirs.
        order: int64, one-dimensional: which token stands at each place of the rows with copies.
        inverse: int64, one-dimensional: at which of those places the output of each token is.
        shape: of the batch with copies, (rows, tokens).
        mask: boolean, of that shape.
        seqlens: the tokens of each row with its copies, where one row holds all.
    """

    copies: int
    order: torch.Tensor
    inverse: torch.Tensor
    shape: tuple[int, int]
    mask: torch.Tensor
    seqlens: list[int] | None

    def insert(self, heads: torch.Tensor) -> torch.Tensor:
        """Put the copies in: (rows, heads, tokens, head_dim), with more tokens."""
        return _take(heads, self.order, self.shape)

    def remove(self, heads: torch.Tensor) -> torch.Tensor:
        """Take them out again, and leave their output where the token stands."""
        rows = self.shape[0]
        return _take(heads, self.inverse, (rows, len(self.inverse) // rows))


def _take(heads: torch.Tensor, index: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    return heads.transpose(1, 2).flatten(0, 1).index_select(0, index).unflatten(0, shape).transpose(1, 2)


def promote(promoted: torch.Tensor, attention_mask: torch.Tensor, packing: Packing | None, g: int) -> Promotion:
    """Promote the tokens of the text that `promoted` says, for the layers of a batch.

    Args:
        promoted: boolean, shape (batch, t).
        attention_mask: boolean, shape (batch, 1, 1, g + t); what is masked is not promoted.
        packing: how the layers see the batch, if it is packed.
        g: `num_global_tokens`.
    """
    mask, seqlens = attention_mask[:, 0, 0], None
    promoted = F.pad(promoted, (g, 0)) & mask
    if packing is not None:
        promoted, mask, seqlens = packing.pack(promoted), packing.mask[:, 0, 0], packing.seqlens
    rows, tokens = mask.shape
    lengths = seqlens or [tokens] * rows
    chosen = [row.nonzero()[:, 0] for row in promoted.flatten().split(lengths)]
    copies = max(map(len, chosen))
    order, masks, inverse = [], [], []
    first = 0
    for row, (own, own_mask) in enumerate(zip(chosen, (mask & ~promoted).flatten().split(lengths), strict=True)):
        places = first + torch.arange(len(own_mask), device=mask.device)
        missing = copies - len(own)  # for which any token stands, masked
        order += [places[:g], first + own, places[:1].expand(missing), places[g:]]
        masks += [own_mask[:g], own_mask.new_ones(len(own)), own_mask.new_zeros(missing), own_mask[g:]]
        # In the rows with copies, of which each row before this one has as many.
        new_places = places + copies * row + copies * (places >= first + g)
        new_places[own] = first + copies * row + g + torch.arange(len(own), device=mask.device)
        inverse.append(new_places)
        first += len(own_mask)
    shape = (1, first + copies * len(chosen)) if seqlens else (rows, tokens + copies)
    new_seqlens = [length + copies for length in seqlens] if seqlens else None
    return Promotion(copies, torch.cat(order), torch.cat(inverse), shape, torch.cat(masks).view(shape), new_seqlens)
