"""LSG XLM-RoBERTa: the facts of the family."""

from transformers.models.xlm_roberta import configuration_xlm_roberta, modeling_xlm_roberta as xlm_roberta

from .lsg_modeling import (
    LSGConfig,
    LSGEmbeddings,
    LSGEncoder,
    LSGModel,
    LSGSelfAttention,
    define_heads,
    with_global_tokens,
)


class LSGXLMRobertaConfig(LSGConfig, configuration_xlm_roberta.XLMRobertaConfig): ...


class LSGXLMRobertaModel(LSGModel, xlm_roberta.XLMRobertaModel):
    config_class = LSGXLMRobertaConfig
    lsg_modules = {
        xlm_roberta.XLMRobertaEmbeddings: LSGEmbeddings,
        xlm_roberta.XLMRobertaSelfAttention: LSGSelfAttention,
        xlm_roberta.XLMRobertaEncoder: LSGEncoder,
    }
    positions_follow_padding = True
    forward = with_global_tokens(xlm_roberta.XLMRobertaModel.forward)


define_heads(LSGXLMRobertaModel, xlm_roberta)
