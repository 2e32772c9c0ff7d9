"""Many users on one thread, and what came of their requests.

    def user():
        yield Pause(500.0)                                         # thinks for half a second
        reply = yield from driver.ask("app", session, ids, 20)     # reads the answer to its end
        ...

A thread a user would wake up at every token and take the interpreter from the engine, which is
what is being measured. Here one thread looks every few milliseconds; when a token came is the
engine's own account.
"""

import heapq
import itertools
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass

from edgekv.bench.figures import Stopwatch, curve, tail, ttft_ms
from edgekv.bench.report import Row
from edgekv.config import Sampling
from edgekv.errors import EdgeKVError
from edgekv.runtime import Reply, ReplyStream, Session

_POLL_S = 4e-3


@dataclass(frozen=True)
class Pause:
    """Nothing happens for a while."""

    ms: float


User = Generator[Pause | ReplyStream, Reply | None, None]
Tick = Callable[[float], None]  # told the milliseconds since the start


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request and what came of it.

    One that time cut off counts too: with what came of its answer, and if nothing had come yet,
    with the time it had waited as its TTFT, which is less than it would have been. Else starving
    somebody would remove the evidence.
    """

    who: str  # the app that asked
    # Its token ids; a tuple, which the garbage collector does not look into again and again.
    prompt: tuple[int, ...]
    reply: Reply  # the answer, or what there was of it
    num_computed: int  # prompt tokens whose KV was there
    submitted_ms: float  # by the driver's clock
    waited_ms: float  # from then to the end
    whole: bool = True  # whether time let it be answered to its end

    @property
    def ttft_ms(self) -> float:
        """Submission to first token, or as long as there was none."""
        return ttft_ms(self.reply.stats) if self.reply.token_ids else self.waited_ms

    @property
    def num_tokens(self) -> int:
        """Prompt tokens that were there, and tokens of the answer."""
        return self.num_computed + len(self.reply.token_ids)


def num_unanswered(asked: Sequence[Asked]) -> int:
    """Requests without a first token."""
    return sum(not each.reply.token_ids for each in asked)


def latencies(asked: Sequence[Asked]) -> Row:
    """Percentiles of TTFT and of the time between tokens."""
    return tail("ttft_ms", [a.ttft_ms for a in asked]) | tail("tbt_ms", gaps_ms(asked))


def latency_samples(asked: Sequence[Asked]) -> Row:
    """Their distributions."""
    return {"ttft_ms": curve([a.ttft_ms for a in asked]), "tbt_ms": curve(gaps_ms(asked))}


def gaps_ms(asked: Sequence[Asked]) -> list[float]:
    """Every gap between two tokens of an answer."""
    return [gap for each in asked for gap in each.reply.gaps_ms]


class Driver:
    """Plays users until all are done, or time is up. Owned by the thread that runs it.

    A request that fails is raised where its user waits for it, and is not among `asked`.
    """

    def __init__(self) -> None:
        self.asked: list[Asked] = []  # as they ended
        self._watch = Stopwatch()
        self._order = itertools.count()
        self._pauses: list[tuple[float, int, User]] = []  # a heap: until when, whose turn
        self._streams: list[tuple[ReplyStream, User]] = []
        self._waiting: dict[ReplyStream, str] = {}  # who waits

    @property
    def now_ms(self) -> float:
        """Milliseconds since the driver was made."""
        return self._watch.ms()

    def backlogged(self) -> frozenset[str]:
        """Who waits for a prompt to be computed, all or in part."""
        progress = ((who, stream.prefill_progress) for stream, who in self._waiting.items())
        return frozenset(who for who, (done, total) in progress if done < total)

    def ask(
        self, who: str, session: Session, prompt: list[int], num_tokens: int
    ) -> Generator[ReplyStream, Reply | None, Reply]:
        """A user's request, answered greedily with exactly so many tokens."""
        submitted_ms, reply = self.now_ms, None
        sampling = Sampling(max_tokens=num_tokens, ignore_eos=True)
        stream = session.submit_ids(prompt, sampling)
        self._waiting[stream] = who
        try:
            reply = yield stream
        finally:
            del self._waiting[stream]
            if stream.reply is not None:  # else it failed
                asked = Asked(
                    who=who,
                    prompt=tuple(prompt),
                    reply=stream.reply,
                    num_computed=stream.prefill_progress[0],
                    submitted_ms=submitted_ms,
                    waited_ms=self.now_ms - submitted_ms,
                    whole=reply is not None,
                )
                self.asked.append(asked)
        assert reply is not None
        assert len(reply.token_ids) == num_tokens, "an answer was cut"
        return reply

    def run(
        self,
        users: Iterable[User],
        *,
        for_ms: float | None = None,
        tick: Tick | None = None,
        tick_ms: float = 250.0,
    ) -> None:
        """Play; the users' first moves are made at once.

        After `for_ms` they are closed where they wait, so that `finally` blocks run; None plays
        to the end. `tick` is called about every `tick_ms`, and at the end.
        """
        end_ms = None if for_ms is None else self.now_ms + for_ms
        next_tick_ms = self.now_ms
        waiting = list(users)
        try:
            while waiting:
                self._move(waiting.pop(0), None)
            while self._pauses or self._streams:
                now_ms = self.now_ms
                if end_ms is not None and now_ms >= end_ms:
                    break
                if tick is not None and now_ms >= next_tick_ms:
                    tick(now_ms)
                    next_tick_ms = now_ms + tick_ms
                while self._pauses and self._pauses[0][0] <= now_ms:
                    self._move(heapq.heappop(self._pauses)[2], None)
                self._poll()
                time.sleep(_POLL_S)
            if tick is not None:
                tick(self.now_ms)
        finally:
            self._close(waiting)

    def _poll(self) -> None:
        for entry in list(self._streams):
            stream, user = entry
            error = _drain(stream)
            if stream.done:
                self._streams.remove(entry)
                self._move(user, stream.reply, error)

    def _move(self, user: User, reply: Reply | None, error: EdgeKVError | None = None) -> None:
        """Let a user move, and note what it waits for next."""
        try:
            waits_for = user.send(reply) if error is None else user.throw(error)
        except StopIteration:
            return
        match waits_for:
            case Pause(ms):
                heapq.heappush(self._pauses, (self.now_ms + ms, next(self._order), user))
            case stream:
                self._streams.append((stream, user))

    def _close(self, waiting: list[User]) -> None:
        users = [*waiting, *(u for _, _, u in self._pauses), *(u for _, u in self._streams)]
        for stream, _ in self._streams:
            stream.close()
        self._pauses.clear()
        self._streams.clear()
        for user in users:
            user.close()


def _drain(stream: ReplyStream) -> EdgeKVError | None:
    """Take what there is; return what the request failed with, if it did."""
    try:
        while stream.wait(0.0) is not None:
            pass
    except EdgeKVError as error:
        return error
    return None
