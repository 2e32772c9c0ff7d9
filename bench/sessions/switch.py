"""`bench switch`: the same conversations under several ways of switching between sessions.

FastSwitch's mechanisms one at a time (arXiv 2411.18424), as `edgekv bench switch --help` says. All
run in one process, one after the other, each with a fresh runtime and an empty store. Order and
preemption follow a trace of ranks (`trace`), and conversations and inputs are the same for all. The
load is a part of the machine's capacity, which is measured first (`load`), or a number of arrivals
a second that is given; from that one on, all conversations begin with nothing and are played to
their ends, however long that takes. Further repetitions draw other conversations; a ratio is then
the median over repetitions.
"""

import gc
import pathlib
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace

from edgekv.bench.report import Reporter, Row, Watch, unwatched
from edgekv.bench.scratch import NO_STORE, scratch_model
from edgekv.bench.sessions.load import TimeBudget
from edgekv.bench.sessions.slow_swap import TWINS
from edgekv.bench.sessions.switch_rows import RESIDENT, Run, make_rows
from edgekv.bench.sessions.switch_script import CLOSE_S, MODES, Script, ScriptWriter, SwitchOptions
from edgekv.bench.sessions.turns import Play, differences, num_ties
from edgekv.config import RuntimeConfig, StoreOptions, SwapOptions
from edgekv.models.cache import Progress
from edgekv.runtime import Runtime

_TIME_SHARE = 0.93  # of the minutes, less `_AROUND_S`: what comes before and after takes the rest
_AROUND_S = 8.0  # imports, comparing answers, drawing


def run_switch(
    model: str,
    options: SwitchOptions,
    *,
    progress: Progress | None = None,
    watch: Watch = unwatched,
) -> list[Row]:
    """Play the conversations under every policy; one row each, for every utilisation."""
    policies = (RESIDENT, *options.policies)
    absolute = options.arrivals_per_s is not None
    num_rows = len(policies) * options.reps * (1 if absolute else len(options.utilisations))
    runs: list[Run] = []
    with scratch_model(model, progress) as (path, scratch):
        limit_s = max(1.0, 60.0 * _TIME_SHARE * options.minutes - _AROUND_S)
        budget = TimeBudget(limit_s if options.limited else None)
        writer = ScriptWriter(
            path=path, options=options, budget=budget, num_rows=num_rows, watch=watch
        )
        for script in writer.write():
            together: list[Run] = []
            for policy in policies:
                row_s = budget.row_s(num_rows - len(runs) - len(together))
                end_s = None if row_s is None else time.monotonic() + row_s - CLOSE_S
                gc.collect()  # what the policy before left is not this one's
                with _open(path, scratch / policy, options, script, policy) as runtime:
                    together.append(_play(runtime, script, policy, end_s, watch))
                shutil.rmtree(scratch / policy, ignore_errors=True)
            _compare(together, path)
            runs += together
    head = {
        "scenario": "switch",
        "model": model,
        "trace": options.trace,
        "update_frequency": options.update_frequency,
        "turns_mean": options.turns_mean,
        "pool_fraction": options.pool_fraction,
        "seed": options.seed,
        "reps": options.reps,
    }
    return make_rows(head, runs)


def _open(
    path: pathlib.Path, folder: pathlib.Path, options: SwitchOptions, script: Script, policy: str
) -> Runtime:
    """A runtime that switches between sessions in one of the ways."""
    resident, twin = policy == RESIDENT, TWINS.get(policy)
    swap = SwapOptions(mode="reuse" if resident else MODES[policy])
    if twin is not None:
        swap = replace(swap, staging_bytes=0)
    config = RuntimeConfig(
        pool_bytes=script.whole_bytes if resident else script.pool_bytes,
        num_sessions_max=len(script.conversations),
        swap=swap,
        store=StoreOptions(folder=folder, disk_bytes=script.disk_bytes),
    )
    trace = options.trace_policy(len(script.conversations))
    return Runtime.open(str(path), config=config, policy=trace, swap_twin=twin)


def _play(runtime: Runtime, script: Script, policy: str, end_s: float | None, watch: Watch) -> Run:
    """Play a script, until `end_s` on the monotonic clock at most."""
    utilisation = script.facts["utilisation"]
    label = policy if utilisation is None else f"{policy} at {utilisation:g}"
    report = Reporter(watch, label, script.num_turns)
    play = Play(runtime, script.conversations, report.turn_done)
    play.recall()
    before = sum(runtime.counters().service_ms.values())
    for_ms = script.for_ms
    if for_ms is not None and end_s is not None:
        for_ms = min(for_ms, max(1e3, 1e3 * (end_s - time.monotonic())))
    played = play.run(for_ms=for_ms)
    runtime.check_integrity()
    counters = runtime.counters()
    return Run(
        policy=policy,
        facts=script.facts,
        played=played,
        busy_ms=sum(counters.service_ms.values()) - before,
        token_bytes=script.token_bytes,
        pool=runtime.pool_snapshot(),
        engine=counters,
        store=runtime.store_snapshot(),
    )


def _compare(runs: Sequence[Run], path: pathlib.Path) -> None:
    """Note in every run how its answers differ from those of the first."""
    found = [differences(runs[0].played, run.played) for run in runs]
    for run, differing in zip(runs, found, strict=True):
        run.num_differing = len(differing)
    if not any(found):
        return
    config = RuntimeConfig(swap=SwapOptions(mode="off"), store=NO_STORE)
    with Runtime.open(str(path), config=config) as runtime:
        for run, differing in zip(runs, found, strict=True):
            run.num_ties = num_ties(runtime, differing)
