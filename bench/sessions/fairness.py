"""`bench fairness`: apps that want more than there is, under each scheduling policy.

The mixes of `mixes`, each played for the same time under every policy, and each app of them alone.
The load is in units of a prefill that is measured first, of a prompt as long as those of the
background app are on average: the interactive user thinks for half of it, and a phase lasts for
`PHASE_UNITS` of them. Where 1024 tokens take longer than that, all prompts are made shorter by one
factor. So the queue, the questions and the answers of a phase are as many on a machine that is half
as fast, and the time that all phases take is what was given.
"""

import math
import pathlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

from edgekv.bench.figures import budget_figures, latency_ratio, ratio
from edgekv.bench.report import Columns, Row, Watch, print_columns, unwatched
from edgekv.bench.scratch import layout_of, scratch_model
from edgekv.bench.sessions.drive import (
    Asked,
    Driver,
    latencies,
    latency_samples,
    num_unanswered,
)
from edgekv.bench.sessions.load import TimeBudget
from edgekv.bench.sessions.mixes import Mix, make_mixes, measure_unit, users
from edgekv.bench.sessions.shares import Moment, shares_of
from edgekv.bench.workload import TextIds
from edgekv.config import RuntimeConfig, StoreOptions, check_float, check_int
from edgekv.models.cache import Progress
from edgekv.runtime import Runtime

ALONE = "alone"
_TIME_SHARE = 0.93  # of the minutes, that is planned
_PHASE_S_MIN = 0.5
_BACKLOGGED_MS_MIN = 2500.0  # ten of the scheduler's quanta: less says nothing of shares
_WINDOWS = 6  # windows of the service difference are this part of the run


@dataclass(frozen=True, kw_only=True)
class FairnessOptions:
    """What is run."""

    policies: tuple[str, ...]  # in the order in which they run
    minutes: float = 8.0  # for the whole run, from when the model is there
    # For each mix and policy, and for each app alone, instead of `minutes`.
    seconds: float | None = None
    seed: int = 0  # same seed, same prompts and thinking times

    def __post_init__(self) -> None:
        check_float("minutes", self.minutes, 0.05, 10_000.0)
        if self.seconds is not None:
            check_float("seconds", self.seconds, 0.1, 3600.0)
        check_int("seed", self.seed, 0, (1 << 63) - 1)


def run_fairness(
    model: str,
    options: FairnessOptions,
    *,
    progress: Progress | None = None,
    watch: Watch = unwatched,
) -> list[Row]:
    """Play all mixes; one row for each app and policy, `alone` among the policies."""
    with scratch_model(model, progress) as (path, scratch):
        rows = _FairnessBench(path, scratch, options, watch).run_all()
    compare(rows)
    return [{"scenario": "fairness", "model": model, **row} for row in rows]


class _FairnessBench:
    """Plays one phase after the other, all equally long."""

    def __init__(
        self, path: pathlib.Path, scratch: pathlib.Path, options: FairnessOptions, watch: Watch
    ) -> None:
        self._path = path
        self._scratch = scratch
        self._options = options
        self._watch = watch
        limit_s = None if options.seconds is not None else 60.0 * _TIME_SHARE * options.minutes
        self._budget = TimeBudget(limit_s)
        sizes = [len(mix) for mix in make_mixes(1, 1.0).values()]
        self._num_phases = sum(sizes) + len(options.policies) * len(sizes)
        self._num_done = 0
        self._planned_s = math.inf
        self._unit: Row = {}
        self._rows: list[Row] = []

    def run_all(self) -> list[Row]:
        """Measure the unit, then play every app alone, and all mixes under every policy."""
        first, *others = self._options.policies
        started_s = time.monotonic()
        with self._open(first) as runtime:
            reserve_s = len(others) * (time.monotonic() - started_s)
            self._watch("a prefill", 0, self._num_phases)
            context_max = layout_of(self._path).context_max
            tokens, ms = measure_unit(runtime, context_max, 1e3 * self._phase_s(reserve_s))
            self._unit = {"unit_tokens": tokens, "unit_ms": ms}
            self._planned_s = self._phase_s(reserve_s)
            mixes = make_mixes(tokens, ms)
            alone = [(name, (load,)) for name, mix in mixes.items() for load in mix]
            self._play_all(runtime, ALONE, alone)
            self._play_all(runtime, first, list(mixes.items()))
        for policy in others:
            with self._open(policy) as runtime:
                self._play_all(runtime, policy, list(mixes.items()))
        return self._rows

    def _open(self, policy: str) -> Runtime:
        store = StoreOptions(folder=self._scratch / policy)
        config = RuntimeConfig(policy=policy, store=store)  # type: ignore[arg-type]  # it checks
        return Runtime.open(str(self._path), config=config)

    def _phase_s(self, reserve_s: float = 0.0) -> float:
        """What each of the phases that are left may take."""
        num_left = self._num_phases - self._num_done
        limit_s = self._budget.row_s(num_left)
        if limit_s is None:
            assert self._options.seconds is not None
            return self._options.seconds
        return max(_PHASE_S_MIN, limit_s - reserve_s / num_left)

    def _play_all(self, runtime: Runtime, policy: str, mixes: Sequence[tuple[str, Mix]]) -> None:
        for name, mix in mixes:
            self._watch(f"{policy} {name}", self._num_done, self._num_phases)
            for_ms = 1e3 * min(self._planned_s, self._phase_s())
            driver, moments = _play(runtime, mix, for_ms, self._options.seed)
            budgets = budget_figures(runtime.pool_snapshot(), runtime.store_snapshot())
            head = {"mix": name, "policy": policy, **self._unit, **budgets}
            self._rows += phase_rows(head, mix, driver.asked, moments, for_ms / _WINDOWS)
            self._num_done += 1


def _play(runtime: Runtime, mix: Mix, for_ms: float, seed: int) -> tuple[Driver, list[Moment]]:
    """Let the apps' users loose for a while, on a runtime on which nobody else is."""
    driver = Driver()
    text = TextIds(runtime.tokenizer)
    apps = [runtime.app(load.name, weight=load.weight, priority=load.priority) for load in mix]
    before = runtime.counters().service_ms
    moments: list[Moment] = []

    def tick(at_ms: float) -> None:
        got = {app: ms - before.get(app, 0.0) for app, ms in runtime.counters().service_ms.items()}
        moments.append(Moment(at_ms=at_ms, service_ms=got, backlogged=driver.backlogged()))

    loaded = zip(mix, apps, strict=True)
    all_users = [user for load, app in loaded for user in users(load, app, driver, text, seed)]
    driver.run(all_users, for_ms=for_ms, tick=tick)
    return driver, moments


def phase_rows(
    head: Row, mix: Mix, asked: Sequence[Asked], moments: Sequence[Moment], window_ms: float
) -> list[Row]:
    """A row for each app of one mix that was played under one policy, for a while."""
    shares = shares_of(moments, {load.name: load.weight for load in mix}, window_ms)
    elapsed_ms, service_ms = moments[-1].at_ms, moments[-1].service_ms
    together = len(mix) > 1 and shares.backlogged_ms >= _BACKLOGGED_MS_MIN
    rows = []
    for load in mix:
        own = [each for each in asked if each.who == load.name]
        shared = {
            "backlogged_s": 1e-3 * shares.backlogged_ms,
            "service_share": shares.service_share[load.name],
            "weight_share": shares.weight_share[load.name],
            "jain": shares.jain,
            "service_difference_ms_max": shares.difference_ms_max,
            "service_difference_ms_mean": shares.difference_ms_mean,
        }
        row = {
            **head,
            "app": load.name,
            "priority": load.priority,
            "weight": load.weight,
            "users": load.num_users,
            "phase_s": 1e-3 * elapsed_ms,
            "requests": len(own),
            "unanswered": num_unanswered(own),
            **latencies(own),
            "service_ms": service_ms.get(load.name, 0.0),
            **(shared if together else dict.fromkeys(shared)),
            "window_s": 1e-3 * window_ms,
            # Tokens computed per second for all apps, prompts and answers.
            "throughput": 1e3 * sum(each.num_tokens for each in asked) / elapsed_ms,
            **dict.fromkeys(("slowdown", "throughput_vs_fcfs")),  # see `compare`
            "samples": latency_samples(own),
        }
        rows.append(row)
    return rows


def compare(rows: Sequence[Row]) -> None:
    """Compare each row with the same app alone, and with what fcfs computes of its mix."""
    alone = {(row["mix"], row["app"]): row for row in rows if row["policy"] == ALONE}
    fcfs = {row["mix"]: row["throughput"] for row in rows if row["policy"] == "fcfs"}
    for row in rows:
        if row["policy"] != ALONE:
            row["slowdown"] = latency_ratio(row, alone[row["mix"], row["app"]])
            row["throughput_vs_fcfs"] = ratio(row["throughput"], fcfs.get(row["mix"]))


_LATENCIES: Columns = (
    ("policy", "{policy}"),
    ("app", "{app}"),
    ("requests", "{requests}"),
    ("TTFT ms p50/p95", "{ttft_ms_p50:.0f}/{ttft_ms_p95:.0f}"),
    ("TBT ms p50/p95", "{tbt_ms_p50:.0f}/{tbt_ms_p95:.0f}"),
    ("TTFT to alone", "{slowdown[ttft_ms_p50]:.1f}/{slowdown[ttft_ms_p95]:.1f}"),
    ("TBT to alone", "{slowdown[tbt_ms_p50]:.1f}/{slowdown[tbt_ms_p95]:.1f}"),
    ("tok/s of all", "{throughput:.0f}"),
    ("to fcfs", "{throughput_vs_fcfs:.2f}"),
)
_SHARES: Columns = (
    ("policy", "{policy}"),
    ("app", "{app}"),
    ("users", "{users}"),
    ("share", "{service_share:.3f}"),
    ("weight", "{weight_share:.3f}"),
    ("backlogged s", "{backlogged_s:.1f}"),
    ("Jain", "{jain:.4f}"),
    ("service difference ms", "{service_difference_ms_max:.0f}"),
    ("in windows of s", "{window_s:.1f}"),
)


def print_rows(rows: Sequence[Row]) -> None:
    """Print one table of latencies for each mix, and the shares of apps of equal class."""
    for mix in dict.fromkeys(row["mix"] for row in rows):
        of_mix = [row for row in rows if row["mix"] == mix]
        load = (
            f"{of_mix[0]['phase_s']:.0f} s each, {of_mix[0]['unit_tokens']} tokens are a prefill "
            f"of {of_mix[0]['unit_ms']:.0f} ms"
        )
        print_columns(f"{rows[0]['model']} · {mix} · {load}", _LATENCIES, of_mix)
        shared = [row for row in of_mix if row["service_share"] is not None]
        if shared and len({row["priority"] for row in shared}) == 1:
            print_columns(f"{mix}: service while all are backlogged", _SHARES, shared)
