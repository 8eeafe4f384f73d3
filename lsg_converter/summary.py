"""What a person reads of a conversion, for the width and the colours of a console."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from .card import usage
from .modeling.lsg_layout import LSGLayout
from .report import ConversionReport
from .verify import Check, HeadRun


LABEL_WIDTH = 14
STYLES = {"verified": "green", "warning": "yellow", "advice": "cyan"}


@dataclass(frozen=True)
class Fact:
    """A label, and a text beside it, which stays there where the console wraps it."""

    label: str
    text: str | Text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        marked = self.label == "verified" and options.is_terminal and not options.ascii_only
        label = f"{'✓ ' if marked else ''}{self.label}".ljust(LABEL_WIDTH)
        text = self.text if isinstance(self.text, Text) else Text(self.text)
        lines = text.wrap(console, max(options.max_width - LABEL_WIDTH, 1))
        yield Text.assemble((label, STYLES.get(self.label, "bold")), Text("\n" + " " * LABEL_WIDTH).join(lines))


def summary(report: ConversionReport) -> Iterator[RenderableType]:
    """What was done, or would be, what was verified, and how the result is used."""
    options, lsg = report.options, report.lsg
    reads = f"{report.source_positions} positions" if report.absolute_positions else "relative positions"
    yield Fact("source", f"{options.initial_model}: {report.model_type}, {reads}")
    becomes = f"{report.architecture}, {report.positions} {'positions' if report.absolute_positions else 'tokens'}"
    yield Fact("would become" if options.dry_run else "converted to", becomes)
    sparsity, full = describe_sparsity(lsg), lsg["full_attention_length"]
    beyond = f"full up to {full} tokens, beyond: " if full else ""
    yield Fact("attention", f"{beyond}blocks of {lsg['block_size']}, {sparsity}, {lsg['num_global_tokens']} global")
    for change in report.changed:
        yield Fact("would change" if options.dry_run else "changed", change)
    for name in report.new_weights:
        yield Fact("new weights", name)
    for name in report.dropped_weights:
        yield Fact("left out", name)
    if report.left_out:
        yield Fact("not copied", ", ".join(report.left_out))
    for warning in report.warnings:
        yield Fact("warning", warning)
    for line in report.advice:
        yield Fact("advice", line)
    if options.dry_run:
        yield Text("nothing was written: this is a dry run")
        return
    for check in report.checks:
        yield Fact("verified", describe_check(check))
    if report.heads:
        yield from ("", table(report.heads), "")
    yield Fact("written", options.model_name)
    if report.pushed_to:
        yield Fact("pushed to", report.pushed_to)
    code = "\n".join(f"    {line}".rstrip() for line in usage(report, options.model_name).splitlines())
    yield from ("", Text("Use it with", style="bold"), "", Text(code, no_wrap=True, overflow="ignore"))


def describe_sparsity(lsg: dict[str, Any]) -> str:
    names = "num_global_tokens", "block_size", "sparse_block_size", "sparsity_factor", "sparsity_type"
    layout = LSGLayout.from_fields(*(lsg[name] for name in names))
    if not layout.sparse_block_size:
        return "no sparse keys"
    return f"{layout.sparse_block_size} sparse keys a side ({lsg['sparsity_type']}, factor {layout.sparsity_factor})"


def describe_check(check: Check) -> Text:
    figure = check.figure if check.seconds is None else f"{check.figure}, {check.seconds:.1f} s"
    return Text.assemble(check.name, " ", (f"({figure})", "cyan"))


def table(heads: list[HeadRun]) -> Table:
    """The heads that were run, with their lengths and seconds."""
    result = Table(box=None, pad_edge=False)
    for name in ("head", "dtype", "tokens", "forward", "tokens", "training"):
        result.add_column(name, justify="left" if name in ("head", "dtype") else "right", overflow="fold")
    for run in heads:
        result.add_row(
            run.auto_class,
            run.dtype,
            str(run.forward_tokens),
            f"{run.forward_s:.2f} s",
            str(run.training_tokens),
            f"{run.training_s:.2f} s",
        )
    return result
