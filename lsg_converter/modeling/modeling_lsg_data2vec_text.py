"""LSG Data2VecText: the facts of the family."""

from transformers.models.data2vec import configuration_data2vec_text, modeling_data2vec_text

from .lsg_classes import define_heads
from .lsg_config import LSGConfig
from .lsg_modeling import LSGModel


class LSGData2VecTextConfig(LSGConfig, configuration_data2vec_text.Data2VecTextConfig): ...


class LSGData2VecTextModel(LSGModel, modeling_data2vec_text.Data2VecTextModel):
    config_class = LSGData2VecTextConfig
    positions_follow_padding = True


define_heads(LSGData2VecTextModel)
