"""LSG XLM-RoBERTa-XL: the facts of the family. Its embeddings have no LayerNorm."""

from transformers.models.xlm_roberta_xl import configuration_xlm_roberta_xl, modeling_xlm_roberta_xl

from .lsg_classes import define_heads
from .lsg_config import LSGConfig
from .lsg_modeling import LSGModel


class LSGXLMRobertaXLConfig(LSGConfig, configuration_xlm_roberta_xl.XLMRobertaXLConfig): ...


class LSGXLMRobertaXLModel(LSGModel, modeling_xlm_roberta_xl.XLMRobertaXLModel):
    config_class = LSGXLMRobertaXLConfig
    positions_follow_padding = True


define_heads(LSGXLMRobertaXLModel)
