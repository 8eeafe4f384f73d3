"""LSG BERT: the facts of the family."""

from transformers.models.bert import configuration_bert, modeling_bert

from .lsg_classes import define_heads
from .lsg_config import LSGConfig
from .lsg_modeling import LSGModel


class LSGBertConfig(LSGConfig, configuration_bert.BertConfig): ...


class LSGBertModel(LSGModel, modeling_bert.BertModel):
    config_class = LSGBertConfig
    global_token_type = True


define_heads(LSGBertModel)
