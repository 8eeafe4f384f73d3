"""An encoder and a decoder, each of its own checkpoint, of which one has LSG, or both.

Transformers' `EncoderDecoderModel` makes stock parts when it loads what it saved. This one makes a part an LSG model
where its configuration says so, and what it saves has the code of all beside it.
"""

import sys
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    PreTrainedConfig,
)
from transformers.configuration_utils import strict
from transformers.masking_utils import create_masks_for_generate

from .lsg_classes import stock_class
from .lsg_config import NEEDS_ITS_CODE, needs_its_code
from .modeling_lsg_albert import LSGAlbertConfig
from .modeling_lsg_bert import LSGBertConfig
from .modeling_lsg_bert_generation import LSGBertGenerationConfig
from .modeling_lsg_camembert import LSGCamembertConfig
from .modeling_lsg_data2vec_text import LSGData2VecTextConfig
from .modeling_lsg_deberta import LSGDebertaConfig
from .modeling_lsg_deberta_v2 import LSGDebertaV2Config
from .modeling_lsg_distilbert import LSGDistilBertConfig
from .modeling_lsg_electra import LSGElectraConfig
from .modeling_lsg_ernie import LSGErnieConfig
from .modeling_lsg_esm import LSGEsmConfig
from .modeling_lsg_layoutlm import LSGLayoutLMConfig
from .modeling_lsg_markuplm import LSGMarkupLMConfig
from .modeling_lsg_megatron_bert import LSGMegatronBertConfig
from .modeling_lsg_mpnet import LSGMPNetConfig
from .modeling_lsg_rembert import LSGRemBertConfig
from .modeling_lsg_roberta import LSGRobertaConfig
from .modeling_lsg_roberta_prelayernorm import LSGRobertaPreLayerNormConfig
from .modeling_lsg_splinter import LSGSplinterConfig
from .modeling_lsg_xlm_roberta import LSGXLMRobertaConfig
from .modeling_lsg_xlm_roberta_xl import LSGXLMRobertaXLConfig
from .modeling_lsg_xmod import LSGXmodConfig


FAMILIES: tuple[Any, ...] = (
    LSGAlbertConfig,
    LSGBertConfig,
    LSGBertGenerationConfig,
    LSGCamembertConfig,
    LSGData2VecTextConfig,
    LSGDebertaConfig,
    LSGDebertaV2Config,
    LSGDistilBertConfig,
    LSGElectraConfig,
    LSGErnieConfig,
    LSGEsmConfig,
    LSGLayoutLMConfig,
    LSGMarkupLMConfig,
    LSGMegatronBertConfig,
    LSGMPNetConfig,
    LSGRemBertConfig,
    LSGRobertaConfig,
    LSGRobertaPreLayerNormConfig,
    LSGSplinterConfig,
    LSGXLMRobertaConfig,
    LSGXLMRobertaXLConfig,
    LSGXmodConfig,
)
PARTS = ("encoder", "decoder")


def config_class_of(content: Mapping[str, Any]) -> Any:
    """The class of a part's configuration: LSG where the content of its `config.json` says so, else `AutoConfig`.

    Raises:
        ValueError: where the part is an LSG checkpoint that cannot be one here.
    """
    families = {config_class.model_type: config_class for config_class in FAMILIES}
    if needs_its_code(content):
        if content["model_type"] not in families:
            raise ValueError(
                f"model_type: got an LSG checkpoint of {content['model_type']!r}; a part of an encoder-decoder must be "
                f"one of {', '.join(families)}, or a stock model"
            )
        return families[content["model_type"]]
    named = content.get("architectures") or ()
    if content.get("base_model_prefix") == "lsg" or any(name.startswith("LSG") for name in named):
        raise ValueError(
            "attn_implementation: got an LSG checkpoint without this entry in its config.json; convert it, and give "
            "what was written"
        )
    return AutoConfig


def model_class_of(config: Any, part: str) -> Any:
    """The class of a part, by its configuration: an LSG class, or the Auto class that makes a stock one.

    Raises:
        ValueError: where the family has no decoder.
    """
    if not needs_its_code(config.to_dict()):
        return AutoModel if part == "encoder" else AutoModelForCausalLM
    mapping: Any = MODEL_MAPPING if part == "encoder" else MODEL_FOR_CAUSAL_LM_MAPPING
    stock = stock_class(type(config))
    if stock not in mapping or (part == "decoder" and not config.has_causal_form):
        raise ValueError(f"{part}: got a checkpoint of {config.model_type!r}, which has no causal form; give another")
    # Where the configuration's class stands: it may be that of a checkpoint's own code.
    return getattr(sys.modules[type(config).__module__], f"LSG{mapping[stock].__name__}")


def load_part(part: str, name: str | None, options: dict[str, Any]) -> Any:
    """Load the encoder or the decoder from its folder or repository, with the arguments of `from_pretrained`.

    LSG classes are those beside this file: code that lies in the folder is not run.
    """
    if name is None:
        raise ValueError(f"{part}: got no checkpoint; give a folder or repository, or {part}_model")
    config = options.pop("config", None)
    if config is None:
        content, _ = PreTrainedConfig.get_config_dict(name, **options)
        config, options = config_class_of(content).from_pretrained(name, **options, return_unused_kwargs=True)
    for field in ("is_decoder", "add_cross_attention"):
        if hasattr(config, field):
            setattr(config, field, part == "decoder")
    return model_class_of(config, part).from_pretrained(name, config=config, **options)


@strict
class LSGEncoderDecoderConfig(EncoderDecoderConfig):
    """The configurations of an encoder and a decoder, as objects or as dictionaries, each of which may be LSG's."""

    encoder: PreTrainedConfig | dict | None = None
    decoder: PreTrainedConfig | dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if needs_its_code(kwargs):
            del kwargs["attn_implementation"]
        for part in PARTS:
            given: Any = getattr(self, part)
            if given is None:
                raise ValueError(f"{part}: got no configuration; an encoder-decoder needs one of each part")
            if isinstance(given, Mapping):
                content = dict(given)
                config_class = config_class_of(content)
                if config_class is AutoConfig:
                    given = AutoConfig.for_model(content.pop("model_type"), **content)
                else:
                    given = config_class.from_dict(content)
                setattr(self, part, given)
        if kwargs.get("attn_implementation") is None:  # which would be set in the parts too
            kwargs["attn_implementation"] = {part: getattr(self, part)._attn_implementation_internal for part in PARTS}
        super(EncoderDecoderConfig, self).__post_init__(**kwargs)

    @classmethod
    def from_encoder_decoder_configs(cls, encoder_config: Any, decoder_config: Any, **kwargs: Any) -> Any:
        """As in Transformers; the configurations are kept, not copied."""
        decoder_config.is_decoder = decoder_config.add_cross_attention = True
        return cls(encoder=encoder_config, decoder=decoder_config, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in Transformers; the parts keep the implementation of attention also where `kwargs` has fields of them."""
        result = super().from_dict(config_dict, **kwargs)
        config = result[0] if isinstance(result, tuple) else result
        if config._attn_implementation is not None:
            config._attn_implementation = config._attn_implementation
        return result

    def to_dict(self) -> dict[str, Any]:
        """As in Transformers; with what makes the stock class refuse the checkpoint."""
        return {**super().to_dict(), "attn_implementation": NEEDS_ITS_CODE}

    def to_diff_dict(self) -> dict[str, Any]:
        """All fields, since a part's defaults are those of its class, but for the places that it was loaded from."""
        content = self.to_dict()
        for part in (content, *(content[name] for name in PARTS)):
            part.pop("_name_or_path", None)
            if needs_its_code(part):
                part["attn_implementation"] = NEEDS_ITS_CODE
        return content


class LSGEncoderDecoderModel(EncoderDecoderModel):
    """As in Transformers; the encoder, the decoder, or both have LSG.

    The decoder's cross-attention reads the states of the text, (batch, t, width), without those of the global tokens.
    """

    config_class = LSGEncoderDecoderConfig

    def __init__(self, config: Any = None, encoder: Any = None, decoder: Any = None) -> None:
        if config is None and encoder is not None and decoder is not None:
            config = self.config_class.from_encoder_decoder_configs(encoder.config, decoder.config)
        if isinstance(config, self.config_class):
            # Modules of a part read the object that it was made of, so this has to be the one that is shared.
            encoder = self.make_part("encoder", config, encoder)
            decoder = self.make_part("decoder", config, decoder)
        super().__init__(config, encoder, decoder)

    @staticmethod
    def make_part(part: str, config: Any, model: Any) -> Any:
        """A part by the configuration of both; one that is given stays, and brings its own configuration."""
        if model is None:
            part_config = getattr(config, part)
            model_class = model_class_of(part_config, part)
            model = getattr(model_class, "from_config", model_class)(part_config)
        model.is_part = True
        model_class = model_class_of(model.config, part)
        if type(model) is model_class:  # So that the part, saved alone, has its code beside it too.
            model_class.register_for_auto_class("AutoModel" if part == "encoder" else "AutoModelForCausalLM")
        setattr(config, part, model.config)
        return model

    @classmethod
    def from_encoder_decoder_pretrained(
        cls,
        encoder_pretrained_model_name_or_path: str | None = None,
        decoder_pretrained_model_name_or_path: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in Transformers: an encoder and a decoder from a folder or repository each, LSG or stock.

        Args:
            kwargs: fields of the configuration of both, such as `decoder_start_token_id` and `pad_token_id`; and, with
                "encoder_" or "decoder_" in front, arguments of `from_pretrained` for a part: its fields, its `config`;
                or its `model`, in place of a name.

        Raises:
            ValueError: where an argument is unknown, or a part cannot be one.
        """
        names = encoder_pretrained_model_name_or_path, decoder_pretrained_model_name_or_path
        own = {item.name for item in fields(cls.config_class)} - {*PARTS}
        models = []
        for part, name in zip(PARTS, names, strict=True):
            given = [key for key in kwargs if key.startswith(f"{part}_") and key not in own]
            options = {key.removeprefix(f"{part}_"): kwargs.pop(key) for key in given}
            model = options.pop("model", None)
            models.append(load_part(part, name, options) if model is None else model)
        if unknown := sorted(kwargs.keys() - own):
            raise ValueError(
                f"{unknown[0]}: got an unknown argument; one for a part begins with encoder_ or decoder_, others are "
                f"{', '.join(sorted(own))}"
            )
        encoder, decoder = models
        config = cls.config_class.from_encoder_decoder_configs(encoder.config, decoder.config, **kwargs)
        return cls(config, encoder, decoder)

    def create_masks_for_generate(self, config: Any, past_key_values: Any, **kwargs: Any) -> Any:
        """As the decoder makes them, for its static cache."""
        make = getattr(self.decoder, "create_masks_for_generate", create_masks_for_generate)
        cache = getattr(past_key_values, "self_attention_cache", past_key_values)
        return make(config=config.decoder, past_key_values=cache, **kwargs)


# So that what is saved has this code beside it, and says so.
LSGEncoderDecoderConfig.register_for_auto_class()
LSGEncoderDecoderModel.register_for_auto_class("AutoModelForSeq2SeqLM")
