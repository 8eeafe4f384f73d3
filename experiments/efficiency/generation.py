"""Measure what a step of generation costs behind texts of several lengths: LSG-BERT beside the stock BERT.

Both are decoders of random weights, of one width and one number of layers. Their caches are filled with random keys and
values, since a step costs the same whatever they are. In each round every model takes its steps behind every text in
turn, so that noise hits all alike.

    python experiments/efficiency/generation.py
"""

import argparse
import statistics
import time
from collections import defaultdict
from typing import Any, cast

import torch
from transformers import BertConfig, BertLMHeadModel, DynamicCache

from lsg_converter.modeling.modeling_lsg_bert import LSGBertConfig, LSGBertLMHeadModel  # type: ignore[attr-defined]


def filled_cache(model: Any, tokens: int) -> DynamicCache:
    """A cache that holds `tokens` tokens, of which the model has read the first."""
    config, cache = model.config, DynamicCache()
    model(torch.tensor([[1]]), past_key_values=cache, use_cache=True)
    shape = (1, config.num_attention_heads, tokens, config.hidden_size // config.num_attention_heads)
    for layer in cast(list[Any], cache.layers):
        layer.keys, layer.values = torch.randn(shape), torch.randn(shape)
    return cache


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384, 65536], help="tokens in front")
    parser.add_argument("--layers", type=int, default=2, help="of BERT-base's width (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="in a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    options = parser.parse_args()
    if min(*options.lengths, options.layers, options.steps, options.rounds) < 1:
        parser.exit(2, "error: lengths, layers, steps and rounds must be at least 1\n")
    sizes: dict[str, Any] = {
        "num_hidden_layers": options.layers,
        "max_position_embeddings": max(options.lengths) + options.steps * (options.rounds + 1) + 1,
        "is_decoder": True,
        "vocab_size": 1000,
    }
    models = {"LSG 128/128": LSGBertLMHeadModel(LSGBertConfig(**sizes)), "full": BertLMHeadModel(BertConfig(**sizes))}
    seconds = defaultdict(list)
    for length in options.lengths:
        caches = {name: filled_cache(model.eval(), length) for name, model in models.items()}
        for number in range(options.rounds + 1):
            for name, model in models.items():
                start = time.perf_counter()
                for _ in range(options.steps):
                    model(torch.tensor([[1]]), past_key_values=caches[name], use_cache=True)
                if number:  # The first round makes room.
                    seconds[name, length].append((time.perf_counter() - start) / options.steps)
    names = list(models)
    print(f"{options.layers} layers, {torch.get_num_threads()} threads, float32; milliseconds of a step, medians")
    print(f"{'tokens in front':>15s}" + "".join(f"{name:>14s}" for name in names) + f"{'full / LSG':>14s}")
    for length in options.lengths:
        own, full = (seconds[name, length] for name in names)
        ratio = statistics.median(b / a for a, b in zip(own, full, strict=True))
        cells = "".join(f"{1000 * statistics.median(x):14.1f}" for x in (own, full))
        print(f"{length:15,d}{cells}{ratio:14.2f}")


if __name__ == "__main__":
    main()
