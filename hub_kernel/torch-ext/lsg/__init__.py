"""LSG attention (arXiv 2210.15497) for models of Transformers: `attn_implementation="OWNER/lsg:lsg_attention"`."""

from typing import Any

import torch

from .lsg_forward import lsg_forward, require_tensor


def lsg_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As `lsg_forward`, with the fields of a dictionary `lsg` in the model's configuration.

    Raises:
        ValueError: as there; and where the mask that Transformers gives to a kernel, which is none where no token is
            padded, does not say that texts stand end to end or that a cache has room ahead.
    """
    positions, keys = kwargs.get("position_ids"), key.shape[2]
    if attention_mask is None and isinstance(positions, torch.Tensor) and positions.dim() == 2:
        require_tensor(
            positions[:, -1].max() >= keys - 1,
            "position_ids: they end before the keys do; LSG takes no texts that stand end to end, and needs an "
            "attention_mask beside a cache with room ahead",
        )
    return lsg_forward({}, module, query, key, value, attention_mask, **kwargs)


# Transformers takes a module for one of attention by this name.
flash_attn_forward = lsg_attention
