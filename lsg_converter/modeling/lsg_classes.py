"""How LSG classes are made from stock ones.

An LSG class is a stock class with a mixin in front. All of a family's are made when its module is imported, and they
stand in it: what one process pickles, another can read.
"""

import sys
from collections.abc import Callable, Mapping
from functools import partial, wraps
from inspect import signature
from types import MappingProxyType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate
from transformers.utils.versions import require_version


# Here, since every family imports this file before the others of ours.
require_version("transformers>=5.10,<6")


class LSGPreTrained:
    """What all LSG models have in common, beside what their families share.

    Transformers asks a model class about its attention: LSG has its own "eager" and "sdpa", and no others.
    """

    config_class: Any
    _no_split_modules: Any
    is_part: bool = False  # of a model that keeps it an LSG model when it is loaded again
    _supports_sdpa = True
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = False

    def __setattr__(self, name: str, value: Any) -> None:
        # `EncoderDecoderModel` gives its parts stock configurations, or theirs again when they are made, and what it
        # saves would come back as stock models.
        if name == "config" and not self.is_part:
            again = "all_tied_weights_keys" in vars(self) and value is vars(self)["config"]
            if again or not isinstance(value, self.config_class):
                raise ValueError(
                    f"config: got a {type(value).__name__}{' a second time' if again else ''}; {type(self).__name__} "
                    f"needs its {self.config_class.__name__}: load that with trust_remote_code=True; for a part of an "
                    "EncoderDecoderModel, which replaces it, take LSGEncoderDecoderModel of lsg_converter"
                )
        super().__setattr__(name, value)

    def get_correct_attn_implementation(self, requested_attention: str | None, *args: Any, **kwargs: Any) -> str:
        """As in Transformers; what stock classes refuse is no choice."""
        if self.config._attn_implementation_internal is None:  # type: ignore[attr-defined]
            requested_attention = None
        return super().get_correct_attn_implementation(requested_attention, *args, **kwargs)  # type: ignore[misc]


class LSGWrapper(LSGPreTrained):
    """Mixed into a model around one that has LSG: `lsg_part_class` takes the place of the stock class it extends, but
    for that of a decoder."""

    lsg_part_class: ClassVar[Any]
    _keys_to_ignore_on_save: Any = None  # Marian names its computed positions; written, they are not computed again.

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        checkpointing = getattr(config, "gradient_checkpointing", False)
        chosen = config._attn_implementation_internal
        if lacks_sdpa := not stock_class(self.lsg_part_class)._supports_sdpa:  # so that the stock part can be made
            config._attn_implementation = "eager"
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        if lacks_sdpa:
            config._attn_implementation = chosen
        for name, part in list(self.named_children()):  # type: ignore[attr-defined]
            if type(part) is stock_class(self.lsg_part_class) and not getattr(part, "is_decoder", False):
                if checkpointing:  # The stock part took it out of the configuration; ours asks for it again.
                    config.gradient_checkpointing = True
                options = {}
                if "add_pooling_layer" in signature(type(part)).parameters:
                    # In Transformers 5.10 some multiple-choice models lack the pooler that they read.
                    pools = part.pooler is not None or type(self).__name__.endswith("ForMultipleChoice")
                    options["add_pooling_layer"] = pools
                setattr(self, name, self.lsg_part_class(config, **options))
        del self._no_split_modules  # It names modules of the stock part; those of ours are gathered in its place.
        self.post_init()  # type: ignore[attr-defined]

    def create_masks_for_generate(
        self, config: Any, attention_mask: torch.Tensor | None, past_key_values: Any, **kwargs: Any
    ) -> Any:
        """As in Transformers; a decoder that has LSG takes a mask (batch, tokens), as long as a static cache."""
        if not getattr(config, "causal", False):
            arguments = {"attention_mask": attention_mask, "past_key_values": past_key_values, **kwargs}
            return create_masks_for_generate(config=config, **arguments)
        if attention_mask is None:
            return None
        room = past_key_values.layers[0].max_cache_len - attention_mask.shape[1]
        return F.pad(attention_mask, (0, max(room, 0)), value=1)

    def _prepare_static_cache(self, *args: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        """As in Transformers, with room for the global tokens that an encoder passes on: it counts its first output."""
        encoded = model_kwargs.get("encoder_outputs")
        if isinstance(encoded, dict) and encoded.get("global_hidden_state") is not None:
            passed = encoded["global_hidden_state"].shape[1]
            model_kwargs = {
                **model_kwargs,
                "encoder_outputs": (F.pad(encoded["last_hidden_state"], (0, 0, passed, 0)),),
            }
        return super()._prepare_static_cache(*args, model_kwargs=model_kwargs, **kwargs)  # type: ignore[misc]


def stock_class(lsg_class: Any) -> Any:
    """The class of Transformers that an LSG class extends."""
    return lsg_class.__bases__[-1]


def stock_module(lsg_class: Any) -> Any:
    """The module of Transformers that holds the family of an LSG class."""
    return sys.modules[stock_class(lsg_class).__module__]


def family_name(lsg_class: Any) -> str:
    """What the names of a family's stock classes begin with, such as "Bert", by its LSG base model or encoder."""
    name = stock_class(lsg_class).__name__
    return name.removesuffix("Model").removesuffix("Encoder").removesuffix("Stack")


def define_class(name: str, mixin: type, stock: type, module: str, **attributes: Any) -> type:
    """Define the class `name` in `module`: `mixin` over `stock`. A module that is loaded again gets new ones."""
    attributes = {"__module__": module, "__doc__": stock.__doc__, **attributes}
    defined = type(name, (mixin, stock), attributes)
    setattr(sys.modules[module], name, defined)
    return defined


def define_modules(reader: Any) -> dict[type, type]:
    """Define, beside `reader`, a class for each stock module that `reader.lsg_modules` names.

    Returns:
        Stock classes, and the LSG class of each.
    """
    family, result = family_name(reader), {}
    for stock in vars(stock_module(reader)).values():
        if isinstance(stock, type) and issubclass(stock, nn.Module):
            role = stock.__name__.removeprefix(family)
            mixin = reader.lsg_modules.get(role)
            if mixin is not None:
                made = issubclass(mixin, stock)  # by the family itself
                result[stock] = mixin if made else define_class(f"LSG{family}{role}", mixin, stock, reader.__module__)
    return result


class HandingOn:
    """A module as its stock forward sees it, whose parts of some classes get some arguments more."""

    forward = None  # Stock layers compare that of their class with their own.

    def __init__(self, module: Any, parts: Any, arguments: dict[str, Any]) -> None:
        self._module, self._parts, self._arguments = module, parts, arguments

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        return [self._hand(part) for part in value] if isinstance(value, nn.ModuleList) else self._hand(value)

    def _hand(self, value: Any) -> Any:
        return partial(value, **self._arguments) if isinstance(value, self._parts) else value


def handing_on(stock_forward: Callable[..., Any]) -> Callable[..., Any]:
    """Make the forward of a model hand its part that has LSG the arguments that it does not name, as most do."""
    names = {*signature(stock_forward).parameters, "return_dict"} - {"kwargs"}

    @wraps(stock_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        others = {name: kwargs.pop(name) for name in kwargs.keys() - names}
        return stock_forward(HandingOn(self, self.lsg_part_class, others) if others else self, *args, **kwargs)

    return forward


def define_heads(
    base_class: Any, hand_on: bool = False, others: Mapping[str, tuple[type, str]] = MappingProxyType({})
) -> None:
    """Define, beside `base_class`, a class for every model with a head in its family's module of Transformers.

    Args:
        base_class: the LSG base model.
        hand_on: whether the stock ones keep arguments to themselves, which are then handed on to their base model.
        others: models that hold something else than the base model, by their names without the family's in front: the
            mixin of each, and the name of what it holds, likewise.
    """
    family, module = family_name(base_class), stock_module(base_class)
    for name, stock in list(vars(module).items()):
        if (
            isinstance(stock, type)
            and issubclass(stock, PreTrainedModel)
            and stock.__module__ == module.__name__
            and name.startswith(family)
            and (any(part in name for part in ("For", "LMHead", "MTModel")) or name.removeprefix(family) in others)
        ):
            mixin, part = others.get(name.removeprefix(family), (LSGWrapper, ""))
            held = getattr(sys.modules[base_class.__module__], f"LSG{family}{part}") if part else base_class
            attributes = {"config_class": base_class.config_class, "lsg_part_class": held}
            own = {"forward": handing_on(stock.forward)} if hand_on else {}
            define_class(f"LSG{name}", mixin, stock, base_class.__module__, **attributes, **own)
