"""Calls as Qwen3-Coder writes them: each parameter in a tag of its own, typed by the schema."""

import json

from edgekv.chat.call_json import json_calls, name_of, object_of_arguments
from edgekv.chat.characters import Reading, Unread
from edgekv.chat.kinds import as_json, kinds_of, properties_of
from edgekv.chat.span import Call, Span

_VALUE_END = "</parameter>"
# The value's own end, or where that is missing what can only come behind it.
_TAGS = ("<parameter=", "</function>")
_STOPS = (f"\n{_VALUE_END}", _VALUE_END, *(f"\n{tag}" for tag in _TAGS))


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
        yield from _parameters(span, call)
    chars.mark()


def _parameters(span: Span, call: Call) -> Reading[None]:
    chars = span.chars
    call.more("{")
    separator = ""
    while True:
        yield from chars.space()
        if not (yield from chars.any_of("<parameter=")):
            break
        key = yield from chars.run(lambda char: char not in ">\n")
        yield from chars.any_of(">")
        call.more(f"{separator}{json.dumps(key, ensure_ascii=False)}: ")
        yield from _value(span, key)
        separator = ", "
    # Whatever else comes is no parameter, so the call is over.
    if not (yield from chars.any_of("</function>")) and chars.ended:
        raise Unread
    call.more("}")
    call.end()


def _value(span: Span, key: str) -> Reading[None]:
    """A string goes on as it is written; anything else when it is there."""
    chars, call = span.chars, span.call
    tool = span.tools.get(call.name)
    schema = tool.schema() if tool else {}
    kinds = kinds_of(properties_of(schema).get(key), schema)
    yield from chars.any_of("\n")
    if kinds == {"string"}:
        call.more('"')
        stop = yield from chars.until(_STOPS, lambda text: call.more(_escaped(text)))
        call.more('"' if stop else "")
    else:
        parts: list[str] = []
        stop = yield from chars.until((*_STOPS, *_TAGS), parts.append)
        call.more(as_json("".join(parts), kinds) if stop else _escaped("".join(parts)))
    if not stop:
        raise Unread
    if not stop.endswith(_VALUE_END):
        chars.back(stop)


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]
