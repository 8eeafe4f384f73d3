"""LSG DistilBERT: the facts of the family. It has no token types and no pooler."""

import torch
from transformers.models.distilbert import configuration_distilbert, modeling_distilbert as distilbert

from .lsg_modeling import (
    LSGConfig,
    LSGEmbeddings,
    LSGEncoder,
    LSGModel,
    LSGSelfAttention,
    define_heads,
    with_global_tokens,
)


class LSGDistilBertConfig(LSGConfig, configuration_distilbert.DistilBertConfig): ...


class LSGDistilBertEmbeddings(LSGEmbeddings, distilbert.Embeddings): ...


class LSGDistilBertTransformer(LSGEncoder, distilbert.Transformer): ...


class LSGDistilBertSelfAttention(LSGSelfAttention, distilbert.DistilBertSelfAttention):  # type: ignore[misc]
    projections = ("q_lin", "k_lin", "v_lin")

    def finish(self, output: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.out_lin(output)


class LSGDistilBertModel(LSGModel, distilbert.DistilBertModel):
    config_class = LSGDistilBertConfig
    lsg_modules = {
        distilbert.Embeddings: LSGDistilBertEmbeddings,
        distilbert.DistilBertSelfAttention: LSGDistilBertSelfAttention,
        distilbert.Transformer: LSGDistilBertTransformer,
    }
    forward = with_global_tokens(distilbert.DistilBertModel.forward)


define_heads(LSGDistilBertModel, distilbert)
