"""LSG DistilBERT: the facts of the family. It has no token types and no pooler."""

import torch
from transformers.models.distilbert import configuration_distilbert, modeling_distilbert

from .lsg_classes import define_heads
from .lsg_config import LSGConfig
from .lsg_modeling import LSGModel
from .lsg_modules import LSGSelfAttention


class LSGDistilBertConfig(LSGConfig, configuration_distilbert.DistilBertConfig): ...


class LSGDistilBertSelfAttention(LSGSelfAttention, modeling_distilbert.DistilBertSelfAttention):  # type: ignore[misc]
    projections = ("q_lin", "k_lin", "v_lin")

    def finish(self, output: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.out_lin(output)


class LSGDistilBertModel(LSGModel, modeling_distilbert.DistilBertModel):
    config_class = LSGDistilBertConfig
    lsg_modules = {**LSGModel.lsg_modules, "SelfAttention": LSGDistilBertSelfAttention}


define_heads(LSGDistilBertModel)
