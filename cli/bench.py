"""`edgekv bench`: how fast it is here, and against a peer in the same process."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgekv.cli.bench_quality import quality, repair
from edgekv.cli.bench_sessions import fairness, restore, switch
from edgekv.cli.lists import names, numbers, span
from edgekv.cli.options import BENCH_JSON_HELP, DEFAULT_MODEL, MODEL_HELP, fetching
from edgekv.cli.render import bar
from edgekv.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgekv.bench.report import Row, Watch
    from edgekv.bench.speed.scenarios import Scenario
    from edgekv.bench.workload import Workload
    from edgekv.cli.progress import DownloadProgress

bench_app = typer.Typer(
    help="Measure it here: speed, beside a peer or not; switching between sessions; fairness.",
    rich_markup_mode=None,
    no_args_is_help=True,
)
bench_app.command()(switch)
bench_app.command()(fairness)
bench_app.command()(restore)
bench_app.command()(quality)
bench_app.command()(repair)

_PEER_HELP = "Run mlx-lm in turn on the same weights, dtype and BLAS; needs edgekv[bench]."
_BAR_WIDTH = 24

_Model = Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP)]
_Peer = Annotated[str | None, typer.Option(help=_PEER_HELP)]
_Reps = Annotated[int, typer.Option(help="Runs that count, behind one warm-up.")]
_Json = Annotated[Path | None, typer.Option("--json", help=BENCH_JSON_HELP)]


@bench_app.command()
def ttft(
    prompt_tokens: Annotated[
        str, typer.Option(help="Prompt lengths, separated by commas.")
    ] = "128,512,1024",
    reps: _Reps = 5,
    model: _Model = DEFAULT_MODEL,
    peer: _Peer = None,
    prefill: Annotated[
        str, typer.Option(help="exact, predict, auto; separated by commas.")
    ] = "exact",
    predictor: Annotated[
        str | None, typer.Option(help="A KV predictor's file or name, for predict and auto.")
    ] = None,
    aux: Annotated[str | None, typer.Option(help="Its auxiliary model, if it needs one.")] = None,
    json: _Json = None,
) -> None:
    """Time to first token of one cold prompt at each length.

    Cold: nothing of the prompt is cached. warm: the same session's next request, whose context is
    in KV. ratio: the peer's TTFT to ours, median over pairs that run in turn. predict and auto are
    compared with exact in the same way, and shown with what they cost in quality.
    """
    from edgekv.bench.prediction.ttft import run_predicted
    from edgekv.bench.speed.scenarios import ttft_workloads
    from edgekv.config import PREFILL_MODES

    lengths = numbers("prompt-tokens", prompt_tokens)
    modes = names("prefill", prefill, PREFILL_MODES)
    workloads = ttft_workloads(lengths, reps=reps)
    others = [mode for mode in modes if mode != "exact"]
    if peer is not None and "exact" not in modes:
        raise ConfigError(
            "a peer is compared with exact prefill", hint="--prefill exact, or leave out --peer"
        )

    if not others and (predictor is not None or aux is not None):
        raise ConfigError(
            "--predictor and --aux are of predicted prefill",
            hint="--prefill exact,predict, or leave them out",
        )

    def predicted(progress: "DownloadProgress") -> "list[Row]":
        return run_predicted(
            model,
            workloads,
            others,  # type: ignore[arg-type]  # checked above
            predictor=predictor,
            aux=aux,
            progress=progress,
            watch=_announcer(progress),
        )

    exact = workloads if "exact" in modes else []
    _run("ttft", exact, model=model, peer=peer, target=json, then=predicted if others else None)


@bench_app.command()
def decode(
    sessions: Annotated[
        str | None, typer.Option(help="Numbers of sessions, separated by commas.  [1,2,4,8]")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Every session's prompt length.")] = 128,
    ragged: Annotated[
        str | None, typer.Option(help="LOW:HIGH spreads the prompt lengths evenly between these.")
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Prompt length of each session, separated by commas.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens per session and phase.")] = 64,
    reps: _Reps = 5,
    model: _Model = DEFAULT_MODEL,
    peer: _Peer = None,
    json: _Json = None,
) -> None:
    """Decode speed of sessions that run together, and their TTFT when all start at once.

    Each run has two phases. Cold: all prompts are submitted at once and every session generates
    NEW_TOKENS; this gives TTFT (earliest, median, latest session). Decode: with all contexts in
    KV, all sessions together generate NEW_TOKENS more; tok/s counts the tokens behind each
    session's first of this phase, from the first token of all to the last. The peer is held to the
    same definitions at the same context lengths: mlx-lm's generate_step for one session, its
    BatchGenerator for several. ratio: our tok/s to the peer's, median over pairs that run in turn.
    """
    from edgekv.bench.speed.scenarios import decode_workloads

    workloads = decode_workloads(
        sessions=None if sessions is None else numbers("sessions", sessions),
        ragged=None if ragged is None else span("ragged", ragged),
        lengths=None if lengths is None else numbers("lengths", lengths),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        reps=reps,
    )
    _run("decode", workloads, model=model, peer=peer, target=json)


def _run(
    scenario: "Scenario",
    workloads: "list[Workload]",
    *,
    model: str,
    peer: str | None,
    target: Path | None,
    then: "Callable[[DownloadProgress], list[Row]] | None" = None,
) -> None:
    """Measure and report; exit code 1 if a run failed.

    `then` measures further rows, of predicted prefill.
    """
    from edgekv.bench.report import check_target, machine, make_report, versions, write_report
    from edgekv.bench.speed.scenarios import run_scenario

    check_target(target)
    before = machine()
    with fetching() as progress:
        progress.announce(f"loading {model} …")
        rows = []
        if workloads:
            rows = run_scenario(
                scenario,
                model,
                workloads,
                peer=peer,
                progress=progress,
                watch=_announcer(progress),
            )
        predicted = [] if then is None else then(progress)
    if target is not None:
        write_report(make_report(before, versions(), [*rows, *predicted]), target)
    if target is None or str(target) != "-":
        _print(rows, predicted)
    rows += predicted
    for error in dict.fromkeys(error for row in rows for error in row["errors"]):
        print(f"warning: a run failed: {error}", file=sys.stderr)
    if any(row["failed"] for row in rows):
        raise typer.Exit(1)


def _print(rows: "list[Row]", predicted: "list[Row]") -> None:
    from edgekv.bench.speed.scenarios import print_table

    if rows:
        print_table(rows)
    if predicted:
        from edgekv.bench.prediction.ttft import print_predicted

        print_predicted(predicted)


def _announcer(progress: "DownloadProgress") -> "Watch":
    """Shows how many runs are done."""
    return lambda what, done, total: progress.announce(
        f"{what} {bar(done, total, _BAR_WIDTH)} {done}/{total}"
    )
