"""Reading the files of a model: JSON, and weights, which are examined and read a part at a time."""

import json
import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from .options import SourceError, first_line


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises SourceError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"{path}: it is no JSON: {first_line(error)}; correct or restore it") from error
    if not isinstance(content, dict):
        raise SourceError(f"{path}: it must hold an object, {{...}}; correct it")
    return content


def weight_files(folder: Path, allow_pickle: bool) -> dict[Path, list[str]]:
    """The files that Transformers takes a model's weights from, and the names in each. Raises SourceError."""
    kinds = [("model", ".safetensors")] + ([("pytorch_model", ".bin")] if allow_pickle else [])
    for stem, suffix in kinds:
        path, index = folder / f"{stem}{suffix}", folder / f"{stem}{suffix}.index.json"
        if path.is_file():
            return {path: tensor_names(path)}
        if index.is_file():
            return shards(index, suffix)
    hint = "restore them"
    if not allow_pickle and list(folder.glob("pytorch_model*.bin")):
        hint = "its weights are pickled: --allow_pickle loads them, without running code in them"
    raise SourceError(f"--initial_model: {str(folder)!r} has no weights, such as model.safetensors; {hint}")


def shards(index: Path, suffix: str) -> dict[Path, list[str]]:
    """The files that an index names, which must lie beside it, and the names in each. Raises SourceError."""
    content = read_json(index)
    for name in ("weight_map", "metadata"):
        if not isinstance(content.get(name), dict) or (name == "weight_map" and not content[name]):
            raise SourceError(f"{index}: it has no {name}; restore it")
    names: dict[str, set[str]] = {}
    for key, name in content["weight_map"].items():
        if not isinstance(name, str) or PurePosixPath(name).name != name or "\\" in name or not name.endswith(suffix):
            raise SourceError(f"{index}: it names {name!r}; it must name files beside it that end in {suffix}")
        names.setdefault(name, set()).add(key)
    files = {}
    for name, keys in names.items():
        path = index.parent / name
        if not path.is_file():
            raise SourceError(f"{index}: it names {name!r}, which is not there; restore it")
        files[path] = tensor_names(path)
        absent = sorted(keys - set(files[path]))
        if suffix == ".safetensors" and absent:
            raise SourceError(f"{index}: it says that {absent[0]} is in {name}, which lacks it; restore it")
    return dict(sorted(files.items()))


def tensor_names(path: Path) -> list[str]:
    """The names in a safetensors file, whose header is checked; none of a pickle, which is not opened.

    Raises:
        SourceError: where the header is damaged.
    """
    if path.suffix != ".safetensors":
        return []
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (OSError, SafetensorError) as error:
        raise SourceError(
            f"{path}: it cannot be read: {damage(path) or first_line(error)}; copy or download it again"
        ) from error


def damage(path: Path) -> str | None:
    """What makes a file no safetensors file, where it is one of the usual things."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":
            return "it is Git LFS's pointer to the weights (`git lfs pull` gets them)"
        needed = 8 + int.from_bytes(start, "little")
        if size < 8:
            return f"it is cut off: it has {size} bytes"
        if needed > 100_000_000:  # the most that safetensors reads as a header
            return "it is no safetensors file"
        if size < needed:
            return f"it is cut off: it has {size:,} bytes of more than {needed:,}"
        try:
            header = json.loads(file.read(needed - 8))
            needed += max(header[name]["data_offsets"][1] for name in header if name != "__metadata__")
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            return None
    return f"it is cut off: it has {size:,} bytes of {needed:,}" if size < needed else None


def examine(files: dict[Path, list[str]]) -> None:
    """Raise SourceError where a weight is not finite, or stands in two files; `files` are those of `weight_files`."""
    seen: dict[str, Path] = {}
    for path, names in files.items():
        for name in names:
            if name in seen:
                raise SourceError(f"{path}: the weight {name} is in {seen[name].name} too; remove one of them")
            seen[name] = path
            for part in read_parts(path, name):
                if part.is_floating_point() and not bool(part.isfinite().all()):
                    raise SourceError(f"{path}: the weight {name} has values that are not finite; restore it")


def read_parts(path: Path, name: str, size: int = 2**26) -> Iterator[torch.Tensor]:
    """A tensor of a safetensors file in parts, each of some rows and about `size` bytes.

    The file is opened anew for each part, since what was read of it counts as memory until it is closed.
    """
    with safe_open(path, framework="pt") as file:
        shape = file.get_slice(name).get_shape()
        if not shape:
            yield file.get_tensor(name)
            return
    step = max(size // max(4 * math.prod(shape[1:]), 1), 1)
    for start in range(0, shape[0], step):
        with safe_open(path, framework="pt") as file:
            yield file.get_slice(name)[start : start + step]


def read_tensor(path: Path, name: str) -> torch.Tensor | None:
    """A tensor of a file of weights, or None where the file lacks it."""
    if path.suffix != ".safetensors":
        return torch.load(path, map_location="cpu", weights_only=True).get(name)
    return torch.cat(list(read_parts(path, name))) if name in tensor_names(path) else None


class Written:
    """The tensors in the safetensors files of a folder, read when they are asked for, and not kept."""

    def __init__(self, folder: Path) -> None:
        self.paths = {name: path for path in sorted(folder.glob("*.safetensors")) for name in tensor_names(path)}

    def __getitem__(self, name: str) -> torch.Tensor:
        return torch.cat(list(read_parts(self.paths[name], name)))

    def equals(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether the tensor on disk equals `tensor` in every bit."""
        start = 0
        for part in read_parts(self.paths[name], name):
            if part.ndim == 0:
                return same_bits(part, tensor)
            if not same_bits(part, tensor[start : start + len(part)]):
                return False
            start += len(part)
        return start == len(tensor)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every bit (NaN and the sign of zero included)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(*(x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (a, b)))
