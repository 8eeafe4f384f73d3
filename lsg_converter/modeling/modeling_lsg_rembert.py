"""LSG RemBERT: the facts of the family. Its words are narrower than its layers, and its head has words of its own."""

from transformers.models.rembert import configuration_rembert, modeling_rembert

from .lsg_classes import define_heads
from .lsg_config import LSGConfig
from .lsg_handed import LSGHandedModel


class LSGRemBertConfig(LSGConfig, configuration_rembert.RemBertConfig): ...


class LSGRemBertModel(LSGHandedModel, modeling_rembert.RemBertModel):
    config_class = LSGRemBertConfig


define_heads(LSGRemBertModel, hand_on=True)
