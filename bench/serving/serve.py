"""`bench serve`: the same load, over sockets, at one server after the other.

The load is open: what comes does not wait for what came before. How much that is, is a part of what
the first target can do: *alone* it answers each app's requests one by one, then a few users who
never pause take requests in the proportion of the apps' shares, and the requests a second that they
get are its *capacity*. Lengths of the usual workloads are in units of a long prompt, of which
`UNITS_PER_WINDOW` in a row would fill the window. All targets are then sent what was drawn from the
first's measurements, each in an empty state if it is started here.

Where conversations are among it, a server that is started has a part of the memory that the KV of
all that are open would take.
"""

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgekv.bench.report import Reporter, Row, Watch, unwatched
from edgekv.bench.scratch import layout_of, scratch_model
from edgekv.bench.serving.client import Client, Endpoint
from edgekv.bench.serving.measure import (
    FEW_TOKENS,
    UNIT_TOKENS,
    measure_alone,
    measure_capacity,
    measure_scale,
    measure_unit,
    whole,
)
from edgekv.bench.serving.play import Player, Served
from edgekv.bench.serving.rows import compare, make_rows
from edgekv.bench.serving.schedule import Scripted, TextScale, cycle_ms_of, draw_script
from edgekv.bench.serving.targets import EdgeKVServe, MlxLmServe, Running, Target
from edgekv.bench.serving.traffic import Scenario, usual_scenarios
from edgekv.bench.sessions.load import mean_open_bytes
from edgekv.config import check_float, check_int
from edgekv.errors import ConfigError
from edgekv.models.cache import Progress

_CAPACITY_SHARE = 0.25  # of a window, that measuring it takes
_DRAIN_SHARE = 0.5  # of a window, that answers are waited for behind it
_LONGEST_FIT = 2  # conversations of the greatest length that a pool holds at least
_WARM_CHARS = 64


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """What is run."""

    scenario: Scenario | None = None  # None: the usual ones
    targets: tuple[Endpoint, ...] = ()  # servers that run; none: edgekv is started
    peer: str | None = None  # that is started, too
    rate: float | None = None  # requests a second; None: by `utilisation`
    utilisation: float = 0.6  # of the capacity
    duration_s: float = 60.0  # of each window
    pool_fraction: float = 0.25  # of what the KV of the open conversations takes
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rate is not None:
            check_float("rate", self.rate, 1e-3, 1e4)
        check_float("utilisation", self.utilisation, 0.01, 10.0)
        check_float("duration", self.duration_s, 1.0, 86_400.0)
        check_float("pool fraction", self.pool_fraction, 0.01, 100.0)
        check_int("seed", self.seed, 0, 1 << 31)
        names = [target.name for target in self.targets]
        for name in names:
            if names.count(name) > 1 or name == self.peer:
                raise ConfigError.of("target", name, "a name that no other has")


@dataclass(frozen=True, kw_only=True)
class Load:
    """A scenario as it is played everywhere."""

    scenario: Scenario
    rate: float  # requests a second
    capacity_per_s: float | None  # None: it was not measured
    scale: TextScale
    alone_ms: Mapping[str, float]  # TTFT at the first target, by app
    script: Sequence[Scripted]

    def num_due(self, window_s: float) -> int:
        """Turns that should be sent within a window."""
        return sum(ms < 1e3 * window_s for each in self.script for ms in each.due_ms())


def run_serve(
    model: str,
    options: ServeOptions,
    *,
    progress: Progress | None = None,
    watch: Watch = unwatched,
) -> list[Row]:
    """Play everything at every target; a row for each scenario, target and app.

    Raises:
        TargetFailed: A server does not start, or does not answer at all.
        UnsupportedModel: The peer cannot be given this model.
    """
    if options.targets and options.peer is None:
        targets: list[Target] = [Running(endpoint) for endpoint in options.targets]
        rows = _Bench(targets, options, watch, model=None).run()
    else:
        with scratch_model(model, progress) as (path, scratch):
            rows = _Bench(_targets(path, scratch, options), options, watch, model=path).run()
        rows = [{**row, "model": model} for row in rows]
    compare(rows)
    return rows


def _targets(path: Path, scratch: Path, options: ServeOptions) -> list[Target]:
    from edgekv.bench.serving.peer_folder import write_peer_folder
    from edgekv.bench.speed.peer_mlx_lm import check_installed

    found: list[Target] = [Running(endpoint) for endpoint in options.targets]
    if not found:
        found.append(EdgeKVServe(path, scratch))
    if options.peer is not None:
        check_installed()
        found.append(MlxLmServe(write_peer_folder(path, scratch / "peer"), options.peer))
    return found


class _Bench:
    """Measures the first target, then plays all of them in turn, scenario by scenario."""

    def __init__(
        self,
        targets: Sequence[Target],
        options: ServeOptions,
        watch: Watch,
        model: Path | None,  # of those that are started
    ) -> None:
        self._targets = targets
        self._options = options
        self._watch = watch
        self._model = model
        # A server that goes on has KV of what it was sent by the run before.
        goes_on = any(isinstance(target, Running) for target in targets)
        self._salt = secrets.token_hex(4) if goes_on else ""

    def run(self) -> list[Row]:
        """All rows."""
        rows = []
        for load in self._measure(self._targets[0]):
            for target in self._targets:
                rows += self._play(load, target)
        return rows

    def _measure(self, target: Target) -> list[Load]:
        given = self._options.scenario
        scenarios = [given] if given else usual_scenarios(UNIT_TOKENS[0])
        apps = [app for scenario in scenarios for app in scenario.apps]
        self._watch(f"measuring {target.name}", 0, len(scenarios))

        async def measure(endpoint: Endpoint) -> list[Load]:
            async with Client(endpoint, apps) as client:
                unscaled = Player(client, TextScale(), salt=self._salt)
                scale = await measure_scale(unscaled, apps[0])
                player, chosen = Player(client, scale, salt=self._salt), scenarios
                if given is None:
                    window_s = self._options.duration_s
                    unit = await measure_unit(player, apps[0], scale, window_s)
                    chosen = usual_scenarios(unit)
                return [await self._load(player, each, scale) for each in chosen]

        with target.open(apps) as endpoint:
            return asyncio.run(measure(endpoint))

    async def _load(self, player: Player, scenario: Scenario, scale: TextScale) -> Load:
        options = self._options
        alone_ms = await measure_alone(player, scenario, scale, options.seed)
        rate, capacity = options.rate, None
        if rate is None:
            for_s = _CAPACITY_SHARE * options.duration_s
            capacity = await measure_capacity(player, scenario, options.seed, for_s)
            rate = options.utilisation * capacity
        script = draw_script(scenario, rate=rate, window_s=options.duration_s, seed=options.seed)
        return Load(
            scenario=scenario,
            rate=rate,
            capacity_per_s=capacity,
            scale=scale,
            alone_ms=alone_ms,
            script=script,
        )

    def _play(self, load: Load, target: Target) -> list[Row]:
        window_s, apps = self._options.duration_s, load.scenario.apps
        label = f"{load.scenario.name} {target.name}"
        reporter = Reporter(self._watch, label, load.num_due(window_s))

        async def play(endpoint: Endpoint) -> tuple[list[Served], str]:
            async with Client(endpoint, apps) as client:
                player = Player(client, load.scale, salt=self._salt, served=reporter.turn_done)
                # Some servers load their model only now.
                whole(await player.ask_once(apps[0].name, "warm-up", _WARM_CHARS, FEW_TOKENS))
                drain_s = _DRAIN_SHARE * window_s
                sent = await player.play_open(load.script, window_s=window_s, drain_s=drain_s)
                return sent, client.model

        with target.open(apps, self._pool_bytes(load)) as endpoint:
            served, model = asyncio.run(play(endpoint))
        rows = make_rows(
            load.scenario,
            target.name,
            load.script,
            served,
            window_s=window_s,
            alone_ms=load.alone_ms,
        )
        head = {
            "model": model,
            "rate_per_s": load.rate,
            "capacity_per_s": load.capacity_per_s,
            "utilisation": None if load.capacity_per_s is None else self._options.utilisation,
        }
        return [{**head, **row} for row in rows]

    def _pool_bytes(self, load: Load) -> int | None:
        """Memory for KV of a server that is started; None: as much as it takes by itself."""
        talking = [app for app in load.scenario.apps if app.kind == "conversations"]
        if self._model is None or not talking:
            return None
        layout, window_ms = layout_of(self._model), 1e3 * self._options.duration_s
        open_bytes = 0
        for app in talking:
            talks = [each.talk for each in load.script if each.app == app.name]
            cycle_ms = cycle_ms_of(app, load.scenario.rate_of(app, load.rate))
            open_bytes += mean_open_bytes(layout, talks, cycle_ms, window_ms)
        longest = max(each.talk.num_tokens for each in load.script)
        least = _LONGEST_FIT * layout.capacity_bytes(layout.capacity_for(longest))
        return max(least, int(self._options.pool_fraction * open_bytes))
