"""Types as schemas and values, Python functions as tools, and messages from what programs have."""

import asyncio
import dataclasses
import enum
import json
from functools import partial
from typing import Annotated, Any, Literal

import pydantic
import pytest
from typing_extensions import TypedDict

from edgekv.chat.functions import read_tools
from edgekv.chat.said import messages_of
from edgekv.chat.typed import AnswerType
from edgekv.chat.values import ChatMessage, Tool, ToolCall
from edgekv.errors import AnswerInvalid, ConfigError, PromptEmpty


class Place(pydantic.BaseModel):
    city: str
    height: int = pydantic.Field(ge=0)


@dataclasses.dataclass
class Spot:
    city: str
    height: int


class Dict(TypedDict):
    city: str
    height: int


class Colour(enum.Enum):
    RED = "red"


TEXT = '{"city": "Bern", "height": 540}'


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        (Place, TEXT, Place(city="Bern", height=540)),
        (Spot, TEXT, Spot("Bern", 540)),
        (Dict, TEXT, {"city": "Bern", "height": 540}),
        (list[Spot], f"[{TEXT}]", [Spot("Bern", 540)]),
        (int | None, "null", None),
        (Colour, '"red"', Colour.RED),
        (Literal["a", "b"], '"b"', "b"),
        ({"type": "array"}, "[1, null]", [1, None]),
    ],
    ids=str,
)
def test_an_answer_becomes_a_value(schema: Any, text: str, value: object) -> None:
    kind = AnswerType(schema)
    assert kind.grammar.kind == "json_schema"
    json.loads(kind.grammar.text)
    read = kind.read(text, cut=False)
    assert read == value
    assert type(read) is type(value)


def test_the_schema_is_the_types() -> None:
    schema = json.loads(AnswerType(Spot).grammar.text)
    assert schema["required"] == ["city", "height"]
    assert schema["properties"]["height"] == {"type": "integer"}
    assert '"enum": ["é"]' in AnswerType({"enum": ["é"]}).grammar.text


def test_a_model_cannot_go_on_with_properties_that_the_type_has_not() -> None:
    class Open(pydantic.BaseModel, extra="allow"):
        properties: Place
        title: str

    schema = json.loads(AnswerType(list[Open]).grammar.text)
    place, outer = schema["$defs"]["Place"], schema["$defs"]["Open"]
    assert place["additionalProperties"] is False
    assert outer["additionalProperties"] is True
    assert set(outer["properties"]) == {"properties", "title"}
    assert AnswerType({"properties": {}}).grammar.text.count("additionalProperties") == 0


def test_what_is_no_value_of_the_type_says_why() -> None:
    with pytest.raises(AnswerInvalid, match="not Place: height: Input should be greater") as caught:
        AnswerType(Place).read('{"city": "x", "height": -1}', cut=False)
    assert caught.value.text == '{"city": "x", "height": -1}'
    for schema in (Place, {"type": "object"}):
        with pytest.raises(AnswerInvalid, match="cut by its length") as caught:
            AnswerType(schema).read('{"city": "x", "hei', cut=True)
        assert "max_tokens" in caught.value.hint


def test_an_answer_that_its_length_ended_may_be_whole() -> None:
    assert AnswerType(Spot).read(TEXT, cut=True) == Spot("Bern", 540)


@pytest.mark.parametrize(
    "schema", [5, "Place", b"x", [], Place(city="x", height=1), type, {"x": object()}, {"x": {1}}]
)
def test_what_is_no_schema_is_refused_by_name(schema: Any) -> None:
    with pytest.raises(ConfigError, match=r"^schema is"):
        AnswerType(schema)


# --- functions ---


def forecast(city: str, days: Annotated[int, pydantic.Field(ge=1)] = 1) -> object:
    """Weather to come.

    In one line a day.
    """
    if city == "Atlantis":
        raise KeyError("it sank")
    return {"city": city, "days": days}


async def distance(start: str, end: str) -> float:
    await asyncio.sleep(0)
    return len(start + end) / 2


def moved(spot: Spot) -> Spot:
    return dataclasses.replace(spot, height=spot.height + 1)


def call(name: str, arguments: object) -> ToolCall:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return ToolCall(call_id="call_1", name=name, arguments=text)


def test_a_function_is_told_by_its_name_docstring_and_types() -> None:
    (tool,), functions = read_tools([forecast])
    assert functions is not None
    assert tool.name == "forecast"
    assert tool.description == "Weather to come.\n\nIn one line a day."
    assert tool.schema() == {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer", "minimum": 1, "default": 1},
        },
        "required": ["city"],
    }


def test_a_parameter_may_be_called_title() -> None:
    def rename(title: str) -> None:
        """Give it a title."""

    ((tool,), _) = read_tools([rename])
    assert tool.schema()["properties"] == {"title": {"type": "string"}}


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("forecast", {"city": "Bern"}, '{"city":"Bern","days":1}'),
        ("forecast", {"city": "Bern", "days": "2"}, '{"city":"Bern","days":2}'),
        ("forecast", {"city": "Bern", "days": 0}, "error: days: Input should be greater than"),
        ("forecast", {}, "error: city: Missing required argument"),
        ("forecast", {"city": "Bern", "when": 1}, "error: when: Unexpected keyword argument"),
        ("forecast", '{"city": "Be', "error: Invalid JSON"),
        ("forecast", {"city": "Atlantis"}, "error: KeyError: 'it sank'"),
        ("weather", {}, "error: there is no tool 'weather', only forecast, moved"),
        ("moved", {"spot": {"city": "x", "height": 1}}, '{"city":"x","height":2}'),
    ],
)
def test_a_call_is_run_and_what_came_of_it_is_said(name: str, arguments: Any, said: str) -> None:
    _, functions = read_tools([forecast, moved])
    assert functions is not None
    results = [
        functions.call(call(name, arguments)),
        asyncio.run(functions.acall(call(name, arguments))),
    ]
    for result in results:
        assert (result.role, result.call_id, result.name) == ("tool", "call_1", name)
        assert result.content.startswith(said)


def test_an_async_function_is_awaited() -> None:
    _, functions = read_tools([distance, forecast])
    assert functions is not None
    assert functions.async_names == {"distance"}
    result = asyncio.run(functions.acall(call("distance", {"start": "ab", "end": "c"})))
    assert result.content == "1.5"


def test_what_ends_a_program_is_no_result() -> None:
    def leave() -> None:
        raise KeyboardInterrupt

    _, functions = read_tools([leave])
    assert functions is not None
    with pytest.raises(KeyboardInterrupt):
        functions.call(call("leave", {}))


def test_tools_without_functions_are_the_callers_to_call() -> None:
    tools, functions = read_tools([Tool(name="a"), Tool(name="b")])
    assert [tool.name for tool in tools] == ["a", "b"]
    assert functions is None
    assert read_tools([]) == ((), None)


def unreadable(file: "Nowhere") -> None:  # type: ignore[name-defined]  # noqa: F821
    """Of a type that does not exist."""


def by_place(city: str, /) -> None:
    """Whose parameter has no name."""


@pytest.mark.parametrize(
    ("tools", "match"),
    [
        (5, "tools is 5"),
        ("look", "tools is 'look'"),
        ([5], r"tools\[0\] is 5"),
        ([forecast, forecast], r"tools\[1\] is 'forecast'"),
        ([lambda: 1], r"tools\[0\] is"),
        ([partial(forecast, "x")], r"tools\[0\] is"),
        ([forecast, Tool(name="a")], r"functions and Tool values \(a\)"),
        ([unreadable], r"tools\[0\] is"),
        ([by_place], r"tools\[0\] is"),
    ],
)
def test_what_is_no_tool_is_refused_by_name(tools: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        read_tools(tools)


# --- messages ---


def test_text_and_dicts_become_messages() -> None:
    hello = ChatMessage(role="user", content="Hello")
    assert messages_of("Hello", "text") == (hello,)
    calls = [{"call_id": "1", "name": "f", "arguments": "{}"}]
    said = [{"role": "user", "content": "Hello"}, {"role": "assistant", "tool_calls": calls}]
    asked, called = messages_of(said, "text")
    assert asked == hello
    assert called.tool_calls == (ToolCall(call_id="1", name="f", arguments="{}"),)
    assert messages_of([hello], "text") == (hello,)


@pytest.mark.parametrize(
    ("said", "match"),
    [
        (5, "text is 5"),
        (b"Hi", r"text is"),
        ({"role": "user"}, "text is"),
        ([5], r"text\[0\] is 5"),
        ([{"role": "user", "content": 5}], r"text\[0\] is no message: content: "),
        ([{"role": "robot"}], r"text\[0\] is no message: role: "),
        ([{"role": "tool", "tool_call_id": "x"}], r"text\[0\] has 'tool_call_id'"),
        ([ChatMessage(role="robot")], r"text\[0\].role is 'robot'"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_message_is_refused_by_name(said: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        messages_of(said, "text")


@pytest.mark.parametrize("said", ["", " \n", [], ()])
def test_nothing_is_not_answered(said: Any) -> None:
    with pytest.raises(PromptEmpty):
        messages_of(said, "text")
