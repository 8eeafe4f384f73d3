"""LSG MPNet: the facts of the family. Its layers share a bias by distance; its stock modules hand on no arguments."""

from functools import partial
from typing import Any

import torch
from transformers.models.mpnet import configuration_mpnet, modeling_mpnet

from .lsg_bias import bias_table
from .lsg_classes import define_heads
from .lsg_config import LSGConfig
from .lsg_modeling import LSGRestatedModel
from .lsg_modules import LSGLayer, LSGNamedEncoder, LSGSelfAttention


class LSGMPNetConfig(LSGConfig, configuration_mpnet.MPNetConfig): ...


class LSGMPNetSelfAttention(LSGSelfAttention, modeling_mpnet.MPNetSelfAttention):  # type: ignore[misc]
    projections = ("q", "k", "v")

    def finish(self, output: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.o(output)


class LSGMPNetAttention(modeling_mpnet.MPNetAttention):
    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> Any:
        output, probabilities = self.attn(hidden_states, attention_mask, position_bias=position_bias, **kwargs)
        return self.LayerNorm(self.dropout(output) + hidden_states), probabilities


class LSGMPNetEncoder(LSGNamedEncoder, modeling_mpnet.MPNetEncoder):
    def compute_position_bias(self, x: torch.Tensor, position_ids: Any = None, num_buckets: int = 32) -> torch.Tensor:
        bucket = partial(self.relative_position_bucket, num_buckets=num_buckets)
        return bias_table(self.relative_attention_bias, bucket, reach=128)


class LSGMPNetModel(LSGRestatedModel, modeling_mpnet.MPNetModel):
    config_class = LSGMPNetConfig
    lsg_modules = {
        **LSGRestatedModel.lsg_modules,
        "SelfAttention": LSGMPNetSelfAttention,
        "Attention": LSGMPNetAttention,
        "Layer": LSGLayer,
        "Encoder": LSGMPNetEncoder,
    }
    positions_follow_padding = True


define_heads(LSGMPNetModel, hand_on=True)
