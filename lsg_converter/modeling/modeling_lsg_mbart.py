"""LSG MBart: the facts of the family. Its encoder has LSG."""

from transformers.models.mbart import configuration_mbart, modeling_mbart as mbart

from .lsg_modeling import (
    LSGPositions,
    LSGSeq2SeqAttention,
    LSGSeq2SeqConfig,
    LSGSeq2SeqEncoder,
    LSGSeq2SeqModel,
    define_heads,
    with_global_tokens,
    with_lsg_encoder,
)


class LSGMBartConfig(LSGSeq2SeqConfig, configuration_mbart.MBartConfig): ...


class LSGMBartEncoder(LSGSeq2SeqEncoder, mbart.MBartEncoder):
    config_class = LSGMBartConfig
    lsg_modules = {
        mbart.MBartLearnedPositionalEmbedding: LSGPositions,
        mbart.MBartAttention: LSGSeq2SeqAttention,
    }
    position_offset = 2
    forward = with_global_tokens(mbart.MBartEncoder.forward)


class LSGMBartModel(LSGSeq2SeqModel, mbart.MBartModel):
    config_class = LSGMBartConfig
    lsg_part_class = LSGMBartEncoder
    forward = with_lsg_encoder(mbart.MBartModel.forward)


define_heads(LSGMBartModel, mbart)
