"""`edgekv bench`: its commands, and those of one runtime's speed, beside a peer or not."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgekv.cli.bench_prediction import humaneval, quality, repair
from edgekv.cli.bench_run import Json, Lengths, Model, run_bench
from edgekv.cli.bench_serve import serve
from edgekv.cli.bench_sessions import disturb, fairness, restore, switch
from edgekv.cli.options import DEFAULT_MODEL, Aux, Predictor, names, numbers, span
from edgekv.errors import ConfigError

if TYPE_CHECKING:
    from edgekv.bench.report import Row

bench_app = typer.Typer(
    help="Measure it here: speed, beside a peer or not; sessions and apps; a server under load.",
    rich_markup_mode=None,
    no_args_is_help=True,
)

_TTFT_NEW_TOKENS = 16  # enough for a decode rate behind each prompt length
_PEER_HELP = (
    "mlx-lm: in turn on the same weights, dtype and BLAS; needs edgekv[bench]. all-rows: edgekv "
    "without its shortcut where layers share KV."
)

_Peer = Annotated[str | None, typer.Option(help=_PEER_HELP)]
_Reps = Annotated[int, typer.Option(help="Runs that count, behind one warm-up.")]


@bench_app.command()
def ttft(
    prompt_tokens: Lengths = "128,512,1024",
    reps: _Reps = 5,
    model: Model = DEFAULT_MODEL,
    peer: _Peer = None,
    prefill: Annotated[
        str, typer.Option(help="exact, predict, auto; separated by commas.")
    ] = "exact",
    predictor: Predictor = None,
    aux: Aux = None,
    json: Json = None,
) -> None:
    """Time to first token of one cold prompt at each length.

    Cold: nothing of the prompt is cached. warm: the same session's next request, whose context is
    in KV. ratio: the peer's TTFT to ours, median over pairs that run in turn. predict and auto are
    compared with exact in the same way, and shown with what they cost in quality.
    """
    from edgekv.bench.prediction.ttft import print_predicted, run_predicted
    from edgekv.bench.speed.scenarios import print_table, run_scenario
    from edgekv.bench.workload import Workload
    from edgekv.config import PREFILL_MODES

    lengths = numbers("prompt-tokens", prompt_tokens)
    modes = names("prefill", prefill, PREFILL_MODES)
    workloads = [Workload(lengths=(n,), new_tokens=_TTFT_NEW_TOKENS, reps=reps) for n in lengths]
    others = [mode for name in modes for mode in PREFILL_MODES if mode == name != "exact"]
    if peer is not None and "exact" not in modes:
        raise ConfigError(
            "a peer is compared with exact prefill", hint="--prefill exact, or leave out --peer"
        )
    if not others and (predictor is not None or aux is not None):
        raise ConfigError(
            "--predictor and --aux are of predicted prefill",
            hint="--prefill exact,predict, or leave them out",
        )

    def measure(**watchers: Any) -> "list[Row]":
        rows = []
        if "exact" in modes:
            rows += run_scenario("ttft", model, workloads, peer=peer, **watchers)
        if others:
            rows += run_predicted(
                model, workloads, others, predictor=predictor, aux=aux, **watchers
            )
        return rows

    def print_rows(rows: "Sequence[Row]") -> None:
        for predicted, show in ((False, print_table), (True, print_predicted)):
            if chosen := [row for row in rows if (row["prefill"] != "exact") == predicted]:
                show(chosen)

    run_bench(model, measure, print_rows, json=json)


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
    model: Model = DEFAULT_MODEL,
    peer: _Peer = None,
    json: Json = None,
) -> None:
    """Decode speed of sessions that run together, and their TTFT when all start at once.

    Each run has two phases. Cold: all prompts are submitted at once and every session generates
    NEW_TOKENS; this gives TTFT (earliest, median, latest session). Decode: with all contexts in
    KV, all sessions together generate NEW_TOKENS more; tok/s counts the tokens behind each
    session's first of this phase, from the first token of all to the last. The peer is held to the
    same definitions at the same context lengths: mlx-lm's generate_step for one session, its
    BatchGenerator for several. ratio: our tok/s to the peer's, median over pairs that run in turn.
    """
    from edgekv.bench.speed.scenarios import decode_workloads, print_table, run_scenario

    workloads = decode_workloads(
        sessions=None if sessions is None else numbers("sessions", sessions),
        ragged=None if ragged is None else span("ragged", ragged),
        lengths=None if lengths is None else numbers("lengths", lengths),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        reps=reps,
    )

    measure = partial(run_scenario, "decode", model, workloads, peer=peer)
    run_bench(model, measure, print_table, json=json)


for _command in (switch, fairness, restore, disturb, serve, quality, repair, humaneval):
    bench_app.command()(_command)
