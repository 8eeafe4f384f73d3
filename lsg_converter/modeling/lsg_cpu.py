"""LSG attention on a CPU: row by row and block by block, so that what a block sees stays in the cache.

A row takes part with its real tokens alone: those up to the last one that is not masked. What a block sees is brought
together when it is its turn, in memory that the next block uses again, and once more in the backward pass: nothing
that grows with the windows is kept. Equal to the kernels of `lsg_attention` to rounding.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .lsg_layout import Window, flat_rows, local_window, operator_namespace, sparse_windows


TOKENS, SPARSE = 1, 3  # the numbers of the tensors of keys in `Attention`
MAX_SCORES = 2**18  # of a head at a time, unless a block of text sees more
PLACES = 2**16  # in the pools of random bits
THREAD_SCORES = 2**19  # of several heads at a time, for each thread: 2 MiB in float32 stay in most caches


def cpu_kernel_serves(query: torch.Tensor) -> bool:
    """Whether `cpu_attention` can do what is asked: an exported or traced model must do without its operators."""
    return query.device.type == "cpu" and not torch.jit.is_tracing() and not torch.compiler.is_exporting()


def cpu_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keep: torch.Tensor,
    sparse: Sequence[torch.Tensor],
    row_lengths: list[int] | None,
    sizes: tuple[int, int, int, int],
    dropout: float,
) -> torch.Tensor:
    """Attend, with scores scaled by `1 / sqrt(head_dim)`.

    Args:
        query, key, value: shape (batch, heads, tokens, head_dim); read in place where they are views of contiguous
            tensors of shape (batch, tokens, heads, head_dim).
        keep: boolean, shape (batch, tokens).
        sparse: keys, values and mask of the sparse sequence, of shapes (batch, heads, sparse tokens, head_dim) twice
            and (batch, heads or 1, sparse tokens), or nothing; those of rows end to end where `row_lengths` is given.
            Instead of keys and values, where they are some of the tokens: which, counted through all rows, of shape
            (batch, heads, sparse tokens).
        row_lengths: where a batch of one holds rows end to end, how many tokens each has, the globals included.
        sizes: `num_global_tokens`, `block_size`, `sparse_block_size`, `sparsity_factor`.

    Returns:
        The shape of `query`; zero where a query has no key, and behind the last token of a row that is kept.
    """
    batch, heads, tokens, head_dim = query.shape
    lengths = [tokens] * batch if row_lengths is None else row_lengths
    *sparse_states, sparse_keep = sparse or (keep[:, None, :0],)
    rows = flat_rows(sparse_states.pop()) if len(sparse_states) == 1 else None
    # Rows end to end: (tokens of all rows, heads, head_dim).
    states = [x.transpose(1, 2).reshape(-1, heads, head_dim) for x in (query, key, value, *sparse_states)]
    absent = [None] * (5 - len(states))
    seed = torch.randint(2**62, (1,)) if dropout else torch.zeros(1, dtype=torch.int64)
    masks = keep.flatten(), sparse_keep.transpose(0, 1).flatten(1)
    output = attention(*states, *absent, rows, *masks, seed, lengths, list(sizes), dropout)
    return output.view(batch, tokens, heads, head_dim).transpose(1, 2)


class Part(NamedTuple):
    """Keys that some queries see. `tensor` is the number of their tensor in `Attention`; their values have the next."""

    tensor: int
    start: int
    stop: int


class Job:
    """Queries, a part of the tokens, and the keys that all of them see; `masked` where some are hidden."""

    def __init__(self, start: int, stop: int, keys: list[Part], masked: bool) -> None:
        self.start, self.stop, self.keys, self.masked = start, stop, keys, masked
        self.sizes = [part.stop - part.start for part in keys]
        self.num_keys = sum(self.sizes)
        # Keys that are brought together are padded, since products of odd sizes are slower.
        self.num_columns = self.num_keys if len(keys) == 1 else -(-self.num_keys // 16) * 16

    def split(self, seen: torch.Tensor, dim: int) -> tuple[torch.Tensor, ...]:
        """The columns of each part, and those of the padding."""
        return seen.split([*self.sizes, self.num_columns - self.num_keys], dim)


def list_jobs(
    keep: torch.Tensor, sparse_keep: torch.Tensor, lengths: Sequence[int], g: int, block: int, sparse: int, factor: int
) -> Iterator[Job]:
    """What there is to compute, for rows of `lengths` that stand end to end."""
    local, sides = local_window(block), sparse_windows(block, sparse, factor) if factor and sparse else ()
    first = sparse_first = 0
    for length in lengths:
        start, sparse_start = first, sparse_first
        first += length
        if sparse_keep.shape[1] and length - g > 2 * block:
            sparse_first += -(-(length - g) // block) * block // factor
        stop = start + real_length(keep[start:first])
        sparse_stop = sparse_start + real_length(sparse_keep[:, sparse_start:sparse_first].any(0))
        text, everything = start + g, Part(TOKENS, start, stop)
        long = stop - text > 2 * block
        masked = not bool(keep[start:stop].all())
        step = max(MAX_SCORES // max(stop - start, 1), 1)
        for query in range(start, text if long else stop, step):
            yield Job(query, min(query + step, text if long else stop), [everything], masked)
        if not long:
            continue
        masked = masked or not bool(sparse_keep[:, sparse_start:sparse_stop].all())
        for i, query in enumerate(range(text, stop, block)):
            keys = [Part(TOKENS, start, text)] if g else []
            keys += window_parts(TOKENS, local, i, text, stop)
            for side in sides:
                keys += window_parts(SPARSE, side, i, sparse_start, sparse_stop)
            yield Job(query, min(query + block, stop), keys, masked)


def window_parts(tensor: int, window: Window, block: int, start: int, stop: int) -> list[Part]:
    """What a block sees, through a window, of the tokens from `start` to `stop`: in pieces, each of which keeps its
    place among them while the window moves on."""
    pieces = window.size // window.step if window.size % window.step == 0 and window.size <= 4 * window.step else 1
    size = window.size // pieces
    first = window.offset + block * window.step
    offsets = [first + piece * size for piece in range(pieces)]
    if pieces > 1:
        offsets.sort(key=lambda offset: offset // size % pieces)
    parts = (Part(tensor, max(start + offset, start), min(start + offset + size, stop)) for offset in offsets)
    return [part for part in parts if part.start < part.stop]


def real_length(keep: torch.Tensor) -> int:
    """How many tokens there are up to the last that is not masked."""
    if keep.numel() == 0 or bool(keep[-1]):
        return keep.numel()
    places = keep.nonzero()
    return int(places[-1]) + 1 if len(places) else 0


class Draws:
    """Random bits for the dropout of all jobs, 16 for each probability.

    Those of a job are the bits from a random place of one pool on, xor those from a random place of another: as random
    as the pools are, two by two, for a small part of the time that drawing them would take.
    """

    def __init__(self, seed: int, dropout: float, num_jobs: int, heads: int, scores: int) -> None:
        """For jobs of at most `scores` scores a head."""
        generator = torch.Generator().manual_seed(seed)
        size = heads * -(-scores // 4) + PLACES
        self.pools = torch.empty(2, size, dtype=torch.int64).random_(-(2**63), None, generator=generator)
        self.places = torch.randint(PLACES, (num_jobs, 2), generator=generator).tolist()
        dropped = round(dropout * 2**16)
        self.last_dropped = dropped - 2**15 - 1  # of the numbers of 16 bits
        self.keep_scale = 1 / max(1 - dropped / 2**16, 2**-16)  # by the share that is kept

    def fill(self, bits: torch.Tensor, job: int, first_head: int) -> None:
        """Fill an int64 tensor, (heads, numbers), for the job of that number and the heads from `first_head` on."""
        skipped, count = first_head * bits.shape[1], bits.numel()
        first, second = (pool[at + skipped :][:count] for pool, at in zip(self.pools, self.places[job], strict=True))
        torch.bitwise_xor(first, second, out=bits.view(-1))


class Attention:
    """The jobs of a call, for some of its heads. `tensors` are query, key, value, sparse key and sparse value of these
    heads, (heads, tokens, head_dim)."""

    def __init__(
        self,
        first_head: int,
        tensors: Sequence[torch.Tensor],
        keep: torch.Tensor,
        sparse_keep: torch.Tensor,
        jobs: Sequence[Job],
        draws: "Draws | None",
    ) -> None:
        self.tensors, self.jobs, self.first_head = tensors, jobs, first_head
        self.keep = {TOKENS: keep[None], SPARSE: sparse_keep}
        self.dtype = product_dtype(tensors[0].dtype)
        self.heads, _, self.head_dim = tensors[0].shape
        self.scale = self.head_dim**-0.5
        self.draws = draws
        self.keep_scale = 1.0 if draws is None else draws.keep_scale
        self.buffers: dict[str, torch.Tensor] = {}
        self.views: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
        self.gathered: dict[str, tuple[Job, torch.Tensor, Sequence[torch.Tensor]]] = {}

    def buffer(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Room that jobs use one after the other: fresh memory costs more than what is computed in it."""
        if (name, shape) in self.views:
            return self.views[name, shape]
        size = math.prod(shape)
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers[name] = torch.empty(size, dtype=dtype or self.dtype)
            self.views = {key: view for key, view in self.views.items() if key[0] != name}
        self.views[name, shape] = self.buffers[name][:size].view(shape)
        return self.views[name, shape]

    def scores(self, name: str, job: Job) -> torch.Tensor:
        return self.buffer(name, self.heads, job.stop - job.start, job.num_columns)

    def product(self, name: str, left: torch.Tensor, right: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        out = self.buffer(name, self.heads, left.shape[1], right.shape[2])
        return torch.baddbmm(out, left, right, beta=0, alpha=scale, out=out)

    def rows(self, tensor: torch.Tensor, job: Job) -> torch.Tensor:
        """What belongs to the queries, of a tensor (heads, tokens, head_dim)."""
        return tensor[:, job.start : job.stop].to(self.dtype)

    def gather(self, name: str, job: Job, offset: int = 0) -> torch.Tensor:
        """The keys that the queries see, or with an offset of 1 the values: (heads, columns, head_dim)."""
        if len(job.keys) == 1:
            part = job.keys[0]
            return self.tensors[part.tensor + offset][:, part.start : part.stop].to(self.dtype)
        last, seen, columns = self.gathered.get(name, (None, None, ()))
        present: Sequence[Part | None] = last.keys if last is not None and last.sizes == job.sizes else []
        if seen is None or not present:
            seen = self.buffer(name, self.heads, job.num_columns, self.head_dim)
            columns = job.split(seen, dim=1)
            columns[-1].zero_()  # the padding
        for target, part, there in zip_longest(columns[:-1], job.keys, present):
            if part != there:  # What the last job has brought to the same columns is there.
                target.copy_(self.tensors[part.tensor + offset][:, part.start : part.stop])
        self.gathered[name] = job, seen, columns
        return seen

    def probabilities(self, job: Job, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Before dropout: shape (heads, queries, columns)."""
        scores = self.product("probabilities", query, key.transpose(1, 2), self.scale)
        if not job.masked:
            scores[:, :, job.num_keys :] = -torch.inf
            return torch.softmax(scores, -1, out=scores)
        keeps = [self.keep[part.tensor][:, part.start : part.stop].expand(self.heads, -1) for part in job.keys]
        hidden = ~F.pad(torch.cat(keeps, dim=1), (0, job.num_columns - job.num_keys))[:, None]
        scores.masked_fill_(hidden, torch.finfo(scores.dtype).min)
        return torch.softmax(scores, -1, out=scores).masked_fill_(hidden, 0)

    def dropout_mask(self, number: int) -> torch.Tensor | None:
        """One where a probability is kept, zero elsewhere: of the job with that number, in both passes the same."""
        if self.draws is None:
            return None
        mask = self.scores("mask", self.jobs[number])
        bits = self.buffer("bits", self.heads, -(-mask[0].numel() // 4), dtype=torch.int64)
        self.draws.fill(bits, number, self.first_head)
        torch.gt(bits.view(torch.int16)[:, : mask[0].numel()], self.draws.last_dropped, out=mask.flatten(1))
        return mask

    def forward(self, output: torch.Tensor) -> None:
        """Write the output, (heads, tokens, head_dim)."""
        for number, job in enumerate(self.jobs):
            probabilities = self.probabilities(job, self.rows(self.tensors[0], job), self.gather("key", job))
            mask = self.dropout_mask(number)
            if mask is not None:
                probabilities.mul_(mask)
            value = self.gather("value", job, 1)
            output[:, job.start : job.stop] = self.product("attended", probabilities, value, self.keep_scale)

    def backward(self, grad: torch.Tensor, grads: Sequence[torch.Tensor]) -> None:
        """Add the gradients of the tensors to `grads`; `grad` is that of the output."""
        for number, job in enumerate(self.jobs):
            query, key, value = self.rows(self.tensors[0], job), self.gather("key", job), self.gather("value", job, 1)
            grad_rows = self.rows(grad, job)
            probabilities, mask = self.probabilities(job, query, key), self.dropout_mask(number)
            grad_scores = self.product("grad", grad_rows, value.transpose(1, 2), self.keep_scale)
            used = probabilities
            if mask is not None:
                grad_scores.mul_(mask)
                used = torch.mul(probabilities, mask, out=mask)
            self.scatter(grads, job, self.product("seen", used.transpose(1, 2), grad_rows, self.keep_scale), 1)
            torch.ops.aten._softmax_backward_data.out(
                grad_scores, probabilities, -1, self.dtype, grad_input=grad_scores
            )
            self.scatter(grads, job, self.product("seen", grad_scores.transpose(1, 2), query, self.scale))
            grads[0][:, job.start : job.stop] = self.product("attended", grad_scores, key, self.scale)

    def scatter(self, grads: Sequence[torch.Tensor], job: Job, seen: torch.Tensor, offset: int = 0) -> None:
        """Add the gradients of what `gather` gave to those of where it came from."""
        for part, columns in zip(job.keys, job.split(seen, dim=1), strict=False):
            grads[part.tensor + offset][:, part.start : part.stop] += columns


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which dtype to multiply: where a CPU has no instructions for half precision, its products are slow."""
    fast = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return dtype if dtype not in fast or fast[dtype]() else torch.float32


def split_heads(others: Sequence[torch.Tensor], *inputs: Any) -> Iterator[tuple[Attention, list[torch.Tensor]]]:
    """The work of a call of `attention`, whose inputs these are, for as many heads at a time as caches can do with, and
    the part of `others`, (tokens, heads, head_dim), that is theirs, (heads, tokens, head_dim)."""
    query, key, value, sparse_key, sparse_value, rows, keep, sparse_keep, seed, lengths, sizes, dropout = inputs
    if rows is not None:
        sparse_key, sparse_value = (x.flatten(0, 1).index_select(0, rows).view(-1, *x.shape[1:]) for x in (key, value))
    elif sparse_key is None:
        sparse_key, sparse_value = key[:0], value[:0]
    tensors = query, key, value, sparse_key, sparse_value
    jobs = list(list_jobs(keep, sparse_keep, lengths, *sizes))
    scores = max(((job.stop - job.start) * job.num_columns for job in jobs), default=1)
    heads = tensors[0].shape[1]
    draws = Draws(int(seed), dropout, len(jobs), heads, scores) if round(dropout * 2**16) and jobs else None
    groups = -(-heads // max(torch.get_num_threads() * THREAD_SCORES // scores, 1))
    for group in torch.arange(heads).tensor_split(groups):
        own = slice(int(group[0]), int(group[-1]) + 1)
        masks = sparse_keep if len(sparse_keep) == 1 else sparse_keep[own]
        states, theirs = ([x[:, own].transpose(0, 1) for x in parts] for parts in (tensors, others))
        yield Attention(own.start, states, keep, masks, jobs, draws), theirs


_NAMESPACE = operator_namespace(__name__)
_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? sparse_key, Tensor? sparse_value, Tensor? rows, Tensor keep, "
    "Tensor sparse_keep, Tensor seed, SymInt[] lengths, SymInt[] sizes, float dropout"
)


def _attention(*inputs: Any) -> torch.Tensor:
    output = torch.zeros_like(inputs[0])
    with torch.autocast("cpu", enabled=False):
        for part, theirs in split_heads([output], *inputs):
            part.forward(*theirs)
    return output


def _attention_backward(grad: torch.Tensor, *inputs: Any) -> list[torch.Tensor]:
    # A key's gradient is a sum over blocks, which half precision would round each time.
    wide = torch.promote_types(grad.dtype, torch.float32)
    *tensors, rows, _, sparse_keep = inputs[:8]
    sparse_shape = (sparse_keep.shape[1], *tensors[1].shape[1:])
    shapes = [sparse_shape if tensor is None else tensor.shape for tensor in tensors]
    grads = [grad.new_zeros(shape, dtype=wide) for shape in shapes]
    with torch.autocast("cpu", enabled=False):
        for part, (own, *totals) in split_heads([grad, *grads], *inputs):
            part.backward(own, totals)
    if rows is not None:
        for total, of_chosen in zip(grads[1:3], grads[3:], strict=True):
            total.flatten(0, 1).index_add_(0, rows, of_chosen.flatten(0, 1))
    return [total.to(grad.dtype) for total, tensor in zip(grads, tensors, strict=True) if tensor is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:9])
    ctx.numbers = inputs[9:]


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grads = attention_backward(grad, *ctx.saved_tensors, *ctx.numbers)
    return *grads, *[None] * (12 - len(grads))


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
attention_backward.register_fake(lambda grad, *inputs: [torch.empty_like(x) for x in inputs[:5] if x is not None])
attention.register_autograd(_backward, setup_context=_save)
