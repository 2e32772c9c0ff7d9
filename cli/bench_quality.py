"""`edgekv bench quality`: what predicted KV costs in quality."""

from pathlib import Path
from typing import Annotated

import typer

from edgekv.cli.options import BENCH_JSON_HELP, DEFAULT_MODEL, MODEL_HELP, fetching
from edgekv.cli.render import bar

_BAR_WIDTH = 24


def quality(
    base: Annotated[str, typer.Option("--base", "-m", help=MODEL_HELP)] = DEFAULT_MODEL,
    predictor: Annotated[
        list[str] | None,
        typer.Option(help="A file, or the name of one that comes with edgekv; may be repeated."),
    ] = None,
    aux: Annotated[
        str | None, typer.Option(help="The predictors' auxiliary; alone, measure only that.")
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="A UTF-8 file; may be repeated. Python's own sources if none."),
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens that are prefilled.")] = 384,
    continuation: Annotated[int, typer.Option(help="Tokens forced through behind them.")] = 128,
    samples: Annotated[int, typer.Option(help="Pieces of text.")] = 16,
    sinks: Annotated[int, typer.Option(help="First tokens, always computed.")] = 4,
    window: Annotated[int, typer.Option(help="Last tokens, always computed.")] = 32,
    json: Annotated[Path | None, typer.Option("--json", help=BENCH_JSON_HELP)] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write quality against FLOPs and time to this picture.")
    ] = None,
) -> None:
    """What predicted KV costs in quality, beside exact, truncated and missing context.

    text: the continuation is what follows. copy: it repeats a passage that ended
    180 tokens back (recall).
    nll: nats a token; agree: likeliest tokens as with exact KV. needle: a code stated in the first
    tenth and asked for at the end. FLOPs: of the prefill, to exact. ms: of the
    prefill, to the first logits. recovered: of the loss against truncation at equal FLOPs.
    """
    from edgekv.bench.machine import machine, versions
    from edgekv.bench.plot import check_plot
    from edgekv.bench.quality import run_quality
    from edgekv.bench.quality_table import plot_rows, print_rows
    from edgekv.bench.quality_text import QualityOptions
    from edgekv.bench.quality_ways import open_subjects
    from edgekv.bench.report import check_target, make_report, write_report

    check_target(json)
    check_plot(plot)
    options = QualityOptions(
        context=context,
        continuation=continuation,
        samples=samples,
        sinks=sinks,
        window=window,
        texts=tuple(text or ()),
    )
    before = machine()
    with fetching() as progress:
        progress.announce(f"loading {base} …")
        model, subjects = open_subjects(base, predictor or (), aux, progress)
        rows = run_quality(
            model,
            subjects,
            options,
            lambda what, done, total: progress.announce(
                f"{what} {bar(done, total, _BAR_WIDTH)} {done}/{total} samples"
            ),
        )
    if json is not None:
        write_report(make_report(before, versions(), rows), json)
    if json is None or str(json) != "-":
        print_rows(rows)
    if plot is not None:
        plot_rows(rows, plot)
