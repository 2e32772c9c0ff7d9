"""`edgekv bench serve`: load over sockets, on a server of edgekv's and on any other."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from edgekv.cli.bench_run import Json, Model, Plot, Seed, run_bench
from edgekv.cli.options import DEFAULT_MODEL, names
from edgekv.errors import ConfigError

_KINDS = ("openai",)
_PEERS = ("mlx-lm",)
_DURATION_S, _DURATION_QUICK_S = 60.0, 10.0


def serve(
    apps: Annotated[
        Path | None,
        typer.Option(help="A TOML or JSON file that says what apps send.  [two usual workloads]"),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(help="Requests a second of all apps, instead of --utilisation."),
    ] = None,
    utilisation: Annotated[
        float | None,
        typer.Option(help="Load, as a part of what the first target can do.  [0.6]"),
    ] = None,
    duration: Annotated[
        float | None,
        typer.Option(help="Seconds for each workload and target.  [60, --quick 10]"),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A first look, in two minutes.")] = False,
    target: Annotated[
        list[str] | None,
        typer.Option(help="NAME=URL[#MODEL] of a server that runs; may be repeated."),
    ] = None,
    kind: Annotated[str, typer.Option(help="What the targets speak: openai.")] = "openai",
    peer: Annotated[
        str | None,
        typer.Option(help="Start this one too, on the same weights: mlx-lm; needs edgekv[bench]."),
    ] = None,
    pool_fraction: Annotated[
        float,
        typer.Option(
            help="KV memory of a server that is started, as a fraction of what the open "
            "conversations' KV takes."
        ),
    ] = 0.25,
    seed: Seed = 0,
    model: Model = DEFAULT_MODEL,
    json: Json = None,
    plot: Plot = None,
) -> None:
    """Apps that send their requests at their times, whether earlier ones are answered or not.

    Without --target `edgekv serve` is started with a state of its own. All targets are sent the
    same texts at the same times, in turn; what is sent, and how much, follows from what the first
    one can do. The usual workloads are prefill, short requests beside long prompts of another app,
    and turns, conversations whose KV is more than memory holds. Times are those that a client sees:
    to the response's headers, to its opening event, to its first text, between texts. good:
    answered whole, its first token within 5 times what it took alone at the first target. Ratios
    above 1 are in the first target's favour. Exit code 1 if an answer failed or was not whole.

    A file lists apps, each with a name and perhaps key, class, kind and share (of the requests a
    second). Of kind requests: prompt_tokens and output_tokens, a number or [low, high]. Of kind
    conversations: users, turns and session_tokens; think times are what the rate leaves.
    """
    from edgekv.bench.serving.client import parse_target
    from edgekv.bench.serving.rows import draw_rows, print_rows
    from edgekv.bench.serving.serve import ServeOptions, run_serve
    from edgekv.bench.serving.traffic import read_scenario

    names("kind", kind, _KINDS)
    if peer is not None:
        names("peer", peer, _PEERS)
    if rate is not None and utilisation is not None:
        raise ConfigError("--rate is instead of --utilisation", hint="leave out one")
    usual_s = _DURATION_QUICK_S if quick else _DURATION_S
    options = ServeOptions(
        scenario=None if apps is None else read_scenario(apps),
        targets=tuple(map(parse_target, target or ())),
        peer=peer,
        rate=rate,
        utilisation=0.6 if utilisation is None else utilisation,
        duration_s=usual_s if duration is None else duration,
        pool_fraction=pool_fraction,
        seed=seed,
    )
    measure = partial(run_serve, model, options)
    run_bench(model, measure, print_rows, json=json, plot=plot, draw=draw_rows)
