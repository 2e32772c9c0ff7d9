"""`edgekv bench switch`, `fairness` and `restore`: many sessions, several apps, KV on disk."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgekv.cli.lists import names, numbers
from edgekv.cli.options import BENCH_JSON_HELP, DEFAULT_MODEL, MODEL_HELP, fetching
from edgekv.cli.progress import DownloadProgress
from edgekv.cli.render import bar

if TYPE_CHECKING:
    from edgekv.bench.report import Row

_BAR_WIDTH = 24
_SWITCH_POLICIES = "recompute,naive,groups,async,reuse"
_FAIRNESS_POLICIES = "fcfs,fair"
_MODEL_HELP = f"{MODEL_HELP[:-1]}; synthetic is a random one with the KV of a 1B model."
_PLOT_HELP = "Draw this .png file too; needs edgekv[bench]."

_Model = Annotated[str, typer.Option("--model", "-m", help=_MODEL_HELP)]
_Seed = Annotated[int, typer.Option(help="Same seed, same workload.")]
_Json = Annotated[Path | None, typer.Option("--json", help=BENCH_JSON_HELP)]
_Plot = Annotated[Path | None, typer.Option(help=_PLOT_HELP)]

Watch = Callable[[str, int, int], None]
Measure = Callable[[DownloadProgress, Watch], "list[Row]"]


def switch(
    policy: Annotated[
        str, typer.Option(help="Ways to switch, separated by commas, in the order they run.")
    ] = _SWITCH_POLICIES,
    sessions: Annotated[int, typer.Option(help="Conversations, one session each.")] = 64,
    turns: Annotated[float, typer.Option(help="Mean number of turns of a conversation.")] = 5.5,
    session_tokens: Annotated[
        int | None,
        typer.Option(
            help="Mean tokens of a conversation; lengths are scaled to it. A quarter of the "
            "model's context by default."
        ),
    ] = None,
    pool_fraction: Annotated[
        float, typer.Option(help="KV pool, as a fraction of what all sessions' KV takes.")
    ] = 0.25,
    trace: Annotated[str, typer.Option(help="How priorities change: random or markov.")] = "random",
    update_frequency: Annotated[
        float, typer.Option(help="Changes of priorities per engine step.")
    ] = 0.04,
    arrivals_per_s: Annotated[
        float, typer.Option(help="Conversations that start per second (Poisson).")
    ] = 1.0,
    think_scale: Annotated[
        float, typer.Option(help="Think times, as a fraction of the published ones.")
    ] = 0.01,
    seed: _Seed = 0,
    model: _Model = DEFAULT_MODEL,
    json: _Json = None,
    plot: _Plot = None,
) -> None:
    """Conversations whose KV exceeds memory, under several ways of switching between them.

    recompute: a preempted session computes its KV again. naive: one call per 16-token block,
    layer and k|v, synchronous, everything each time; an analogue of swapping in vLLM 0.3.3. groups:
    one vectored call for a whole range. async: and on I/O threads. reuse: and only what is new,
    written behind the decode; this is what edgekv does. All play the same seeded conversations
    (turns as in ShareGPT, lengths and think times drawn from published quantiles) with priorities
    that change by the same trace, as in FastSwitch. Ratios above 1 are in the row's favour. Exit
    code 1 if a request failed, or if answers depend on the policy.
    """
    from edgekv.bench.sessions.conversations import ConversationShape
    from edgekv.bench.sessions.switch import MODES, SwitchOptions, run_switch
    from edgekv.bench.sessions.switch_rows import print_rows

    options = SwitchOptions(
        policies=names("policy", policy, tuple(MODES)),
        session_tokens=session_tokens,
        shape=ConversationShape(
            num_sessions=sessions,
            turns_mean=turns,
            arrivals_per_s=arrivals_per_s,
            think_scale=think_scale,
            seed=seed,
        ),
        pool_fraction=pool_fraction,
        trace=trace,
        update_frequency=update_frequency,
    )
    rows = measure(
        model,
        lambda progress, watch: run_switch(model, options, progress=progress, watch=watch),
        print_rows,
        json,
        plot,
    )
    if plot is not None:
        _plot_tails(plot, f"bench switch · {model} · {trace} trace", rows, ("policy",))
    for row in rows:
        for error in dict.fromkeys(row["errors"]):
            print(f"warning: {row['policy']}: a request failed: {error}", file=sys.stderr)
        if row["sessions_differing"]:
            print(
                f"warning: {row['policy']}: {row['sessions_differing']} sessions answer otherwise "
                f"than under {rows[0]['policy']}; in {row['sessions_differing_by_a_tie']} of them "
                "two tokens were equally likely",
                file=sys.stderr,
            )
    if any(row["failed"] or row["sessions_differing"] for row in rows):
        raise typer.Exit(1)


def fairness(
    policy: Annotated[
        str, typer.Option(help="Scheduling policies, separated by commas, in the order they run.")
    ] = _FAIRNESS_POLICIES,
    seconds: Annotated[
        float, typer.Option(help="For each mix and policy, and for each app alone.")
    ] = 60.0,
    seed: _Seed = 0,
    model: _Model = DEFAULT_MODEL,
    json: _Json = None,
    plot: _Plot = None,
) -> None:
    """Apps that want more than there is, under each scheduling policy and alone.

    classes: an interactive app with short prompts beside a background app that keeps 8 long
    prompts queued. equals: three apps of equal weight and unequal demand. A request that is not
    answered when time is up counts with the time it has waited. share: of the service (engine
    milliseconds) while all apps are backlogged. service difference: VTC's, the most that two
    backlogged apps' service by weight differs in any window.
    """
    from edgekv.bench.sessions.fairness import FairnessOptions, print_rows, run_fairness
    from edgekv.config import POLICIES

    chosen = names("policy", policy, POLICIES)
    options = FairnessOptions(
        policies=tuple(p for name in chosen for p in POLICIES if p == name),
        seconds=seconds,
        seed=seed,
    )
    rows = measure(
        model,
        lambda progress, watch: run_fairness(model, options, progress=progress, watch=watch),
        print_rows,
        json,
        plot,
    )
    if plot is not None:
        _plot_tails(plot, f"bench fairness · {model}", rows, ("app", "policy"))


def restore(
    tokens: Annotated[
        str, typer.Option(help="Lengths of sessions, separated by commas.")
    ] = "512,2048,8192",
    reps: Annotated[int, typer.Option(help="Repetitions, each with a new store.")] = 3,
    model: _Model = DEFAULT_MODEL,
    json: _Json = None,
    plot: _Plot = None,
) -> None:
    """Time to first token of a turn whose session is in memory, on disk, or nowhere.

    resident: in memory. swapped: on disk alone. restarted: the same in a new process. recompute:
    nothing is cached. Ratios are medians of recompute's TTFT to the other's, pair by pair. Where
    the system can (Linux), files are dropped from the page cache before they are read.
    """
    from edgekv.bench.plot import plot_lines
    from edgekv.bench.sessions.restore import MODES, check_tokens, print_rows, run_restore

    lengths = numbers("tokens", tokens)
    check_tokens(lengths)
    rows = measure(
        model,
        lambda progress, watch: run_restore(
            model, lengths, reps=reps, progress=progress, watch=watch
        ),
        print_rows,
        json,
        plot,
    )
    if plot is not None:
        lines = {mode: [(row["tokens"], row[f"ttft_ms_{mode}"]) for row in rows] for mode in MODES}
        plot_lines(plot, f"bench restore · {model}", "tokens", "TTFT, ms", lines)
    if any(row["answers_differing"] for row in rows):
        print("warning: answers from restored KV differ", file=sys.stderr)
        raise typer.Exit(1)


def measure(
    model: str,
    run: Measure,
    print_rows: "Callable[[Sequence[Row]], None]",
    target: Path | None,
    plot: Path | None,
) -> "list[Row]":
    """Check where reports go, run, write and print; return the rows."""
    from edgekv.bench.plot import check_plot
    from edgekv.bench.report import check_target, machine, make_report, versions, write_report

    check_target(target)
    check_plot(plot)
    before = machine()
    with fetching() as progress:
        progress.announce(f"loading {model} …")
        rows = run(
            progress,
            lambda what, done, total: progress.announce(
                f"{what} {bar(done, total, _BAR_WIDTH)} {done}/{total}"
            ),
        )
    if target is not None:
        write_report(make_report(before, versions(), rows), target)
    if target is None or str(target) != "-":
        print_rows(rows)
    return rows


def _plot_tails(target: Path, title: str, rows: "Sequence[Row]", labels: tuple[str, ...]) -> None:
    """CDFs of TTFT and TBT, one curve a row."""
    from edgekv.bench.plot import plot_cdfs

    panels = {
        name: {" ".join(row[label] for label in labels): row["samples"][key] for row in rows}
        for name, key in (("TTFT, ms", "ttft_ms"), ("time between tokens, ms", "tbt_ms"))
    }
    plot_cdfs(target, title, panels)
