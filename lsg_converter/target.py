"""Writing a target that is complete or absent, and the files that go with its weights."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from .options import ConversionOptions, TargetError, first_line
from .source import Source
from .weights import read_json


# Files of a tokenizer that Transformers reads, but does not always write.
TOKENIZER_FILES = (
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
STAGE_PREFIX = ".lsg-"  # a stage is the folder in which a target is written, before it is renamed
BEFORE = "before"  # the folder in a stage that keeps what stood at the target
STALE_SECONDS = 60


def check_target(options: ConversionOptions, source: Source) -> None:
    """Raise TargetError where the target may not be written, before any work is done."""
    target, path = options.model_name, Path(os.path.abspath(options.model_name))
    folder = source.folder.resolve()
    resolved = path.resolve()
    if source.revision is None and (resolved == folder or folder in resolved.parents or resolved in folder.parents):
        raise TargetError(f"--model_name: {target!r} is the source, or in it, or around it; give another name")
    if not os.path.lexists(path):
        return
    if not options.overwrite:
        raise TargetError(f"--model_name: {target!r} exists; give another name, or --overwrite to replace it")
    if path.is_symlink() or not (path / "config.json").is_file():
        raise TargetError(f"--model_name: {target!r} exists and is no folder of a model; give another name")


@contextmanager
def staged(options: ConversionOptions) -> Iterator[Path]:
    """A folder to fill, which becomes the target at the end; on any error nothing is left. Raises TargetError."""
    path = Path(os.path.abspath(options.model_name))
    ancestor = next(parent for parent in path.parents if parent.exists())
    remove_stale(ancestor)
    with writing(options):
        # On the target's disk, so that the last step is a rename.
        stage = Path(tempfile.mkdtemp(prefix=STAGE_PREFIX, dir=ancestor))
    try:
        with FileLock(stage / "lock"):
            folder = stage / path.name  # the target's name, under which Transformers caches its code
            with writing(options):
                folder.mkdir()
            yield folder
            with writing(options):
                path.parent.mkdir(parents=True, exist_ok=True)
                if options.overwrite and path.exists():
                    replace(path, folder, stage / BEFORE / path.name)
                else:
                    folder.rename(path)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def replace(path: Path, folder: Path, before: Path) -> None:
    """Move the folder at `path` to `before`, and `folder` to `path`; where that fails, undo it."""
    before.parent.mkdir()
    path.rename(before)
    try:
        folder.rename(path)
    except BaseException:
        before.rename(path)
        raise


def remove_stale(ancestor: Path) -> None:
    """Remove from `ancestor` the stages of killed conversions, whose locks are free; restore what they moved away."""
    for stage in ancestor.glob(f"{STAGE_PREFIX}*"):
        try:
            if (stage / "lock").exists() and time.time() - stage.stat().st_mtime > STALE_SECONDS:
                with FileLock(stage / "lock", timeout=0):
                    for before in stage.glob(f"{BEFORE}/*"):
                        if not os.path.lexists(ancestor / before.name):
                            before.rename(ancestor / before.name)
                    shutil.rmtree(stage, ignore_errors=True)
        except (Timeout, OSError):
            continue


@contextmanager
def writing(options: ConversionOptions) -> Iterator[None]:
    """Raise TargetError for an error of writing inside."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise TargetError(
            f"--model_name: {options.model_name!r} cannot be written: {reason}; give another place, or make room"
        ) from error


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, source: Source, folder: Path) -> None:
    """Save the source's tokenizer for texts of the new length, with all its files."""
    tokenizer.model_max_length = source.options.max_sequence_length
    if not source.options.trust_remote_code:
        tokenizer.init_kwargs.pop("auto_map", None)  # the source's own code is not copied
    if tokenizer.is_fast:
        # tokenizer.json may hold a truncation to the old length, which would cut longer texts.
        tokenizer.backend_tokenizer.no_truncation()
    tokenizer.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        copy(source.folder / name, folder / name)


def write_companions(source: Source, folder: Path) -> bool:
    """Copy the licence, and the files of sentence-transformers, with the new length in them.

    Returns:
        Whether the checkpoint is a sentence-transformers model.
    """
    for pattern in ("LICENSE*", "LICENCE*", "NOTICE*"):
        for path in source.folder.glob(pattern):
            copy(path, folder / path.name)
    modules = sentence_modules(source)
    for name in modules:
        for path in (source.folder / name).glob("*"):
            if path.suffix in (".json", ".safetensors", ".txt") or (
                path.suffix == ".bin" and source.options.allow_pickle
            ):
                copy(path, folder / name / path.name)
    if modules:
        for path in (source.folder / "modules.json", *source.folder.glob("*sentence_transformers.json")):
            copy(path, folder / path.name)
        for path in source.folder.glob("sentence_*_config.json"):
            content = {**read_json(path), "max_seq_length": source.options.max_sequence_length}
            (folder / path.name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return bool(modules)


def sentence_modules(source: Source) -> list[str]:
    """The folders that modules.json names beside the model; none where it is absent, damaged or unsafe."""
    path = source.folder / "modules.json"
    if not path.is_file():
        return []
    try:
        modules = [(item["path"], item["type"]) for item in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, KeyError, TypeError):
        source.warnings.append("modules.json of the source cannot be read, and is not copied")
        return []
    if any(Path(name).name != name or not kind.startswith("sentence_transformers.") for name, kind in modules):
        source.warnings.append("modules.json of the source names other code or places, and is not copied")
        return []
    return [name for name, _ in modules if name]


def copy(path: Path, target: Path) -> None:
    """Copy a file where it exists and the target does not."""
    if path.is_file() and not target.exists():
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
