"""Grammars of calls whose arguments stand one by one: in tags, in braces, or as in Python."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgekv.chat.kinds import kinds_of, properties_of, referred
from edgekv.chat.lark import Lark, arguments_schema, required_of
from edgekv.chat.values import Tool
from edgekv.tokenizer.schema import DEFINITIONS

_DEPTH_MAX = 8  # of values that are spelled by their schema; deeper ones are any


@dataclass(frozen=True, kw_only=True)
class Fields:
    """How a call is written whose arguments are written one by one.

    Attributes:
        head: Around the tool's name.
        key: Around an argument's name.
        closer: Behind a value.
        between: Between two arguments.
        tail: Behind them.
        stops: Strings are written as they are, up to `closer`, without these in them.
        quote: Strings stand between two of this, and all values are written in that way.
    """

    head: tuple[str, str]
    key: tuple[str, str]
    closer: str = ""
    between: str = ""
    tail: str = ""
    stops: tuple[str, ...] = ()
    quote: str = ""


_BRACES = Fields(head=("call:", "{"), key=("", ":"), between=",", tail="}", quote='<|"|>')
FIELDS: Mapping[str, Fields] = {
    "xml": Fields(
        head=("<function=", ">\n"),
        key=("<parameter=", ">\n"),
        closer="\n</parameter>\n",
        tail="</function>",
        stops=("</parameter>", "\n<parameter=", "\n</function>"),
    ),
    "keyed": Fields(
        head=("", ""),
        key=("<arg_key>", "</arg_key><arg_value>"),
        closer="</arg_value>",
        stops=("</arg_value>",),
    ),
    "braces": _BRACES,
    "escaped": replace(_BRACES, quote="<escape>"),
    "python": Fields(head=("", "("), key=("", "="), between=", ", tail=")"),
}


def call_by_fields(lark: Lark, fields: Fields, rule: str, tool: Tool) -> None:
    """Define `rule` as a call of this tool."""
    _Call(lark, fields, rule, arguments_schema(tool)).define(tool.name)


class _Call:
    """The grammar of one tool's call, which is being written.

    Of the parameters those that are not required may be missing; they stand in the schema's order,
    or, in braces, by their names, as templates sort them.
    """

    def __init__(self, lark: Lark, fields: Fields, rule: str, schema: Mapping[str, Any]) -> None:
        self._lark = lark
        self._fields = fields
        self._rule = rule
        self._root = schema
        self._references: dict[str, str] = {}  # names of rules
        self._definitions = {key: schema[key] for key in DEFINITIONS if key in schema}

    def define(self, name: str) -> None:
        """The whole call, of the tool that is named so."""
        before, after = self._fields.head
        members = self._members(self._rule, self._root, 0)
        text = self._lark.text
        self._lark.rule(
            self._rule, text(f"{before}{name}{after}"), members, text(self._fields.tail)
        )

    def _members(self, rule: str, schema: Mapping[str, Any], depth: int) -> str:
        """An object's properties: the name of a rule, "" if there are none."""
        lark, fields, required = self._lark, self._fields, required_of(schema)
        properties = list(properties_of(schema).items())
        if fields.quote:
            properties.sort(key=lambda item: item[0].lower())
        between = lark.text(fields.between)
        # What may be left of them, from the last one on: where none stands before, and behind one.
        first, later = "", ""
        for index, (key, value) in reversed([*enumerate(properties)]):
            name = f"{rule}_{index}"
            opener = lark.text(f"{fields.key[0]}{key}{fields.key[1]}")
            lark.rule(name, opener, self._value(name, value, depth))
            if key in required:
                first = lark.rule(f"{name}_first", name, later)
                later = lark.rule(f"{name}_later", between, name, later)
            else:
                none_yet = f"{name} {later} | {first}" if first else f"({name} {later})?"
                first = lark.rule(f"{name}_first", none_yet)
                later = lark.rule(f"{name}_later", f"({between} {name})?", later)
        return first

    def _value(self, rule: str, schema: Any, depth: int) -> str:
        """A value, and what closes it."""
        if self._fields.quote:
            return self._quoted_value(rule, schema, depth)
        if not self._fields.stops:
            return self._json(rule, schema)
        words = schema.get("enum") if isinstance(schema, Mapping) else None
        if isinstance(words, list) and words and all(isinstance(word, str) for word in words):
            return f"({self._one_of(words)}) {self._lark.text(self._fields.closer)}"
        kinds = kinds_of(schema, self._root)
        if not kinds or "string" in kinds:
            return self._lark.free("text_value", self._fields.closer, self._fields.stops)
        return f"{self._json(rule, schema)} {self._lark.text(self._fields.closer)}"

    def _json(self, rule: str, schema: Any) -> str:
        return self._lark.json(rule, {**self._definitions, **schema} if schema else True)

    def _one_of(self, texts: Sequence[str]) -> str:
        return " | ".join(map(self._lark.text, texts))

    # --- values between quotes of their own ---

    def _quoted_value(self, rule: str, schema: Any, depth: int) -> str:
        if not isinstance(schema, Mapping) or depth >= _DEPTH_MAX:
            return self._any_value()
        if "$ref" in schema:
            return self._referred(schema["$ref"], depth)
        fixed = [schema["const"]] if "const" in schema else schema.get("enum")
        if isinstance(fixed, list) and fixed:
            return f"({self._one_of([self._spelled(value) for value in fixed])})"
        kinds = kinds_of(schema, self._root)
        parts = schema.get("anyOf", schema.get("oneOf"))
        if "type" not in schema and isinstance(parts, list) and parts:
            values = [
                self._quoted_value(f"{rule}_or{index}", part, depth + 1)
                for index, part in enumerate(parts)
            ]
        else:
            values = [self._of_kind(f"{rule}_{k}", k, schema, depth) for k in sorted(kinds)]
        return f"({' | '.join(values)})" if values else self._any_value()

    def _referred(self, reference: Any, depth: int) -> str:
        """A rule of its own, for a schema may refer to itself."""
        name = self._references.get(str(reference))
        if name is None:
            name = f"{self._rule}_ref{len(self._references)}"
            self._references[str(reference)] = name
            schema = referred(reference, self._root)
            self._lark.rule(name, self._quoted_value(f"{name}_value", schema, depth + 1))
        return name

    def _of_kind(self, rule: str, kind: str, schema: Mapping[str, Any], depth: int) -> str:
        match kind:
            case "string":
                return self._string()
            case "object" if properties_of(schema):
                members = self._members(rule, schema, depth + 1)
                return self._lark.rule(rule, '"{"', members, '"}"')
            case "array":
                item = self._quoted_value(f"{rule}_item", schema.get("items"), depth + 1)
                return self._lark.rule(rule, f'"[" {_repeated(item, schema)} "]"')
            case "object":
                return self._any_object()
        return self._json(rule, {**schema, "type": kind})

    def _string(self) -> str:
        quote = self._lark.text(self._fields.quote)
        rest = self._lark.free("quoted_text", self._fields.quote, (self._fields.quote,))
        return self._lark.rule("quoted", quote, rest)

    def _any_value(self) -> str:
        self._any_object()
        return "any_value"

    def _any_object(self) -> str:
        """Of anything, and the rules of what that is."""
        lark = self._lark
        lark.rule("any_list", '"[" (any_value ("," any_value)*)? "]"')
        scalar = lark.json("any", {"type": ["number", "boolean", "null"]})
        lark.rule("any_value", f"{self._string()} | {scalar} | any_list | any_object")
        lark.rule("KEY", r"/[\w-]{1,64}/")
        lark.rule("any_member", 'KEY ":" any_value')
        return lark.rule("any_object", '"{" (any_member ("," any_member)*)? "}"')

    def _spelled(self, value: Any) -> str:
        """As templates write a value."""
        quote = self._fields.quote
        match value:
            case str():
                return f"{quote}{value}{quote}"
            case list():
                return f"[{','.join(map(self._spelled, value))}]"
            case dict():
                members = sorted(value.items(), key=lambda item: item[0].lower())
                return "{" + ",".join(f"{key}:{self._spelled(v)}" for key, v in members) + "}"
        return json.dumps(value)


def _repeated(item: str, schema: Mapping[str, Any]) -> str:
    """Items of a list, as many as it may have."""
    least, most = (schema.get(key) for key in ("minItems", "maxItems"))
    least = least if isinstance(least, int) else 0
    if isinstance(most, int) and most <= 0:
        return ""
    more = f"{{{max(least - 1, 0)},{most - 1 if isinstance(most, int) else ''}}}"
    items = f'{item} ("," {item}){more}'
    return items if least > 0 else f"({items})?"
