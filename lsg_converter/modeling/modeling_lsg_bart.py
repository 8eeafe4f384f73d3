"""LSG Bart: the facts of the family. Its encoder has LSG."""

from transformers.models.bart import configuration_bart, modeling_bart as bart

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


class LSGBartConfig(LSGSeq2SeqConfig, configuration_bart.BartConfig): ...


class LSGBartEncoder(LSGSeq2SeqEncoder, bart.BartEncoder):
    config_class = LSGBartConfig
    lsg_modules = {
        bart.BartLearnedPositionalEmbedding: LSGPositions,
        bart.BartAttention: LSGSeq2SeqAttention,
    }
    position_offset = 2
    forward = with_global_tokens(bart.BartEncoder.forward)


class LSGBartModel(LSGSeq2SeqModel, bart.BartModel):
    config_class = LSGBartConfig
    lsg_part_class = LSGBartEncoder
    forward = with_lsg_encoder(bart.BartModel.forward)


define_heads(LSGBartModel, bart)
