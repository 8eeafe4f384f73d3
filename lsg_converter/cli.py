"""The command: flags, progress, what a person or a script reads, and exit codes. Nothing else prints."""

import json
import signal
import sys
import traceback
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args, get_type_hints

import yaml
from rich.console import Console, ConsoleDimensions, Group, RenderableType
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from .options import ConversionError, ConversionOptions, OptionError, check_types, wanted
from .version import __version__


# What imports torch, which takes seconds, is imported where it is used.
if TYPE_CHECKING:
    from .report import ConversionReport


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What the command prints."""

    quiet: bool = field(default=False, metadata={"help": "Print nothing but errors."})
    json: bool = field(default=False, metadata={"help": "Print the report as JSON; all else goes to stderr."})
    debug: bool = field(default=False, metadata={"help": "Show where an error arose."})

    def __post_init__(self) -> None:
        check_types(self)


class Parser(ArgumentParser):
    """The flags of dataclasses of options, or a JSON or YAML file with them; a wrong one raises OptionError."""

    kinds: tuple[Any, ...] = (ConversionOptions, OutputOptions)
    command = "lsg-convert"
    needed = "--initial_model NAME --model_name FOLDER"
    purpose = "Give a pretrained Transformer long inputs, with Local-Sparse-Global attention."

    def __init__(self) -> None:
        super().__init__(
            prog=self.command,
            usage=f"{self.command} [arguments.json] {self.needed} [options]",
            description=f"{self.purpose} The options may stand in a JSON or YAML file, which is named first; flags "
            "after it prevail.",
            argument_default=SUPPRESS,
            allow_abbrev=False,
        )
        for options in self.kinds:
            hints = get_type_hints(options)
            for item in fields(options):
                self.add_option(item, hints[item.name])
        self.add_argument("--version", action="version", version=f"lsg-converter {__version__}")

    def add_option(self, item: Field[Any], hint: Any) -> None:
        """Add a field as a flag. Its value is given its type here, and checked by the dataclass."""
        text = item.metadata["help"]
        if item.default not in (MISSING, None, False):
            text = f"{text} (default: {item.default})"
        names = [f"--{item.name}", *item.metadata.get("aliases", ())]
        if hint is bool:
            self.add_argument(*spellings(*names), help=text, type=read_bool, nargs="?", const=True)
            if item.default:
                reverse = spellings(f"--no_{item.name}")
                self.add_argument(*reverse, help=f"The reverse of --{item.name}.", dest=item.name, action="store_false")
        else:
            values = get_args(hint) if item.default in get_args(hint) else ()
            metavar = f"{{{','.join(values)}}}" if values else item.name.upper()
            self.add_argument(*spellings(*names), help=text, type=read_int if hint is int else str, metavar=metavar)

    def options(self, arguments: Sequence[str]) -> tuple[Any, ...]:
        """An instance of each of `kinds`."""
        arguments, known = list(arguments), known_options(self.kinds)
        if arguments and arguments[0].endswith((".json", ".yaml", ".yml")):
            arguments = [*flags_of(Path(arguments[0]), known), *arguments[1:]]
        if "--use_auth_token" in arguments:  # once a flag without a value
            place = arguments.index("--use_auth_token") + 1
            if place == len(arguments) or arguments[place].startswith("--"):
                arguments.insert(place, "True")
        namespace, unknown = self.parse_known_args(arguments)
        if unknown:
            if not unknown[0].startswith("-"):
                raise OptionError(
                    f"{unknown[0]}: it follows no flag; put one such as --initial_model before it, and quotes around a "
                    "value with spaces"
                )
            raise OptionError(
                f"{unknown[0].split('=')[0]}: no such option; {nearest(unknown[0], known)}--help lists them"
            )
        given = vars(namespace)
        result: list[Any] = []
        for options in reversed(self.kinds):
            for item in fields(options):
                if item.default is MISSING and item.name not in given:
                    raise OptionError(f"--{item.name}: it is missing; {wanted(item)}; --help lists the options")
            own = {item.name: given[item.name] for item in fields(options) if item.name in given}
            result.insert(0, options(**own))
        return tuple(result)

    def error(self, message: str) -> NoReturn:
        flag = message.removeprefix("argument ").split("/")[0]
        fault = "got no value; give one after it" if message.endswith("expected one argument") else "it takes no value"
        raise OptionError(f"{flag}: {fault}; --help lists the options")


def spellings(*names: str) -> list[str]:
    """The names of a flag, and the same with dashes."""
    return list(dict.fromkeys([*names, *(f"--{name[2:].replace('_', '-')}" for name in names)]))


def read_bool(text: str) -> bool | str:
    """True or False, or the text where it is neither."""
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    return words.get(text.lower(), text)


def read_int(text: str) -> int | str:
    """A number, or the text where it is none."""
    try:
        return int(text)
    except ValueError:
        return text


def known_options(kinds: Sequence[Any] = Parser.kinds) -> list[str]:
    return [item.name for options in kinds for item in fields(options)]


def nearest(option: str, known: Sequence[str]) -> str:
    """A hint at the option that was meant, if one is near."""
    close = get_close_matches(option.split("=")[0].lstrip("-").replace("-", "_"), known, n=1)
    return f"did you mean --{close[0]}? " if close else ""


def flags_of(path: Path, known: Sequence[str]) -> list[str]:
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
        if name not in (*known, "use_auth_token"):
            raise OptionError(f"{path}: got an unknown option {name!r}; {nearest(str(name), known)}--help lists them")
        if value is not None:
            result.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return result


class Steps:
    """The step that is under way, and the time since the first, on stderr where that is a terminal."""

    def __init__(self, console: Console) -> None:
        from huggingface_hub.utils import are_progress_bars_disabled

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


def interrupt(number: int, frame: object) -> NoReturn:
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


@contextmanager
def raised_interrupts() -> Iterator[None]:
    """Inside, an interrupt raises, so that a conversion removes what it has begun."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, interrupt)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command on `arguments`, or those of the process.

    Returns:
        The exit code: 0; 1 where the verification failed; 2 for an option, 3 for the source, 4 for the target or the
        disk; 130 or 143 where it was interrupted.
    """
    return guarded(arguments, Parser, run, show)


def guarded(
    arguments: Sequence[str] | None,
    parser: type[Parser],
    run: Callable[[Any, OutputOptions, Console], Any],
    show: Callable[[Any], None],
) -> int:
    """Run a command: its flags, what it does, and what a person reads of the result; the exit code, as in `main`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    errors = Console(stderr=True)
    try:
        options, output = parser().options(arguments)
        report = run(options, output, errors)
    except (Exception, KeyboardInterrupt) as error:
        if "--debug" in arguments:
            traceback.print_exc()
        code, message = explain(error)
        errors.print(Text.assemble(("error:", "bold red"), f" {' '.join(message.split())}"), soft_wrap=True)
        return code
    if output.json:
        print(json.dumps(report.content(), indent=2))
    elif not output.quiet:
        show(report)
    return 0


def run(options: ConversionOptions, output: OutputOptions, errors: Console) -> "ConversionReport":
    """Convert, with the steps shown on `errors`."""
    from .conversion import convert

    with shown_steps(output, errors) as announce:
        return convert(options, announce)


@contextmanager
def shown_steps(output: OutputOptions, errors: Console) -> Iterator[Callable[[str], None]]:
    """Inside, steps that are announced are shown on `errors`, and the libraries below are kept quiet."""
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    enable_progress_bars()  # those of downloads, which the line above turned off as well
    if output.quiet:
        disable_progress_bars()
    with raised_interrupts(), Steps(errors) as steps:
        yield steps.announce


def show(report: "ConversionReport") -> None:
    """Print what a person wants to know."""
    from .summary import summary

    show_all(summary(report))


def show_all(parts: Iterable[RenderableType]) -> None:
    """Print them; lines are wrapped on a terminal alone, and code nowhere."""
    console = Console()
    if not (console.is_interactive and sys.stdout.isatty()):
        console.size = ConsoleDimensions(sys.maxsize, 1)
    console.print(Group(*parts), crop=False)


def explain(error: BaseException) -> tuple[int, str]:
    """The exit code for an error, and what it says."""
    if isinstance(error, ConversionError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 143 if isinstance(error, Terminated) else 130, "interrupted; nothing is left half-written"
    return 1, f"{type(error).__name__}: {error}; nothing was written, please report this; --debug shows where it arose"
