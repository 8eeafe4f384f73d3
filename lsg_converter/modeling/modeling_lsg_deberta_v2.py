"""LSG DeBERTa-v2, whose checkpoints DeBERTa-v3 and mDeBERTa are too: the facts of the family. Far distances share
embeddings, and these may be projected as queries and keys are."""

import torch
from transformers.models.deberta_v2 import configuration_deberta_v2, modeling_deberta_v2

from .lsg_classes import define_heads
from .lsg_disentangled import LSGDisentangledAttention, LSGDisentangledConfig, LSGDisentangledModel


class LSGDebertaV2Config(LSGDisentangledConfig, configuration_deberta_v2.DebertaV2Config): ...


class LSGDebertaV2SelfAttention(LSGDisentangledAttention, modeling_deberta_v2.DisentangledSelfAttention):  # type: ignore[misc]
    projections = ("query_proj", "key_proj", "value_proj")

    def rows_of(self, distance: torch.Tensor) -> torch.Tensor:
        buckets, span = self.position_buckets, self.max_relative_positions
        return modeling_deberta_v2.make_log_bucket_position(distance, buckets, span) if buckets > 0 else distance

    def embeddings_of(self, embeddings: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        shared = self.share_att_key
        key, query = ("key_proj", "query_proj") if shared else ("pos_key_proj", "pos_query_proj")
        keys = getattr(self, key)(embeddings) if "c2p" in self.pos_att_type else None
        return keys, getattr(self, query)(embeddings) if "p2c" in self.pos_att_type else None


class LSGDebertaV2Model(LSGDisentangledModel, modeling_deberta_v2.DebertaV2Model):
    config_class = LSGDebertaV2Config
    lsg_modules = {**LSGDisentangledModel.lsg_modules, "DisentangledSelfAttention": LSGDebertaV2SelfAttention}


define_heads(LSGDebertaV2Model, hand_on=True)
