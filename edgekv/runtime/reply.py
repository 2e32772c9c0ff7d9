"""A reply while it is made (streams, sync and async) and once it is there.

Who leaves a stream in the middle, drops it or is interrupted takes the request back; what there was
of the answer becomes the reply all the same. A stream that is dropped cannot wait for that, because
the garbage collector may run on any thread, the engine's too: its session takes the end in, before
it does anything else.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Generic, Self

from typing_extensions import TypeVar

from edgekv.chat.values import ToolCall
from edgekv.config import check_float
from edgekv.engine.outbox import Delta, Failed, Finished, FinishReason, Outbox, TokenLogprobs
from edgekv.errors import EdgeKVError, RequestTimeout
from edgekv.metrics import Stats
from edgekv.process import Home

T = TypeVar("T")
V = TypeVar("V", default=None)  # a Reply is of no type unless one was asked for

TIMEOUT_S_MAX = 1e6  # what threads and loops can wait: 11 days


@dataclass(frozen=True, kw_only=True)
class Reply(Generic[V]):
    """A whole answer, or what there was of it when it was cancelled.

    Attributes:
        text: The answer; where tools or a schema were given, without reasoning and calls.
        token_ids: Its tokens, an end-of-sequence token not included.
        finish_reason: "stop" (end of sequence or stop string), "length" or "cancelled".
        stats: Its figures.
        logprobs: One entry a token where they were asked for.
        gaps_ms: Milliseconds between its tokens, as the engine knew them.
        stop: The stop string that ended it.
        value: What it is where a schema was given, unless it calls tools or was cancelled.
        reasoning: Where tools or a schema were given: what the model thought before it spoke.
        tool_calls: What it wants called, and nobody has called yet; with "length" the last may
            be cut.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stats: Stats
    logprobs: tuple[TokenLogprobs, ...] = ()
    gaps_ms: tuple[float, ...] = field(default=(), repr=False)
    stop: str | None = None
    value: V = None  # type: ignore[assignment]  # V is None unless there is one
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


class RunningReply:
    """Events of one request → deltas, and in the end the reply. Shared by its stream and session.

    `cancel` takes the request back; `record` gets the reply before anybody can see it, and `save`
    has on disk what became of that: it may wait for the drive. In a forked child the request will
    never end: nothing is waited for there.
    """

    def __init__(
        self,
        outbox: Outbox,
        cancel: Callable[[], None],
        record: Callable[[Reply], None],
        save: Callable[[], None],
        home: Home,
    ) -> None:
        self.outbox = outbox
        self.home = home
        self._cancel = cancel
        self._record = record
        self._save = save
        self._taking = threading.Lock()  # guards what follows, and the order of deltas
        self._pieces: list[str] = []  # of the text
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self.reply: Reply | None = None
        self.error: EdgeKVError | None = None
        self.taken_back = False  # nobody waits for it any more: it ends soon
        self._why: EdgeKVError | None = None  # it is not who reads that took it back

    @property
    def done(self) -> bool:
        """Whether the request has ended, well or badly."""
        return self.reply is not None or self.error is not None

    def take(self) -> Delta | None:
        """Take in the event that waits, if there is one.

        A delta is for the caller, anything else ends the request.
        """
        with self._taking:
            match self.outbox.take():
                case Delta() as delta:
                    self._add(delta)
                    return delta
                case Finished() as end if not self.done:
                    reply = self._reply(end)
                    self._record(reply)
                    try:
                        self._save()
                    finally:  # whatever that raises, the request has ended
                        if end.finish_reason == "cancelled" and self._why is not None:
                            self.error = self._why
                        else:
                            self.reply = reply
                case Failed() as end if not self.done:
                    self.error = end.error
        return None

    def _add(self, delta: Delta) -> None:
        if delta.retract:
            self._pieces = [self.text[: -delta.retract]]
        self._pieces.append(delta.text)
        self._ids += delta.token_ids
        self._logprobs += delta.logprobs

    @property
    def text(self) -> str:
        """What there is of the answer, as whoever took all deltas in sees it."""
        return "".join(self._pieces)

    def _reply(self, end: Finished) -> Reply:
        return Reply(
            text=self.text,
            token_ids=tuple(self._ids),
            finish_reason=end.finish_reason,
            stats=end.stats,
            logprobs=tuple(self._logprobs),
            gaps_ms=end.gaps_ms,
            stop=end.stop,
        )

    def take_back(self, why: EdgeKVError | None = None) -> None:
        """Cancel the request if it runs; waits for nothing.

        Who reads it is told `why`, if that is given; the session has what there was all the same.
        """
        if not self.done and self.home.is_here:
            self._why = self._why or why
            self.taken_back = True
            self._cancel()

    def finish(self) -> None:
        """Take the request back, and wait until the engine has let go of it."""
        self.take_back()
        while not self.done and self.home.is_here:
            self.outbox.wait(None)
            self.take()

    async def atake(self) -> Delta | None:
        """Wait for an event, and take it in; the end on a thread, for it waits for the disk."""
        await self.outbox.await_event()
        if self.outbox.has_delta:
            return self.take()
        await in_thread(self.take)
        return None

    async def afinish(self) -> None:
        """`finish` without blocking the loop; a task that is cancelled meanwhile waits, too."""
        self.take_back()
        cancelled: asyncio.CancelledError | None = None
        while not self.done and self.home.is_here:
            try:
                await self.atake()
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            raise cancelled


class _Stream:
    """What both kinds of stream can say at any time, from any thread."""

    def __init__(self, running: RunningReply, session: object = None) -> None:
        self._running = running
        self._session = session  # which is open as long as somebody reads

    @property
    def done(self) -> bool:
        """Whether the request has ended."""
        return self._running.done

    @property
    def text(self) -> str:
        """The answer so far, after all deltas that were read: what some took back is not in it."""
        return self._running.text

    @property
    def prefill_progress(self) -> tuple[int, int]:
        """Prompt tokens that have KV, and all prompt tokens.

        KV that is predicted counts only if answers are not confirmed.
        """
        return self._running.outbox.prefill_progress

    @property
    def reply(self) -> Reply | None:
        """The reply, once the request has ended without error."""
        return self._running.reply

    def cancel(self) -> None:
        """Take the request back, and wait for nothing: whoever reads on reads its end."""
        self._running.take_back()

    def __del__(self) -> None:
        self._running.take_back()


class ReplyStream(_Stream):
    """Deltas as they come. Leaving a loop over it, closing it or dropping it cancels the request.

    One reader at a time.
    """

    def __init__(
        self, running: RunningReply, session: object = None, *, timeout_s: float | None = None
    ) -> None:
        super().__init__(running, session)
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s

    def wait(self, timeout_s: float | None = None) -> Delta | None:
        """The next delta; None when `timeout_s` passed without one or the request has ended.

        Raises:
            ConfigError: `timeout_s` is no number of seconds, 0 to 1,000,000.
            RequestTimeout: The request's own time is over; it was cancelled.
            EdgeKVError: The request failed.
        """
        check_timeout(timeout_s)
        running = self._running
        running.home.check()
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while not running.done:
            limits = [t for t in (end, self._deadline) if t is not None]
            left = max(0.0, min(limits) - time.monotonic()) if limits else None
            if not running.outbox.wait(left):
                self._check_deadline()
                return None
            if (delta := running.take()) is not None:
                return delta
        if running.error is not None:
            raise running.error
        return None

    def _check_deadline(self) -> None:
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self._deadline = None
            self.close()
            raise RequestTimeout("the request did not end in time", hint="give it more time")

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Delta:
        delta = self.wait()
        if delta is None:
            raise StopIteration
        return delta

    def close(self) -> None:
        """Cancel the request if it runs, and wait until the engine has let go of it.

        In a forked process it returns: the request is the parent's.
        """
        self._running.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class AsyncReplyStream(_Stream):
    """The asyncio twin of ReplyStream; never blocks the loop."""

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        running = self._running
        running.home.check()
        try:
            while not running.done:
                if (delta := await running.atake()) is not None:
                    return delta
        except asyncio.CancelledError:
            await self.aclose()
            raise
        raise running.error or StopAsyncIteration

    async def aclose(self) -> None:
        """Cancel the request if it runs, and wait until the engine has let go of it.

        In a forked process it returns: the request is the parent's.
        """
        await self._running.afinish()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()


async def in_thread(function: Callable[[], T]) -> T:
    """Run where it does not block the loop; a task that is cancelled meanwhile waits for its end.

    The thread goes on all the same, and who asks again must not meet what it does.
    """
    running = asyncio.ensure_future(asyncio.to_thread(function))
    cancelled: asyncio.CancelledError | None = None
    while not running.done():
        try:
            await asyncio.wait({running})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        running.exception()  # so that it counts as seen
        raise cancelled
    return running.result()


@contextlib.asynccontextmanager
async def in_time(timeout_s: float | None) -> AsyncIterator[None]:
    """What is inside is cancelled after this time. Raises RequestTimeout then."""
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError:
        raise RequestTimeout("the request did not end in time", hint="give it more time") from None


def check_timeout(timeout_s: float | None) -> None:
    """Make sure that it can be waited so long. Raises ConfigError."""
    if timeout_s is not None:
        check_float("timeout_s", timeout_s, 0.0, TIMEOUT_S_MAX)
