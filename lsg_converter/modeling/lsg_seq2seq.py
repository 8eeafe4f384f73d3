"""What encoder-decoder models add: an encoder puts the global tokens in itself, and may pass them on to the decoder."""

import copy
from collections.abc import Callable
from functools import wraps
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging

from .lsg_classes import LSGWrapper, stock_class
from .lsg_config import MAX_GLOBAL_TOKENS
from .lsg_generation import CACHE_NAMES
from .lsg_modeling import LSGReader, argument_names
from .lsg_modules import LSGPositions, LSGSeq2SeqAttention, global_tokens, strip_global_tokens
from .lsg_packing import Packing


logger = logging.get_logger(__name__)


def passes_global_tokens(config: Any) -> bool:
    """Whether an encoder gives a decoder, if there is one, its global tokens too."""
    return config.is_encoder_decoder and config.pass_global_tokens_to_decoder


class LSGSeq2SeqEncoder(LSGReader):
    """Mixed into the encoder of an encoder-decoder family.

    `scales_outside` says whether the encoder scales the word embeddings, and not the embedding module.
    """

    lsg_modules = {
        "LearnedPositionalEmbedding": LSGPositions,
        "SinusoidalPositionalEmbedding": LSGPositions,
        "Attention": LSGSeq2SeqAttention,
    }
    scales_outside: ClassVar[bool] = False

    def add_global_embeddings(self, config: Any) -> None:
        self.global_embeddings = nn.Embedding(MAX_GLOBAL_TOKENS, config.d_model)

    def insert_global_tokens(self, arguments: dict[str, Any]) -> None:
        text, ids = arguments.get("inputs_embeds"), None
        if text is None:
            ids = arguments.pop("input_ids")
            text = self.embed_tokens(ids)  # type: ignore[attr-defined]
            if self.scales_outside:
                text = text * self.embed_scale  # type: ignore[attr-defined]
        tokens = global_tokens(self, text).to(text)  # A device map may put tables on other devices than the words'.
        text = self.add_positions(text, ids, arguments.pop("position_ids", None))
        states, packing = torch.cat([tokens, text], dim=1), arguments.pop("packing", None)
        if packing is not None:
            states, arguments["attention_mask"] = packing.pack(states), packing.mask
            arguments["seqlens"] = packing.seqlens
        arguments["inputs_embeds"] = states

    def add_positions(self, text: torch.Tensor, ids: torch.Tensor | None, rows: torch.Tensor | None) -> torch.Tensor:
        """Add the positions to a text, (batch, t, width): by its ids, or by the rows of the table, if given."""
        return text + self.embed_positions(text=text, ids=ids, rows=rows).to(text.device)  # type: ignore[attr-defined]

    def strip_last_state(self, outputs: Any, packing: Packing | None) -> None:
        config, last = self.config, outputs.last_hidden_state  # type: ignore[attr-defined]
        if packing is not None:
            last = packing.unpack(last)
        text = strip_global_tokens(last, config, None if packing is None else packing.first_token)
        if passes_global_tokens(config):
            g = config.num_global_tokens
            outputs["global_hidden_state"], text = last[:, :g], last[:, g:]
        outputs["last_hidden_state"] = text
        if outputs.get("hidden_states"):
            outputs["hidden_states"] = (*outputs["hidden_states"][:-1], text)


class LSGSeq2SeqModel(LSGWrapper):
    """Mixed into the base model of an encoder-decoder family: its encoder has LSG, its decoder is the stock one."""

    position_tables: ClassVar[tuple[str, ...]] = ("encoder.embed_positions.weight", "decoder.embed_positions.weight")
    global_table: ClassVar[str] = "encoder.global_embeddings.weight"
    global_token_type: ClassVar[bool] = False
    global_types: ClassVar[tuple[str, ...]] = ()
    required_inputs: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        stock = stock_class(cls)
        if issubclass(stock, PreTrainedModel) and not issubclass(stock, LSGSeq2SeqModel):
            cls.forward = with_lsg_encoder(stock.forward)  # type: ignore[attr-defined]

    def train(self, mode: bool = True) -> Any:
        """As in torch. Loading makes computed positions trainable, and ends in `eval`; here they are frozen again."""
        super().train(mode)  # type: ignore[misc]
        if self.config.sinusoidal_positions:  # type: ignore[attr-defined]
            for part in (self.encoder, self.decoder):  # type: ignore[attr-defined]
                part.embed_positions.requires_grad_(False)
        return self

    @classmethod
    def special_positions(cls, config: Any) -> int:
        """As `LSGReader.special_positions`."""
        return cls.lsg_part_class.special_positions(config)

    @classmethod
    def counted_positions(cls, config: Any) -> int:
        """As `LSGReader.counted_positions`."""
        return cls.lsg_part_class.counted_positions(config)


class LSGSeq2SeqDecoder(LSGWrapper):
    """Mixed into a decoder alone where an encoder may have other words, which the stock class gives its head."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        config = copy.deepcopy(config)  # as the stock class does
        config.vocab_size = config.decoder_vocab_size
        super().__init__(config, *args, **kwargs)


def named_outputs(encoder_outputs: Any) -> Any:
    """What an encoder returned, by its names. A plain tuple has the states of the global tokens as its only tensor but
    the first."""
    if isinstance(encoder_outputs, dict):
        return encoder_outputs
    text, *others = encoder_outputs
    captured = [x for x in others if not isinstance(x, torch.Tensor)]
    global_states = [x for x in others if isinstance(x, torch.Tensor)]
    named = BaseModelOutput(text, *captured[:2])
    if global_states:
        named["global_hidden_state"] = global_states[0]
    return named


def with_passed_tokens(encoded: Any) -> BaseModelOutput:
    """The outputs of an encoder as the decoder sees them: the global tokens that are passed on stand in front."""
    states = torch.cat([encoded["global_hidden_state"], encoded["last_hidden_state"]], dim=1)
    return BaseModelOutput(states, encoded.get("hidden_states"), encoded.get("attentions"))


def with_lsg_encoder(stock_forward: Callable[..., Any]) -> Callable[..., Any]:
    """Make the forward of an encoder-decoder model show the decoder the global tokens that its encoder passes on.

    The encoder's states are those of the text, (batch, t, width), as the mask is; those of the global tokens are its
    `global_hidden_state`. Its `global_attentions` are returned as `encoder_global_attentions`.
    """
    names = argument_names(stock_forward)

    @wraps(stock_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        mask = kwargs.get("attention_mask")
        if kwargs.get("encoder_outputs") is None:
            for_both = {*names, *CACHE_NAMES, "return_dict"} - {"output_attentions", "output_hidden_states"}
            others = {name: value for name, value in kwargs.items() if name not in for_both}
            kwargs["encoder_outputs"] = self.encoder(
                input_ids=kwargs.get("input_ids"),
                attention_mask=mask,
                inputs_embeds=kwargs.get("inputs_embeds"),
                return_dict=True,
                **others,
            )
        encoded = named_outputs(kwargs["encoder_outputs"])
        text, global_states = encoded["last_hidden_state"], encoded.get("global_hidden_state")
        if global_states is not None:
            kwargs["encoder_outputs"] = with_passed_tokens(encoded)
            if mask is not None:
                kwargs["attention_mask"] = F.pad(mask, (global_states.shape[1], 0), value=1)
        elif passes_global_tokens(self.config) and self.config.num_global_tokens:
            logger.warning_once(
                "encoder_outputs: they have no global_hidden_state, so the decoder sees the states of the text alone; "
                "pass on what the encoder returned"
            )
        return_dict = kwargs.pop("return_dict", None)
        outputs = stock_forward(self, **kwargs, return_dict=True)
        outputs["encoder_last_hidden_state"] = text
        if encoded.get("global_attentions") is not None:
            outputs["encoder_global_attentions"] = encoded["global_attentions"]
        return outputs if (self.config.return_dict if return_dict is None else return_dict) else outputs.to_tuple()

    return forward
