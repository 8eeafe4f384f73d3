"""The command: flags, progress, what a person or a script reads, and exit codes. Nothing else prints."""

import json
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import yaml
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from rich.console import Console, ConsoleDimensions, Group
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text
from transformers import HfArgumentParser
from transformers.utils import logging

from . import __version__
from .convert import convert
from .options import ConversionError, ConversionOptions, OptionError
from .report import ConversionReport
from .summary import summary


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What the command prints."""

    quiet: bool = field(default=False, metadata={"help": "Print nothing but errors."})
    json: bool = field(default=False, metadata={"help": "Print the report as JSON; all else goes to stderr."})
    debug: bool = field(default=False, metadata={"help": "Show where an error arose."})


class Parser(HfArgumentParser):
    """The flags of `ConversionOptions`, or a JSON or YAML file with them; a wrong one raises OptionError."""

    def __init__(self) -> None:
        super().__init__(
            [ConversionOptions, OutputOptions],  # type: ignore[list-item]
            prog="lsg-convert",
            usage="lsg-convert [arguments.json] --initial_model NAME --model_name FOLDER [options]",
            description="Give a pretrained Transformer long inputs, with Local-Sparse-Global attention. "
            "The options may stand in a JSON or YAML file, which is named first; flags after it prevail.",
            allow_abbrev=False,
        )
        self.add_argument("--version", action="version", version=f"lsg-converter {__version__}")

    def options(self, arguments: Sequence[str]) -> tuple[ConversionOptions, OutputOptions]:
        arguments = list(arguments)
        if arguments and arguments[0].endswith((".json", ".yaml", ".yml")):
            arguments = [*flags_of(Path(arguments[0])), *arguments[1:]]
        if "--use_auth_token" in arguments:  # once a flag without a value
            place = arguments.index("--use_auth_token") + 1
            if place == len(arguments) or arguments[place].startswith("--"):
                arguments.insert(place, "True")
        options, output, *_, unknown = self.parse_args_into_dataclasses(
            arguments, return_remaining_strings=True, look_for_args_file=False
        )
        if unknown:
            raise OptionError(f"{unknown[0].split('=')[0]}: no such option; {nearest(unknown[0])}--help lists them")
        return options, output

    def error(self, message: str) -> NoReturn:
        raise OptionError(f"{message.removeprefix('argument ')}; --help lists the options")


def known_options() -> list[str]:
    return [item.name for item in (*fields(ConversionOptions), *fields(OutputOptions))]


def nearest(option: str) -> str:
    """A hint at the option that was meant, if one is near."""
    close = get_close_matches(option.split("=")[0].lstrip("-").replace("-", "_"), known_options(), n=1)
    return f"did you mean --{close[0]}? " if close else ""


def flags_of(path: Path) -> list[str]:
    """The options in a JSON or YAML file, as flags. Raises OptionError."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))  # which reads JSON too
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or "it is neither JSON nor YAML"
        raise OptionError(f"{path}: it cannot be read: {reason}; give a file with options") from error
    if not isinstance(content, dict):
        raise OptionError(f'{path}: it must hold options and their values, such as {{"max_sequence_length": 4096}}')
    result = []
    for name, value in content.items():
        if name not in (*known_options(), "use_auth_token"):
            raise OptionError(f"{path}: got an unknown option {name!r}; {nearest(str(name))}--help lists them")
        if value is not None:
            result += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return result


class Steps:
    """The step that is under way, and the time since the first, on stderr where that is a terminal."""

    def __init__(self, console: Console) -> None:
        self.shown = console.is_interactive and sys.stderr.isatty() and not are_progress_bars_disabled()
        self.progress = Progress(
            SpinnerColumn("line" if console.options.ascii_only else "dots"),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self.task = self.progress.add_task("")

    def __enter__(self) -> "Steps":
        return self

    def announce(self, step: str) -> None:
        if not self.shown:
            return
        if step:
            self.progress.update(self.task, description=step, refresh=True)
            self.progress.start()
        else:
            self.progress.stop()

    def __exit__(self, *_: object) -> None:
        self.announce("")


class Terminated(KeyboardInterrupt):
    """The process was asked to end."""


def terminate(*_: Any) -> NoReturn:
    raise Terminated


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command on `arguments`, or those of the process.

    Returns:
        The exit code: 0; 1 where the verification failed; 2 for an option, 3 for the source, 4 for the target or the
        disk; 130 or 143 where it was interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    enable_progress_bars()  # those of downloads, which the line above turned off as well
    errors = Console(stderr=True)
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        options, output = Parser().options(arguments)
        if output.quiet:
            disable_progress_bars()
        with Steps(errors) as steps:
            report = convert(options, steps.announce)
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in arguments:
            traceback.print_exc()
        code, message = explain(error)
        errors.print(Text.assemble(("error:", "bold red"), f" {' '.join(message.split())}"), soft_wrap=True)
        return code
    finally:
        signal.signal(signal.SIGTERM, before)
    if output.json:
        print(json.dumps(report.content(), indent=2))
    elif not output.quiet:
        show(report)
    return 0


def show(report: ConversionReport) -> None:
    """Print what a person wants to know; lines are wrapped on a terminal alone, and the code nowhere."""
    console = Console()
    if not (console.is_interactive and sys.stdout.isatty()):
        console.size = ConsoleDimensions(sys.maxsize, 1)
    console.print(Group(*summary(report)), crop=False)


def explain(error: BaseException) -> tuple[int, str]:
    """The exit code for an error, and what it says."""
    if isinstance(error, ConversionError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 143 if isinstance(error, Terminated) else 130, "interrupted; nothing is left half-written"
    return 1, f"{type(error).__name__}: {error}; nothing was written, please report this; --debug shows where it arose"
