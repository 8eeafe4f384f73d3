"""LSG MBart: the facts of the family. Its encoder has LSG."""

from transformers.models.mbart import configuration_mbart, modeling_mbart

from .lsg_classes import define_heads
from .lsg_config import LSGSeq2SeqConfig
from .lsg_seq2seq import LSGSeq2SeqEncoder, LSGSeq2SeqModel


class LSGMBartConfig(LSGSeq2SeqConfig, configuration_mbart.MBartConfig): ...


class LSGMBartEncoder(LSGSeq2SeqEncoder, modeling_mbart.MBartEncoder):
    config_class = LSGMBartConfig
    position_offset = 2


class LSGMBartModel(LSGSeq2SeqModel, modeling_mbart.MBartModel):
    config_class = LSGMBartConfig
    lsg_part_class = LSGMBartEncoder


define_heads(LSGMBartModel)
