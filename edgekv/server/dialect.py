"""What one API is: JSON to what is asked, and events to its own JSON and SSE. Pure, no sockets.

The server calls a stream's writer so, and sends what it returns, "" or more, at once:

    begin()                          before anything was computed or even queued
    event(event, choice)*            of each of the `n` answers; Failed goes to `fail`
    heartbeat()*                     when nothing else was sent for a while
    end() | fail(fault)              the last
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edgekv.chat.events import Event, Finished
from edgekv.chat.values import Completion
from edgekv.server.fields import Fault, Fields

NUM_ANSWERS_MAX = 16


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request of an API.

    Attributes:
        completion: What is asked, without what headers say (session, priority, prefill).
        model: As the client calls it; said back to it.
        stream: Whether the answer comes in pieces.
        num_answers: So many answers to the same prompt.
        terms: What the dialect wants to remember for its answer.
    """

    completion: Completion
    model: str = ""
    stream: bool = False
    num_answers: int = 1
    terms: Any = None


@dataclass(frozen=True, kw_only=True)
class About:
    """What answers say of the request itself."""

    request_id: str  # 32 hex digits
    created_s: int  # Unix time


class Writer(ABC):
    """One stream's events as bytes of its API; see the module."""

    @abstractmethod
    def begin(self) -> str:
        """The opening."""

    @abstractmethod
    def event(self, event: Event, choice: int = 0) -> str:
        """What happened, of one answer; "" if the API does not say it."""

    @abstractmethod
    def heartbeat(self) -> str:
        """What shows that the request lives."""

    @abstractmethod
    def end(self) -> str:
        """The last."""

    @abstractmethod
    def fail(self, fault: Fault) -> str:
        """The last, where something went wrong."""


class Dialect(ABC):
    """One API's generating endpoint."""

    media_type = "text/event-stream"  # of streams

    @abstractmethod
    def parse(self, body: Fields) -> Asked:
        """What a request's body asks. Raises Fault."""

    @abstractmethod
    def writer(self, asked: Asked, about: About) -> Writer:
        """Of one stream."""

    @abstractmethod
    def whole(self, asked: Asked, about: About, answers: Sequence[Finished]) -> dict[str, Any]:
        """The answer that does not stream."""

    @abstractmethod
    def error(self, fault: Fault) -> dict[str, Any]:
        """Why there is none."""


def sse(data: str, event: str = "") -> str:
    """One server-sent event."""
    return f"event: {event}\ndata: {data}\n\n" if event else f"data: {data}\n\n"
