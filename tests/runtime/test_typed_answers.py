"""Answers of a type: what is said is constrained by its schema, and comes back as a value."""

import asyncio
import dataclasses
from typing import Literal

import pydantic
import pytest

from edgekv.chat.events import Begun, Finished, TextDelta
from edgekv.chat.values import ChatMessage, Completion
from edgekv.config import SamplingParams
from edgekv.errors import (
    AnswerInvalid,
    ConfigError,
    GrammarError,
    RequestTimeout,
    RuntimeClosed,
    SessionBusy,
)
from edgekv.runtime import App
from edgekv.tokenizer.grammar import Grammar

SHORT = SamplingParams(max_tokens=60, temperature=1.0, seed=1)


class Weather(pydantic.BaseModel):
    sky: Literal["clear", "grey"]
    warm: bool


@dataclasses.dataclass
class Bounds:
    low: Literal[1, 2]
    high: Literal[3, 4]


JSON_SCHEMA = {"enum": ["north", "south"]}


def test_the_answer_is_a_value_of_the_type(app: App) -> None:
    session = app.session()
    weather = session.respond("And the weather?", schema=Weather, sampling=SHORT)
    assert isinstance(weather.value, Weather)
    assert weather.value == Weather.model_validate_json(weather.text)
    assert weather.tool_calls == ()
    bounds = session.respond("And the bounds?", schema=Bounds, sampling=SHORT).value
    assert isinstance(bounds, Bounds)
    assert bounds.low < bounds.high
    assert session.respond("Where?", schema=JSON_SCHEMA).value in JSON_SCHEMA["enum"]
    roles = [message.role for message in session.messages]
    assert roles == ["user", "assistant"] * 3
    assert session.messages[1].content == weather.text


def test_turns_with_and_without_a_type_are_one_conversation(app: App) -> None:
    session = app.session()
    first = session.respond("Hello", sampling=SamplingParams(max_tokens=5))
    assert first.value is None
    second = session.respond("Where?", schema=JSON_SCHEMA)
    third = session.respond("Why?", sampling=SamplingParams(max_tokens=5))
    assert second.stats.num_cached_tokens >= first.stats.num_prompt_tokens
    assert third.stats.num_cached_tokens >= second.stats.num_prompt_tokens


def test_an_answer_cut_by_its_length_is_an_error_that_has_its_text(app: App) -> None:
    session = app.session()
    with pytest.raises(AnswerInvalid, match="cut by its length before it was Weather") as caught:
        session.respond("Weather?", schema=Weather, sampling=SamplingParams(max_tokens=3))
    assert session.last_reply is not None
    assert session.last_reply.finish_reason == "length"
    assert session.messages[-1].content == caught.value.text == session.last_reply.text
    assert session.respond("Where?", schema=JSON_SCHEMA).value, "it goes on"


def test_what_the_type_refuses_is_an_error(app: App) -> None:
    class Strict(pydantic.BaseModel):
        sky: Literal["clear"]

        @pydantic.field_validator("sky")
        @classmethod
        def _never(cls, sky: str) -> str:
            raise ValueError(f"{sky} is never so")

    with pytest.raises(AnswerInvalid, match=r"not Strict: sky: .*clear is never so"):
        app.session().respond("Sky?", schema=Strict, sampling=SHORT)


def test_a_stream_is_events_and_has_the_value_at_its_end(app: App) -> None:
    with app.session().stream("Where?", schema=JSON_SCHEMA) as stream:
        events = list(stream)
    assert isinstance(events[0], Begun)
    assert isinstance(events[-1], Finished)
    text = "".join(event.text for event in events if isinstance(event, TextDelta))
    assert stream.reply is not None
    assert text == stream.reply.text
    assert stream.reply.value == text.strip().strip('"')
    assert list(stream) == []


def test_the_asyncio_twins_do_the_same(app: App) -> None:
    async def ask() -> None:
        session = app.session()
        reply = await session.arespond("Bounds?", schema=Bounds, sampling=SHORT)
        assert isinstance(reply.value, Bounds)
        async with await session.astream("Where?", schema=JSON_SCHEMA) as stream:
            events = [event async for event in stream]
        assert isinstance(events[-1], Finished)
        assert stream.reply is not None
        assert stream.reply.value in JSON_SCHEMA["enum"]
        complete = await app.acomplete("Bounds?", schema=Bounds, sampling=SHORT)
        assert isinstance(complete.value, Bounds)
        with pytest.raises(RequestTimeout):
            await session.arespond("Weather?", schema=Weather, timeout_s=0)
        finished = await app.acomplete(
            Completion(messages=(ChatMessage(role="user", content="Hi"),), sampling=SHORT)
        )
        assert finished.message.content

    asyncio.run(ask())


def test_an_app_completes_messages_of_the_callers(app: App) -> None:
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where?"}]
    reply = app.complete(said, schema=JSON_SCHEMA, session="trip")
    assert reply.value in JSON_SCHEMA["enum"]
    answer = ChatMessage(role="assistant", content=reply.text)
    more = [*said, answer, {"role": "user", "content": "Why?"}]
    again = app.complete(more, sampling=SamplingParams(max_tokens=4), session="trip")
    assert again.stats.num_cached_tokens >= reply.stats.num_prompt_tokens
    assert again.value is None
    with app.stream("Hello") as stream:
        begun = next(stream)
    assert begun == Begun(num_prompt=app._runtime.count_tokens("Hello"))


def test_leaving_a_stream_cancels_it(app: App) -> None:
    session = app.session()
    with session.stream("Go on", schema={"type": "string", "minLength": 2000}) as stream:
        next(event for event in stream if isinstance(event, TextDelta))
    assert not session.busy
    assert session.last_reply is not None
    assert session.last_reply.finish_reason == "cancelled"


def test_who_waits_is_told_that_another_closed_the_session(app: App) -> None:
    session = app.session()
    stream = session.stream("Go on", schema={"type": "string", "minLength": 2000})
    next(event for event in stream if isinstance(event, TextDelta))
    session.close()
    assert isinstance(list(stream)[-1], Finished)
    assert stream.reply is not None
    assert (stream.reply.finish_reason, stream.reply.value) == ("cancelled", None)
    with pytest.raises(RuntimeClosed):
        session.respond("Where?", schema=JSON_SCHEMA)


def test_what_goes_with_no_type_is_refused(app: App) -> None:
    session = app.session()
    with pytest.raises(ConfigError, match="raw is True"):
        session.respond("x", schema=JSON_SCHEMA, raw=True)
    with pytest.raises(ConfigError, match="grammar and schema"):
        session.respond("x", schema=JSON_SCHEMA, grammar=Grammar(kind="regex", text="a"))
    with pytest.raises(GrammarError, match="#/properties/a"):
        session.respond("x", schema={"properties": {"a": {"type": "nothing"}}})
    with pytest.raises(ConfigError, match="beside it"):
        app.complete(Completion(prompt="x"), schema=JSON_SCHEMA)  # type: ignore[call-overload]
    assert session.messages == []


def test_a_turn_of_somebody_else_is_not_overwritten(app: App) -> None:
    ours, theirs = app.session("both"), app.session("both")
    stale = ours._asked("Where?")
    theirs.respond("First", sampling=SamplingParams(max_tokens=2))
    with pytest.raises(SessionBusy, match="another turn"):
        ours._begin(stale)
    assert ours.messages[0].content == "First"
