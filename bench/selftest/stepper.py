"""A decoder stepped by hand: packed steps outside any engine, with the logits of every row."""

from collections.abc import Sequence

import mlx.core as mx

from edgekv.kv.layout import KVLayout
from edgekv.kv.pool import KVPool
from edgekv.kv.session_kv import SessionKV, StagedView
from edgekv.models.attention import Segment
from edgekv.models.decoder import Decoder, PackedBatch


def layout_of(decoder: Decoder, dtype: mx.Dtype) -> KVLayout:
    """The layout of this decoder's KV."""
    return KVLayout(
        heads=tuple((layer.num_kv_heads, layer.head_dim) for layer in decoder.config.layers),
        dtype_bytes=dtype.size,
        context_max=decoder.config.context_max,
    )


class Stepper:
    """A decoder and the KV of a few sessions. Owned by the calling thread.

    Args:
        decoder: The model.
        dtype: Of the KV.
        lengths: Most tokens of each session.
    """

    def __init__(self, decoder: Decoder, dtype: mx.Dtype, lengths: Sequence[int]) -> None:
        self.decoder = decoder
        layout = layout_of(decoder, dtype)
        capacities = [layout.capacity_for(length) for length in lengths]
        self._pool = KVPool(layout, dtype, sum(map(layout.capacity_bytes, capacities)))
        self._sessions = [SessionKV() for _ in lengths]
        for session, capacity in zip(self._sessions, capacities, strict=True):
            session.buffers = self._pool.allocate(capacity)

    def step(self, work: Sequence[tuple[int, Sequence[int]]]) -> list[mx.array]:
        """One packed step.

        Args:
            work: (session index, its next tokens), in the order of the packed rows.

        Returns:
            Logits `(rows, vocab)` f32 of each entry of `work`.
        """
        sessions = [self._sessions[index] for index, _ in work]
        views = [StagedView(kv, kv.num_tokens) for kv in sessions]
        segments = [Segment(v, len(ids)) for v, (_, ids) in zip(views, work, strict=True)]
        packed = mx.array([token for _, ids in work for token in ids], dtype=mx.uint32)
        hidden = self.decoder.run_layers(self.decoder.embed(packed), PackedBatch(segments))
        logits = self.decoder.logits(hidden).astype(mx.float32)
        mx.eval(logits, *[array for view in views for array in view.commit()])
        outputs, row = [], 0
        for kv, (_, ids) in zip(sessions, work, strict=True):
            kv.append(ids)
            outputs.append(logits[row : row + len(ids)])
            row += len(ids)
        return outputs
