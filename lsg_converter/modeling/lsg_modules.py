"""What replaces a stock module: embeddings, positions, self-attention, encoder stack."""

from typing import Any, ClassVar

import torch
from torch import nn

from .lsg_attention import lsg_attention
from .lsg_config import MAX_GLOBAL_TOKENS
from .lsg_packing import pack_rows, unpack_rows


class LSGEmbeddings:
    """Mixed into a family's embeddings: global tokens stand in front of the text.

    LayerNorm and dropout work token by token, so the stock forward serves the text, and the global tokens join after.
    """

    config: Any
    LayerNorm: nn.LayerNorm
    dropout: nn.Dropout

    def add_global_embeddings(self, config: Any) -> None:
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
    """Mixed into the position embeddings of an encoder. Global tokens have no positions, so the encoder adds those of
    the text before it puts the global tokens in front; when the stock forward asks again, it gets a zero."""

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
        seqlens: list[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """`hidden_states` is (batch, g + t, width), `attention_mask` boolean (batch, 1, 1, g + t); with `seqlens`
        they hold the rows of a batch end to end, (1, tokens, width) and (1, 1, 1, tokens)."""
        heads = *hidden_states.shape[:2], self.config.num_attention_heads, -1
        query, key, value = (
            getattr(self, name)(hidden_states).view(*heads).transpose(1, 2) for name in self.projections
        )
        dropout = getattr(self, self.dropout_name)
        output, probabilities = lsg_attention(
            query,
            key,
            value,
            attention_mask[:, 0, 0],
            **self.config.attention_arguments,
            dropout=getattr(dropout, "p", dropout) if self.training else 0.0,
            seqlens=seqlens,
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


def strip_global_tokens(states: torch.Tensor, config: Any) -> torch.Tensor:
    """The final states at the positions of the text: (batch, g + t, width) to (batch, t, width)."""
    g = config.num_global_tokens
    text = states[:, g:]
    if config.pool_with_global and g > 0:
        # Joined slices would bring conditions on their lengths into an exported graph.
        first = torch.arange(text.shape[1], device=text.device) == 0
        return torch.where(first[:, None], states[:, :1], text)
    return text


def passes_global_tokens(config: Any) -> bool:
    """Whether an encoder gives a decoder its global tokens too."""
    return getattr(config, "pass_global_tokens_to_decoder", False)


class LSGEncoder:
    """Mixed into a family's stack of layers. The layers see rows end to end, where the kernel takes them; what leaves
    the stack, for poolers and heads, has the positions of the text."""

    config: Any

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        *args: Any,
        seqlens: list[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        length = hidden_states.shape[1]
        if seqlens is not None:
            hidden_states, attention_mask = pack_rows(hidden_states, attention_mask, seqlens)
            kwargs["seqlens"] = seqlens
        outputs = super().forward(hidden_states, attention_mask, *args, **kwargs)  # type: ignore[misc]
        states = unpack_rows(outputs.last_hidden_state, seqlens, length)
        outputs["last_hidden_state"] = strip_global_tokens(states, self.config)
        return outputs
