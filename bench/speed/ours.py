"""edgekv under measurement, through the embedding API that apps use."""

import contextlib
import itertools
from collections.abc import Sequence

import mlx.core as mx

from edgekv.bench.figures import Stopwatch, ttft_ms
from edgekv.bench.scratch import NO_STORE, layout_of
from edgekv.bench.speed.measure import SideRun, Times
from edgekv.bench.workload import Workload, check_fits, whole
from edgekv.config import GIB, PredictionOptions, PrefillMode, RuntimeConfig, Sampling
from edgekv.device import profile
from edgekv.engine.prefill import ExactPrefill
from edgekv.errors import ConfigError
from edgekv.kv.layout import KVLayout
from edgekv.models.config import DecoderConfig
from edgekv.models.hub import Progress, resolve
from edgekv.runtime import Reply, Runtime, Session

_EXACT = PredictionOptions()
_RESERVE_TOKENS = 256  # what admission sets aside beyond a prompt, at most


class EdgeKVSide:
    """Runs workloads on an open runtime; each run in apps of its own, so that nothing is cached.

    Times are the engine's own, as in `reply.stats`: from the submission to the moment when a
    token is known (TTFT: when its text is out). `foreign_bytes` of MLX memory are not ours.
    """

    def __init__(
        self, runtime: Runtime, *, foreign_bytes: int = 0, prefill: PrefillMode | None = None
    ) -> None:
        self.name = f"edgekv {prefill}" if prefill else "edgekv"
        self._prefill: PrefillMode | None = prefill
        self._runtime = runtime
        self._foreign_bytes = foreign_bytes
        self._run_ids = itertools.count(1)

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> SideRun:
        """Both phases; the decode phase is a second request of every session."""
        mx.clear_cache()
        mx.reset_peak_memory()
        run_id = next(self._run_ids)
        with contextlib.ExitStack() as stack:
            sessions = []
            for number in range(len(prompts)):
                app = self._runtime.app(f"bench-{run_id}-{number}", prefill=self._prefill)
                sessions.append(stack.enter_context(app.session()))
            cold, cold_ms = _answer_together(sessions, prompts, new_tokens)
            known = [[*p, *r.token_ids] for p, r in zip(prompts, cold, strict=True)]
            warm, warm_ms = _answer_together(sessions, known, new_tokens)
        assert all(r.stats.num_cached_tokens == 0 for r in cold), "a cold prompt was cached"
        for ids, reply in zip(known, warm, strict=True):
            # All but the last token, whose logits are needed and which nobody has computed.
            assert reply.stats.num_cached_tokens == len(ids) - 1, "a context lost its KV"
        return SideRun(
            num_prompt_tokens=sum(map(len, prompts)),
            ttft_ms=tuple(ttft_ms(r.stats) for r in cold),
            warm_ttft_ms=tuple(ttft_ms(r.stats) for r in warm),
            cold_ms=cold_ms,
            decode_ms=warm_ms,
            peak_memory_bytes=max(0, mx.get_peak_memory() - self._foreign_bytes),
            tokens=tuple((*a.token_ids, *b.token_ids) for a, b in zip(cold, warm, strict=True)),
            num_predicted=sum(r.stats.num_predicted_tokens for r in cold),
        )


class AllRowsSide(EdgeKVSide):
    """edgekv with all rows through all layers, of a model some of whose layers read others' KV.

    Raises:
        ConfigError: Each layer of the model has KV of its own, so that there is no difference.
    """

    def __init__(self, runtime: Runtime, config: DecoderConfig) -> None:
        if config.kv_layers == config.num_layers:
            raise ConfigError(
                "every layer of this model has KV of its own", hint="leave out --peer all-rows"
            )
        super().__init__(runtime)
        self.name = "edgekv, all rows"

    def run(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> SideRun:
        """As `EdgeKVSide` does; the engine is idle before and after."""
        ExactPrefill.cuts_rows = False
        try:
            return super().run(prompts, new_tokens)
        finally:
            ExactPrefill.cuts_rows = True


def _answer_together(
    sessions: Sequence[Session], prompts: Sequence[Sequence[int]], new_tokens: int
) -> tuple[list[Reply], tuple[Times, ...]]:
    """Submit all prompts at once and wait for all answers, and when their tokens came."""
    sampling = Sampling(max_tokens=new_tokens, ignore_eos=True)
    watch = Stopwatch()
    streams, submitted_ms = [], []
    for session, ids in zip(sessions, prompts, strict=True):
        submitted_ms.append(watch.ms())
        streams.append(session.submit_ids(list(ids), sampling))
    replies, times_ms = [], []
    for stream, at_ms in zip(streams, submitted_ms, strict=True):
        reply = whole(stream)
        replies.append(reply)
        first_ms = at_ms + reply.stats.queue_ms + reply.stats.prefill_ms
        times_ms.append(tuple(itertools.accumulate(reply.gaps_ms, initial=first_ms)))
    return replies, tuple(times_ms)


def open_runtime(
    model: str,
    workloads: Sequence[Workload],
    *,
    progress: Progress | None = None,
    prediction: PredictionOptions = _EXACT,
) -> Runtime:
    """Load a model with a pool in which the largest workload never waits for memory.

    Raises:
        ConfigError: A workload exceeds the model's context or the machine's memory.
        ModelError: See `Runtime.open`.
    """
    path = resolve(model, progress=progress)
    device = profile()
    layout = layout_of(path)
    check_fits(workloads, layout.context_max)
    needed_bytes = max(_pool_bytes(layout, workload) for workload in workloads)
    if needed_bytes > device.memory_bytes * 3 // 4:
        raise ConfigError(
            f"the KV of these sessions needs {needed_bytes / GIB:.1f} GiB; "
            f"the device has {device.memory_bytes / GIB:.1f} GiB",
            hint="ask for fewer sessions or shorter prompts",
        )
    config = RuntimeConfig(
        pool_bytes=max(device.pool_bytes, needed_bytes), store=NO_STORE, prediction=prediction
    )
    return Runtime.open(model, config=config)


def _pool_bytes(layout: KVLayout, workload: Workload) -> int:
    """Buffers of all sessions at their largest, half as much again because they grow in steps."""
    total = 0
    for length in workload.lengths:
        num_tokens = (length + 2 * workload.new_tokens + _RESERVE_TOKENS) * 3 // 2
        total += layout.capacity_bytes(layout.capacity_for(min(num_tokens, layout.context_max)))
    return total
