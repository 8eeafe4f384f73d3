"""What the families share: the configuration, the global tokens in front of the text, masks, and the way back.

A family's classes are its stock classes of Transformers with one of these mixed in. Nothing is registered in
Transformers: LSG lives in the modules of a model, and `config._attn_implementation` picks its kernel.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial, wraps
from inspect import signature
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.configuration_utils import strict
from transformers.utils import logging

from .lsg_attention import CHOICES, KERNELS, lsg_attention
from .lsg_cpu import cpu_kernel_serves
from .lsg_sparsity import SPARSITY_TYPES


logger = logging.get_logger(__name__)

MAX_GLOBAL_TOKENS = 512


@dataclass(kw_only=True, init=False, repr=False, eq=False)
class LSGConfig:
    """The fields that LSG adds to a family's configuration.

    Args:
        num_global_tokens: how many global tokens stand in front of the text, 0 to 512.
        pool_with_global: whether the final state of the first text token is that of the first global token.
        mask_first_token: whether the first text token is hidden as a key.
        block_size: tokens in a block; a query sees its block and the two beside it.
        sparse_block_size: sparse keys that a query sees on each side.
        sparsity_factor: how many tokens of text one sparse key stands for.
        sparsity_type: how sparse keys are made: "norm", "pooling", "bos_pooling", "stride", "block_stride", "lsh"; or
            "none", for no sparse keys.
        lsh_num_pre_rounds: rounds of merging before the last one, for "lsh".
        lsh_seed: seed of the rotations of "lsh".
        adaptive: whether a text whose length is not a multiple of the block is padded to one.
        attention_kernel: the kernel by its name, "cpu", "portable" or "triton"; None leaves the choice open. It has no
            say with `attn_implementation="eager"`.
    """

    num_global_tokens: int = 1
    pool_with_global: bool = True
    mask_first_token: bool = False
    block_size: int = 128
    sparse_block_size: int = 128
    sparsity_factor: int = 2
    sparsity_type: str | None = "norm"
    lsh_num_pre_rounds: int = 1
    lsh_seed: int = 0
    adaptive: bool = True
    attention_kernel: str | None = None

    # Whether `is_decoder` may be set, which Transformers does where a sequence-to-sequence model is only its decoder.
    may_be_decoder: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # A subclass of a strict configuration is strict only if it is made so again.
        super().__init_subclass__(**kwargs)
        if issubclass(cls, PreTrainedConfig):
            strict(cls)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in Transformers; the overrides in `kwargs` are validated too."""
        result = super().from_dict(config_dict, **kwargs)  # type: ignore[misc]
        (result[0] if isinstance(result, tuple) else result).validate()
        return result

    def validate_lsg(self) -> None:
        """Check what the fields must be together.

        Raises:
            ValueError: which names the field, what was got and what is allowed.
        """
        block, sparse = self.block_size, self.sparse_block_size
        factor, kind = self.sparsity_factor, self.sparsity_type
        positions = getattr(self, "position_embedding_type", None)

        def require(field: str, holds: bool, allowed: str) -> None:
            if not holds:
                raise ValueError(f"{field}: got {getattr(self, field)!r}; allowed is {allowed}")

        require("num_global_tokens", 0 <= self.num_global_tokens <= MAX_GLOBAL_TOKENS, f"0 to {MAX_GLOBAL_TOKENS}")
        require("block_size", block >= 1, "at least 1")
        require("sparse_block_size", sparse >= 0, "at least 0, which means no sparse keys")
        require("sparsity_factor", 0 <= factor <= block, f"0 to block_size, {block}; 0 means no sparse keys")
        require("sparsity_type", kind in (None, *SPARSITY_TYPES), f"one of {', '.join(SPARSITY_TYPES)}")
        kernel = self.attention_kernel
        require("attention_kernel", kernel in (None, *CHOICES), f"one of {', '.join(CHOICES)}, or none")
        require("lsh_num_pre_rounds", self.lsh_num_pre_rounds >= 0, "at least 0")
        require(
            "mask_first_token", not self.mask_first_token or self.pool_with_global, "True only with pool_with_global"
        )
        causal = getattr(self, "is_decoder", False) and not self.may_be_decoder
        require("is_decoder", not causal, "False: LSG has no causal form yet")
        require("position_embedding_type", positions in (None, "absolute"), "'absolute': LSG has no relative positions")
        if factor and sparse:
            chunk = min(block, sparse)
            require("block_size", block % factor == 0, f"a multiple of sparsity_factor, {factor}")
            require(
                "sparse_block_size",
                kind not in ("norm", "lsh") or (chunk % factor == 0 and block % chunk == 0),
                f"with {kind!r} a multiple of sparsity_factor, {factor}, dividing block_size, {block}, or larger",
            )
        heads = getattr(self, "num_attention_heads", factor)
        if kind in ("stride", "block_stride") and factor > heads:
            logger.warning_once(f"sparsity_factor={factor} with {kind!r} and {heads} heads: no head keeps some tokens")

    @property
    def attention_arguments(self) -> dict[str, Any]:
        """The fields that `lsg_attention` takes."""
        names = (
            "num_global_tokens",
            "block_size",
            "sparse_block_size",
            "sparsity_factor",
            "sparsity_type",
            "lsh_num_pre_rounds",
            "lsh_seed",
        )
        return {name: getattr(self, name) for name in names} | {"kernel": self.kernel}

    @property
    def kernel(self) -> str:
        """The kernel as `lsg_attention` takes it."""
        kernel = self._attn_implementation  # type: ignore[attr-defined]
        return kernel if kernel == "eager" or self.attention_kernel is None else self.attention_kernel


@dataclass(kw_only=True, init=False, repr=False, eq=False)
class LSGSeq2SeqConfig(LSGConfig):
    """The fields for encoder-decoder models, whose encoder has LSG.

    Args:
        pass_global_tokens_to_decoder: whether the decoder sees the global tokens' final states too; then nothing is
            pooled with them.
    """

    pass_global_tokens_to_decoder: bool = True
    may_be_decoder: ClassVar[bool] = True


class LSGEmbeddings:
    """Mixed into a family's embeddings: global tokens stand in front of the text.

    LayerNorm and dropout work token by token, so the stock forward serves the text, and the globals join after it.
    """

    config: Any
    LayerNorm: nn.LayerNorm
    dropout: nn.Dropout

    def adopt(self, config: Any) -> None:
        self.global_embeddings = nn.Embedding(MAX_GLOBAL_TOKENS, self.LayerNorm.weight.shape[0])

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        text = super().forward(*args, **kwargs)  # type: ignore[misc]
        tokens = self.LayerNorm(global_tokens(self, text))
        return torch.cat([self.dropout(tokens), text], dim=1)


def global_tokens(module: Any, text: torch.Tensor) -> torch.Tensor:
    """The embeddings of the global tokens for a batch, shape (batch, g, width), before LayerNorm and dropout."""
    index = torch.arange(module.config.num_global_tokens, device=text.device)
    return module.global_embeddings(index).expand(text.shape[0], -1, -1)


class LSGPositions:
    """Mixed into the position embeddings of an encoder. The encoder adds them to the text before the global tokens,
    which have none, come in front; what the stock forward asks for later adds nothing."""

    weight: torch.Tensor

    def forward(self, *args: Any, length: int | None = None, **kwargs: Any) -> torch.Tensor:
        """The positions of a text of `length` tokens, shape (length, width); without it, a zero."""
        if length is None:
            return self.weight.new_zeros(())
        first = getattr(self, "offset", 0)
        return self.weight[first : first + length]


class LSGComputedPositions(LSGPositions):
    """The same for positions that are not trained."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().forward(*args, **kwargs).detach()


class LSGSelfAttention:
    """Mixed into a self-attention: its projections, then `lsg_attention`, then what the family does with the result."""

    config: Any
    training: bool
    projections: ClassVar[tuple[str, str, str]] = ("query", "key", "value")
    dropout_name: ClassVar[str] = "dropout"

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        *args: Any,
        row_lengths: list[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """`hidden_states` is (batch, g + t, width), `attention_mask` boolean (batch, 1, 1, g + t); with `row_lengths`
        they hold the rows of a batch end to end, (1, tokens, width) and (1, 1, 1, tokens)."""
        query, key, value = (
            getattr(self, name)(hidden_states).unflatten(-1, (self.config.num_attention_heads, -1)).transpose(1, 2)
            for name in self.projections
        )
        dropout = getattr(self, self.dropout_name)
        output, probabilities = lsg_attention(
            query,
            key,
            value,
            attention_mask[:, 0, 0],
            **self.config.attention_arguments,
            dropout=getattr(dropout, "p", dropout) if self.training else 0.0,
            row_lengths=row_lengths,
        )
        return self.finish(output.transpose(1, 2).flatten(2), hidden_states), probabilities

    def finish(self, output: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """What a family's attention module does with its heads' outputs and its input, (batch, g + t, width) each."""
        return output


class LSGSeq2SeqAttention(LSGSelfAttention):
    """Mixed into the self-attention of a BART-like encoder."""

    projections: ClassVar[tuple[str, str, str]] = ("q_proj", "k_proj", "v_proj")

    def finish(self, output: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.out_proj(output)  # type: ignore[attr-defined]


def cut_global_tokens(states: torch.Tensor, config: Any) -> torch.Tensor:
    """The final states at the positions of the text: (batch, g + t, width) to (batch, t, width)."""
    g = config.num_global_tokens
    if config.pool_with_global and g > 0:
        return torch.cat([states[:, :1], states[:, g + 1 :]], dim=1)
    return states[:, g:]


def find_row_lengths(attention_mask: torch.Tensor, kernel: str) -> list[int] | None:
    """How many tokens each row of a batch has up to its last real one, the globals included; None where all rows have
    as many, or where the kernel cannot do with the real tokens alone. `attention_mask` is (batch, 1, 1, g + t)."""
    if kernel not in ("sdpa", "cpu") or torch.compiler.is_compiling() or not cpu_kernel_serves(attention_mask):
        return None
    keep = attention_mask[:, 0, 0]
    lengths = (keep * torch.arange(1, keep.shape[1] + 1)).amax(dim=1).clamp(min=1).tolist()
    return None if min(lengths) == keep.shape[1] else lengths


def pack_rows(
    states: torch.Tensor, attention_mask: torch.Tensor, row_lengths: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put the real tokens of rows end to end: states to (1, all tokens, width), the mask to (1, 1, 1, all tokens)."""
    rows = zip(states.unbind(), attention_mask[:, 0, 0].unbind(), row_lengths, strict=True)
    packed, keep = zip(*((row[:length], mask[:length]) for row, mask, length in rows), strict=True)
    return torch.cat(packed)[None], torch.cat(keep)[None, None, None]


def unpack_rows(states: torch.Tensor, row_lengths: list[int] | None, length: int) -> torch.Tensor:
    """The reverse, with zeros behind the real tokens: (1, all tokens, width) to (batch, length, width). Nothing to do
    where `row_lengths` is None."""
    if row_lengths is None:
        return states
    padded = pad_sequence(states[0].split(row_lengths), batch_first=True)
    return F.pad(padded, (0, 0, 0, length - padded.shape[1]))


def passes_global_tokens(config: Any) -> bool:
    """Whether an encoder gives a decoder its global tokens too."""
    return getattr(config, "pass_global_tokens_to_decoder", False)


class LSGEncoder:
    """Mixed into a family's encoder: its layers see real tokens alone, where that can be had; what leaves it, and
    reaches poolers and heads, has the positions of the text."""

    config: Any

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        *args: Any,
        row_lengths: list[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        length = hidden_states.shape[1]
        if row_lengths is not None:
            hidden_states, attention_mask = pack_rows(hidden_states, attention_mask, row_lengths)
            kwargs["row_lengths"] = row_lengths
        outputs = super().forward(hidden_states, attention_mask, *args, **kwargs)  # type: ignore[misc]
        states = unpack_rows(outputs.last_hidden_state, row_lengths, length)
        outputs["last_hidden_state"] = cut_global_tokens(states, self.config)
        return outputs


def argument_names(stock_forward: Callable[..., Any]) -> list[str]:
    """The names of a method's arguments but for `self` and `**kwargs`."""
    return [name for name in signature(stock_forward).parameters if name not in ("self", "kwargs")]


def with_global_tokens(stock_forward: Callable[..., Any]) -> Callable[..., Any]:
    """Make the forward of a model that reads a text serve global tokens: put them in, and cut them off what it gives.

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
        row_lengths, length = None, 0
        if tokens is not None:
            self.check_input(tokens, kwargs)
            mask = kwargs["attention_mask"] = self.extend_mask(kwargs.get("attention_mask"), tokens)
            row_lengths, length = find_row_lengths(mask, self.config.kernel), mask.shape[-1]
            if row_lengths is not None:
                kwargs["row_lengths"] = row_lengths
            self.put_in(kwargs)
        outputs = stock_forward(self, **kwargs, return_dict=True)
        self.cut_off(outputs, partial(unpack_rows, row_lengths=row_lengths, length=length))
        return outputs if return_dict else outputs.to_tuple()

    return forward


class LSGKernels:
    """What Transformers asks a model class about its kernels: LSG has its own "eager" and "sdpa", and no others."""

    _supports_sdpa = True
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = False


class LSGReader(LSGKernels):
    """Mixed into a model that reads a text: a base model, or an encoder.

    `lsg_modules` says which stock modules inside it become which; the names are those of their classes, without the
    family's in front.
    """

    config_class: Any
    lsg_modules: ClassVar[Mapping[str, type]]
    # Rows of a position table before that of the first token, which config.max_position_embeddings does not count.
    position_offset: ClassVar[int] = 0
    # Whether they are instead those up to the padding id, and counted.
    positions_follow_padding: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        stock = cls.__bases__[-1]
        if issubclass(stock, PreTrainedModel) and not issubclass(stock, LSGReader):
            cls.forward = with_global_tokens(stock.forward)  # type: ignore[attr-defined]

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        family = family_name(type(self))
        # In place: the modules keep their weights, and what the stock constructor set on them.
        for module in list(self.modules()):  # type: ignore[attr-defined]
            mixin = self.lsg_modules.get(type(module).__name__.removeprefix(family))
            if mixin is not None:
                module.__class__ = lsg_class(mixin, type(module), type(self).__module__)
                module.config = config
                if issubclass(mixin, LSGEmbeddings):
                    module.adopt(config)
        self.adopt(config)
        self.post_init()  # type: ignore[attr-defined]

    def adopt(self, config: Any) -> None:
        """What a model adds to itself beside its modules."""

    @classmethod
    def special_positions(cls, config: Any) -> int:
        """Rows of a position table before that of the first token."""
        return config.pad_token_id + 1 if cls.positions_follow_padding else cls.position_offset

    @classmethod
    def counted_positions(cls, config: Any) -> int:
        """How many of them `config.max_position_embeddings` counts."""
        return cls.special_positions(config) if cls.positions_follow_padding else 0

    def check_input(self, tokens: torch.Tensor, arguments: Mapping[str, Any]) -> None:
        """Raise ValueError where a text does not fit this checkpoint; warn of what the kernel cannot give."""
        config, length = self.config, tokens.shape[1]  # type: ignore[attr-defined]
        limit = config.max_position_embeddings - self.counted_positions(config)
        if length == 0:
            raise ValueError("input_ids: got a text of 0 tokens; at least 1 is needed")
        if length > limit and arguments.get("position_ids") is None:
            raise ValueError(
                f"input_ids: got a text of {length} tokens; this checkpoint has positions for {limit}; "
                "truncate the text, or convert with a larger max_sequence_length"
            )
        if not config.adaptive and length > 2 * config.block_size and length % config.block_size:
            raise ValueError(
                f"input_ids: got a text of {length} tokens; with adaptive=False it must be a multiple of block_size, "
                f"{config.block_size}, or at most two blocks; pad it, or set adaptive=True"
            )
        if config._attn_implementation not in KERNELS:
            raise ValueError(
                f"attn_implementation: got {config._attn_implementation!r}; LSG has {' and '.join(map(repr, KERNELS))}"
            )
        wanted = arguments.get("output_attentions")
        if (config.output_attentions if wanted is None else wanted) and config._attn_implementation != "eager":
            logger.warning_once(
                f"output_attentions: the {config._attn_implementation!r} kernel holds no probabilities and gives none; "
                "load the model with attn_implementation='eager'"
            )

    def extend_mask(self, attention_mask: torch.Tensor | None, tokens: torch.Tensor) -> torch.Tensor:
        """The mask of globals and text, as Transformers hands it through: boolean, of shape (batch, 1, 1, g + t).

        `attention_mask` is (batch, t), not zero where a token is real; None means everywhere.
        """
        config, shape = self.config, tokens.shape[:2]  # type: ignore[attr-defined]
        if attention_mask is None:
            keep = torch.ones(shape, dtype=torch.bool, device=tokens.device)
        elif attention_mask.shape != shape:
            raise ValueError(
                f"attention_mask: got shape {tuple(attention_mask.shape)}; it must be (batch, tokens), {tuple(shape)}"
            )
        else:
            keep = attention_mask.to(device=tokens.device, dtype=torch.bool)
        if config.mask_first_token:
            keep = torch.cat([torch.zeros_like(keep[:, :1]), keep[:, 1:]], dim=1)
        keep = torch.cat([keep.new_ones(shape[0], config.num_global_tokens), keep], dim=1)
        return keep[:, None, None]

    def put_in(self, arguments: dict[str, Any]) -> None:
        """Put the global tokens in front of the text, where the embeddings do not."""

    def cut_off(self, outputs: Any, unpack: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Cut the global tokens off what was captured on the way, but for the last state, with which it is done.

        `unpack` gives states the form of the batch again, where their rows stand end to end.
        """
        config = self.config  # type: ignore[attr-defined]
        g = config.num_global_tokens
        if outputs.get("hidden_states"):
            *inner, last = outputs["hidden_states"]
            first = 0 if passes_global_tokens(config) else g
            inner = [None if states is None else unpack(states)[:, first:] for states in inner]
            outputs["hidden_states"] = (*inner, last)
        split_attentions(outputs, g)


def split_attentions(outputs: Any, g: int) -> None:
    """Part the captured probabilities into those of the text and those of the global tokens."""
    if outputs.get("attentions"):
        text, to_all = zip(*outputs["attentions"], strict=True)
        full = text[0].shape[-1] == to_all[0].shape[-1]
        outputs["attentions"] = tuple(probabilities[..., g:] for probabilities in text) if full else text
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


class LSGSeq2SeqEncoder(LSGReader):
    """Mixed into the encoder of an encoder-decoder family.

    `scales_outside` says whether the encoder scales the word embeddings, and not the embedding module.
    """

    lsg_modules = {
        "LearnedPositionalEmbedding": LSGPositions,
        "SinusoidalPositionalEmbedding": LSGComputedPositions,
        "Attention": LSGSeq2SeqAttention,
    }
    scales_outside: ClassVar[bool] = False

    def adopt(self, config: Any) -> None:
        self.global_embeddings = nn.Embedding(MAX_GLOBAL_TOKENS, config.d_model)

    def put_in(self, arguments: dict[str, Any]) -> None:
        text = arguments.get("inputs_embeds")
        if text is None:
            text = self.embed_tokens(arguments.pop("input_ids"))  # type: ignore[attr-defined]
            if self.scales_outside:
                text = text * self.embed_scale  # type: ignore[attr-defined]
        tokens = global_tokens(self, text).to(text.dtype)
        text = text + self.embed_positions(length=text.shape[1])  # type: ignore[attr-defined]
        states, mask = torch.cat([tokens, text], dim=1), arguments["attention_mask"]
        if arguments.get("row_lengths") is not None:
            states, mask = pack_rows(states, mask, arguments["row_lengths"])
        arguments["inputs_embeds"], arguments["attention_mask"] = states, mask

    def cut_off(self, outputs: Any, unpack: Callable[[torch.Tensor], torch.Tensor]) -> None:
        config = self.config  # type: ignore[attr-defined]
        last = unpack(outputs.last_hidden_state)
        last = outputs["last_hidden_state"] = last if passes_global_tokens(config) else cut_global_tokens(last, config)
        if outputs.get("hidden_states"):
            outputs["hidden_states"] = (*outputs["hidden_states"][:-1], last)
        super().cut_off(outputs, unpack)


class LSGWrapper(LSGKernels):
    """Mixed into a model around one that has LSG: `lsg_part_class` takes the place of the stock class it extends."""

    lsg_part_class: ClassVar[Any]
    config_class: Any

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        checkpointing = getattr(config, "gradient_checkpointing", False)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        for name, part in list(self.named_children()):  # type: ignore[attr-defined]
            if type(part) is self.lsg_part_class.__bases__[-1]:
                if checkpointing:  # The stock part took it out of the configuration; ours asks for it again.
                    config.gradient_checkpointing = True
                options = {}
                if hasattr(part, "pooler"):
                    # In Transformers 5.10 some multiple-choice models lack the pooler that they read.
                    pools = part.pooler is not None or type(self).__name__.endswith("ForMultipleChoice")
                    options["add_pooling_layer"] = pools
                setattr(self, name, self.lsg_part_class(config, **options))
        self.post_init()  # type: ignore[attr-defined]


class LSGSeq2SeqModel(LSGWrapper):
    """Mixed into the base model of an encoder-decoder family: its encoder has LSG, its decoder is the stock one."""

    position_tables: ClassVar[tuple[str, ...]] = ("encoder.embed_positions.weight", "decoder.embed_positions.weight")
    global_table: ClassVar[str] = "encoder.global_embeddings.weight"
    global_token_type: ClassVar[bool] = False
    sinusoidal_positions: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        stock = cls.__bases__[-1]
        if issubclass(stock, PreTrainedModel) and not issubclass(stock, LSGSeq2SeqModel):
            cls.forward = with_lsg_encoder(stock.forward)  # type: ignore[attr-defined]

    @classmethod
    def special_positions(cls, config: Any) -> int:
        """As `LSGReader.special_positions`."""
        return cls.lsg_part_class.special_positions(config)

    @classmethod
    def counted_positions(cls, config: Any) -> int:
        """As `LSGReader.counted_positions`."""
        return cls.lsg_part_class.counted_positions(config)


def with_lsg_encoder(stock_forward: Callable[..., Any]) -> Callable[..., Any]:
    """Make the forward of an encoder-decoder model show the decoder the global tokens that its encoder passes on."""
    names = argument_names(stock_forward)

    @wraps(stock_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        mask = kwargs.get("attention_mask")
        if kwargs.get("encoder_outputs") is None:
            others = {name: value for name, value in kwargs.items() if name not in (*names, "return_dict")}
            kwargs["encoder_outputs"] = self.encoder(
                input_ids=kwargs.get("input_ids"),
                attention_mask=mask,
                inputs_embeds=kwargs.get("inputs_embeds"),
                return_dict=True,
                **others,
            )
        if mask is not None:
            passed = kwargs["encoder_outputs"][0].shape[1] - mask.shape[-1]
            kwargs["attention_mask"] = F.pad(mask, (passed, 0), value=1)
        return stock_forward(self, **kwargs)

    return forward


def lsg_class(mixin: type, stock: type, module: str, **attributes: Any) -> type:
    """The class of `mixin` over `stock`, named LSG..., which `module` holds so that it can be pickled."""
    if issubclass(mixin, stock):
        return mixin
    namespace = vars(sys.modules[module])
    name = f"LSG{stock.__name__}"
    known = namespace.get(name)
    # Heads are always made anew: a module that is loaded again has another base class for them.
    if known is None or not issubclass(known, stock) or attributes:
        namespace[name] = type(name, (mixin, stock), {"__module__": module, "__doc__": stock.__doc__, **attributes})
    return namespace[name]


def family_name(lsg_model_class: type) -> str:
    """What the names of a family's stock classes begin with, such as "Bert"."""
    stock = next(base for base in lsg_model_class.__mro__ if base.__module__.startswith("transformers.models."))
    return stock.__name__.removesuffix("Model").removesuffix("Encoder")


def define_heads(base_class: Any) -> None:
    """Define, beside `base_class`, an LSG class for every model with a head in its family's module of Transformers."""
    stock_module = sys.modules[base_class.__bases__[-1].__module__]
    for name, stock in list(vars(stock_module).items()):
        if (
            isinstance(stock, type)
            and issubclass(stock, PreTrainedModel)
            and stock.__module__ == stock_module.__name__
            and name.startswith(family_name(base_class))
            and ("For" in name or "LMHead" in name)
        ):
            attributes = {"config_class": base_class.config_class, "lsg_part_class": base_class}
            lsg_class(LSGWrapper, stock, base_class.__module__, **attributes)
