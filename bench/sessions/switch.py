"""`bench switch`: the same conversations under several ways of switching between sessions.

What is compared, FastSwitch's mechanisms one at a time (arXiv 2411.18424):

* **resident**: everything is in memory, and nothing switches: the limit. Always played first.
* **recompute**: a preempted session forgets its KV and computes it again.
* **naive**: on the engine thread, one call for every 16-token block, layer and k|v, everything each
  time. An analogue of swapping in vLLM 0.3.3, FastSwitch's baseline; it is this runtime, not vLLM.
* **groups**: on the engine thread, one vectored call for a whole range of tokens.
* **async**: and on I/O threads.
* **reuse**: and only what the disk does not have yet, written behind the decode. The default.

All run in one process, one after the other, each with a fresh runtime and an empty store. Order and
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
from collections.abc import Callable, Sequence
from dataclasses import replace

from edgekv.bench.report import Row, Watch
from edgekv.bench.scratch import NO_STORE, layout_of, model_path, scratch_folder
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
    watch: Watch | None = None,
) -> list[Row]:
    """Play the conversations under every policy; one row each, for every utilisation.

    Args:
        model: A model's reference, or `synthetic`.
        options: What is run.
        progress: Told of a download.
        watch: Told of turns that are done.

    Raises:
        ConfigError: An option is out of range, or the sessions do not fit into memory.
        ModelError: The model cannot be had.
        StoreError: The disk has no room for a store.
    """
    with scratch_folder() as scratch:
        path = model_path(model, scratch, progress)
        bench = _SwitchBench(path, scratch, options, watch or (lambda *_: None))
        runs = bench.run_all()
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


class _SwitchBench:
    """Runs one policy after the other over the same conversations."""

    def __init__(
        self, path: pathlib.Path, scratch: pathlib.Path, options: SwitchOptions, watch: Watch
    ) -> None:
        self._path = path
        self._scratch = scratch
        self._options = options
        self._watch = watch
        self._token_bytes = layout_of(path).token_bytes

    def run_all(self) -> list[Run]:
        """Play every script under every policy, each row in its share of the time."""
        options = self._options
        policies = (RESIDENT, *options.policies)
        absolute = options.arrivals_per_s is not None
        num_rows = len(policies) * options.reps * (1 if absolute else len(options.utilisations))
        limit_s = max(1.0, 60.0 * _TIME_SHARE * options.minutes - _AROUND_S)
        limited = not absolute and options.row_turns is None
        budget = TimeBudget(limit_s if limited else None)
        runs: list[Run] = []
        for script in ScriptWriter(self._path, options, budget, num_rows, self._watch).write():
            together: list[Run] = []
            for policy in policies:
                row_s = budget.row_s(num_rows - len(runs) - len(together))
                together.append(self.run(script, policy, row_s))
            _compare(together, self._path)
            runs += together
        return runs

    def run(self, script: Script, policy: str, row_s: float | None) -> Run:
        """Play a script under one policy, in at most that time."""
        started_s = time.monotonic()
        gc.collect()  # what the policy before left is not this one's
        folder = self._scratch / policy
        resident = policy == RESIDENT
        twin = TWINS.get(policy)
        swap = SwapOptions(mode="reuse" if resident else MODES[policy])
        if twin is not None:
            swap = replace(swap, staging_bytes=0)
        config = RuntimeConfig(
            pool_bytes=script.whole_bytes if resident else script.pool_bytes,
            num_sessions_max=len(script.conversations),
            swap=swap,
            store=StoreOptions(folder=folder, disk_bytes=script.disk_bytes),
        )
        trace_policy = self._options.trace_policy(len(script.conversations))
        with Runtime.open(
            str(self._path), config=config, policy=trace_policy, swap_twin=twin
        ) as runtime:
            end_s = None if row_s is None else started_s + row_s - CLOSE_S
            run = self._play(script, policy, runtime, end_s)
        shutil.rmtree(folder, ignore_errors=True)
        return run

    def _play(self, script: Script, policy: str, runtime: Runtime, end_s: float | None) -> Run:
        play = Play(runtime, script.conversations, self._reporter(policy, script))
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
            rep=script.rep,
            facts=script.facts,
            played=played,
            busy_ms=sum(counters.service_ms.values()) - before,
            token_bytes=self._token_bytes,
            pool=runtime.pool_snapshot(),
            engine=counters,
            store=runtime.store_snapshot(),
        )

    def _reporter(self, policy: str, script: Script) -> Callable[[int], None]:
        utilisation, num_turns = script.facts["utilisation"], script.num_turns
        label = policy if utilisation is None else f"{policy} at {utilisation:g}"

        def turn_done(num_done: int) -> None:
            self._watch(label, min(num_done, num_turns), num_turns)

        turn_done(0)
        return turn_done


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
