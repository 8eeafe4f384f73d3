"""Measure what relative positions cost: models that have them, beside the same without, and beside the stock models.

All have the width of their base size, random weights, and LSG 128/128. In each round they take a training step each, in
turn, so that noise hits all alike; the peak memory is that of a first step, in a process of its own.

    python experiments/efficiency/relative.py
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from typing import Any
from unittest import mock

import torch
from steps import growth, new_optimizer, step
from transformers import PreTrainedModel, logging

from lsg_converter import families
from lsg_converter.modeling import lsg_modules


SHAPES: dict[str, dict[str, Any]] = {
    "mpnet": {"num_hidden_layers": "layers", "max_position_embeddings": "positions"},
    "t5": {"num_layers": "layers", "d_model": 768, "num_heads": 12, "d_kv": 64, "d_ff": 3072},
    "deberta-v2": {  # as in DeBERTa-v3
        **{"num_hidden_layers": "layers", "max_position_embeddings": "positions", "hidden_size": 768},
        **{"num_attention_heads": 12, "intermediate_size": 3072, "position_biased_input": False},
        **{"relative_attention": True, "position_buckets": 256, "norm_rel_ebd": "layer_norm"},
        **{"share_att_key": True, "pos_att_type": ["p2c", "c2p"]},
    },
}
WITH, WITHOUT, STOCK = "LSG", "LSG without", "stock"


def build(name: str, length: int, layers: int, stock: bool) -> PreTrainedModel:
    """A base model, or its encoder, with random weights, for texts of `length` tokens."""
    family, sizes = families.family(name), {"layers": layers, "positions": length + 2}
    fields = {
        field: sizes[value] if isinstance(value, str) and value in sizes else value
        for field, value in SHAPES[name].items()
    }
    config_class, model_class = family.config_class, family.base_class
    if stock:
        config_class, model_class = families.stock_class(config_class), families.stock_class(model_class)
    torch.manual_seed(0)
    model: Any = model_class(config_class(vocab_size=1000, **fields))
    return model.get_encoder() if model.config.is_encoder_decoder else model


@contextmanager
def without_bias() -> Iterator[None]:
    """While it lasts, no LSG model adds anything to its scores."""
    attention: Callable[..., Any] = lsg_modules.lsg_attention

    def plain(*tensors: torch.Tensor, bias: Any = None, **options: Any) -> Any:
        return attention(*tensors, **options)

    with mock.patch.object(lsg_modules, "lsg_attention", plain):
        yield


class Bench:
    """The models of a family, at one length."""

    def __init__(self, name: str, length: int, layers: int, stock: bool) -> None:
        models = {WITH: build(name, length, layers, stock=False)}
        if stock:
            models[STOCK] = build(name, length, layers, stock=True)
        self.steps = {key: (model, new_optimizer(model)) for key, model in models.items()}
        self.inputs = {"input_ids": torch.randint(5, 900, (1, length))}

    def run(self, which: str) -> float:
        """A training step; the seconds it took."""
        if which == WITHOUT:
            with without_bias():
                return step(*self.steps[WITH], self.inputs, "training")
        return step(*self.steps[which], self.inputs, "training")


def peak_bytes(name: str, length: int, layers: int, threads: int, stock: bool) -> int:
    """The bytes that a first step takes at its peak."""
    torch.set_num_threads(threads)
    Bench(name, 64, 1, stock).run(STOCK if stock else WITH)  # It loads what torch loads late.
    bench = Bench(name, length, layers, stock)
    return growth(partial(bench.run, STOCK if stock else WITH), "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384], help="tokens")
    parser.add_argument("--stock_up_to", type=int, default=4096, help="tokens, for the stock models (default: 4096)")
    parser.add_argument("--layers", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    options = parser.parse_args()
    if min(*options.lengths, options.layers, options.rounds) < 1:
        parser.exit(2, "error: lengths, layers and rounds must be at least 1\n")
    logging.set_verbosity_error()
    threads = torch.get_num_threads()
    print(f"a training step of {options.layers} layers, {threads} threads, float32; medians of {options.rounds} rounds")
    columns = ("tokens", "seconds", "LSG / without", "stock / LSG", "LSG MiB", "stock MiB")
    print(f"{'':12s}" + "".join(f"{column:>15s}" for column in columns), flush=True)
    for name in options.models:
        for length in options.lengths:
            stock = length <= options.stock_up_to
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                jobs = [
                    pool.submit(peak_bytes, name, length, options.layers, threads, which)
                    for which in (False, True)[: 1 + stock]
                ]
                peaks = [job.result() / 2**20 for job in jobs]
            bench = Bench(name, length, options.layers, stock)
            turns = (WITH, WITHOUT, STOCK)[: 2 + stock]
            rounds = [{which: bench.run(which) for which in turns} for _ in range(options.rounds + 1)][1:]

            def ratio(a: str, b: str, rounds: list[dict[str, float]] = rounds) -> str:
                return f"{statistics.median(one[a] / one[b] for one in rounds):15.2f}"

            cells = [f"{length:15,d}", f"{statistics.median(one[WITH] for one in rounds):15.2f}", ratio(WITH, WITHOUT)]
            cells += [ratio(STOCK, WITH) if stock else f"{'-':>15s}", f"{peaks[0]:15,.0f}"]
            print(f"{name:12s}" + "".join(cells) + (f"{peaks[1]:15,.0f}" if stock else f"{'-':>15s}"), flush=True)


if __name__ == "__main__":
    main()
