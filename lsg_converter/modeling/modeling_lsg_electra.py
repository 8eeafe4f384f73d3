"""LSG ELECTRA: the facts of the family."""

from transformers.models.electra import configuration_electra, modeling_electra

from .lsg_classes import define_heads
from .lsg_config import LSGConfig
from .lsg_modeling import LSGModel


class LSGElectraConfig(LSGConfig, configuration_electra.ElectraConfig): ...


class LSGElectraModel(LSGModel, modeling_electra.ElectraModel):
    config_class = LSGElectraConfig
    global_token_type = True


define_heads(LSGElectraModel)
