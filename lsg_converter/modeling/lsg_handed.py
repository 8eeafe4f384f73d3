"""What MegatronBERT and RemBERT have in common.

Their stock modules, from the model down to the attention, hand on what they name and nothing else; and one class is
their self-attention and their cross-attention.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .lsg_classes import HandingOn
from .lsg_modeling import LSGModel
from .lsg_modules import LSGEmbeddings, LSGEncoder, LSGSelfAttention


# What a model tells its attention, beside what stock modules name.
HANDED = ("packing", "past", "prefix_mask", "promotion", "seqlens")


def hand_on(stock_forward: Callable[..., Any], module: Any, *args: Any, **kwargs: Any) -> Any:
    """Call the stock forward of a module, whose parts get what it would keep to itself."""
    handed = {name: kwargs.pop(name) for name in HANDED if name in kwargs}
    return stock_forward(HandingOn(module, (LSGHanding, LSGHandedAttention), handed), *args, **kwargs)


class LSGHanding:
    """Mixed into a module between the model and its attention."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        classes: Any = type(self).__mro__
        return hand_on(classes[classes.index(LSGHanding) + 1].forward, self, *args, **kwargs)


class LSGHandedEncoder(LSGEncoder, LSGHanding):
    """Mixed into the stack of layers."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.gradient_checkpointing and self.training:  # type: ignore[attr-defined]
            kwargs["past_key_values"] = None  # which a layer, run again, would fill again
        return super().forward(*args, **kwargs)


class LSGHandedAttention(LSGSelfAttention):
    """Mixed into the attention, which is a stock one where it reads the states of an encoder."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if encoder_hidden_states is None:
            return super().forward(hidden_states, attention_mask, **kwargs)  # type: ignore[arg-type]
        if attention_mask is not None and attention_mask.dtype == torch.bool:  # It is added to scores.
            least = torch.finfo(hidden_states.dtype).min
            attention_mask = torch.zeros_like(attention_mask, dtype=hidden_states.dtype).masked_fill(
                ~attention_mask, least
            )
        return super(LSGSelfAttention, self).forward(  # type: ignore[misc]
            hidden_states, attention_mask, encoder_hidden_states, **kwargs
        )


class LSGHandedModel(LSGModel):
    """Mixed into the base model."""

    lsg_modules = {
        "Embeddings": LSGEmbeddings,
        "SelfAttention": LSGHandedAttention,
        "Attention": LSGHanding,
        "Layer": LSGHanding,
        "Encoder": LSGHandedEncoder,
    }
    global_token_type = True

    def read(self, stock_forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        return super().read(partial(hand_on, stock_forward), arguments)
