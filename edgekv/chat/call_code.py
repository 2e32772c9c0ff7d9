"""Calls that look like code: Gemma's `call:NAME{key:value}`, and Python's `NAME(key=value)`."""

import ast
import json

from edgekv.chat.call_json import Out, json_calls, json_value, name_of
from edgekv.chat.characters import Characters, Reading, Unread
from edgekv.chat.kinds import as_json
from edgekv.chat.span import Call, Span

_QUOTES = ("<escape>", '<|"|>')
_DEPTH_MAX = 32
_CODE_CHARS_MAX = 1 << 16
_WORDS = {"true": True, "false": False, "null": None}


def braces_calls(span: Span) -> Reading[None]:
    """`call:NAME{key:value,…}`, strings between quote tokens; or JSON in its place."""
    chars = span.chars
    yield from chars.space()
    if (yield from chars.peek()) in ("{", "[", "`"):
        yield from json_calls(span)
        return
    yield from chars.expect("call:")
    span.call.named((yield from name_of(chars)))
    yield from chars.space()
    yield from chars.expect("{")
    yield from _members(chars, span.call.more, 0)
    span.call.end()


def _members(chars: Characters, out: Out, depth: int) -> Reading[None]:
    """The rest of an object, as JSON."""
    out("{")
    separator = ""
    while True:
        yield from chars.run(lambda char: char.isspace() or char == ",")
        if (yield from chars.any_of("}")):
            out("}")
            return
        quote = yield from chars.any_of('"', *_QUOTES)
        parts: list[str] = []
        if not (yield from chars.until((f"{quote}:",), parts.append)):
            raise Unread
        out(f"{separator}{json.dumps(''.join(parts), ensure_ascii=False)}: ")
        yield from _member(chars, out, depth + 1)
        separator = ", "


def _member(chars: Characters, out: Out, depth: int) -> Reading[None]:
    if depth > _DEPTH_MAX:
        raise Unread
    yield from chars.space()
    if quote := (yield from chars.any_of(*_QUOTES)):
        out('"')
        escaped = lambda text: out(json.dumps(text, ensure_ascii=False)[1:-1])  # noqa: E731
        if not (yield from chars.until((quote,), escaped)):
            raise Unread
        out('"')
    elif (yield from chars.any_of("{")):
        yield from _members(chars, out, depth)
    elif (yield from chars.any_of("[")):
        yield from _items(chars, out, depth)
    elif (yield from chars.peek()) == '"':
        yield from json_value(chars, out)
    else:
        text = yield from chars.run(lambda char: char not in ",}]")
        if chars.ended:
            raise Unread
        out(as_json(text, frozenset()))


def _items(chars: Characters, out: Out, depth: int) -> Reading[None]:
    """The rest of a list, as JSON."""
    out("[")
    separator = ""
    while True:
        yield from chars.run(lambda char: char.isspace() or char == ",")
        if (yield from chars.any_of("]")):
            out("]")
            return
        out(separator)
        yield from _member(chars, out, depth + 1)
        separator = ", "


def python_calls(span: Span) -> Reading[None]:
    """`NAME(key=value, …)`, one or more, perhaps in a list; or JSON in its place."""
    chars = span.chars
    yield from chars.space()
    opened = yield from chars.any_of("[")
    yield from chars.space()
    if (yield from chars.peek()) == "{":
        chars.back(opened)
        yield from json_calls(span)
        return
    yield from _python_call(span, span.call)
    while True:
        between = yield from chars.run(lambda char: char.isspace() or char in ",;")
        first = yield from chars.peek()
        if not (first.isalpha() or first == "_"):
            break
        yield from _python_call(span, span.new_call())
    if not opened or not (yield from chars.any_of("]")):
        chars.back(between)


def _python_call(span: Span, call: Call) -> Reading[None]:
    """Told when it is there: Python's literals are not JSON's."""
    chars = span.chars
    name = yield from name_of(chars)
    yield from chars.expect("(")
    call.named(name)
    code = "("
    while True:
        code += yield from chars.run(lambda char: char != ")")
        code += yield from chars.next()
        if chars.ended or len(code) > _CODE_CHARS_MAX:
            raise Unread
        arguments = _python_arguments(code, span, name)
        if arguments is not None:
            call.more(arguments)
            call.end()
            return


def _python_arguments(code: str, span: Span, name: str) -> str | None:
    """JSON of what is between the brackets; None if that is not whole, or no literals."""
    tool = span.tools.get(name)
    properties = list(tool.schema().get("properties", {})) if tool else []
    try:
        called = ast.parse(f"f{code}", mode="eval").body
        if not isinstance(called, ast.Call) or len(called.args) > len(properties):
            return None
        values = dict(zip(properties, map(_literal, called.args), strict=False))
        values |= {str(key.arg): _literal(key.value) for key in called.keywords}
        return json.dumps(values, ensure_ascii=False, allow_nan=False)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None


def _literal(node: ast.expr) -> object:
    if isinstance(node, ast.Name) and node.id in _WORDS:
        return _WORDS[node.id]
    return ast.literal_eval(node)
