"""Grammars of calls that must be made, in llguidance's Lark: `tool_choice` required, or by name.

Tags are strings of the grammar, but for those that are tokens of the model's (`Grammar.control`):
no string matches a control token.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from edgekv.chat.forced_fields import FIELDS, call_by_fields
from edgekv.chat.lark import Lark, arguments_schema
from edgekv.chat.values import Tool
from edgekv.errors import ConfigError
from edgekv.tokenizer.grammar import Grammar
from edgekv.tokenizer.schema import DEFINITIONS, parse_schema

NUM_CALLS_MAX = 16  # of one answer that must call something


@dataclass(frozen=True, kw_only=True)
class CallForm:
    """How a model writes calls that it must make.

    Attributes:
        first: Before all of them.
        before: Before each.
        after: Behind each.
        between: Between two.
        last: Behind all of them.
        body: An object with name and arguments; the name and behind it the arguments; or the name
            and a field for each argument, in one of the ways of `forced_fields`.
        arguments: The arguments' key; or what stands between the name and them.
        parallel: Whether the model can make several at once.
        answer: Before an answer that is no call.
    """

    first: str = ""
    before: str = ""
    after: str = ""
    between: str = "\n"
    last: str = ""
    body: Literal["json", "named", "xml", "keyed", "braces", "escaped", "python"] = "json"
    arguments: str = "arguments"
    parallel: bool = True
    answer: str = ""


def call_grammar(
    form: CallForm,
    tools: Sequence[Tool],
    *,
    name: str,
    parallel: bool,
    control: Sequence[str] = (),
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
    lark = Lark(control)
    text = lark.text
    several = f"({text(form.between)} call){{0,{NUM_CALLS_MAX - 1}}}"
    calls = f"call {several}" if parallel and form.parallel else "call"
    lark.rule("calls" if answer else "start", text(form.first), calls, text(form.last))
    lark.rule("call", text(form.before), "body", text(form.after))
    lark.rule("body", " | ".join(f"tool_{index}" for index in range(len(chosen))))
    if answer is not None:
        lark.rule("start", "calls |", text(form.answer), lark.json("answer", _schema_of(answer)))
    as_json = answer is not None and not (form.first or form.before)
    for index, tool in enumerate(chosen):
        _tool_rules(lark, form, f"tool_{index}", tool, as_json=as_json)
    return Grammar(kind="lark", text=lark.source, control=tuple(control))


def _schema_of(answer: Grammar) -> Any:
    return {"type": "object"} if answer.kind == "json_object" else parse_schema(answer.text)


def _tool_rules(lark: Lark, form: CallForm, rule: str, tool: Tool, *, as_json: bool) -> None:
    """What one tool's call is."""
    if form.body in FIELDS:
        call_by_fields(lark, FIELDS[form.body], rule, tool)
    elif form.body == "json" and as_json:
        _object_rules(lark, form, rule, tool)
    else:
        name = json.dumps(tool.name, ensure_ascii=False)
        before, after = f'{{"name": {name}, "{form.arguments}": ', "}"
        if form.body == "named":
            before, after = f"{tool.name}{form.arguments}", ""
        arguments = lark.json(rule, arguments_schema(tool))
        lark.rule(rule, lark.text(before), arguments, lark.text(after))


def _object_rules(lark: Lark, form: CallForm, rule: str, tool: Tool) -> None:
    """A call as JSON by a schema, so that an answer in JSON may begin like it.

    Of texts the longest that may be meant is, for llguidance: one that begins with a brace would
    forbid all other JSON.
    """
    arguments = arguments_schema(tool)
    shared = {key: arguments.pop(key) for key in DEFINITIONS if key in arguments}
    properties = {"name": {"const": tool.name}, form.arguments: arguments}
    schema = {"type": "object", "properties": properties, "required": [*properties]}
    lark.rule(rule, lark.json(rule, {**schema, "additionalProperties": False, **shared}))
