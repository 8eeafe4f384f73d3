"""`lsg-tune`: its flags, and what a person reads of the result."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from .cli import OutputOptions, Parser, guarded, show_all, shown_steps
from .options import TuneOptions


if TYPE_CHECKING:
    from .tune import Tuning


class TuneParser(Parser):
    kinds = (TuneOptions, OutputOptions)
    command = "lsg-tune"
    needed = "--initial_model NAME --texts FOLDER"
    purpose = "Try settings of a conversion on your model and your texts, without labels, and choose one."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command on `arguments`, or those of the process; the exit code is as that of `lsg-convert`."""
    return guarded(arguments, TuneParser, run, lambda result: show_all(summary(result)))


def run(options: TuneOptions, output: OutputOptions, errors: Console) -> "Tuning":
    """Tune, with the steps shown on `errors`."""
    from .tune import tune

    with shown_steps(output, errors) as announce:
        return tune(options, announce)


def summary(result: "Tuning") -> Iterator[RenderableType]:
    """The table, what is missing of it, and the line to convert with."""
    texts = len(result.rows[0].values)
    yield Text(f"{result.measured}; {texts} text{'s' * (texts != 1)}\n")
    yield table(result)
    yield ""
    if result.not_reached:
        yield Text(f"not reached in time: {'; '.join(result.not_reached)}")
    for name, reason in result.left_out.items():
        yield Text(f"left out: {name}: {reason}")
    yield Text(
        f"= marks what these texts cannot tell from the best; the first of them is {result.best}. Convert with\n"
    )
    yield Text(f"    {result.command}", no_wrap=True, overflow="ignore")


def table(result: "Tuning") -> Table:
    """Each row's metrics, its seconds for a text, and these as a share of full attention's."""
    shown = Table(box=None, pad_edge=False)
    shown.add_column("setting", overflow="fold")
    for name in (*result.metrics, "", "seconds", "of full"):
        shown.add_column(name, justify="right")
    full = next(row.seconds for row in result.rows if row.name == "full attention")
    for row in result.rows:
        mark = "=" if row.setting is not None and row.name not in result.told_apart else ""
        metrics = [f"{row.metrics[name]:.4f}" for name in result.metrics]
        shown.add_row(row.name, *metrics, mark, f"{row.seconds:.3f}", f"{row.seconds / full:.2f}")
    return shown
