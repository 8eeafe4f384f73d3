"""LSG attention as layers for models of one's own: no parameters, from queries, keys and values to outputs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .modeling.lsg_text import key_mask, lsg_arguments, text_attention


class LSGAttention(nn.Module):
    """Local, sparse and global attention (arXiv 2210.15497) of a text to itself, by the fastest kernel that runs.

    Args:
        block_size: tokens in a block; a query sees its block and the two beside it, or, if causal, the one before it.
        compute_global_attention: whether the first token of a text sees all, and all see it.
        is_causal: whether a token sees none behind it.
        attention_dropout_prob: the probability with which a probability is dropped in training.
        sparsity_factor: how many tokens one sparse key stands for.
        sparsity_type: how sparse keys are made, by one of `SPARSITY_TYPES`; "none" or None for no sparse keys.
        mask_first_token: whether no token sees the first one.
        sparse_block_size: sparse keys that a query sees on each side; None for as many as `block_size`.
        fields: others of `register_attention`, such as `num_global_tokens` or `attention_kernel`.

    Raises:
        ValueError: which names the argument, what was got and what is allowed.
    """

    def __init__(
        self,
        block_size: int = 128,
        *,
        compute_global_attention: bool = True,
        is_causal: bool = False,
        attention_dropout_prob: float = 0.1,
        sparsity_factor: int = 2,
        sparsity_type: str | None = "norm",
        mask_first_token: bool = False,
        sparse_block_size: int | None = None,
        **fields: Any,
    ) -> None:
        super().__init__()
        if not isinstance(attention_dropout_prob, int | float) or not 0 <= attention_dropout_prob <= 1:
            raise ValueError(f"attention_dropout_prob: got {attention_dropout_prob!r}; allowed is 0 to 1")
        self.is_causal, self.mask_first_token = is_causal, mask_first_token
        self.attention_dropout_prob = attention_dropout_prob
        own = {
            "num_global_tokens": 1 if compute_global_attention else 0,
            "block_size": block_size,
            "sparse_block_size": block_size if sparse_block_size is None else sparse_block_size,
            "sparsity_factor": 1 if sparsity_type in (None, "none") else sparsity_factor,
            "sparsity_type": sparsity_type,
        }
        self.arguments = lsg_arguments(own | fields)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend, with scores scaled by `1 / sqrt(head_dim)`.

        Args:
            query: shape (batch, heads, tokens, head_dim); if causal, also of the last tokens of the text alone.
            key, value: shape (batch, heads or a part of them, tokens, head_dim).
            attention_mask: shape (batch, 1, 1, tokens), or (batch, tokens): boolean, True where a token may be attended
                to; or additive, 0 there and very negative elsewhere.

        Returns:
            The shape of `query`. What stands at padding means nothing.

        Raises:
            ValueError: where a shape does not fit, or the mask is a bias.
        """
        return text_attention(
            query,
            key,
            value,
            key_mask(attention_mask, key),
            causal=self.is_causal,
            dropout=self.attention_dropout_prob if self.training else 0.0,
            hide_first_token=self.mask_first_token,
            **self.arguments,
        )

    def extra_repr(self) -> str:
        shown = {"is_causal": self.is_causal, "attention_dropout_prob": self.attention_dropout_prob} | self.arguments
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())


class BlockLocalAttention(LSGAttention):
    """`LSGAttention` without sparse keys; the other arguments are the same."""

    def __init__(self, block_size: int = 128, **arguments: Any) -> None:
        super().__init__(block_size, sparsity_type=None, **arguments)


Preprocess = Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]]


class LSGSelfAttention(LSGAttention):
    """`LSGAttention` by the name and with the arguments of the published `attention_layers`.

    Blocks count from behind the first token, where that one is global, and a step with a cache gives what the whole
    text gives. `preprocess`, or the function in its place, is given all that `forward` is given, and returns queries,
    keys, values and mask.
    """

    def __init__(
        self,
        config: Any = None,
        block_size: int = 128,
        sparsity_factor: int = 8,
        sparsity_type: str | None = None,
        compute_global_attention: bool = True,
        is_causal: bool = False,
        attention_dropout_prob: float = 0.1,
        preprocessing_function: Preprocess | None = None,
    ) -> None:
        super().__init__(
            block_size,
            compute_global_attention=compute_global_attention,
            is_causal=is_causal,
            attention_dropout_prob=attention_dropout_prob,
            sparsity_factor=sparsity_factor,
            sparsity_type=sparsity_type,
        )
        self.config = config
        if preprocessing_function is not None:
            self.preprocess = preprocessing_function  # type: ignore[method-assign]

    def preprocess(self, query_layer: Any, key_layer: Any, value_layer: Any, attention_mask: Any, **kwargs: Any) -> Any:
        return query_layer, key_layer, value_layer, attention_mask

    def forward(  # type: ignore[override]
        self, query_layer: Any, key_layer: Any, value_layer: Any, attention_mask: Any = None, **kwargs: Any
    ) -> torch.Tensor:
        """As `LSGAttention.forward`, of what `preprocess` returns."""
        return super().forward(*self.preprocess(query_layer, key_layer, value_layer, attention_mask, **kwargs))


class BlockLocalSelfAttention(LSGSelfAttention):
    """`LSGSelfAttention` without sparse keys, with the published arguments."""

    def __init__(
        self,
        config: Any = None,
        block_size: int = 128,
        compute_global_attention: bool = True,
        is_causal: bool = False,
        attention_dropout_prob: float = 0.1,
        preprocessing_function: Preprocess | None = None,
    ) -> None:
        super().__init__(
            config,
            block_size,
            sparsity_type=None,
            compute_global_attention=compute_global_attention,
            is_causal=is_causal,
            attention_dropout_prob=attention_dropout_prob,
            preprocessing_function=preprocessing_function,
        )
