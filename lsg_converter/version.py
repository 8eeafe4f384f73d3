"""Versions of what is installed."""

from importlib.metadata import PackageNotFoundError, version


def package_version(name: str) -> str:
    """The version of an installed package."""
    try:
        return version(name)
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "0+unknown"


__version__ = package_version("lsg-converter")
