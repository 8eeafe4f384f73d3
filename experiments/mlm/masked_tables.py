"""What `masked_study.py` writes of its results: tables of losses by position, with intervals, and a picture."""

import sys
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np


sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "retrieval")]

import common
import tables


CHUNKS = "source, chunks of {}"  # what the others are compared with
SECTIONS = {"untrained": "Untrained", "adapted": "After adaptation", "switched": "Adapted without sparse keys"}
# Colours that differ in lightness, markers and dashes, so that lines can be told apart in grey.
STYLES: dict[str, tuple[str, str, tuple[float, ...]]] = {
    "source, windows": ("#E69F00", "o", (6, 2)),
    "full attention, tile": ("#D55E00", "D", (12, 1, 2, 1)),
    "LSG norm, block 128, tile": ("#0072B2", "o", ()),
    "LSG norm, block 128, stretch": ("#000000", "s", (8, 1.5)),
    "LSG norm, block 128, interpolate": ("#009E73", "X", (2, 1)),
    "LSG norm, block 32, tile": ("#56B4E9", "^", (1, 1)),
}


@dataclass
class Row:
    """A system on documents that were cut at `length` tokens: the loss at each place asked, by document."""

    group: str
    name: str
    length: int
    losses: list[list[float]]


@dataclass
class Bands:
    """Sums over the places of a document in each band, and how many they are; the arrays are (documents, bands).

    A mean is over all places of all documents. Its interval is of a bootstrap that draws documents.
    """

    places: list[list[int]]
    edges: list[int]

    def __post_init__(self) -> None:
        self.weights = common.draws(range(len(self.places)))
        self.counts = self.sums([[1.0] * len(places) for places in self.places])

    def sums(self, losses: list[list[float]]) -> np.ndarray:
        """Places are tokens of the text, and one token stands before it."""
        pairs = zip(self.places, losses, strict=True)
        found = [
            np.histogram(np.array(places[: len(values)]) + 1, self.edges, weights=values)[0] for places, values in pairs
        ]
        return np.stack(found)

    def mean(self, row: Row, other: Row | None = None, band: int | slice = slice(None)) -> tuple[float, float, float]:
        """A mean loss, less another's at the same places, with the ends of its interval."""
        sums = self.sums(row.losses) - (0 if other is None else self.sums(other.losses))
        value, count = (np.array(part[:, band]).reshape(len(part), -1).sum(axis=1) for part in (sums, self.counts))
        return float(value.sum() / count.sum()), *common.interval(value, self.weights, count)


def edges(limit: int, length: int) -> list[int]:
    """Twice as far each time, from what the source reads."""
    found = [0, limit]
    while found[-1] < length:
        found.append(min(2 * found[-1], length))
    return found


def lines(rows: list[Row], reference: Row, places: list[list[int]], limit: int) -> str:
    """A table of the rows of one length: the loss in each band, in all, and less that of the reference."""
    ends = edges(limit, rows[0].length)
    bands = Bands(places, ends)
    heads = [f"{begin:,}-{end - 1:,}" for begin, end in pairwise(ends)]
    found = [["system", *heads, "all", f"all, less {reference.name}"]]
    for row in rows:
        cells = [f"{bands.mean(row, band=band)[0]:.3f}" for band in range(len(heads))]
        found.append([row.name, *cells, *with_less(bands, row, reference)])
    return tables.table(found, 1)


def switched(rows: list[Row], places: list[list[int]]) -> str:
    """A table of the first row, which is as adapted, and of what it was switched to: a column a size of blocks. Each is
    compared with the first of its column."""
    bands = Bands(places, [0, rows[0].length])
    names = [row.name.split(", ") for row in rows]
    blocks = list(dict.fromkeys(block for _, block in names[1:]))
    found = [["then", *(text for block in blocks for text in (block, f"{block}, less {names[1][0]}"))]]
    for kind in dict.fromkeys(kind for kind, _ in names[1:]):
        line = [kind]
        for block in blocks:
            own = {name: row for (name, size), row in zip(names[1:], rows[1:], strict=True) if size == block}
            line += with_less(bands, own[kind], next(iter(own.values())))
        found.append(line)
    before = f"As adapted, {rows[0].name}: {with_less(bands, rows[0], rows[0])[0]}."
    return f"{before}\n\n{tables.table(found, 1)}"


def with_less(bands: Bands, row: Row, reference: Row) -> list[str]:
    """The loss in all bands, and less that of the reference."""
    whole = "{:.3f} [{:.3f}, {:.3f}]".format(*bands.mean(row))
    return [whole, "0" if row is reference else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*bands.mean(row, reference))]


def report(rows: list[Row], places: list[list[int]], limit: int) -> str:
    """Tables of what was measured. Systems are compared with what the source makes of its chunks, and what was switched
    after adaptation with the first type of sparsity at the same block."""
    parts = [f"Loss by position of masked tokens; {len(places)} documents; in brackets, {tables.LEVEL:.0%} intervals."]
    longest = max(row.length for row in rows)
    for group, title in SECTIONS.items():
        own = [row for row in rows if row.group == group]
        if group == "switched":
            parts += [f"## {title}, then switched", switched(own, places)]
            continue
        for length in sorted({row.length for row in own}, reverse=True):
            at_length = [row for row in own if row.length == length]
            if length < longest:
                at_length = [cut(row, places, length) for row in own if row.name.startswith("source")] + at_length
            reference = next(row for row in at_length if row.name == CHUNKS.format(limit))
            parts += [f"## {title}, {length:,} tokens", lines(at_length, reference, places, limit)]
    return "\n\n".join(parts) + "\n"


def cut(row: Row, places: list[list[int]], length: int) -> Row:
    """The places of it that stand in the first so many tokens, of which the last is no token of the text."""
    counts = [sum(place < length - 2 for place in own) for own in places]
    kept = [losses[:count] for losses, count in zip(row.losses, counts, strict=True)]
    return Row(row.group, row.name, length, kept)


def draw(path: Path, rows: list[Row], places: list[list[int]], limit: int) -> None:
    """The loss against position, less that of the source's chunks, before adaptation and after it."""
    if find_spec("matplotlib") is None:
        print('no picture: matplotlib is missing; pip install ".[figures]" brings it', file=sys.stderr)
        return
    from matplotlib.figure import Figure

    longest = max(row.length for row in rows)
    ends = sorted(
        {0, limit // 2, *(min(end, longest) for edge in edges(limit, longest) for end in (edge, edge * 3 // 2))}
    )
    bands = Bands(places, ends)
    middles = [(begin + end) / 2 for begin, end in pairwise(ends)]
    figure = Figure(figsize=(9, 4.5), dpi=100, layout="constrained")
    sides = figure.subplots(1, 2, sharey=True)
    for axes, group in zip(sides, ("untrained", "adapted"), strict=True):
        zero = next(row for row in rows if row.group == group and row.name == CHUNKS.format(limit))
        for place, (line, (color, marker, dashes)) in enumerate(STYLES.items()):
            named = [row for row in rows if row.group == group and row.length == longest and row.name.startswith(line)]
            if not named:
                continue
            found = np.array([bands.mean(named[0], zero, band) for band in range(len(middles))])
            bar = axes.errorbar(
                np.array(middles) * 1.015 ** (place - len(STYLES) / 2),  # so that bars do not overlap
                found[:, 0],
                yerr=np.abs(found[:, 1:] - found[:, :1]).T,
                label=line,
                color=color,
                marker=marker,
                markersize=4,
                markerfacecolor=color if line.startswith("LSG") else "white",
                capsize=2,
                elinewidth=0.8,
            )
            bar.lines[0].set_dashes(dashes)
        axes.set_title(SECTIONS[group], fontsize=10)
        axes.set_xscale("log", base=2)
        axes.set_xticks(edges(limit, longest)[1:], [f"{end:,}" for end in edges(limit, longest)[1:]], fontsize=8)
        axes.set_xlabel("position of the masked token")
        axes.axhline(0, color="black", linewidth=0.8)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    sides[0].set_ylabel(f"loss, less that of the source in chunks of {limit}")
    handles = {label: handle for axes in sides for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False, handlelength=3.5
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
