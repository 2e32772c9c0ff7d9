"""Who asks for what: unfinished requests by app, and those that do not decode yet in their lines.

    came ─▶ (no place yet) ──place──▶ a line for each app and class ──decodes──▶ left
                    ▲                                                  │
                    └────────────────────── waits ─────────────────────┘

A plan looks at the heads of the lines alone, so that it costs no more when a thousand wait. A place
in line is that of the moment when a request begins to wait: within a line the policy's order does
not change with time, and hardly with what a row is thought to cost. Whoever is among the heads is
ordered anew in each plan, as things are then.
"""

import bisect
import heapq
from collections import Counter
from collections.abc import Collection, Container, Sequence

from edgekv.config import Priority
from edgekv.ids import RequestId
from edgekv.sched.plan import Place, PlaceOf

HEADS_PER_LINE = 16  # of one app and class that a plan looks at
HEADS_MAX = 64  # of all

Who = tuple[str, Priority]  # an app and a class
Entry = tuple[float, float, RequestId]  # urgency, arrival, request: a place in line


class Demand:
    """Requests by app, and their lines. Owned by whoever carries plans out."""

    def __init__(self) -> None:
        self.unfinished: Counter[str] = Counter()  # by app
        self.waiting: Counter[str] = Counter()  # by app: those in line
        self._unplaced: dict[RequestId, Who] = {}
        self._places: dict[RequestId, tuple[Who, Entry]] = {}
        self._lines: dict[Who, list[Entry]] = {}

    def __contains__(self, request_id: RequestId) -> bool:
        """Whether a request is in line."""
        return request_id in self._places or request_id in self._unplaced

    def came(self, request_id: RequestId, app: str, priority: Priority) -> None:
        """A request was submitted."""
        self.unfinished[app] += 1
        self.waits(request_id, app, priority)

    def waits(self, request_id: RequestId, app: str, priority: Priority) -> None:
        """A request does not decode; if it was in line, it goes there anew."""
        self.decodes(request_id)
        self._unplaced[request_id] = (app, priority)
        self.waiting[app] += 1

    def decodes(self, request_id: RequestId) -> None:
        """A request has no turn to wait for, or none any more; it may not have been in line."""
        who = self._unplaced.pop(request_id, None)
        if who is None:
            placed = self._places.pop(request_id, None)
            if placed is None:
                return
            who, entry = placed
            line = self._lines[who]
            position = bisect.bisect_left(line, entry)
            assert line[position] == entry
            del line[position]
            if not line:
                del self._lines[who]
        _decrement(self.waiting, who[0])

    def is_crowded(self, app: str, priority: Priority) -> bool:
        """Whether who comes now is hardly among those that a plan looks at."""
        return len(self._lines.get((app, priority), ())) >= HEADS_PER_LINE

    def left(self, request_id: RequestId, app: str) -> None:
        """A request has ended."""
        self.decodes(request_id)
        _decrement(self.unfinished, app)

    @property
    def unplaced(self) -> Sequence[RequestId]:
        """Requests without a place in line yet."""
        return tuple(self._unplaced)

    def place(self, request_id: RequestId, urgency: float, arrival_ms: float) -> None:
        """Give a request its place in line."""
        who = self._unplaced.pop(request_id)
        entry = (urgency, arrival_ms, request_id)
        bisect.insort(self._lines.setdefault(who, []), entry)
        self._places[request_id] = (who, entry)

    def heads(self, place_of: PlaceOf, always: Container[str] = ()) -> Collection[RequestId]:
        """The first of each line, and of those the first of all.

        Of apps in `always`, whose memory waits for them, whatever is in front.
        """
        lines = self._lines
        if len(lines) > HEADS_MAX:
            first = heapq.nsmallest(HEADS_MAX, lines, key=lambda who: self._first(who, place_of))
            lines = {who: self._lines[who] for who in first}
        heads = [(who, entry) for who, line in lines.items() for entry in line[:HEADS_PER_LINE]]
        if len(heads) <= HEADS_MAX and lines is self._lines:
            return [entry[2] for _, entry in heads]
        heads = heapq.nsmallest(HEADS_MAX, heads, key=lambda head: (place_of(*head[0]), head[1]))
        ids = [entry[2] for _, entry in heads]
        for who, line in self._lines.items():
            if who[0] in always:
                ids += [entry[2] for entry in line[:HEADS_PER_LINE]]
        return dict.fromkeys(ids)

    def _first(self, who: Who, place_of: PlaceOf) -> tuple[Place, Entry]:
        return place_of(*who), self._lines[who][0]


def _decrement(counts: Counter[str], app: str) -> None:
    counts[app] -= 1
    if not counts[app]:
        del counts[app]
