"""LSG CamemBERT: the facts of the family."""

from transformers.models.camembert import configuration_camembert, modeling_camembert

from .lsg_classes import define_heads
from .lsg_config import LSGConfig
from .lsg_modeling import LSGModel


class LSGCamembertConfig(LSGConfig, configuration_camembert.CamembertConfig): ...


class LSGCamembertModel(LSGModel, modeling_camembert.CamembertModel):
    config_class = LSGCamembertConfig
    positions_follow_padding = True


define_heads(LSGCamembertModel)
