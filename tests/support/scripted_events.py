"""An answer's events as they could come, their bytes by any dialect, and bodies gone wrong."""

import copy
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from hypothesis import strategies as st

from edgekv.chat.events import (
    Begun,
    CallBegun,
    CallDelta,
    CallEnded,
    EndReason,
    Event,
    Finished,
    Progress,
    ReasoningDelta,
    TextDelta,
    TokenLogprob,
    Usage,
)
from edgekv.chat.values import ChatMessage, Completion, ToolCall
from edgekv.config import Sampling
from edgekv.metrics import Stats
from edgekv.server.dialect import About, Asked, Dialect, Writer
from edgekv.server.fields import Fault, Fields

ABOUT = About(request_id="0123456789abcdef0123456789abcdef", created_s=1_700_000_000)
USAGE = Usage(num_prompt=100, num_cached=40, num_output=31, num_reasoning=4)
# What breaks readers of lines, of SSE and of JSON.
AWKWARD = 'Paris — "☀"\\ 𝛑\n\ndata: x\r\n\u2028\x85end'


def stats(**fields: Any) -> Stats:
    """Figures of an answer of 31 tokens, a gap of 10 ms before each but the first."""
    usual: dict[str, Any] = {
        **{"ttft_ms": 320.0, "ttft_confirmed_ms": 320.0, "queue_ms": 20.0, "prefill_ms": 300.0},
        **{"prefill_mode": "exact", "num_prompt_tokens": 100, "num_cached_tokens": 40},
        **{"num_restored_tokens": 0, "restore_ms": 0.0, "num_preemptions": 0},
        **{"num_output_tokens": 31, "decode_tokens_per_s": 100.0, "tbt_p50_ms": 10.0},
        **{"tbt_max_ms": 12.0, "num_predicted_tokens": 0, "num_repaired_tokens": 0},
        **{"repair_agreement": None, "num_confirmed_tokens": 0, "num_retracted_tokens": 0},
        **{"num_forced_tokens": 0, "num_rows_cut": 0, "kv_bytes": 1 << 20},
        **{"peak_memory_bytes": 1 << 30, "sampling": Sampling(seed=7)},
    }
    return Stats(**{**usual, **fields})


def finished(
    message: ChatMessage,
    reason: EndReason = "stop",
    *,
    stop: str | None = None,
    logprobs: tuple[TokenLogprob, ...] = (),
) -> Finished:
    """The end of an answer."""
    return Finished(
        **{"reason": reason, "message": message, "usage": USAGE, "stats": stats()},
        stop=stop,
        logprobs=logprobs,
    )


def answer(
    text: str = "", *, reasoning: str = "", calls: Sequence[tuple[str, str]] = ()
) -> ChatMessage:
    """What an assistant said; a call is (name, arguments)."""
    tool_calls = tuple(
        ToolCall(call_id=f"call_{i}", name=name, arguments=arguments)
        for i, (name, arguments) in enumerate(calls)
    )
    return ChatMessage(role="assistant", content=text, reasoning=reasoning, tool_calls=tool_calls)


def events_of(end: Finished) -> list[Event]:
    """All of an answer in pieces of three characters; a call that is cut has no end."""
    message = end.message
    events: list[Event] = [Begun(num_prompt=100), Progress(num_done=60, num_prompt=100)]
    events += [ReasoningDelta(text=piece) for piece in _pieces(message.reasoning)]
    events += [TextDelta(text=piece) for piece in _pieces(message.content)]
    for i, call in enumerate(message.tool_calls):
        events.append(CallBegun(index=i, call_id=call.call_id, name=call.name))
        events += [CallDelta(index=i, arguments=piece) for piece in _pieces(call.arguments)]
        if end.reason != "length" or call is not message.tool_calls[-1]:
            events.append(CallEnded(index=i))
    return [*events, end]


def pieces_of(writer: Writer, events: Iterable[Event]) -> list[str]:
    """What a stream's writer sends, with a heartbeat wherever there may be one."""
    sent = [writer.begin(), writer.heartbeat()]
    for event in events:
        sent += [writer.event(event), writer.heartbeat()]
    return [*sent, writer.end()]


def stream_of(writer: Writer, end: Finished) -> bytes:
    """A whole stream."""
    return "".join(pieces_of(writer, events_of(end))).encode()


def _pieces(text: str) -> list[str]:
    return [text[i : i + 3] for i in range(0, len(text), 3)]


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "text", "user", "tool", "json_schema", "auto", "\ud800"])
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "text", "content", "role", "name", "id", "x"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@st.composite
def spoiled(draw: st.DrawFn, body: dict[str, Any]) -> Any:
    """A body of which up to three places hold something else, or nothing."""
    spoiled_body = copy.deepcopy(body)
    for _ in range(draw(st.integers(1, 3))):
        place: Any = spoiled_body
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            inside = place[key]
            if isinstance(inside, dict | list) and draw(st.booleans()):
                place = inside
                continue
            if draw(st.booleans()):
                place[key] = draw(JSON)
            else:
                del place[key]
            break
    return spoiled_body


def check_asked_or_refused(
    dialect: Dialect, read: Callable[[Fields], Asked | Completion], body: Any
) -> None:
    """Whatever the body: a value that can be hashed, or why not, as a client's fault."""
    fault = None
    try:
        hash(read(Fields(body)))
    except Fault as error:
        fault = error
    assert fault is None or (fault.status == 400 and fault.message)
    assert fault is None or json.dumps(dialect.error(fault))
