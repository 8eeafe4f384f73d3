"""Writing a target that is complete or absent."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from .options import ConversionOptions, TargetError, first_line
from .source import Source


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
