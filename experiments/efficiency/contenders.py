"""Who takes part in the benchmark: the models, how each is built, and the floor that all are compared with."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import transformers
from transformers import PreTrainedModel, RobertaModel

from lsg_converter.modeling.modeling_lsg_roberta import LSGRobertaConfig, LSGRobertaModel


VOCABULARY = 1000
BIGBIRD_BLOCK, BIGBIRD_RANDOM = 64, 3
BIGBIRD_FULL = (5 + 2 * BIGBIRD_RANDOM) * BIGBIRD_BLOCK  # up to which it replaces its attention by full attention
BIGBIRD = (
    f"blocks of {BIGBIRD_BLOCK}, {BIGBIRD_RANDOM} random ones, without dropout on attention; "
    f"full attention up to {BIGBIRD_FULL} tokens"
)
FLOOR = "floor"


@dataclass(frozen=True)
class Contender:
    """A line of the tables, and the colour, marker and dashes of its line in the figures; `fields` are those of LSG."""

    name: str
    family: str
    style: tuple[str, str, tuple[float, ...]]
    meaning: str
    fields: dict[str, Any] = field(default_factory=dict)


def lsg(block: int, sparse: int, factor: int, *style: Any) -> Contender:
    keys = f"{sparse} sparse keys a side (norm, factor {factor})" if sparse else "no sparse keys"
    meaning = f"blocks of {block}, {keys}, 1 global token; full attention up to {2 * block} tokens"
    fields = {"block_size": block, "sparse_block_size": sparse, "sparsity_factor": factor}
    return Contender(f"LSG {block}/{sparse}", "lsg", style, meaning, fields)


LSG_FIELDS: dict[str, Any] = {"sparsity_type": "norm", "num_global_tokens": 1}
# The colours of Okabe and Ito, which colour-blind readers tell apart too; markers and dashes do without colour.
LSG_128 = lsg(128, 128, 2, "#56B4E9", "s", ())
PUBLISHED = Contender(
    "published LSG", "published", ("#882255", "*", (6, 1, 1, 1)), "LSG 128/128 of lsg-converter 0.1.9"
)
CONTENDERS = [
    Contender(
        FLOOR, "lsg", ("#777777", ".", (1, 1.5)), "LSG 128/128 whose attention gives back its values", LSG_128.fields
    ),
    lsg(256, 0, 2, "#0072B2", "o", (8, 1.5)),
    LSG_128,
    lsg(32, 32, 4, "#009E73", "^", (4, 1)),
    PUBLISHED,
    Contender("full", "full", ("#000000", "D", (12, 1, 2, 1)), "RoBERTa with sdpa"),
    Contender("Longformer", "longformer", ("#E69F00", "v", (3, 2)), "256 tokens to each side, 1 global token"),
    Contender("BigBird", "bigbird", ("#D55E00", "P", (3, 1, 1, 1)), BIGBIRD),
    Contender(
        "ModernBERT",
        "modernbert",
        ("#CC79A7", "X", (3, 1, 1, 1, 1, 1)),
        "64 tokens to each side, each third layer full",
    ),
]


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

    with mock.patch("lsg_converter.modeling.lsg_modules.lsg_attention", identity):
        yield
