"""LSG Pegasus: the facts of the family. Its encoder has LSG."""

from transformers.models.pegasus import configuration_pegasus, modeling_pegasus

from .lsg_classes import define_heads
from .lsg_config import LSGSeq2SeqConfig
from .lsg_seq2seq import LSGSeq2SeqEncoder, LSGSeq2SeqModel


class LSGPegasusConfig(LSGSeq2SeqConfig, configuration_pegasus.PegasusConfig):
    sinusoidal_positions = True


class LSGPegasusEncoder(LSGSeq2SeqEncoder, modeling_pegasus.PegasusEncoder):
    config_class = LSGPegasusConfig
    scales_outside = True


class LSGPegasusModel(LSGSeq2SeqModel, modeling_pegasus.PegasusModel):
    config_class = LSGPegasusConfig
    lsg_part_class = LSGPegasusEncoder


define_heads(LSGPegasusModel)
