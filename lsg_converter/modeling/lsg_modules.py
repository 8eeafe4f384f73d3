"""What replaces a stock module: embeddings, positions, self-attention, encoder stack."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from .lsg_attention import lsg_attention
from .lsg_bias import Bias
from .lsg_config import MAX_GLOBAL_TOKENS
from .lsg_generation import Past, cached_attention, given_cache
from .lsg_packing import Packing, Promotion


class LSGEmbeddings:
    """Mixed into a family's embeddings: global tokens stand in front of the text.

    LayerNorm and dropout work token by token, so the stock forward serves the text, and the global tokens join after.
    """

    config: Any
    word_embeddings: nn.Embedding
    dropout: nn.Dropout

    def add_global_embeddings(self, config: Any) -> None:
        self.global_embeddings = nn.Embedding(MAX_GLOBAL_TOKENS, self.word_embeddings.weight.shape[1])

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        text = super().forward(*args, **kwargs)  # type: ignore[misc]
        tokens = global_tokens(self, text)
        for name in ("embed_proj", "LayerNorm"):
            module = getattr(self, name, None)
            tokens = tokens if module is None else module(tokens)
        return torch.cat([self.dropout(tokens), text], dim=1)


def global_tokens(module: Any, text: torch.Tensor) -> torch.Tensor:
    """The embeddings of the global tokens for a batch, shape (batch, g, width), before LayerNorm and dropout."""
    index = torch.arange(module.config.num_global_tokens, device=text.device)
    return module.global_embeddings(index).expand(text.shape[0], -1, -1)


class LSGPositions:
    """Mixed into the position embeddings of an encoder. Global tokens have no positions, so the encoder adds those of
    the text before it puts the global tokens in front; when the stock forward asks again, it gets a zero."""

    weight: torch.Tensor

    def forward(
        self,
        *args: Any,
        text: torch.Tensor | None = None,
        ids: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The positions of a text, (t, width), by its embeddings, (batch, t, width), and its ids, where it was given by
        these; or, where the rows of the table are given, (batch, t), those rows; without a text, a zero."""
        if text is None:
            return self.weight.new_zeros(())
        if rows is not None:
            return F.embedding(rows, self.weight)
        first = getattr(self, "offset", 0)
        return self.weight[first : first + text.shape[1]]


class LSGComputedPositions:
    """The same of positions that are computed from the ids, for texts of any length: (batch, t, width)."""

    weights: torch.Tensor

    def forward(
        self, *args: Any, text: torch.Tensor | None = None, ids: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        return self.weights.new_zeros(()) if text is None else super().forward(ids, text)  # type: ignore[misc]


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
        promotion: Promotion | None = None,
        position_bias: Bias | None = None,
        prefix_mask: torch.Tensor | None = None,
        past: Past | None = None,
        **kwargs: Any,
    ) -> Any:
        """`hidden_states` is (batch, g + t, width), `attention_mask` boolean (batch, 1, 1, g + t); with `seqlens`
        they hold the rows of a batch end to end, (1, tokens, width) and (1, 1, 1, tokens).
        `position_bias` is a bias by distance, as `lsg_bias` says.
        `prefix_mask`, boolean of shape (batch, p), says which tokens of a cache may be attended to; `past` stands in
        its place in a decoder."""
        query, key, value = self.project(hidden_states)
        query, key = self.place(query, key, **kwargs)
        arguments, mask = self.config.attention_arguments, attention_mask[:, 0, 0]
        if promotion is not None:
            query, key, value = (promotion.insert(x) for x in (query, key, value))
            mask, seqlens = promotion.mask, promotion.seqlens
            arguments["num_global_tokens"] += promotion.copies
        dropout = getattr(self, self.dropout_name)
        arguments["bias"] = position_bias
        arguments["dropout"] = (dropout.p if isinstance(dropout, nn.Module) else dropout) if self.training else 0.0
        prefix, cache = 0, given_cache(kwargs)
        if cache is None and (prefix_mask is not None or (past is not None and past.is_step)):
            raise ValueError("past_key_values: gradient checkpointing takes the cache away; train without it")
        if past is not None and cache is not None:
            result = cached_attention(query, key, value, cache, self.layer_idx, past, arguments)  # type: ignore[attr-defined]
            if result is not None:
                output, probabilities = result
                return self.finish(output.transpose(1, 2).flatten(2), hidden_states), probabilities
        if prefix_mask is not None:
            # All see the tokens of a cache: they are global ones, but for their own outputs, which nobody asks for.
            key, value = cache.update(key, value, self.layer_idx)  # type: ignore[attr-defined]
            prefix = prefix_mask.shape[1]
            query, mask = F.pad(query, (0, 0, prefix, 0)), torch.cat([prefix_mask, mask], dim=1)
            arguments["num_global_tokens"] += prefix
        output, probabilities = lsg_attention(query, key, value, mask, **arguments, seqlens=seqlens)
        output = output[:, :, prefix:]
        if probabilities is not None:
            probabilities = probabilities[0], probabilities[1][:, :, prefix:]
        if promotion is not None:
            output = promotion.remove(output)
        return self.finish(output.transpose(1, 2).flatten(2), hidden_states), probabilities

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values: (batch, heads, g + t, head_dim) each."""
        heads = *hidden_states.shape[:2], self.config.num_attention_heads, -1
        return tuple(getattr(self, name)(hidden_states).view(*heads).transpose(1, 2) for name in self.projections)

    def place(self, query: torch.Tensor, key: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """What a family makes of queries and keys, (batch, heads, g + t, head_dim), by the places of their tokens."""
        return query, key

    def finish(self, output: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """What a family's attention module does with its heads' outputs and its input, (batch, g + t, width) each."""
        return output


class LSGRotaryAttention(LSGSelfAttention):
    """Mixed into a self-attention that may have rotary positions.

    `rotate` is the family's function of queries, keys, cosines and sines, of which `position_embeddings` are the last
    two, (batch, g + t, head_dim) each, or None.
    """

    rotate: ClassVar[Callable[..., tuple[torch.Tensor, torch.Tensor]]]

    def place(
        self, query: torch.Tensor, key: torch.Tensor, position_embeddings: Any = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return (query, key) if position_embeddings is None else self.rotate(query, key, *position_embeddings)


class LSGSeq2SeqAttention(LSGSelfAttention):
    """Mixed into the self-attention of a BART-like encoder."""

    projections: ClassVar[tuple[str, str, str]] = ("q_proj", "k_proj", "v_proj")

    def finish(self, output: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.out_proj(output)  # type: ignore[attr-defined]


def strip_global_tokens(
    states: torch.Tensor,
    config: Any,
    first_token: torch.Tensor | None = None,
    past_length: int | torch.Tensor = 0,
) -> torch.Tensor:
    """The final states at the positions of the text: (batch, g + t, width) to (batch, t, width).

    With `pool_with_global` the state of the first token of the text, whose places are `first_token` where they are not
    0, is that of the first global token. So is that at place 0, which heads read, also where there is padding. The
    places count from `past_length`.
    """
    g = config.num_global_tokens
    text = states[:, g:]
    if not config.pool_with_global or g == 0:
        return text
    # Joined slices would bring conditions on their lengths into an exported graph.
    places = past_length + torch.arange(text.shape[1], device=text.device)
    first = places == 0
    if first_token is not None:
        first = first | (places == first_token[:, None])
    return torch.where(first[..., None], states[:, :1], text)


class LSGFinalNorm(nn.LayerNorm):
    """A LayerNorm behind the stack of layers, where what pads a batch is zeros: in half precision the deviation of such
    a row would be infinite, and so would the gradient of the weight."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(states.dtype, torch.float32)
        scale, shift = self.weight.to(dtype), self.bias.to(dtype)
        return F.layer_norm(states.to(dtype), self.normalized_shape, scale, shift, self.eps).to(states.dtype)


class LSGLayer:
    """Mixed into a layer of a family whose stock one hands its attention no arguments that it does not know."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        attended, probabilities = self.attention(hidden_states, *args, **kwargs)  # type: ignore[attr-defined]
        return self.output(self.intermediate(attended), attended), probabilities  # type: ignore[attr-defined]


class LSGEncoder:
    """Mixed into a family's stack of layers. The layers see a packed batch; what leaves the stack, for poolers and
    heads, has the positions of the text.

    `token_arguments` names arguments of the stack's forward that are by row, or by token: (batch,) or (batch, t). A
    global token has what the first token of its row has.
    """

    config: Any
    token_arguments: ClassVar[tuple[str, ...]] = ()

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor, packing: Packing | None = None, **kwargs: Any
    ) -> Any:
        g, length = self.config.num_global_tokens, hidden_states.shape[1]
        for name in self.token_arguments:
            rows, tokens, given = hidden_states.shape[0], length - g, kwargs[name]
            if given.numel() not in (rows, rows * tokens):
                raise ValueError(f"{name}: got shape {tuple(given.shape)}; it must be {(rows,)} or {(rows, tokens)}")
            text = given.view(rows, -1).expand(-1, tokens)
            kwargs[name] = torch.cat([text[:, :1].expand(-1, g), text], dim=1)
        if attention_mask.dtype != torch.bool:  # Some stock models extend even a mask that has four dimensions.
            attention_mask = (attention_mask == 0)[:, 0, 0]
        if packing is None:
            past = kwargs.get("past")
            told = () if past is None else (past.first_token, past.length)
            outputs = super().forward(hidden_states, attention_mask=attention_mask, **kwargs)  # type: ignore[misc]
            return self.replace_last(outputs, strip_global_tokens(outputs.last_hidden_state, self.config, *told))
        kwargs |= {name: packing.pack(kwargs[name]) for name in self.token_arguments}
        if kwargs.get("position_embeddings") is not None:  # of rotary positions
            kwargs["position_embeddings"] = tuple(map(packing.pack, kwargs["position_embeddings"]))
        states, kwargs["seqlens"] = packing.pack(hidden_states), packing.seqlens
        outputs = super().forward(states, attention_mask=packing.mask, **kwargs)  # type: ignore[misc]
        states = packing.unpack(outputs.last_hidden_state)
        return self.replace_last(outputs, strip_global_tokens(states, self.config, packing.first_token))

    @staticmethod
    def replace_last(outputs: Any, states: torch.Tensor) -> Any:
        """Put the final states in, which the stack may have captured too."""
        outputs["last_hidden_state"] = states
        if outputs.get("hidden_states"):
            outputs["hidden_states"] = (*outputs["hidden_states"][:-1], states)
        return outputs


class LSGNamedEncoder(LSGEncoder):
    """The same where the stock forward returns a tuple, if the configuration asks for one."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs, return_dict=True)
