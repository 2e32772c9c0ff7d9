"""The slow twins of swapping: on the engine thread, everything each time.

For comparison alone (`edgekv bench switch`). `naive` moves KV as a paged cache of 16-token blocks
has it, one call for each block, layer and k|v; `groups` moves whole ranges with vectored calls.
"""

# ruff: noqa: ARG002 - what it does not do has the arguments of who does

from edgekv.clock import Clock
from edgekv.engine.request import EngineSession
from edgekv.engine.restores import stored_records, whole_payload
from edgekv.engine.swap import SwapCounters
from edgekv.errors import EdgeKVError
from edgekv.kv.layout import BLOCK_TOKENS, KVLayout
from edgekv.kv.pool import Buffers, KVPool
from edgekv.kv.runs import block_pieces, token_runs
from edgekv.store import RecordRef, Store


class SyncSwap:
    """`SwapManager` without threads, staging and reuse. Owned by the engine thread."""

    busy = False

    def __init__(self, store: Store, pool: KVPool, clock: Clock, *, blocks: bool) -> None:
        self.store = store
        self._pool = pool
        self._clock = clock
        self._blocks = blocks
        self._arrived: list[EngineSession] = []
        self.restore_ms_per_token = 0.0
        self.counters = SwapCounters()

    def write_behind(self, session: EngineSession) -> None:
        """Nothing: all is written when the session leaves."""

    def swap_out(self, session: EngineSession) -> None:
        """Write all of a session's KV, then free its buffers."""
        kv = session.kv
        kv.truncate(kv.provenance.exact_prefix)
        if not kv.num_tokens:
            self.forget(session)
            return
        assert kv.buffers is not None
        if session.key is None:
            stored = self.store.session(session.app, session.store_name, persistent=False)
            session.key = stored.key
        try:
            self._write(session.key, kv.tokens, kv.buffers)
        except (EdgeKVError, OSError):
            self.counters.num_io_errors += 1
            self.forget(session)
            return
        kv.stored = kv.handed = kv.num_tokens
        kv.release(self._pool)
        kv.move("swap_out")
        kv.move("swapped_out")
        self.counters.num_swap_outs += 1

    def _write(self, key: int, token_ids: list[int], buffers: Buffers) -> None:
        layout, num_tokens = self._pool.layout, len(token_ids)
        if not self._blocks:
            runs = token_runs(layout, buffers, 0, num_tokens)
            self.store.write(key, 0, token_ids, runs)
            return
        pieces = block_pieces(layout, buffers, 0, num_tokens)
        # A block's heads lie apart, so each piece goes through a buffer of its own, as it would
        # on its way out of a paged cache.
        self.store.write(key, 0, token_ids, [b"".join(piece) for piece in pieces], vectored=False)

    def writing(self, session: EngineSession) -> bool:
        """Nothing is ever on its way."""
        return False

    def truncate(self, session: EngineSession, num_tokens: int) -> None:
        """Forget a session's KV from `num_tokens` on."""
        session.kv.truncate(num_tokens)

    def forget(self, session: EngineSession) -> None:
        """Give up a session's KV."""
        self.counters.num_forgotten_tokens += session.kv.num_tokens
        session.kv.drop(self._pool)

    def match(self, session: EngineSession, token_ids: list[int]) -> int:
        """Nothing on disk is shared."""
        return 0

    def adopt(self, session: EngineSession, token_ids: list[int]) -> None:
        """Nothing on disk is shared."""

    def swap_in(self, session: EngineSession) -> None:
        """Read all that the store has of a session before this returns."""
        kv = session.kv
        kv.move("swap_in")
        start_ms = self._clock.now_ms()
        refs, num_tokens = stored_records(self.store, session)
        try:
            for ref in refs:
                self._read(ref, session)
        except (EdgeKVError, OSError):
            self.counters.num_io_errors += 1
            num_tokens = 0
        self.counters.num_swap_ins += 1
        self.counters.num_restored_tokens += num_tokens
        self.counters.num_forgotten_tokens += kv.num_tokens - num_tokens
        kv.truncate(num_tokens)
        kv.move("swapped_in")
        session.num_restored = num_tokens
        session.restore_ms = self._clock.now_ms() - start_ms
        self.counters.restore_ms += session.restore_ms
        self._arrived.append(session)

    def _read(self, ref: RecordRef, session: EngineSession) -> None:
        layout, buffers = self._pool.layout, session.kv.buffers
        assert buffers is not None
        if not self._blocks:
            runs = token_runs(layout, buffers, ref.start, ref.use_end)
            self.store.read(ref, whole_payload(ref, runs))
            return
        loaded = [bytearray(num_bytes) for num_bytes in _piece_bytes(layout, ref)]
        self.store.read(ref, loaded, vectored=False)
        # Blocks behind `use_end` were read for nothing, as the end of the last one may have been.
        pieces = block_pieces(layout, buffers, ref.start, ref.use_end)
        for piece, data in zip(pieces, loaded, strict=False):
            head_bytes = len(data) // len(piece)
            for head, run in enumerate(piece):
                run[:] = memoryview(data)[head * head_bytes :][: run.nbytes]

    def collect(self) -> list[EngineSession]:
        """The sessions that came back since the last time."""
        arrived, self._arrived = self._arrived, []
        return arrived

    def close_session(self, session: EngineSession) -> None:
        """Forget a closed session."""
        session.kv.drop(self._pool)
        if session.key is not None:
            self.store.remove(session.key)

    def finish(self) -> None:
        """Nothing is ever on its way."""

    def close(self, sessions: list[EngineSession]) -> None:
        """Nothing outlives the process."""

    def check_integrity(self) -> None:
        """Assert what the store promises."""
        self.store.check_integrity()


def _piece_bytes(layout: KVLayout, ref: RecordRef) -> list[int]:
    """Sizes of the pieces that a record was written in: per block, layer and k|v."""
    blocks = [min(BLOCK_TOKENS, ref.end - low) for low in range(ref.start, ref.end, BLOCK_TOKENS)]
    return [
        num_tokens * layout.layer_token_bytes(layer) // 2
        for num_tokens in blocks
        for layer in range(layout.num_layers)
        for _ in range(2)
    ]
