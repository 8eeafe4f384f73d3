"""LSG Pegasus: the facts of the family. Its encoder has LSG."""

from transformers.models.pegasus import configuration_pegasus, modeling_pegasus as pegasus

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


class LSGPegasusConfig(LSGSeq2SeqConfig, configuration_pegasus.PegasusConfig): ...


class LSGPegasusEncoder(LSGSeq2SeqEncoder, pegasus.PegasusEncoder):
    config_class = LSGPegasusConfig
    lsg_modules = {
        pegasus.PegasusSinusoidalPositionalEmbedding: LSGPositions,
        pegasus.PegasusAttention: LSGSeq2SeqAttention,
    }
    scales_outside = True
    forward = with_global_tokens(pegasus.PegasusEncoder.forward)


class LSGPegasusModel(LSGSeq2SeqModel, pegasus.PegasusModel):
    config_class = LSGPegasusConfig
    lsg_part_class = LSGPegasusEncoder
    sinusoidal_positions = True
    forward = with_lsg_encoder(pegasus.PegasusModel.forward)


define_heads(LSGPegasusModel, pegasus)
