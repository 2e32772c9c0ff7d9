"""Priorities that change while the engine runs, as FastSwitch sets them (arXiv 2411.18424). Pure.

FastSwitch's workloads have no priorities of their own: a trace gives every session one and changes
it at an *update frequency*, a number of updates per engine iteration (0.04: every 25 steps). Two
kinds of trace:

* **random**: at each update every session gets a new rank. Nothing predicts who runs next.
* **markov**: at each update a session keeps its rank with probability `KEEP`, else gets a new one.
  Who ran lately is likely to run on: temporal locality. The paper names the idea and no figures;
  `KEEP` is this module's.
"""

import random
from collections.abc import Mapping

from edgekv.config import Priority, check_choice, check_float, check_int
from edgekv.sched.plan import Place, RequestState, Snapshot
from edgekv.sched.policy import Policy

TRACE_KINDS = ("random", "markov")
KEEP = 0.8


class RankTrace:
    """Ranks of sessions by the number of steps that the engine has run; the lowest goes first.

    The same arguments give the same ranks, whoever asks and in which order. Owned by who asks: it
    remembers the updates so far.
    """

    def __init__(self, kind: str, num_sessions: int, update_frequency: float, seed: int) -> None:
        check_choice("trace", kind, TRACE_KINDS)
        check_int("sessions", num_sessions, 1, 1 << 20)
        check_float("update frequency", update_frequency, 1e-6, 1.0)
        self._keep = KEEP if kind == "markov" else 0.0
        self._frequency = update_frequency
        self._num_sessions = num_sessions
        self._seed = seed
        self._number = -1
        self._ranks: list[float] = []
        self._go_to(0)

    def rank(self, session: int, num_steps: int) -> float:
        """A session's rank, in [0, 1), once the engine has run this many steps."""
        number = int(num_steps * self._frequency)
        if number != self._number:
            self._go_to(number)
        return self._ranks[session]

    def _go_to(self, number: int) -> None:
        """Play updates up to `number`, from the start if that has passed."""
        if number < self._number:
            self._number = -1
        while self._number < number:
            self._number += 1
            draw = random.Random(f"ranks {self._seed} {self._number}")
            old = self._ranks if self._number else [0.0] * self._num_sessions
            keep = self._keep if self._number else 0.0
            drawn = [(draw.random(), draw.random()) for _ in old]
            self._ranks = [
                rank if chance < keep else new
                for rank, (chance, new) in zip(old, drawn, strict=True)
            ]


class TracePolicy(Policy):
    """The lowest rank goes first, and may take the memory of any request with a higher one.

    As in FastSwitch's workloads, nothing else counts: no classes, no service, no minimum stay.
    """

    def __init__(self, trace: RankTrace, sessions: Mapping[str, int]) -> None:
        self._trace = trace
        self._sessions = sessions

    def place(self, app: str, priority: Priority, now_ms: float, snapshot: Snapshot) -> Place:
        """By rank."""
        del priority, now_ms
        return (self._rank(app, snapshot),)

    def may_preempt(
        self, waiting: RequestState, running: RequestState, now_ms: float, snapshot: Snapshot
    ) -> bool:
        """Whether `running` ranks behind `waiting`."""
        del now_ms
        return self._rank(waiting.app, snapshot) < self._rank(running.app, snapshot)

    def _rank(self, app: str, snapshot: Snapshot) -> float:
        session = self._sessions.get(app)
        return 1.0 if session is None else self._trace.rank(session, snapshot.num_steps)
