"""The files that go with a target's weights: what travels, with the new length in it, and what is left out."""

import json
import shutil
import string
from collections.abc import Collection
from pathlib import Path
from typing import Any

from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from .source import COLBERT_SETTINGS, OTHER_FORMATS, PICKLED_HEADS, TOKENIZER_FILES, Source, read_modules
from .weights import read_json, read_tensor


SETTINGS = "config_sentence_transformers.json"
# The module of sentence-transformers for the encoder of a family that has a decoder too; its file is beside this one.
ENCODER_MODULE = "lsg_sentence.LSGTransformer"
MULTI_VECTOR = "MultiVectorEncoder"  # the class of sentence-transformers that loads a ColBERT
# Limits of tokens, in config.json too. ColBERT's `query_length` is left: queries are padded to it.
LIMITS = ("max_seq_length", "max_seq_len", "model_max_length", "document_length")
PROJECTION = "linear.weight"  # of a ColBERT checkpoint


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, source: Source, folder: Path) -> None:
    """Save the source's tokenizer for texts of the new length, with all its files."""
    length = source.options.max_sequence_length
    tokenizer.model_max_length = length
    tokenizer.init_kwargs.pop("max_length", None)  # Transformers takes it from tokenizer.json
    if not source.options.trust_remote_code:
        tokenizer.init_kwargs.pop("auto_map", None)  # the source's own code is not copied
    if tokenizer.is_fast:
        # tokenizer.json may cut texts to the old length, and pad all to it.
        backend = tokenizer.backend_tokenizer
        if backend.truncation:
            backend.enable_truncation(**{**backend.truncation, "max_length": length})
        if backend.padding:
            backend.enable_padding(**{**backend.padding, "length": None})
    tokenizer.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        copy(source.folder / name, folder / name)


def sentence_class(folder: Path) -> str | None:
    """The class of sentence-transformers that loads the model in `folder`; None where it has no modules of theirs."""
    kinds = [kind for _, kind in read_modules(folder)]
    if not kinds:
        return None
    path = folder / SETTINGS
    name = read_json(path).get("model_type") if path.is_file() else None
    if name == "ColBERT" or any(kind.startswith("pylate.") for kind in kinds):
        return MULTI_VECTOR
    return name if name in (MULTI_VECTOR, "CrossEncoder", "SparseEncoder") else "SentenceTransformer"


def pools_first_token(folder: Path) -> bool:
    """Whether what stands behind the model in `folder` reads the first token's state: not so where modules of
    sentence-transformers read others."""
    for name, kind in read_modules(folder):
        if kind.endswith(".Pooling"):
            pooling = read_json(folder / name / "config.json")
            return bool(pooling.get("pooling_mode_cls_token")) or pooling.get("pooling_mode") == "cls"
    return sentence_class(folder) in (None, "CrossEncoder")


def write_companions(source: Source, folder: Path) -> None:
    """Copy the licence, pickled heads where they are allowed, and the modules of sentence-transformers."""
    for pattern in ("LICENSE*", "LICENCE*", "NOTICE*"):
        for path in source.folder.glob(pattern):
            copy(path, folder / path.name)
    if source.options.allow_pickle:
        for name in PICKLED_HEADS:
            copy(source.folder / name, folder / name)
    modules = travelling_modules(source)
    if not modules:
        return
    for name, _ in modules:
        for path in (source.folder / name).glob("*") if name else ():
            if path.suffix in (".json", ".safetensors", ".txt") or path in pickles(path.parent):
                copy(path, folder / name / path.name)
    copy(source.folder / "modules.json", folder / "modules.json")
    if any(map(source.family.is_encoder, source.family.architectures.values())):
        first, *others = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        write_json(folder / "modules.json", [{**first, "type": ENCODER_MODULE}, *others])
        name = f"{ENCODER_MODULE.partition('.')[0]}.py"
        copy(Path(__file__).with_name(name), folder / name)
    length = source.options.max_sequence_length
    for path in source.folder.glob("sentence_*_config.json"):
        content = {**read_json(path), "max_seq_length": length}
        write_json(folder / path.name, with_limits(content, length, (*LIMITS, "max_length")))
    settings = read_json(source.folder / SETTINGS) if (source.folder / SETTINGS).is_file() else {}
    if (limited := with_limits(settings, length)) != settings:
        write_json(folder / SETTINGS, limited)
    copy(source.folder / SETTINGS, folder / SETTINGS)


def travelling_modules(source: Source) -> list[tuple[str, str]]:
    """The folders and types in modules.json; none, with a warning, where they cannot travel safely and whole."""
    if not (source.folder / "modules.json").is_file():
        return []
    modules = read_modules(source.folder)
    folders = [source.folder / name for name, _ in modules[1:]]
    kinds = [item for item in modules if not (source.is_lsg and item == ("", ENCODER_MODULE))]
    problem = None
    if not modules:
        problem = "modules.json of the source cannot be read"
    elif (
        modules[0][0]  # the model itself lies in a folder
        or any(path.parent != source.folder or path.name == ".." for path in folders)
        or any(not kind.startswith(("sentence_transformers.", "pylate.models.")) for _, kind in kinds)
    ):
        problem = "modules.json of the source names other code or places"
    elif nested := [path.name for folder in folders for path in folder.glob("*") if path.is_dir()]:
        problem = f"a module of the source has a folder in it, {nested[0]}"
    elif not source.options.allow_pickle and (found := [path for folder in folders for path in pickles(folder)]):
        file = found[0].relative_to(source.folder).as_posix()
        problem = f"{file} of the source is pickled, and only --allow_pickle copies it"
    if problem is None:
        return modules
    source.warnings.append(f"{problem}: its modules of sentence-transformers are not copied")
    return []


def pickles(folder: Path) -> list[Path]:
    """The pickled weights that a module needs: none where it has safetensors, which are taken before them."""
    return [] if list(folder.glob("*.safetensors")) else list(folder.glob("*.bin"))


def write_colbert(source: Source, folder: Path) -> None:
    """Write the projection of a ColBERT checkpoint as a module, and its settings."""
    weight = next(tensor for path in source.files if (tensor := read_tensor(path, PROJECTION)) is not None)
    module = folder / "1_Dense"
    module.mkdir()
    save_file({PROJECTION: weight.contiguous()}, module / "model.safetensors", metadata={"format": "pt"})
    shape = {"in_features": weight.shape[1], "out_features": weight.shape[0], "bias": False}
    write_json(module / "config.json", {**shape, "activation_function": "torch.nn.modules.linear.Identity"})
    modules = [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate([("", "Transformer"), (module.name, "Dense")])
    ]
    write_json(folder / "modules.json", modules)
    length, path = source.options.max_sequence_length, source.folder / COLBERT_SETTINGS
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": length, "do_lower_case": False})
    settings = read_json(path) if path.is_file() else {}
    content = {
        "model_type": "ColBERT",  # which PyLate loads, too
        "query_prefix": settings.get("query_token_id", "[unused0]"),
        "document_prefix": settings.get("doc_token_id", "[unused1]"),
        "query_length": settings.get("query_maxlen", 32),
        "document_length": length,
        "attend_to_expansion_tokens": settings.get("attend_to_mask_tokens", False),
        "skiplist_words": list(string.punctuation) if settings.get("mask_punctuation", True) else [],
    }
    write_json(folder / SETTINGS, content)


def left_out(source: Source, folder: Path, later: Collection[str]) -> list[str]:
    """What of the source is not in the target: files, whole folders, and at last its weights in other formats.

    Args:
        source: its weights were read.
        folder: the target.
        later: names of files that are yet to be written there.
    """
    read = {*later, *(path.name for path in source.files)}
    names = [name for name in source.names() if not name.startswith(".") and not name.endswith(".index.json")]
    absent = {name for name in names if name not in read and not (folder / name).exists()}
    formats = [*OTHER_FORMATS, "*.onnx", "pytorch_model*", "model*.safetensors"]
    weights = set(filter_repo_objects(absent, allow_patterns=formats))

    def shown(names: set[str]) -> list[str]:
        parts = {name: name.partition("/")[0] for name in names}
        whole = {name for name, part in parts.items() if part != name and not (folder / part).exists()}
        return sorted({f"{parts[name]}/" if name in whole else name for name in names})

    return shown(absent - weights) + (["weights in other formats: " + ", ".join(shown(weights))] if weights else [])


def with_limits(content: Any, length: int, names: Collection[str] = LIMITS) -> Any:
    """JSON content in which every number with one of the `names` is `length`."""
    if isinstance(content, list):
        return [with_limits(item, length, names) for item in content]
    if not isinstance(content, dict):
        return content
    return {
        name: length if name in names and isinstance(value, int) else with_limits(value, length, names)
        for name, value in content.items()
    }


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def copy(path: Path, target: Path) -> None:
    """Copy a file where it exists and the target does not."""
    if path.is_file() and not target.exists():
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
