"""LSG BERT: the facts of the family."""

from transformers.models.bert import configuration_bert, modeling_bert as bert

from .lsg_modeling import (
    LSGConfig,
    LSGEmbeddings,
    LSGEncoder,
    LSGModel,
    LSGSelfAttention,
    define_heads,
    with_global_tokens,
)


class LSGBertConfig(LSGConfig, configuration_bert.BertConfig): ...


class LSGBertModel(LSGModel, bert.BertModel):
    config_class = LSGBertConfig
    lsg_modules = {
        bert.BertEmbeddings: LSGEmbeddings,
        bert.BertSelfAttention: LSGSelfAttention,
        bert.BertEncoder: LSGEncoder,
    }
    global_token_type = True
    forward = with_global_tokens(bert.BertModel.forward)


define_heads(LSGBertModel, bert)
