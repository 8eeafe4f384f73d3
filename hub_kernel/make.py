"""Make the Hub kernel: copies of what its entry imports of `lsg_converter/modeling/`, and what `kernels` loads.

    python hub_kernel/make.py [--output FOLDER]

`torch-ext/lsg/` is what `kernel-builder` builds from, by `build.toml`. `build/torch-<backend>/` is what it makes of
Python alone: the same files, and what they are in `metadata.json`.
"""

import argparse
import ast
import hashlib
import json
import shutil
from pathlib import Path

import tomllib


HERE = Path(__file__).parent
MODELING = HERE.parent / "lsg_converter" / "modeling"
NAME = "lsg"


def siblings(path: Path) -> set[str]:
    """The names of the files beside it that a file imports."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module}


def needed(entry: Path) -> list[Path]:
    """The files of `modeling/` that an entry needs, directly or through others."""
    found: dict[str, Path] = {}
    waiting = siblings(entry)
    while waiting:
        name = waiting.pop()
        found[name] = MODELING / f"{name}.py"
        waiting |= siblings(found[name]) - found.keys()
    return [found[name] for name in sorted(found)]


def make(output: Path) -> None:
    """Write `build.toml`, `torch-ext/` and `build/` into a folder; of what was there, the last two are replaced."""
    entry = HERE / "torch-ext" / NAME / "__init__.py"
    files = [entry, *needed(entry)]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:7]
    general = tomllib.loads((HERE / "build.toml").read_text())["general"]
    source = output / "torch-ext" / NAME
    source.mkdir(parents=True, exist_ok=True)
    for old in source.glob("lsg_*.py"):
        old.unlink()
    if output.resolve() != HERE.resolve():
        shutil.copy(HERE / "build.toml", output)
        shutil.copy(entry, source)
    for path in files[1:]:
        shutil.copy(path, source)
    shutil.rmtree(output / "build", ignore_errors=True)
    for backend in general["backends"]:
        variant = output / "build" / f"torch-{backend}"
        variant.mkdir(parents=True)
        for path in files:
            shutil.copy(path, variant)
        metadata = {
            "name": NAME,
            "id": f"_{NAME}_{backend}_{digest}",
            "version": general["version"],
            "license": general["license"],
            "python-depends": [],
            "backend": {"type": backend},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=HERE, help="the folder to write into (default: this one)")
    make(parser.parse_args().output)
