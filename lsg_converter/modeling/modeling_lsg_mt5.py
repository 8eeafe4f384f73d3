"""LSG MT5: the facts of the family. Its encoder has LSG, and its layers share one bias by distance."""

from transformers.models.mt5 import configuration_mt5, modeling_mt5

from .lsg_classes import define_heads
from .lsg_config import LSGSeq2SeqConfig
from .lsg_t5 import HEADS, LSGT5StyleEncoder, LSGT5StyleModel


class LSGMT5Config(LSGSeq2SeqConfig, configuration_mt5.MT5Config):
    absolute_positions = False


class LSGMT5Stack(LSGT5StyleEncoder, modeling_mt5.MT5Stack):
    config_class = LSGMT5Config


class LSGMT5Model(LSGT5StyleModel, modeling_mt5.MT5Model):
    config_class = LSGMT5Config
    lsg_part_class = LSGMT5Stack


define_heads(LSGMT5Model, hand_on=True, others=HEADS)
