"""LSG Marian: the facts of the family. Its encoder has LSG."""

from transformers.models.marian import configuration_marian, modeling_marian

from .lsg_classes import define_heads
from .lsg_config import LSGSeq2SeqConfig
from .lsg_seq2seq import LSGSeq2SeqDecoder, LSGSeq2SeqEncoder, LSGSeq2SeqModel


class LSGMarianConfig(LSGSeq2SeqConfig, configuration_marian.MarianConfig):
    sinusoidal_positions = True


class LSGMarianEncoder(LSGSeq2SeqEncoder, modeling_marian.MarianEncoder):
    config_class = LSGMarianConfig
    scales_outside = True


class LSGMarianModel(LSGSeq2SeqModel, modeling_marian.MarianModel):
    config_class = LSGMarianConfig
    lsg_part_class = LSGMarianEncoder


define_heads(LSGMarianModel, others={"ForCausalLM": (LSGSeq2SeqDecoder, "Model")})
