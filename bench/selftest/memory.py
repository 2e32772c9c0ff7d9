"""Checks that KV is updated in place: MLX copies without a word wherever it cannot."""

from collections.abc import Sequence

import mlx.core as mx

from edgekv.bench.selftest.checks import CheckResult, growth_check
from edgekv.bench.selftest.tiny_decoder import HEAD_DIM, TINY, VOCAB_SIZE, tiny_decoder
from edgekv.clock import Clock, MonotonicClock
from edgekv.config import Sampling
from edgekv.device import DeviceProfile
from edgekv.engine.engine import Engine, Loaded
from edgekv.engine.outbox import Delta, Failed, Outbox
from edgekv.engine.request import EngineSession, Request
from edgekv.engine.writes import NO_STAGING
from edgekv.kv.layout import PAGE_BYTES, Heads, KVLayout
from edgekv.kv.pool import KVPool
from edgekv.kv.session_kv import SessionKV
from edgekv.kv.view import StagedView
from edgekv.models.kv_layout import kv_layout
from edgekv.sched.scheduler import SchedulerConfig
from edgekv.tokenizer import IncrementalDetokenizer
from edgekv.tokenizer.vocabulary import Vocabulary

_NUM_HEADS = 16
# Few weights and much KV, in two layers that see everything.
_CONFIG = TINY | {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": _NUM_HEADS,
    "num_key_value_heads": _NUM_HEADS,
    "sliding_window_pattern": 1,
}
_PROMPT_TOKENS = 700
_SETTLING_TOKENS = 4
_WATCHED_TOKENS = 16


def check_decode_copies_nothing(device: DeviceProfile) -> CheckResult:
    """Two sessions decode in the real engine; memory must not rise by one layer's keys."""
    dtype: mx.Dtype = getattr(mx, device.compute_dtype)

    def load() -> Loaded:  # runs on the engine thread
        decoder = tiny_decoder(device, _CONFIG)
        layout = kv_layout(decoder.config, device)
        session_bytes = layout.capacity_bytes(layout.capacity_for(2 * _PROMPT_TOKENS))
        pool = KVPool(layout, dtype, 4 * session_bytes)
        return Loaded(decoder=decoder, pool=pool, staging=NO_STAGING, store=None)

    config = SchedulerConfig(tbt_target_ms=1000.0, prefill_rows_max=device.prefill_rows_max)
    clock = MonotonicClock()
    engine = Engine(load, config, 2, clock)
    engine.start()
    try:
        grown_bytes = _watch_decode(engine, clock)
    finally:
        engine.close()
    keys_bytes = _PROMPT_TOKENS * _NUM_HEADS * HEAD_DIM * dtype.size
    return growth_check("a decode step copies no KV", grown_bytes, keys_bytes)


def _watch_decode(engine: Engine, clock: Clock) -> int:
    """Bytes by which MLX's memory rises while both sessions decode."""
    outboxes = []
    for token in (1, 2):
        request = _request(clock, [token] * _PROMPT_TOKENS)
        outboxes.append(request.outbox)
        engine.submit(request)
    _take_tokens(outboxes, _SETTLING_TOKENS)  # past prefill, in step
    mx.reset_peak_memory()
    # The least of several looks: a single one may fall into a step that holds copies.
    active_bytes = []
    for _ in range(_WATCHED_TOKENS):
        _take_tokens(outboxes, 1)
        active_bytes.append(mx.get_active_memory())
    return mx.get_peak_memory() - min(active_bytes)


def _request(clock: Clock, prompt_ids: list[int]) -> Request:
    visible = Vocabulary(tokens=["a"] * VOCAB_SIZE, scheme="byte_level")
    return Request(
        session=EngineSession(app="self-test"),
        prompt_ids=prompt_ids,
        sampling=Sampling(max_tokens=_SETTLING_TOKENS + _WATCHED_TOKENS + 2),
        detokenizer=IncrementalDetokenizer(visible),
        submitted_ms=clock.now_ms(),
    )


def _take_tokens(outboxes: Sequence[Outbox], num_tokens: int) -> None:
    """Wait for this many tokens of every request.

    Raises:
        EngineFailed: The engine stopped.
    """
    for outbox in outboxes:
        for _ in range(num_tokens):
            event = outbox.get(None)
            if isinstance(event, Failed):
                raise event.error
            assert isinstance(event, Delta), "every token is visible and none is the last"


def check_recycled_buffers(device: DeviceProfile) -> CheckResult:
    """Buffers that the allocator recycles from larger ones are still updated in place.

    MLX donates a buffer to an update only if it is no larger than needed by more than a page, and
    its allocator may hand out one that is: buffers of whole pages are safe, if that is so here.
    """
    dtype: mx.Dtype = getattr(mx, device.compute_dtype)
    tokens = 2048
    layout = KVLayout(
        heads=(Heads(8, HEAD_DIM, HEAD_DIM),), dtype_bytes=dtype.size, context_max=tokens
    )
    keys_bytes = layout.capacity_bytes(tokens) // 2
    worst_bytes = 0
    for extra_bytes in (0, PAGE_BYTES // 2, PAGE_BYTES, 2 * PAGE_BYTES):
        mx.clear_cache()
        # The allocator keeps two freed buffers of this size, for keys and for values.
        mx.eval([mx.zeros((keys_bytes + extra_bytes,), dtype=mx.uint8) for _ in range(2)])
        pool = KVPool(layout, dtype, layout.capacity_bytes(tokens))
        for _ in range(2):  # the pool's own recycling, too
            worst_bytes = max(worst_bytes, _update_bytes(pool, tokens, dtype))
    return growth_check("recycled KV buffers are updated in place", worst_bytes, keys_bytes)


def _update_bytes(pool: KVPool, tokens: int, dtype: mx.Dtype) -> int:
    """Bytes by which memory rises when one token is appended to buffers from the pool."""
    session = SessionKV()
    session.buffers = pool.allocate(tokens)
    row = mx.ones((8, 1, HEAD_DIM), dtype=dtype)
    mx.eval(row, session.buffers.keys, session.buffers.values)
    mx.reset_peak_memory()
    active_bytes = mx.get_active_memory()
    view = StagedView(session, 0)
    view.write(0, row, row)
    keys, values = view.read(0, 1)
    seen = mx.sum(keys) + mx.sum(values)  # a reader of the updated rows, as attention is
    del keys, values
    mx.eval(seen, *view.commit())
    grown_bytes = mx.get_peak_memory() - active_bytes
    session.drop(pool)
    return grown_bytes
