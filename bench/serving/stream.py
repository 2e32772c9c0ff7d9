"""One streamed answer of an OpenAI server: what it said, when, and whether it was whole. Pure."""

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TIMED_OUT = "timed out"
_VISIBLE = ("content", "reasoning_content", "reasoning")  # a model that thinks is at work, too


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came of a request; times in milliseconds since it was sent, None for what never came."""

    total_ms: float
    text: str = ""
    headers_ms: float | None = None  # the response's status and headers
    opening_ms: float | None = None  # its first event
    ttft_ms: float | None = None  # the first that holds text
    gaps_ms: tuple[float, ...] = ()  # between those that hold text
    num_prompt_tokens: int | None = None  # as the server counts
    num_cached_tokens: int | None = None
    num_output_tokens: int = 0  # as the server counts, else events that hold text
    fault: str | None = None  # why it is not whole: a kind of error, not its message

    @property
    def timed_out(self) -> bool:
        """Whether time cut it off."""
        return self.fault == TIMED_OUT


@dataclass(frozen=True, kw_only=True)
class _Usage:
    """Tokens as the server counts them, where it does."""

    num_prompt_tokens: int | None = None
    num_cached_tokens: int | None = None
    num_output_tokens: int | None = None

    @classmethod
    def read(cls, usage: Any) -> "_Usage":
        """Raises TypeError or AttributeError: it is not as it should be."""
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        counts = (usage.get("prompt_tokens"), cached, usage.get("completion_tokens"))
        if not all(count is None or isinstance(count, int) for count in counts):
            raise TypeError("a count is no number")
        prompt, cached, output = counts
        return cls(num_prompt_tokens=prompt, num_cached_tokens=cached, num_output_tokens=output)


class StreamReader:
    """Takes the lines of an event stream, each with its time."""

    def __init__(self) -> None:
        self._text: list[str] = []
        self._text_ms: list[float] = []
        self._opening_ms: float | None = None
        self._usage = _Usage()
        self._finish_reason: str | None = None
        self._fault: str | None = None
        self.done = False

    def take(self, line: str, at_ms: float) -> None:
        """One line; comments and fields other than data say nothing."""
        field, _, value = line.partition(":")
        if field != "data":
            return
        if self._opening_ms is None:
            self._opening_ms = at_ms
        if value.strip() == "[DONE]":
            self.done = True
            return
        try:
            self._take_event(json.loads(value), at_ms)
        except (ValueError, TypeError, AttributeError):  # no JSON, or of a strange shape
            self._fault = self._fault or "malformed event"

    def _take_event(self, event: Any, at_ms: float) -> None:
        if error := event.get("error"):
            kind = error.get("type") if isinstance(error, Mapping) else None
            self._fault = self._fault or f"error event: {kind or 'of no type'}"
        if usage := event.get("usage"):
            self._usage = _Usage.read(usage)
        for choice in event.get("choices") or ():
            self._finish_reason = choice.get("finish_reason") or self._finish_reason
            delta = choice.get("delta") or {}
            if text := "".join(delta.get(name) or "" for name in _VISIBLE):
                self._text.append(text)
                self._text_ms.append(at_ms)

    def answer(
        self, total_ms: float, *, headers_ms: float | None = None, fault: str | None = None
    ) -> Answer:
        """The answer, with what went wrong outside of the stream, if something did."""
        times = self._text_ms
        usage, counted = self._usage, self._usage.num_output_tokens
        return Answer(
            total_ms=total_ms,
            text="".join(self._text),
            headers_ms=headers_ms,
            opening_ms=self._opening_ms,
            ttft_ms=times[0] if times else None,
            gaps_ms=tuple(b - a for a, b in itertools.pairwise(times)),
            num_prompt_tokens=usage.num_prompt_tokens,
            num_cached_tokens=usage.num_cached_tokens,
            num_output_tokens=len(times) if counted is None else counted,
            fault=fault or self._fault or self._missing(),
        )

    def _missing(self) -> str | None:
        if self._finish_reason is None:
            return "no finish_reason"
        if not self.done:
            return "no [DONE]"
        return None if self._text else "empty answer"
