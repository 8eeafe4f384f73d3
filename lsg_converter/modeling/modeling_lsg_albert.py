"""LSG ALBERT: the facts of the family. Its layers share their weights, and its attention ends in a LayerNorm."""

import torch
from transformers.models.albert import configuration_albert, modeling_albert

from .lsg_classes import define_heads
from .lsg_config import LSGConfig
from .lsg_modeling import LSGModel
from .lsg_modules import LSGSelfAttention


class LSGAlbertConfig(LSGConfig, configuration_albert.AlbertConfig): ...


class LSGAlbertAttention(LSGSelfAttention, modeling_albert.AlbertAttention):  # type: ignore[misc]
    dropout_name = "attention_dropout"

    def finish(self, output: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(hidden_states + self.output_dropout(self.dense(output)))


class LSGAlbertModel(LSGModel, modeling_albert.AlbertModel):
    config_class = LSGAlbertConfig
    lsg_modules = {**LSGModel.lsg_modules, "Attention": LSGAlbertAttention}
    global_token_type = True


define_heads(LSGAlbertModel)
