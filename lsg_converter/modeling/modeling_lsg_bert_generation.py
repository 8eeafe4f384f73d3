"""LSG BertGeneration: the facts of the family. Its base model is named an encoder, and its one head a decoder."""

from transformers.models.bert_generation import configuration_bert_generation, modeling_bert_generation

from .lsg_classes import LSGWrapper
from .lsg_config import LSGConfig
from .lsg_modeling import LSGModel
from .lsg_modules import LSGEmbeddings, LSGEncoder, LSGSelfAttention


class LSGBertGenerationConfig(LSGConfig, configuration_bert_generation.BertGenerationConfig): ...


class LSGBertGenerationEncoder(LSGModel, modeling_bert_generation.BertGenerationEncoder):
    config_class = LSGBertGenerationConfig
    lsg_modules = {"Embeddings": LSGEmbeddings, "SelfAttention": LSGSelfAttention, "BertEncoder": LSGEncoder}


class LSGBertGenerationDecoder(LSGWrapper, modeling_bert_generation.BertGenerationDecoder):  # type: ignore[misc]
    config_class = LSGBertGenerationConfig
    lsg_part_class = LSGBertGenerationEncoder
