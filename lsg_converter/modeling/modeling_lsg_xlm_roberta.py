"""LSG XLM-RoBERTa: the facts of the family."""

from transformers.models.xlm_roberta import configuration_xlm_roberta, modeling_xlm_roberta

from .lsg_modeling import LSGConfig, LSGModel, define_heads


class LSGXLMRobertaConfig(LSGConfig, configuration_xlm_roberta.XLMRobertaConfig): ...


class LSGXLMRobertaModel(LSGModel, modeling_xlm_roberta.XLMRobertaModel):
    config_class = LSGXLMRobertaConfig
    positions_follow_padding = True


define_heads(LSGXLMRobertaModel)
