"""Drives a decoder step by step, as the runner does, but by hand and with all logits."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from edgekv import device
from edgekv.kv.layout import KVLayout
from edgekv.kv.pool import KVPool
from edgekv.kv.session_kv import SessionKV
from edgekv.kv.view import StagedView
from edgekv.models.attention import Segment
from edgekv.models.batch import PackedBatch
from edgekv.models.decoder import Decoder
from edgekv.models.kv_layout import kv_layout

CPU_PROFILE = replace(
    device._cpu(), memory_bytes=1 << 30, pool_bytes=1 << 26, measures_few_rows=False
)
# The paths of Metal in f32, so that they can be compared with the others.
FUSED_PROFILE = replace(
    CPU_PROFILE,
    keeps_quantised=True,
    fused_rope=True,
    fused_attention=True,
    tiles_experts=False,
)


def layout_of(decoder: Decoder, dtype: mx.Dtype = mx.float32) -> KVLayout:
    """The KV layout that a decoder needs."""
    name = str(dtype).rpartition(".")[2]
    return kv_layout(decoder.config, replace(CPU_PROFILE, compute_dtype=name))


class Stepper:
    """A decoder and a pool to run it in. Use it on one thread."""

    def __init__(
        self, decoder: Decoder, *, dtype: mx.Dtype = mx.float32, pool_bytes: int = 1 << 26
    ) -> None:
        self.decoder = decoder
        self.pool = KVPool(layout_of(decoder, dtype), dtype, pool_bytes)

    def session(self, num_tokens: int) -> SessionKV:
        """An empty session with room for `num_tokens`."""
        kv = SessionKV()
        kv.buffers = self.pool.allocate(self.pool.layout.capacity_for(num_tokens))
        return kv

    def step(self, work: Sequence[tuple[SessionKV, Sequence[int]]]) -> list[np.ndarray]:
        """Run one packed step; logits `(rows, vocab)` of each segment, f32."""
        views = [StagedView(kv, kv.num_tokens) for kv, _ in work]
        packed = mx.array([i for _, ids in work for i in ids], dtype=mx.uint32)
        segments = [Segment(view, len(ids)) for view, (_, ids) in zip(views, work, strict=True)]
        batch = PackedBatch(segments, packed)
        hidden = self.decoder.run_layers(self.decoder.embed(packed), batch)
        logits = self.decoder.logits(hidden).astype(mx.float32)
        mx.eval(logits, [array for view in views for array in view.commit()])
        for kv, ids in work:
            kv.append(ids)
        ends = np.cumsum([len(ids) for _, ids in work])
        return np.split(np.array(logits), ends[:-1])

    def logits(
        self, ids: Sequence[int], *, chunks: Iterable[int] = (), kv: SessionKV | None = None
    ) -> np.ndarray:
        """Logits `(T, vocab)` of a text: chunks of these sizes first, then what is left at once."""
        kv = kv or self.session(len(ids))
        rows, start = [], 0
        for size in [*chunks, len(ids)]:
            chunk = ids[start : start + size]
            if chunk:
                rows += self.step([(kv, chunk)])
            start += size
        return np.concatenate(rows)
