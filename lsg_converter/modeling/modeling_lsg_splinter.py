"""LSG Splinter: the facts of the family."""

from transformers.models.splinter import configuration_splinter, modeling_splinter

from .lsg_classes import define_heads
from .lsg_config import LSGConfig
from .lsg_modeling import LSGModel


class LSGSplinterConfig(LSGConfig, configuration_splinter.SplinterConfig): ...


class LSGSplinterModel(LSGModel, modeling_splinter.SplinterModel):
    config_class = LSGSplinterConfig
    global_token_type = True


define_heads(LSGSplinterModel)
