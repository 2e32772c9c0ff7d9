"""`bench fairness`: apps that want more than there is, under each scheduling policy.

Two mixes, each played for the same time under every policy, and each app of them alone:

* **classes**: an interactive app with short prompts beside a background app that always has long
  prompts in the queue.
* **equals**: three apps of the same class and weight, whose users never pause, and whose demand
  differs: one has few users and short prompts, one has many and long ones.

The load is in units of a prefill that is measured first, of a prompt as long as those of the
background app are on average: the interactive user thinks for half of it, and a phase lasts for
`_PHASE_UNITS` of them. Where 1024 tokens take longer than that, all prompts are made shorter by one
factor. So the queue, the questions and the answers of a phase are as many on a machine that is half
as fast, and the time that all phases take is what was given.
"""

import itertools
import math
import pathlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from edgekv.bench.figures import budget_figures, curve, latency_ratio, tail, ttft_ms
from edgekv.bench.report import Columns, Row, Watch, print_columns
from edgekv.bench.scratch import layout_of, model_path, scratch_folder
from edgekv.bench.sessions.app_load import AppLoad, AppRecord, LoadedApp
from edgekv.bench.sessions.drive import Driver
from edgekv.bench.sessions.load import TimeBudget
from edgekv.bench.sessions.shares import Moment, Shares, shares_of
from edgekv.bench.workload import TextIds, answer
from edgekv.config import (
    POLICIES,
    PolicyName,
    RuntimeConfig,
    StoreOptions,
    check_choice,
    check_float,
    check_int,
)
from edgekv.errors import ConfigError
from edgekv.models.cache import Progress
from edgekv.runtime import Runtime

ALONE = "alone"
MINUTES = 8.0
_TIME_SHARE = 0.93  # of the minutes, that is planned
_TICK_MS = 250.0
_PHASE_UNITS = 40.0
_UNIT_TOKENS_MAX = 1024
_UNIT_TOKENS_MIN = 64
_UNIT_ROUNDS = 3
_UNIT_REPS = 5  # of which the median counts: others may be using the machine
_THINK_UNITS = 0.5
_PHASE_S_MIN = 0.5
_BACKLOGGED_MS_MIN = 2500.0  # ten of the scheduler's quanta: less says nothing of shares
_WINDOWS = 6  # windows of the service difference are this part of the run

Mix = tuple[AppLoad, ...]


@dataclass(frozen=True, kw_only=True)
class FairnessOptions:
    """What is run.

    Attributes:
        policies: In the order in which they run.
        minutes: For the whole run, from when the model is there.
        seconds: For each mix and policy, and for each app alone, instead of `minutes`.
        seed: Same seed, same prompts and thinking times.
    """

    policies: tuple[PolicyName, ...]
    minutes: float = MINUTES
    seconds: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.policies or len(set(self.policies)) < len(self.policies):
            raise ConfigError.of("policy", ",".join(self.policies), "names, each once")
        for policy in self.policies:
            check_choice("policy", policy, POLICIES)
        check_float("minutes", self.minutes, 0.05, 10_000.0)
        if self.seconds is not None:
            check_float("seconds", self.seconds, 0.1, 3600.0)
        check_int("seed", self.seed, 0, (1 << 63) - 1)


@dataclass(frozen=True, kw_only=True)
class Unit:
    """What load is measured in: the prefill of a long prompt, alone.

    Attributes:
        tokens: Of the prompt.
        prefill_ms: Until its first token.
    """

    tokens: int
    prefill_ms: float


def measure_unit(runtime: Runtime, context_max: int, phase_ms: float) -> Unit:
    """The prefill of which `_PHASE_UNITS` fit into a phase, or of the longest prompt there is."""
    longest = max(1, min(_UNIT_TOKENS_MAX, context_max // 3))
    shortest = min(_UNIT_TOKENS_MIN, longest)
    text = TextIds(runtime.tokenizer)
    runs = itertools.count()

    def prefill_ms(num_tokens: int) -> float:
        number = next(runs)
        with runtime.app(f"unit {number}").session() as session:
            return ttft_ms(answer(session, text.stretch(num_tokens, number), 1).stats)

    tokens = shortest
    for _ in range(_UNIT_ROUNDS):  # the first one warms up, and a longer one tells more
        fits = tokens * phase_ms / _PHASE_UNITS / prefill_ms(tokens)
        tokens = max(shortest, min(longest, 4 * tokens, int(fits)))
    return Unit(tokens=tokens, prefill_ms=median(prefill_ms(tokens) for _ in range(_UNIT_REPS)))


def make_mixes(unit: Unit) -> dict[str, Mix]:
    """The mixes, with prompts and pauses in proportion to the unit."""
    scale = unit.tokens / _UNIT_TOKENS_MAX

    def prompts(low: int, high: int) -> tuple[int, int]:
        return max(1, round(scale * low)), max(1, round(scale * high))

    def equal(name: str, num_users: int, prompt_tokens: tuple[int, int]) -> AppLoad:
        return AppLoad(
            name=name,
            priority="interactive",
            num_users=num_users,
            prompt_tokens=prompt_tokens,
            output_tokens=8,
        )

    interactive = AppLoad(
        name="interactive",
        priority="interactive",
        num_users=1,
        prompt_tokens=prompts(64, 128),
        output_tokens=16,
        think_ms=_THINK_UNITS * unit.prefill_ms,
    )
    background = AppLoad(
        name="background",
        priority="background",
        num_users=8,
        prompt_tokens=prompts(768, 1280),
        output_tokens=32,
    )
    equals = (
        equal("few-short", 4, prompts(192, 256)),
        equal("some-medium", 8, prompts(256, 512)),
        equal("many-long", 12, prompts(512, 768)),
    )
    return {"classes": (interactive, background), "equals": equals}


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One mix, or one app of it, under one policy, for a while."""

    mix: str
    policy: str
    loads: Mix
    records: tuple[AppRecord, ...]
    elapsed_ms: float
    service_ms: dict[str, float]
    shares: Shares
    budgets: dict[str, float]

    @property
    def throughput(self) -> float:
        """Tokens computed per second for all apps, prompts and answers."""
        return 1e3 * sum(record.num_tokens for record in self.records) / self.elapsed_ms


def run_fairness(
    model: str,
    options: FairnessOptions,
    *,
    progress: Progress | None = None,
    watch: Watch | None = None,
) -> list[Row]:
    """Play all mixes; one row for each app and policy, `alone` among the policies.

    Args:
        model: A model's reference, or `synthetic`.
        options: What is run.
        progress: Told of a download.
        watch: Told after every phase.

    Raises:
        ConfigError: An option is out of range.
        ModelError: The model cannot be had.
        EdgeKVError: A request failed.
    """
    with scratch_folder() as scratch:
        path = model_path(model, scratch, progress)
        unit, phases = _FairnessBench(path, scratch, options, watch).run_all()
        return make_rows(model, unit, phases)


class _FairnessBench:
    """Plays one phase after the other, all equally long."""

    def __init__(
        self,
        path: pathlib.Path,
        scratch: pathlib.Path,
        options: FairnessOptions,
        watch: Watch | None,
    ) -> None:
        self._path = path
        self._scratch = scratch
        self._options = options
        self._watch = watch
        limit_s = None if options.seconds is not None else 60.0 * _TIME_SHARE * options.minutes
        self._budget = TimeBudget(limit_s)
        sizes = [len(mix) for mix in make_mixes(Unit(tokens=1, prefill_ms=1.0)).values()]
        self._num_phases = sum(sizes) + len(options.policies) * len(sizes)
        self._phases: list[Phase] = []
        self._planned_s = math.inf

    def run_all(self) -> tuple[Unit, list[Phase]]:
        """Measure the unit, then play every app alone, and all mixes under every policy."""
        context_max = layout_of(self._path).context_max
        first, *others = self._options.policies
        started_s = time.monotonic()
        with self._open(first) as runtime:
            reserve_s = len(others) * (time.monotonic() - started_s)
            self._tell("a prefill")
            unit = measure_unit(runtime, context_max, 1e3 * self._phase_s(reserve_s))
            self._planned_s = self._phase_s(reserve_s)
            mixes = make_mixes(unit)
            for name, mix in mixes.items():
                for load in mix:
                    self._play(runtime, ALONE, name, (load,))
            self._play_all(runtime, first, mixes)
        for policy in others:
            with self._open(policy) as runtime:
                self._play_all(runtime, policy, mixes)
        return unit, self._phases

    def _open(self, policy: PolicyName) -> Runtime:
        store = StoreOptions(folder=self._scratch / policy)
        return Runtime.open(str(self._path), config=RuntimeConfig(policy=policy, store=store))

    def _phase_s(self, reserve_s: float = 0.0) -> float:
        """What each of the phases that are left may take."""
        num_left = self._num_phases - len(self._phases)
        limit_s = self._budget.row_s(num_left)
        if limit_s is None:
            assert self._options.seconds is not None
            return self._options.seconds
        return max(_PHASE_S_MIN, limit_s - reserve_s / num_left)

    def _play_all(self, runtime: Runtime, policy: str, mixes: dict[str, Mix]) -> None:
        for name, mix in mixes.items():
            self._play(runtime, policy, name, mix)

    def _play(self, runtime: Runtime, policy: str, name: str, loads: Mix) -> None:
        self._tell(f"{policy} {name}")
        for_ms = 1e3 * min(self._planned_s, self._phase_s())
        self._phases.append(_play(runtime, policy, name, loads, for_ms, self._options.seed))

    def _tell(self, what: str) -> None:
        if self._watch is not None:
            self._watch(what, len(self._phases), self._num_phases)


def _play(runtime: Runtime, policy: str, name: str, loads: Mix, for_ms: float, seed: int) -> Phase:
    """Let the apps' users loose for a while, on a runtime on which nobody else is."""
    driver = Driver()
    text = TextIds(runtime.tokenizer)
    apps = [LoadedApp(load, runtime, driver, text, seed) for load in loads]
    before = runtime.counters().service_ms
    moments: list[Moment] = []

    def tick(at_ms: float) -> None:
        got = {app: ms - before.get(app, 0.0) for app, ms in runtime.counters().service_ms.items()}
        backlogged = frozenset(app.load.name for app in apps if app.backlogged)
        moments.append(Moment(at_ms=at_ms, service_ms=got, backlogged=backlogged))

    users = [user for app in apps for user in app.users()]
    driver.run(users, for_ms=for_ms, tick=tick, tick_ms=_TICK_MS)
    weights = {load.name: load.weight for load in loads}
    return Phase(
        mix=name,
        policy=policy,
        loads=loads,
        records=tuple(app.record for app in apps),
        elapsed_ms=moments[-1].at_ms,
        service_ms=dict(moments[-1].service_ms),
        budgets=budget_figures(runtime.pool_snapshot(), runtime.store_snapshot()),
        shares=shares_of(moments, weights, for_ms / _WINDOWS),
    )


def make_rows(model: str, unit: Unit, phases: Sequence[Phase]) -> list[Row]:
    """One row for each app of each phase, compared with the same app alone."""
    rows = [
        {**_row(model, phase, load, record), "unit_tokens": unit.tokens, "unit_ms": unit.prefill_ms}
        for phase in phases
        for load, record in zip(phase.loads, phase.records, strict=True)
    ]
    alone = {(row["mix"], row["app"]): row for row in rows if row["policy"] == ALONE}
    fcfs = {row["mix"]: row["throughput"] for row in rows if row["policy"] == "fcfs"}
    for row in rows:
        if row["policy"] != ALONE:
            row["slowdown"] = latency_ratio(row, alone[row["mix"], row["app"]])
            if fcfs.get(row["mix"]):
                row["throughput_vs_fcfs"] = row["throughput"] / fcfs[row["mix"]]
        row["samples"] = row.pop("samples")  # long: last
    return rows


def _row(model: str, phase: Phase, load: AppLoad, record: AppRecord) -> Row:
    shares = phase.shares
    together = len(phase.loads) > 1 and shares.backlogged_ms >= _BACKLOGGED_MS_MIN
    return {
        "scenario": "fairness",
        "model": model,
        "mix": phase.mix,
        "policy": phase.policy,
        "app": load.name,
        "priority": load.priority,
        "weight": load.weight,
        "users": load.num_users,
        "phase_s": 1e-3 * phase.elapsed_ms,
        "requests": len(record.ttft_ms),
        "unanswered": record.num_unanswered,
        **tail("ttft_ms", record.ttft_ms),
        **tail("tbt_ms", record.gaps_ms),
        "slowdown": None,
        "service_ms": phase.service_ms.get(load.name, 0.0),
        "backlogged_s": 1e-3 * shares.backlogged_ms if together else None,
        "service_share": shares.service_share[load.name] if together else None,
        "weight_share": shares.weight_share[load.name] if together else None,
        "jain": shares.jain if together else None,
        "window_s": 1e-3 * shares.window_ms,
        "service_difference_ms_max": shares.difference_ms_max if together else None,
        "service_difference_ms_mean": shares.difference_ms_mean if together else None,
        "throughput": phase.throughput,
        "throughput_vs_fcfs": None,
        **phase.budgets,
        "samples": {"ttft_ms": curve(record.ttft_ms), "tbt_ms": curve(record.gaps_ms)},
    }


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
