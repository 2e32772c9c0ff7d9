"""Runs chat templates: Jinja in the dialect of Hugging Face, with bounds.

Jinja's sandbox keeps a template from reaching Python; what it does not bound is time and memory.
So the syntax tree is rewritten before it is compiled: every turn of a loop and every call of a
macro takes a step from a budget, and values that a template multiplies, adds or concatenates have
a largest size. This stops runaway templates and the well-known bombs; it is no proof against a
template that was written to waste memory through filters.
"""

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.parser
import jinja2.sandbox
import jinja2.visitor
from jinja2 import nodes
from jinja2.exceptions import SecurityError

from edgekv.errors import ChatTemplateError

# Two million tokens of English.
OUTPUT_CHARS_MAX = 1 << 23
# Templates take a few steps per message, some look through all messages at each of them.
STEPS_MAX = 1 << 20
STEPS_PER_PAIR = 4
INT_BITS_MAX = 1 << 12
_CONCAT = "~"  # no template can name a filter so

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
    """One template, ready to render. Not thread-safe: the step budget is the environment's.

    Attributes:
        written: All text that stands in it, and all strings in its code, with NUL between them.
    """

    def __init__(self, source: str, *, origin: str, now: Callable[[], datetime.datetime]) -> None:
        self._origin = origin
        self._environment = _Environment(now)
        try:
            tree = self._environment.parse(source)
            self.written = _written(tree)
            tree = _Guards().visit(tree)
            code = self._environment.compile(tree)
        except _COMPILE_FAILURES as error:
            line = f"line {error.lineno}: " if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise self._error("is malformed", f"{line}{error}") from error
        self._template = jinja2.Template.from_code(
            self._environment, code, self._environment.make_globals(None)
        )

    def render(self, variables: Mapping[str, object], *, num_messages: int) -> str:
        """The template's output; ChatTemplateError where it raised or passed a bound."""
        self._environment.steps_max = STEPS_MAX + STEPS_PER_PAIR * num_messages**2
        self._environment.num_steps = 0
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
            return "".join(chunks)  # which a filter block may have made anything but text
        except _RENDER_FAILURES as error:
            raise self._error("failed on these messages", str(error)) from error

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
        self.steps_max = self.num_steps = 0
        # No chat template uses these, which take time beyond any bound: wordwrap is quadratic.
        del self.filters["wordwrap"], self.filters["urlize"], self.globals["lipsum"]
        self.filters["tojson"] = _to_json
        self.filters[_CONCAT] = _concat
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda form: now().strftime(form)

    @property
    def step(self) -> bool:
        """Reading this takes a step from the budget. True, so that it can stand in a condition.

        A call would go through the sandbox, which takes longer than what most loops do.
        """
        self.num_steps += 1
        if self.num_steps > self.steps_max:
            raise jinja2.TemplateRuntimeError(f"it takes more than {self.steps_max} steps")
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
    """Puts a step into every loop and macro, and has the size of `a ~ b` checked."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 - named after the node
        self.generic_visit(node)
        if node.test is not None:
            # A filtered loop may run long without ever entering its body.
            node.test = nodes.And(nodes.EnvironmentAttribute("step"), node.test)
        return self._stepped(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return self._stepped(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        try:
            return nodes.Const(node.as_const(), lineno=node.lineno)  # as Jinja's optimiser has it
        except nodes.Impossible:
            return nodes.Filter(nodes.List(node.nodes), _CONCAT, [], [], None, None)

    def _stepped(self, node: nodes.For | nodes.Macro) -> nodes.Node:
        step = nodes.EnvironmentAttribute("step")
        node.body.insert(0, nodes.ExprStmt(step, lineno=node.lineno))
        return node


@jinja2.pass_eval_context
def _concat(context: nodes.EvalContext, parts: Sequence[object]) -> str:
    """What `a ~ b` is: of strings that are marked as safe only the text, as anywhere in Jinja."""
    texts = [part if isinstance(part, str) else str(part) for part in parts]
    if sum(map(len, texts)) > OUTPUT_CHARS_MAX:
        raise SecurityError("the result of '~' is too large")
    return jinja2.filters.sync_do_join(context, texts)


def _written(tree: nodes.Template) -> str:
    texts = [node.data for node in tree.find_all(nodes.TemplateData)]
    texts += [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
    return "\0".join(texts)


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
