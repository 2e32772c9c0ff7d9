"""Whether a group of ranks still works, from what each says of its engine thread. Pure.

Exchanges are collective, so no rank gets more than one ahead. A rank that waits in an exchange is
as good as the one that it waits for; a rank that does anything else has a bound on it, for what a
plan asks for is a matter of seconds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

JOINING = "joining"  # before the first word: MLX may hold the interpreter's lock
LOADING = "loading"  # weights, for as long as the disk takes
IDLE = "idle"  # rank 0 has no request
WAITING = "waiting"  # in an exchange, for those who are not in it yet
ENDING = "ending"  # it goes, as it should
UNBOUNDED = frozenset({JOINING, LOADING, IDLE, ENDING})


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Seconds: of silence, of silence while joining, of one phase while others wait."""

    silence_s: float = 5.0
    join_s: float = 60.0
    stuck_s: float = 60.0


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one rank said last.

    Attributes:
        rank: Its number.
        counter: How many exchanges its engine thread has done.
        phase: What that does now; a word from above, or any other for what has a bound.
        phase_s: For how long, as it was said.
        silent_s: How long ago.
        failed: Why it gave up, if it did.
        woken: How often it has woken those that rest, of rank 0.
    """

    rank: int
    counter: int = 0
    phase: str = JOINING
    phase_s: float = 0.0
    silent_s: float = 0.0
    failed: str = ""
    woken: int = 0


def judge(reports: Sequence[Report], bounds: Bounds) -> tuple[int, str] | None:
    """The rank that fails its group and what it does ("has not answered for 5 s"), or None."""
    for report in reports:
        if report.failed:
            return report.rank, f"has failed: {report.failed}"
        silence_s = bounds.join_s if report.phase == JOINING else bounds.silence_s
        if report.silent_s > silence_s:
            return report.rank, f"has not answered for {silence_s:g} s"
    return _stuck(reports, bounds.stuck_s)


def _stuck(reports: Sequence[Report], stuck_s: float) -> tuple[int, str] | None:
    """The rank that the others wait for too long; one that waits only where all of them do."""
    if not reports or any(report.phase in UNBOUNDED for report in reports):
        return None
    busy = [report for report in reports if report.phase != WAITING]
    slowest = max(busy or reports, key=lambda report: (report.phase_s, -report.counter))
    if slowest.phase_s <= stuck_s:
        return None
    if not busy and min(report.phase_s for report in reports) <= stuck_s:
        return None
    what = slowest.phase if busy else "waiting, as all others are,"
    return slowest.rank, f"has been {what} for {stuck_s:g} s (exchange {slowest.counter})"
