"""What T5, mT5 and UMT5 have in common.

A bias by distance stands in place of positions, scores are not scaled, and one class of stacks is both the encoder and
the decoder, of which the encoder has LSG. Stock layers of older Transformers hand on nothing but states, mask and bias,
so that those of the encoder are written here.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import initialization
from transformers.modeling_outputs import BaseModelOutput

from .lsg_classes import LSGWrapper
from .lsg_modules import LSGSelfAttention
from .lsg_seq2seq import LSGSeq2SeqEncoder, LSGSeq2SeqModel


class LSGT5StyleAttention(LSGSelfAttention):
    """Mixed into the self-attention of the encoder."""

    projections = ("q", "k", "v")
    has_relative_attention_bias: bool

    def distance_bias(self) -> torch.Tensor:
        """Its bias by distance, (heads, 2 R + 1), as `lsg_bias` says: R is one more than the distance from which on
        there is one bucket, since rounding may put that one before it."""
        reach = self.relative_attention_max_distance + 1  # type: ignore[attr-defined]
        # Of a query at place R and the keys at 0 to 2 R.
        return self.compute_bias(1, 2 * reach + 1, past_seen_tokens=reach)[0, :, 0].flip(-1)  # type: ignore[attr-defined]

    def place(self, query: torch.Tensor, key: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return query * query.shape[-1] ** 0.5, key  # by which the scores will be divided

    def finish(self, output: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.o(output)  # type: ignore[attr-defined]


def bounded(states: torch.Tensor) -> torch.Tensor:
    """In float16, as in the stock model, finite numbers in place of infinite ones."""
    if states.dtype != torch.float16:
        return states
    largest = torch.finfo(states.dtype).max
    most = torch.where(states.isinf().any(), largest - 1000, largest)
    return states.clamp(-most, most)


class LSGT5StyleBlock:
    """Mixed into a layer of the encoder: of T5 the first one has the bias of all, of UMT5 each has its own."""

    layer: nn.ModuleList

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor, bias: torch.Tensor | None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None, Any]:
        """The states, the bias by distance, and the probabilities where the kernel gives them."""
        first: Any = self.layer[0]
        attention: LSGT5StyleAttention = first.SelfAttention
        if attention.has_relative_attention_bias:
            bias = attention.distance_bias()
        normed = first.layer_norm(hidden_states)
        output, probabilities = attention(normed, attention_mask, position_bias=bias, **kwargs)  # type: ignore[operator]
        hidden_states = bounded(hidden_states + first.dropout(output))
        return bounded(self.layer[1](hidden_states)), bias, probabilities


class LSGT5StyleWeights:
    """Mixed into all models: how weights are drawn that a checkpoint lacks. The stock model draws those of a head where
    it meets the module that holds them, of which Transformers does not ask in code that comes with a checkpoint."""

    config: Any

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        factor = self.config.initializer_factor
        if isinstance(module, nn.Linear):
            initialization.normal_(module.weight, std=factor * module.in_features**-0.5)
            if module.bias is not None:
                initialization.zeros_(module.bias)
        elif isinstance(module, nn.Embedding) and module is getattr(self, "global_embeddings", None):
            initialization.normal_(module.weight, std=factor)  # as words


class LSGT5StyleEncoder(LSGT5StyleWeights, LSGSeq2SeqEncoder):
    """Mixed into the stack of layers."""

    lsg_modules = {"Attention": LSGT5StyleAttention, "Block": LSGT5StyleBlock}
    takes_cache = False
    positions_follow_padding = True

    @classmethod
    def special_positions(cls, config: Any) -> int:
        return 0  # of none

    def add_positions(self, text: torch.Tensor, ids: torch.Tensor | None, rows: torch.Tensor | None) -> torch.Tensor:
        return text

    def read(self, stock_forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        if arguments.get("input_ids") is not None or arguments.get("inputs_embeds") is None:
            return super().read(stock_forward, arguments)  # which raises
        self.fill_captured(arguments)
        others = {name: arguments.get(name) for name in ("seqlens", "promotion")}
        states, bias = self.dropout(arguments["inputs_embeds"]), None  # type: ignore[attr-defined]
        every_state: list[Any] = []
        every_probability: list[Any] = []
        for block in self.block:  # type: ignore[attr-defined]
            every_state.append(states if arguments["output_hidden_states"] else None)
            states, bias, probabilities = block(states, arguments["attention_mask"], bias, **others)
            every_probability.append(probabilities if arguments["output_attentions"] else None)
        states = self.dropout(self.final_layer_norm(states))  # type: ignore[attr-defined]
        captured = (*every_state, states) if arguments["output_hidden_states"] else None
        return BaseModelOutput(states, captured, tuple(every_probability) if every_probability[0] is not None else None)


class LSGT5StyleModel(LSGT5StyleWeights, LSGSeq2SeqModel):
    """Mixed into the models that have an encoder and a decoder themselves, with a head or without."""

    position_tables = ()


class LSGT5StyleWrapper(LSGT5StyleWeights, LSGWrapper):
    """Mixed into the models around another."""


class LSGT5StyleEncoderModel(LSGT5StyleWrapper):
    """Mixed into the model that is an encoder alone."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        config.is_encoder_decoder = config.use_cache = False  # which not all stock classes say


# The mixin of each other model, and what it holds.
HEADS = {
    "EncoderModel": (LSGT5StyleEncoderModel, "Stack"),
    "ForConditionalGeneration": (LSGT5StyleModel, "Stack"),
    "ForQuestionAnswering": (LSGT5StyleModel, "Stack"),
    "ForSequenceClassification": (LSGT5StyleWrapper, "Model"),
    "ForTokenClassification": (LSGT5StyleWrapper, "EncoderModel"),
}
