"""Writing a target that is complete or absent."""

import ctypes
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from .families import MODELING
from .options import ConversionOptions, SourceError, TargetError, first_line
from .report import FILE_NAME
from .source import TOKENIZER_FILES, Source
from .weights import read_json


# What else a checkpoint may hold, in the folder of a sentence-transformers module too: what a conversion,
# `save_pretrained` or sentence-transformers' `save` writes.
CHECKPOINT_FILE = re.compile(
    r"(\d+_[A-Za-z]+/)?(config\.json|(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)"
    r"|(model\.safetensors|pytorch_model\.bin)\.index\.json)"
    r"|generation_config\.json|README\.md|modules\.json|config_sentence_transformers\.json|sentence_\w+_config\.json"
    r"|tokenizer\.json|tokenizer_config\.json|tokenizer\.model|"
    + "|".join(
        re.escape(name) for name in (FILE_NAME, *TOKENIZER_FILES, *(path.name for path in MODELING.glob("*lsg_*.py")))
    )
)
MODULE_FOLDER = re.compile(r"\d+_[A-Za-z]+/")
STAGE_PREFIX = ".lsg-"  # a stage is the folder in which a target is written, before it is renamed
LOCK = "lsg-convert.lock"  # the file in a stage that its conversion has locked
BEFORE = "before"  # the folder in a stage that keeps what stood at the target
BEGIN_SECONDS = 60  # within them a conversion has locked its stage


def check_target(options: ConversionOptions, source: Source) -> None:
    """Raise TargetError where the target may not be written, before any work is done."""
    target, path = options.model_name, Path(os.path.abspath(options.model_name))
    folder = source.folder.resolve()
    resolved = path.resolve()
    if source.revision is None and (resolved == folder or folder in resolved.parents or resolved in folder.parents):
        raise TargetError(f"--model_name: {target!r} is the source, or in it, or around it; give another name")
    if os.path.lexists(path):
        check_checkpoint(options, path)
        if not options.overwrite:
            raise TargetError(f"--model_name: {target!r} exists; give another name, or --overwrite to replace it")


def check_checkpoint(options: ConversionOptions, path: Path) -> None:
    """Raise TargetError where what stands at the target is not a checkpoint and nothing else."""
    got = f"--model_name: {options.model_name!r}"
    if path.is_symlink() or not path.is_dir():
        kind = "a link" if path.is_symlink() else "a file"
        raise TargetError(f"{got} is {kind}; give another name, or remove it")
    with writing(options):
        try:
            known = {str(name) for name in read_json(path / FILE_NAME)["files"]}
        except (SourceError, KeyError, TypeError):
            known = set()
        others = list(foreign(path, known))
        is_empty = not any(path.iterdir())
    if is_empty:
        raise TargetError(f"{got} is an empty folder; remove it, or give another name")
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise TargetError(
            f"{got} holds {', '.join(others[:3])}{more}, which no conversion writes; "
            "--overwrite replaces a checkpoint alone: move what is yours, or give another name"
        )
    if not (path / "config.json").is_file():
        raise TargetError(f"{got} is no checkpoint, for it has no config.json; give another name, or remove it")


def foreign(folder: Path, known: set[str], place: str = "") -> Iterator[str]:
    """What a folder holds beside a checkpoint, whose report knows the files `known`; `place` is where in it."""
    for path in sorted(folder.iterdir()):
        name = place + path.name
        if path.is_dir() and not path.is_symlink():
            name += "/"
            if MODULE_FOLDER.fullmatch(name) or any(file.startswith(name) for file in known):
                yield from foreign(path, known, name)
            else:
                yield name
        elif path.is_symlink() or not (name in known or CHECKPOINT_FILE.fullmatch(name)):
            yield name


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
        with FileLock(stage / LOCK):
            folder = stage / path.name  # the target's name, under which Transformers caches its code
            with writing(options):
                folder.mkdir()
            yield folder
            with writing(options):
                for file in folder.rglob("*.safetensors"):  # which are written for their owner alone
                    shutil.copymode(folder / "config.json", file)
                path.parent.mkdir(parents=True, exist_ok=True)
                if options.overwrite and os.path.lexists(path):
                    check_checkpoint(options, path)  # once more: much may have happened since the first time
                    replace(path, folder, stage / BEFORE / path.name)
                else:
                    folder.rename(path)
    finally:
        remove(stage)


def replace(path: Path, folder: Path, before: Path) -> None:
    """Put `folder` in the place of the one at `path`, which goes there or to `before`; undo it where it fails."""
    if exchange(path, folder):
        return
    before.parent.mkdir()
    path.rename(before)
    try:
        folder.rename(path)
    except BaseException:
        before.rename(path)
        raise


def exchange(first: Path, second: Path) -> bool:
    """Exchange two folders in one step, with no moment without either; False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2  # Linux has it
    except (AttributeError, OSError, TypeError):
        return False
    here, exchanging = -100, 2  # AT_FDCWD and RENAME_EXCHANGE
    return renameat2(here, os.fsencode(first), here, os.fsencode(second), exchanging) == 0


def remove(stage: Path) -> None:
    """Remove a stage, and its lock last: what is left where this is killed can still be told for a stage."""
    for path in stage.glob("*"):
        if path.name != LOCK:
            shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(stage, ignore_errors=True)


def remove_stale(ancestor: Path) -> None:
    """Remove from `ancestor` the stages of killed conversions, whose locks are free; restore what they moved away."""
    for stage in ancestor.glob(f"{STAGE_PREFIX}*"):
        try:
            if not (stage / LOCK).is_file():
                continue
            with FileLock(stage / LOCK, timeout=0):
                # With nothing beside the lock, it may be that a conversion has made the file and not locked it yet.
                if len(list(stage.iterdir())) == 1 and time.time() - stage.stat().st_mtime < BEGIN_SECONDS:
                    continue
                for before in stage.glob(f"{BEFORE}/*"):
                    if not os.path.lexists(ancestor / before.name):
                        before.rename(ancestor / before.name)
                remove(stage)
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
