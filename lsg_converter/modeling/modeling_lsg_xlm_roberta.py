"""LSG XLM-RoBERTa: the facts of the family."""

from transformers.models.xlm_roberta import configuration_xlm_roberta, modeling_xlm_roberta

from .lsg_classes import define_heads
from .lsg_config import LSGConfig
from .lsg_modeling import LSGModel


class LSGXLMRobertaConfig(LSGConfig, configuration_xlm_roberta.XLMRobertaConfig): ...


class LSGXLMRobertaModel(LSGModel, modeling_xlm_roberta.XLMRobertaModel):
    config_class = LSGXLMRobertaConfig
    positions_follow_padding = True


define_heads(LSGXLMRobertaModel)
