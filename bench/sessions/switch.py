"""`bench switch`: the same conversations under several ways of switching between sessions.

What is compared, FastSwitch's mechanisms one at a time (arXiv 2411.18424):

* **recompute**: a preempted session forgets its KV and computes it again.
* **naive**: on the engine thread, one call for every 16-token block, layer and k|v, everything each
  time. An analogue of swapping in vLLM 0.3.3, FastSwitch's baseline; it is this runtime, not vLLM.
* **groups**: on the engine thread, one vectored call for a whole range of tokens.
* **async**: and on I/O threads.
* **reuse**: and only what the disk does not have yet, written behind the decode. The default.

All run in one process, one after the other, each with a fresh runtime and an empty store. Order and
preemption follow a trace of ranks (`rank_trace`), the same for all.
"""

import gc
import pathlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from edgekv.bench.report import Row, Watch
from edgekv.bench.scratch import layout_of, model_path, scratch_folder
from edgekv.bench.slow_swap import TWINS
from edgekv.bench.sessions.conversations import Conversation, ConversationShape, draw_conversations
from edgekv.bench.sessions.switch_rows import Run, make_rows
from edgekv.bench.sessions.trace import RankTrace, TracePolicy
from edgekv.bench.sessions.turns import app_name, differences, draw_inputs, num_ties, play
from edgekv.config import (
    MIB,
    RuntimeConfig,
    StoreOptions,
    SwapMode,
    SwapOptions,
    check_choice,
    check_float,
)
from edgekv.errors import ConfigError
from edgekv.kv.layout import KVLayout
from edgekv.models.cache import Progress
from edgekv.runtime import Runtime

MODES: dict[str, SwapMode] = {
    "recompute": "off",
    "naive": "async",  # but for `TWINS`
    "groups": "async",
    "async": "async",
    "reuse": "reuse",
}
_CONTEXT_PER_SESSION = 4  # the model's context, in mean conversations
_LARGEST_SHARE = 1.25  # of the largest session, the pool has at least


@dataclass(frozen=True, kw_only=True)
class SwitchOptions:
    """What is run.

    Attributes:
        policies: Keys of `MODES`, in the order in which they run.
        shape: The conversations, but for their tokens.
        session_tokens: Mean tokens of a conversation; None is a quarter of the model's context.
        pool_fraction: Pool, as a fraction of what all sessions' KV takes at their ends.
        trace: Kind of the trace of ranks, one of `TRACE_KINDS`.
        update_frequency: Of the trace, per engine step.
    """

    policies: tuple[str, ...]
    shape: ConversationShape
    session_tokens: int | None = None
    pool_fraction: float = 0.25
    trace: str = "random"
    update_frequency: float = 0.04

    def __post_init__(self) -> None:
        if not self.policies or len(set(self.policies)) < len(self.policies):
            raise ConfigError.of("policy", ",".join(self.policies), "names, each once")
        for policy in self.policies:
            check_choice("policy", policy, tuple(MODES))
        check_float("pool fraction", self.pool_fraction, 1e-4, 100.0)
        self.make_trace()

    def make_trace(self) -> RankTrace:
        """The trace from its start."""
        shape = self.shape
        return RankTrace(self.trace, shape.num_sessions, self.update_frequency, shape.seed)


def run_switch(
    model: str,
    options: SwitchOptions,
    *,
    progress: Progress | None = None,
    watch: Watch | None = None,
) -> list[Row]:
    """Play the conversations under every policy; one row each.

    Args:
        model: A model's reference, or `synthetic`.
        options: What is run.
        progress: Told of a download.
        watch: Told of turns that are done.

    Raises:
        ConfigError: An option is out of range.
        ModelError: The model cannot be had.
        StoreError: The disk has no room for a store.
    """
    with scratch_folder() as scratch:
        path = model_path(model, scratch, progress)
        layout = layout_of(path)
        shape = replace(
            options.shape,
            tokens_mean=options.session_tokens or layout.context_max // _CONTEXT_PER_SESSION,
            tokens_max=layout.context_max - 1,
        )
        conversations = draw_conversations(shape)
        bench = _SwitchBench(path, scratch, options, layout, conversations, watch)
        runs = [bench.run(policy) for policy in options.policies]
        _compare(runs, path)
        return make_rows(model, options.trace, options.update_frequency, shape, runs)


class _SwitchBench:
    """Runs one policy after the other over the same conversations."""

    def __init__(
        self,
        path: pathlib.Path,
        scratch: pathlib.Path,
        options: SwitchOptions,
        layout: KVLayout,
        conversations: Sequence[Conversation],
        watch: Watch | None,
    ) -> None:
        self._path = path
        self._scratch = scratch
        self._options = options
        self._conversations = conversations
        self._watch = watch
        self._token_bytes = layout.token_bytes
        self._num_turns = sum(len(c.turns) for c in conversations)
        sizes = [layout.capacity_bytes(layout.capacity_for(c.num_tokens)) for c in conversations]
        # The largest session must fit beside staging, or its answers would be cut.
        self.pool_bytes = max(
            int(options.pool_fraction * sum(sizes)), int(_LARGEST_SHARE * max(sizes))
        )
        # Twice what all sessions hold: no policy is slowed down by a full disk.
        self.disk_bytes = 2 * sum(sizes) + 64 * MIB

    def run(self, policy: str) -> Run:
        """Play everything under one policy."""
        gc.collect()  # what the policy before left is not this one's
        folder = self._scratch / policy
        twin = TWINS.get(policy)
        swap = SwapOptions(mode=MODES[policy])
        if twin is not None:
            swap = replace(swap, staging_bytes=0)
        config = RuntimeConfig(
            pool_bytes=self.pool_bytes,
            num_sessions_max=len(self._conversations),
            swap=swap,
            store=StoreOptions(folder=folder, disk_bytes=self.disk_bytes),
        )
        sessions = {app_name(i): i for i in range(len(self._conversations))}
        trace_policy = TracePolicy(self._options.make_trace(), sessions)
        with Runtime.open(
            str(self._path), config=config, policy=trace_policy, swap_twin=twin
        ) as runtime:
            run = self._play(policy, runtime)
        shutil.rmtree(folder, ignore_errors=True)
        return run

    def _play(self, policy: str, runtime: Runtime) -> Run:
        inputs = draw_inputs(self._conversations, runtime.tokenizer)
        played = play(runtime, self._conversations, inputs, self._reporter(policy))
        runtime.check_integrity()
        return Run(
            policy=policy,
            played=played,
            token_bytes=self._token_bytes,
            pool=runtime.pool_snapshot(),
            engine=runtime.counters(),
            store=runtime.store_snapshot(),
        )

    def _reporter(self, policy: str) -> Callable[[int], None]:
        def turn_done(num_done: int) -> None:
            if self._watch is not None:
                self._watch(policy, num_done, self._num_turns)

        turn_done(0)
        return turn_done


def _compare(runs: Sequence[Run], path: pathlib.Path) -> None:
    """Note in every run how its answers differ from those of the first."""
    found = [differences(runs[0].played, run.played) for run in runs]
    for run, differing in zip(runs, found, strict=True):
        run.num_differing = len(differing)
    if not any(found):
        return
    config = RuntimeConfig(swap=SwapOptions(mode="off"))
    with Runtime.open(str(path), config=config) as runtime:
        for run, differing in zip(runs, found, strict=True):
            run.num_ties = num_ties(runtime, differing)
