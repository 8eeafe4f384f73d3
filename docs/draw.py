"""Draw `attention.png`, what queries see, and `sparsity.png`, what the sparsifiers make, by calling the package.

It needs matplotlib (`pip install ".[figures]"`).

    python docs/draw.py --output img
"""

import argparse
import importlib.util
import string
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lsg_converter.modeling.lsg_layout import LSGLayout, take_windows
from lsg_converter.modeling.lsg_sparsity import sparsify


if TYPE_CHECKING:
    from matplotlib.axes import Axes

Text = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

# Of attention.png: the tokens of the text, the sizes, and the block of queries that is framed. Full attention is that
# of a single block.
LENGTH = 32
FULL, LOCAL = LSGLayout(0, LENGTH, 0, 1), LSGLayout(0, 4, 0, 1)
LSG = LSGLayout(num_global_tokens=2, block_size=4, sparse_block_size=4, sparsity_factor=2)
FRAMED = 3
# How a query sees a token: not at all, or through which window. The colours differ in lightness, and the windows of
# sparse keys have markers: so they can be told apart in grey.
UNSEEN, GLOBAL_KEY, LOCAL_KEY, LEFT_KEY, RIGHT_KEY = range(5)
COLORS = ("#ffffff", "#2b1055", "#3f7fb5", "#f0a04b", "#f7e3a1")
MARKERS = ("", "", "", "<", ">")

# Of sparsity.png.
SPARSIFIERS = LSGLayout(num_global_tokens=0, block_size=8, sparse_block_size=8, sparsity_factor=4)
NUM_BLOCKS, HEADS = 2, 4
CAPTIONS = {
    "norm": "tokens of the largest key norm",
    "pooling": "means of neighbours",
    "bos_pooling": "weighted by the first query",
    "stride": f"every {SPARSIFIERS.sparsity_factor}th token, shifted by head",
    "block_stride": "neighbours, shifted by head",
    "lsh": "means of tokens with similar keys",
}


def random_text(layout: LSGLayout, length: int, heads: int) -> Text:
    """Queries, keys, values and mask. The values are one-hot: what is made of them says with which weights."""
    total = layout.num_global_tokens + length
    query, key = torch.randn(2, 1, heads, total, total, generator=torch.Generator().manual_seed(0))
    return query, key, torch.eye(total).expand_as(key), torch.ones(1, 1, total, dtype=torch.bool)


def seen_keys(layout: LSGLayout, length: int) -> torch.Tensor:
    """How each query, a row, sees each token, a column: a place in `COLORS`. Sparse keys are those of "norm"."""
    g, block_size = layout.num_global_tokens, layout.block_size
    seen = torch.full((g + length, g + length), UNSEEN)
    token = torch.arange(g + length)[None, None] + 1  # 0 is what windows hold beyond the ends
    parts = [(token[:, :, :g], layout.global_window), (token[:, :, g:], layout.local_window)]
    sparse = sparsify(*random_text(layout, length, 1), layout, sparsity_type="norm", in_place=True)
    if sparse is not None and sparse.token_index is not None:
        parts += [(sparse.token_index + 1, window) for window in layout.sparse_windows]
    for kind, (sequence, window) in enumerate(parts, GLOBAL_KEY):
        for block, columns in enumerate(take_windows(sequence, window, layout.num_blocks(length))[0, 0]):
            first = g + block * block_size
            seen[first : first + block_size, columns[columns > 0] - 1] = kind
    seen[:g] = GLOBAL_KEY
    return seen


def shares(sparsity_type: str) -> torch.Tensor:
    """The weight of each token in each sparse key: shape (heads, sparse keys, tokens)."""
    text = random_text(SPARSIFIERS, NUM_BLOCKS * SPARSIFIERS.block_size, HEADS)
    sparse = sparsify(*text, SPARSIFIERS, sparsity_type=sparsity_type)
    assert sparse is not None and sparse.value is not None
    return (sparse.value * sparse.mask[..., None])[0]


def draw_seen(axes: "Axes", layout: LSGLayout, title: str) -> torch.Tensor:
    """Draw what `seen_keys` gives, ruled by blocks, and return it."""
    from matplotlib.colors import ListedColormap

    seen = seen_keys(layout, LENGTH)
    axes.imshow(seen.numpy(), cmap=ListedColormap(COLORS), vmin=0, vmax=len(COLORS) - 1)
    for edge in range(layout.num_global_tokens, len(seen), layout.block_size):
        for rule in (axes.axhline, axes.axvline):
            rule(edge - 0.5, color="#888888", linewidth=0.4)
    axes.set_anchor("N")
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("keys")
    axes.set_ylabel("queries")
    axes.set_xticks([])
    axes.set_yticks([])
    return seen


def draw_attention(path: Path) -> None:
    """Full, local and LSG attention side by side; what one block of queries sees is framed and counted."""
    from matplotlib.figure import Figure

    g, block_size, sparse_block_size, factor, *_ = LSG
    figure = Figure(figsize=(6.5, 3.8), dpi=160, layout="constrained")
    axes = figure.subplot_mosaic([["full", "local", "lsg"], ["legend", "legend", "lsg"]], width_ratios=[1, 1, 2.6])
    draw_seen(axes["full"], FULL, "Full")
    draw_seen(axes["local"], LOCAL, "Local")
    seen = draw_seen(axes["lsg"], LSG, "Local, sparse and global (LSG)")

    lsg, legend = axes["lsg"], axes["legend"]
    blocks = range(LSG.num_blocks(LENGTH))
    centres = [(g - 1) / 2, *(g + (block + 0.5) * block_size - 0.5 for block in blocks)]
    lsg.set_xticks(centres, ["g", *map(str, blocks)])
    lsg.set_yticks(centres, ["g", *map(str, blocks)])
    lsg.tick_params(length=0, labelsize=9)
    lsg.set_xlabel("keys: global tokens (g), blocks of text")
    first = g + FRAMED * block_size
    lsg.axhspan(first - 0.5, first + block_size - 0.5, fill=False, edgecolor="#d00000", linewidth=2, clip_on=False)

    count = seen[first].bincount(minlength=len(COLORS)).tolist()
    labels = {
        GLOBAL_KEY: f"{count[GLOBAL_KEY]} tokens that see all (global)",
        LOCAL_KEY: f"{count[LOCAL_KEY]} tokens of blocks {FRAMED - 1}, {FRAMED}, {FRAMED + 1} (local)",
        LEFT_KEY: f"{count[LEFT_KEY]} of {sparse_block_size * factor} tokens on the left (sparse)",
        RIGHT_KEY: f"{count[RIGHT_KEY]} of {sparse_block_size * factor} tokens on the right (sparse)",
    }
    handles = []
    for kind in labels:
        rows, columns = (seen == kind).nonzero().T.numpy()
        sign = lsg.scatter(columns, rows, s=8, marker=MARKERS[kind], color="black", linewidths=0)
        handles.append((legend.scatter([], [], s=70, marker="s", color=COLORS[kind]), sign))
    legend.set_axis_off()
    legend.legend(
        handles,
        labels.values(),
        title=f"A query of block {FRAMED} (framed) sees,\nin one softmax:",
        fontsize=9,
        title_fontsize=9,
        loc="lower left",
        alignment="left",
        frameon=False,
    )
    figure.savefig(path)


def draw_sparsity(path: Path) -> None:
    """For each sparsifier and head, the tokens that sparse keys stand for."""
    from matplotlib.figure import Figure

    block_size = SPARSIFIERS.block_size
    figure = Figure(figsize=(6.5, 5.2), dpi=160, layout="constrained")
    axes = figure.subplots(3, 2, sharex=True, sharey=True).flatten()
    for panel, (sparsity_type, caption) in zip(axes, CAPTIONS.items(), strict=True):
        share, sparse_key = shares(sparsity_type).max(dim=1)  # No token has a share in two.
        signed = share * (1 - 2 * (sparse_key % 2))  # so that sparse keys side by side differ in colour
        panel.imshow(signed.numpy(), cmap="PuOr", vmin=-1.2, vmax=1.2, aspect="auto")
        for head, token in share.nonzero().tolist():
            letter = string.ascii_uppercase[int(sparse_key[head, token])]
            color = "black" if -0.8 < signed[head, token] < 0.6 else "white"
            panel.text(token, head, letter, color=color, ha="center", va="center_baseline", fontsize=9)
        for block in range(1, NUM_BLOCKS):
            panel.axvline(block * block_size - 0.5, color="black", linewidth=0.8)
        panel.set_title(f"{sparsity_type}: {caption}", fontsize=9, loc="left")
        panel.set_xticks(
            [(block + 0.5) * block_size - 0.5 for block in range(NUM_BLOCKS)],
            [f"block {block}" for block in range(NUM_BLOCKS)],
        )
        panel.set_yticks(range(HEADS), [f"head {head}" for head in range(HEADS)])
        panel.tick_params(length=0, labelsize=9)
    figure.supxlabel(
        "A column is a token. Those of one letter make one sparse key of that head:\n"
        "the darker, the larger a token's share. Tokens without a letter are in none.",
        fontsize=9,
    )
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], usage=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=Path("img"), help="the folder of the pictures (default: img)")
    folder = parser.parse_args(arguments).output
    if importlib.util.find_spec("matplotlib") is None:
        print('error: matplotlib is missing; pip install ".[figures]" brings it', file=sys.stderr)
        return 1
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"error: --output: got {str(folder)!r}, which cannot be a folder: {error.strerror}", file=sys.stderr)
        return 2
    draw_attention(folder / "attention.png")
    draw_sparsity(folder / "sparsity.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
