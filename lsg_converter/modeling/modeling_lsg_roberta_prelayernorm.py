"""LSG RoBERTa-PreLayerNorm: the facts of the family. Its last LayerNorm stands behind the stack of layers."""

from transformers.models.roberta_prelayernorm import configuration_roberta_prelayernorm, modeling_roberta_prelayernorm

from .lsg_classes import define_heads
from .lsg_config import LSGConfig
from .lsg_modeling import LSGModel
from .lsg_modules import LSGFinalNorm


class LSGRobertaPreLayerNormConfig(LSGConfig, configuration_roberta_prelayernorm.RobertaPreLayerNormConfig): ...


class LSGRobertaPreLayerNormModel(LSGModel, modeling_roberta_prelayernorm.RobertaPreLayerNormModel):
    config_class = LSGRobertaPreLayerNormConfig
    positions_follow_padding = True

    def replace_modules(self) -> None:
        super().replace_modules()
        self.LayerNorm.__class__ = LSGFinalNorm


define_heads(LSGRobertaPreLayerNormModel)
