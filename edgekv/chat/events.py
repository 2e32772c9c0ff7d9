"""What happens while an answer is made, and the answer: the one event stream of all protocols.

    Begun  Progress*  (ReasoningDelta | TextDelta | CallBegun CallDelta* CallEnded)*  Finished

or Failed, at any time. `Begun` comes when the request was taken, before it computes. Text that was
told stays.
"""

from dataclasses import dataclass
from typing import Literal

from edgekv.chat.values import ChatMessage
from edgekv.errors import EdgeKVError
from edgekv.metrics import Stats

EndReason = Literal["stop", "length", "tool_calls", "cancelled"]


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """Natural log-probability of one token of the answer, and of the likeliest in its place.

    Attributes:
        token: What it spells; half characters as U+FFFD.
        token_bytes: The same, whole.
        logprob: Of the model's own distribution.
        top: The likeliest, best first; their own `top` is empty.
    """

    token: str
    token_bytes: bytes
    logprob: float
    top: tuple["TokenLogprob", ...] = ()


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens that a request took. `num_cached` of the prompt had KV already."""

    num_prompt: int
    num_cached: int = 0
    num_output: int = 0
    num_reasoning: int = 0  # of the output; approximate, by its part of the text


@dataclass(frozen=True, kw_only=True)
class Begun:
    """The request was taken."""

    num_prompt: int


@dataclass(frozen=True, kw_only=True)
class Progress:
    """So many of the prompt's tokens have KV."""

    num_done: int
    num_prompt: int


@dataclass(frozen=True, kw_only=True)
class ReasoningDelta:
    """More of what the model thinks."""

    text: str


@dataclass(frozen=True, kw_only=True)
class TextDelta:
    """More of what the model says."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CallBegun:
    """The model begins its `index`-th call of a tool."""

    index: int
    call_id: str
    name: str


@dataclass(frozen=True, kw_only=True)
class CallDelta:
    """More of a call's arguments, which are JSON."""

    index: int
    arguments: str


@dataclass(frozen=True, kw_only=True)
class CallEnded:
    """A call is there as a whole; one that was cut by a limit has no end."""

    index: int


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The end of a request that ran.

    Attributes:
        reason: "tool_calls" if it ended by itself and calls something.
        message: The whole answer.
        stop: The stop string that ended it.
        usage: Its tokens.
        stats: Its figures.
        logprobs: One entry a token where they were asked for.
    """

    reason: EndReason
    message: ChatMessage
    usage: Usage
    stats: Stats
    stop: str | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Failed:
    """The end of a request that could not run, or not to its end."""

    error: EdgeKVError


Event = (
    Begun
    | Progress
    | ReasoningDelta
    | TextDelta
    | CallBegun
    | CallDelta
    | CallEnded
    | Finished
    | Failed
)
