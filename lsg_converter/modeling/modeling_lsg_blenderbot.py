"""LSG Blenderbot: the facts of the family. Its encoder has LSG."""

from transformers.models.blenderbot import configuration_blenderbot, modeling_blenderbot

from .lsg_classes import define_heads
from .lsg_config import LSGSeq2SeqConfig
from .lsg_seq2seq import LSGSeq2SeqEncoder, LSGSeq2SeqModel


class LSGBlenderbotConfig(LSGSeq2SeqConfig, configuration_blenderbot.BlenderbotConfig): ...


class LSGBlenderbotEncoder(LSGSeq2SeqEncoder, modeling_blenderbot.BlenderbotEncoder):
    config_class = LSGBlenderbotConfig


class LSGBlenderbotModel(LSGSeq2SeqModel, modeling_blenderbot.BlenderbotModel):
    config_class = LSGBlenderbotConfig
    lsg_part_class = LSGBlenderbotEncoder


define_heads(LSGBlenderbotModel)
