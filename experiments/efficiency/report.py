"""What is written and drawn: `results.json`, tables in `results.md`, and figures of cost against length."""

import argparse
import importlib
import json
import math
import os
import platform
import sys
import textwrap
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from contenders import CONTENDERS, VOCABULARY
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


def meanings(options: argparse.Namespace) -> dict[str, str]:
    """What the name of each measured model stands for."""
    return {contender.name: contender.meaning for contender in CONTENDERS if contender.name in options.models}


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


def write(folder: Path, options: argparse.Namespace, host: dict[str, Any], results: list[Measurement]) -> None:
    """`results.json`, which holds every measured second."""
    measured = []
    for result in results:
        medians = {f"median_{name}": median(getattr(result, name) or [math.nan]) for name in ("seconds", "ratios")}
        measured.append(vars(result) | {name: None if math.isnan(value) else value for name, value in medians.items()})
    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    content = {"machine": host, "arguments": arguments, "models": meanings(options), "measurements": measured}
    (folder / "results.json").write_text(json.dumps(content, indent=2) + "\n")


def read(folder: Path) -> tuple[argparse.Namespace, dict[str, Any], list[Measurement]]:
    """What `write` was given."""
    content = json.loads((folder / "results.json").read_text())
    names = [field.name for field in fields(Measurement)]
    results = [Measurement(**{name: item[name] for name in names}) for item in content["measurements"]]
    return argparse.Namespace(**content["arguments"]), content["machine"], results


def write_tables(folder: Path, options: argparse.Namespace, host: dict[str, Any], results: list[Measurement]) -> None:
    """`results.md`."""
    text = [
        f"Models of {setting(options, host)}; torch {host['torch']}, Transformers {host['transformers']}. "
        f"They have random weights and a vocabulary of {VOCABULARY} tokens. Times are medians of {options.repeats} "
        "rounds, in which the models take turns; a ratio is the median of those to the floor in the same round. "
        "A dash: it did not run, for the reason at the end.",
        "\n".join(f"- {name}: {meaning}" for name, meaning in meanings(options).items()),
    ]
    for mode in dict.fromkeys(result.mode for result in results):
        own = [result for result in results if result.mode == mode]
        title = "## " + MODES[mode].capitalize()
        step = title + (f", with Adam and dropout of {options.dropout:g} on attention" if mode == "training" else "")
        text.append(table(step + ": ratio to floor (seconds)", own, cost))
        memory = title + ": peak memory of the first one beyond the weights, MiB"
        text.append(table(memory, own, lambda result: f"{(result.peak_bytes or 0) / 2**20:,.0f}"))
    if missing := [f"- {r.model}, {MODES[r.mode]}, {r.length:,} tokens: {r.reason}" for r in results if r.reason]:
        text.append("## What did not run\n\n" + "\n".join(missing))
    (folder / "results.md").write_text("\n\n".join(text) + "\n")


def draw(folder: Path, options: argparse.Namespace, host: dict[str, Any], results: list[Measurement]) -> None:
    """`cost_<mode>.png`: the time per token against length; a line has no point where the model did not run."""
    try:
        figure_class = importlib.import_module("matplotlib.figure").Figure
    except ImportError:
        print('no figures: matplotlib is missing; pip install ".[figures]" brings it', file=sys.stderr)
        return
    folder.mkdir(parents=True, exist_ok=True)
    for mode in dict.fromkeys(result.mode for result in results):
        measured = [result for result in results if result.mode == mode]
        lengths = sorted({result.length for result in measured})
        reasons = [result.reason for result in measured if result.reason]
        title = textwrap.fill(setting(options, host), 90)
        if reasons:
            why = "too little memory" if all("memory" in reason.lower() for reason in reasons) else "see results.md"
            title += f"\nWhere a line has no point, the model did not run: {why}."
        costs: dict[str, dict[int, float]] = {}
        for result in measured:
            if result.reason is None:
                tokens = options.batch * result.length + options.short_texts * SHORT
                costs.setdefault(result.model, {})[result.length] = 1000 * median(result.seconds) / tokens
        drawn = [contender for contender in CONTENDERS if contender.name in costs]
        figure = figure_class(figsize=(6, 4), dpi=200, layout="constrained")
        axes = figure.add_subplot()
        # The legend lists the lines from top to bottom, as they end.
        for contender in sorted(drawn, key=lambda contender: list(costs[contender.name].values())[-1], reverse=True):
            own = costs[contender.name]
            color, marker, dashes = contender.style
            axes.plot(
                lengths,
                [own.get(length, math.nan) for length in lengths],
                color=color,
                marker=marker,
                dashes=dashes,
                markerfacecolor=color if contender.family == "lsg" else "white",
                label=contender.name + (f"\n(to {max(own):,})" if max(own) < lengths[-1] else ""),
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.yaxis.set_major_locator(importlib.import_module("matplotlib.ticker").LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.set_xlabel("tokens")
        axes.set_ylabel(f"ms per token, {MODES[mode]}")
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(title, x=0.01, ha="left", fontsize=9)
        figure.legend(loc="outside right center", frameon=False, handlelength=3)
        figure.savefig(folder / f"cost_{mode}.png")
