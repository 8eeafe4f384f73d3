"""The six sparsifiers: each shortens the keys and values of a head from `t` to `t / f` tokens.

Shapes: `key` and `value` are (batch, heads, t, head_dim), `mask` is (batch, 1, t), and True where a token may be
attended to. The sparse ones are (batch, heads, T / f, head_dim) and (batch, 1 or heads, T / f), where `T` is `t` padded
to whole blocks. What stands under the mask never changes the result. Three sparsifiers choose tokens, each head its
own; the others merge them.
"""

import math

import torch

from .lsg_layout import LSGLayout, SparseKeys, flat_rows, is_exporting, pad_to_multiple, require, take_rows
from .lsg_triton import LARGEST_CHUNK, choose_largest_norm


SPARSITY_TYPES = ("none", "norm", "pooling", "bos_pooling", "stride", "block_stride", "lsh")
SPARSITY_FIELDS = ("block_size", "sparse_block_size", "sparsity_factor", "sparsity_type")


def check_sparsity(block_size: int, sparse_block_size: int, sparsity_factor: int, sparsity_type: str | None) -> None:
    """Check the sizes of blocks and of what is made of them.

    Raises:
        ValueError: which names the field, what was got and what is allowed.
    """
    block, sparse, factor, kind = block_size, sparse_block_size, sparsity_factor, sparsity_type
    require("block_size", block, block >= 1, "at least 1")
    require("sparse_block_size", sparse, sparse >= 0, "at least 0, which means no sparse keys")
    require("sparsity_factor", factor, 0 <= factor <= block, f"0 to block_size, {block}; 0 means no sparse keys")
    require("sparsity_type", kind, kind in (None, *SPARSITY_TYPES), f"one of {', '.join(SPARSITY_TYPES)}")
    layout = LSGLayout.from_fields(0, block, sparse, factor, kind)
    if not layout.sparse_block_size:
        return
    chunk = layout.chunk_size
    require("block_size", block, block % factor == 0, f"a multiple of sparsity_factor, {factor}")
    if kind in ("norm", "lsh") and (chunk % factor or block % chunk):
        sizes = [size for size in range(factor, block + 1, factor) if block % size == 0]
        below, above = ([size for size in sizes if (size > chunk) is more] for more in (False, True))
        nearest = " or ".join(map(str, below[-1:] + above[:1]))
        allowed = f"{nearest}, nearest to it (a multiple of sparsity_factor that divides block_size)"
        require("sparse_block_size", sparse, False, allowed)


def sparsify(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    layout: LSGLayout,
    *,
    sparsity_type: str | None,
    lsh_num_pre_rounds: int = 1,
    lsh_seed: int = 0,
    fused: bool = False,
    in_place: bool = False,
    with_place: bool = False,
) -> SparseKeys | None:
    """Shorten keys, values and mask of a text; None where the layout has no sparse keys.

    Args:
        query, key, value, mask: of the global tokens, which are left out, and of the text. "bos_pooling" and "lsh"
            weigh by the first query of the text; the others do not read queries.
        fused: whether Triton's kernels, which work in place, are to be used where there are some.
        in_place: whether, where sparse keys are tokens, the result is to say which, instead of holding them.
        with_place: whether it is to say where they stand; one that stands for several tokens, at the mean of their
            places, rounded half to even.

    Raises:
        ValueError: where `sparsity_type` is unknown.
    """
    if not layout.sparse_block_size:
        return None
    g, factor, chunk_size = layout.num_global_tokens, layout.sparsity_factor, layout.chunk_size
    if fused and sparsity_type == "norm" and factor > 1 and chunk_size <= LARGEST_CHUNK:
        index, sparse_mask = choose_largest_norm(key.detach(), mask, g, layout.block_size, chunk_size, factor)
        return SparseKeys(sparse_mask, token_index=index, place=index if with_place else None)
    text_query, text_key, text_value, text_mask = (x[:, :, g:] for x in (query, key, value, mask))
    text_mask = pad_to_multiple(text_mask, layout.block_size, dim=2)
    index = choose_tokens(text_key.detach(), text_mask, layout, sparsity_type)
    batch, _, length, _ = key.shape
    first = length * torch.arange(batch, device=key.device)[:, None, None] + g
    if index is not None:
        sparse_mask = text_mask.expand(-1, index.shape[1], -1).gather(2, index.expand(batch, -1, -1))
        index = first + index.clamp(max=length - g - 1)  # What pads the text is masked.
        place = index if with_place else None
        if in_place:
            return SparseKeys(sparse_mask, token_index=index, place=place)
        rows = flat_rows(index)
        return SparseKeys(sparse_mask, take_rows(key, rows), take_rows(value, rows), place=place)
    text_key, text_value = (pad_to_multiple(x, layout.block_size, dim=2) for x in (text_key, text_value))
    if factor == 1:
        sparse = SparseKeys(text_mask, text_key, text_value)
    elif sparsity_type == "pooling":
        sparse = pool_mean(text_key, text_value, text_mask, factor)
    elif weighs_by_query(sparsity_type, factor, layout.sparse_block_size):
        sparse = pool_by_query(text_key, text_value, text_mask, text_query[:, :, 0], factor)
    elif sparsity_type == "lsh":
        sparse = cluster_by_lsh(text_key, text_value, text_mask, layout, lsh_num_pre_rounds, lsh_seed, with_place)
    else:
        raise ValueError(f"sparsity_type: got {sparsity_type!r}; use one of {', '.join(SPARSITY_TYPES)}")
    if not with_place:
        return sparse
    place = sparse.place if sparse.place is not None else mean_places(text_mask, factor)
    return sparse._replace(place=first + place)


def weighs_by_query(sparsity_type: str | None, sparsity_factor: int, sparse_block_size: int) -> bool:
    """Whether tokens are merged by the first query of the text."""
    return sparsity_type == "bos_pooling" or (sparsity_type == "lsh" and sparsity_factor == sparse_block_size)


def choose_tokens(
    key: torch.Tensor, mask: torch.Tensor, layout: LSGLayout, sparsity_type: str | None
) -> torch.Tensor | None:
    """The places in the text, padded to whole blocks as `mask` is, of the tokens that are the sparse keys: int64, of
    shape (batch or 1, heads, T / f). None where sparse keys are not chosen tokens, or all."""
    block_size, factor = layout.block_size, layout.sparsity_factor
    if factor == 1:
        return None
    if sparsity_type == "norm":
        return largest_norm(key, mask, layout)
    blocks = block_size * torch.arange(mask.shape[2] // block_size, device=key.device)[:, None]
    head = torch.arange(key.shape[1], device=key.device)[:, None, None]
    chosen = torch.arange(layout.sparse_step, device=key.device)
    if sparsity_type == "stride":
        # Head h keeps every f-th token, from h mod f on.
        return (blocks + chosen * factor + head % factor).flatten(1)[None]
    if sparsity_type == "block_stride":
        # Head h keeps B / f tokens of each block, from h B / f on, wrapping round in the block.
        return (blocks + (chosen + head * layout.sparse_step) % block_size).flatten(1)[None]
    return None


def largest_norm(key: torch.Tensor, mask: torch.Tensor, layout: LSGLayout) -> torch.Tensor:
    """In each chunk the `1 / f` of the tokens with the largest key norm, in their order; masked ones come last. The
    mask, unlike the keys, is padded to whole blocks."""
    # In float32: half precision would rank other keys first. As (batch, tokens, heads, head_dim), which is how the
    # projections lay keys down.
    norm = torch.linalg.vector_norm(key.transpose(1, 2), dim=-1, dtype=_at_least_float32(key)).transpose(1, 2)
    norm = pad_to_multiple(norm, layout.block_size, dim=2).masked_fill(~mask, -1).unflatten(-1, (-1, layout.chunk_size))
    chosen = layout.chunk_size // layout.sparsity_factor
    index = norm.topk(chosen, dim=-1, sorted=False).indices.sort(dim=-1).values
    starts = layout.chunk_size * torch.arange(mask.shape[2] // layout.chunk_size, device=key.device)
    return (index + starts[:, None]).flatten(-2)


def pool_mean(key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, factor: int) -> SparseKeys:
    """The mean of the tokens that are not masked in each run of `factor`."""
    runs = mask.unflatten(-1, (-1, factor))
    weight = runs.to(key.dtype) / runs.sum(dim=-1, keepdim=True).clamp(min=1).to(key.dtype)
    return SparseKeys(runs.any(dim=-1), _pool(key, weight), _pool(value, weight))


def mean_places(mask: torch.Tensor, factor: int) -> torch.Tensor:
    """The mean of the places of the tokens that are not masked in each run of `factor`: int64, (batch, 1, t / f)."""
    runs = mask.unflatten(-1, (-1, factor))
    place = torch.arange(mask.shape[-1], device=mask.device).unflatten(0, (-1, factor))
    return _mean(place.masked_fill(~runs, 0).sum(dim=-1), runs.sum(dim=-1))


def _mean(total: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Rounded half to even; 0 of none."""
    return (total.double() / count.clamp(min=1).double()).round().long()


def pool_by_query(
    key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, query: torch.Tensor, factor: int
) -> SparseKeys:
    """The mean of each run of `factor` tokens, weighted by a softmax over the run of `query . key / sqrt(d)`; one
    query for each head, (batch, heads, head_dim)."""
    runs = mask.unflatten(-1, (-1, factor))
    score = (key @ (query * key.shape[-1] ** -0.5)[..., None]).squeeze(-1).unflatten(-1, (-1, factor))
    score = score.masked_fill(~runs, torch.finfo(score.dtype).min)
    weight = score.softmax(dim=-1, dtype=_at_least_float32(key)).masked_fill(~runs, 0).to(key.dtype)
    return SparseKeys(runs.any(dim=-1), _pool(key, weight), _pool(value, weight))


def cluster_by_lsh(
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    layout: LSGLayout,
    num_pre_rounds: int,
    seed: int,
    with_place: bool = False,
) -> SparseKeys:
    """The means of the clusters into which locality-sensitive hashing puts the tokens of each chunk.

    `num_pre_rounds` rounds with as many buckets as tokens merge what is alike; one more merges into `1 / f` as
    many. An empty bucket is masked. The rotations depend on `seed` alone.
    """
    dtype, chunk_size = _at_least_float32(key), layout.chunk_size
    # Sums and counts, so that the mean of merged clusters is weighted by how many tokens they stand for.
    count = mask.expand(-1, key.shape[1], -1).to(dtype).unflatten(-1, (-1, chunk_size)).unsqueeze(-1)
    states = [key, value]
    if with_place:
        states.append(torch.arange(key.shape[2], device=key.device)[:, None].expand(*key.shape[:3], 1))
    clusters = torch.cat([x.to(dtype) for x in states], dim=-1).unflatten(2, (-1, chunk_size)) * count
    clusters = torch.cat([clusters, count], dim=-1)
    for round_, buckets in enumerate([chunk_size] * num_pre_rounds + [chunk_size // layout.sparsity_factor]):
        with torch.no_grad():
            shape = (key.shape[1], 1, key.shape[-1], (buckets + 1) // 2)
            projected = clusters[..., : key.shape[-1]] @ _random_normal(shape, seed + round_, key.device).to(dtype)
            bucket = torch.cat([projected, -projected], dim=-1)[..., :buckets].argmax(dim=-1)
        clusters = _sum_by_bucket(clusters, bucket, buckets)
    widths = [x.shape[-1] for x in states]
    key_sum, value_sum, *place_sum, count = clusters.flatten(2, 3).split([*widths, 1], dim=-1)
    divisor = count.clamp(min=1)
    key, value = (key_sum / divisor).to(key.dtype), (value_sum / divisor).to(value.dtype)
    count = count.squeeze(-1)
    place = _mean(place_sum[0].detach().squeeze(-1), count.detach()) if place_sum else None
    return SparseKeys(count > 0.5, key, value, place=place)


def _sum_by_bucket(clusters: torch.Tensor, bucket: torch.Tensor, buckets: int) -> torch.Tensor:
    """(..., clusters, numbers) to (..., buckets, numbers), where `bucket`, (..., clusters), says which goes where."""
    if clusters.device.type != "cpu" or is_exporting():
        # A product with the assignment is deterministic on every device; a scattered sum is so on a CPU alone.
        assignment = bucket[..., None] == torch.arange(buckets, device=bucket.device)
        return assignment.to(clusters.dtype).transpose(-1, -2) @ clusters
    chunks = bucket.shape[:-1].numel()
    rows = bucket.flatten(0, -2) + buckets * torch.arange(chunks)[:, None]
    sums = clusters.new_zeros(chunks * buckets, clusters.shape[-1])
    return sums.index_add(0, rows.flatten(), clusters.flatten(0, -2)).view(*bucket.shape[:-1], buckets, -1)


def _at_least_float32(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _pool(tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The sums over runs of tokens, weighted by `weight`, of shape (batch, 1 or heads, t / f, f)."""
    # Token by token of the runs: a sum over a dimension of few numbers is slow.
    weighted = zip(tokens.unflatten(2, (-1, weight.shape[-1])).unbind(3), weight[..., None].unbind(3), strict=True)
    first, *others = weighted
    total = first[0] * first[1]
    for token, share in others:
        total = torch.addcmul(total, token, share)
    return total


def _random_normal(shape: tuple[int, ...], seed: int, device: torch.device) -> torch.Tensor:
    """Standard normal draws that depend on `seed` and place alone.

    They come from a hash of a counter, not from a generator: no global state is touched, every device draws the same,
    and the graph of `torch.compile` stays whole.
    """
    bits = (torch.arange(2 * math.prod(shape), device=device) + seed * 0x9E3779B1 % 2**32) & 0xFFFFFFFF

    def mix(bits: torch.Tensor) -> torch.Tensor:
        """`bits ^ (bits >> 16)`, in what each exporter to ONNX knows."""
        high = bits // 2**16
        return bits + high - 2 * (bits & high)

    for _ in range(2):
        bits = (mix(bits) * 0x45D9F3B) & 0xFFFFFFFF
    uniform = (mix(bits).to(torch.float32) + 0.5) / 2**32
    radius, angle = uniform.clamp(min=1e-7).view(2, *shape)
    return (-2 * radius.log()).sqrt() * (2 * math.pi * angle).cos()
