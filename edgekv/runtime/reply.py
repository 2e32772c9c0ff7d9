"""A reply while it is made (streams, sync and async) and once it is there."""

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

from edgekv.engine.outbox import Delta, Event, Failed, Finished, FinishReason, Outbox, TokenLogprobs
from edgekv.errors import EdgeKVError, RequestTimeout
from edgekv.metrics import Stats


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A whole answer, or what there was of it when it was cancelled.

    Attributes:
        text: The answer.
        token_ids: Its tokens, an end-of-sequence token not included.
        finish_reason: "stop" (end of sequence or stop string), "length" or "cancelled".
        stats: Its figures.
        logprobs: One entry a token where they were asked for.
        gaps_ms: Milliseconds between its tokens, as the engine knew them.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stats: Stats
    logprobs: tuple[TokenLogprobs, ...] = ()
    gaps_ms: tuple[float, ...] = field(default=(), repr=False)


class _Collector:
    """Events of one request → deltas, and in the end the reply. Shared by both kinds of stream.

    Args:
        outbox: Where the events come from.
        cancel: Takes the request back.
        record: Called with the reply, if there is one, before anybody can see it.
        over: Set once the reply is recorded or nobody is left to read it.
    """

    def __init__(
        self,
        outbox: Outbox,
        cancel: Callable[[], None],
        record: Callable[[Reply], None],
        over: threading.Event,
    ) -> None:
        self.outbox = outbox
        self.cancel = cancel
        self._record = record
        self._over = over
        self._deltas: list[Delta] = []
        self._end_lock = threading.Lock()  # taken once, by who takes the end in
        self.reply: Reply | None = None
        self.error: EdgeKVError | None = None

    @property
    def done(self) -> bool:
        """Whether the request has ended, well or badly."""
        return self.reply is not None or self.error is not None

    def take(self, event: Event) -> Delta | None:
        """Take an event in; a delta is for the caller, anything else ends the request."""
        match event:
            case Delta():
                self._deltas.append(event)
                return event
            case _ if not self._end_lock.acquire(blocking=False):
                pass  # another reader has taken the end in
            case Finished():
                try:
                    self._finish(event)
                except BaseException:  # a Ctrl-C: who closes the stream takes the end in again
                    self._end_lock.release()
                    raise
            case Failed(error=error):
                self.error = error
                self._over.set()
        return None

    def _finish(self, end: Finished) -> None:
        reply = Reply(
            text="".join(d.text for d in self._deltas),
            token_ids=tuple(t for d in self._deltas for t in d.token_ids),
            finish_reason=end.finish_reason,
            stats=end.stats,
            logprobs=tuple(p for d in self._deltas for p in d.logprobs),
            gaps_ms=end.gaps_ms,
        )
        self._record(reply)
        self.reply = reply
        self._over.set()

    def raise_error(self) -> None:
        """Raise what the request failed with, if it did."""
        if self.error is not None:
            raise self.error

    def __del__(self) -> None:
        # Here, not in the streams: a task that is cancelled while a thread submits for it never
        # gets as far as a stream.
        if not self.done:
            self.cancel()  # first, so that the engine hears of it before the session's next request
            self._over.set()


class ReplyStream:
    """Deltas as they come. Leaving a loop over it, closing it or dropping it cancels the request.

    One reader at a time.
    """

    def __init__(self, collector: _Collector, timeout_s: float | None) -> None:
        self._collector = collector
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s

    @property
    def done(self) -> bool:
        """Whether the request has ended."""
        return self._collector.done

    @property
    def prefill_progress(self) -> tuple[int, int]:
        """Prompt tokens that have KV, and all prompt tokens; any thread may ask."""
        return self._collector.outbox.prefill_progress

    @property
    def reply(self) -> Reply | None:
        """The reply, once the request has ended without error."""
        return self._collector.reply

    def wait(self, timeout_s: float | None = None) -> Delta | None:
        """The next delta; None when `timeout_s` passed without one or the request has ended.

        Raises:
            RequestTimeout: The request's own time is over; it was cancelled.
            EdgeKVError: The request failed.
        """
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while not self.done:
            limits = [t for t in (end, self._deadline) if t is not None]
            left = max(0.0, min(limits) - time.monotonic()) if limits else None
            event = self._collector.outbox.get(left)
            if event is None:
                self._check_deadline()
                return None
            if (delta := self._collector.take(event)) is not None:
                return delta
        self._collector.raise_error()
        return None

    def _check_deadline(self) -> None:
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self._deadline = None
            self.close()
            raise RequestTimeout("the request did not end in time", hint="give it more time")

    def __iter__(self) -> "ReplyStream":
        return self

    def __next__(self) -> Delta:
        delta = self.wait()
        if delta is None:
            raise StopIteration
        return delta

    def close(self) -> None:
        """Cancel the request if it runs, and wait until the engine has let go of it."""
        if self.done:
            return
        self._collector.cancel()
        while not self.done:
            event = self._collector.outbox.get(None)
            assert event is not None
            self._collector.take(event)

    def __enter__(self) -> "ReplyStream":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class AsyncReplyStream:
    """The asyncio twin of ReplyStream; never blocks the loop."""

    def __init__(self, collector: _Collector) -> None:
        self._collector = collector

    @property
    def done(self) -> bool:
        """Whether the request has ended."""
        return self._collector.done

    @property
    def prefill_progress(self) -> tuple[int, int]:
        """Prompt tokens that have KV, and all prompt tokens."""
        return self._collector.outbox.prefill_progress

    @property
    def reply(self) -> Reply | None:
        """The reply, once the request has ended without error."""
        return self._collector.reply

    def __aiter__(self) -> "AsyncReplyStream":
        return self

    async def __anext__(self) -> Delta:
        try:
            while not self.done:
                delta = self._collector.take(await self._collector.outbox.aget())
                if delta is not None:
                    return delta
        except asyncio.CancelledError:
            await self.aclose()
            raise
        self._collector.raise_error()
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Cancel the request if it runs, and wait until the engine has let go of it."""
        if self.done:
            return
        self._collector.cancel()
        while not self.done:
            self._collector.take(await self._collector.outbox.aget())

    async def __aenter__(self) -> "AsyncReplyStream":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()
