"""Logits of a whole text, for evaluation: outside any session, chunk by chunk."""

import mlx.core as mx
import numpy as np

from edgekv.engine.ledger import Ledger
from edgekv.errors import CapacityError, PoolTooSmall
from edgekv.kv.session_kv import SessionKV, StagedView
from edgekv.models.attention import Segment
from edgekv.models.decoder import Decoder, PackedBatch


def evaluate_logits(
    decoder: Decoder, ledger: Ledger, token_ids: list[int], *, rows_max: int
) -> np.ndarray:
    """Exact logits of every position.

    The KV comes out of the pool's budget and goes back to it.

    Args:
        decoder: The model.
        ledger: Whose pool lends the KV.
        token_ids: 1 to `ledger.tokens_max` tokens.
        rows_max: Rows computed at a time.

    Returns:
        `(T, vocab)` float32.

    Raises:
        PoolTooSmall: Sessions own too much of the pool right now.
        CapacityError: The memory cannot hold the result.
    """
    assert 0 < len(token_ids) <= ledger.tokens_max
    pool, kv = ledger.pool, SessionKV()
    capacity = pool.layout.capacity_for(len(token_ids))
    if not pool.can_allocate(capacity):
        raise PoolTooSmall(
            f"the KV pool has no room for {len(token_ids)} tokens now",
            hint="close sessions, or open the runtime with a larger pool",
        )
    try:
        logits = np.empty((len(token_ids), decoder.config.vocab_size), dtype=np.float32)
    except MemoryError as error:
        raise CapacityError(str(error), hint="pass fewer tokens at a time") from error
    kv.buffers = pool.allocate(capacity)
    while not kv.buffers.ready:
        kv.buffers.make_ready()
    try:
        for start in range(0, len(token_ids), rows_max):
            chunk = token_ids[start : start + rows_max]
            view = StagedView(kv, start)
            batch = PackedBatch([Segment(view, len(chunk))])
            hidden = decoder.embed(mx.array(chunk, dtype=mx.uint32))
            rows = decoder.logits(decoder.run_layers(hidden, batch)).astype(mx.float32)
            mx.eval(rows, *view.commit())
            logits[start : start + len(chunk)] = np.array(rows, copy=False)
            kv.append(chunk)
    finally:
        kv.drop(pool)
    return logits
