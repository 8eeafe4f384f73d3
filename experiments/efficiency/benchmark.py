"""Measure what a forward pass and a training step cost: LSG-RoBERTa, full attention, and three other long models.

All models have random weights, one width and one number of layers. They run in one process and in turn, so that noise
hits all alike, and each is compared with a floor: the same LSG-RoBERTa whose attention gives back its values, and
computes nothing between the projections. Figures need matplotlib (`pip install ".[efficiency]"`).

    python experiments/efficiency/benchmark.py --size small
"""

import argparse
import importlib
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, NoReturn
from unittest import mock

import steps
import torch
import transformers
from huggingface_hub.utils import tqdm
from steps import growth, new_optimizer, step
from transformers import PreTrainedModel, RobertaModel

from lsg_converter.modeling import lsg_modeling
from lsg_converter.modeling.modeling_lsg_roberta import LSGRobertaConfig, LSGRobertaModel


LENGTHS = {"base": [512, 1024, 2048, 4096, 8192, 16384], "small": [512, 1024, 2048, 4096]}
LAYERS = {"base": 12, "small": 2}
MODES = {"forward": "forward pass", "training": "training step"}
VOCABULARY = 1000
SHORT = 300  # tokens of each of the short texts
BIGBIRD_BLOCK, BIGBIRD_RANDOM = 64, 3
BIGBIRD_FULL = (5 + 2 * BIGBIRD_RANDOM) * BIGBIRD_BLOCK  # up to which it replaces its attention by full attention
BIGBIRD = (
    f"blocks of {BIGBIRD_BLOCK}, {BIGBIRD_RANDOM} random ones, which it drops nothing from in training; "
    f"full attention up to {BIGBIRD_FULL} tokens"
)
FLOOR = "floor"


@dataclass(frozen=True)
class Contender:
    """A line of the tables, and its colour, marker and line style in the figures; `fields` are those of LSG."""

    name: str
    family: str
    line: tuple[str, str, str]
    meaning: str
    fields: dict[str, Any] = field(default_factory=dict)


def lsg(block: int, sparse: int, factor: int, *line: str) -> Contender:
    keys = f"{sparse} sparse keys a side (norm, factor {factor})" if sparse else "no sparse keys"
    meaning = f"blocks of {block}, {keys}, 1 global token; full attention up to {2 * block} tokens"
    fields = {"block_size": block, "sparse_block_size": sparse, "sparsity_factor": factor}
    return Contender(f"LSG {block}/{sparse}", "lsg", (line[0], line[1], "-"), meaning, fields)


LSG_FIELDS: dict[str, Any] = {"sparsity_type": "norm", "num_global_tokens": 1}
# The colours of Okabe and Ito, which colour-blind readers tell apart too.
LSG_128 = lsg(128, 128, 2, "#56B4E9", "s")
PUBLISHED = Contender("published LSG", "published", ("#882255", "*", "-"), "LSG 128/128 of lsg-converter 0.1.9")
CONTENDERS = [
    Contender(
        FLOOR, "lsg", ("#777777", ".", "--"), "LSG 128/128 whose attention gives back its values", LSG_128.fields
    ),
    lsg(256, 0, 2, "#0072B2", "o"),
    LSG_128,
    lsg(32, 32, 4, "#009E73", "^"),
    PUBLISHED,
    Contender("full", "full", ("#000000", "D", "-"), "RoBERTa with sdpa"),
    Contender("Longformer", "longformer", ("#E69F00", "v", "-"), "256 tokens to each side, 1 global token"),
    Contender("BigBird", "bigbird", ("#D55E00", "P", "-"), BIGBIRD),
    Contender("ModernBERT", "modernbert", ("#CC79A7", "X", "-"), "64 tokens to each side, each third layer full"),
]


@dataclass
class Measurement:
    """What one model cost at one length: a second and a ratio to the floor for each round, or why there is none."""

    mode: str
    length: int
    model: str
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    reason: str | None = None


class Values(torch.autograd.Function):
    """The values. Query and key get the gradient too, so that the floor trains their projections as all others do."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return gradient, gradient, gradient


@contextmanager
def without_attention() -> Iterator[None]:
    """While it lasts, the attention of every LSG model gives back its values."""

    def identity(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> tuple[Any, None]:
        return Values.apply(query, key, value), None

    with mock.patch.object(lsg_modeling, "lsg_attention", identity):
        yield


def shape_fields(options: argparse.Namespace) -> dict[str, Any]:
    """The fields that all configurations have."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": options.width,
        "num_attention_heads": max(options.width // 64, 1),
        "num_hidden_layers": options.layers,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }


def bert_fields(length: int, options: argparse.Namespace) -> dict[str, Any]:
    """Those of models like BERT."""
    return shape_fields(options) | {
        "intermediate_size": 4 * options.width,
        "max_position_embeddings": length + 2,
        "attention_probs_dropout_prob": options.dropout,
    }


def build(family: str, length: int, options: argparse.Namespace) -> PreTrainedModel:
    """A model with random weights, for texts of `length` tokens."""
    bert = bert_fields(length, options)
    torch.manual_seed(0)
    model: PreTrainedModel
    if family == "lsg":
        config = LSGRobertaConfig(**bert, **LSG_FIELDS)
        model = LSGRobertaModel(config, add_pooling_layer=False)
    elif family == "full":
        model = RobertaModel(transformers.RobertaConfig(**bert), add_pooling_layer=False)
        model.set_attn_implementation("sdpa")
    elif family == "longformer":
        bert["attention_window"] = [512] * options.layers
        model = transformers.LongformerModel(transformers.LongformerConfig(**bert), add_pooling_layer=False)
    elif family == "bigbird":
        bert["attention_type"] = "block_sparse" if length > BIGBIRD_FULL else "original_full"
        bert |= {"block_size": BIGBIRD_BLOCK, "num_random_blocks": BIGBIRD_RANDOM}
        bert["max_position_embeddings"] = -(-length // BIGBIRD_BLOCK) * BIGBIRD_BLOCK  # It pads to whole blocks.
        model = transformers.BigBirdModel(transformers.BigBirdConfig(**bert), add_pooling_layer=False)
    else:
        # Its feed-forward layer is gated: at 8/3 of the width it has as many weights as the others' at 4 times.
        shape = shape_fields(options) | {"intermediate_size": 8 * options.width // 3, "max_position_embeddings": length}
        shape |= {"cls_token_id": 0, "sep_token_id": 2, "attention_dropout": options.dropout}
        model = transformers.ModernBertModel(transformers.ModernBertConfig(**shape))
    return model.to(options.device, getattr(torch, options.dtype))


class Bench:
    """The models for one length. Those of one family share weights, gradients and optimizer, to save memory."""

    def __init__(self, length: int, options: argparse.Namespace) -> None:
        self.length, self.options = length, options
        self.models: dict[str, PreTrainedModel] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        torch.manual_seed(0)
        rows = options.batch + options.short_texts
        self.tokens = torch.randint(3, VOCABULARY, (rows, length), device=options.device)
        self.mask = torch.ones_like(self.tokens)
        self.mask[options.batch :, SHORT:] = 0

    def model(self, contender: Contender) -> PreTrainedModel:
        if contender.family not in self.models:
            self.models[contender.family] = build(contender.family, self.length, self.options)
        for name, value in contender.fields.items():
            setattr(self.models[contender.family].config, name, value)
        return self.models[contender.family]

    def begin(self, contender: Contender) -> None:
        """Forget gradients and the optimizer's state, so that the next step allocates them."""
        self.optimizers[contender.family] = new_optimizer(self.model(contender))

    def step(self, contender: Contender, mode: str) -> float:
        """One forward pass or one training step; the seconds it took."""
        if contender.family == PUBLISHED.family:
            return self.published.ask("step", mode)
        model, optimizer = self.model(contender), self.optimizers[contender.family]
        inputs = {"input_ids": self.tokens, "attention_mask": self.mask}
        if contender.family == "longformer":
            inputs["global_attention_mask"] = torch.zeros_like(self.mask).index_fill(1, self.mask.new_zeros(1), 1)
        with without_attention() if contender.name == FLOOR else nullcontext():
            return step(model, optimizer, inputs, mode)

    def close(self) -> None:
        if "published" in vars(self):
            self.published.close()

    @cached_property
    def published(self) -> "Published":
        return Published(self)


class Published:
    """The published implementation, in a process of its own: it does not run on the Transformers of this one."""

    def __init__(self, bench: Bench) -> None:
        options = bench.options
        job = {
            "config": bert_fields(bench.length, options) | LSG_128.fields | LSG_FIELDS,
            "tokens": bench.tokens.tolist(),
            "mask": bench.mask.tolist(),
            "device": options.device,
            "dtype": options.dtype,
            "threads": torch.get_num_threads(),
        }
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, steps.__file__],
            env={**os.environ, "PYTHONPATH": str(options.published.resolve())},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        self.say(json.dumps(job))

    def say(self, line: str) -> None:
        with suppress(BrokenPipeError):  # It has ended, which `ask` will find.
            print(line, file=self.process.stdin, flush=True)

    def ask(self, question: str, mode: str) -> float:
        """What `steps.py` answers."""
        self.say(f"{question} {mode}")
        answer = self.process.stdout.readline() if self.process.stdout is not None else ""
        if not answer:
            self.errors.seek(0)
            lines = self.errors.read().strip().splitlines()
            raise RuntimeError(f"its process ended: {lines[-1] if lines else 'no message'}")
        return float(answer)

    def close(self) -> None:
        self.process.communicate()


def available_memory() -> float:
    """Bytes that this machine could still give, where it says so."""
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return math.inf


def resident_growth(contender: Contender, mode: str, length: int, options: argparse.Namespace, threads: int) -> int:
    """Bytes by which a first step raises this process's peak of resident memory."""
    quiet()
    torch.set_num_threads(threads)
    with suppress(OSError):  # If memory runs out, let it be this process that the system ends.
        Path("/proc/self/oom_score_adj").write_text("1000")
    free = available_memory()
    if free < math.inf:
        resource.setrlimit(resource.RLIMIT_DATA, (int(0.9 * free), resource.RLIM_INFINITY))
    # A short text on a model of one layer loads what torch loads late.
    for tokens, layers in ((64, 1), (length, options.layers)):
        bench = Bench(tokens, argparse.Namespace(**{**vars(options), "layers": layers}))
        bench.begin(contender)
        peak = growth(partial(bench.step, contender, mode), "cpu")
    return peak


def first_step(bench: Bench, contender: Contender, mode: str) -> int:
    """Warm a model up; the bytes that its first step takes at the peak, beyond those of the weights.

    On a CPU another process takes them: a small one with the imports done, which `main` keeps ready to be forked.
    """
    options = bench.options
    if contender.family == PUBLISHED.family:
        return int(bench.published.ask("first", mode))
    if options.device == "cuda":
        bench.begin(contender)
        return growth(partial(bench.step, contender, mode), options.device)
    job = (contender, mode, bench.length, options, torch.get_num_threads())
    with ProcessPoolExecutor(1, mp_context=get_context("forkserver")) as pool:
        peak = pool.submit(resident_growth, *job).result()
    if peak > 0.9 * (free := available_memory()):
        raise MemoryError(f"a step takes {peak / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB are free")
    bench.begin(contender)
    bench.step(contender, mode)
    return peak


def attempt(measurement: Measurement, run: Callable[..., Any], *arguments: Any) -> Any:
    """What `run` gives; where it fails, None, and the reason in `measurement`."""
    try:
        return run(*arguments)
    except Exception as error:
        text = (str(error).strip() or "no message").splitlines()[0][:300]
        measurement.reason = f"{type(error).__name__}: {text}"
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def measure(bench: Bench, mode: str, progress: Any) -> list[Measurement]:
    """All models in turn, round by round."""
    contenders = [contender for contender in CONTENDERS if contender.name in bench.options.models]
    results = [Measurement(mode, bench.length, contender.name) for contender in contenders]
    for turn in range(bench.options.repeats + 1):
        for contender, result in zip(contenders, results, strict=True):
            progress.set_description(f"{mode}, {bench.length} tokens, {contender.name}")
            if result.reason is None and turn == 0:
                result.peak_bytes = attempt(result, first_step, bench, contender, mode)
            elif result.reason is None:
                seconds = attempt(result, bench.step, contender, mode)
                result.seconds += [] if seconds is None else [seconds]
            progress.update()
    floor = next(result.seconds for result in results if result.model == FLOOR)
    for result in results:
        result.ratios = [own / least for own, least in zip(result.seconds, floor, strict=False)]
    for model in bench.models.values():
        model.zero_grad()
    bench.optimizers.clear()
    return results


def quiet() -> None:
    """No warning of Transformers for each model and length."""
    transformers.logging.set_verbosity_error()


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
    add("--lengths", type=positive, nargs="+", help="in tokens; 512 to 16384, or with --size small to 4096")
    add("--batch", type=positive, default=1, help="texts in a batch (default: %(default)s)")
    add("--short_texts", type=whole, default=0, help=f"texts of {SHORT} tokens in the batch beside them")
    names = [contender.name for contender in CONTENDERS]
    add("--models", choices=names, nargs="+", default=names, help="the floor is always among them", metavar="MODEL")
    add("--published", type=Path, help="the folder of the published implementation and what it needs: see the README")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and states")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--modes", choices=MODES, nargs="+", default=list(MODES), help="what to measure")
    add("--repeats", type=positive, default=5, help="rounds over the models (default: %(default)s)")
    add("--dropout", type=probability, default=0.1, help="on attention, in training (default: %(default)s)")
    add("--output", type=Path, default=Path("experiments/efficiency/results"), help="the folder of the tables")
    add("--figures", type=Path, default=Path("img"), help="the folder of the figures (default: %(default)s)")
    options = parser.parse_args(arguments)
    options.layers = options.layers or LAYERS[options.size]
    options.lengths = sorted(set(options.lengths or LENGTHS[options.size]))
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


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    quiet()
    stock = (RobertaModel, transformers.LongformerModel, transformers.BigBirdModel, transformers.ModernBertModel)
    get_context("forkserver").set_forkserver_preload([model.__module__ for model in (LSGRobertaModel, *stock)])
    options.output.mkdir(parents=True, exist_ok=True)
    results: list[Measurement] = []
    steps = len(options.lengths) * len(options.modes) * len(options.models) * (options.repeats + 1)
    code = 0
    try:
        with tqdm(total=steps) as progress:
            for length in options.lengths:
                bench = Bench(length, options)
                for mode in options.modes:
                    results += measure(bench, mode, progress)
                    write(options.output, options, results)
                bench.close()
    except KeyboardInterrupt:
        print("interrupted: tables and figures hold the lengths that were done", file=sys.stderr)
        code = 130
    if results:
        draw(options.figures, options, results)
        print((options.output / "results.md").read_text(), end="")
    return code


if __name__ == "__main__":
    sys.exit(main())
