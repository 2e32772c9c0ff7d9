"""The slow twins of swapping: on the engine thread, everything each time.

For comparison alone (`edgekv bench switch`). `naive` moves KV as a paged cache of 16-token blocks
has it, one call for each block, layer and k|v; `groups` moves whole ranges with vectored calls.
"""

import itertools
import queue
from functools import partial

from edgekv.clock import Clock
from edgekv.engine.request import EngineSession
from edgekv.engine.restores import stored_records, whole_payload
from edgekv.engine.swap import SwapManager, SwapTwin
from edgekv.engine.writes import NO_STAGING
from edgekv.errors import EdgeKVError
from edgekv.kv.layout import BLOCK_TOKENS, KVLayout
from edgekv.kv.pool import Buffers, KVPool
from edgekv.kv.runs import slot_runs, state_runs, token_runs, unpack_state
from edgekv.kv.session_kv import SessionKV
from edgekv.store import RecordRef, Store
from edgekv.store.disk_io import OS_FILES, Files
from edgekv.store.values import state_ends


class PieceFiles(Files):
    """Files that move one buffer a call."""

    buffers_max = 1


class SlowSwap(SwapManager):
    """`SwapManager` without threads, staging and reuse. Owned by the engine thread."""

    def __init__(self, store: Store, pool: KVPool, clock: Clock, *, blocks: bool) -> None:
        """Nothing moves yet; `blocks` moves KV block by block."""
        super().__init__(None, None, queue.SimpleQueue(), pool, NO_STAGING, clock, behind=False)
        self._disk = store
        self._blocks = blocks

    def key(self, session: EngineSession) -> int:
        """The session's key in the store."""
        if session.key is None:
            stored = self._disk.session(session.app, session.store_name, persistent=False)
            session.key = stored.key
        return session.key

    def swap_out(self, session: EngineSession) -> None:
        """Write all of a session's KV, then free its buffers."""
        kv = session.kv
        kv.truncate(kv.provenance.exact_prefix)
        if not kv.num_tokens:
            self.forget(session)
            return
        try:
            self._write(self.key(session), kv)
        except (EdgeKVError, OSError):
            self.counters.num_io_errors += 1
            self.forget(session)
            return
        kv.stored = kv.handed = kv.num_tokens
        kv.states.note_written([kv.num_tokens] if kv.states.recurrent else [])
        kv.release(self._pool)
        kv.move("swap_out")
        kv.move("swapped_out")
        self.counters.num_swap_outs += 1

    def _write(self, key: int, kv: SessionKV) -> None:
        layout, buffers, states = self._pool.layout, kv.buffers, state_runs(kv.states.now)
        assert buffers is not None
        if not self._blocks:
            runs = token_runs(layout, buffers, 0, kv.num_tokens)
            self._disk.write(key, 0, kv.tokens, runs + states)
            return
        pieces = block_pieces(layout, buffers, 0, kv.num_tokens)
        # A block's heads lie apart, so each piece goes through a buffer of its own, as it would
        # on its way out of a paged cache.
        self._disk.write(key, 0, kv.tokens, [*(b"".join(piece) for piece in pieces), *states])

    def swap_in(self, session: EngineSession) -> None:
        """Read all that the store has of a session before this returns."""
        kv = session.kv
        kv.move("swap_in")
        start_ms = self._clock.now_ms()
        refs, num_tokens = stored_records(self._disk, session)
        state = bytearray(self._pool.layout.state_bytes)
        try:
            for ref in refs:
                self._read(ref, session, [state] if state and ref is refs[-1] else [])
        except (EdgeKVError, OSError):
            self.counters.num_io_errors += 1
            num_tokens = 0
        self.counters.num_swap_ins += 1
        self.counters.num_restored_tokens += num_tokens
        self.counters.num_forgotten_tokens += kv.num_tokens - num_tokens
        kv.states.note_written(end for end in state_ends(refs) if end <= num_tokens)
        kv.truncate(num_tokens)
        kv.move("swapped_in")
        if state and num_tokens:
            kv.states.move_on(unpack_state(self._pool.layout, state))
        session.num_restored = num_tokens
        session.restore_ms = self._clock.now_ms() - start_ms
        self.counters.restore_ms += session.restore_ms
        self._arrived.append(session)

    def _read(self, ref: RecordRef, session: EngineSession, state: list[bytearray]) -> None:
        layout, buffers = self._pool.layout, session.kv.buffers
        assert buffers is not None
        if not self._blocks:
            runs = slot_runs(layout, buffers, ref.start, ref.use_end)
            self._disk.read(ref, [*whole_payload(ref, runs), *state])
            return
        loaded = [bytearray(num_bytes) for num_bytes in _piece_bytes(layout, ref)]
        self._disk.read(ref, [*loaded, *state])
        # Blocks behind `use_end` were read for nothing, as the end of the last one may have been.
        pieces = block_pieces(layout, buffers, ref.start, ref.use_end)
        for piece, data in zip(pieces, loaded, strict=False):
            head_bytes = len(data) // len(piece)
            for head, run in enumerate(piece):
                run[:] = memoryview(data)[head * head_bytes :][: run.nbytes]

    def close_session(self, session: EngineSession) -> None:
        """Forget a closed session."""
        session.kv.drop(self._pool)
        if session.key is not None:
            self._disk.remove(session.key)

    def check_integrity(self) -> None:
        """Assert what the store promises."""
        self._disk.check_integrity()


TWINS = {
    "naive": SwapTwin(make=partial(SlowSwap, blocks=True), files=PieceFiles()),
    "groups": SwapTwin(make=partial(SlowSwap, blocks=False), files=OS_FILES),
}


def block_pieces(
    layout: KVLayout, buffers: Buffers, start: int, end: int
) -> list[list[memoryview]]:
    """`token_runs` as a paged cache has it: per 16-token block, layer and k|v, one run a head."""
    pieces: list[list[memoryview]] = []
    for low in range(start, end, BLOCK_TOKENS):
        runs = iter(token_runs(layout, buffers, low, min(low + BLOCK_TOKENS, end)))
        pieces += [
            list(itertools.islice(runs, heads.num))
            for heads in layout.heads
            for dim in heads[1:]
            if dim
        ]
    return pieces


def _piece_bytes(layout: KVLayout, ref: RecordRef) -> list[int]:
    """Sizes of the pieces that a record was written in: per block, layer and k|v."""
    blocks = [min(BLOCK_TOKENS, ref.end - low) for low in range(ref.start, ref.end, BLOCK_TOKENS)]
    return [
        num_tokens * heads.num * dim * layout.dtype_bytes
        for num_tokens in blocks
        for heads in layout.heads
        for dim in heads[1:]
        if dim
    ]
