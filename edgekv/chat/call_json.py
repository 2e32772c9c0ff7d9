"""Calls written as JSON, whole or their arguments alone; see `Marks.body`.

Arguments go on as they are written. Only what would surely not be JSON is mended: a raw line break
in a string, and brackets that are missing where a tag begins.
"""

import json
from collections.abc import Callable

from edgekv.chat.characters import Characters, Reading, Unread
from edgekv.chat.span import Call, Span

NAME_CHARS_MAX = 256
_SEPARATORS = frozenset(" \t\r\n,;")
_PAIRS = {"{": "}", "[": "]"}
# Of a call, beside its name and arguments; such a key is never an argument.
_ASIDE = frozenset({"id", "type", "index", "call_id", "tool_call_id"})
# What begins a tag or a fence, and nothing in JSON.
_FOREIGN = frozenset("<`")

Out = Callable[[str], None]


def json_calls(span: Span) -> Reading[None]:
    """`{"name": …, "arguments": {…}}`, one or more, perhaps in a list or a fence."""
    chars = span.chars
    yield from chars.space()
    if (yield from chars.any_of("```")):
        yield from chars.run(lambda char: char.isalnum() or char == "_")
        yield from chars.space()
    listed = yield from chars.any_of("[")
    yield from chars.space()
    yield from _call(span)
    while True:
        between = yield from chars.run(_SEPARATORS.__contains__)
        if (yield from chars.peek()) != "{":
            break
        yield from _call(span)
    if not listed or not (yield from chars.any_of("]")):
        chars.back(between)


def named_calls(span: Span) -> Reading[None]:
    """`NAME[ARGS]{…}`, as Mistral's newer models write it; their older ones write a list."""
    chars = span.chars
    yield from chars.space()
    if (yield from chars.peek()) in ("[", "{"):
        yield from json_calls(span)
        return
    name = yield from name_of(chars)
    if (yield from chars.any_of("[CALL_ID]")):
        yield from chars.run(str.isalnum)
    yield from chars.any_of("[ARGS]")
    yield from chars.space()
    if (yield from chars.peek()) != "{":
        raise Unread
    span.call.named(name)
    yield from object_of_arguments(chars, span.call)


def argument_calls(span: Span) -> Reading[None]:
    """`{…}` alone: the tag before it has said what is called."""
    span.call.named(span.marks.name)
    yield from span.chars.space()
    yield from object_of_arguments(span.chars, span.call)


def name_of(chars: Characters) -> Reading[str]:
    """A tool's name that is not quoted. Raises Unread."""
    num = 0

    def wanted(char: str) -> bool:
        nonlocal num
        num += 1
        return num <= NAME_CHARS_MAX and (char.isalnum() or char in "_-./:")

    name = yield from chars.run(wanted)
    if not name:
        raise Unread
    return name


def object_of_arguments(chars: Characters, call: Call) -> Reading[None]:
    """A JSON object, streamed. Raises Unread: it does not look like one."""
    opening = yield from chars.expect("{")
    opening += yield from chars.space()
    opening += yield from chars.expect('"', "}")
    chars.back(opening)
    yield from json_value(chars, call.more)
    call.end()


def json_value(chars: Characters, out: Out) -> Reading[None]:
    """One JSON value, told as it is written; brackets that are missing before a tag are added."""
    ends: list[str] = []
    while True:
        char = yield from chars.next()
        if not char:
            raise Unread
        if char in _FOREIGN:
            chars.back(char)
            if not ends:
                raise Unread
            out("".join(reversed(ends)))
            return
        out(char)
        if char in _PAIRS:
            ends.append(_PAIRS[char])
        elif char in "]}" and ends:
            ends.pop()
        elif char == '"':
            yield from _string(chars, out)
        elif not ends:
            yield from _scalar(chars, out)
        if not ends:
            return


def _scalar(chars: Characters, out: Out) -> Reading[None]:
    out((yield from chars.run(lambda char: char.isalnum() or char in "+-._")))


def _string(chars: Characters, out: Out) -> Reading[None]:
    """The rest of a JSON string, its quote included."""
    while (char := (yield from chars.next())) != '"':
        if char == "\\":
            char += yield from chars.next()
        if char:
            out(json.dumps(char)[1:-1] if char < " " else char)
        if chars.ended:
            raise Unread
    out('"')


def _short_string(chars: Characters) -> Reading[str]:
    """A string such as a key, decoded. Raises Unread: it is none, or long."""
    parts: list[str] = []

    def collect(text: str) -> None:
        if len(parts) > NAME_CHARS_MAX:
            raise Unread
        parts.append(text)

    yield from chars.expect('"')
    yield from _string(chars, collect)
    return decoded('"' + "".join(parts))


def decoded(text: str) -> str:
    """The text that a JSON string is. Raises Unread."""
    try:
        return str(json.loads(text))
    except ValueError:
        raise Unread from None


def _call(span: Span) -> Reading[None]:
    """One call's object."""
    call = span.call if not span.call.begun else span.new_call()
    others: dict[str, str] = {}
    yield from _fields(span, call, others)
    if not call.name:
        raise Unread
    if not call.whole:
        fields = (f"{json.dumps(key)}: {value}" for key, value in others.items())
        call.more("{" + ", ".join(fields) + "}")
        call.end()
    span.chars.mark()


def _fields(
    span: Span, call: Call, others: dict[str, str], *, inner: bool = False
) -> Reading[None]:
    chars = span.chars
    yield from chars.expect("{")
    yield from chars.space()
    while not (yield from chars.any_of("}")):
        key = yield from _short_string(chars)
        yield from chars.space()
        yield from chars.expect(":")
        yield from chars.space()
        first = yield from chars.peek()
        if key == "name" or (key == "function" and first == '"'):
            call.named((yield from _short_string(chars)))
        elif key == "function" and not inner:
            yield from _fields(span, call, others, inner=True)
        elif key in ("arguments", "parameters") and not call.whole:
            yield from _arguments(chars, call, first)
        else:
            yield from _other(span, key, others)
        yield from chars.space()
        yield from chars.any_of(",")
        yield from chars.space()


def _arguments(chars: Characters, call: Call, first: str) -> Reading[None]:
    """An object; or one within a string, or none at all."""
    if first == "{":
        yield from object_of_arguments(chars, call)
        return
    parts: list[str] = []
    yield from json_value(chars, parts.append)
    text = "".join(parts)
    text = decoded(text).strip() if first == '"' else text
    if text.lower() in ("", "null", "none"):
        text = "{}"
    if not text.startswith("{"):
        raise Unread
    call.more(text)
    call.end()


def _other(span: Span, key: str, others: dict[str, str]) -> Reading[None]:
    """A key that calls do not have, or not of necessity."""
    if span.marks.loose and not span.call.begun and key not in _ASIDE:
        raise Unread
    parts: list[str] = []
    yield from json_value(span.chars, parts.append)
    if key not in _ASIDE:
        others[key] = "".join(parts)
