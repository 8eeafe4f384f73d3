"""LSG T5: the facts of the family. Its encoder has LSG, and its layers share one bias by distance."""

from transformers.models.t5 import configuration_t5, modeling_t5

from .lsg_classes import define_heads
from .lsg_config import LSGSeq2SeqConfig
from .lsg_t5 import HEADS, LSGT5StyleEncoder, LSGT5StyleModel


class LSGT5Config(LSGSeq2SeqConfig, configuration_t5.T5Config):
    absolute_positions = False


class LSGT5Stack(LSGT5StyleEncoder, modeling_t5.T5Stack):
    config_class = LSGT5Config


class LSGT5Model(LSGT5StyleModel, modeling_t5.T5Model):
    config_class = LSGT5Config
    lsg_part_class = LSGT5Stack


define_heads(LSGT5Model, hand_on=True, others=HEADS)
