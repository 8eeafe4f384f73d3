"""What `study.py` writes of its results: tables with intervals, and a picture of quality and cost."""

import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from systems import METRICS, Result, Study


DRAWS = 2000
LEVEL = 0.95
# Of the lines of the picture: colours that differ in lightness, markers and dashes, so that they can be told apart in
# grey. Systems of LSG are filled.
STYLES: dict[str, tuple[str, str, tuple[float, ...]]] = {
    "BM25": ("#777777", "X", (1, 1.5)),
    "first 512 tokens": ("#999999", "v", (3, 2)),
    "mean of chunks": ("#E69F00", "o", (6, 2)),
    "best chunk": ("#D55E00", "s", (2, 1)),
    "source, tokens": ("#CC79A7", "^", (1, 1)),
    "full attention, one vector": ("#56B4E9", "D", (12, 1, 2, 1)),
    "LSG, one vector": ("#0072B2", "o", ()),
    "LSG, late chunks": ("#000000", "s", ()),
    "LSG, tokens": ("#009E73", "^", (8, 1.5)),
}


def draws(relevant: list[list[int]]) -> np.ndarray:
    """Weights of the queries in each draw, shape (draws, queries). Documents are drawn, with replacement, and their
    queries with them: those of one document stand or fall together."""
    _, cluster = np.unique([places[0] for places in relevant], return_inverse=True)
    count = cluster.max() + 1
    chosen = np.random.default_rng(0).integers(count, size=(DRAWS, count))
    weights: np.ndarray = np.stack([np.bincount(row, minlength=count) for row in chosen])[:, cluster]
    return weights


def interval(values: list[float], weights: np.ndarray, counts: np.ndarray | float = 1.0) -> tuple[float, float]:
    """The bootstrap interval of the mean, by percentiles; where values are sums, of so many each."""
    means = weights @ np.array(values) / (weights * counts).sum(axis=1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def with_interval(values: list[float], weights: np.ndarray, sign: str = "") -> str:
    low, high = interval(values, weights)
    return f"{np.mean(values):{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def table(rows: list[list[str]], numbers_from: int) -> str:
    """A Markdown table; columns from there on are numbers."""
    rule = ["---"] * numbers_from + ["---:"] * (len(rows[0]) - numbers_from)
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], rule, *rows[1:]])


def name(row: Result) -> str:
    """A system of a main reader."""
    return f"{row.title}, {row.system}" if row.vectors else row.title


def report(studies: list[Study], results: list[tuple[bool, Result]], chunk: int, machine: str) -> str:
    """Tables of quality and of cost for each length, and one of the LSG settings. Systems are compared with what the
    source makes of chunks of `chunk` tokens, their mean and the best of them."""
    parts = [f"Measured on {machine}."]
    for study in studies:
        own = [row for _, row in results if row.length == study.length]
        main = [row for first, row in results if first and row.length == study.length]
        weights = draws(study.corpus.relevant)
        compared = [row for row in main if row.system in (f"mean of chunks of {chunk}", f"best chunk of {chunk}")]
        rows = [["system", *METRICS, *(f"nDCG@10, less {row.system}" for row in compared)]]
        for row in main:
            cells = [with_interval(row.metrics[metric], weights) for metric in METRICS]
            rows.append([name(row), *cells, *(less(row, other, weights) for other in compared)])
        counts = f"{len(study.corpus.documents)} documents, {len(study.corpus.queries)} queries"
        parts.append(f"## {study.length:,} tokens\n\n{counts}; in brackets, {LEVEL:.0%} intervals.")
        parts.append(table(rows, 1))
        costs = [["system", "vectors", "KiB in the index", "seconds to read", "peak MiB"]]
        for row in main:
            sizes = [f"{row.vectors:.1f}" if row.vectors else "", f"{row.index_bytes / 1024:.2f}"]
            costs.append([name(row), *sizes, f"{row.seconds:.3f}", f"{row.peak_bytes / 2**20:.0f}"])
        parts.append("Of a document:\n\n" + table(costs, 1))
        settings = [row for row in own if row.title == "LSG"]
        if len({row.reader for row in settings}) > 1:
            base = {row.system: row for row in settings if row.reader == settings[0].reader}
            shown = [system for system in base if not system.startswith("tokens")]
            lines = [["setting", *(f"{system}, nDCG@10" for system in shown), "one vector, less the first"]]
            for reader in dict.fromkeys(row.reader for row in settings):
                found = {row.system: row for row in settings if row.reader == reader}
                cells = [with_interval(found[system].metrics["nDCG@10"], weights) for system in shown]
                lines.append([reader.removeprefix("LSG "), *cells, less(found[shown[0]], base[shown[0]], weights)])
            parts.append("LSG by its settings:\n\n" + table(lines, 1))
    return "\n\n".join(parts) + "\n"


def less(row: Result, other: Result, weights: np.ndarray) -> str:
    """The difference on the same queries, with its interval."""
    differences = [a - b for a, b in zip(row.metrics["nDCG@10"], other.metrics["nDCG@10"], strict=True)]
    return "0" if row is other else with_interval(differences, weights, "+")


def line_of(row: Result) -> str | None:
    """The line of the picture that a system of a main reader is on; None where it is on none."""
    names = (row.title, f"{row.title}, {row.system}", row.system)
    return next((line for line in STYLES if any(part.startswith(line) for part in names)), None)


def draw(path: Path, studies: list[Study], results: list[tuple[bool, Result]]) -> None:
    """Quality against length, and against the size of the index at the greatest length, where systems of one kind that
    differ in the length of their chunks are joined."""
    if find_spec("matplotlib") is None:
        print('no picture: matplotlib is missing; pip install ".[figures]" brings it', file=sys.stderr)
        return
    from matplotlib.figure import Figure

    lengths = sorted(study.length for study in studies)
    weights = {study.length: draws(study.corpus.relevant) for study in studies}
    lines: dict[str, dict[int, list[Result]]] = {}
    for first, row in results:
        line = line_of(row) if first else None
        if line:
            lines.setdefault(line, {}).setdefault(row.length, []).append(row)

    figure = Figure(figsize=(9, 4), dpi=160, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for place, (line, found) in enumerate((line, lines[line]) for line in STYLES if line in lines):
        color, marker, dashes = STYLES[line]
        shifted = [length * 1.02 ** (place - len(lines) / 2) for length in lengths]  # so that bars do not overlap
        of_first_chunks = [found[length][0] for length in lengths]
        sizes = [row.index_bytes / 1024 for row in found[lengths[-1]]]
        for axes, x, rows in ((left, shifted, of_first_chunks), (right, sizes, found[lengths[-1]])):
            means = [float(np.mean(row.metrics["nDCG@10"])) for row in rows]
            ends = np.array([interval(row.metrics["nDCG@10"], weights[row.length]) for row in rows])
            bar = axes.errorbar(
                x,
                means,
                yerr=np.abs(ends.T - means),
                label=name(of_first_chunks[0]),
                color=color,
                marker=marker,
                markerfacecolor=color if line.startswith("LSG") else "white",
                capsize=2,
                elinewidth=0.8,
            )
            bar.lines[0].set_dashes(dashes)
    left.set_xscale("log", base=2)
    left.set_xticks(lengths, [f"{length:,}" for length in lengths])
    left.set_xlabel("tokens of a document")
    left.set_ylabel("nDCG@10")
    right.set_xscale("log")
    right.xaxis.set_major_formatter("{x:g}")
    right.set_xlabel(f"KiB in the index for {lengths[-1]:,} tokens")
    for axes in (left, right):
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        handles=left.get_legend_handles_labels()[0], loc="outside right center", frameon=False, handlelength=3.5
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
