"""LSG PLBart: the facts of the family. Its encoder has LSG."""

from transformers.models.plbart import configuration_plbart, modeling_plbart

from .lsg_classes import define_heads
from .lsg_config import LSGSeq2SeqConfig
from .lsg_seq2seq import LSGSeq2SeqEncoder, LSGSeq2SeqModel


class LSGPLBartConfig(LSGSeq2SeqConfig, configuration_plbart.PLBartConfig): ...


class LSGPLBartEncoder(LSGSeq2SeqEncoder, modeling_plbart.PLBartEncoder):
    config_class = LSGPLBartConfig
    position_offset = 2


class LSGPLBartModel(LSGSeq2SeqModel, modeling_plbart.PLBartModel):
    config_class = LSGPLBartConfig
    lsg_part_class = LSGPLBartEncoder


define_heads(LSGPLBartModel)
