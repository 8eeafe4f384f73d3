"""Give pretrained Transformers long inputs with Local-Sparse-Global attention (arXiv 2210.15497)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .conversion import LSGConverter, convert
    from .interface import register_attention
    from .modeling.lsg_attention import lsg_attention
    from .modeling.lsg_encoder_decoder import LSGEncoderDecoderModel
    from .options import ConversionError, ConversionOptions
    from .report import ConversionReport
    from .version import __version__

__all__ = [
    "ConversionError",
    "ConversionOptions",
    "ConversionReport",
    "LSGConverter",
    "LSGEncoderDecoderModel",
    "__version__",
    "convert",
    "lsg_attention",
    "register_attention",
]

_MODULES = {
    "ConversionError": "options",
    "ConversionOptions": "options",
    "ConversionReport": "report",
    "LSGConverter": "conversion",
    "LSGEncoderDecoderModel": "modeling.lsg_encoder_decoder",
    "__version__": "version",
    "convert": "conversion",
    "lsg_attention": "modeling.lsg_attention",
    "register_attention": "interface",
}


def __getattr__(name: str) -> Any:
    """Import a name when it is first asked for: torch takes seconds, and the command's `--help` does not need it."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
