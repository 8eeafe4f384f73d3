"""LSG X-MOD: the facts of the family. Each text has a language, whose adapters read its global tokens too."""

from transformers.models.xmod import configuration_xmod, modeling_xmod

from .lsg_classes import define_heads
from .lsg_config import LSGConfig
from .lsg_modeling import LSGModel
from .lsg_modules import LSGEncoder


class LSGXmodConfig(LSGConfig, configuration_xmod.XmodConfig): ...


class LSGXmodEncoder(LSGEncoder, modeling_xmod.XmodEncoder):  # type: ignore[misc]
    token_arguments = ("lang_ids",)


class LSGXmodModel(LSGModel, modeling_xmod.XmodModel):
    config_class = LSGXmodConfig
    lsg_modules = {**LSGModel.lsg_modules, "Encoder": LSGXmodEncoder}
    positions_follow_padding = True
    required_inputs = ("lang_ids",)


define_heads(LSGXmodModel)
