"""LSG attention on a CPU: row by row and block by block, so that what a block sees stays in the cache.

A row takes part with its real tokens alone: those up to the last one that is not masked. What a block sees is brought
together when it is its turn, in memory that the next block uses again, and once more in the backward pass: nothing
that grows with the windows is kept. Equal to the kernels of `lsg_attention` to rounding.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .lsg_layout import local_window, sparse_windows


# Several checkpoints, each with its own copy of this file, may be loaded in one process: each has its own operators.
NAMESPACE = f"lsg_{hashlib.sha256(__name__.encode()).hexdigest()[:16]}"
TOKENS, SPARSE = 1, 3  # the numbers of the tensors of keys in `Attention`
MAX_SCORES = 2**18  # for each head at a time, unless a block of text sees more: 1 MiB in float32


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
        row_lengths: where a batch of one holds rows end to end, how many tokens each has, the globals included.
        sizes: `num_global_tokens`, `block_size`, `sparse_block_size`, `sparsity_factor`.

    Returns:
        The shape of `query`; zero where a query has no key, and behind the last token of a row that is kept.
    """
    batch, heads, tokens, head_dim = query.shape
    lengths = [tokens] * batch if row_lengths is None else row_lengths
    sparse_key, sparse_value, sparse_keep = sparse or (key[:, :, :0], value[:, :, :0], keep[:, None, :0])
    # Rows end to end: (tokens of all rows, heads, head_dim).
    states = (query, key, value, sparse_key, sparse_value)
    flat = [x.to(query.dtype).transpose(1, 2).reshape(-1, heads, head_dim) for x in states]
    seed = torch.randint(2**62, (1,)) if dropout else torch.zeros(1, dtype=torch.int64)
    output = attention(
        *flat, keep.flatten(), sparse_keep.transpose(0, 1).flatten(1), seed, lengths, list(sizes), dropout
    )
    return output.view(batch, tokens, heads, head_dim).transpose(1, 2)


class Part(NamedTuple):
    """Keys that some queries see. `tensor` is the number of their tensor in `Attention`; their values have the next."""

    tensor: int
    start: int
    stop: int


class Job(NamedTuple):
    """Queries, a part of the tokens, and the keys that all of them see; `masked` where some are hidden."""

    start: int
    stop: int
    keys: list[Part]
    masked: bool

    @property
    def num_keys(self) -> int:
        return sum(part.stop - part.start for part in self.keys)

    @property
    def num_columns(self) -> int:
        """Keys that are brought together are padded, since products of odd sizes are slower."""
        return self.num_keys if len(self.keys) == 1 else -(-self.num_keys // 16) * 16

    def split(self, seen: torch.Tensor, dim: int) -> tuple[torch.Tensor, ...]:
        """The columns of each part, and those of the padding."""
        sizes = [part.stop - part.start for part in self.keys]
        return seen.split([*sizes, self.num_columns - self.num_keys], dim)


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
            for window, low, high in ((local, text, stop), *((side, sparse_start, sparse_stop) for side in sides)):
                offset = low + window.offset + i * window.step
                part = Part(TOKENS if window is local else SPARSE, max(offset, low), min(offset + window.size, high))
                if part.start < part.stop:
                    keys.append(part)
            yield Job(query, min(query + block, stop), keys, masked)


def real_length(keep: torch.Tensor) -> int:
    """How many tokens there are up to the last that is not masked."""
    if keep.numel() == 0 or bool(keep[-1]):
        return keep.numel()
    places = keep.nonzero()
    return int(places[-1]) + 1 if len(places) else 0


class Attention:
    """The jobs of one call. `tensors` are query, key, value, sparse key and sparse value, (tokens, heads, head_dim)."""

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        keep: torch.Tensor,
        sparse_keep: torch.Tensor,
        seed: torch.Tensor,
        lengths: Sequence[int],
        sizes: Sequence[int],
        dropout: float,
    ) -> None:
        self.tensors = [tensor.transpose(0, 1) for tensor in tensors]
        self.keep = {TOKENS: keep[None], SPARSE: sparse_keep}
        self.jobs = list(list_jobs(keep, sparse_keep, lengths, *sizes))
        self.dtype = product_dtype(tensors[0].dtype)
        _, self.heads, self.head_dim = tensors[0].shape
        self.scale = self.head_dim**-0.5
        # A draw has 16 bits; what is kept is scaled by the share that they keep.
        self.threshold = round(dropout * 2**16)
        self.keep_scale = 1 / max(1 - self.threshold / 2**16, 2**-16)
        self.generator = torch.Generator().manual_seed(int(seed))
        self.buffers: dict[str, torch.Tensor] = {}

    def buffer(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Room that jobs use one after the other: fresh memory costs more than what is computed in it."""
        size = math.prod(shape)
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers[name] = torch.empty(size, dtype=dtype or self.dtype)
        return self.buffers[name][:size].view(shape)

    def scores(self, name: str, job: Job) -> torch.Tensor:
        return self.buffer(name, self.heads, job.stop - job.start, job.num_columns)

    def rows(self, tensor: torch.Tensor, job: Job, scale: float) -> torch.Tensor:
        """What belongs to the queries, of a tensor (heads, tokens, head_dim)."""
        return tensor[:, job.start : job.stop].to(self.dtype) * scale

    def gather(self, name: str, job: Job, offset: int = 0) -> torch.Tensor:
        """The keys that the queries see, or with an offset of 1 the values: (heads, columns, head_dim)."""
        parts = [self.tensors[part.tensor + offset][:, part.start : part.stop] for part in job.keys]
        if len(parts) == 1:
            return parts[0].to(self.dtype)
        seen = self.buffer(name, self.heads, job.num_columns, self.head_dim)
        for columns, part in zip(job.split(seen, dim=1), parts, strict=False):
            columns.copy_(part)
        seen[:, job.num_keys :] = 0
        return seen

    def probabilities(self, job: Job, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Before dropout: shape (heads, queries, columns)."""
        scores = torch.bmm(query, key.transpose(1, 2), out=self.scores("probabilities", job))
        if not job.masked:
            scores[:, :, job.num_keys :] = -torch.inf
            return torch.softmax(scores, -1, out=scores)
        keeps = [self.keep[part.tensor][:, part.start : part.stop].expand(self.heads, -1) for part in job.keys]
        hidden = ~F.pad(torch.cat(keeps, dim=1), (0, job.num_columns - job.num_keys))[:, None]
        scores.masked_fill_(hidden, torch.finfo(scores.dtype).min)
        return torch.softmax(scores, -1, out=scores).masked_fill_(hidden, 0)

    def dropout_mask(self, job: Job) -> torch.Tensor | None:
        """One where a probability is kept, zero elsewhere. The jobs draw in turn, in both passes alike."""
        if not self.threshold:
            return None
        mask = self.scores("mask", job)
        draws = self.buffer("draws", -(-mask.numel() // 4), dtype=torch.int64)
        draws.random_(-(2**63), None, generator=self.generator)
        mask.view(-1).copy_(draws.view(torch.int16)[: mask.numel()])
        return mask.ge_(self.threshold - 2**15)

    def forward(self) -> torch.Tensor:
        output = torch.zeros_like(self.tensors[0], memory_format=torch.preserve_format)
        for job in self.jobs:
            query = self.rows(self.tensors[0], job, self.scale)
            probabilities = self.probabilities(job, query, self.gather("seen", job))
            mask = self.dropout_mask(job)
            if mask is not None:
                probabilities.mul_(mask)
            attended = torch.bmm(probabilities, self.gather("seen", job, 1))
            output[:, job.start : job.stop] = attended if mask is None else attended.mul_(self.keep_scale)
        return output.transpose(0, 1)

    def backward(self, grad: torch.Tensor) -> list[torch.Tensor]:
        """The gradients of the tensors."""
        # A key's gradient is a sum over blocks, which half precision would round each time.
        wide = torch.promote_types(self.dtype, torch.float32)
        grads = [torch.zeros_like(x, dtype=wide, memory_format=torch.preserve_format) for x in self.tensors]
        for job in self.jobs:
            query, key, value = (
                self.rows(self.tensors[0], job, self.scale),
                self.gather("key", job),
                self.gather("value", job, 1),
            )
            grad_rows = self.rows(grad.transpose(0, 1), job, self.keep_scale if self.threshold else 1)
            probabilities, mask = self.probabilities(job, query, key), self.dropout_mask(job)
            grad_scores = torch.bmm(grad_rows, value.transpose(1, 2), out=self.scores("grad", job))
            used = probabilities
            if mask is not None:
                grad_scores.mul_(mask)
                used = torch.mul(probabilities, mask, out=mask)
            grad_value = torch.bmm(used.transpose(1, 2), grad_rows, out=self.buffer("seen", *value.shape))
            self.scatter(grads, job, grad_value, 1)
            torch.ops.aten._softmax_backward_data.out(
                grad_scores, probabilities, -1, self.dtype, grad_input=grad_scores
            )
            grad_key = torch.bmm(grad_scores.transpose(1, 2), query, out=self.buffer("seen", *key.shape))
            self.scatter(grads, job, grad_key)
            grads[0][:, job.start : job.stop] = torch.bmm(grad_scores, key).mul_(self.scale)
        return [grad.transpose(0, 1).to(self.tensors[0].dtype) for grad in grads]

    def scatter(self, grads: list[torch.Tensor], job: Job, seen: torch.Tensor, offset: int = 0) -> None:
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


@torch.library.custom_op(f"{NAMESPACE}::attention", mutates_args=())
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sparse_key: torch.Tensor,
    sparse_value: torch.Tensor,
    keep: torch.Tensor,
    sparse_keep: torch.Tensor,
    seed: torch.Tensor,
    lengths: Sequence[int],
    sizes: Sequence[int],
    dropout: float,
) -> torch.Tensor:
    tensors = query, key, value, sparse_key, sparse_value
    with torch.autocast("cpu", enabled=False):
        return Attention(tensors, keep, sparse_keep, seed, lengths, sizes, dropout).forward()


@torch.library.custom_op(f"{NAMESPACE}::attention_backward", mutates_args=())
def attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sparse_key: torch.Tensor,
    sparse_value: torch.Tensor,
    keep: torch.Tensor,
    sparse_keep: torch.Tensor,
    seed: torch.Tensor,
    lengths: Sequence[int],
    sizes: Sequence[int],
    dropout: float,
) -> list[torch.Tensor]:
    tensors = query, key, value, sparse_key, sparse_value
    with torch.autocast("cpu", enabled=False):
        return Attention(tensors, keep, sparse_keep, seed, lengths, sizes, dropout).backward(grad)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.numbers = inputs[8:]


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    grads = attention_backward(grad, *ctx.saved_tensors, *ctx.numbers)
    return *grads, None, None, None, None, None, None


attention.register_fake(lambda query, *_: torch.empty_like(query))
attention_backward.register_fake(lambda grad, *inputs: [torch.empty_like(tensor) for tensor in inputs[:5]])
attention.register_autograd(_backward, setup_context=_save)
