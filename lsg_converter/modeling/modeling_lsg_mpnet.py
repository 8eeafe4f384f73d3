"""LSG MPNet: the facts of the family. Its layers share a bias by distance; its stock modules hand on no arguments."""

from functools import partial
from typing import Any

import torch
from torch import nn
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
    def forward(self, states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        output, probabilities = self.attn(states, *args, **kwargs)
        return self.LayerNorm(self.dropout(output) + states), probabilities


class LSGMPNetLayer(modeling_mpnet.MPNetLayer):
    def forward(self, states: torch.Tensor, mask: torch.Tensor, position_bias: torch.Tensor, **kwargs: Any) -> Any:
        attended, probabilities = self.attention(states, mask, position_bias=position_bias, **kwargs)
        return self.output(self.intermediate(attended), attended), probabilities


class LSGMPNetEncoder(LSGNamedEncoder, modeling_mpnet.MPNetEncoder):  # type: ignore[misc]
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

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        states = self.embeddings(input_ids=input_ids, position_ids=position_ids, inputs_embeds=inputs_embeds)
        outputs = self.encoder(states, attention_mask=attention_mask, **kwargs)
        pooler: nn.Module | None = self.pooler
        pooled = None if pooler is None else pooler(outputs.last_hidden_state)
        return BaseModelOutputWithPooling(pooler_output=pooled, **outputs)


define_heads(LSGMPNetModel)
