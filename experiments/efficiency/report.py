"""What is written and drawn: `results.json`, tables in `results.md`, and figures of cost against length."""

import argparse
import importlib
import json
import math
import os
import platform
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from contenders import CONTENDERS, VOCABULARY, Contender
from measurement import MODES, SHORT, Measurement


def machine(device: str) -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        with suppress(OSError, StopIteration):
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def setting(options: argparse.Namespace, host: dict[str, Any]) -> str:
    """What the tables and figures were measured on, in one line."""
    where = host["device"] + (f", {host['threads']} threads" if options.device == "cpu" else "")
    batch = f"batch of {options.batch}" + f" and {options.short_texts} of {SHORT} tokens" * bool(options.short_texts)
    return f"{options.layers} layers of width {options.width}, {batch}, {options.dtype}, {where}"


def table(title: str, results: list[Measurement], cell: Callable[[Measurement], str]) -> str:
    """A Markdown table, rows models and columns lengths."""
    lengths = sorted({result.length for result in results})
    rows = [["", *(f"{length:,}" for length in lengths)], ["---", *["---:"] * len(lengths)]]
    for name in dict.fromkeys(result.model for result in results):
        own = {result.length: result for result in results if result.model == name}
        rows.append([name, *("-" if own[n].reason else cell(own[n]) for n in lengths)])
    return f"{title}\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows)


def cost(result: Measurement) -> str:
    return f"{median(result.ratios):.2f} " * bool(result.ratios) + f"({median(result.seconds):.3g} s)"


def write(folder: Path, options: argparse.Namespace, results: list[Measurement]) -> None:
    """`results.json`, which holds every measured second, and `results.md`."""
    host = machine(options.device)
    measured = []
    for result in results:
        medians = {f"median_{name}": median(getattr(result, name) or [math.nan]) for name in ("seconds", "ratios")}
        measured.append(vars(result) | {name: None if math.isnan(value) else value for name, value in medians.items()})
    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    models = {contender.name: contender.meaning for contender in CONTENDERS if contender.name in options.models}
    content = {"machine": host, "arguments": arguments, "models": models, "measurements": measured}
    (folder / "results.json").write_text(json.dumps(content, indent=2) + "\n")
    text = [
        f"Models of {setting(options, host)}; torch {host['torch']}, Transformers {host['transformers']}. "
        f"They have random weights and {VOCABULARY} words. Times are medians of {options.repeats} rounds, in which the "
        "models take turns; a ratio is the median of those to the floor in the same round. A dash: it did not run, and "
        "`results.json` says why.",
        "\n".join(f"- {name}: {meaning}" for name, meaning in models.items()),
    ]
    for mode in dict.fromkeys(result.mode for result in results):
        own = [result for result in results if result.mode == mode]
        title = "## " + MODES[mode].capitalize()
        step = title + (f", with Adam and dropout of {options.dropout:g} on attention" if mode == "training" else "")
        text.append(table(step + ": ratio to floor (seconds)", own, cost))
        memory = title + ": peak memory of the first one beyond the weights, MiB"
        text.append(table(memory, own, lambda result: f"{(result.peak_bytes or 0) / 2**20:,.0f}"))
    (folder / "results.md").write_text("\n\n".join(text) + "\n")


def draw(folder: Path, options: argparse.Namespace, results: list[Measurement]) -> None:
    """`cost_<mode>.png`: seconds against length, each line with its name at its end."""
    try:
        figure_class = importlib.import_module("matplotlib.figure").Figure
    except ImportError:
        print('no figures: matplotlib is missing; pip install ".[efficiency]" brings it', file=sys.stderr)
        return
    folder.mkdir(parents=True, exist_ok=True)
    for mode in dict.fromkeys(result.mode for result in results):
        figure = figure_class(figsize=(8, 5), dpi=150, layout="constrained")
        axes = figure.add_subplot()
        ends: dict[int, list[tuple[float, Contender]]] = {}
        for contender in CONTENDERS:
            own = [r for r in results if (r.mode, r.model, r.reason) == (mode, contender.name, None)]
            if own:
                color, marker, style = contender.line
                seconds = [median(result.seconds) for result in own]
                axes.plot([r.length for r in own], seconds, color=color, marker=marker, linestyle=style, markersize=5)
                ends.setdefault(own[-1].length, []).append((seconds[-1], contender))
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(options.lengths, [f"{length:,}" for length in options.lengths])
        axes.yaxis.set_major_locator(importlib.import_module("matplotlib.ticker").LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("tokens")
        axes.set_ylabel(f"seconds for one {MODES[mode]}")
        axes.set_title(setting(options, machine(options.device)), fontsize=9, loc="left")
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        # Names that would overlap move up, by a share of the height of the figure.
        low, high = map(math.log, axes.get_ylim())
        for length, lines in ends.items():
            place = -math.inf
            for seconds_at_end, contender in sorted(lines, key=lambda line: line[0]):
                place = max(math.log(seconds_at_end), place + 0.045 * (high - low))
                axes.annotate(
                    contender.name,
                    (length, seconds_at_end),
                    (length * (options.lengths[-1] / options.lengths[0]) ** 0.04, math.exp(place)),
                    color=contender.line[0],
                    va="center",
                    arrowprops={"arrowstyle": "-", "color": contender.line[0], "linewidth": 0.6, "shrinkB": 3},
                )
        figure.savefig(folder / f"cost_{mode}.png")
