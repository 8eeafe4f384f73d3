"""A bias by distance: what models with relative positions add to the scaled scores.

It is a table, of shape (heads, 2 R + 1): to the score of a query at place `p` and a key at place `p'` it adds
`table[:, R + p - p']`; a distance beyond `R` counts as `R`. A sparse key that is a token has its place, one that stands
for several tokens the mean of theirs, rounded half to even. A global token has no place: there is no bias to it or from
it. No scores of all queries with all keys are made of it, but where all of them are attended to.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn


def distance_bias(bias: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
    """What a table, (heads, 2 R + 1), adds at distances, int64, of shape (..., heads or 1, blocks, queries, keys)."""
    heads, reach = bias.shape[0], bias.shape[1] // 2
    head = torch.arange(heads, device=bias.device)[:, None, None, None]
    return bias[head, distance.clamp(-reach, reach) + reach]


def full_bias(bias: torch.Tensor, num_global_tokens: int, length: int) -> torch.Tensor:
    """For full attention of a text of `length` tokens and the global tokens: (heads, g + t, g + t)."""
    place = torch.arange(length, device=bias.device)
    text = distance_bias(bias, (place[:, None] - place)[None, None])[:, 0]
    return F.pad(text, (num_global_tokens, 0, num_global_tokens, 0))


def bias_table(embedding: nn.Embedding, bucket: Callable[[torch.Tensor], torch.Tensor], reach: int) -> torch.Tensor:
    """The table of a model that learns a number for each bucket of distances, and each head.

    Args:
        embedding: of the buckets: (buckets, heads).
        bucket: of `p' - p`, a key's place less a query's.
        reach: the distance from which on there are no other buckets.
    """
    distance = torch.arange(-reach, reach + 1, device=embedding.weight.device)
    return embedding(bucket(-distance)).T
