"""LSG attention on a CPU: tile by tile, so that the keys that a tile of queries sees stay in the cache.

A tile is a block of text, or some of the queries that see a whole row. Its keys are ranges of tokens and of sparse
keys. They are loaded into a workspace when it is the tile's turn, and again in the backward pass, which computes the
probabilities anew: nothing that grows with the windows is kept. A row takes part up to its last token that is not
masked. Equal to the kernels of `lsg_attention` to rounding.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .lsg_bias import Bias, RelativeEmbeddings
from .lsg_layout import LSGLayout, SparseKeys, Window, flat_rows, is_exporting, operator_namespace


TOKENS, SPARSE = 1, 3  # the numbers of the tensors of keys in `TiledAttention`
MAX_SCORES = 2**18  # of one head in a tile, unless a block of text sees more
THREAD_SCORES = 2**19  # of several heads at a time, for each thread: 2 MiB in float32 stay in most caches
MAX_KINDS = 8  # of tiles whose biases by distance are kept
POOL_STARTS = 2**16  # places where a tile's random bits may begin


def cpu_kernel_serves(query: torch.Tensor) -> bool:
    """Whether `cpu_attention` can do what is asked: an exported or traced model must do without its operators."""
    return query.device.type == "cpu" and not is_exporting()


def cpu_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    sparse: SparseKeys | None,
    seqlens: list[int] | None,
    layout: LSGLayout,
    dropout: float,
    bias: Bias | None = None,
) -> torch.Tensor:
    """Attend, with scores scaled by `1 / sqrt(head_dim)`.

    Args:
        query, key, value: shape (batch, heads, tokens, head_dim); read in place where they are views of contiguous
            tensors of shape (batch, tokens, heads, head_dim).
        attention_mask: boolean, shape (batch, tokens).
        sparse: the sparse keys of the rows; of those that are not short, end to end, where `seqlens` is given.
        seqlens: where a batch of one holds rows end to end, the tokens of each, the globals included.
        bias: added by distance, as `lsg_bias` says; then `sparse` says the places of its keys.

    Returns:
        The shape of `query`; zero where a query has no key, and behind the last token of a row that is not masked.
    """
    batch, heads, tokens, head_dim = query.shape
    sparse = sparse or SparseKeys(attention_mask[:, None, :0])
    rows = None if sparse.token_index is None else flat_rows(sparse.token_index)
    # Rows end to end: (tokens of all rows, heads, head_dim).
    states = [
        None if x is None else x.transpose(1, 2).reshape(-1, heads, head_dim)
        for x in (query, key, value, sparse.key, sparse.value)
    ]
    seed = torch.randint(2**62, (1,)) if dropout else torch.zeros(1, dtype=torch.int64)
    place = None if bias is None or sparse.place is None else sparse.place.transpose(0, 1).flatten(1)
    masks = attention_mask, sparse.mask.transpose(0, 1).flatten(1)
    terms = bias if isinstance(bias, RelativeEmbeddings) else (None, None, None)
    biases = None if isinstance(bias, RelativeEmbeddings) else bias, *terms[:2]
    others = rows, *masks, place, terms[2], seed, seqlens or [], [int(x) for x in layout], dropout
    output = attention(*states, *biases, *others)
    return output.view(batch, tokens, heads, head_dim).transpose(1, 2)


class KeyRange(NamedTuple):
    """The keys `[start, stop)` of a tensor of `TiledAttention`, by its number; their values are in the next one."""

    tensor: int
    start: int
    stop: int


class Tile:
    """The queries `[start, stop)` and the keys that all of them see; `masked` where some of these are masked. The text
    of their row begins at `text`.

    In a causal one, a query sees no key of the tile's own tokens that is behind it. One without keys gives back its
    queries, as those of causal global tokens.
    """

    def __init__(
        self, start: int, stop: int, key_ranges: list[KeyRange], masked: bool, text: int, causal: bool = False
    ) -> None:
        self.start, self.stop, self.key_ranges, self.masked, self.text = start, stop, key_ranges, masked, text
        self.sizes = [keys.stop - keys.start for keys in key_ranges]
        # In a causal tile: the column of its first own token.
        self.diagonal = sum(self.sizes[: key_ranges.index(KeyRange(TOKENS, start, stop))]) if causal else None
        self.num_keys = sum(self.sizes)
        # Several ranges are loaded into a workspace and padded there, since products of odd sizes are slower.
        self.num_columns = self.num_keys if len(key_ranges) == 1 else -(-self.num_keys // 16) * 16

    def split(self, columns: torch.Tensor, dim: int) -> tuple[torch.Tensor, ...]:
        """The columns of each key range, and those of the padding."""
        return columns.split([*self.sizes, self.num_columns - self.num_keys], dim)


def list_tiles(
    attention_mask: torch.Tensor, sparse_mask: torch.Tensor, seqlens: Sequence[int], layout: LSGLayout
) -> Iterator[Tile]:
    """The tiles of rows of `seqlens` tokens that stand end to end."""
    g, block = layout.num_global_tokens, layout.block_size
    end = sparse_end = 0
    for length in seqlens:
        start, sparse_start = end, sparse_end
        end += length
        if not layout.is_short(length - g):  # as `sparsify_packed` decides, which does not look at the mask
            sparse_end += layout.num_sparse_keys(length - g)
        # A row has its first token, also where that one is no key.
        stop = start + max(used_length(attention_mask[start:end]), min(g + 1, length))
        sparse_stop = sparse_start + used_length(sparse_mask[:, sparse_start:sparse_end].any(0))
        text, row = start + g, KeyRange(TOKENS, start, stop)
        short = layout.is_short(stop - text) and not layout.causal  # whose windows show all of two blocks
        masked = not bool(attention_mask[start:stop].all())
        # Queries that see the whole row: all of a short one, else the globals.
        row_stop, step = stop if short else text, max(MAX_SCORES // max(stop - start, 1), 1)
        if layout.causal and g:
            yield Tile(start, text, [], masked, text)
        else:
            for query in range(start, row_stop, step):
                yield Tile(query, min(query + step, row_stop), [row], masked, text)
        if short:
            continue
        masked = masked or not bool(sparse_mask[:, sparse_start:sparse_stop].all())
        for i, query in enumerate(range(text, stop, block)):
            key_ranges = [KeyRange(TOKENS, start, text)] if g else []
            key_ranges += window_ranges(TOKENS, layout.local_window, i, text, stop)
            for window in layout.sparse_windows:
                key_ranges += window_ranges(SPARSE, window, i, sparse_start, sparse_stop)
            yield Tile(query, min(query + block, stop), key_ranges, masked, text, layout.causal)


def window_ranges(tensor: int, window: Window, block: int, start: int, stop: int) -> list[KeyRange]:
    """What a block sees, through a window, of the keys from `start` to `stop`.

    In pieces of one step, where they go into the window: block 3 sees the text blocks 3, 4, 2, and block 4 then 3, 4,
    5. A piece keeps its place in the list, so that `TiledAttention.load` copies the new one alone.
    """
    pieces = window.size // window.step if window.size % window.step == 0 and window.size <= 4 * window.step else 1
    size = window.size // pieces
    first = window.offset + block * window.step
    offsets = [first + piece * size for piece in range(pieces)]
    if pieces > 1:
        offsets.sort(key=lambda offset: offset // size % pieces)
    ranges = (KeyRange(tensor, max(start + offset, start), min(start + offset + size, stop)) for offset in offsets)
    return [keys for keys in ranges if keys.start < keys.stop]


def used_length(mask: torch.Tensor) -> int:
    """How many tokens there are up to the last that is not masked."""
    if mask.numel() == 0 or bool(mask[-1]):
        return mask.numel()
    places = mask.nonzero()
    return int(places[-1]) + 1 if len(places) else 0


class DropoutBits:
    """Random bits for the dropout of all tiles, 16 for each probability.

    Those of a tile are the bits from a random place of one pool on, xor those from a random place of another. Two tiles
    share their bits only where both places are the same. It takes a small part of the time that drawing would.
    """

    def __init__(self, seed: int, dropout: float, num_tiles: int, heads: int, scores: int) -> None:
        """For tiles of at most `scores` scores a head."""
        generator = torch.Generator().manual_seed(seed)
        size = heads * -(-scores // 4) + POOL_STARTS
        self.pools = torch.empty(2, size, dtype=torch.int64).random_(-(2**63), None, generator=generator)
        self.starts = torch.randint(POOL_STARTS, (num_tiles, 2), generator=generator).tolist()
        dropped = round(dropout * 2**16)
        self.last_dropped = dropped - 2**15 - 1  # of the numbers of 16 bits
        self.keep_scale = 1 / max(1 - dropped / 2**16, 2**-16)  # by the share that is kept

    def fill(self, bits: torch.Tensor, tile: int, first_head: int) -> None:
        """Fill an int64 tensor, (heads, numbers), for the tile of that number and the heads from `first_head` on."""
        skipped, count = first_head * bits.shape[1], bits.numel()
        first, second = (
            pool[start + skipped :][:count] for pool, start in zip(self.pools, self.starts[tile], strict=True)
        )
        torch.bitwise_xor(first, second, out=bits.view(-1))


class TileBias:
    """What a table, (heads, 2 * reach + 1), adds to the scores of tiles by distance, and its gradient from theirs.

    `sparse_place` says where sparse keys stand, (1 or heads, sparse keys).
    """

    def __init__(self, table: torch.Tensor, sparse_place: torch.Tensor | None, dtype: torch.dtype) -> None:
        self.table, self.sparse_place, self.reach = table.to(dtype), sparse_place, table.shape[1] // 2
        # Of tokens, which stand in line, by the distance of the first two and how many there are: what is added, or the
        # sum of its gradients. Nearly all tiles are alike in this.
        self.of_tokens: dict[tuple[int, int, int], torch.Tensor] = {}
        self.grad = torch.zeros(table.shape, dtype=torch.promote_types(table.dtype, torch.float32))

    def parts(self, tile: Tile, scores: torch.Tensor) -> Iterator[tuple[KeyRange, slice, torch.Tensor]]:
        """The scores, (heads, queries, columns), of the text to each range of keys that are no global tokens; with it
        that range, and the queries' places."""
        first = max(tile.start, tile.text)
        for keys, part in zip(tile.key_ranges, tile.split(scores[:, first - tile.start :], dim=2), strict=False):
            skipped = max(tile.text - keys.start, 0) if keys.tensor == TOKENS else 0
            if first < tile.stop and keys.start + skipped < keys.stop:
                yield keys._replace(start=keys.start + skipped), slice(first, tile.stop), part[:, :, skipped:]

    def columns(self, queries: slice, key_place: torch.Tensor) -> torch.Tensor:
        """Which columns of the table they are, for keys at `key_place`, (..., keys): (..., queries, keys)."""
        distance = torch.arange(queries.start, queries.stop)[:, None] - key_place[..., None, :]
        return distance.clamp_(-self.reach, self.reach).add_(self.reach)

    def one_column(self, queries: slice, key_place: torch.Tensor) -> int | None:
        """The only column, where all keys are that far to one side, as sparse ones mostly are; else None."""
        low, high = (int(x) for x in key_place.aminmax())
        if high <= queries.start - self.reach:
            return 2 * self.reach
        return 0 if low >= queries.stop - 1 + self.reach else None

    def for_grads(self) -> "TileBias":
        """One that takes gradients."""
        return TileBias(self.table, self.sparse_place, self.table.dtype)

    def add(self, tile: Tile, scores: torch.Tensor, *states: torch.Tensor) -> None:
        """Add to scores, (heads, queries, columns)."""
        heads = len(self.table)
        for keys, queries, part in self.parts(tile, scores):
            if keys.tensor == TOKENS:
                kind = queries.start - keys.start, *part.shape[1:]
                if kind not in self.of_tokens:
                    if len(self.of_tokens) > MAX_KINDS:
                        self.of_tokens.clear()
                    columns = self.columns(queries, torch.arange(keys.start, keys.stop))
                    self.of_tokens[kind] = self.table.index_select(1, columns.flatten()).view(part.shape)
                part += self.of_tokens[kind]
                continue
            place = self.sparse_place[:, keys.start : keys.stop]  # type: ignore[index]
            column = self.one_column(queries, place)
            if column is not None:
                part += self.table[:, column, None, None]
            else:
                columns = self.columns(queries, place).expand(heads, -1, -1)
                part += self.table.gather(1, columns.flatten(1)).view(part.shape)

    def add_grad(self, tile: Tile, grad_scores: torch.Tensor, *states: torch.Tensor) -> None:
        """Add to `grad` what comes of the gradients of a tile's scores."""
        for keys, queries, part in self.parts(tile, grad_scores):
            if keys.tensor == TOKENS:
                kind = queries.start - keys.start, *part.shape[1:]
                if kind in self.of_tokens:
                    self.of_tokens[kind] += part
                else:
                    if len(self.of_tokens) > MAX_KINDS:
                        self.finish_grad()
                    self.of_tokens[kind] = part.to(self.grad.dtype, copy=True)
                continue
            place = self.sparse_place[:, keys.start : keys.stop]  # type: ignore[index]
            column = self.one_column(queries, place)
            if column is not None:
                self.grad[:, column] += part.sum(dim=(1, 2), dtype=self.grad.dtype)
            else:
                columns = self.columns(queries, place).expand(len(self.table), -1, -1)
                self.grad.scatter_add_(1, columns.flatten(1), part.flatten(1).to(self.grad.dtype))

    def finish_grad(self) -> torch.Tensor:
        """The gradient of the table."""
        for (distance, _, num_keys), total in self.of_tokens.items():
            queries = slice(distance, distance + total.shape[1])
            self.grad.index_add_(1, self.columns(queries, torch.arange(num_keys)).flatten(), total.flatten(1))
        self.of_tokens.clear()
        return self.grad

    def finish_grads(self, grads: Sequence[torch.Tensor]) -> None:
        """Add the gradient of the table to those of the tensors of `attention`."""
        grads[5][:, 0] += self.finish_grad()


class Product(NamedTuple):
    """A product of queries or keys with embeddings of distances, in which scores find what is added to them.

    Attributes:
        columns: of the tile's keys that are multiplied; None where its queries are.
        embeddings: shape (heads, n, head_dim).
        grad: of these embeddings.
        targets: columns of scores, and where the product, (heads, queries or keys, n), has what is added there: the
            place of the first one in its first row, each row standing one place further on; or an index of all.
    """

    columns: slice | None
    embeddings: torch.Tensor
    grad: torch.Tensor
    targets: list[tuple[slice, int | torch.Tensor]]


class TileTerms:
    """What products with embeddings of distances add to the scores of tiles, and the gradients that come of theirs.

    Tokens that stand in line have distances in line: a product with the embeddings of these, in their order, holds what
    is added to scores as it is. Of sparse keys, which stand apart, that is gathered.
    """

    def __init__(
        self, terms: RelativeEmbeddings, sparse_place: torch.Tensor | None, attention: "TiledAttention"
    ) -> None:
        self.rows, self.reach, self.sparse_place, self.attention = (
            terms.rows,
            len(terms.rows) // 2,
            sparse_place,
            attention,
        )
        self.tables = [None if table is None else table.to(attention.dtype) for table in terms[:2]]
        wide = torch.promote_types(attention.dtype, torch.float32)
        self.grads = [None if table is None else torch.zeros(table.shape, dtype=wide) for table in terms[:2]]
        # Of distances in line, by which table they are of, the first and the last: embeddings, and their gradients.
        self.in_line: dict[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def for_grads(self) -> "TileTerms":
        """What takes gradients."""
        return self

    def rows_at(self, distance: torch.Tensor) -> torch.Tensor:
        """Which embedding stands for a distance."""
        return self.rows[distance.clamp_(-self.reach, self.reach).add_(self.reach)]

    def rows_in_line(self, first: int, last: int) -> torch.Tensor:
        """Which embeddings stand for the distances from the first to the last, whichever is larger."""
        step = 1 if last >= first else -1
        return self.rows_at(torch.arange(first, last + step, step))

    def embeddings_in_line(self, table: int, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The embeddings of these distances, (heads, distances, head_dim), and their gradients."""
        kind = table, first, last
        if kind not in self.in_line:
            if len(self.in_line) >= 4 * MAX_KINDS:
                self.finish_in_line()
            embeddings = self.tables[table].index_select(1, self.rows_in_line(first, last))  # type: ignore[union-attr]
            self.in_line[kind] = embeddings, torch.zeros(embeddings.shape, dtype=self.grads[table].dtype)  # type: ignore[union-attr]
        return self.in_line[kind]

    def products(self, tile: Tile) -> Iterator[Product]:
        """All products for a tile."""
        first, last, start = max(tile.start, tile.text), tile.stop - 1, 0
        tokens: list[tuple[int, int, slice]] = []
        sparse: list[tuple[int, int, slice]] = []
        for keys, size in zip(tile.key_ranges, tile.sizes, strict=True):
            skipped = max(tile.text - keys.start, 0) if keys.tensor == TOKENS else 0  # the global tokens
            if skipped < size and first <= last:
                part = keys.start + skipped, keys.stop - 1, slice(start + skipped, start + size)
                (tokens if keys.tensor == TOKENS else sparse).append(part)
            start += size
        if tokens and self.tables[0] is not None:
            low, high = min(part[0] for part in tokens), max(part[1] for part in tokens)
            targets: list[Any] = [(columns, last - first + begin - low) for begin, _, columns in tokens]
            yield Product(None, *self.embeddings_in_line(0, last - low, first - high), targets)
        for begin, end, columns in tokens if self.tables[1] is not None else ():
            yield Product(columns, *self.embeddings_in_line(1, first - end, last - begin), [(columns, end - begin)])
        for begin, end, columns in sparse:
            place = self.sparse_place[:, begin : end + 1, None]  # type: ignore[index]
            index = self.rows_at(torch.arange(first, last + 1) - place)
            low, high = (int(x) for x in index.aminmax())
            low -= low % 16  # for fewer shapes
            used = slice(low, high + 16 - high % 16)
            index = index.sub_(low).expand(self.attention.heads, -1, -1)
            for table, (embeddings, grad) in enumerate(zip(self.tables, self.grads, strict=True)):
                if embeddings is not None and grad is not None:
                    target = columns, index if table else index.transpose(1, 2)
                    yield Product(columns if table else None, embeddings[:, used], grad[:, used], [target])

    def targets(
        self, tile: Tile, scores: torch.Tensor, product: Product
    ) -> Iterator[tuple[torch.Tensor, int | torch.Tensor]]:
        """The scores, (heads, queries or keys, keys or queries), that a product adds to, and where it has that."""
        text = scores[:, max(tile.text - tile.start, 0) :]
        for columns, where in product.targets:
            yield text[:, :, columns] if product.columns is None else text[:, :, columns].transpose(1, 2), where

    def states(self, tile: Tile, product: Product, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """The queries or keys that are multiplied; or their gradients."""
        return query[:, max(tile.text - tile.start, 0) :] if product.columns is None else key[:, product.columns]

    def add(self, tile: Tile, scores: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> None:
        """Add to scores, (heads, queries, columns), of queries and keys, (heads, queries or columns, head_dim)."""
        attention = self.attention
        for product in self.products(tile):
            states = self.states(tile, product, query, key)
            values = attention.matmul("terms", states, product.embeddings.transpose(1, 2), attention.scale)
            for part, where in self.targets(tile, scores, product):
                part += skewed(values, where, part.shape[2]) if isinstance(where, int) else values.gather(2, where)

    def add_grad(self, tile: Tile, grad_scores: torch.Tensor, *states: torch.Tensor) -> None:
        """Add what comes of the gradients of a tile's scores to our own, and to those of its queries and keys; `states`
        are queries, keys, and the gradients of either."""
        attention = self.attention
        for product in self.products(tile):
            own, grad = (self.states(tile, product, *pair) for pair in (states[:2], states[2:]))
            values = attention.workspace("terms", *own.shape[:2], product.embeddings.shape[1]).zero_()
            for part, where in self.targets(tile, grad_scores, product):
                if isinstance(where, int):
                    skewed(values, where, part.shape[2]).copy_(part)
                else:
                    values.scatter_add_(2, where, part)
            grad += attention.matmul("grad_terms", values, product.embeddings, attention.scale)
            product.grad.add_(attention.matmul("grad_terms", values.transpose(1, 2), own, attention.scale))

    def finish_in_line(self) -> None:
        for (table, first, last), (_, grad) in self.in_line.items():
            self.grads[table].index_add_(1, self.rows_in_line(first, last), grad)  # type: ignore[union-attr]
        self.in_line.clear()

    def finish_grads(self, grads: Sequence[torch.Tensor]) -> None:
        """Add the gradients of the tables to those of the tensors of `attention`."""
        self.finish_in_line()
        for total, own in zip(grads[-2:], self.grads, strict=True):
            if own is not None:
                total += own


def skewed(values: torch.Tensor, start: int, width: int) -> torch.Tensor:
    """Of a contiguous (heads, n, m): `width` of each row, from `start` on in the first, and one before that in each
    row from the last one's."""
    heads, rows, columns = values.shape
    return values.as_strided((heads, rows, width), (rows * columns, columns - 1, 1), start)


class TiledAttention:
    """Forward and backward pass over the tiles of a call, for some of its heads.

    `tensors` are query, key, value, sparse key and sparse value of these heads, (heads, tokens, head_dim).
    """

    def __init__(
        self,
        first_head: int,
        tensors: Sequence[torch.Tensor],
        attention_mask: torch.Tensor,
        sparse_mask: torch.Tensor,
        tiles: Sequence[Tile],
        dropout_bits: DropoutBits | None,
        bias: Bias | None = None,
        sparse_place: torch.Tensor | None = None,
    ) -> None:
        self.tensors, self.tiles, self.first_head = tensors, tiles, first_head
        self.masks = {TOKENS: attention_mask[None], SPARSE: sparse_mask}
        self.dtype = product_dtype(tensors[0].dtype)
        self.heads, _, self.head_dim = tensors[0].shape
        self.scale = self.head_dim**-0.5
        self.bias: TileBias | TileTerms | None = None
        if isinstance(bias, RelativeEmbeddings):
            self.bias = TileTerms(bias, sparse_place, self)
        elif bias is not None:
            self.bias = TileBias(bias, sparse_place, self.dtype)
        self.dropout_bits = dropout_bits
        self.keep_scale = 1.0 if dropout_bits is None else dropout_bits.keep_scale
        self.buffers: dict[str, torch.Tensor] = {}
        self.views: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
        self.loaded: dict[str, tuple[Tile, torch.Tensor, Sequence[torch.Tensor]]] = {}

    def workspace(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Memory that tiles use one after the other: fresh memory costs more than what is computed in it."""
        if (name, shape) in self.views:
            return self.views[name, shape]
        size = math.prod(shape)
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers[name] = torch.empty(size, dtype=dtype or self.dtype)
            self.views = {key: view for key, view in self.views.items() if key[0] != name}
        self.views[name, shape] = self.buffers[name][:size].view(shape)
        return self.views[name, shape]

    def matmul(self, name: str, left: torch.Tensor, right: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """`scale * left @ right`, in the workspace of that name."""
        out = self.workspace(name, self.heads, left.shape[1], right.shape[2])
        return torch.baddbmm(out, left, right, beta=0, alpha=scale, out=out)

    def load_queries(self, tile: Tile, tensor: torch.Tensor) -> torch.Tensor:
        """The rows of a tile's queries in a tensor (heads, tokens, head_dim)."""
        return tensor[:, tile.start : tile.stop].to(self.dtype)

    def load_keys(self, tile: Tile) -> torch.Tensor:
        """The keys that a tile sees, (heads, columns, head_dim)."""
        return self.load("key", tile, 0)

    def load_values(self, tile: Tile) -> torch.Tensor:
        """Their values."""
        return self.load("value", tile, 1)

    def load(self, name: str, tile: Tile, offset: int) -> torch.Tensor:
        if len(tile.key_ranges) == 1:
            keys = tile.key_ranges[0]
            return self.tensors[keys.tensor + offset][:, keys.start : keys.stop].to(self.dtype)
        last, loaded, columns = self.loaded.get(name, (None, None, ()))
        present: Sequence[KeyRange | None] = last.key_ranges if last is not None and last.sizes == tile.sizes else []
        if loaded is None or not present:
            loaded = self.workspace(name, self.heads, tile.num_columns, self.head_dim)
            columns = tile.split(loaded, dim=1)
            columns[-1].zero_()  # the padding
        for target, keys, there in zip_longest(columns[:-1], tile.key_ranges, present):
            if keys != there:  # What the last tile has loaded into the same columns is there.
                target.copy_(self.tensors[keys.tensor + offset][:, keys.start : keys.stop])
        self.loaded[name] = tile, loaded, columns
        return loaded

    def add_grads(self, tile: Tile, grads: Sequence[torch.Tensor], columns: torch.Tensor, offset: int) -> None:
        """Add the gradients of what `load` gave to those of the tensors that it came from."""
        for keys, part in zip(tile.key_ranges, tile.split(columns, dim=1), strict=False):
            grads[keys.tensor + offset][:, keys.start : keys.stop] += part

    def probabilities(self, tile: Tile, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Before dropout: shape (heads, queries, columns)."""
        scores = self.matmul("probabilities", query, key.transpose(1, 2), self.scale)
        if self.bias is not None:
            self.bias.add(tile, scores, query, key)
        if tile.diagonal is not None:
            size = query.shape[1]
            behind = torch.ones(size, size, dtype=torch.bool).triu(1)
            scores[:, :, tile.diagonal : tile.diagonal + size].masked_fill_(behind, -torch.inf)
        if not tile.masked:
            scores[:, :, tile.num_keys :] = -torch.inf
            return torch.softmax(scores, -1, out=scores)
        masks = [self.masks[keys.tensor][:, keys.start : keys.stop].expand(self.heads, -1) for keys in tile.key_ranges]
        masked = ~F.pad(torch.cat(masks, dim=1), (0, tile.num_columns - tile.num_keys))[:, None]
        scores.masked_fill_(masked, torch.finfo(scores.dtype).min)
        return torch.softmax(scores, -1, out=scores).masked_fill_(masked, 0)

    def dropout_mask(self, number: int) -> torch.Tensor | None:
        """One where a probability is kept, zero elsewhere: of the tile with that number, in both passes the same."""
        if self.dropout_bits is None:
            return None
        tile = self.tiles[number]
        mask = self.workspace("mask", self.heads, tile.stop - tile.start, tile.num_columns)
        bits = self.workspace("bits", self.heads, -(-mask[0].numel() // 4), dtype=torch.int64)
        self.dropout_bits.fill(bits, number, self.first_head)
        torch.gt(bits.view(torch.int16)[:, : mask[0].numel()], self.dropout_bits.last_dropped, out=mask.flatten(1))
        return mask

    def forward(self, output: torch.Tensor) -> None:
        """Write the output, (heads, tokens, head_dim)."""
        for number, tile in enumerate(self.tiles):
            if not tile.key_ranges:
                output[:, tile.start : tile.stop] = self.tensors[0][:, tile.start : tile.stop]
                continue
            query = self.load_queries(tile, self.tensors[0])
            probabilities = self.probabilities(tile, query, self.load_keys(tile))
            mask = self.dropout_mask(number)
            if mask is not None:
                probabilities.mul_(mask)
            value = self.load_values(tile)
            output[:, tile.start : tile.stop] = self.matmul("output", probabilities, value, self.keep_scale)

    def backward(self, grad_output: torch.Tensor, grads: Sequence[torch.Tensor]) -> None:
        """Add the gradients of the tensors, and of the bias if there is one, to `grads`."""
        grad_bias = None if self.bias is None else self.bias.for_grads()
        for number, tile in enumerate(self.tiles):
            if not tile.key_ranges:
                grads[0][:, tile.start : tile.stop] = grad_output[:, tile.start : tile.stop]
                continue
            query, grad_rows = (self.load_queries(tile, x) for x in (self.tensors[0], grad_output))
            key, value = self.load_keys(tile), self.load_values(tile)
            probabilities, mask = self.probabilities(tile, query, key), self.dropout_mask(number)
            grad_scores = self.matmul("grad_scores", grad_rows, value.transpose(1, 2), self.keep_scale)
            kept = probabilities
            if mask is not None:
                grad_scores.mul_(mask)
                kept = torch.mul(probabilities, mask, out=mask)
            self.add_grads(tile, grads, self.matmul("grad_keys", kept.transpose(1, 2), grad_rows, self.keep_scale), 1)
            torch.ops.aten._softmax_backward_data.out(
                grad_scores, probabilities, -1, self.dtype, grad_input=grad_scores
            )
            grad_key = self.matmul("grad_keys", grad_scores.transpose(1, 2), query, self.scale)
            grad_query = self.matmul("output", grad_scores, key, self.scale)
            if grad_bias is not None:
                grad_bias.add_grad(tile, grad_scores, query, key, grad_query, grad_key)
            self.add_grads(tile, grads, grad_key, 0)
            grads[0][:, tile.start : tile.stop] = grad_query
        if grad_bias is not None:
            grad_bias.finish_grads(grads)


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which dtype to multiply: where a CPU has no instructions for half precision, its products are slow."""
    fast = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype if dtype not in fast or fast[dtype]() else torch.float32


def head_groups(others: Sequence[torch.Tensor], *inputs: Any) -> Iterator[tuple[TiledAttention, list[torch.Tensor]]]:
    """A call of `attention`, whose inputs these are, for as many heads at a time as the caches have room for; and the
    part of `others`, (tokens, heads, head_dim), that is theirs, (heads, tokens, head_dim)."""
    query, key, value, sparse_key, sparse_value, bias, *terms, rows, mask, sparse_mask, place = inputs[:12]
    bias_rows, seed, seqlens, sizes, dropout = inputs[12:]
    if rows is not None:
        sparse_key, sparse_value = (x.flatten(0, 1).index_select(0, rows).view(-1, *x.shape[1:]) for x in (key, value))
    elif sparse_key is None:
        sparse_key, sparse_value = key[:0], value[:0]
    tensors = query, key, value, sparse_key, sparse_value
    # No `seqlens` stands for the rows of the mask: a list of them would make a graph of `torch.compile` for each batch.
    mask, seqlens = mask.flatten(), seqlens or [mask.shape[1]] * mask.shape[0]
    tiles = list(list_tiles(mask, sparse_mask, seqlens, LSGLayout(*sizes)))
    scores = max(((tile.stop - tile.start) * tile.num_columns for tile in tiles), default=1)
    heads = tensors[0].shape[1]
    dropping = round(dropout * 2**16) and tiles
    dropout_bits = DropoutBits(int(seed), dropout, len(tiles), heads, scores) if dropping else None
    groups = -(-heads // max(torch.get_num_threads() * THREAD_SCORES // scores, 1))
    for group in torch.arange(heads).tensor_split(groups):
        own = slice(int(group[0]), int(group[-1]) + 1)
        own_mask, own_place = (x if x is None or len(x) == 1 else x[own] for x in (sparse_mask, place))
        own_bias: Bias | None = None if bias is None else bias[own]
        if bias_rows is not None:
            keys, queries = (None if x is None else x[own] for x in terms)
            own_bias = RelativeEmbeddings(keys, queries, bias_rows)
        states, theirs = ([x[:, own].transpose(0, 1) for x in parts] for parts in (tensors, others))
        yield TiledAttention(own.start, states, mask, own_mask, tiles, dropout_bits, own_bias, own_place), theirs


_NAMESPACE = operator_namespace(__name__)
_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? sparse_key, Tensor? sparse_value, Tensor? bias, "
    "Tensor? bias_keys, Tensor? bias_queries, Tensor? rows, Tensor attention_mask, Tensor sparse_mask, "
    "Tensor? sparse_place, Tensor? bias_rows, Tensor seed, SymInt[] seqlens, SymInt[] layout, float dropout"
)

_NUM_TENSORS, _NUM_GRADS = 14, 8  # The first ones have gradients.


def _attention(*inputs: Any) -> torch.Tensor:
    output = torch.zeros_like(inputs[0])
    with torch.autocast("cpu", enabled=False):
        for group, theirs in head_groups([output], *inputs):
            group.forward(*theirs)
    return output


def _attention_backward(grad: torch.Tensor, *inputs: Any) -> list[torch.Tensor]:
    # A key's gradient is a sum over tiles, which half precision would round each time.
    wide = torch.promote_types(grad.dtype, torch.float32)
    tensors, (rows, _, sparse_mask) = inputs[:_NUM_GRADS], inputs[_NUM_GRADS : _NUM_GRADS + 3]
    *states, bias, bias_keys, bias_queries = tensors
    sparse_shape = (sparse_mask.shape[1], *states[1].shape[1:])
    shapes = [sparse_shape if tensor is None else tensor.shape for tensor in states]
    # The heads stand in the second place, as those of tokens do.
    shapes.append((1, *(bias.shape if bias is not None else (shapes[0][1], 0))))
    for table in (bias_keys, bias_queries):
        shapes.append((0, *shapes[0][1:]) if table is None else (table.shape[1], table.shape[0], table.shape[2]))
    grads = [grad.new_zeros(shape, dtype=wide) for shape in shapes]
    with torch.autocast("cpu", enabled=False):
        for group, (own, *totals) in head_groups([grad, *grads], *inputs):
            group.backward(own, totals)
    if rows is not None:
        for total, of_chosen in zip(grads[1:3], grads[3:5], strict=True):
            total.flatten(0, 1).index_add_(0, rows, of_chosen.flatten(0, 1))
    grads[5:] = grads[5][0], *(total.transpose(0, 1).contiguous() for total in grads[6:])
    return [total.to(tensor.dtype) for total, tensor in zip(grads, tensors, strict=True) if tensor is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:_NUM_TENSORS])
    ctx.numbers = inputs[_NUM_TENSORS:]


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    tensors = ctx.saved_tensors
    grads = iter(attention_backward(grad, *tensors, *ctx.numbers))
    others = [None] * (_NUM_TENSORS - _NUM_GRADS + len(ctx.numbers))
    return *(None if tensor is None else next(grads) for tensor in tensors[:_NUM_GRADS]), *others


attention = torch.library.custom_op(
    f"{_NAMESPACE}::attention", _attention, mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor"
)
attention_backward = torch.library.custom_op(
    f"{_NAMESPACE}::attention_backward",
    _attention_backward,
    mutates_args=(),
    schema=f"(Tensor grad, {_ARGUMENTS}) -> Tensor[]",
)
attention.register_fake(lambda query, *_: torch.empty_like(query))
attention_backward.register_fake(
    lambda grad, *inputs: [torch.empty_like(x) for x in inputs[:_NUM_GRADS] if x is not None]
)
attention.register_autograd(_backward, setup_context=_save)
