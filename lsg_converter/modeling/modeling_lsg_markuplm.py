"""LSG MarkupLM: the facts of the family. A global token has no path in the page."""

from transformers.models.markuplm import configuration_markuplm, modeling_markuplm

from .lsg_classes import define_heads
from .lsg_config import LSGConfig
from .lsg_modeling import LSGModel


class LSGMarkupLMConfig(LSGConfig, configuration_markuplm.MarkupLMConfig): ...


class LSGMarkupLMModel(LSGModel, modeling_markuplm.MarkupLMModel):
    config_class = LSGMarkupLMConfig
    positions_follow_padding = True


define_heads(LSGMarkupLMModel)
