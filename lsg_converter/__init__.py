"""Give pretrained Transformers long inputs with Local-Sparse-Global attention (arXiv 2210.15497)."""

from importlib.metadata import PackageNotFoundError, version

from .convert import ConversionReport, LSGConverter, convert
from .options import ConversionError, ConversionOptions


try:
    __version__ = version("lsg-converter")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"

__all__ = ["ConversionError", "ConversionOptions", "ConversionReport", "LSGConverter", "__version__", "convert"]
