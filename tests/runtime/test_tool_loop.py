"""A model that calls functions, until it answers in text.

A random model calls nothing by itself: `says` forces its answers, one after the other, by grammars.
"""

import asyncio
import dataclasses
from collections.abc import Callable
from dataclasses import replace

import pytest

from edgekv.chat.events import CallEnded, Event, Finished, TextDelta
from edgekv.chat.functions import read_tools
from edgekv.chat.typed import AnswerType
from edgekv.chat.values import ChatMessage, Completion, Tool, ToolCall
from edgekv.config import SamplingParams
from edgekv.errors import ConfigError, SessionBusy
from edgekv.runtime import App
from edgekv.runtime.completions import Completions
from edgekv.tokenizer.constraint import begin
from edgekv.tokenizer.grammar import Grammar

BERN = r'\{"name": "weather", "arguments": \{"city": "Bern"\}\}'
ROME = BERN.replace("Bern", "Rome")
NOON = r'\{"name": "clock", "arguments": \{\}\}'
DONE = r"It is warm\."
Says = Callable[..., list[Completion]]


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Says:
    """Has the model answer with texts of these patterns; what it is asked comes into the list."""

    def force(*patterns: str) -> list[Completion]:
        asked: list[Completion] = []

        def grammar(self: Completions, completion: Completion, prompt: str) -> Grammar:
            asked.append(completion)
            return Grammar(kind="regex", text=patterns[len(asked) - 1])

        monkeypatch.setattr(Completions, "_grammar", grammar)
        return asked

    return force


def weather(city: str) -> str:
    """Weather of a city."""
    return f"18 degrees in {city}"


def clock() -> dict[str, int]:
    """The time of the day."""
    return {"hour": 12}


def contents(messages: list[ChatMessage]) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in messages]


def test_calls_are_run_until_there_is_an_answer(app: App, says: Says) -> None:
    asked = says(BERN, NOON, DONE)
    session = app.session()
    reply = session.respond("Weather in Bern at noon?", tools=[weather, clock])
    assert (reply.text, reply.tool_calls, reply.value) == ("It is warm.", (), None)
    assert contents(session.messages) == [
        ("user", "Weather in Bern at noon?"),
        ("assistant", ""),
        ("tool", "18 degrees in Bern"),
        ("assistant", ""),
        ("tool", '{"hour":12}'),
        ("assistant", "It is warm."),
    ]
    called, result = session.messages[1:3]
    (call,) = called.tool_calls
    assert (call.name, call.arguments) == ("weather", '{"city": "Bern"}')
    assert (result.call_id, result.name) == (call.call_id, "weather")
    assert [tool.name for tool in asked[0].tools] == ["weather", "clock"]
    assert reply.stats.num_cached_tokens > 300, "what was said before is not computed anew"


def test_several_calls_of_one_answer_are_run_in_order(app: App, says: Says) -> None:
    says(f"{BERN}\n{ROME}", DONE)
    session = app.session()
    session.respond("Weather?", tools=[weather])
    results = [message.content for message in session.messages if message.role == "tool"]
    assert results == ["18 degrees in Bern", "18 degrees in Rome"]


def test_what_a_function_raises_is_said_to_the_model(app: App, says: Says) -> None:
    def weather(city: str) -> str:
        raise LookupError(f"no such city: {city}")

    asked = says(BERN, r'\{"name": "weather", "arguments": \{"town": 5\}\}', DONE)
    reply = app.complete("Weather?", tools=[weather])
    assert reply.text == "It is warm."
    first, second = (m.content for m in asked[-1].messages if m.role == "tool")
    assert first == "error: LookupError: no such city: Bern"
    assert second.startswith("error: city: Missing required argument")


def test_rounds_have_an_end_and_the_calls_that_are_left_are_the_callers(
    app: App, says: Says
) -> None:
    asked = says(BERN, BERN, BERN, DONE)
    session = app.session()
    reply = session.respond("Weather?", tools=[weather], tool_rounds_max=2)
    assert len(asked) == 3
    assert (reply.text, len(reply.tool_calls)) == ("", 1)
    again = session.respond([reply.tool_calls[0].result("enough")], tools=[weather])
    assert again.text == "It is warm."


def test_calls_of_tool_values_are_the_callers(app: App, says: Says) -> None:
    says(BERN, DONE)
    session = app.session("kept")
    tools = [Tool(name="weather", parameters='{"type": "object"}')]
    reply = session.respond("Weather?", tools=tools)
    (call,) = reply.tool_calls
    assert (call.name, call.arguments, reply.text) == ("weather", '{"city": "Bern"}', "")
    after = session.respond([call.result("18 degrees")], tools=tools)
    assert after.text == "It is warm."
    assert after.stats.num_cached_tokens >= reply.stats.num_prompt_tokens
    roles = [message.role for message in session.messages]
    assert roles == ["user", "assistant", "tool", "assistant"]


def test_a_kept_session_has_its_calls_after_a_restart(
    restart: Callable[[], App], says: Says
) -> None:
    says(BERN, DONE, DONE)
    with restart().session("trip") as session:
        session.respond("Weather?", tools=[weather])
        before = session.messages
    session = restart().session("trip")
    assert session.messages == before
    reply = session.respond("Thanks.", tools=[weather])
    assert reply.stats.num_restored_tokens > 0
    assert reply.text == "It is warm."


def test_a_call_cut_by_the_length_is_not_run(app: App, says: Says) -> None:
    says(BERN)
    ran: list[str] = []

    def weather(city: str) -> None:
        ran.append(city)

    reply = app.session().respond(
        "Weather?", tools=[weather], sampling=SamplingParams(max_tokens=35)
    )
    assert reply.finish_reason == "length"
    assert not ran


def test_a_stream_has_the_events_of_all_rounds_and_no_call_in_its_text(
    app: App, says: Says
) -> None:
    says(BERN, DONE)
    with app.session().stream("Weather?", tools=[weather]) as stream:
        events: list[Event] = list(stream)
    ends = [event.reason for event in events if isinstance(event, Finished)]
    assert ends == ["tool_calls", "stop"]
    assert any(isinstance(event, CallEnded) for event in events)
    assert "".join(e.text for e in events if isinstance(e, TextDelta)) == "It is warm."
    assert stream.reply is not None
    assert stream.reply.text == "It is warm."


def test_leaving_between_rounds_asks_no_more(app: App, says: Says) -> None:
    asked = says(BERN, DONE)
    session = app.session()
    with session.stream("Weather?", tools=[weather]) as stream:
        next(event for event in stream if isinstance(event, Finished))
    assert len(asked) == 1
    assert not session.busy


def test_asyncio_awaits_what_must_be(app: App, says: Says) -> None:
    says(BERN, NOON, DONE)

    async def weather(city: str) -> str:
        await asyncio.sleep(0.01)
        return f"cold in {city}"

    session = app.session()
    reply = asyncio.run(session.arespond("Weather?", tools=[weather, clock]))
    assert reply.text == "It is warm."
    results = [message.content for message in session.messages if message.role == "tool"]
    assert results == ["cold in Bern", '{"hour":12}']
    with pytest.raises(ConfigError, match="must be awaited: weather"):
        session.respond("Weather?", tools=[weather])


def test_an_interrupt_leaves_the_call_and_the_session_goes_on(app: App, says: Says) -> None:
    def weather(city: str) -> None:
        raise KeyboardInterrupt

    says(BERN, DONE)
    session = app.session()
    with pytest.raises(KeyboardInterrupt):
        session.respond("Weather?", tools=[weather])
    assert [message.role for message in session.messages] == ["user", "assistant"]
    assert session.respond("And now?", tools=[weather]).text == "It is warm."


def test_a_turn_of_another_while_a_function_runs_is_kept(app: App, says: Says) -> None:
    other = app.session("both")

    def weather(city: str) -> str:
        other.respond("Something else", sampling=SamplingParams(max_tokens=2))
        return city

    says(BERN, DONE)
    with pytest.raises(SessionBusy, match="another turn"):
        app.session("both").respond("Weather?", tools=[weather])
    said = [message.content for message in other.messages if message.role == "user"]
    assert said == ["Weather?", "Something else"]


# --- with a schema ---


@dataclasses.dataclass
class Report:
    sky: bool


def allows(app: App, asked: Completion, text: str) -> bool:
    """Whether a completion's grammar lets a model say this, and end there."""
    completions, tokenizer = app._runtime._completions, app._runtime.tokenizer
    grammar = completions._grammar(asked, "")
    assert grammar is not None
    constraint = begin(grammar, tokenizer)
    for token in tokenizer.encode(text):
        if not constraint.mask(tokenizer.vocab_size)[token]:
            return False
        constraint.take(token)
    return constraint.may_end


@pytest.mark.parametrize("kind", ["type", "json_object"])
def test_an_answer_in_json_may_be_calls_before_it_is_that(app: App, kind: str) -> None:
    grammar = AnswerType(Report).grammar if kind == "type" else Grammar(kind="json_object")
    asked = Completion(tools=read_tools([weather])[0], grammar=grammar)
    call = '{"name": "weather", "arguments": {"city": "Bern"}}'
    assert allows(app, asked, '{"sky": true}')
    assert allows(app, asked, call)
    assert allows(app, asked, f"{call}\n{call}")
    assert not allows(app, asked, "It is warm.")
    assert not allows(app, asked, '{"sky": true}\n' + call)
    if kind == "json_object":
        assert allows(app, asked, '{"name": "Bern", "weather": []}')
    else:
        assert not allows(app, asked, call.replace("weather", "sky"))
        assert not allows(app, replace(asked, tool_choice="none"), call)


def test_a_typed_answer_comes_after_the_calls(app: App, says: Says) -> None:
    says(BERN, r'\{"sky": true\}')
    reply = app.complete("Report.", schema=Report, tools=[weather])
    assert reply.value == Report(sky=True)
    says(BERN)
    left = app.complete("Report.", schema=Report, tools=[weather], tool_rounds_max=0)
    assert (left.value, len(left.tool_calls)) == (None, 1)


def test_a_result_is_a_message_of_its_call() -> None:
    call = ToolCall(call_id="call_7", name="weather", arguments="{}")
    result = call.result("18")
    assert result == ChatMessage(role="tool", content="18", call_id="call_7", name="weather")
