"""LSG ALBERT: the facts of the family. Its layers share their weights, and its attention ends in a LayerNorm."""

import torch
from transformers.models.albert import configuration_albert, modeling_albert as albert

from .lsg_modeling import (
    LSGConfig,
    LSGEmbeddings,
    LSGEncoder,
    LSGModel,
    LSGSelfAttention,
    define_heads,
    with_global_tokens,
)


class LSGAlbertConfig(LSGConfig, configuration_albert.AlbertConfig): ...


class LSGAlbertAttention(LSGSelfAttention, albert.AlbertAttention):  # type: ignore[misc]
    dropout_name = "attention_dropout"

    def finish(self, output: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(hidden_states + self.output_dropout(self.dense(output)))


class LSGAlbertModel(LSGModel, albert.AlbertModel):
    config_class = LSGAlbertConfig
    lsg_modules = {
        albert.AlbertEmbeddings: LSGEmbeddings,
        albert.AlbertAttention: LSGAlbertAttention,
        albert.AlbertTransformer: LSGEncoder,
    }
    global_token_type = True
    forward = with_global_tokens(albert.AlbertModel.forward)


define_heads(LSGAlbertModel, albert)
