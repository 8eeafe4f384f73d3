"""LSG Bart: the facts of the family. Its encoder has LSG."""

from transformers.models.bart import configuration_bart, modeling_bart

from .lsg_classes import define_heads
from .lsg_config import LSGSeq2SeqConfig
from .lsg_seq2seq import LSGSeq2SeqEncoder, LSGSeq2SeqModel


class LSGBartConfig(LSGSeq2SeqConfig, configuration_bart.BartConfig): ...


class LSGBartEncoder(LSGSeq2SeqEncoder, modeling_bart.BartEncoder):
    config_class = LSGBartConfig
    position_offset = 2


class LSGBartModel(LSGSeq2SeqModel, modeling_bart.BartModel):
    config_class = LSGBartConfig
    lsg_part_class = LSGBartEncoder


define_heads(LSGBartModel)
