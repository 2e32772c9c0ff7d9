"""Which format a model has, what its system prompt says, and grammars of forced calls."""

import json
import random

import jsonschema
import llguidance
import pytest

from edgekv.chat.forced import arguments_schema
from edgekv.chat.formats import answer_format
from edgekv.chat.template_messages import plain_calls
from edgekv.chat.values import Tool
from edgekv.errors import ConfigError
from edgekv.tokenizer.grammar import Grammar

# What tells of the published templates: how each writes a call of the conversation so far.
QWEN25 = """{%- if tools %}{{ tool | tojson }}{%- endif %}For each function call, return a json
{{- '\\n<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}"""
QWEN3 = QWEN25 + "{{- '<think>\\n\\n</think>\\n\\n' }}"
HERMES3 = (
    """{{- '<tool_call>\\n{"name": <function-name>, "arguments": <args-dict>}' }}{{ tools }}"""
)
QWEN3_CODER = (
    """{%- if tools %}<tool_call>\\n<function=example_function_name>\\n<parameter=example>"""
)
LLAMA3 = """<|start_header_id|>{%- if tools is not none %}{"name": function name, "parameters": {}}
{{- '{"name": "' + tool_call.name + '", ' }}{{- '"parameters": ' }}<|python_tag|>"""
LLAMA2 = "{{ '[INST] ' + message['content'] + ' [/INST]' }}"
MISTRAL_V3 = "{%- if tools %}[AVAILABLE_TOOLS]{{ '[TOOL_CALLS] [' }}"
MINISTRAL = "{%- if tools %}{{- '[TOOL_CALLS]' + name + '[ARGS]' + arguments }}[THINK][/THINK]"
GEMMA3 = "{{ bos_token }}<start_of_turn>{{ role }}\n{{ message['content'] | trim }}<end_of_turn>"
GEMMA_CODE = GEMMA3 + "{%- if tools %}```tool_code\n"
FUNCTION_GEMMA = "{%- if tools %}<start_function_call>call:{{ name }}{<end_function_call>"
GEMMA4 = """{%- if tools %}'<|tool_call>call:' + name + '{' }}<tool_call|><|channel>thought
<channel|>"""
PHI4 = "{%- if tools %}<|tool|>{{ tools }}<|/tool|><|tool_call|>"
SMOLLM2 = "{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>'}}"
GLM = "{%- if tools %}<tool_call>{{ name }}<arg_key>{{ k }}</arg_key><arg_value></arg_value>"
HARMONY = (
    """{{- "<|start|>assistant to=" }}functions.{{ name }}<|channel|>commentary json<|message|>"""
)
LFM2 = """{%- if tools %}"List of tools: ["{{ tools | tojson }}<|tool_response_start|>"""
OLMO3 = "{%- if tools %}<function_calls></function_calls>{{ name }}("
GRANITE3 = "{%- if tools %}<|start_of_role|>respond only with <|tool_call|> followed by a JSON list"
DEEPSEEK = "{%- if tools %}<｜tool▁calls▁begin｜>{{ name }}"

WEATHER = Tool(
    name="get_weather",
    description="What it's like outside",
    parameters=json.dumps(
        {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
                "units": {"enum": ["C", "F"]},
                "where": {"$ref": "#/$defs/Place"},
            },
            "required": ["city", "units"],
            "$defs": {
                "Place": {
                    "type": "object",
                    "properties": {"lat": {"type": "number", "minimum": -90, "maximum": 90}},
                    "required": ["lat"],
                    "additionalProperties": False,
                }
            },
        }
    ),
)
NOW = Tool(name="now")


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (QWEN25, "hermes"),
        (QWEN3, "hermes"),
        (HERMES3, "hermes"),
        (QWEN3_CODER, "qwen3-coder"),
        (LLAMA3, "llama3"),
        (MISTRAL_V3, "mistral"),
        (MINISTRAL, "mistral"),
        (GEMMA_CODE, "gemma"),
        (FUNCTION_GEMMA, "functiongemma"),
        (GEMMA4, "gemma4"),
        (PHI4, "phi4"),
        (GEMMA3, "plain"),
        (LLAMA2, "plain"),
        (SMOLLM2, "plain"),
        (GLM, "glm"),
        (HARMONY, "harmony"),
        (LFM2, "lfm2"),
        (OLMO3, "olmo3"),
        (GRANITE3, "granite"),
        (DEEPSEEK, "plain"),
        ("", "plain"),
    ],
)
def test_the_template_tells_the_format(template, name):
    found = answer_format(template, ())
    assert found.name == name
    assert hash(found) == hash(answer_format(template, ()))


def test_tokens_of_tags_are_spelled_and_others_are_not():
    control = ["<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<think>", "</think>"]
    assert answer_format(QWEN3, control).spelled == set(control[2:])
    tokens = ["[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]", "[INST]", "</s>"]
    assert answer_format(MINISTRAL, tokens).spelled == set(tokens[:4])
    tokens = ["<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>', "<turn|>"]
    assert answer_format(GEMMA4, tokens).spelled == set(tokens[:5])
    assert answer_format(LLAMA3, ["<|python_tag|>", "<|eot_id|>"]).spelled == {"<|python_tag|>"}
    assert answer_format("", ()).spelled == frozenset()


def test_reasoning_is_in_the_tags_that_the_model_knows():
    assert answer_format("", ()).thoughts == (("<think>", "</think>"),)
    assert ("[THINK]", "[/THINK]") in answer_format("", ["[THINK]"]).thoughts
    assert ("<|channel>thought", "<channel|>") in answer_format(GEMMA4, ()).thoughts


@pytest.mark.parametrize(
    ("opened", "closer"),
    [
        *[
            ("<think>\n", "</think>"),
            ("x<think>\n\n</think>\n\n", ""),
            ("", ""),
            ("assistant\n", ""),
        ],
        ("What is <think>?<|im_end|>\n<|im_start|>assistant\n", ""),
    ],
)
def test_the_end_of_a_prompt_tells_whether_reasoning_is_open(opened, closer):
    grammar = Grammar(kind="json_object")
    assert answer_format(QWEN3, ()).constrained(grammar, opened, calls=False).after == closer


def test_the_plain_convention_says_what_its_parser_reads():
    plain = answer_format(SMOLLM2, ())
    prompt = plain.tools_prompt([WEATHER, NOW])
    lines = [line for line in prompt.splitlines() if line.startswith('{"name"')]
    *described, shown = lines
    functions = [tool.to_function()["function"] for tool in (WEATHER, NOW)]
    assert list(map(json.loads, described)) == functions
    call = shown.replace("<the tool's name>", "now").replace("<its arguments, by the schema>", "")
    parser = plain.parser(tools=[NOW])
    parser.push(call)
    parser.end()
    assert [(call.name, call.arguments) for call in parser.message.tool_calls] == [("now", "{}")]


def test_the_plain_convention_reads_what_it_writes():
    plain = answer_format("", ())
    parser = plain.parser(tools=[WEATHER, NOW])
    parser.push('{"name":"now","arguments":{}}\n{"name":"get_weather","arguments":{"city":"é"}}')
    written = plain_calls(parser.message.tool_calls)
    again = plain.parser(tools=[WEATHER, NOW])
    again.push(written)
    assert plain_calls(again.message.tool_calls) == written
    arguments = [json.loads(call.arguments) for call in again.message.tool_calls]
    assert arguments == [{}, {"city": "é"}]


class Bytes:
    """A tokenizer of bytes, and of some texts as whole tokens; 0 ends an answer."""

    def __init__(self, *words):
        self.tokens = [bytes([value]) for value in range(256)] + [word.encode() for word in words]
        self.tokens[0] = b"<eos>"
        self.eos_token_id, self.bos_token_id, self.special_token_ids = 0, None, [0]

    def __call__(self, text):
        return list(text.encode() if isinstance(text, str) else text)


WORDS = Bytes("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<parameter=")
TOKENIZER = llguidance.LLTokenizer(llguidance.TokenizerWrapper(WORDS))
PRINTABLE = {*range(32, 127), *range(256, 256 + 5), ord("\n")}
CLOSERS = [
    list(closer)
    for closer in (b'"', b"}", b"\n</parameter>\n", b"</arg_value>", b'<|"|>', b"<escape>")
]


def matcher_of(grammar):
    assert grammar.kind == "lark"
    matcher = llguidance.LLMatcher(
        TOKENIZER, llguidance.LLMatcher.grammar_from_lark(grammar.text), log_level=0
    )
    assert not matcher.is_error(), matcher.get_error()
    return matcher


def sample(grammar, seed):
    """A text that the grammar allows, drawn at random, with a liking for ends."""
    rng, matcher = random.Random(seed), matcher_of(grammar)
    ids = []
    while len(ids) < 4000:
        if matcher.is_accepting() and (matcher.is_stopped() or rng.random() < 0.3):
            return b"".join(WORDS.tokens[token] for token in ids).decode()
        mask = matcher.compute_bitmask()
        allowed = [token for token in PRINTABLE if mask[token // 8] >> token % 8 & 1]
        taken = [rng.choice(sorted(allowed))]
        closer = rng.choice(CLOSERS)
        if rng.random() < 0.3 and matcher.validate_tokens(closer) == len(closer):
            taken = closer
        assert matcher.consume_tokens(taken)
        ids += taken
    raise AssertionError("it does not end")


TEMPLATES = {
    "hermes": QWEN25,
    "qwen3-coder": QWEN3_CODER,
    "llama3": LLAMA3,
    "mistral list": MISTRAL_V3,
    "mistral": MINISTRAL,
    "gemma": GEMMA_CODE,
    "functiongemma": FUNCTION_GEMMA,
    "gemma4": GEMMA4,
    "phi4": PHI4,
    "glm": GLM,
    "harmony": HARMONY,
    "lfm2": LFM2,
    "olmo3": OLMO3,
    "granite": GRANITE3,
    "plain": "",
}


def check(call, tools):
    """Its arguments are as its schema says."""
    arguments = json.loads(call.arguments)
    if call.name != "get_weather":
        assert call.name in {tool.name for tool in tools}
        assert arguments == {}
        return
    assert {"city", "units"} <= arguments.keys() <= {"city", "units", "days", "where"}
    assert isinstance(arguments["city"], str)
    assert arguments["units"] in ("C", "F")
    assert 1 <= arguments.get("days", 1) <= 9
    assert arguments.get("where", {"lat": 1}).keys() == {"lat"}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("seed", range(4))
def test_a_forced_text_is_calls_and_nothing_else(template, seed):
    found, tools = answer_format(template, ()), [WEATHER, NOW]
    text = sample(found.call_grammar(tools), seed)
    parser = found.parser(tools=tools)
    parser.push(text)
    parser.end()
    message = parser.message
    assert (message.content, message.reasoning, parser.cut) == ("", "", False)
    assert message.tool_calls
    for call in message.tool_calls:
        check(call, tools)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_one_call_of_one_tool_can_be_wanted(template):
    found, tools = answer_format(template, ()), [WEATHER, NOW]
    for seed in range(3):
        text = sample(found.call_grammar(tools, name="now", parallel=False), seed)
        parser = found.parser(tools=tools)
        parser.push(text)
        parser.end()
        assert [call.name for call in parser.message.tool_calls] == ["now"]


PLAN = {
    "type": "object",
    "properties": {
        "steps": {"type": "array", "maxItems": 3, "items": {"$ref": "#/$defs/Step"}},
        "Place": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "mode": {"type": "string", "enum": ["fast", 'a "b"']},
        "level": {"type": ["integer", "boolean"]},
        "free": {"type": "object"},
        "any": {},
        "fixed": {"const": {"b": [1, "x"], "a": None}},
    },
    "required": ["mode", "any"],
    "$defs": {
        "Step": {
            "type": "object",
            "properties": {
                "name": {"type": "string"},
                "done": {"type": "boolean"},
                "inner": {"type": "array", "items": {"$ref": "#/$defs/Step"}},
            },
            "required": ["name"],
            "additionalProperties": False,
        }
    },
}
FIELDS = {name: TEMPLATES[name] for name in ("gemma4", "functiongemma", "lfm2", "olmo3")}


@pytest.mark.parametrize("template", FIELDS.values(), ids=FIELDS)
@pytest.mark.parametrize("seed", range(8))
def test_arguments_of_any_kind_are_forced_as_the_model_writes_them(template, seed):
    """Whatever their schema says: they are read as values of it."""
    found, tool = answer_format(template, ()), Tool(name="plan", parameters=json.dumps(PLAN))
    text = sample(found.call_grammar([tool], parallel=False), seed)
    parser = found.parser(tools=[tool])
    parser.push(text)
    parser.end()
    assert parser.message.content == "", text
    (call,) = parser.message.tool_calls
    jsonschema.validate(json.loads(call.arguments), PLAN)


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"enum": [1, 2]}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
JSON_ANSWER = Grammar(kind="json_schema", text=json.dumps(PERSON))


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("seed", range(4))
def test_a_text_of_calls_or_json_is_one_of_them(template, seed):
    found, tools = answer_format(template, ()), [WEATHER, NOW]
    text = sample(found.call_grammar(tools, answer=JSON_ANSWER), seed)
    parser = found.parser(tools=tools)
    parser.push(text)
    parser.end()
    message = parser.message
    if message.content:
        assert not message.tool_calls
        assert json.loads(message.content).keys() == {"name", "age"}
    for call in message.tool_calls:
        check(call, tools)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("name", ["Bob", "get_weather", "now"])
def test_json_may_begin_like_a_call(template, name):
    found = answer_format(template, ())
    matcher = matcher_of(found.call_grammar([WEATHER, NOW], answer=JSON_ANSWER))
    said = found.form.answer + json.dumps({"name": name, "age": 2})
    assert matcher.consume_tokens(WORDS(said))
    assert matcher.is_accepting()


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (QWEN25, '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'),
        (QWEN3_CODER, "<tool_call>\n<function=now>\n</function>\n</tool_call>"),
        (LLAMA3, '{"name": "now", "parameters": {}}'),
        (MISTRAL_V3, '[TOOL_CALLS] [{"name": "now", "arguments": {}}]'),
        (MINISTRAL, "[TOOL_CALLS]now[ARGS]{}"),
        (GEMMA4, "<|tool_call>call:now{}<tool_call|>"),
        (GLM, "<tool_call>now</tool_call>"),
        (LFM2, "<|tool_call_start|>[now()]<|tool_call_end|>"),
        (OLMO3, "<function_calls>\nnow()\n</function_calls>"),
        (GRANITE3, '<|tool_call|>[{"name": "now", "arguments": {}}]'),
        (HARMONY, "<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}"),
        ("", '{"name": "now", "arguments": {}}'),
    ],
)
def test_what_is_forced_is_spelled_as_templates_spell_it(template, text):
    matcher = matcher_of(answer_format(template, ()).call_grammar([NOW], parallel=False))
    assert matcher.consume_tokens(WORDS(text))
    assert matcher.is_accepting()


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (GEMMA4, '<|tool_call>call:get_weather{city:<|"|>Bern<|"|>,units:<|"|>C<|"|>}<tool_call|>'),
        (
            GEMMA4,
            '<|tool_call>call:get_weather{city:<|"|>B<|"|>,units:<|"|>F<|"|>,where:{lat:1.5}}'
            "<tool_call|>",
        ),
        (LFM2, '<|tool_call_start|>[get_weather(city="Bern", units="C")]<|tool_call_end|>'),
        (OLMO3, '<function_calls>\nget_weather(city="Bern", units="C")\nnow()\n</function_calls>'),
        (
            GLM,
            "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Bern</arg_value>"
            "<arg_key>units</arg_key><arg_value>C</arg_value></tool_call>",
        ),
    ],
)
def test_arguments_are_forced_as_templates_write_them(template, text):
    found = answer_format(template, ())
    matcher = matcher_of(found.call_grammar([WEATHER, NOW]))
    assert matcher.consume_tokens(WORDS(text))
    assert matcher.is_accepting()


def test_tags_are_strings_that_tokens_of_their_text_match():
    matcher = matcher_of(answer_format(QWEN25, ()).call_grammar([NOW]))
    assert matcher.consume_tokens([256, *WORDS("\n")])


@pytest.mark.parametrize("name", ['say "hé" 😀\\n', "mcp__files__read", "a.b/c-d:e"])
@pytest.mark.parametrize("template", [QWEN25, LLAMA3, MISTRAL_V3, ""])
def test_names_of_any_characters_can_be_forced(template, name):
    found, tools = answer_format(template, ()), [Tool(name=name)]
    written = json.dumps(name, ensure_ascii=False)
    argument = "parameters" if found.name == "llama3" else "arguments"
    text = f'{found.form.first}{found.form.before}{{"name": {written}, "{argument}": {{}}}}'
    text += found.form.after + found.form.last
    matcher = matcher_of(found.call_grammar(tools))
    assert matcher.consume_tokens(WORDS(text))
    assert matcher.is_accepting()
    parser = found.parser(tools=tools)
    parser.push(text)
    assert [call.name for call in parser.message.tool_calls] == [name]


@pytest.mark.parametrize(
    ("schema", "closed"),
    [
        ({}, True),
        ({"type": "object", "properties": {"a": {}}, "required": ["a"]}, True),
        ({"properties": {"a": {}}, "additionalProperties": {"type": "string"}}, False),
        ({"properties": {"a": {}}, "required": ["b"]}, False),
        ({"properties": {"a": {}}, "anyOf": [{"required": ["b"]}]}, False),
        ({"$ref": "#/$defs/A", "$defs": {"A": {"properties": {"a": {}}}}}, False),
    ],
)
def test_forced_arguments_are_the_parameters_unless_the_schema_says_more(schema, closed):
    forced = arguments_schema(Tool(name="f", parameters=json.dumps(schema)))
    assert forced["type"] == "object"
    assert (forced.get("additionalProperties") is False) == closed
    assert forced | schema == forced


@pytest.mark.parametrize(
    "schema",
    [True, [], {"properties": []}, {"properties": {"a": True}, "required": 3}, {"type": 5}],
)
def test_odd_schemas_neither_break_the_reader_nor_the_grammar_of_xml(schema):
    found, tool = answer_format(QWEN3_CODER, ()), Tool(name="f", parameters=json.dumps(schema))
    parser = found.parser(tools=[tool])
    parser.push("<tool_call><function=f><parameter=a>1</parameter></function></tool_call>")
    assert [call.arguments for call in parser.message.tool_calls] == ['{"a": 1}']
    assert not matcher_of(found.call_grammar([tool])).is_error()


def test_a_tool_that_is_not_there_cannot_be_forced():
    with pytest.raises(ConfigError, match="tool_choice is 'fly'") as caught:
        answer_format(QWEN25, ()).call_grammar([NOW, WEATHER], name="fly")
    assert "now, get_weather" in caught.value.hint
    with pytest.raises(ConfigError):
        answer_format(QWEN25, ()).call_grammar([])
