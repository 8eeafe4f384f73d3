"""LSG RoBERTa: the facts of the family."""

from transformers.models.roberta import configuration_roberta, modeling_roberta as roberta

from .lsg_modeling import (
    LSGConfig,
    LSGEmbeddings,
    LSGEncoder,
    LSGModel,
    LSGSelfAttention,
    define_heads,
    with_global_tokens,
)


class LSGRobertaConfig(LSGConfig, configuration_roberta.RobertaConfig): ...


class LSGRobertaModel(LSGModel, roberta.RobertaModel):
    config_class = LSGRobertaConfig
    lsg_modules = {
        roberta.RobertaEmbeddings: LSGEmbeddings,
        roberta.RobertaSelfAttention: LSGSelfAttention,
        roberta.RobertaEncoder: LSGEncoder,
    }
    positions_follow_padding = True
    forward = with_global_tokens(roberta.RobertaModel.forward)


define_heads(LSGRobertaModel, roberta)
