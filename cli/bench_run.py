"""What every benchmark's command does around its measurement, and the options that they share."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgekv.cli.options import MODEL_HELP, fetching
from edgekv.cli.streams import stdout_is_closed
from edgekv.errors import ConfigError

if TYPE_CHECKING:
    from edgekv.bench.report import Row

_JSON_HELP = "Write the report with raw samples to this file; - writes it to stdout."
_PLOT_HELP = "Draw this .png file too; needs edgekv[bench]."
_SYNTHETIC_HELP = f"{MODEL_HELP[:-1]}; synthetic is a random one with the KV of a 1B model."

Model = Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP)]
ModelOrSynthetic = Annotated[str, typer.Option("--model", "-m", help=_SYNTHETIC_HELP)]
Json = Annotated[Path | None, typer.Option("--json", help=_JSON_HELP)]
Plot = Annotated[Path | None, typer.Option(help=_PLOT_HELP)]
Seed = Annotated[int, typer.Option(help="Same seed, same workload.")]
Lengths = Annotated[str, typer.Option(help="Prompt lengths, separated by commas.")]
Pairs = Annotated[int, typer.Option(help="Pairs that count, behind one warm-up.")]


def run_bench(
    model: str,
    measure: "Callable[..., list[Row]]",
    print_rows: "Callable[[Sequence[Row]], None]",
    *,
    json: Path | None,
    plot: Path | None = None,
    draw: "Callable[[Sequence[Row], Path], None] | None" = None,
    wrong: "Callable[[Sequence[Row]], list[str]]" = lambda _: [],
) -> None:
    """Check where reports go, measure, write, print, draw, and say what went wrong.

    `measure` makes all rows; it takes `progress` and `watch`, see `edgekv.bench.sessions`. `wrong`
    says what is wrong with them beside requests that failed. Raises Exit with code 1 if so.
    """
    from edgekv.bench.plot import check_plot
    from edgekv.bench.report import check_target, machine, write_report

    check_target(json)
    check_plot(plot)
    if json is None and stdout_is_closed():  # minutes before it would be noticed
        raise ConfigError("stdout is closed", hint="--json FILE writes the report to a file")
    before = machine()
    with fetching() as progress:
        progress.announce(f"loading {model} …")
        rows = measure(progress=progress, watch=progress.watch)
    if json is not None:
        write_report(before, rows, json)
    if json is None or str(json) != "-":
        print_rows(rows)
    if plot is not None and draw is not None:
        draw(rows, plot)
    faults = wrong(rows)
    for warning in (*_failures(rows), *faults):
        print(f"warning: {warning}", file=sys.stderr)
    if faults or any(row.get("failed") for row in rows):
        raise typer.Exit(1)


def _failures(rows: "Sequence[Row]") -> list[str]:
    """Each error once, with the policy under which it came if there are several."""
    found = []
    for row in rows:
        who = f"{row['policy']}: a request failed" if "policy" in row else "a run failed"
        found += [f"{who}: {error}" for error in row.get("errors", ())]
    return list(dict.fromkeys(found))
