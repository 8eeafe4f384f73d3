"""DeBERTa's attention, of content and distance (arXiv 2006.03654), with LSG: what its two generations share.

A score is the sum of up to three terms: a query's product with a key, a query's with an embedding of the distance, and
a key's with another one, over `sqrt(head_dim * terms)`. Stock modules make a table of all pairs of tokens, and hand on
nothing that they do not know; so what is between the model and its attention is written anew here.
"""

import math
from typing import Any

import torch
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutput

from .lsg_bias import RelativeEmbeddings
from .lsg_config import LSGConfig
from .lsg_layout import require
from .lsg_modeling import LSGRestatedModel
from .lsg_modules import LSGEmbeddings, LSGEncoder, LSGLayer, LSGSelfAttention
from .lsg_packing import Packing


class LSGDisentangledConfig(LSGConfig):
    """The fields of a DeBERTa, of either generation."""

    @classmethod
    def settle(cls, config: Any) -> dict[str, Any]:
        spans = getattr(config, "max_relative_positions", -1)
        return {"max_relative_positions": config.max_position_embeddings if spans < 1 else spans}

    def validate_lsg(self) -> None:
        super().validate_lsg()
        mixed = getattr(self, "talking_head", False)
        require("talking_head", mixed, not mixed, "False: LSG does not mix the probabilities of heads")


class LSGDisentangledAttention(LSGSelfAttention):
    """Mixed into a self-attention: what it adds to scores, by its family's `embeddings_of` and `rows_of`."""

    pos_att_type: list[str]

    @property
    def num_terms(self) -> int:
        """How many terms the scores are scaled by."""
        return 1 + len({"c2p", "p2c"}.intersection(self.pos_att_type))

    @property
    def query_scale(self) -> float:
        """What `1 / sqrt(head_dim)` is multiplied by; the root is rounded to float32, as in the stock models."""
        head_dim = self.attention_head_size  # type: ignore[attr-defined]
        mantissa, exponent = math.frexp(math.sqrt(head_dim * self.num_terms))
        return math.sqrt(head_dim) / math.ldexp(round(mantissa * 2**24), exponent - 24)

    def embeddings_of(self, embeddings: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """What queries and what keys are multiplied with, (embeddings, heads * head_dim), by a family's projections of
        its embeddings of distances."""
        raise NotImplementedError

    def rows_of(self, distance: torch.Tensor) -> torch.Tensor:
        """Which embedding stands for a distance of a key from a query, not clamped."""
        return distance

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        rel_embeddings: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        bias = None if rel_embeddings is None else self.relative_embeddings(self.pos_dropout(rel_embeddings))  # type: ignore[attr-defined]
        return super().forward(hidden_states, attention_mask, position_bias=bias, **kwargs)

    def place(self, query: torch.Tensor, key: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return query * self.query_scale, key

    def relative_embeddings(self, embeddings: torch.Tensor) -> RelativeEmbeddings | None:
        """Of embeddings of distances, (embeddings, width); None where there are no terms of distance."""
        keys, queries = (
            None if x is None else x.unflatten(-1, (self.config.num_attention_heads, -1)).transpose(0, 1)
            for x in self.embeddings_of(embeddings)
        )
        if keys is None and queries is None:
            return None
        # No text has distances beyond this, nor are there other embeddings beyond the span.
        reach = max(self.config.max_position_embeddings, self.max_relative_positions)  # type: ignore[attr-defined]
        span = embeddings.shape[0] // 2
        distance = torch.arange(-reach, reach + 1, device=embeddings.device)
        rows = (self.rows_of(distance).long() + span).clamp(0, 2 * span - 1)
        return RelativeEmbeddings(keys, None if queries is None else queries * self.query_scale, rows)


class LSGDisentangledModule:
    """Mixed into the attention with what is behind it."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        output, probabilities = self.self(hidden_states, *args, **kwargs)  # type: ignore[attr-defined]
        return self.output(output, hidden_states), probabilities  # type: ignore[attr-defined]


class DisentangledStack:
    """The stock stack of layers, which hands on what it is given."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        rows: Packing | None = None,
        **kwargs: Any,
    ) -> Any:
        embedded, embeddings = hidden_states, self.get_rel_embedding()  # type: ignore[attr-defined]
        states, attentions = [embedded], []
        for layer in self.layer:  # type: ignore[attr-defined]
            hidden_states, probabilities = layer(hidden_states, attention_mask, embeddings, **kwargs)
            conv = getattr(self, "conv", None)
            if conv is not None and len(states) == 1:
                hidden_states = convolve(conv, embedded, hidden_states, attention_mask, rows, self.config)  # type: ignore[attr-defined]
            states.append(hidden_states)
            attentions.append(probabilities)
        return BaseModelOutput(
            last_hidden_state=hidden_states,
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions and self.config.kernel == "eager" else None,  # type: ignore[attr-defined]
        )


def convolve(
    conv: Any, embedded: torch.Tensor, states: torch.Tensor, mask: torch.Tensor, packing: Packing | None, config: Any
) -> torch.Tensor:
    """The convolution over embedded tokens that is added behind the first layer, each row by itself. A global token has
    no neighbours.

    Args:
        conv: the stock module; it sees zeros where a token is masked.
        embedded, states: of globals and text, (rows, tokens, width), before and behind the layer.
        mask: boolean, (rows, 1, 1, tokens).
        packing: how the rows lie, where they are packed.
    """

    def over(tokens: torch.Tensor) -> torch.Tensor:
        return conv.conv(tokens.transpose(1, 2)).transpose(1, 2)

    g, seen = config.num_global_tokens, embedded * mask[:, 0, 0, :, None]
    if packing is not None:
        seen = packing.unpack(seen)
    parts = [over(seen[:, :g].reshape(-1, 1, seen.shape[2])).view_as(seen[:, :g])] if g else []
    added = torch.cat([*parts, over(seen[:, g:])], dim=1)
    if packing is not None:
        added = packing.pack(added)
    return conv.LayerNorm(states + ACT2FN[conv.conv_act](conv.dropout(added)))


class LSGDisentangledEncoder(LSGEncoder, DisentangledStack):
    """Mixed into the stack of layers."""

    def forward(  # type: ignore[override]
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor, packing: Packing | None = None, **kwargs: Any
    ) -> Any:
        return super().forward(hidden_states, attention_mask, packing, rows=packing, **kwargs)


class LSGDisentangledNorm:
    """Mixed into the LayerNorm that the first generation has of its own, and that computes in float32 always: not so
    where the model is in float64."""

    weight: torch.Tensor
    bias: torch.Tensor
    variance_epsilon: float

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        wide = states.to(torch.promote_types(states.dtype, torch.float32))
        centred = wide - wide.mean(-1, keepdim=True)
        normed = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * normed.to(states.dtype) + self.bias


class LSGDisentangledModel(LSGRestatedModel):
    """Mixed into the base model."""

    lsg_modules = {
        "Embeddings": LSGEmbeddings,
        "Attention": LSGDisentangledModule,
        "Layer": LSGLayer,
        "Encoder": LSGDisentangledEncoder,
    }
    global_token_type = True
    embedded = (*LSGRestatedModel.embedded, "token_type_ids")

    @property
    def moves_with_padding(self) -> bool:
        return not self.config.position_biased_input  # type: ignore[attr-defined]
