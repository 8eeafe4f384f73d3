"""What `hypothesis` draws: fields that a configuration allows together, and the masks of texts about block edges."""

from typing import Any

import torch
from hypothesis import strategies as st

from lsg_converter.modeling.lsg_sparsity import SPARSITY_TYPES


LARGEST_BLOCK = 10
NO_SPARSE_KEYS = [{"sparsity_type": "none"}, {"sparse_block_size": 0}, {"sparsity_factor": 0}]
KINDS = tuple(kind for kind in SPARSITY_TYPES if kind != "none")


@st.composite
def lsg_fields(draw: st.DrawFn, kind: str) -> dict[str, Any]:
    factor = draw(st.integers(1, 5))
    step = draw(st.integers(1, LARGEST_BLOCK // factor))
    block = factor * step

    def allowed(sparse: int) -> bool:
        chunk = min(block, sparse)
        return kind not in ("norm", "lsh") or chunk % factor == block % chunk == 0

    most = draw(st.sampled_from([step, block, 2 * block + 1]))
    fields = {
        "num_global_tokens": draw(st.integers(0, 3)),
        "block_size": block,
        "sparse_block_size": draw(st.sampled_from([n for n in range(1, most + 1) if allowed(n)] or [block])),
        "sparsity_factor": factor,
        "sparsity_type": kind,
    }
    return fields | draw(st.sampled_from([{}] * 12 + NO_SPARSE_KEYS))


def lengths(block: int, most: int = 7) -> st.SearchStrategy[int]:
    """Tokens of a text: up to `most` blocks, most often whole blocks, one token more, or one less."""
    near = st.builds(lambda blocks, more: blocks * block + more, st.integers(2, most), st.sampled_from([1, 0, -1]))
    return near | st.integers(1, most * block)


@st.composite
def masks(draw: st.DrawFn, length: int) -> torch.Tensor:
    """The mask of a row: whole, or padded on either side, or with holes, or masked altogether."""
    start = draw(st.just(0) | st.integers(0, length // 2))
    stop = draw(st.just(length) | st.integers(length // 2, length))
    mask = torch.zeros(length, dtype=torch.bool)
    mask[start:stop] = True
    for hole, size in draw(st.lists(st.tuples(st.integers(0, length), st.integers(1, LARGEST_BLOCK)), max_size=3)):
        mask[hole : hole + size] = False
    return mask


def batches(
    kind: str, min_rows: int = 1, max_rows: int = 3
) -> st.SearchStrategy[tuple[dict[str, Any], list[torch.Tensor]]]:
    """LSG fields, and the masks of rows of texts, the global tokens in front: each of its own length."""

    @st.composite
    def batch(draw: st.DrawFn) -> tuple[dict[str, Any], list[torch.Tensor]]:
        fields = draw(lsg_fields(kind))
        texts = draw(st.lists(lengths(fields["block_size"]), min_size=min_rows, max_size=max_rows))
        return fields, [draw(masks(fields["num_global_tokens"] + text)) for text in texts]

    # Of each case hypothesis tries five variants, in which one number is copied to the place of another; but not inside
    # a collection of unique elements. New cases find more.
    return st.lists(batch(), min_size=1, max_size=1, unique_by=id).map(lambda cases: cases[0])
