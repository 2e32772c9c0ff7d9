"""`edgekv bench switch`, `fairness`, `restore` and `disturb`: many sessions, apps, KV on disk."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgekv.cli.bench_run import Json, ModelOrSynthetic, Pairs, Plot, Seed, run_bench
from edgekv.cli.options import DEFAULT_MODEL, names, numbers, parts
from edgekv.errors import ConfigError

if TYPE_CHECKING:
    from edgekv.bench.report import Row

_SWITCH_POLICIES = "recompute,naive,groups,async,reuse"
_SWITCH_POLICIES_QUICK = "naive,reuse"
_FAIRNESS_POLICIES = "fcfs,fair"

_Minutes = Annotated[
    float | None,
    typer.Option(help="For the whole run; the load is sized to fit.  [8, --quick 2]"),
]
_Quick = Annotated[bool, typer.Option("--quick", help="A first look, in two minutes.")]
_Ways = Annotated[
    str | None,
    typer.Option(
        help="Ways to switch, separated by commas, in the order they run.  "
        f"[{_SWITCH_POLICIES}, --quick {_SWITCH_POLICIES_QUICK}]"
    ),
]
_Utilisation = Annotated[
    str,
    typer.Option(
        help="Load, as a part of the capacity that is measured first; several, separated by "
        "commas, give a set of rows each."
    ),
]
_RowTurns = Annotated[
    int | None,
    typer.Option(help="Turns a row, however long they take; for claims, ask for 400 and more."),
]
_Repetitions = Annotated[
    int, typer.Option(help="Repetitions, each with other conversations, policies in turn.")
]
_Open = Annotated[
    int | None,
    typer.Option(help="Conversations that are open at a time.  [as many as fit the time]"),
]
_Turns = Annotated[float, typer.Option(help="Mean number of turns of a conversation.")]
_SessionTokens = Annotated[
    int | None,
    typer.Option(
        help="Mean tokens of a conversation; lengths are scaled to it. A quarter of the "
        "model's context by default, or less where the time is short."
    ),
]
_PoolFraction = Annotated[
    float, typer.Option(help="KV pool, as a fraction of what the open sessions' KV takes.")
]
_Trace = Annotated[str, typer.Option(help="How priorities change: random or markov.")]
_UpdateFrequency = Annotated[float, typer.Option(help="Changes of priorities per engine step.")]
_ArrivalsPerS = Annotated[
    float | None,
    typer.Option(
        help="Conversations that start per second (Poisson), instead of --utilisation: no "
        "capacity is measured, --sessions (64) are all there are, the pool is a fraction of "
        "their ends, and all are played to the end."
    ),
]
_ThinkScale = Annotated[
    float | None,
    typer.Option(
        help="Think times, as a fraction of the published ones.  [what the load leaves; 0.01 "
        "with --arrivals-per-s]"
    ),
]


def switch(
    policy: _Ways = None,
    utilisation: _Utilisation = "0.6",
    minutes: _Minutes = None,
    quick: _Quick = False,
    row_turns: _RowTurns = None,
    reps: _Repetitions = 1,
    sessions: _Open = None,
    turns: _Turns = 5.5,
    session_tokens: _SessionTokens = None,
    pool_fraction: _PoolFraction = 0.25,
    trace: _Trace = "random",
    update_frequency: _UpdateFrequency = 0.04,
    arrivals_per_s: _ArrivalsPerS = None,
    think_scale: _ThinkScale = None,
    seed: Seed = 0,
    model: ModelOrSynthetic = DEFAULT_MODEL,
    json: Json = None,
    plot: Plot = None,
) -> None:
    """Conversations whose KV exceeds memory, under several ways of switching between them.

    resident: all in memory, the limit; always played. recompute: a preempted session computes its
    KV again. naive: one call per 16-token block, layer and k|v, synchronous, everything each time;
    an analogue of swapping in vLLM 0.3.3. groups: one vectored call for a whole range. async: and
    on I/O threads. reuse: and only what is new, written behind the decode; this is what edgekv
    does. All play the same seeded conversations (turns as in ShareGPT, lengths and think times
    drawn from published quantiles) with priorities that change by the same trace, as in FastSwitch.
    busy: service to elapsed time. A turn that is not answered when a row's time is up counts with
    the time it has waited. Ratios above 1 are in the row's favour, but to resident 1 is the limit.
    --plot draws distributions, or with several utilisations TTFT p95 over them. Exit code 1 if a
    request failed, or if answers depend on the policy.
    """
    from edgekv.bench.sessions.switch import run_switch
    from edgekv.bench.sessions.switch_rows import draw_rows, print_rows
    from edgekv.bench.sessions.switch_script import MODES, SwitchOptions

    _check_end(quick or minutes is not None, row_turns, arrivals_per_s)
    usual = _SWITCH_POLICIES_QUICK if quick else _SWITCH_POLICIES
    options = SwitchOptions(
        policies=names("policy", usual if policy is None else policy, tuple(MODES)),
        utilisations=parts("utilisation", utilisation),
        minutes=_minutes(minutes, quick),
        row_turns=row_turns,
        arrivals_per_s=arrivals_per_s,
        reps=reps,
        sessions=sessions,
        turns_mean=turns,
        session_tokens=session_tokens,
        think_scale=think_scale,
        pool_fraction=pool_fraction,
        trace=trace,
        update_frequency=update_frequency,
        seed=seed,
    )
    measure = partial(run_switch, model, options)
    run_bench(model, measure, print_rows, json=json, plot=plot, draw=draw_rows, wrong=_differing)


def _check_end(limit_given: bool, row_turns: int | None, arrivals_per_s: float | None) -> None:
    """Make sure that one thing ends a run. Raises ConfigError."""
    if limit_given and (row_turns is not None or arrivals_per_s is not None):
        raise ConfigError(
            "--minutes and --quick end a run that --row-turns or --arrivals-per-s would play on",
            hint="leave out one of them",
        )
    if row_turns is not None and arrivals_per_s is not None:
        raise ConfigError(
            "--row-turns is of a part of the capacity, --arrivals-per-s is not",
            hint="leave out one of them",
        )


def _differing(rows: "Sequence[Row]") -> list[str]:
    return [
        f"{row['policy']}: {row['sessions_differing']} sessions answer otherwise "
        f"than under {rows[0]['policy']}; in {row['sessions_differing_by_a_tie']} of them "
        "two tokens were equally likely"
        for row in rows
        if row["sessions_differing"]
    ]


def _minutes(minutes: float | None, quick: bool) -> float:
    return minutes if minutes is not None else 2.0 if quick else 8.0


def fairness(
    policy: Annotated[
        str, typer.Option(help="Scheduling policies, separated by commas, in the order they run.")
    ] = _FAIRNESS_POLICIES,
    minutes: _Minutes = None,
    quick: _Quick = False,
    seconds: Annotated[
        float | None,
        typer.Option(
            help="For each mix and policy, and for each app alone, instead of --minutes; for "
            "claims, ask for 60 and more."
        ),
    ] = None,
    seed: Seed = 0,
    model: ModelOrSynthetic = DEFAULT_MODEL,
    json: Json = None,
    plot: Plot = None,
) -> None:
    """Apps that want more than there is, under each scheduling policy and alone.

    classes: an interactive app with short prompts beside a background app that keeps 8 long
    prompts queued. equals: three apps of equal weight and unequal demand. Pauses and prompts are in
    units of a prefill that is measured first. A request that is not
    answered when time is up counts with the time it has waited. share: of the service (engine
    milliseconds) while all apps are backlogged. service difference: VTC's, the most that two
    backlogged apps' service by weight differs in any window.
    """
    from edgekv.bench.plot import draw_tails
    from edgekv.bench.sessions.fairness import FairnessOptions, print_rows, run_fairness
    from edgekv.config import POLICIES

    if seconds is not None and (quick or minutes is not None):
        raise ConfigError("--seconds is instead of --minutes and --quick", hint="leave out one")
    options = FairnessOptions(
        policies=names("policy", policy, POLICIES),
        minutes=_minutes(minutes, quick),
        seconds=seconds,
        seed=seed,
    )

    def draw(rows: "Sequence[Row]", target: Path) -> None:
        draw_tails(target, f"bench fairness · {model}", rows, ("app", "policy"))

    measure = partial(run_fairness, model, options)
    run_bench(model, measure, print_rows, json=json, plot=plot, draw=draw)


def restore(
    tokens: Annotated[
        str, typer.Option(help="Lengths of sessions, separated by commas.")
    ] = "512,2048,8192",
    reps: Annotated[int, typer.Option(help="Repetitions, each with a new store.")] = 3,
    model: ModelOrSynthetic = DEFAULT_MODEL,
    json: Json = None,
    plot: Plot = None,
) -> None:
    """Time to first token of a turn whose session is in memory, on disk, or nowhere.

    resident: in memory. swapped: on disk alone. restarted: the same in a new process. recompute:
    nothing is cached. Ratios are medians of recompute's TTFT to the other's, pair by pair. Where
    the system can (Linux), files are dropped from the page cache before they are read.
    """
    from edgekv.bench.sessions.restore import draw_rows, print_rows, run_restore

    def differing(rows: "Sequence[Row]") -> list[str]:
        differs = any(row["answers_differing"] for row in rows)
        return ["answers from restored KV differ"] if differs else []

    measure = partial(run_restore, model, numbers("tokens", tokens), reps=reps)
    run_bench(model, measure, print_rows, json=json, plot=plot, draw=draw_rows, wrong=differing)


def disturb(
    reps: Pairs = 3,
    new_tokens: Annotated[int, typer.Option(help="Tokens of every stream.")] = 64,
    evaluated_tokens: Annotated[
        int, typer.Option(help="Tokens of the text whose logits are asked for.")
    ] = 2000,
    waiting: Annotated[
        int, typer.Option(help="Requests of one app that wait in the second row; 0 for no such.")
    ] = 1000,
    model: ModelOrSynthetic = DEFAULT_MODEL,
    json: Json = None,
) -> None:
    """Gaps of a stream while its runtime is asked for everything else, beside those alone.

    Meanwhile other threads register an app, open and close a session and suspend others in a loop,
    and ask for the logits of a long text; in a second row one app, its limits lifted, has a
    thousand requests waiting, and a thread looks up ten thousand names. allowed: the larger of 1.5
    times alone and 1.1 times the target for the time between tokens. Exit code 1 if the gaps were
    longer.
    """
    from edgekv.bench.sessions.disturb import print_rows, run_disturb

    def longer(rows: "Sequence[Row]") -> list[str]:
        return [
            f"a gap of {row['gap_ms_p95_disturbed']:.0f} ms (p95) is more than the "
            f"{row['allowed_ms']:.0f} ms that are allowed"
            for row in rows
            if not row["within"]
        ]

    measure = partial(
        run_disturb,
        model,
        reps=reps,
        new_tokens=new_tokens,
        evaluated_tokens=evaluated_tokens,
        num_waiting=waiting,
    )
    run_bench(model, measure, print_rows, json=json, wrong=longer)
