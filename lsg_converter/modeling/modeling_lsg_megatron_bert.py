"""LSG MegatronBERT: the facts of the family. Its stock cross-attention cannot read states of another length."""

from transformers.models.megatron_bert import configuration_megatron_bert, modeling_megatron_bert

from .lsg_classes import define_heads
from .lsg_config import LSGConfig
from .lsg_handed import LSGHandedModel
from .lsg_layout import require


class LSGMegatronBertConfig(LSGConfig, configuration_megatron_bert.MegatronBertConfig):
    def validate_lsg(self) -> None:
        super().validate_lsg()
        crossed = self.add_cross_attention
        allowed = "False: that of Transformers' megatron-bert cannot read states of another length"
        require("add_cross_attention", crossed, not crossed, allowed)


class LSGMegatronBertModel(LSGHandedModel, modeling_megatron_bert.MegatronBertModel):
    config_class = LSGMegatronBertConfig


define_heads(LSGMegatronBertModel, hand_on=True)
