"""LSG CamemBERT: the facts of the family."""

from transformers.models.camembert import configuration_camembert, modeling_camembert as camembert

from .lsg_modeling import (
    LSGConfig,
    LSGEmbeddings,
    LSGEncoder,
    LSGModel,
    LSGSelfAttention,
    define_heads,
    with_global_tokens,
)


class LSGCamembertConfig(LSGConfig, configuration_camembert.CamembertConfig): ...


class LSGCamembertModel(LSGModel, camembert.CamembertModel):
    config_class = LSGCamembertConfig
    lsg_modules = {
        camembert.CamembertEmbeddings: LSGEmbeddings,
        camembert.CamembertSelfAttention: LSGSelfAttention,
        camembert.CamembertEncoder: LSGEncoder,
    }
    positions_follow_padding = True
    forward = with_global_tokens(camembert.CamembertModel.forward)


define_heads(LSGCamembertModel, camembert)
