"""LSG ESM: the facts of the family. Its positions are rotary, where they are not learned."""

from transformers.models.esm import configuration_esm, modeling_esm

from .lsg_classes import define_heads
from .lsg_config import LSGConfig
from .lsg_modeling import LSGEmbeddedModel
from .lsg_modules import LSGRotaryAttention


class LSGEsmConfig(LSGConfig, configuration_esm.EsmConfig):
    position_types = ("absolute", "rotary")
    has_causal_form = False


class LSGEsmSelfAttention(LSGRotaryAttention, modeling_esm.EsmSelfAttention):  # type: ignore[misc]
    rotate = staticmethod(modeling_esm.apply_rotary_pos_emb)


class LSGEsmModel(LSGEmbeddedModel, modeling_esm.EsmModel):
    config_class = LSGEsmConfig
    lsg_modules = {**LSGEmbeddedModel.lsg_modules, "SelfAttention": LSGEsmSelfAttention}
    positions_follow_padding = True


define_heads(LSGEsmModel)
