"""Calls that look like code: Gemma's `call:NAME{key:value}`, and Python's `NAME(key=value)`."""

import ast
import json
import math
import sys

from edgekv.chat.call_json import Out, json_calls, json_value, name_of
from edgekv.chat.characters import Characters, Reading, Unread
from edgekv.chat.kinds import as_json, properties_of
from edgekv.chat.span import Call, Span
from edgekv.chat.values import Tool

_QUOTES = ("<escape>", '<|"|>')
_DEPTH_MAX = 32
_CODE_CHARS_MAX = 1 << 16
_ESCAPES = frozenset("\\'\"abfnrtv01234567xNuU\n")
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
    code = ["f("]
    yield from _python_code(chars, code.append)
    call.more(_python_arguments("".join(code), span.tools.get(name)))
    call.end()


def _python_code(chars: Characters, out: Out) -> Reading[None]:
    """Up to the bracket that closes the one before."""
    depth, num = 1, 0
    while depth:
        char = yield from chars.next()
        if not char or (num := num + 1) > _CODE_CHARS_MAX:
            raise Unread
        out(char)
        depth += (char in "([{") - (char in ")]}")
        if char in "'\"":
            quote = char + (yield from chars.any_of(2 * char))
            out(quote[1:])
            yield from _python_string(chars, quote, out)


def _python_string(chars: Characters, quote: str, out: Out) -> Reading[None]:
    """The rest of a string, its quote included; a backslash or line break that is raw is mended."""
    while not (yield from chars.any_of(quote)):
        char = yield from chars.next()
        if not char:
            raise Unread
        if char == "\\":
            escaped = yield from chars.next()
            char = f"{char if escaped in _ESCAPES else 2 * char}{escaped}"
        elif char in "\r\n" and len(quote) == 1:
            char = repr(char)[1:-1]
        out(char)
    out(quote)


def _python_arguments(code: str, tool: Tool | None) -> str:
    """JSON of a call's arguments. Raises Unread: they are no literals."""
    properties = list(properties_of(tool.schema() if tool else None))
    try:
        called = _Words().visit(ast.parse(code, mode="eval").body)
        if not isinstance(called, ast.Call) or len(called.args) > len(properties):
            raise Unread
        values = dict(zip(properties, map(ast.literal_eval, called.args), strict=False))
        values |= {str(key.arg): ast.literal_eval(key.value) for key in called.keywords}
        return json.dumps(values, ensure_ascii=False, allow_nan=False)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        raise Unread from None


class _Words(ast.NodeTransformer):
    """JSON's words as Python's, and numbers that JSON can have."""

    def visit_Constant(self, node: ast.Constant) -> ast.expr:
        is_infinite = isinstance(node.value, float) and math.isinf(node.value)
        return ast.Constant(sys.float_info.max) if is_infinite else node

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(_WORDS[node.id]) if node.id in _WORDS else node
