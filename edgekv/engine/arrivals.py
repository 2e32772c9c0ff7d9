"""Admitted requests whose KV is not usable yet.

    admit ─▶ buffers get memory, layer by layer ─▶ KV is read back, or copied, or none is ─▶ compute

New memory costs time on the engine thread, so it is spread over the gaps between steps while
others decode; reading costs none of it.
"""

from collections import deque

from edgekv.clock import Clock
from edgekv.engine.request import Request
from edgekv.engine.swap import SwapManager
from edgekv.kv.pool import KVPool
from edgekv.kv.residency import Residency


class Arrivals:
    """Requests on their way into memory, in order. Owned by the engine thread."""

    def __init__(self, pool: KVPool, swap: SwapManager, clock: Clock) -> None:
        self._pool = pool
        self._swap = swap
        self._clock = clock
        self._unready: deque[Request] = deque()

    @property
    def pending(self) -> bool:
        """Whether `advance` has something to do."""
        return bool(self._unready)

    def add(self, request: Request) -> None:
        """A request that was just given buffers."""
        assert request.arriving
        self._unready.append(request)

    def advance(self, until_ms: float) -> list[Request]:
        """Go on until `until_ms`, by one layer at least.

        Returns:
            Requests whose buffers are ready and whose KV need not be read.
        """
        complete = []
        while self._unready:
            request = self._unready[0]
            kv = request.session.kv
            if request.finish_reason is None and request.arriving:
                assert kv.buffers is not None
                if not kv.buffers.ready:
                    kv.buffers.make_ready()
                    if self._clock.now_ms() >= until_ms:
                        break
                    continue
                if kv.residency is Residency.SWAPPED:
                    self._swap.swap_in(request.session)
                else:
                    complete.append(request)
            self._unready.popleft()
        return complete

    def remove(self, request: Request) -> None:
        """A request has left; buffers without memory or KV go back, reads run to their end."""
        if request in self._unready:
            self._unready.remove(request)
            kv = request.session.kv
            if kv.residency is Residency.SWAPPED:
                kv.release(self._pool)
            elif kv.buffers is not None and not kv.buffers.ready:
                kv.drop(self._pool)
