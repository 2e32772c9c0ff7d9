"""Values, events and errors through JSON and back."""

import json
import typing

import pytest

from edgekv import errors
from edgekv.chat import events, wire
from edgekv.chat.events import Event
from edgekv.chat.values import ChatMessage, Completion, Tool, ToolCall
from edgekv.config import Sampling, SamplingParams
from edgekv.engine.outbox import Delta, TokenLogprobs
from edgekv.errors import ConfigError, EdgeKVError, PromptTooLong
from edgekv.metrics import Stats
from edgekv.runtime.reply import Reply
from edgekv.tokenizer.grammar import Grammar

STATS = Stats(
    ttft_ms=None,
    ttft_confirmed_ms=1.5,
    queue_ms=0.0,
    prefill_ms=2.0,
    prefill_mode="predict",
    num_prompt_tokens=3,
    num_cached_tokens=1,
    num_restored_tokens=0,
    restore_ms=0.0,
    num_preemptions=0,
    num_output_tokens=2,
    decode_tokens_per_s=9.5,
    tbt_p50_ms=0.0,
    tbt_max_ms=0.0,
    num_predicted_tokens=0,
    num_repaired_tokens=0,
    repair_agreement=None,
    num_confirmed_tokens=0,
    num_retracted_tokens=0,
    num_forced_tokens=0,
    num_rows_cut=0,
    kv_bytes=1 << 20,
    peak_memory_bytes=1 << 40,
    sampling=Sampling(temperature=0.5, seed=(1 << 64) - 1, stop=("\n", "é")),
)
LOGPROB = events.TokenLogprob(token="�", token_bytes=b"\xff\0", logprob=-0.25)
MESSAGE = ChatMessage(
    role="assistant",
    content="a\u2028b\ud800",
    reasoning="so",
    tool_calls=(ToolCall(call_id="c", name="f", arguments='{"a": 1}'),),
)
EVENTS = (
    events.Begun(num_prompt=3),
    events.Progress(num_done=1, num_prompt=3),
    events.ReasoningDelta(text="so"),
    events.TextDelta(text="a", logprobs=(LOGPROB,)),
    events.CallBegun(index=0, call_id="c", name="f"),
    events.CallDelta(index=0, arguments="{"),
    events.CallEnded(index=0),
    events.Finished(
        reason="tool_calls",
        message=MESSAGE,
        usage=events.Usage(num_prompt=3, num_output=2),
        stats=STATS,
        stop="\n",
        logprobs=(events.TokenLogprob(token="a", token_bytes=b"a", logprob=0.0, top=(LOGPROB,)),),
    ),
)
COMPLETION = Completion(
    messages=(MESSAGE, ChatMessage(role="tool", content="1", call_id="c")),
    tools=(Tool(name="f", parameters='{"type":"object"}'),),
    tool_choice="required",
    grammar=Grammar(kind="regex", text="a+"),
    thinking=False,
    sampling=SamplingParams(max_tokens=3, stop=("x",), temperature=0.0),
    priority="background",
)
OTHERS = (
    COMPLETION,
    Completion(prompt="once"),
    Delta(text="a", token_ids=(1, 2), logprobs=(TokenLogprobs(token_id=1, logprob=-1.0),)),
    Delta(text="", retract=3, provisional=True),
    Reply(
        text="ab",
        token_ids=(1, 2),
        finish_reason="length",
        stats=STATS,
        logprobs=(TokenLogprobs(token_id=1, logprob=-1.0, top=((5, -0.5),)),),
        gaps_ms=(0.5,),
    ),
)


def through(kind, value):
    text = json.dumps(wire.dump(value))
    assert text.isascii(), "no line break of Unicode's cuts a line"
    return wire.load(kind, json.loads(text))


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_an_event_comes_back_as_one_of_all_events(event):
    assert through(Event, event) == event


def test_every_event_is_tried():
    assert {*typing.get_args(Event)} == {*map(type, EVENTS), events.Failed}


@pytest.mark.parametrize("value", OTHERS, ids=lambda value: type(value).__name__)
def test_a_value_comes_back(value):
    assert through(type(value), value) == value


def test_what_is_as_usual_is_not_said():
    assert wire.dump(events.TextDelta(text="Hi")) == {"type": "TextDelta", "text": "Hi"}


# --- errors ---


def all_errors():
    return [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, EdgeKVError)
    ]


@pytest.mark.parametrize("kind", all_errors())
def test_an_error_comes_back_as_one_of_its_class(kind):
    error = kind.__new__(kind)
    EdgeKVError.__init__(error, "what happened", hint="what to do")
    loaded = through(Event, events.Failed(error=error)).error
    assert type(loaded) is kind
    assert (str(loaded), loaded.hint) == ("what happened", "what to do")
    assert loaded.args == ("what happened",)


def test_an_error_has_its_figures():
    error = through(EdgeKVError, PromptTooLong("too long", num_tokens=9, tokens_max=8))
    assert (error.num_tokens, error.tokens_max) == (9, 8)


@pytest.mark.parametrize("name", ["FromTheFuture", "Path", "_SHOWN_CHARS_MAX", 3, None])
def test_an_error_that_is_not_known_is_one_all_the_same(name):
    error = wire.load(EdgeKVError, {"type": name, "message": "new"})
    assert type(error) is EdgeKVError
    assert str(error) == "new"


# --- what anybody may send ---


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([], "Completion is []"),
        ({"messages": "Hi"}, "messages is 'Hi'"),
        ({"messages": ["Hi"]}, "messages[0] is 'Hi'"),
        ({"messages": [{"content": "Hi"}]}, "messages[0].role is missing"),
        ({"messages": [{"role": "king"}]}, "messages[0].role is"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content is 3"),
        ({"sampling": {"max_tokens": True}}, "sampling.max_tokens is True"),
        ({"sampling": {"max_tokens": 0}}, "max_tokens is 0"),
        ({"sampling": {"temperature": "hot"}}, "sampling.temperature is 'hot'"),
        ({"sampling": {"stop": [1]}}, "sampling.stop[0] is 1"),
        ({"thinking": "much"}, "thinking is 'much'"),
        ({"priority": ["background"]}, "priority is"),
    ],
)
def test_what_is_no_such_value_is_refused_and_named(value, said):
    with pytest.raises(ConfigError) as caught:
        wire.load(Completion, value)
    assert said in str(caught.value)


def test_an_event_of_no_known_kind_is_refused():
    with pytest.raises(ConfigError, match="type is 'Completion'"):
        wire.load(Event, {"type": "Completion"})
    with pytest.raises(ConfigError, match=r"token_bytes is '\?'"):
        wire.load(events.TokenLogprob, {"token": "a", "token_bytes": "?", "logprob": 0})


def test_fields_of_a_newer_version_are_left_out():
    assert wire.load(events.Begun, {"num_prompt": 1, "num_more": 2}) == EVENTS[0].__class__(
        num_prompt=1
    )
