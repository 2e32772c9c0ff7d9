"""What a model writes becomes reasoning, text and calls, however it is cut into pieces."""

import json
import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edgekv.chat.characters import Characters
from edgekv.chat.events import (
    CallBegun,
    CallDelta,
    CallEnded,
    ReasoningDelta,
    TextDelta,
    TokenLogprob,
)
from edgekv.chat.formats import answer_format
from edgekv.chat.values import Tool

WEATHER = Tool(
    name="get_weather",
    parameters=json.dumps(
        {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "units": {"anyOf": [{"enum": ["C", "F"]}, {"type": "null"}]},
                "where": {"$ref": "#/$defs/Place"},
            },
            "required": ["city"],
            "$defs": {"Place": {"type": "object", "properties": {"lat": {"type": "number"}}}},
        }
    ),
)
NOW = Tool(name="now")
TOOLS = (WEATHER, NOW)

HERMES = answer_format('{{ tools }} <tool_call> {"name", "arguments"', ())
CODER = answer_format("{{ tools }} <tool_call> <function= <parameter=", ())
LLAMA = answer_format('{{ tools }} <|start_header_id|> {"name", "parameters"', ())
MISTRAL = answer_format("{{ tools }} [TOOL_CALLS] [ARGS] [THINK]", ())
GEMMA = answer_format("{{ tools }} ```tool_code", ())
GEMMA4 = answer_format("<|tool_call> <tool_call|> <|channel>thought <channel|>", ())
FUNCTION_GEMMA = answer_format("<start_function_call>", ())
PHI = answer_format("{{ tools }} <|tool_call|>", ())
GLM = answer_format("{{ tools }} <tool_call> <arg_key> <arg_value>", ())
LFM2 = answer_format("{{ tools }} List of tools: ", ())
OLMO = answer_format("{{ tools }} <function_calls> </function_calls>", ())
GRANITE = answer_format("{{ tools }} <|tool_call|> <|start_of_role|>", ())
HARMONY = answer_format("<|start|>assistant <|channel|> <|message|>", ())
PLAIN = answer_format("", ())
TAGGED = [HERMES, CODER, LLAMA, MISTRAL, GEMMA, GEMMA4, FUNCTION_GEMMA, PHI, GLM, LFM2, OLMO]
TAGGED += [GRANITE, PLAIN]
FORMATS = [*TAGGED, HARMONY]


def parse(form, *pieces, tools=TOOLS, opened=""):
    """The events, those of one kind that follow each other as one, and the parser."""
    numbers = iter(range(1000))
    parser = form.parser(tools=tools, opened=opened, call_id=lambda: f"call_{next(numbers)}")
    events = [event for piece in pieces for event in parser.push(piece)] + parser.end()
    return merged(events), parser


def merged(events):
    whole = []
    for event in events:
        last = whole[-1] if whole else None
        if type(event) is type(last) and isinstance(event, TextDelta | ReasoningDelta):
            whole[-1] = type(event)(text=last.text + event.text)
        elif isinstance(event, CallDelta) and isinstance(last, CallDelta):
            whole[-1] = CallDelta(index=event.index, arguments=last.arguments + event.arguments)
        else:
            whole.append(event)
    return whole


def calls(form, text, **options):
    """Names and arguments of the calls, and what is text; none is cut."""
    events, parser = parse(form, text, **options)
    assert not parser.cut
    ended = [event.index for event in events if isinstance(event, CallEnded)]
    assert ended == list(range(len(parser.message.tool_calls)))
    found = [(call.name, json.loads(call.arguments)) for call in parser.message.tool_calls]
    return found, parser.message.content


PARIS = ("get_weather", {"city": "Paris"})
HERMES_PARIS = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
JSON_PARIS = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
GLM_PARIS = "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value></tool_call>"
PARIS_MESSAGE = '<|message|>{"city": "Paris"}'
HARMONY_PARIS = f"<|channel|>commentary to=functions.get_weather <|constrain|>json{PARIS_MESSAGE}"
NEXT = "<|end|><|start|>assistant"
ANALYSIS, FINAL = "<|channel|>analysis<|message|>", "<|channel|>final<|message|>"


def test_reasoning_text_and_calls_come_as_events_in_their_order():
    events, parser = parse(
        HERMES, f"<think>\nWhere?\n</think>\n\nI look.\n{HERMES_PARIS}\n{HERMES_PARIS}\n"
    )
    assert events == [
        ReasoningDelta(text="Where?"),
        TextDelta(text="I look."),
        CallBegun(index=0, call_id="call_0", name="get_weather"),
        CallDelta(index=0, arguments='{"city": "Paris"}'),
        CallEnded(index=0),
        CallBegun(index=1, call_id="call_1", name="get_weather"),
        CallDelta(index=1, arguments='{"city": "Paris"}'),
        CallEnded(index=1),
    ]
    message = parser.message
    assert (message.role, message.reasoning, message.content) == ("assistant", "Where?", "I look.")
    assert [call.call_id for call in message.tool_calls] == ["call_0", "call_1"]


def test_arguments_are_told_as_they_are_written():
    parser = HERMES.parser(tools=TOOLS)
    assert parser.push('<tool_call>\n{"name": "get_weather", "arguments": ') == []
    begun, delta = parser.push('{"city": "Pa')
    assert isinstance(begun, CallBegun)
    assert delta == CallDelta(index=0, arguments='{"city": "Pa')
    assert parser.push('ris {}"') == [CallDelta(index=0, arguments='ris {}"')]
    assert parser.push("}") == [CallDelta(index=0, arguments="}"), CallEnded(index=0)]
    assert parser.push("}\n</tool_call>") == parser.end() == []


def test_a_call_begins_before_a_parameter_of_xml_is_whole():
    parser = CODER.parser(tools=TOOLS)
    head = "<tool_call>\n<function=get_weather>\n<parameter=city>\nNew "
    assert parser.push(head)[1] == CallDelta(index=0, arguments='{"city": "New ')
    assert parser.push('"York"')[0].arguments == '\\"York\\"'


def test_text_is_held_back_only_while_it_may_begin_a_tag():
    parser = HERMES.parser(tools=TOOLS)
    assert parser.push("a <tool") == [TextDelta(text="a")]
    assert parser.push("s") == [TextDelta(text=" <tools")]  # a loose tag begins a line
    assert parser.push("\n<tool_c") == []
    assert parser.push("at>") == [TextDelta(text="\n<tool_cat>")]
    assert parser.push('\n{"name": "get_') == []
    assert parser.push('x"') == [TextDelta(text='\n{"name": "get_x"')]


def test_call_ids_are_of_24_hex_digits_and_differ():
    parser = HERMES.parser(tools=TOOLS)
    parser.push(HERMES_PARIS * 2)
    first, second = (call.call_id for call in parser.message.tool_calls)
    assert first != second
    assert first.startswith("call_")
    assert len(first) == 29
    assert set(first[5:]) <= set(string.hexdigits)


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (HERMES, HERMES_PARIS),
        (HERMES, HERMES_PARIS.replace("\n", "")),
        (HERMES, '<tool_call>{"arguments":{"city":"Paris"},"name":"get_weather"}</tool_call>'),
        (CODER, HERMES_PARIS),
        (
            CODER,
            "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n"
            "</function>\n</tool_call>",
        ),
        (LLAMA, '{"name": "get_weather", "parameters": {"city": "Paris"}}'),
        (LLAMA, '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}'),
        (LLAMA, '<function=get_weather>{"city": "Paris"}</function>'),
        (MISTRAL, f"[TOOL_CALLS] [{JSON_PARIS}]"),
        (MISTRAL, '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}'),
        (MISTRAL, '[TOOL_CALLS]get_weather[CALL_ID]a1b2c3d4e[ARGS]{"city": "Paris"}'),
        (MISTRAL, '[TOOL_CALLS]get_weather{"city": "Paris"}'),
        (GEMMA, '```tool_code\nget_weather(city="Paris")\n```'),
        (GEMMA, "```tool_code\n[get_weather('Paris')]\n```"),
        (GEMMA, f"```json\n{JSON_PARIS}\n```"),
        (GEMMA4, '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>}<tool_call|>'),
        (GEMMA4, '<|tool_call>call:get_weather{"city": "Paris"}<tool_call|>'),
        (
            FUNCTION_GEMMA,
            "<start_function_call>call:get_weather{city:<escape>Paris<escape>}<end_function_call>",
        ),
        (PHI, f"<|tool_call|>[{JSON_PARIS}]<|/tool_call|>"),
        (GLM, GLM_PARIS),
        (GLM, f"<tool_call>{JSON_PARIS}</tool_call>"),
        (GLM, GLM_PARIS.replace("><", ">\n<").replace("get_weather", "get_weather\n")),
        (LFM2, '<|tool_call_start|>[get_weather(city="Paris")]<|tool_call_end|>'),
        (LFM2, f"<|tool_call_start|>[{JSON_PARIS}]<|tool_call_end|>"),
        (OLMO, "<function_calls>\nget_weather(city='Paris')\n</function_calls>"),
        (GRANITE, f"<|tool_call|>[{JSON_PARIS}]"),
        (HARMONY, HARMONY_PARIS),
        (HARMONY, HARMONY_PARIS.replace("functions.", "")),
        (HARMONY, HARMONY_PARIS.replace("commentary", "analysis").replace("<|constrain|>", "")),
        (HARMONY, " to=functions.get_weather<|channel|>commentary json" + PARIS_MESSAGE),
        (HARMONY, HARMONY_PARIS + "}<|call|>"),
        (PLAIN, JSON_PARIS),
        (PLAIN, f"```json\n{JSON_PARIS}\n```"),
        (PLAIN, HERMES_PARIS),
    ],
)
def test_each_format_reads_its_own_calls(form, text):
    assert calls(form, text) == ([PARIS], "")


@pytest.mark.parametrize(
    "text",
    [
        f"```json\n{JSON_PARIS}\n```",
        f"```\n[{JSON_PARIS}]\n```",
        JSON_PARIS,
        f"[{JSON_PARIS}]",
        f"<tools>\n{JSON_PARIS}\n</tools>",
        f"<tool_call>\n{JSON_PARIS}",
        f"<tool_call>\n{JSON_PARIS[:-1]}\n</tool_call>",
        f"<tool_call>\n{JSON_PARIS[:-2]}\n</tool_call>",
        f"<tool_call>\n{JSON_PARIS}}}\n</tool_call>",
        f"<tool_call>\n```json\n{JSON_PARIS}\n```\n</tool_call>",
        '{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}',
        '<tool_call>{"name": "functions.get_weather", "arguments": {"city": "Paris"}}</tool_call>',
        '<tool_call>{"name": "get_weather", "city": "Paris"}</tool_call>',
        '{"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}',
        '{"type":"function","name":"get_weather","parameters":{"city":"Paris"},"id":"x"}',
    ],
)
def test_near_misses_of_small_models_are_calls(text):
    assert calls(HERMES, text) == ([PARIS], "")


@pytest.mark.parametrize(
    ("arguments", "expected"), [("null", {}), ('""', {}), ('{"a": "x\ny"}', {"a": "x\ny"})]
)
def test_arguments_that_are_not_quite_json_are_mended(arguments, expected):
    text = f'<tool_call>{{"name": "now", "arguments": {arguments}}}</tool_call>'
    assert calls(HERMES, text) == ([("now", expected)], "")


def test_a_call_without_arguments_has_none():
    assert calls(HERMES, '{"name": "now"}') == ([("now", {})], "")


def test_text_around_calls_stays():
    text = f"One.\n{HERMES_PARIS}\nTwo. {HERMES_PARIS} Three."
    assert calls(HERMES, text) == ([PARIS, PARIS], "One.\nTwo. Three.")


def test_what_follows_a_call_that_was_not_closed_is_text_and_its_closer_a_tag():
    text = f"<tool_call>{JSON_PARIS} And so on. </tool_call> End </tool_call>"
    assert calls(HERMES, text) == ([PARIS], "And so on. End </tool_call>")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\nnothing </tool_call>",
        '{"name": "unknown", "arguments": {}}\nx',
        '```json\n{"name": "package", "version": 1}\n```\n',
        "```python\nget_weather(1)\n```",
        '  [{"a": 1}, {"name": "now"}]',
        "{\n  }\n",
        "a < b, `c` [d] {e}",
        "[THINK",
        "He wrote <think> and meant it.",
        "to= be <|channel|> or <|message|> not",
        "<tool_call",
        "x\n\n",
        '{"name": 3}',
        '<tool_call>{"name": "now", "arguments": [1]}</tool_call>',
    ],
)
def test_what_is_no_call_is_text_to_the_letter(form, text):
    events, parser = parse(form, text)
    assert events == [TextDelta(text=text)]
    assert parser.message.content == text
    assert not parser.cut


def test_a_name_that_no_tool_has_is_a_call_in_a_tag_and_text_without_one():
    unknown = '{"name": "fly", "arguments": {}}'
    assert calls(HERMES, f"<tool_call>{unknown}</tool_call>") == ([("fly", {})], "")
    assert calls(HERMES, unknown) == ([], unknown)
    assert calls(MISTRAL, "[TOOL_CALLS]fly[ARGS]{}") == ([("fly", {})], "")


def test_without_tools_nothing_is_a_call():
    assert calls(HERMES, f"{HERMES_PARIS}", tools=()) == ([], HERMES_PARIS)


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (HERMES, '<tool_call>{"name": "get_weather", "arguments": {"city": "Pa'),
        (CODER, "<tool_call><function=get_weather>\n<parameter=city>\nPa"),
        (MISTRAL, '[TOOL_CALLS]get_weather[ARGS]{"city": "Pa'),
        (GEMMA4, '<|tool_call>call:get_weather{city:<|"|>Pa'),
        (GLM, "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Pa"),
        (HARMONY, HARMONY_PARIS[: HARMONY_PARIS.index("ris")]),
        (PLAIN, '{"name": "get_weather", "arguments": {"city": "Pa'),
    ],
)
def test_a_call_that_was_cut_has_no_end_and_keeps_what_there_is(form, text):
    events, parser = parse(form, text)
    assert parser.cut
    assert not any(isinstance(event, CallEnded) for event in events)
    (call,) = parser.message.tool_calls
    assert call.name == "get_weather"
    assert call.arguments.replace(" ", "") == '{"city":"Pa'
    assert parser.message.content == ""


def test_a_call_that_was_cut_before_its_name_comes_out_as_text():
    events, parser = parse(HERMES, 'So:\n<tool_call>\n{"name": "get_w')
    assert parser.cut
    assert events == [TextDelta(text='So:\n<tool_call>\n{"name": "get_w')]


@pytest.mark.parametrize("text", ["<tool_call>``", '<tool_call>{"name": "now"', "<tool_call>"])
def test_what_is_held_back_at_the_end_comes_out_once(text):
    assert parse(HERMES, text)[1].message.content == text


def test_an_answer_that_ends_behind_the_arguments_is_not_cut():
    text = '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}'
    assert calls(HERMES, text) == ([PARIS], "")


@pytest.mark.parametrize(
    ("key", "written", "expected"),
    [
        ("city", "3", "3"),
        ("city", 'a "b"\n\nc\\d', 'a "b"\n\nc\\d'),
        ("city", "if a < b:\n    </x>", "if a < b:\n    </x>"),
        ("days", "3", 3),
        ("days", "three", "three"),
        ("units", "null", None),
        ("units", "C", "C"),
        ("where", '{"lat": 1.5}', {"lat": 1.5}),
        ("where", "{'lat': True}", {"lat": True}),
        ("other", "[1, 2]", [1, 2]),
        ("other", "word", "word"),
    ],
)
def test_parameters_of_xml_are_typed_by_the_schema(key, written, expected):
    text = f"<function=get_weather>\n<parameter={key}>\n{written}\n</parameter>\n</function>"
    assert calls(CODER, f"<tool_call>\n{text}\n</tool_call>") == (
        [("get_weather", {key: expected})],
        "",
    )
    assert calls(CODER, text) == ([("get_weather", {key: expected})], "")


def test_xml_with_missing_closers_is_read():
    text = "<tool_call><function=get_weather><parameter=city>\nRome\n<parameter=days>2</function>"
    assert calls(CODER, text) == ([("get_weather", {"city": "Rome", "days": 2})], "")


def test_arguments_of_glm_are_typed_by_the_schema():
    pairs = {"city": "3 <b>", "days": "3", "units": "null", "where": '{"lat": 1}', "x": "a\nb"}
    written = "".join(
        f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n"
        for key, value in pairs.items()
    )
    typed = {"city": "3 <b>", "days": 3, "units": None, "where": {"lat": 1}, "x": "a\nb"}
    text = f"<tool_call>get_weather\n{written}</tool_call>\n<tool_call>now</tool_call>"
    assert calls(GLM, text) == ([("get_weather", typed), ("now", {})], "")


def test_several_calls_of_olmo_stand_in_lines_of_their_own():
    text = "I look.\n<function_calls>\nnow()\nget_weather('Rome', days=2)\n</function_calls>"
    expected = [("now", {}), ("get_weather", {"city": "Rome", "days": 2})]
    assert calls(OLMO, text) == (expected, "I look.")


def test_pythons_strings_are_read_though_they_are_none():
    """Models write patterns and texts of several lines as they are."""
    text = r"<function_calls>now(a='\d+\.', b='\n', c='x" + "\ny')</function_calls>"
    assert calls(OLMO, text) == ([("now", {"a": "\\d+\\.", "b": "\n", "c": "x\ny"})], "")


def test_gemmas_values_of_all_kinds():
    text = (
        '<|tool_call>call:get_weather{city:<|"|>a "b", {c}<|"|>,days:-3,deep:{on:true,'
        'list:[1.5,<|"|>x<|"|>,{}]},none:null}<tool_call|>'
    )
    expected = {
        "city": 'a "b", {c}',
        "days": -3,
        "deep": {"on": True, "list": [1.5, "x", {}]},
        "none": None,
    }
    assert calls(GEMMA4, text) == ([("get_weather", expected)], "")


def test_pythons_literals_become_json():
    text = (
        "```tool_code\nget_weather('a)b\\'\\\\', days=2, x=[None, true, {'k': (1,)}], "
        'y=""""(\n""", z=\'\')\nnow()\n```'
    )
    arguments = {"city": "a)b'\\", "days": 2, "x": [None, True, {"k": [1]}], "y": '"(\n', "z": ""}
    assert calls(GEMMA, text) == ([("get_weather", arguments), ("now", {})], "")


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (HERMES, "<think>\nSo.\n\nYes.\n</think>\n\nAnswer"),
        (MISTRAL, "[THINK]So.\n\nYes.[/THINK]Answer"),
        (GEMMA4, "<|channel>thought\nSo.\n\nYes.<channel|>Answer"),
        (HARMONY, f"{ANALYSIS}So.\n\nYes.{NEXT}{FINAL}Answer<|return|>"),
        (HARMONY, f"{ANALYSIS}So.{NEXT}{ANALYSIS}Yes.{NEXT}{FINAL}Answer"),
        (HARMONY, f"{ANALYSIS}So.\n\nYes.{FINAL}Answer"),  # the end of a message is missing
        (HARMONY, f"<|channel|>commentary to=assistant{ANALYSIS}So.\n\nYes.{NEXT}{FINAL}Answer"),
    ],
)
def test_reasoning_in_its_variants(form, text):
    events, _ = parse(form, text)
    assert events == [ReasoningDelta(text="So.\n\nYes."), TextDelta(text="Answer")]


@pytest.mark.parametrize(
    ("opened", "reasoning", "content"),
    [
        ("<think>\n", "So.", "Yes."),
        ("<|im_start|>assistant\n<think>", "So.", "Yes."),
        ("<think>\n\n</think>\n\n", "", "So.\n</think>\n\nYes."),
        ("<|im_start|>assistant\n", "", "So.\n</think>\n\nYes."),
    ],
)
def test_an_answer_may_begin_inside_reasoning(opened, reasoning, content):
    _, parser = parse(HERMES, "So.\n</think>\n\nYes.", opened=opened)
    assert parser.message.reasoning == reasoning
    assert parser.message.content == content


def test_empty_reasoning_is_nothing_and_unfinished_reasoning_is_whole():
    assert parse(HERMES, "<think>\n\n</think>\n\nYes")[0] == [TextDelta(text="Yes")]
    assert parse(HERMES, "<think>\nSo\n</thi")[0] == [ReasoningDelta(text="So\n</thi")]


def test_calls_inside_reasoning_are_reasoning():
    _, parser = parse(HERMES, f"<think>{HERMES_PARIS}</think>")
    assert parser.message.reasoning == HERMES_PARIS
    assert parser.message.tool_calls == ()


def test_messages_in_channels_come_as_events_in_their_order():
    text = f"{ANALYSIS}Where?{NEXT}<|channel|>commentary<|message|>I look.{NEXT}{HARMONY_PARIS}"
    events, parser = parse(HARMONY, text)
    assert events == [
        ReasoningDelta(text="Where?"),
        TextDelta(text="I look."),
        CallBegun(index=0, call_id="call_0", name="get_weather"),
        CallDelta(index=0, arguments='{"city": "Paris"}'),
        CallEnded(index=0),
    ]
    assert not parser.cut


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("Hello", "Hello"),
        (f"{FINAL}Hello", "Hello"),
        (f"{NEXT}{FINAL}Hello", "Hello"),
        ("<|channel|>final <|constrain|>json<|message|>{}", "{}"),
        ("<|channel|>comment<|message|>Hello", "Hello"),
        (f"{FINAL}One.{NEXT}{FINAL}Two.", "One.\n\nTwo."),
        (f"{FINAL}He wrote <|channel|> twice.", "He wrote <|channel|> twice."),
        ("<|channel|>fin", ""),  # it was cut
        (FINAL, ""),
    ],
)
def test_text_is_what_no_other_channel_holds(text, content):
    assert calls(HARMONY, text) == ([], content)


@pytest.mark.parametrize(
    "text",
    [
        "<|channel|>commentary to=python code<|message|>print(1)",
        "<|channel|>commentary to=functions.get_weather<|message|>the weather in Paris",
        "<|channel|>final\nHello",
        "<|channel|><|channel|>",
        "<|start|>user<|message|>Hello",
    ],
)
def test_what_is_no_message_is_text_to_the_letter(text):
    assert calls(HARMONY, text) == ([], text)
    assert calls(HARMONY, f"{ANALYSIS}Hm.{NEXT}{FINAL}Ok.{NEXT}{text}")[1].startswith("Ok.")


def test_a_header_that_names_a_tool_is_shown_where_there_are_no_tools():
    assert calls(HARMONY, HARMONY_PARIS, tools=()) == ([], HARMONY_PARIS)
    events, parser = parse(HARMONY, HARMONY_PARIS[:40])
    assert events == [TextDelta(text=HARMONY_PARIS[:40])]
    assert parser.cut


def logprob(token):
    return TokenLogprob(token=token, token_bytes=token.encode(), logprob=-1.0)


def test_logprobs_are_of_text_alone():
    parser = HERMES.parser(tools=TOOLS)
    pieces = ["<think>", "So", "</think>", "\n", "A", " ", "b", "\n", HERMES_PARIS[:20]]
    pieces += [HERMES_PARIS[20:-5], HERMES_PARIS[-5:], "\n", "c", "\n<too", "l>"]
    events = [event for piece in pieces for event in parser.push(piece, (logprob(piece),))]
    told = [
        (event.text, [entry.token for entry in event.logprobs])
        for event in events
        if isinstance(event, TextDelta)
    ]
    assert told == [
        ("A", ["A"]),
        (" b", [" ", "b"]),
        ("\nc", ["\n", "c"]),
        ("\n<tool>", ["\n<too", "l>"]),
    ]


@pytest.mark.parametrize(
    "piece",
    ["{", "[{", '{"arguments": ', "<tool_call>", "```\n", '{"name":\n', '\n{"arguments": {"a": 1'],
)
def test_no_character_is_read_often(piece, monkeypatch):
    num_read, read = 0, Characters.next

    def counting(self):
        nonlocal num_read
        num_read += 1
        return (yield from read(self))

    monkeypatch.setattr(Characters, "next", counting)
    text = piece * (4000 // len(piece))
    assert parse(HERMES, text)[0] == [TextDelta(text=text)]
    assert num_read < 8 * len(text)


FRAGMENTS = [
    *("<tool_call>", "</tool_call>", "<think>", "</think>", "[TOOL_CALLS]", "[ARGS]", "[THINK]"),
    *("[/THINK]", "<|tool_call>", "<tool_call|>", "call:", '<|"|>', "<|python_tag|>", "<escape>"),
    *("<function=get_weather>", "<parameter=city>", "<parameter=days>", "</parameter>", "3"),
    *("</function>", "```json\n", "```tool_code\n", "```", "get_weather(", "city=", ")", "'"),
    *('{"name": "get_weather", ', '"arguments": ', '"parameters": ', '{"city": "', "Paris", '"'),
    *("}", "}}", "{", "[", "]", ",", "\n", " ", "\\", "<", "x", "é😀", '\\"', ": ", "null"),
    *(HERMES_PARIS, JSON_PARIS, "get_weather", "now", "<|channel>thought\n", "<channel|>"),
    *("<arg_key>", "city", "</arg_key>", "<arg_value>", "</arg_value>", GLM_PARIS),
    *("<|tool_call_start|>", "<|tool_call_end|>", "<function_calls>", "</function_calls>"),
    *("<|channel|>", "final", "analysis", "<|message|>", "<|end|>", "<|start|>assistant", "to="),
    *(ANALYSIS, FINAL, HARMONY_PARIS, "functions.now", " <|constrain|>json", "<|call|>"),
]
TEXTS = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=14).map("".join)


@pytest.mark.slow
@given(form=st.sampled_from(FORMATS), text=TEXTS, data=st.data())
def test_no_event_depends_on_how_the_text_is_cut(form, text, data):
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole, parser = parse(form, text)
    for other, other_parser in (parse(form, *pieces), parse(form, *text)):
        assert other == whole
        assert other_parser.message == parser.message
        assert other_parser.cut == parser.cut


@pytest.mark.slow
@given(form=st.sampled_from(FORMATS), text=TEXTS)
@example(form=HERMES, text='<tool_call>{"name": "now", "arguments": {"a": "\\')
def test_events_are_in_order_and_make_the_message(form, text):
    events, parser = parse(form, text)
    message = parser.message
    said = [event.text for event in events if isinstance(event, TextDelta)]
    thought = [event.text for event in events if isinstance(event, ReasoningDelta)]
    assert "".join(said) == message.content
    assert "".join(thought) == message.reasoning
    running, num_begun, arguments = None, 0, [""] * len(message.tool_calls)
    for event in events:
        match event:
            case CallBegun():
                assert (running, event.index) == (None, num_begun)
                assert event.name == message.tool_calls[event.index].name
                running, num_begun = event.index, num_begun + 1
            case CallDelta():
                assert event.index == running
                arguments[event.index] += event.arguments
            case CallEnded():
                assert event.index == running
                running = None
            case _:
                assert running is None
    assert arguments == [call.arguments for call in message.tool_calls]
    assert running is None or parser.cut


WORDS = st.sampled_from(["alpha", "beta", "gamma", "delta"])
BROKEN = st.lists(st.sampled_from([f for f in FRAGMENTS if '"' not in f]) | WORDS, max_size=14)


@pytest.mark.slow
@given(form=st.sampled_from(FORMATS), fragments=BROKEN)
def test_no_word_is_lost(form, fragments):
    _, parser = parse(form, "".join(fragments))
    message = parser.message
    told = [message.content, message.reasoning]
    told += [text for call in message.tool_calls for text in (call.name, call.arguments)]
    for word in ("alpha", "beta", "gamma", "delta"):
        assert "".join(told).count(word) == fragments.count(word)
