"""What an LSG model does: global tokens in, global tokens out, masks, and the states captured on the way.

A family's classes are its stock classes of Transformers with one of these mixed in. Nothing is registered in
Transformers: LSG lives in the modules of a model, and `config._attn_implementation` picks its kernel.
"""

from collections.abc import Callable, Mapping
from functools import partial, wraps
from inspect import signature
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from .lsg_attention import ATTN_IMPLEMENTATIONS
from .lsg_classes import LSGAttentionSupport, define_modules, stock_class
from .lsg_layout import LSGLayout, is_exporting
from .lsg_modules import LSGEmbeddings, LSGEncoder, LSGSelfAttention, passes_global_tokens
from .lsg_packing import find_seqlens, unpack_rows


logger = logging.get_logger(__name__)


def argument_names(stock_forward: Callable[..., Any]) -> list[str]:
    """The names of a method's arguments but for `self` and `**kwargs`."""
    return [name for name in signature(stock_forward).parameters if name not in ("self", "kwargs")]


def with_global_tokens(stock_forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the stock forward of a model that reads a text: global tokens go in, and are cut off what comes out.

    The result has the stock signature. It returns hidden states of `t` positions (`g + t` where an encoder passes its
    global tokens to the decoder). With "eager", `attentions` holds what the text attends to: (batch, heads, t, t) for a
    text of at most two blocks, else (batch, heads, t, keys), with the keys in the order that `lsg_attention` states;
    `global_attentions` holds (batch, heads, g, g + t).
    """
    names = argument_names(stock_forward)

    @wraps(stock_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        return_dict = kwargs.pop("return_dict", None)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        tokens = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        seqlens, length = None, 0
        if tokens is not None:
            self.check_input(tokens, kwargs)
            mask = kwargs["attention_mask"] = self.extend_mask(kwargs.get("attention_mask"), tokens)
            seqlens, length = find_seqlens(mask, self.config.kernel), mask.shape[-1]
            if seqlens is not None:
                kwargs["seqlens"] = seqlens
            self.insert_global_tokens(kwargs)
        outputs = stock_forward(self, **kwargs, return_dict=True)
        self.strip_outputs(outputs, partial(unpack_rows, seqlens=seqlens, length=length))
        return outputs if return_dict else outputs.to_tuple()

    return forward


class LSGReader(LSGAttentionSupport):
    """Mixed into a model that reads a text: a base model, or an encoder.

    Attributes:
        lsg_modules: which mixin goes over which stock module: the name of its class, without the family's in front.
        position_offset: rows of a position table before that of the first token, which
            `config.max_position_embeddings` does not count.
        positions_follow_padding: whether those rows are instead all up to the padding id's, and counted.
        replacements: stock classes of modules, and the LSG class of each.
    """

    config_class: Any
    lsg_modules: ClassVar[Mapping[str, type]]
    position_offset: ClassVar[int] = 0
    positions_follow_padding: ClassVar[bool] = False
    replacements: ClassVar[Mapping[type, type]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        stock = stock_class(cls)
        if issubclass(stock, PreTrainedModel) and not issubclass(stock, LSGReader):
            cls.forward = with_global_tokens(stock.forward)  # type: ignore[attr-defined]
            cls.replacements = define_modules(cls)

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        # In place: the modules keep their weights, and what the stock constructor set on them.
        for module in list(self.modules()):  # type: ignore[attr-defined]
            replacement = self.replacements.get(type(module))
            if replacement is not None:
                module.__class__ = replacement
                module.config = config
                if isinstance(module, LSGEmbeddings):
                    module.add_global_embeddings(config)
        self.add_global_embeddings(config)
        self.post_init()  # type: ignore[attr-defined]

    def add_global_embeddings(self, config: Any) -> None:
        """Add the table of the global tokens, where no module of the model holds it."""

    @classmethod
    def special_positions(cls, config: Any) -> int:
        """Rows of a position table before that of the first token."""
        return config.pad_token_id + 1 if cls.positions_follow_padding else cls.position_offset

    @classmethod
    def counted_positions(cls, config: Any) -> int:
        """How many of them `config.max_position_embeddings` counts."""
        return cls.special_positions(config) if cls.positions_follow_padding else 0

    def check_input(self, tokens: torch.Tensor, arguments: Mapping[str, Any]) -> None:
        """Raise ValueError where the model cannot read a text; warn where the kernel cannot give what is asked for."""
        config, length = self.config, tokens.shape[1]  # type: ignore[attr-defined]
        limit = config.max_position_embeddings - self.counted_positions(config)
        if length == 0:
            raise ValueError("input_ids: got a text of 0 tokens; at least 1 is needed")
        if length > limit and arguments.get("position_ids") is None:
            raise ValueError(
                f"input_ids: got a text of {length} tokens; this checkpoint has positions for {limit}; "
                "truncate the text, or convert with a larger max_sequence_length"
            )
        if (
            not config.adaptive
            and not is_exporting()
            and not config.layout.is_short(length)
            and length % config.block_size
        ):
            raise ValueError(
                f"input_ids: got a text of {length} tokens; with adaptive=False it must be a multiple of block_size, "
                f"{config.block_size}, or at most two blocks; pad it, or set adaptive=True"
            )
        if config._attn_implementation not in ATTN_IMPLEMENTATIONS:
            allowed = " and ".join(map(repr, ATTN_IMPLEMENTATIONS))
            raise ValueError(f"attn_implementation: got {config._attn_implementation!r}; LSG has {allowed}")
        wanted = arguments.get("output_attentions")
        if (config.output_attentions if wanted is None else wanted) and config._attn_implementation != "eager":
            logger.warning_once(
                f"output_attentions: the {config._attn_implementation!r} kernel holds no probabilities and gives none; "
                "load the model with attn_implementation='eager'"
            )

    def extend_mask(self, attention_mask: torch.Tensor | None, tokens: torch.Tensor) -> torch.Tensor:
        """The mask of global tokens and text: boolean, (batch, 1, 1, g + t), which Transformers leaves as it is.

        `attention_mask` is (batch, t), and zero where a token is padding; None means that there is no padding.
        """
        config, shape = self.config, tokens.shape[:2]  # type: ignore[attr-defined]
        if attention_mask is None:
            mask = torch.ones(shape, dtype=torch.bool, device=tokens.device)
        elif attention_mask.shape != shape:
            raise ValueError(
                f"attention_mask: got shape {tuple(attention_mask.shape)}; it must be (batch, tokens), {tuple(shape)}"
            )
        else:
            mask = attention_mask.to(device=tokens.device, dtype=torch.bool)
        if config.mask_first_token:
            mask = mask & (torch.arange(shape[1], device=mask.device) > 0)
        mask = torch.cat([mask.new_ones(shape[0], config.num_global_tokens), mask], dim=1)
        return mask[:, None, None]

    def insert_global_tokens(self, arguments: dict[str, Any]) -> None:
        """Put the global tokens in front of the text, where the embeddings module does not."""

    def strip_outputs(self, outputs: Any, unpack: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Cut the global tokens off the captured states and probabilities. The last state has none any more.

        `unpack` makes a padded batch again of states whose rows stand end to end.
        """
        config = self.config  # type: ignore[attr-defined]
        g = config.num_global_tokens
        if outputs.get("hidden_states"):
            *inner, last = outputs["hidden_states"]
            first = 0 if passes_global_tokens(config) else g
            inner = [None if states is None else unpack(states)[:, first:] for states in inner]
            outputs["hidden_states"] = (*inner, last)
        split_attentions(outputs, config.layout)


def split_attentions(outputs: Any, layout: LSGLayout) -> None:
    """Split the captured probabilities into those of the text and those of the global tokens."""
    if outputs.get("attentions"):
        text, to_all = zip(*outputs["attentions"], strict=True)
        if layout.is_short(text[0].shape[2]):
            text = tuple(probabilities[..., layout.num_global_tokens :] for probabilities in text)
        outputs["attentions"] = text
        outputs["global_attentions"] = to_all


class LSGModel(LSGReader):
    """Mixed into the base model of a BERT-like family.

    `global_token_type` says whether the global tokens carry token type 0.
    """

    lsg_modules = {
        "Embeddings": LSGEmbeddings,
        "SelfAttention": LSGSelfAttention,
        "Encoder": LSGEncoder,
        "Transformer": LSGEncoder,
    }
    position_tables: ClassVar[tuple[str, ...]] = ("embeddings.position_embeddings.weight",)
    global_table: ClassVar[str] = "embeddings.global_embeddings.weight"
    global_token_type: ClassVar[bool] = False
    sinusoidal_positions: ClassVar[bool] = False
