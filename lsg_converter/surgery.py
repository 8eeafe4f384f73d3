"""The two tables that a conversion changes: pure functions of tensors."""

import numpy as np
import torch

from .modeling.lsg_config import MAX_GLOBAL_TOKENS


def longer_positions(table: torch.Tensor, max_sequence_length: int, offset: int = 0) -> torch.Tensor:
    """Repeat the trained rows of a position table until there are `max_sequence_length`.

    Args:
        table: shape (offset + trained positions, width).
        max_sequence_length: rows wanted, beside the `offset` rows before the first position, which stay.

    Returns:
        Shape (offset + max_sequence_length, width).
    """
    special, trained = table[:offset], table[offset:]
    repeats = -(-max_sequence_length // trained.shape[0])
    return torch.cat([special, trained.repeat(repeats, 1)[:max_sequence_length]])


def stretched_positions(table: torch.Tensor, max_sequence_length: int, offset: int = 0) -> torch.Tensor:
    """Stretch the trained rows of a position table over `max_sequence_length` rows, with linear steps between them.

    Args and result are those of `longer_positions`.
    """
    special, trained = table[:offset], table[offset:]
    place = torch.linspace(0, trained.shape[0] - 1, max_sequence_length, dtype=torch.float64)
    return torch.cat([special, _rows_at(trained, place)])


def stepped_positions(table: torch.Tensor, step: int, offset: int = 0) -> torch.Tensor:
    """Put `step - 1` rows between any two trained rows of a position table, with linear steps between them, and as
    many, which are the last trained one, behind that.

    Args:
        table: shape (offset + trained positions, width).
        step: in the result each `step`-th row behind the `offset` rows is a trained one, to the bit.

    Returns:
        Shape (offset + step * trained positions, width).
    """
    special, trained = table[:offset], table[offset:]
    place = torch.arange(step * trained.shape[0], dtype=torch.float64) / step
    rows = _rows_at(trained, place.clamp(max=trained.shape[0] - 1))
    rows[::step] = trained
    return torch.cat([special, rows])


def _rows_at(rows: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """What stands at places between rows, float64 numbers from 0 to the last row's, on the lines between them."""
    low = place.floor().long()
    weight = (place - low)[:, None]
    high = (low + 1).clamp(max=rows.shape[0] - 1)
    return (rows[low].double() * (1 - weight) + rows[high].double() * weight).to(rows.dtype)


def sinusoidal_positions(length: int, table: torch.Tensor) -> torch.Tensor:
    """Pegasus' positions: sines in the first half of the columns, cosines in the second. Shape (length, width), in the
    dtype of `table`, (positions, width)."""
    column, width = np.arange(table.shape[1]), table.shape[1]
    angle = np.arange(length)[:, None] / np.power(10000, 2 * (column // 2) / width)
    return torch.from_numpy(np.concatenate([np.sin(angle[:, 0::2]), np.cos(angle[:, 1::2])], axis=1)).to(table.dtype)


def global_embeddings(
    positions: torch.Tensor, words: torch.Tensor, token_type: torch.Tensor | None, positional_stride: int
) -> torch.Tensor:
    """The rows from which global tokens start: a position, a word, and a token type.

    Args:
        positions: the trained rows of the source's position table, shape (positions, width).
        words: the word part of each row, shape (512, width).
        token_type: embedding of token type 0, shape (width,), or None.
        positional_stride: distance, in trained positions, of successive rows; a power of two up to 512.

    Returns:
        Shape (512, width), in the source's dtype.
    """
    rows = MAX_GLOBAL_TOKENS
    if positions.shape[0] < rows:
        positions = longer_positions(positions, rows)
    per_row = positions.shape[0] // rows
    thinned = positions[: rows * per_row : per_row]
    stride = max(positional_stride // per_row, 1)
    stride = 1 << stride.bit_length() - 1  # it must divide the rows, also where `per_row` is no power of two
    table = thinned.unflatten(0, (rows // stride, stride)).transpose(0, 1).flatten(0, 1).float() + words.float()
    if token_type is not None:
        table = table + token_type.float()
    return table.to(positions.dtype)


def global_words(
    word_embeddings: torch.Tensor, first_id: int | None, other_id: int | None, random_seed: int | None
) -> torch.Tensor:
    """The word part of the global rows: one word for the first, another for the rest.

    Args:
        word_embeddings: shape (vocabulary, width).
        first_id, other_id: the words; None means the mean of all words.
        random_seed: where given, the rest are draws from the normal distribution fitted to the words instead.

    Returns:
        Shape (512, width), float32.
    """
    words = word_embeddings
    mean = words.mean(dim=0, dtype=torch.float32)
    first, other = (mean if index is None else words[index].float() for index in (first_id, other_id))
    rest = other.expand(MAX_GLOBAL_TOKENS - 1, -1)
    if random_seed is not None:
        rest = draw_words(words, rest.shape[0], random_seed)
    return torch.cat([first[None], rest])


def draw_words(word_embeddings: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Draw `count` rows from the normal distribution fitted to a word embedding table of shape (vocabulary, width)."""
    rows, width = word_embeddings.shape
    mean = word_embeddings.mean(dim=0, dtype=torch.float64)
    covariance = torch.zeros(width, width, dtype=torch.float64)
    for part in word_embeddings.split(8192):  # a part at a time, so that the table is never held twice
        centred = part.double() - mean
        covariance += centred.T @ centred / rows
    # By its eigenvectors: a vocabulary smaller than the width has a covariance that is not positive definite.
    values, vectors = torch.linalg.eigh(covariance)
    normal = torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (mean + (normal * values.clamp(min=0).sqrt()) @ vectors.T).float()
