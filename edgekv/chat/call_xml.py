"""Calls whose arguments are elements: as Qwen3-Coder writes them, and as GLM does.

Values are typed by the schema.
"""

import json
from collections.abc import Sequence

from edgekv.chat.call_json import json_calls, name_of, object_of_arguments
from edgekv.chat.characters import Reading, Unread
from edgekv.chat.kinds import as_json, kinds_of, properties_of
from edgekv.chat.span import Span

_VALUE_END = "</parameter>"
# The value's own end, or where that is missing what can only come behind it.
_TAGS = ("<parameter=", "</function>")
_STOPS = (f"\n{_VALUE_END}", _VALUE_END, *(f"\n{tag}" for tag in _TAGS))
_KEY, _KEY_END, _KEYED, _KEYED_END = "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"
_CALL_END = "</tool_call>"


def xml_calls(span: Span) -> Reading[None]:
    """`<function=NAME><parameter=KEY>…</parameter>…</function>`, or JSON in its place."""
    chars = span.chars
    yield from chars.space()
    if (yield from chars.peek()) in ("{", "[", "`"):
        yield from json_calls(span)
        return
    yield from chars.expect("<function=")
    call = span.call
    call.named((yield from name_of(chars)))
    yield from chars.expect(">")
    yield from chars.space()
    if (yield from chars.peek()) == "{":  # as Llama 3.1 does
        yield from object_of_arguments(chars, call)
        yield from chars.space()
        yield from chars.any_of("</function>")
    else:
        yield from _parameters(span)
    chars.mark()


def keyed_calls(span: Span) -> Reading[None]:
    """`NAME<arg_key>KEY</arg_key><arg_value>…</arg_value>…`, or JSON in its place."""
    chars, call = span.chars, span.call
    yield from chars.space()
    if (yield from chars.peek()) in ("{", "[", "`"):
        yield from json_calls(span)
        return
    name = yield from name_of(chars)
    yield from chars.space()
    found = yield from chars.expect(_KEY, _CALL_END)
    if found == _CALL_END and name not in span.tools:  # a word between tags
        raise Unread
    chars.back(found)
    call.named(name)
    members = _Members(span)
    while (yield from chars.any_of(_KEY)):
        key: list[str] = []
        if not (yield from chars.until((_KEY_END,), key.append)):
            raise Unread
        yield from chars.space()
        yield from chars.expect(_KEYED)
        yield from members.value("".join(key).strip(), (_KEYED_END,), (_KEYED_END,))
        yield from chars.space()
    members.end()


def _parameters(span: Span) -> Reading[None]:
    chars, members = span.chars, _Members(span)
    while True:
        yield from chars.space()
        if not (yield from chars.any_of("<parameter=")):
            break
        key = yield from chars.run(lambda char: char not in ">\n")
        yield from chars.any_of(">")
        yield from chars.any_of("\n")
        stop = yield from members.value(key, _STOPS, (*_STOPS, *_TAGS))
        if not stop.endswith(_VALUE_END):
            chars.back(stop)
    # Whatever else comes is no parameter, so the call is over.
    if not (yield from chars.any_of("</function>")) and chars.ended:
        raise Unread
    members.end()


class _Members:
    """The arguments of a call as JSON, one after another."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self._separator = ""
        span.call.more("{")

    def value(self, key: str, stops: Sequence[str], more_stops: Sequence[str]) -> Reading[str]:
        """One, up to one of `stops`, which is returned; `more_stops` where it is no string.

        A string goes on as it is written; anything else is told when it is there.
        """
        span, call = self._span, self._span.call
        call.more(f"{self._separator}{json.dumps(key, ensure_ascii=False)}: ")
        self._separator = ", "
        tool = span.tools.get(call.name)
        schema = tool.schema() if tool else {}
        kinds = kinds_of(properties_of(schema).get(key), schema)
        if kinds == {"string"}:
            call.more('"')
            stop = yield from span.chars.until(stops, lambda text: call.more(_escaped(text)))
            call.more('"' if stop else "")
        else:
            parts: list[str] = []
            stop = yield from span.chars.until(more_stops, parts.append)
            call.more(as_json("".join(parts), kinds) if stop else _escaped("".join(parts)))
        if not stop:
            raise Unread
        return stop

    def end(self) -> None:
        """There are no more."""
        self._span.call.more("}")
        self._span.call.end()


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
