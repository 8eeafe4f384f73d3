"""Give pretrained Transformers long inputs with Local-Sparse-Global attention (arXiv 2210.15497)."""

from .convert import LSGConverter, convert
from .options import ConversionError, ConversionOptions
from .report import ConversionReport, package_version


__version__ = package_version("lsg-converter")

__all__ = ["ConversionError", "ConversionOptions", "ConversionReport", "LSGConverter", "__version__", "convert"]
