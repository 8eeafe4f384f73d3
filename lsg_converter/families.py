"""Which families can be converted, and to what: read off the files in `modeling/`."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache, cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from .modeling.lsg_classes import LSGWrapper, stock_class
from .modeling.lsg_config import LSGConfig
from .options import OptionError, SourceError


MODELING = Path(__file__).parent / "modeling"
_PREFIX = "modeling_lsg_"
_SPARSE = "it has a sparse attention of its own, for long texts"
_PAIRS = "its attention has a bias for each pair of tokens by their boxes, and it reads an image"
# Why a family that one may ask for has no file.
REFUSED = {
    **dict.fromkeys(("big_bird", "bigbird_pegasus", "led", "longformer", "longt5", "pegasus_x", "reformer"), _SPARSE),
    **dict.fromkeys(("layoutlmv2", "layoutlmv3"), _PAIRS),
    "convbert": "half of its heads are convolutions, in which global tokens have no place",
    "fnet": "it has no attention",
    "funnel": "its layers pool the tokens, and its positions are relative",
    "lilt": "the scores of its two streams, of words and of boxes, are added",
    "luke": "it reads entities beside the words, with a query for each kind of pair",
    "mobilebert": "the embedding of a word takes in those of its neighbours, padding among them",
    "modernbert": "it reads long texts as it is, by local attention and rotary positions",
    "nllb-moe": "which experts read a token depends on the other tokens of the batch",
    "nystromformer": "its attention is approximated by landmarks",
    "roformer": "its rotary positions are counted in its stack of layers, where rows lie end to end",
    "squeezebert": "its layers are convolutions, of states that lie channel by channel",
    "tapas": "its positions begin anew in each cell of a table",
    "xlnet": "its positions are relative, and its attention has two streams",
    "yoso": "its attention is approximated by hashing",
}


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        model_type: as `config.json` says it.
        module: name of its file in `modeling/`, without ending.
        config_class: its LSG configuration.
        base_class: its LSG model without a head.
        architectures: stock class name -> LSG class, the base model first.
    """

    model_type: str
    module: str
    config_class: Any
    base_class: Any
    architectures: Mapping[str, Any]

    @property
    def lsg_fields(self) -> list[str]:
        """The names of the fields that LSG adds to the configuration."""
        return [item.name for item in fields(self.config_class.__bases__[0])]

    def lsg_class(self, architecture: str) -> Any:
        """The LSG class for a stock (or LSG) class name. Raises OptionError where the family has none."""
        name = architecture.removeprefix("LSG")
        if name not in self.architectures:
            known = ", ".join(self.architectures)
            raise OptionError(f"--architecture: got {architecture!r}; the family {self.model_type!r} has {known}")
        return self.architectures[name]

    def holds_model(self, lsg_class: Any) -> bool:
        """Whether a class holds another model, of which it is the head: T5's hold an encoder and a decoder."""
        return getattr(lsg_class, "lsg_part_class", None) in self.architectures.values()

    def headless(self, lsg_class: Any) -> Any:
        """The LSG class of a model without its head."""
        if self.holds_model(lsg_class):
            return lsg_class.lsg_part_class
        return self.base_class if issubclass(lsg_class, self.base_class.__bases__[0]) else lsg_class

    def is_encoder(self, lsg_class: Any) -> bool:
        """Whether a class is the encoder alone of a family that has a decoder too."""
        return self.headless(lsg_class) is not self.base_class

    def is_decoder(self, lsg_class: Any) -> bool:
        """Whether a class is a decoder alone."""
        return self.auto_map.get("AutoModelForCausalLM") == f"{self.module}.{lsg_class.__name__}"

    def is_causal(self, lsg_class: Any) -> bool:
        """Whether a class is a decoder alone, which has causal LSG."""
        return self.config_class.has_causal_form and self.is_decoder(lsg_class)

    @cached_property
    def auto_map(self) -> Mapping[str, str]:
        """The whole `auto_map` of a checkpoint: every Auto class that has a class of this family."""
        result = {"AutoConfig": f"{self.module}.{self.config_class.__name__}"}
        for name, auto_class in vars(modeling_auto).items():
            mapping = getattr(auto_class, "_model_mapping", None)
            if not isinstance(auto_class, type) or mapping is None or stock_class(self.config_class) not in mapping:
                continue
            stock = mapping[stock_class(self.config_class)]
            for candidate in stock if isinstance(stock, tuple) else (stock,):
                if candidate.__name__ in self.architectures:
                    result[name] = f"{self.module}.{self.architectures[candidate.__name__].__name__}"
                    break
        return dict(sorted(result.items()))

    def auto_class(self, lsg_class: Any) -> str:
        """The name of the Auto class that loads `lsg_class`."""
        names = [name for name, target in self.auto_map.items() if target == f"{self.module}.{lsg_class.__name__}"]
        return min(names, key=lambda name: (name != "AutoModelForSeq2SeqLM", name))


@cache
def _files() -> Mapping[str, str]:
    """The families that the installed Transformers has, and the name of the file of each in `modeling/`."""
    stems = {path.stem for path in MODELING.glob(f"{_PREFIX}*.py")}
    names = {model_type: _PREFIX + model_type.replace("-", "_") for model_type in CONFIG_MAPPING_NAMES}
    return {model_type: name for model_type, name in sorted(names.items()) if name in stems}


def model_types() -> list[str]:
    """The families that can be converted."""
    return list(_files())


@cache
def family(model_type: str) -> Family:
    """The family of `config.model_type`. Raises SourceError where there is none."""
    if model_type not in model_types():
        reason = f", for {REFUSED[model_type]}" if model_type in REFUSED else ""
        raise SourceError(
            f"--initial_model: its family {model_type!r} cannot be converted{reason}; "
            f"give a model of one of these: {', '.join(model_types())}"
        )
    name = _files()[model_type]
    module = import_module(f".modeling.{name}", __package__)
    classes = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
    base = next(c for c in classes if hasattr(c, "global_table"))
    models = [c for c in classes if c is base or issubclass(c, LSGWrapper)]
    return Family(
        model_type=model_type,
        module=name,
        config_class=next(c for c in classes if issubclass(c, LSGConfig)),
        base_class=base,
        architectures={stock_class(c).__name__: c for c in sorted(models, key=lambda c: c is not base)},
    )


def auto_class(name: str) -> Any:
    """The Auto class of Transformers by its name."""
    return getattr(transformers, name)
