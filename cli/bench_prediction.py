"""`edgekv bench quality` and `repair`: what predicted KV costs."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgekv.cli.bench_run import Json, Lengths, Model, Pairs, run_bench
from edgekv.cli.options import DEFAULT_MODEL, MODEL_HELP, Aux, Predictor, numbers
from edgekv.cli.progress import DownloadProgress

if TYPE_CHECKING:
    from edgekv.bench.report import Row, Watch


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
    json: Json = None,
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
    from edgekv.bench.prediction.quality import plot_rows, print_rows, run_quality
    from edgekv.bench.prediction.quality_text import QualityOptions
    from edgekv.bench.prediction.quality_ways import open_subjects

    options = QualityOptions(
        context=context,
        continuation=continuation,
        samples=samples,
        sinks=sinks,
        window=window,
        texts=tuple(text or ()),
    )

    def measure(progress: DownloadProgress, watch: "Watch") -> "list[Row]":
        opened, subjects = open_subjects(base, predictor or (), aux, progress)
        return run_quality(opened, subjects, options, watch)

    run_bench(base, measure, print_rows, json=json, plot=plot, draw=plot_rows)


def repair(
    prompt_tokens: Lengths = "512",
    new_tokens: Annotated[int, typer.Option(help="Tokens of every answer.")] = 128,
    reps: Pairs = 6,
    model: Model = DEFAULT_MODEL,
    predictor: Predictor = None,
    aux: Aux = None,
    mode: Annotated[str, typer.Option("--repair", help="idle or eager.")] = "idle",
    json: Json = None,
) -> None:
    """What repairing predicted KV behind an answer costs that answer.

    caught up: answers that were all exact before their end. behind: how many of an answer's own
    tokens had to be replaced until then, at most. agreement: of the tokens said before that, the
    part that exact KV would have said. tok/s: of the whole answer. ratio: to an answer's over exact
    KV, run in turn, median over pairs; least: of the worst pair.
    """
    from edgekv.bench.prediction.repair import print_repair, run_repair
    from edgekv.bench.workload import Workload

    lengths = numbers("prompt-tokens", prompt_tokens)
    workloads = [Workload(lengths=(n,), new_tokens=new_tokens, reps=reps) for n in lengths]

    measure = partial(run_repair, model, workloads, predictor=predictor, aux=aux, repair=mode)
    run_bench(model, measure, print_repair, json=json)
