"""A bias by distance: what models with relative positions add to the scaled scores.

It is a table, of shape (heads, 2 R + 1): to the score of a query at place `p` and a key at place `p'` it adds
`table[:, R + p - p']`; a distance beyond `R` counts as `R`. Or it is made of products with embeddings of the distance,
`RelativeEmbeddings`. A sparse key that is a token has its place, one that stands for several tokens the mean of theirs,
rounded half to even. A global token has no place: there is no bias to it or from it. No scores of all queries with all
keys are made of it, but where all of them are attended to.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class RelativeEmbeddings(NamedTuple):
    """The terms of DeBERTa (arXiv 2006.03654): to the score of a query at place `p` and a key at place `p'` they add
    `(query . keys[row] + key . queries[row]) / sqrt(head_dim)`, where `row` is `rows[R + p - p']`; a distance beyond
    `R` counts as `R`.

    Attributes:
        keys: what queries are multiplied with, (heads, embeddings, head_dim); None where there is no such term.
        queries: what keys are multiplied with, likewise.
        rows: which embedding stands for a distance, int64, (2 R + 1,); they do not fall as it grows.
    """

    keys: torch.Tensor | None
    queries: torch.Tensor | None
    rows: torch.Tensor

    def rows_at(self, distance: torch.Tensor) -> torch.Tensor:
        """Which embedding stands for a distance of a key from a query, int64, of any shape."""
        reach = len(self.rows) // 2
        return self.rows[distance.clamp(-reach, reach) + reach]


Bias = torch.Tensor | RelativeEmbeddings


Products = tuple[torch.Tensor | None, torch.Tensor | None]


def products(bias: Bias, query: torch.Tensor, key: torch.Tensor) -> Products:
    """Of queries and of keys, (batch, heads, tokens, head_dim), with the embeddings that they are multiplied with:
    (batch, heads, tokens, embeddings) each; None where there are none."""
    tables: Products = (bias.keys, bias.queries) if isinstance(bias, RelativeEmbeddings) else (None, None)
    of_query, of_key = (
        None if table is None else states @ table.transpose(1, 2) * states.shape[-1] ** -0.5
        for states, table in zip((query, key), tables, strict=True)
    )
    return of_query, of_key


def added_scores(
    bias: Bias, of_query: torch.Tensor | None, of_key: torch.Tensor | None, distance: torch.Tensor
) -> torch.Tensor:
    """What is added to the scores of blocks of queries with the keys that each sees.

    Args:
        of_query, of_key: what `products` gives for them, (batch, heads, blocks, queries or keys, embeddings).
        distance: of a key from a query, int64, (batch or 1, heads or 1, blocks or 1, queries, keys).

    Returns:
        Shape (batch, heads, blocks, queries, keys), where a table has 1 for what the distances have once.
    """
    if not isinstance(bias, RelativeEmbeddings):
        return distance_bias(bias, distance)
    row = bias.rows_at(distance)
    terms = []
    if of_query is not None:
        terms.append(of_query.gather(-1, row.expand(*of_query.shape[:4], -1)))
    if of_key is not None:
        row = row.transpose(-1, -2)
        terms.append(of_key.gather(-1, row.expand(*of_key.shape[:4], -1)).transpose(-1, -2))
    return terms[0] if len(terms) == 1 else terms[0] + terms[1]


def distance_bias(bias: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
    """What a table, (heads, 2 R + 1), adds at distances, int64, of shape (..., heads or 1, blocks, queries, keys)."""
    heads, reach = bias.shape[0], bias.shape[1] // 2
    head = torch.arange(heads, device=bias.device)[:, None, None, None]
    return bias[head, distance.clamp(-reach, reach) + reach]


def in_line(bias: Bias, reach: int) -> Products:
    """In the order of distances, from `-reach` to `reach - 1`: what queries and what keys are multiplied with, of shape
    (heads, 2 reach, head_dim) each, or None; of a table, what is added for any key, (heads, 2 reach)."""
    if isinstance(bias, RelativeEmbeddings):
        rows = bias.rows_at(torch.arange(-reach, reach, device=bias.rows.device))
        keys, queries = (None if table is None else table[:, rows] for table in bias[:2])
        return keys, queries
    own = bias.shape[1] // 2
    return None, bias[:, torch.arange(-reach, reach, device=bias.device).clamp(-own, own) + own]


def full_scores(bias: Bias, query: torch.Tensor, key: torch.Tensor, num_global_tokens: int) -> torch.Tensor:
    """What is added where all tokens attend to all, of shape (batch, heads, g + t, head_dim) each: (batch or 1, heads,
    g + t, g + t)."""
    g, place = num_global_tokens, torch.arange(query.shape[2] - num_global_tokens, device=query.device)
    distance = (place[:, None] - place)[None, None, None]
    of_query, of_key = (None if x is None else x[:, :, None] for x in products(bias, query[:, :, g:], key[:, :, g:]))
    text = added_scores(bias, of_query, of_key, distance)[:, :, 0]
    return F.pad(text, (g, 0, g, 0))


def bias_table(embedding: nn.Embedding, bucket: Callable[[torch.Tensor], torch.Tensor], reach: int) -> torch.Tensor:
    """The table of a model that learns a number for each bucket of distances, and each head.

    Args:
        embedding: of the buckets: (buckets, heads).
        bucket: of `p' - p`, a key's place less a query's.
        reach: the distance from which on there are no other buckets.
    """
    distance = torch.arange(-reach, reach + 1, device=embedding.weight.device)
    return embedding(bucket(-distance)).T
