"""Who of the ranks is still there, while engine threads are where nothing can interrupt them.

An engine thread inside a collective waits for the others for ever. So each rank has a thread that
never touches MLX, and says every second over a control connection how far its engine thread is.
Rank 0 learns of a rank that ended at once, of one that is silent after 5 s, of one that is stuck
after `stuck_s`; it tells its owner, and lets go of the others. They end when rank 0 is gone:
nobody could tell them anything any more, and what they hold is a part of nothing.
"""

import contextlib
import os
import selectors
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NoReturn

from edgekv.ranks.control import Gone, Message, Peer, attend, gather
from edgekv.ranks.launched import JOIN_S, LEFT_ALONE_S, Launched
from edgekv.ranks.verdict import ENDING, JOINING, Bounds, Report, judge

BEAT_S = 1.0
_FAREWELL_S = 1.0  # at most, to hear the others' end
_REASON_CHARS_MAX = 1024

Failure = tuple[int, str]  # whose, and what


class Liveness:
    """This rank's part in it. `note` is for the engine thread, the rest for its owner.

    `on_failure(rank, reason)` is called once at most, on rank 0 alone, on the control thread, when
    one of the others fails or rank 0's own engine thread is stuck: "rank 1 (10.0.0.2) ended". Then
    the others are let go of, and end.
    """

    def __init__(
        self,
        launched: Launched,
        on_failure: Callable[[int, str], None],
        stuck_s: float = Bounds.stuck_s,
    ) -> None:
        self._launched = launched
        self._on_failure = on_failure
        self._bounds = Bounds(stuck_s=stuck_s)
        self._noted = (0, JOINING, time.monotonic())  # replaced as a whole: no lock
        self._peers: dict[int, Peer] = {}
        self._reason = ""  # of this rank's failure
        self._rested = 0  # how often this rank did
        self._woken = 0
        self._wakes = threading.Condition()  # guards it
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, timeout_s: float = JOIN_S) -> None:
        """Wait until all ranks are there, then watch them on a thread. Call it before `join`.

        Raises:
            EngineFailed: Some did not come in time, or rank 0 refused this one.
            ConfigError: One runs another version of edgekv or MLX.
        """
        if self._launched.rank == 0:
            self._peers = gather(self._launched, timeout_s)
        else:
            self._peers = {0: attend(self._launched, timeout_s)}
        self._thread = threading.Thread(target=self._watch, name="edgekv-liveness", daemon=True)
        self._thread.start()

    def note(self, counter: int, phase: str) -> None:
        """Say how many exchanges the engine thread has done, and what it begins to do now."""
        before = self._noted[:2]
        if before == (counter, phase):
            return
        self._noted = (counter, phase, time.monotonic())
        if before[1] == JOINING:  # from now on it may not be silent for long: others should know
            self._tell(self._beat())

    def wake(self) -> None:
        """Rank 0 has something to do: those that rest go on, or do not rest at all."""
        with self._wakes:
            self._woken += 1
        self._tell(self._beat())

    def rest(self) -> None:
        """Wait until rank 0 wakes this one: in MLX's ring a thread that waits would spin."""
        self._rested += 1
        with self._wakes:
            self._wakes.wait_for(lambda: self._woken >= self._rested)

    def fail(self, reason: str) -> None:
        """This rank gives up: the others hear why. From now on it watches nobody."""
        self._reason = reason[:_REASON_CHARS_MAX]
        self._end()

    def close(self) -> None:
        """It is over: rank 0 lets the others end by themselves, another one was told to end.

        Whoever says so before it goes has not failed; whoever was not told calls `fail`.
        """
        self.note(self._noted[0], ENDING)
        self._end()

    def _end(self) -> None:
        self._closed.set()
        self._tell(self._beat())
        for peer in self._peers.values():
            peer.end()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _beat(self) -> Message:
        counter, phase, since_s = self._noted
        phase_s = time.monotonic() - since_s
        return {
            "counter": counter,
            "phase": phase,
            "phase_s": phase_s,
            "failed": self._reason,
            "woken": self._woken,
        }

    def _tell(self, message: Message) -> None:
        for peer in self._peers.values():
            with contextlib.suppress(Gone):  # whoever reads next learns it
                peer.send(message)

    # --- the control thread ---

    def _watch(self) -> None:
        try:
            failure = self._failure()
        except Exception as error:  # noqa: BLE001 - unseen, nobody would watch any more
            failure = self._named(self._launched.rank, f"cannot watch the others: {error!r}")
        if self._launched.rank == 0 and failure is not None:
            self._on_failure(*failure)
        for peer in self._peers.values():
            peer.close()
        if self._launched.rank == 0:
            return
        patience_s = LEFT_ALONE_S if failure is None else 0.0  # it was told to end, and will
        if not self._closed.wait(patience_s):
            self._exit(failure)

    def _failure(self) -> Failure | None:
        """Watch until a rank fails; None once it is over."""
        reports = {rank: Report(rank=rank) for rank in self._peers}
        beat_s, farewell_s = 0.0, float("inf")  # when the next is due; when enough was waited
        with selectors.DefaultSelector() as selector:
            for rank, peer in self._peers.items():
                selector.register(peer, selectors.EVENT_READ, rank)
            while reports and (now := time.monotonic()) < farewell_s:
                if self._closed.is_set():
                    farewell_s = min(farewell_s, now + _FAREWELL_S)
                if now >= beat_s:
                    beat_s = now + BEAT_S
                    self._tell(self._beat())
                ready = {key.data for key, _ in selector.select(beat_s - now)}
                # A process that was stopped itself could not hear: that is nobody's silence.
                passed_s = min(time.monotonic() - now, 2 * BEAT_S)
                if (gone := self._take(reports, ready, passed_s)) is not None:
                    selector.unregister(self._peers[gone])
                    if reports.pop(gone).phase != ENDING and not self._closed.is_set():
                        return self._named(gone, "ended")
                if failure := self._judged([*reports.values()]):
                    return failure
        return None

    def _take(self, reports: dict[int, Report], ready: set[int], passed_s: float) -> int | None:
        """Take in what came; return a rank that is gone, if there is one."""
        for report in list(reports.values()):
            try:
                reports[report.rank] = self._heard(report, ready, passed_s)
            except Gone:
                return report.rank
        return None

    def _heard(self, report: Report, ready: set[int], passed_s: float) -> Report:
        """What is known of a rank now. Raises Gone."""
        messages = self._peers[report.rank].receive() if report.rank in ready else []
        if not messages:
            return replace(report, silent_s=report.silent_s + passed_s)
        try:
            heard = Report(rank=report.rank, **messages[-1])
        except TypeError:  # another field
            raise Gone from None
        if not heard.rank:
            with self._wakes:
                self._woken = max(self._woken, heard.woken)
                self._wakes.notify_all()
        return heard

    def _judged(self, reports: list[Report]) -> Failure | None:
        if self._closed.is_set():
            return None
        if self._launched.rank == 0:
            found = judge([self._own(), *reports], self._bounds)
        else:  # rank 0 may be stopped by whoever sits before it: silence is all that counts
            found = judge(reports, Bounds(silence_s=self._bounds.stuck_s, stuck_s=float("inf")))
        return None if found is None else self._named(*found)

    def _own(self) -> Report:
        return Report(rank=0, **self._beat())

    def _named(self, rank: int, what: str) -> Failure:
        return rank, f"{self._launched.name(rank)} {what}"

    def _exit(self, failure: Failure | None) -> NoReturn:
        """End the process, whatever its other threads are in."""
        if failure is not None:
            line = f"error: {self._launched.name(self._launched.rank)} ends: {failure[1]}\n"
            with contextlib.suppress(OSError):
                os.write(2, line.encode())
        os._exit(0 if failure is None else 1)
