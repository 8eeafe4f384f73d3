"""How the cost is measured: rounds in which the models take turns, and the peak memory of the first step of each."""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import steps
import torch
import transformers
from contenders import (
    CONTENDERS,
    FLOOR,
    LSG_128,
    LSG_FIELDS,
    PUBLISHED,
    VOCABULARY,
    Contender,
    bert_fields,
    build,
    without_attention,
)
from steps import growth, new_optimizer, step
from transformers import PreTrainedModel, RobertaModel

from lsg_converter.modeling.modeling_lsg_roberta import LSGRobertaModel


MODES = {"forward": "forward pass", "training": "training step"}
SHORT = 300  # tokens of each of the short texts
STOCK = (RobertaModel, transformers.LongformerModel, transformers.BigBirdModel, transformers.ModernBertModel)
# What the process imports once from which each first step on a CPU is forked.
PRELOADED = [model.__module__ for model in (LSGRobertaModel, *STOCK)]


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

    On a CPU another process takes them, forked from a small one that has the imports done.
    """
    options = bench.options
    if contender.family == PUBLISHED.family:
        return int(bench.published.ask("first", mode))
    if options.device == "cuda":
        bench.begin(contender)
        return growth(partial(bench.step, contender, mode), options.device)
    job = (contender, mode, bench.length, options, torch.get_num_threads())
    forkserver = get_context("forkserver")
    forkserver.set_forkserver_preload(PRELOADED)
    with ProcessPoolExecutor(1, mp_context=forkserver) as pool:
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
