"""LSG ELECTRA: the facts of the family."""

from transformers.models.electra import configuration_electra, modeling_electra as electra

from .lsg_modeling import (
    LSGConfig,
    LSGEmbeddings,
    LSGEncoder,
    LSGModel,
    LSGSelfAttention,
    define_heads,
    with_global_tokens,
)


class LSGElectraConfig(LSGConfig, configuration_electra.ElectraConfig): ...


class LSGElectraModel(LSGModel, electra.ElectraModel):
    config_class = LSGElectraConfig
    lsg_modules = {
        electra.ElectraEmbeddings: LSGEmbeddings,
        electra.ElectraSelfAttention: LSGSelfAttention,
        electra.ElectraEncoder: LSGEncoder,
    }
    global_token_type = True
    forward = with_global_tokens(electra.ElectraModel.forward)


define_heads(LSGElectraModel, electra)
