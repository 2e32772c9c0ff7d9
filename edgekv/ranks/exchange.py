"""One array a step through the group: what rank 0 tells, and what the others say of their disks.

    words:  count │ of each rank: exchanges so far, reports │ orders of rank 0, the first of them
    and where these do not fit, a second array with the rest

Each rank fills in its own places and zeros elsewhere, and the sum is what all have said. So what
rank 0 tells goes down, and what the others report comes up, in one collective.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from edgekv.errors import EngineFailed
from edgekv.ranks.group import Group
from edgekv.ranks.orders import Verb, from_int, from_text, to_int, to_text
from edgekv.ranks.verdict import IDLE, WAITING

WORKING = "busy with what it was told"
REPORTS_MAX = 8  # of one rank at a time; more wait for the next exchange
ORDER_WORDS = 1024
AGREED_WORDS = 512  # of each rank
_FAILURE_BYTES = 2 * AGREED_WORDS  # of what it says; four fit in a word


class Report(NamedTuple):
    """An I/O job has ended on a rank."""

    job: int
    num_done: int  # of its parts, in order
    error: int  # what ended it, see `lead.ERRORS`; 0 if nothing did
    stored_end: int  # tokens of the session that its store has now


_RANK_WORDS = 2 + REPORTS_MAX * len(Report._fields)


class Heard(NamedTuple):
    """What all ranks have said."""

    orders: list[int]
    reports: list[list[Report]]  # by rank


class Exchange:
    """Exchanges of one rank. Owned by its engine thread; no step may run."""

    def __init__(
        self,
        group: Group,
        note: Callable[[int, str], None],
        wake: Callable[[], None] = lambda: None,
        rest: Callable[[], None] = lambda: None,
    ) -> None:
        """`note` is told how many there were, and what this rank does now; others: `Liveness`."""
        self.group = group
        self._note = note
        self._wake, self._rest_now = wake, rest
        self._all_rest = False
        self._count = 0

    def rests(self) -> None:
        """Rank 0 has nothing to do, so all rest until its next exchange."""
        if self.group.size > 1 and not self._all_rest:
            self([Verb.REST, 0])
            self._all_rest = True
        self._note(self._count, IDLE)

    def rest(self) -> None:
        """Another rank rests: who waits in an exchange takes a core."""
        self._note(self._count, WAITING)
        self._rest_now()

    def __call__(self, orders: Sequence[int] = (), reports: Sequence[Report] = ()) -> Heard:
        """Tell and hear; all ranks call it, rank 0 with orders, the others with reports.

        Raises:
            EngineFailed: A rank has done more or fewer of them.
            RuntimeError: A rank is gone.
        """
        assert len(reports) <= REPORTS_MAX
        if self._all_rest:
            self._all_rest = False
            self._wake()
        self._note(self._count, WAITING)
        size, rank = self.group.size, self.group.rank
        first = 1 + size * _RANK_WORDS
        words = np.zeros(first + ORDER_WORDS, np.int32)
        words[0] = len(orders)
        said = [self._count, len(reports), *(word for report in reports for word in report)]
        start = 1 + rank * _RANK_WORDS
        words[start : start + len(said)] = said
        told = orders[:ORDER_WORDS]
        words[first : first + len(told)] = told
        heard = self.group.exchange(words)
        num_orders = int(heard[0])
        all_orders = heard[first : first + min(num_orders, ORDER_WORDS)].tolist()
        if num_orders > ORDER_WORDS:
            all_orders += self._rest(orders, num_orders - ORDER_WORDS)
        by_rank = [self._reports(heard, other) for other in range(size)]
        self._count += 1
        self._note(self._count, WORKING)
        return Heard(all_orders, by_rank)

    def _rest(self, orders: Sequence[int], count: int) -> list[int]:
        words = np.zeros(-(-count // ORDER_WORDS) * ORDER_WORDS, np.int32)
        rest = orders[ORDER_WORDS:]
        words[: len(rest)] = rest
        told: list[int] = self.group.exchange(words)[:count].tolist()
        return told

    def _reports(self, heard: np.ndarray, rank: int) -> list[Report]:
        words = heard[1 + rank * _RANK_WORDS :][:_RANK_WORDS].tolist()
        if words[0] != self._count:
            raise EngineFailed(
                f"rank {rank} is at its exchange number {words[0]}, rank {self.group.rank} at "
                f"number {self._count}: they do not do the same",
                hint="this is a bug in edgekv; please report it",
            )
        width = len(Report._fields)
        return [Report(*words[2 + i * width :][:width]) for i in range(words[1])]


def agree(group: Group, digest: str, pool_bytes: int, failure: str = "") -> int:
    """Make sure that all ranks have loaded the same; all call it, also who could not load.

    Args:
        group: The ranks.
        digest: Of all that must be the same everywhere.
        pool_bytes: What this rank has for KV.
        failure: Why this rank cannot take part; "" if it can.

    Returns:
        The least of all ranks' `pool_bytes`.

    Raises:
        EngineFailed: A rank has failed, or loaded something else; it is named.
    """
    words = np.zeros((group.size, AGREED_WORDS), np.int32)
    failure = failure.encode("utf-8", "replace")[:_FAILURE_BYTES].decode("utf-8", "ignore")
    said = [*from_int(pool_bytes), *from_text(digest), *from_text(failure)]
    words[group.rank, : len(said)] = said
    rows = group.exchange(words.reshape(-1)).reshape(words.shape).tolist()
    for rank, row in enumerate(rows):
        theirs, at = to_text(row, 2)
        reason, _ = to_text(row, at)
        if reason and rank != group.rank:
            raise EngineFailed(f"rank {rank} could not load the model: {reason}")
        if not reason and not failure and theirs != digest:
            raise EngineFailed(
                f"rank {rank} has something else than rank {group.rank}: {theirs} is not {digest}",
                hint="give all of them the same model files and the same release of edgekv",
            )
    return min(to_int(row[0], row[1]) for row in rows)
