"""The command: flags, progress, what a person reads, and exit codes. Nothing else prints."""

import sys
from collections.abc import Sequence
from typing import NoReturn

from huggingface_hub.utils import enable_progress_bars, tqdm
from transformers import HfArgumentParser
from transformers.utils import logging

from . import __version__
from .convert import ConversionReport, convert
from .options import ConversionError, ConversionOptions, OptionError


class Parser(HfArgumentParser):
    """The flags of `ConversionOptions`; a wrong one raises OptionError."""

    def __init__(self) -> None:
        description = "Give a pretrained Transformer long inputs, with Local-Sparse-Global attention."
        super().__init__(
            ConversionOptions,  # type: ignore[arg-type]
            prog="lsg-convert",
            description=description,
            allow_abbrev=False,
        )
        self.add_argument("--version", action="version", version=f"lsg-converter {__version__}")

    def options(self, arguments: Sequence[str] | None) -> ConversionOptions:
        options, *_, unknown = self.parse_args_into_dataclasses(
            arguments, return_remaining_strings=True, look_for_args_file=False
        )
        if unknown:
            raise OptionError(f"{unknown[0]}: no such option; --help lists them")
        return options

    def error(self, message: str) -> NoReturn:
        raise OptionError(f"{message.removeprefix('argument ')}; --help lists the options")


class Progress:
    """A bar on the terminal with the step that is under way."""

    def __enter__(self) -> "Progress":
        self.bar = tqdm(total=9, bar_format="{desc} |{bar:20}| {elapsed}", leave=False, disable=None)
        return self

    def announce(self, step: str) -> None:
        self.bar.set_description_str(f"{step:<44}")
        self.bar.total = max(self.bar.total or 0, self.bar.n + 2)
        self.bar.update()

    def __exit__(self, *_: object) -> None:
        self.bar.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command on `arguments`, or those of the process.

    Returns:
        The exit code: 0; 1 where the verification failed; 2 for an option, 3 for the source, 4 for the target that
        cannot be; 130 where it was interrupted.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    enable_progress_bars()  # those of downloads, and ours, which the line above turned off as well
    try:
        options = Parser().options(arguments)
        with Progress() as progress:
            report = convert(options, progress.announce)
    except ConversionError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        return 130
    print(describe(report))
    return 0


def describe(report: ConversionReport) -> str:
    """What a person wants to know of a conversion."""
    options, lsg = report.options, report.lsg
    lines = [
        f"source        {options.initial_model}: {report.model_type}, {report.source_positions} positions",
        f"converted to  {report.architecture}, {report.positions} positions",
        f"attention     blocks of {lsg['block_size']}, {describe_sparsity(lsg)}, {lsg['num_global_tokens']} global",
    ]
    lines += [f"new weights   {name}" for name in report.new_weights]
    lines += [f"left out      {name}" for name in report.dropped_weights]
    lines += [f"warning       {warning}" for warning in report.warnings]
    lines += [f"verified      {check.name} ({check.figure})" for check in report.checks]
    if report.heads:
        row = "{:<36} {:<9} {:>8} {:>9} {:>8} {:>9}".format
        lines += ["", row("head", "dtype", "tokens", "forward", "tokens", "training")]
        lines += [
            row(
                run.auto_class,
                run.dtype,
                run.forward_tokens,
                f"{run.forward_s:.2f} s",
                run.training_tokens,
                f"{run.training_s:.2f} s",
            )
            for run in report.heads
        ]
        lines.append("")
    names = report.auto_class + (", AutoTokenizer" if report.has_tokenizer else "")
    lines += [
        f"written       {options.model_name}",
        "",
        "Load it with",
        "",
        f"    from transformers import {names}",
        "",
        f"    model = {report.auto_class}.from_pretrained({options.model_name!r}, trust_remote_code=True)",
    ]
    if report.has_tokenizer:
        lines.append(f"    tokenizer = AutoTokenizer.from_pretrained({options.model_name!r})")
    return "\n".join(lines)


def describe_sparsity(lsg: dict) -> str:
    if lsg["sparsity_type"] in (None, "none") or not lsg["sparse_block_size"] or not lsg["sparsity_factor"]:
        return "no sparse keys"
    return f"{lsg['sparse_block_size']} sparse keys a side ({lsg['sparsity_type']}, factor {lsg['sparsity_factor']})"
