"""LSG ERNIE: the facts of the family. Some of its models have task types beside token types."""

from transformers.models.ernie import configuration_ernie, modeling_ernie

from .lsg_classes import define_heads
from .lsg_config import LSGConfig
from .lsg_modeling import LSGModel


class LSGErnieConfig(LSGConfig, configuration_ernie.ErnieConfig): ...


class LSGErnieModel(LSGModel, modeling_ernie.ErnieModel):
    config_class = LSGErnieConfig
    global_token_type = True
    global_types = ("task_type",)


define_heads(LSGErnieModel)
