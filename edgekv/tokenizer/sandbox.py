"""Runs chat templates: Jinja in the dialect of Hugging Face, with bounds.

Jinja's sandbox keeps a template from reaching Python; what it does not bound is time and memory.
So the syntax tree is rewritten before it is compiled: every turn of a loop and every call of a
macro takes a step from a budget, and values that a template multiplies, adds or concatenates have
a largest size. This stops runaway templates and the well-known bombs; it is no proof against a
template that was written to waste memory through filters.
"""

import datetime
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.parser
import jinja2.sandbox
import jinja2.visitor
from jinja2 import nodes
from jinja2.exceptions import SecurityError

from edgekv.errors import ChatTemplateError

# Two million tokens of English.
OUTPUT_CHARS_MAX = 1 << 23
# A template takes a few steps per message; this many take about a third of a second.
STEPS_MAX = 1 << 17
INT_BITS_MAX = 1 << 12

_COMPILE_FAILURES = (jinja2.TemplateError, SyntaxError, RecursionError, MemoryError, ValueError)
# What a template's own expressions can raise; anything else would be a bug of ours.
_RENDER_FAILURES = (
    jinja2.TemplateError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


class CompiledTemplate:
    """One template, ready to render. Not thread-safe: the step budget is the environment's."""

    def __init__(self, source: str, *, origin: str, now: Callable[[], datetime.datetime]) -> None:
        self._origin = origin
        self._environment = _Environment(now)
        try:
            tree = _Guards().visit(self._environment.parse(source))
            code = self._environment.compile(tree)
        except _COMPILE_FAILURES as error:
            line = f"line {error.lineno}: " if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise self._error("is malformed", f"{line}{error}") from error
        self._template = jinja2.Template.from_code(
            self._environment, code, self._environment.make_globals(None)
        )

    def render(self, variables: Mapping[str, object]) -> str:
        """The template's output; ChatTemplateError where it raised or passed a bound."""
        self._environment.steps_left = STEPS_MAX
        chunks: list[str] = []
        num_chars = 0
        try:
            for chunk in self._template.generate(variables):
                num_chars += len(chunk)
                if num_chars > OUTPUT_CHARS_MAX:
                    raise jinja2.TemplateRuntimeError(
                        f"its output exceeds {OUTPUT_CHARS_MAX} characters"
                    )
                chunks.append(chunk)
        except _RENDER_FAILURES as error:
            raise self._error("failed on these messages", str(error)) from error
        return "".join(chunks)

    def _error(self, what: str, why: str) -> ChatTemplateError:
        return ChatTemplateError(
            f"{self._origin}: the chat template {what}: {' '.join(why.split())[:300]}",
            hint="check the roles and their order, or send a raw prompt without the template",
        )


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**"})

    def __init__(self, now: Callable[[], datetime.datetime]) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation]
        )
        self.steps_left = 0
        # No chat template uses these, which take time beyond any bound: wordwrap is quadratic.
        del self.filters["wordwrap"], self.filters["urlize"], self.globals["lipsum"]
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: now().strftime(form)

    def step(self) -> bool:
        """Take one step from the budget. True, so that it can stand in a condition."""
        self.steps_left -= 1
        if self.steps_left < 0:
            raise jinja2.TemplateRuntimeError(f"it takes more than {STEPS_MAX} steps")
        return True

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        """Refuse results of absurd size before they are computed."""
        if operator == "**":
            raise SecurityError("powers are not allowed")
        if _result_size(operator, left, right) > OUTPUT_CHARS_MAX:
            raise SecurityError(f"the result of {operator!r} is too large")
        return super().call_binop(context, operator, left, right)


def _result_size(operator: str, left: object, right: object) -> int:
    """Length of the sequence, or an int's bits scaled to the same bound; 0 where all is well."""
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() + right.bit_length()
        return OUTPUT_CHARS_MAX + 1 if bits > INT_BITS_MAX else 0
    left_size, right_size = _size(left), _size(right)
    return left_size + right_size if operator == "+" else left_size * right_size


def _size(value: object) -> int:
    if isinstance(value, int):
        return max(value, 0)
    return len(value) if isinstance(value, str | list | tuple) else 0


class _Guards(jinja2.visitor.NodeTransformer):
    """Puts a step into every loop and macro, and makes `a ~ b` an addition that is checked."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - named after the node
        self.generic_visit(node)
        if node.test is not None:
            # A filtered loop may run long without ever entering its body.
            node.test = nodes.And(_step_call(), node.test)
        return self._stepped(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._stepped(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        texts: list[nodes.Expr] = [
            nodes.Filter(part, "string", [], [], None, None) for part in node.nodes
        ]
        return functools.reduce(nodes.Add, texts)

    def _stepped(self, node: nodes.For | nodes.Macro) -> nodes.Node:
        node.body.insert(0, nodes.ExprStmt(_step_call(), lineno=node.lineno))
        return node


def _step_call() -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute("step"), [], [], None, None)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here it only passes them on."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        """The block's body, in a scope of its own."""
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
