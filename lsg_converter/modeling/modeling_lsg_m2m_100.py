"""LSG M2M100, and NLLB, which is one: the facts of the family. Its encoder has LSG. Its positions are computed."""

from transformers.models.m2m_100 import configuration_m2m_100, modeling_m2m_100

from .lsg_classes import define_heads
from .lsg_config import LSGSeq2SeqConfig
from .lsg_modules import LSGComputedPositions
from .lsg_seq2seq import LSGSeq2SeqEncoder, LSGSeq2SeqModel


class LSGM2M100Config(LSGSeq2SeqConfig, configuration_m2m_100.M2M100Config):
    sinusoidal_positions = True


class LSGM2M100Encoder(LSGSeq2SeqEncoder, modeling_m2m_100.M2M100Encoder):
    config_class = LSGM2M100Config
    lsg_modules = {**LSGSeq2SeqEncoder.lsg_modules, "SinusoidalPositionalEmbedding": LSGComputedPositions}
    position_offset = 2
    positions_follow_padding = True


class LSGM2M100Model(LSGSeq2SeqModel, modeling_m2m_100.M2M100Model):
    config_class = LSGM2M100Config
    lsg_part_class = LSGM2M100Encoder
    position_tables = ("encoder.embed_positions.weights", "decoder.embed_positions.weights")


define_heads(LSGM2M100Model)
