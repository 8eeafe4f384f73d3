"""LSG MPNet: the facts of the family. Its layers share a bias by distance; its stock modules hand on no arguments."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.mpnet import configuration_mpnet, modeling_mpnet

from .lsg_bias import bias_table
from .lsg_classes import define_heads
from .lsg_config import LSGConfig
from .lsg_modeling import LSGModel
from .lsg_modules import LSGNamedEncoder, LSGSelfAttention


class LSGMPNetConfig(LSGConfig, configuration_mpnet.MPNetConfig): ...


class LSGMPNetSelfAttention(LSGSelfAttention, modeling_mpnet.MPNetSelfAttention):  # type: ignore[misc]
    projections = ("q", "k", "v")

    def finish(self, output: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.o(output)


class LSGMPNetAttention(modeling_mpnet.MPNetAttention):
    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        output, probabilities = self.attn(hidden_states, *args, **kwargs)
        return self.LayerNorm(self.dropout(output) + hidden_states), probabilities


class LSGMPNetLayer(modeling_mpnet.MPNetLayer):
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> Any:
        attended, probabilities = self.attention(hidden_states, attention_mask, position_bias=position_bias, **kwargs)
        return self.output(self.intermediate(attended), attended), probabilities


class LSGMPNetEncoder(LSGNamedEncoder, modeling_mpnet.MPNetEncoder):
    def compute_position_bias(self, x: torch.Tensor, position_ids: Any = None, num_buckets: int = 32) -> torch.Tensor:
        bucket = partial(self.relative_position_bucket, num_buckets=num_buckets)
        return bias_table(self.relative_attention_bias, bucket, reach=128)


class LSGMPNetModel(LSGModel, modeling_mpnet.MPNetModel):
    config_class = LSGMPNetConfig
    lsg_modules = {
        **LSGModel.lsg_modules,
        "SelfAttention": LSGMPNetSelfAttention,
        "Attention": LSGMPNetAttention,
        "Layer": LSGMPNetLayer,
        "Encoder": LSGMPNetEncoder,
    }
    positions_follow_padding = True

    def read(self, stock_forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        texts = {name: arguments.get(name) for name in ("input_ids", "inputs_embeds", "position_ids")}
        if (texts["input_ids"] is None) == (texts["inputs_embeds"] is None):
            return super().read(stock_forward, arguments)  # which raises
        others = {name: arguments[name] for name in arguments.keys() - texts.keys()}
        for name in ("output_attentions", "output_hidden_states"):
            others[name] = getattr(self.config, name) if others.get(name) is None else others[name]
        outputs = self.encoder(self.embeddings(**texts), **others)
        pooled = None if self.pooler is None else self.pooler(outputs.last_hidden_state)
        return BaseModelOutputWithPooling(pooler_output=pooled, **outputs)


define_heads(LSGMPNetModel, hand_on=True)
