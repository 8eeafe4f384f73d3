"""LSG BlenderbotSmall: the facts of the family. Its encoder has LSG."""

from transformers.models.blenderbot_small import configuration_blenderbot_small, modeling_blenderbot_small

from .lsg_classes import define_heads
from .lsg_config import LSGSeq2SeqConfig
from .lsg_seq2seq import LSGSeq2SeqEncoder, LSGSeq2SeqModel


class LSGBlenderbotSmallConfig(LSGSeq2SeqConfig, configuration_blenderbot_small.BlenderbotSmallConfig): ...


class LSGBlenderbotSmallEncoder(LSGSeq2SeqEncoder, modeling_blenderbot_small.BlenderbotSmallEncoder):
    config_class = LSGBlenderbotSmallConfig
    scales_outside = True


class LSGBlenderbotSmallModel(LSGSeq2SeqModel, modeling_blenderbot_small.BlenderbotSmallModel):
    config_class = LSGBlenderbotSmallConfig
    lsg_part_class = LSGBlenderbotSmallEncoder


define_heads(LSGBlenderbotSmallModel)
