"""What the families share: the configuration, the global tokens in front of the text, masks, and the way back.

A family's classes are its stock classes of Transformers with one of these mixed in. Nothing is registered in
Transformers: LSG lives in the modules of a model, and `config._attn_implementation` picks its kernel.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from inspect import signature
from typing import Any, ClassVar

import torch
from torch import nn
from transformers.configuration_utils import strict
from transformers.utils import logging

from .lsg_attention import KERNELS, lsg_attention
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

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # A subclass of a strict configuration is strict only if it is made so again.
        super().__init_subclass__(**kwargs)
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
        require("lsh_num_pre_rounds", self.lsh_num_pre_rounds >= 0, "at least 0")
        require(
            "mask_first_token", not self.mask_first_token or self.pool_with_global, "True only with pool_with_global"
        )
        require("is_decoder", not getattr(self, "is_decoder", False), "False: LSG has no causal form yet")
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
        return {name: getattr(self, name) for name in names}


class LSGEmbeddings:
    """Mixed into a family's embeddings: global tokens stand in front of the text.

    LayerNorm and dropout work token by token, so the stock forward serves the text, and the globals join after it.
    """

    config: Any
    LayerNorm: nn.LayerNorm
    dropout: nn.Dropout

    def adopt(self, config: Any) -> None:
        self.config = config
        self.global_embeddings = nn.Embedding(MAX_GLOBAL_TOKENS, self.LayerNorm.weight.shape[0])

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        text = super().forward(*args, **kwargs)  # type: ignore[misc]
        index = torch.arange(self.config.num_global_tokens, device=text.device)
        tokens = self.LayerNorm(self.global_embeddings(index).expand(text.shape[0], -1, -1))
        return torch.cat([self.dropout(tokens), text], dim=1)


class LSGSelfAttention:
    """Mixed into a BERT-like self-attention: its projections, then `lsg_attention`."""

    config: Any
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    attention_head_size: int
    dropout: nn.Dropout
    training: bool

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """`hidden_states` is (batch, g + t, width), `attention_mask` boolean (batch, 1, 1, g + t)."""
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.attention_head_size)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        output, probabilities = lsg_attention(
            query,
            key,
            value,
            attention_mask[:, 0, 0],
            **self.config.attention_arguments,
            dropout=self.dropout.p if self.training else 0.0,
            kernel=self.config._attn_implementation,
        )
        return output.transpose(1, 2).flatten(2), probabilities


class LSGEncoder:
    """Mixed into a family's encoder: what leaves it has the positions of the text."""

    config: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)  # type: ignore[misc]
        states, g = outputs.last_hidden_state, self.config.num_global_tokens
        if self.config.pool_with_global and g > 0:
            outputs["last_hidden_state"] = torch.cat([states[:, :1], states[:, g + 1 :]], dim=1)
        else:
            outputs["last_hidden_state"] = states[:, g:]
        return outputs


def with_global_tokens(stock_forward: Callable[..., Any]) -> Callable[..., Any]:
    """Make a base model's forward serve global tokens: mask them in, and cut them off what was captured on the way.

    The result has the stock signature. It returns hidden states of `t` positions. With "eager", `attentions` holds what
    the text attends to: (batch, heads, t, t) for a text of at most two blocks, else (batch, heads, t, keys), with the
    keys in the order that `lsg_attention` states; `global_attentions` holds (batch, heads, g, g + t).
    """
    names = list(signature(stock_forward).parameters)[1:]

    @wraps(stock_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        return_dict = kwargs.pop("return_dict", None)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        tokens = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        if tokens is not None:
            self.check_input(tokens, kwargs)
            kwargs["attention_mask"] = self.extend_mask(kwargs.get("attention_mask"), tokens)
        outputs = stock_forward(self, **kwargs, return_dict=True)

        g = self.config.num_global_tokens
        if outputs.get("hidden_states"):
            *inner, last = outputs["hidden_states"]
            inner = [None if states is None else states[:, g:] for states in inner]
            outputs["hidden_states"] = (*inner, last)
        if outputs.get("attentions"):
            text, to_all = zip(*outputs["attentions"], strict=True)
            full = text[0].shape[-1] == to_all[0].shape[-1]
            outputs["attentions"] = tuple(probabilities[..., g:] for probabilities in text) if full else text
            outputs["global_attentions"] = to_all
        return outputs if return_dict else outputs.to_tuple()

    return forward


class LSGModel:
    """Mixed into a family's base model.

    `lsg_modules` says which stock modules become which; `position_offset` how many rows of a position table come before
    that of the first token; `global_token_type` whether the globals carry token type 0.
    """

    config_class: Any
    lsg_modules: ClassVar[Mapping[type[nn.Module], type[nn.Module]]]
    position_tables: ClassVar[tuple[str, ...]] = ("embeddings.position_embeddings.weight",)
    global_table: ClassVar[str] = "embeddings.global_embeddings.weight"
    position_offset: ClassVar[int] = 0
    global_token_type: ClassVar[bool] = False
    _supports_sdpa = True
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = False

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        # In place: the modules keep their weights, and what the stock constructor set on them.
        for module in list(self.modules()):  # type: ignore[attr-defined]
            lsg_class = self.lsg_modules.get(type(module))
            if lsg_class is not None:
                module.__class__ = lsg_class
                if issubclass(lsg_class, LSGEmbeddings):
                    module.adopt(config)
        self.post_init()  # type: ignore[attr-defined]

    def check_input(self, tokens: torch.Tensor, arguments: Mapping[str, Any]) -> None:
        """Raise ValueError where a text does not fit this checkpoint, or the kernel cannot give what is asked for."""
        config, length = self.config, tokens.shape[1]  # type: ignore[attr-defined]
        limit = config.max_position_embeddings - self.position_offset
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
            raise ValueError(
                f"output_attentions: the {config._attn_implementation!r} kernel holds no probabilities; "
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


class LSGHead:
    """Mixed into a family's model with a head: its base model is `lsg_model_class`."""

    lsg_model_class: ClassVar[Any]
    _supports_sdpa = True
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        if hasattr(cls, "lsg_model_class"):
            cls.config_class = cls.lsg_model_class.config_class  # type: ignore[attr-defined]
        super().__init_subclass__(**kwargs)

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        checkpointing = getattr(config, "gradient_checkpointing", False)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        if checkpointing:  # The stock base model took it out of the configuration; ours asks for it again.
            config.gradient_checkpointing = True
        stock = getattr(self, self.base_model_prefix)  # type: ignore[attr-defined]
        options = {"add_pooling_layer": stock.pooler is not None} if hasattr(stock, "pooler") else {}
        setattr(self, self.base_model_prefix, self.lsg_model_class(config, **options))  # type: ignore[attr-defined]
        self.post_init()  # type: ignore[attr-defined]
