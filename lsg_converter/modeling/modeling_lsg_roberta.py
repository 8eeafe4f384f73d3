"""LSG RoBERTa: the facts of the family."""

from transformers.models.roberta import configuration_roberta, modeling_roberta

from .lsg_classes import define_heads
from .lsg_config import LSGConfig
from .lsg_modeling import LSGModel


class LSGRobertaConfig(LSGConfig, configuration_roberta.RobertaConfig): ...


class LSGRobertaModel(LSGModel, modeling_roberta.RobertaModel):
    config_class = LSGRobertaConfig
    positions_follow_padding = True


define_heads(LSGRobertaModel)
