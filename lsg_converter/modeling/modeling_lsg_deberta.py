"""LSG DeBERTa: the facts of the family. One projection gives queries, keys and values, head by head."""

import torch
from transformers.models.deberta import configuration_deberta, modeling_deberta

from .lsg_classes import define_heads
from .lsg_disentangled import LSGDisentangledAttention, LSGDisentangledConfig, LSGDisentangledModel


class LSGDebertaConfig(LSGDisentangledConfig, configuration_deberta.DebertaConfig): ...


class LSGDebertaSelfAttention(LSGDisentangledAttention, modeling_deberta.DisentangledSelfAttention):  # type: ignore[misc]
    @property
    def num_terms(self) -> int:
        return 1 + len(self.pos_att_type)  # whatever they are

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        heads = self.in_proj(hidden_states).unflatten(-1, (self.num_attention_heads, -1))
        query, key, value = heads.chunk(3, dim=-1)
        query, value = (
            x + bias.view(x.shape[2:]).to(x.dtype) for x, bias in ((query, self.q_bias), (value, self.v_bias))
        )
        return tuple(x.transpose(1, 2) for x in (query, key, value))

    def embeddings_of(self, embeddings: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        keys = self.pos_proj(embeddings) if "c2p" in self.pos_att_type else None
        return keys, self.pos_q_proj(embeddings) if "p2c" in self.pos_att_type else None


class LSGDebertaModel(LSGDisentangledModel, modeling_deberta.DebertaModel):
    config_class = LSGDebertaConfig
    lsg_modules = {**LSGDisentangledModel.lsg_modules, "DisentangledSelfAttention": LSGDebertaSelfAttention}


define_heads(LSGDebertaModel, hand_on=True)
