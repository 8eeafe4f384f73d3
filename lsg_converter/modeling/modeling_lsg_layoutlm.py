"""LSG LayoutLM: the facts of the family. A global token has the box of zeros, as a first token has."""

from transformers.models.layoutlm import configuration_layoutlm, modeling_layoutlm

from .lsg_classes import define_heads
from .lsg_config import LSGConfig
from .lsg_modeling import LSGModel


class LSGLayoutLMConfig(LSGConfig, configuration_layoutlm.LayoutLMConfig): ...


class LSGLayoutLMModel(LSGModel, modeling_layoutlm.LayoutLMModel):
    config_class = LSGLayoutLMConfig
    global_token_type = True
    global_types = (*2 * ("x_position", "y_position"), "h_position", "w_position")


define_heads(LSGLayoutLMModel)
