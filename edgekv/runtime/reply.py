"""A reply while it is made (streams, sync and async) and once it is there.

Who leaves a stream in the middle, drops it or is interrupted takes the request back; what there was
of the answer becomes the reply all the same. A stream that is dropped cannot wait for that, because
the garbage collector may run on any thread, the engine's too: its session takes the end in, before
it does anything else.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

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


class RunningReply:
    """Events of one request → deltas, and in the end the reply. Shared by its stream and session.

    `cancel` takes the request back; `record` gets the reply before anybody can see it.
    """

    def __init__(
        self, outbox: Outbox, cancel: Callable[[], None], record: Callable[[Reply], None]
    ) -> None:
        self.outbox = outbox
        self.cancel = cancel
        self._record = record
        self._finishing = threading.Lock()  # else two who wait would mix up what there was
        self._taking = threading.Lock()  # guards what follows
        self._deltas: list[Delta] = []
        self.reply: Reply | None = None
        self.error: EdgeKVError | None = None
        self.dropped = False  # nobody is left to read it

    @property
    def done(self) -> bool:
        """Whether the request has ended, well or badly."""
        return self.reply is not None or self.error is not None

    def take(self, event: Event) -> Delta | None:
        """Take an event in; a delta is for the caller, anything else ends the request."""
        with self._taking:
            match event:
                case Delta():
                    self._deltas.append(event)
                    return event
                case Finished() if not self.done:
                    reply = Reply(
                        text="".join(d.text for d in self._deltas),
                        token_ids=tuple(t for d in self._deltas for t in d.token_ids),
                        finish_reason=event.finish_reason,
                        stats=event.stats,
                        logprobs=tuple(p for d in self._deltas for p in d.logprobs),
                        gaps_ms=event.gaps_ms,
                    )
                    try:
                        self._record(reply)
                    except Exception:  # of a bug, too, nobody waits for this request any more
                        self.reply = reply
                        raise
                    self.reply = reply
                case Failed(error=error) if not self.done:
                    self.error = error
        return None

    def finish(self) -> None:
        """Cancel the request if it runs, and wait until the engine has let go of it."""
        if self.done:
            return
        self.cancel()
        with self._finishing:
            while not self.done:
                event = self.outbox.get(None)
                assert event is not None
                self.take(event)


class _Stream:
    """What both kinds of stream can say at any time, from any thread."""

    def __init__(self, running: RunningReply) -> None:
        self._running = running

    @property
    def done(self) -> bool:
        """Whether the request has ended."""
        return self._running.done

    @property
    def prefill_progress(self) -> tuple[int, int]:
        """Prompt tokens that have KV, and all prompt tokens."""
        return self._running.outbox.prefill_progress

    @property
    def reply(self) -> Reply | None:
        """The reply, once the request has ended without error."""
        return self._running.reply

    def __del__(self) -> None:
        if not self.done:
            self._running.cancel()
            self._running.dropped = True


class ReplyStream(_Stream):
    """Deltas as they come. Leaving a loop over it, closing it or dropping it cancels the request.

    One reader at a time.
    """

    def __init__(self, running: RunningReply, timeout_s: float | None) -> None:
        super().__init__(running)
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s

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
            event = self._running.outbox.get(left)
            if event is None:
                self._check_deadline()
                return None
            if (delta := self._running.take(event)) is not None:
                return delta
        if self._running.error is not None:
            raise self._running.error
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
        """Cancel the request if it runs, and wait until the engine has let go of it."""
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
        try:
            while not self.done:
                delta = await self._take(await self._running.outbox.aget())
                if delta is not None:
                    return delta
        except asyncio.CancelledError:
            await self.aclose()
            raise
        raise self._running.error or StopAsyncIteration

    async def aclose(self) -> None:
        """Cancel the request if it runs, and wait until the engine has let go of it."""
        if not self.done:
            self._running.cancel()
        while not self.done:
            await self._take(await self._running.outbox.aget())

    async def _take(self, event: Event) -> Delta | None:
        """Take an event in; the end in a thread, for it waits until the turn is on disk."""
        if not isinstance(event, Finished):
            return self._running.take(event)
        taking = asyncio.ensure_future(asyncio.to_thread(self._running.take, event))
        try:
            return await asyncio.shield(taking)
        except asyncio.CancelledError:
            await taking  # the thread goes on all the same, and no other event will come
            raise

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()
