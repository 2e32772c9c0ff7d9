"""Grammars of calls that must be made, in llguidance's Lark: `tool_choice` required, or by name.

Tags are written as strings: whoever compiles a grammar must give tokens that the format spells
(`AnswerFormat.spelled`) to llguidance as their text, not as special tokens, which strings do not
match.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from edgekv.chat.kinds import kinds_of, properties_of
from edgekv.chat.values import Tool
from edgekv.errors import ConfigError
from edgekv.tokenizer.grammar import Grammar
from edgekv.tokenizer.schema import parse_schema

NUM_CALLS_MAX = 16  # of one answer that must call something
# As templates write JSON, so that what comes back is spelled as it was generated.
SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_DEFINITIONS = ("$defs", "definitions")
# By which a schema may allow properties that it does not name among its own.
_OPEN = {"$ref", "allOf", "anyOf", "oneOf", "if", "not", "patternProperties"}
# Text up to its end, without what its reader takes for an end.
_VALUE_RULES = (
    r'text_value[suffix="\n</parameter>\n"]: TEXT',
    r"TEXT: /(?s:.*)/ & ~/(?s:.*)(<\/parameter>|\n<parameter=|\n<\/function>)(?s:.*)/",
)


@dataclass(frozen=True, kw_only=True)
class CallForm:
    """How a model writes calls that it must make.

    Attributes:
        first: Before all of them.
        before: Before each.
        after: Behind each.
        between: Between two.
        last: Behind all of them.
        body: An object with name and arguments; the name and behind it the arguments; or XML.
        arguments: The arguments' key.
        parallel: Whether the model can make several at once.
    """

    first: str = ""
    before: str = ""
    after: str = ""
    between: str = "\n"
    last: str = ""
    body: Literal["json", "named", "xml"] = "json"
    arguments: str = "arguments"
    parallel: bool = True


def call_grammar(
    form: CallForm,
    tools: Sequence[Tool],
    *,
    name: str,
    parallel: bool,
    answer: Grammar | None = None,
) -> Grammar:
    """One call at least, of the tool with this `name` unless it is ""; or else an `answer` in JSON.

    Raises:
        ConfigError: There is no such tool.
        GrammarError: The answer's schema is none.
    """
    chosen = [tool for tool in tools if name in ("", tool.name)]
    if not chosen:
        names = ", ".join(tool.name for tool in tools)
        raise ConfigError.of("tool_choice", name or "required", f"of these tools: {names or '-'}")
    call = _sequence(form.before, "body", form.after)
    more = f" ({_sequence(form.between, 'call')}){{0,{NUM_CALLS_MAX - 1}}}"
    calls = "call" + (more if parallel and form.parallel else "")
    rules = [
        f"{'calls' if answer else 'start'}: {_sequence(form.first, calls, form.last)}",
        f"call: {call}",
        f"body: {' | '.join(f'tool_{index}' for index in range(len(chosen)))}",
    ]
    if answer is not None:
        rules += ["start: calls | answer_json", _json_rule("answer", _schema_of(answer))]
    as_json = answer is not None and form.body == "json" and not (form.first or form.before)
    for index, tool in enumerate(chosen):
        rules += (_object_rules if as_json else _tool_rules)(form, f"tool_{index}", tool)
    if form.body == "xml":
        rules += _VALUE_RULES
    return Grammar(kind="lark", text="\n".join(rules) + "\n")


def _text(text: str) -> str:
    """As a string of Lark."""
    return json.dumps(text, ensure_ascii=False)


def _sequence(*parts: str) -> str:
    """Names of rules, and texts: what is no name, is a text."""
    names = {"body", "call"}
    spelled = (p if p in names or p.startswith("call ") else _text(p) for p in parts if p)
    return " ".join(spelled)


def _schema_of(answer: Grammar) -> Any:
    return {"type": "object"} if answer.kind == "json_object" else parse_schema(answer.text)


def _object_rules(form: CallForm, rule: str, tool: Tool) -> list[str]:
    """A call as JSON by a schema, so that an answer in JSON may begin like it.

    Of texts the longest that may be meant is, for llguidance: one that begins with a brace would
    forbid all other JSON.
    """
    arguments = arguments_schema(tool)
    shared = {key: arguments.pop(key) for key in _DEFINITIONS if key in arguments}
    properties = {"name": {"const": tool.name}, form.arguments: arguments}
    schema = {"type": "object", "properties": properties, "required": [*properties]}
    rules = _json_rule(rule, {**schema, "additionalProperties": False, **shared})
    return [f"{rule}: {rule}_json", rules]


def _tool_rules(form: CallForm, rule: str, tool: Tool) -> list[str]:
    """What one tool's call is."""
    schema = arguments_schema(tool)
    if form.body == "xml":
        return _xml_rules(rule, tool.name, schema)
    name = json.dumps(tool.name, ensure_ascii=False)
    before = f'{{"name": {name}, "{form.arguments}": '
    before, after = (f"{tool.name}[ARGS]", "") if form.body == "named" else (before, "}")
    texts = _text(before), _text(after) if after else ""
    return [f"{rule}: {texts[0]} {rule}_json {texts[1]}".rstrip(), _json_rule(rule, schema)]


def _json_rule(rule: str, schema: Any) -> str:
    spaced = {**schema, "x-guidance": SPACING} if isinstance(schema, dict) else schema
    return f"{rule}_json: %json {json.dumps(spaced)}"


def arguments_schema(tool: Tool) -> dict[str, Any]:
    """The schema of a call's arguments: an object, of the parameters that are named, no others.

    That is left as it is where other keywords may allow or want more of them.
    """
    schema = tool.schema()
    schema = schema if isinstance(schema, dict) else {}
    closed = not _OPEN & schema.keys() and _required(schema) <= properties_of(schema).keys()
    return {"type": "object"} | ({"additionalProperties": False} if closed else {}) | schema


def _required(schema: Mapping[str, Any]) -> set[str]:
    required = schema.get("required")
    return set(map(str, required)) if isinstance(required, list) else set()


def _xml_rules(rule: str, name: str, schema: Mapping[str, Any]) -> list[str]:
    """Parameters in the schema's order, those that are not required perhaps."""
    rules, parts = [], []
    required = _required(schema)
    for index, (key, value) in enumerate(properties_of(schema).items()):
        parameter = f"{rule}_{index}"
        opener = _text(f"<parameter={key}>\n")
        rules += _value_rules(parameter, opener, value, schema)
        parts.append(parameter if key in required else f"{parameter}?")
    opener = _text(f"<function={name}>\n")
    return [" ".join([f"{rule}: {opener}", *parts, '"</function>"']), *rules]


def _value_rules(rule: str, opener: str, schema: Any, root: Mapping[str, Any]) -> list[str]:
    """One parameter: text up to its end where it may be a string, else JSON by its schema."""
    closer = _text("\n</parameter>\n")
    words = schema.get("enum") if isinstance(schema, dict) else None
    if isinstance(words, list) and words and all(isinstance(word, str) for word in words):
        spelled = " | ".join(_text(word) for word in words)
        return [f"{rule}: {opener} ({spelled}) {closer}"]
    kinds = kinds_of(schema, root)
    if not kinds or "string" in kinds:
        return [f"{rule}: {opener} text_value"]
    defined = {key: root[key] for key in _DEFINITIONS if key in root}
    return [
        f"{rule}: {opener} {rule}_json {closer}",
        _json_rule(rule, {**schema, **defined}),
    ]
