"""LSG UMT5: the facts of the family. Its encoder has LSG, and each of its layers has a bias by distance."""

from transformers.models.umt5 import configuration_umt5, modeling_umt5

from .lsg_classes import define_heads
from .lsg_config import LSGSeq2SeqConfig
from .lsg_t5 import HEADS, LSGT5StyleEncoder, LSGT5StyleModel


class LSGUMT5Config(LSGSeq2SeqConfig, configuration_umt5.UMT5Config):
    absolute_positions = False


class LSGUMT5Stack(LSGT5StyleEncoder, modeling_umt5.UMT5Stack):
    config_class = LSGUMT5Config


class LSGUMT5Model(LSGT5StyleModel, modeling_umt5.UMT5Model):
    config_class = LSGUMT5Config
    lsg_part_class = LSGUMT5Stack


define_heads(LSGUMT5Model, hand_on=True, others=HEADS)
