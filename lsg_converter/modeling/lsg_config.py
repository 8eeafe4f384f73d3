"""The fields that LSG adds to a family's configuration, and their rules."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from transformers import PreTrainedConfig
from transformers.configuration_utils import strict
from transformers.utils import logging

from .lsg_attention import KERNELS
from .lsg_layout import LSGLayout, require as require_field
from .lsg_sparsity import SPARSITY_FIELDS, check_sparsity


logger = logging.get_logger(__name__)

MAX_GLOBAL_TOKENS = 512
# Stands in `config.json` as the implementation of attention. A stock class has no such one, and refuses it in a message
# that quotes it: so nobody who forgets the flag gets a stock model on these weights.
NEEDS_ITS_CODE = "LSG: load it with trust_remote_code=True (what follows gives another, untrained model)"
# Fields that are younger than this entry: a checkpoint that lacks one may have been written before there was one.
LATER_FIELDS = ("full_attention_length", "position_step")


class RefusedByPart(dict[str, str]):
    """`NEEDS_ITS_CODE` for a model by its parts, of which "" is the model itself, as Transformers takes it too.

    `EncoderDecoderConfig` and its like make stock configurations of dictionaries, and then choose an implementation of
    their own: so a stock configuration refuses it already.
    """

    def get(self, key: str, default: Any = None) -> Any:
        if key == "":
            raise ValueError(
                "attn_implementation: got the fields of an LSG model for a stock one; for two checkpoints in one model "
                "take LSGEncoderDecoderModel of lsg_converter; for a stock model put attn_implementation='sdpa' in its "
                "place"
            )
        return super().get(key, default)


def needs_its_code(content: Mapping[str, Any]) -> bool:
    """Whether the content of a configuration is that of an LSG model."""
    return content.get("attn_implementation") in (NEEDS_ITS_CODE, {"": NEEDS_ITS_CODE})


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
        full_attention_length: up to how many tokens a text gets ordinary full attention; None means two blocks, which
            is also the least.
        position_step: how many rows of the position table there are for each trained one, where a conversion stretched
            it. A short text reads every `position_step`-th row, a longer one as large a step as its length leaves room
            for; 1 means that every text reads every row.
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
    full_attention_length: int | None = None
    position_step: int = 1
    lsh_num_pre_rounds: int = 1
    lsh_seed: int = 0
    adaptive: bool = True
    attention_kernel: str | None = None

    # Whether `is_decoder` asks for the causal form: in families with a model that is a decoder alone.
    has_causal_form: ClassVar[bool] = False
    # Whether the family computes its positions, by the place of a token, and has trained none.
    sinusoidal_positions: ClassVar[bool] = False
    # Whether a token has a position of its own: not where there are distances between tokens alone, for any length.
    absolute_positions: ClassVar[bool] = True
    # What `position_embedding_type` may be.
    position_types: ClassVar[tuple[str, ...]] = ("absolute",)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # A subclass of a strict configuration is strict only if it is made so again.
        super().__init_subclass__(**kwargs)
        cls.has_causal_form = vars(cls).get("has_causal_form", hasattr(cls, "add_cross_attention"))
        if issubclass(cls, PreTrainedConfig):
            strict(cls)

    def __post_init__(self, **kwargs: Any) -> None:
        if needs_its_code(kwargs):
            del kwargs["attn_implementation"]
        super().__post_init__(**kwargs)  # type: ignore[misc]

    @property
    def _attn_implementation(self) -> Any:
        # Where none was chosen, what stock classes refuse: one may be made of this object too.
        chosen = self._attn_implementation_internal
        return NEEDS_ITS_CODE if chosen is None and not self._output_attentions else chosen  # type: ignore[attr-defined]

    @_attn_implementation.setter
    def _attn_implementation(self, value: Any) -> None:
        self._attn_implementation_internal = value.get("") if isinstance(value, dict) else value

    @property
    def output_attentions(self) -> bool:
        """As in Transformers: where no implementation was chosen, setting it chooses "eager"."""
        return self._output_attentions  # type: ignore[attr-defined]

    @output_attentions.setter
    def output_attentions(self, value: bool) -> None:
        if value and self._attn_implementation_internal is None:
            self._attn_implementation = "eager"
        PreTrainedConfig.output_attentions.fset(self, value)  # type: ignore[attr-defined]

    def to_dict(self) -> dict[str, Any]:
        """As in Transformers; with what makes stock configurations refuse it."""
        return {**super().to_dict(), "attn_implementation": RefusedByPart({"": NEEDS_ITS_CODE})}  # type: ignore[misc]

    def to_diff_dict(self) -> dict[str, Any]:
        """As in Transformers; with what makes stock models refuse the checkpoint, while tokenizers load."""
        return {**super().to_diff_dict(), "attn_implementation": NEEDS_ITS_CODE}  # type: ignore[misc]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in Transformers; the overrides in `kwargs` are validated too.

        Raises:
            ValueError: where a checkpoint's content lacks a field that every conversion writes.
        """
        if needs_its_code(config_dict):
            cls.check_complete({**config_dict, **kwargs})
        result = super().from_dict(config_dict, **kwargs)  # type: ignore[misc]
        (result[0] if isinstance(result, tuple) else result).validate()
        return result

    @classmethod
    def settle(cls, config: Any) -> dict[str, Any]:
        """What a stock configuration leaves to the number of its positions, which a conversion changes."""
        return {}

    @classmethod
    def check_complete(cls, content: Mapping[str, Any]) -> None:
        """Raise ValueError where the content of a checkpoint lacks a field, whose default would give another model."""
        mixin = LSGSeq2SeqConfig if issubclass(cls, LSGSeq2SeqConfig) else LSGConfig
        names = [item.name for item in fields(mixin)]
        names += ["max_position_embeddings"] if cls.absolute_positions else []
        for name in [name for name in names if name not in content]:
            if name not in LATER_FIELDS:
                raise ValueError(
                    f"{name}: config.json lacks it; put back what the conversion wrote, or give {name} when you load it"
                )
            default = getattr(cls, name)
            logger.warning_once(f"{name}: config.json lacks it; taken is {default!r}, as in older checkpoints")

    def validate_lsg(self) -> None:
        """Check what the fields must be together.

        Raises:
            ValueError: which names the field, what was got and what is allowed.
        """
        block, factor, kind = self.block_size, self.sparsity_factor, self.sparsity_type
        positions = getattr(self, "position_embedding_type", None)

        def require(field: str, holds: bool, allowed: str) -> None:
            require_field(field, getattr(self, field, None), holds, allowed)

        require("num_global_tokens", 0 <= self.num_global_tokens <= MAX_GLOBAL_TOKENS, f"0 to {MAX_GLOBAL_TOKENS}")
        check_sparsity(**{name: getattr(self, name) for name in SPARSITY_FIELDS})
        full, kernel = self.full_attention_length, self.attention_kernel
        require("full_attention_length", full is None or full >= 0, "a number of tokens, or none for two blocks")
        require("attention_kernel", kernel in (None, *KERNELS), f"one of {', '.join(KERNELS)}, or none")
        require("position_step", self.position_step >= 1, "at least 1")
        untabled = positions == "rotary" or not getattr(self, "position_biased_input", True)
        computed = (self.sinusoidal_positions or untabled) and self.position_step > 1
        require("position_step", not computed, f"1: {self.model_type} computes its positions")  # type: ignore[attr-defined]
        without = not self.absolute_positions and self.position_step > 1
        require("position_step", not without, f"1: {self.model_type} has relative positions")  # type: ignore[attr-defined]
        require("lsh_num_pre_rounds", self.lsh_num_pre_rounds >= 0, "at least 0")
        require(
            "mask_first_token", not self.mask_first_token or self.pool_with_global, "True only with pool_with_global"
        )
        if getattr(self, "is_decoder", False) and not isinstance(self, LSGSeq2SeqConfig):
            require("is_decoder", self.has_causal_form, f"False: {self.model_type} has no causal form")  # type: ignore[attr-defined]
            require(
                "full_attention_length",
                (full or 0) <= 2 * block,
                f"none, or two blocks, {2 * block}, in the causal form: what a token sees must not depend on those "
                "behind it",
            )
            require(
                "position_step",
                self.position_step == 1,
                "1 in the causal form: where a token stands must not depend on those behind it",
            )
        allowed = " or ".join(map(repr, self.position_types))
        allowed += ": LSG has no relative positions"
        require("position_embedding_type", positions in (None, *self.position_types), allowed)
        heads = getattr(self, "num_attention_heads", factor)
        if kind in ("stride", "block_stride") and factor > heads:
            logger.warning_once(f"sparsity_factor={factor} with {kind!r} and {heads} heads: no head keeps some tokens")

    @property
    def layout(self) -> LSGLayout:
        """The sizes of the attention, and which keys a query sees by them."""
        return LSGLayout.from_fields(
            self.num_global_tokens,
            self.block_size,
            self.sparse_block_size,
            self.sparsity_factor,
            self.sparsity_type,
            self.full_attention_length,
            self.causal,
        )

    @property
    def causal(self) -> bool:
        """Whether the attention has its causal form."""
        return self.has_causal_form and self.is_decoder  # type: ignore[attr-defined]

    @property
    def attention_arguments(self) -> dict[str, Any]:
        """The fields that `lsg_attention` takes."""
        names = (
            "num_global_tokens",
            "block_size",
            "sparse_block_size",
            "sparsity_factor",
            "sparsity_type",
            "full_attention_length",
            "lsh_num_pre_rounds",
            "lsh_seed",
        )
        return {name: getattr(self, name) for name in names} | {"kernel": self.kernel, "causal": self.causal}

    @property
    def kernel(self) -> str:
        """The kernel as `lsg_attention` takes it."""
        kernel = self._attn_implementation
        return kernel if kernel == "eager" or self.attention_kernel is None else self.attention_kernel


@dataclass(kw_only=True, init=False, repr=False, eq=False)
class LSGSeq2SeqConfig(LSGConfig):
    """The fields for encoder-decoder models, whose encoder has LSG.

    Args:
        pass_global_tokens_to_decoder: whether the decoder sees the global tokens' final states too; then nothing is
            pooled with them.
    """

    pass_global_tokens_to_decoder: bool = True
