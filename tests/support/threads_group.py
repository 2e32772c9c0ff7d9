"""The ranks of a model in one process: a thread each, of which one runs at a time.

    config = run_ranks(2, lambda group: open_decoder(path, PROFILE, group=group).config)

has what each rank returned. A rank that meets a collective evaluates what it has and waits until
all have come to it; what they came with is checked to be of one kind and shape.
"""

import threading
from collections.abc import Callable
from typing import TypeVar

import mlx.core as mx
import numpy as np

from edgekv.ranks.group import Group

T = TypeVar("T")
_TIMEOUT_S = 60


class _Table:
    """What the ranks have put on the table; whoever holds `turn` runs."""

    def __init__(self, size: int) -> None:
        self.size, self.turn = size, threading.Condition()
        self._given: dict[int, tuple[str, np.ndarray]] = {}
        self._taken: list[np.ndarray] = []
        self._round = 0
        self.failed = False

    def exchange(self, rank: int, kind: str, array: np.ndarray) -> list[np.ndarray]:
        """Give one rank's array and get those of all, in the order of ranks."""
        mine = self._round
        self._given[rank] = (kind, array)
        if len(self._given) == self.size:
            kinds = {(kind, array.shape, array.dtype) for kind, array in self._given.values()}
            assert len(kinds) == 1, f"ranks met in {kinds}"
            self._taken = [self._given[r][1] for r in range(self.size)]
            self._given, self._round = {}, mine + 1
            self.turn.notify_all()
        elif not self.turn.wait_for(lambda: self._round > mine or self.failed, _TIMEOUT_S):
            raise TimeoutError(f"rank {rank} waits in {kind}")
        assert self._round > mine, "another rank has failed"
        return self._taken


class ThreadsGroup(Group):
    """One of several ranks that are threads of this process; counts its collectives."""

    def __init__(self, rank: int, table: _Table) -> None:
        super().__init__(None)
        self.rank, self.size, self._table = rank, table.size, table
        self.num_collectives = 0

    def all_sum(self, x: mx.array) -> mx.array:
        return mx.array(np.sum(self._met("all_sum", x), axis=0)).astype(x.dtype)

    def all_max(self, x: mx.array) -> mx.array:
        return mx.array(np.max(self._met("all_max", x), axis=0)).astype(x.dtype)

    def all_gather(self, x: mx.array) -> mx.array:
        return mx.array(np.concatenate(self._met("all_gather", x))).astype(x.dtype)

    def exchange(self, words: np.ndarray) -> np.ndarray:
        return np.sum(self._table.exchange(self.rank, "exchange", words), axis=0)

    def _met(self, kind: str, x: mx.array) -> list[np.ndarray]:
        self.num_collectives += 1
        wide = x.astype(mx.float32) if mx.issubdtype(x.dtype, mx.floating) else x
        return self._table.exchange(self.rank, kind, np.array(wide))


def run_ranks(size: int, run: Callable[[ThreadsGroup], T]) -> list[T]:
    """What `run` returns for each rank, or what the first raised."""
    table = _Table(size)
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def rank(number: int) -> None:
        with table.turn:
            try:
                results[number] = run(ThreadsGroup(number, table))
            except BaseException as error:  # noqa: BLE001
                errors.append(error)
                table.failed = True
                table.turn.notify_all()

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[number] for number in range(size)]
