"""DeBERTa's attention, of content and distance (arXiv 2006.03654), with LSG: what its two generations share.

A score is the sum of up to three terms: a query's product with a key, a query's with an embedding of the distance, and
a key's with another one, over `sqrt(head_dim * terms)`. Stock modules make a table of all pairs of tokens, and hand on
nothing that they do not know; so what is between the model and its attention is written anew here.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutput

from .lsg_bias import RelativeEmbeddings
from .lsg_config import LSGConfig
from .lsg_layout import require
from .lsg_modeling import LSGModel
from .lsg_modules import LSGEmbeddings, LSGEncoder, LSGSelfAttention
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


class LSGDisentangledLayer:
    """Mixed into a layer."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        attended, probabilities = self.attention(hidden_states, *args, **kwargs)  # type: ignore[attr-defined]
        return self.output(self.intermediate(attended), attended), probabilities  # type: ignore[attr-defined]


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
    g, mask = config.num_global_tokens, mask[:, 0, 0, :, None]
    mask = mask.to(states.dtype)
    if packing is not None:
        embedded, states, mask = (packing.unpack(x) for x in (embedded, states, mask))
    text = conv(embedded[:, g:] * mask[:, g:], states[:, g:], mask[:, g:, 0].long())
    alone = [x[:, :g].flatten(0, 1)[:, None] for x in (embedded, states)]
    tokens = conv(*alone, alone[0].new_ones(alone[0].shape[:2]).long()) if g else states[:, :0]
    states = torch.cat([tokens.view(states[:, :g].shape), text], dim=1)
    return states if packing is None else packing.pack(states)


class LSGDisentangledEncoder(LSGEncoder, DisentangledStack):
    """Mixed into the stack of layers."""

    def forward(  # type: ignore[override]
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor, packing: Packing | None = None, **kwargs: Any
    ) -> Any:
        return super().forward(hidden_states, attention_mask, packing, rows=packing, **kwargs)


class LSGDisentangledModel(LSGModel):
    """Mixed into the base model."""

    lsg_modules = {
        "Embeddings": LSGEmbeddings,
        "Attention": LSGDisentangledModule,
        "Layer": LSGDisentangledLayer,
        "Encoder": LSGDisentangledEncoder,
    }
    global_token_type = True

    def find_first_token(self, arguments: Any) -> torch.Tensor | None:
        mask = arguments.get("attention_mask")
        if self.config.position_biased_input or mask is None:  # type: ignore[attr-defined]
            return super().find_first_token(arguments)
        return (mask != 0).int().argmax(dim=1)  # Its place is all that padding on the left could change.

    def read(self, stock_forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        texts = {name: arguments.pop(name, None) for name in ("input_ids", "inputs_embeds", "position_ids")}
        if (texts["input_ids"] is None) == (texts["inputs_embeds"] is None):
            return super().read(stock_forward, arguments | texts)  # which raises
        types = arguments.pop("token_type_ids", None)
        for name in ("output_attentions", "output_hidden_states"):
            value = arguments.get(name)
            arguments[name] = getattr(self.config, name) if value is None else value  # type: ignore[attr-defined]
        states = self.embeddings(token_type_ids=types, **texts)  # type: ignore[attr-defined]
        return self.encoder(states, **arguments)  # type: ignore[attr-defined]
