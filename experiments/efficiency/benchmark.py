"""Measure what a forward pass and a training step cost: LSG-RoBERTa, full attention, and three other long models.

All models have random weights, one width and one number of layers. They run in one process and in turn, so that noise
hits all alike, and each is compared with a floor: the same LSG-RoBERTa whose attention gives back its values, and
computes nothing between the projections. Figures need matplotlib (`pip install ".[figures]"`). `contenders.py` says
who takes part, `measurement.py` how it is measured, `report.py` what is written and drawn.

    python experiments/efficiency/benchmark.py --size small
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
from contenders import CONTENDERS, FLOOR, PUBLISHED
from huggingface_hub.utils import tqdm
from measurement import MODES, SHORT, Bench, Measurement, measure, quiet
from report import draw, machine, read, write, write_tables


LENGTHS = [512, 1024, 2048, 4096, 8192, 16384]
LAYERS = {"base": 12, "small": 2}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; --help lists the options\n")


def whole(text: str, least: int = 0) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"got {text!r}; it must be a whole number, at least {least}")
    return int(text)


def positive(text: str) -> int:
    return whole(text, least=1)


def probability(text: str) -> float:
    with suppress(ValueError):
        if 0 <= float(text) < 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"got {text!r}; it must be a number from 0 to less than 1")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description="Measure what a forward pass and a training step of long models cost.")
    add = parser.add_argument
    add("--size", choices=LAYERS, default="base", help="base: as RoBERTa-base, 12 layers; small: 2 layers of it")
    add("--layers", type=positive, help="another number of layers")
    add("--width", type=positive, default=768, help=argparse.SUPPRESS)
    add("--lengths", type=positive, nargs="+", default=LENGTHS, help="in tokens (default: 512 to 16384)")
    add("--batch", type=positive, default=1, help="texts in a batch (default: %(default)s)")
    add("--short_texts", type=whole, default=0, help=f"texts of {SHORT} tokens in the batch beside them")
    names = [contender.name for contender in CONTENDERS]
    add("--models", choices=names, nargs="+", default=names, help="the floor is always among them", metavar="MODEL")
    add("--published", type=Path, help="the folder of the published implementation; docs/kernels.md makes it")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and states")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--modes", choices=MODES, nargs="+", default=list(MODES), help="what to measure")
    add("--repeats", type=positive, default=5, help="rounds over the models (default: %(default)s)")
    add("--dropout", type=probability, default=0.1, help="on attention, in training (default: %(default)s)")
    add("--output", type=Path, default=Path("experiments/efficiency/results"), help="the folder of the tables")
    add("--figures", type=Path, default=Path("img"), help="the folder of the figures (default: %(default)s)")
    redraw = "measure nothing: write tables and figures from results.json in --output again; other flags do not count"
    add("--redraw", action="store_true", help=redraw)
    options = parser.parse_args(arguments)
    options.layers = options.layers or LAYERS[options.size]
    options.lengths = sorted(set(options.lengths))
    options.modes = list(dict.fromkeys(options.modes))
    if options.published is None and options.models != names and PUBLISHED.name in options.models:
        parser.error(f"--models: {PUBLISHED.name!r} needs --published, the folder of the published implementation")
    if options.published is not None and not (options.published / "lsg_converter" / "roberta").is_dir():
        parser.error(f"--published: {str(options.published)!r} holds no lsg_converter 0.1.9")
    skipped = () if options.published else (PUBLISHED.name,)
    options.models = [name for name in names if name == FLOOR or (name in options.models and name not in skipped)]
    if options.short_texts and min(options.lengths) < SHORT:
        parser.error(f"--short_texts: got lengths from {min(options.lengths)} on; they must be at least {SHORT}")
    if options.width % 2 or options.width % max(options.width // 64, 1):
        parser.error(f"--width: got {options.width}; it must be even, and from 128 on a multiple of 64")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: got 'cuda', and torch finds no such device")
    return options


def run(options: argparse.Namespace, host: dict[str, Any]) -> tuple[list[Measurement], int]:
    """What was measured, which `results.json` holds as far as it got, and the exit code."""
    quiet()
    options.output.mkdir(parents=True, exist_ok=True)
    results: list[Measurement] = []
    total = len(options.lengths) * len(options.modes) * len(options.models) * (options.repeats + 1)
    try:
        with tqdm(total=total) as progress:
            for length in options.lengths:
                bench = Bench(length, options)
                for mode in options.modes:
                    results += measure(bench, mode, progress)
                    write(options.output, options, host, results)
                bench.close()
    except KeyboardInterrupt:
        print("interrupted: tables and figures hold the lengths that were done", file=sys.stderr)
        return results, 130
    return results, 0


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    output, figures, code = options.output, options.figures, 0
    if options.redraw:
        try:
            options, host, results = read(output)
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(
                f"error: --redraw: no results of a run can be read in {str(output)!r} ({error!r}); "
                "measure first, or give --output its folder",
                file=sys.stderr,
            )
            return 2
    else:
        host = machine(options.device)
        results, code = run(options, host)
    if results:
        write_tables(output, options, host, results)
        draw(figures, options, host, results)
        print((output / "results.md").read_text(), end="")
    return code


if __name__ == "__main__":
    sys.exit(main())
