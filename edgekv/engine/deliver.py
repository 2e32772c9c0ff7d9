"""Tokens → text → events, behind the step that runs next."""

from edgekv.clock import Clock
from edgekv.engine.outbox import Delta, Finished, TokenLogprobs
from edgekv.engine.request import Request


class Deliverer:
    """Tokens and endings not yet told to their callers, in order. Owned by the engine thread."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._queue: list[tuple[Request, int | None, TokenLogprobs | None]] = []

    @property
    def begins(self) -> bool:
        """Whether the first token of an answer is queued."""
        return any(request.first_visible_ms is None for request, _, _ in self._queue)

    def add(self, request: Request, token: int, logprobs: TokenLogprobs | None) -> None:
        """Queue one output token."""
        self._queue.append((request, token, logprobs))

    def finish(self, request: Request) -> None:
        """Queue a request's end."""
        self._queue.append((request, None, None))

    def deliver(self) -> list[Request]:
        """Tell everything that is queued; return the requests whose text met a stop string."""
        queue, self._queue = self._queue, []
        stopped = []
        for request, token, logprobs in queue:
            if token is None:
                self._tell_end(request)
            elif not request.at_stop and self._tell_token(request, token, logprobs):
                stopped.append(request)
        return stopped

    def _tell_token(self, request: Request, token: int, logprobs: TokenLogprobs | None) -> bool:
        """Tell what the token completes; True if that ends with a stop string."""
        request.unsent_ids.append(token)
        if logprobs is not None:
            request.unsent_logprobs.append(logprobs)
        text, stop = request.stop_matcher.push(request.detokenizer.push(token))
        request.at_stop = stop is not None
        if text or request.unsent_logprobs:
            self._put(request, text)
        return request.at_stop

    def _tell_end(self, request: Request) -> None:
        reason = request.finish_reason
        assert reason is not None
        if request.at_stop:
            reason = "stop"
        else:
            text, stop = request.stop_matcher.push(request.detokenizer.flush())
            text += "" if stop else request.stop_matcher.flush()
            reason = "stop" if stop else reason
            if text or request.unsent_ids:
                self._put(request, text)
        stats = request.stats(self._clock.now_ms())
        gaps_ms = tuple(request.gaps_ms)
        request.outbox.put(Finished(finish_reason=reason, stats=stats, gaps_ms=gaps_ms))

    def _put(self, request: Request, text: str) -> None:
        if text and request.first_visible_ms is None:
            request.first_visible_ms = self._clock.now_ms()
        delta = Delta(
            text=text,
            token_ids=tuple(request.unsent_ids),
            logprobs=tuple(request.unsent_logprobs),
        )
        request.unsent_ids.clear()
        request.unsent_logprobs.clear()
        request.outbox.put(delta)
