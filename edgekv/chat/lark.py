"""Grammars in llguidance's Lark, rule by rule: texts, control tokens, JSON, text up to its end."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from edgekv.chat.kinds import properties_of
from edgekv.chat.values import Tool

# As templates write JSON, so that what comes back is spelled as it was generated.
SPACING = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# By which a schema may allow properties that it does not name among its own.
_OPEN = {"$ref", "allOf", "anyOf", "oneOf", "if", "not", "patternProperties"}


class Lark:
    """A grammar that is being written.

    Attributes:
        control: Of which control tokens `control_0` and so on speak; see `Grammar`.
    """

    def __init__(self, control: Sequence[str] = ()) -> None:
        self.control = tuple(control)
        self._names = {token: f"control_{index}" for index, token in enumerate(self.control)}
        longest_first = sorted(self.control, key=len, reverse=True)
        self._pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        self._rules: dict[str, str] = {}

    @property
    def source(self) -> str:
        """All rules."""
        return "".join(f"{name}: {what}\n" for name, what in self._rules.items())

    def rule(self, name: str, *parts: str) -> str:
        """Define a rule, of parts that are rules or what `text` returned; its name."""
        self._rules[name] = " ".join(filter(None, parts)) or '""'
        return name

    def text(self, text: str) -> str:
        """As strings, and control tokens between them; "" of nothing."""
        parts = self._pattern.split(text) if self.control else [text]
        return " ".join(self._names.get(part) or quoted(part) for part in parts if part)

    def json(self, name: str, schema: Any) -> str:
        """JSON of a schema, as templates write it: the name of its rule."""
        spaced = {**schema, "x-guidance": SPACING} if isinstance(schema, dict) else schema
        return self.rule(f"{name}_json", f"%json {json.dumps(spaced)}")

    def free(self, name: str, closer: str, stops: Sequence[str]) -> str:
        """Any text that holds none of `stops`, and `closer` behind it: the name of its rule."""
        terminal = name.upper()
        ends = "|".join(map(_pattern, stops))
        end = self.text(closer)
        if end == quoted(closer):
            self._rules[f"{name}[suffix={end}]"] = terminal
        else:  # a control token is in no text, and so ends it
            self.rule(name, terminal, end)
        self._rules[terminal] = rf"/(?s:.*)/ & ~/(?s:.*)({ends})(?s:.*)/"
        return name


def quoted(text: str) -> str:
    """A string of Lark."""
    return json.dumps(text, ensure_ascii=False)


def _pattern(text: str) -> str:
    """A regular expression of Lark that matches a text."""
    return re.escape(text).replace("/", r"\/").replace("\\\n", r"\n")


def arguments_schema(tool: Tool) -> dict[str, Any]:
    """The schema of a call's arguments: an object, of the parameters that are named, no others.

    That is left as it is where other keywords may allow or want more of them.
    """
    schema = tool.schema()
    schema = schema if isinstance(schema, dict) else {}
    closed = not _OPEN & schema.keys() and required_of(schema) <= properties_of(schema).keys()
    return {"type": "object"} | ({"additionalProperties": False} if closed else {}) | schema


def required_of(schema: Mapping[str, Any]) -> set[str]:
    """Names of properties that an object must have."""
    required = schema.get("required")
    return set(map(str, required)) if isinstance(required, list) else set()
