"""`bench fairness`: apps that want more than there is, under each scheduling policy.

Two mixes, each played for the same time under every policy, and each app of them alone:

* **classes**: an interactive app with short prompts beside a background app that always has long
  prompts in the queue.
* **equals**: three apps of the same class and weight, whose users never pause, and whose demand
  differs: one has few users and short prompts, one has many and long ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from edgekv.bench.figures import budget_figures, curve, latency_ratio, tail
from edgekv.bench.report import Columns, Row, Watch, print_columns
from edgekv.bench.scratch import layout_of, model_path, scratch_folder
from edgekv.bench.sessions.app_load import AppLoad, AppRecord, LoadedApp
from edgekv.bench.sessions.drive import Driver
from edgekv.bench.sessions.shares import Moment, Shares, shares_of
from edgekv.bench.workload import TextIds
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
_TICK_MS = 250.0
_READING_MS = 4000.0  # mean time that a person takes for an answer
_QUESTIONS_MIN = 15  # that a person asks in a short run, about
_WINDOWS = 6  # windows of the service difference are this part of the run

Mix = tuple[AppLoad, ...]


@dataclass(frozen=True, kw_only=True)
class FairnessOptions:
    """What is run.

    Attributes:
        policies: In the order in which they run.
        seconds: For each mix and policy, and for each app alone.
        seed: Same seed, same prompts and thinking times.
    """

    policies: tuple[PolicyName, ...]
    seconds: float = 60.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.policies or len(set(self.policies)) < len(self.policies):
            raise ConfigError.of("policy", ",".join(self.policies), "names, each once")
        for policy in self.policies:
            check_choice("policy", policy, POLICIES)
        check_float("seconds", self.seconds, 0.1, 3600.0)
        check_int("seed", self.seed, 0, (1 << 63) - 1)


def make_mixes(context_max: int, seconds: float) -> dict[str, Mix]:
    """The mixes, with prompts that fit the model's context and pauses that fit the time."""

    def prompts(low: int, high: int) -> tuple[int, int]:
        limit = context_max // 2
        return min(low, limit), min(high, limit)

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
        think_ms=min(_READING_MS, 1e3 * seconds / _QUESTIONS_MIN),
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
    phases: list[Phase] = []
    with scratch_folder() as scratch:
        path = model_path(model, scratch, progress)
        mixes = make_mixes(layout_of(path).context_max, options.seconds)
        num_apps = sum(len(mix) for mix in mixes.values())
        total = num_apps + len(options.policies) * len(mixes)

        def play(runtime: Runtime, policy: str, name: str, loads: Mix) -> None:
            if watch is not None:
                watch(f"{policy} {name}", len(phases), total)
            phases.append(_play(runtime, policy, name, loads, options))

        for policy in options.policies:
            store = StoreOptions(folder=scratch / policy)
            config = RuntimeConfig(policy=policy, store=store)
            with Runtime.open(str(path), config=config) as runtime:
                if policy == options.policies[0]:
                    for name, mix in mixes.items():
                        for load in mix:
                            play(runtime, ALONE, name, (load,))
                for name, mix in mixes.items():
                    play(runtime, policy, name, mix)
    return make_rows(model, phases)


def _play(runtime: Runtime, policy: str, name: str, loads: Mix, options: FairnessOptions) -> Phase:
    """Let the apps' users loose for a while, on a runtime on which nobody else is."""
    driver = Driver()
    text = TextIds(runtime.tokenizer)
    apps = [LoadedApp(load, runtime, driver, text, options.seed) for load in loads]
    before = runtime.counters().service_ms
    moments: list[Moment] = []

    def tick(at_ms: float) -> None:
        got = {app: ms - before.get(app, 0.0) for app, ms in runtime.counters().service_ms.items()}
        backlogged = frozenset(app.load.name for app in apps if app.backlogged)
        moments.append(Moment(at_ms=at_ms, service_ms=got, backlogged=backlogged))

    users = [user for app in apps for user in app.users()]
    for_ms = 1e3 * options.seconds
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


def make_rows(model: str, phases: Sequence[Phase]) -> list[Row]:
    """One row for each app of each phase, compared with the same app alone."""
    rows = [
        _row(model, phase, load, record)
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
    return rows


def _row(model: str, phase: Phase, load: AppLoad, record: AppRecord) -> Row:
    shares = phase.shares
    together = len(phase.loads) > 1 and shares.backlogged_ms > 0
    return {
        "scenario": "fairness",
        "model": model,
        "mix": phase.mix,
        "policy": phase.policy,
        "app": load.name,
        "priority": load.priority,
        "weight": load.weight,
        "users": load.num_users,
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
    ("TTFT p95 to alone", "{slowdown[ttft_ms_p95]:.1f}"),
    ("TBT p95 to alone", "{slowdown[tbt_ms_p95]:.1f}"),
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
        print_columns(f"{rows[0]['model']} · {mix}", _LATENCIES, of_mix)
        shared = [row for row in of_mix if row["service_share"] is not None]
        if shared and len({row["priority"] for row in shared}) == 1:
            print_columns(f"{mix}: service while all are backlogged", _SHARES, shared)
