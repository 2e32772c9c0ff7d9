"""Answers of a type: its JSON schema constrains what the model says, which is then read as a value.

Types are pydantic's to read: its models, dataclasses, `TypedDict`s, lists and unions of these. It
is imported when the first type is given.
"""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar, get_origin

from edgekv.chat.lark import SPACING
from edgekv.errors import AnswerInvalid, ConfigError
from edgekv.tokenizer.grammar import Grammar
from edgekv.tokenizer.schema import parts_of

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")
_SHOWN_CHARS_MAX = 500
_ALLOWED = "a type that pydantic reads, or a JSON schema as a dict"


class AnswerType(Generic[T]):
    """What an answer must be. Immutable.

    Attributes:
        name: For messages.
        grammar: What its text must match, in one line of JSON: blanks are tokens that say nothing.
    """

    def __init__(self, schema: type[T] | Mapping[str, Any] | object) -> None:
        """Of a type, or of a JSON schema, of which the value is plain.

        Raises:
            ConfigError: It is neither.
        """
        self._adapter: TypeAdapter[T] | None = None
        given: object = schema
        if not isinstance(given, type | Mapping) and get_origin(given) is None:
            raise ConfigError.of("schema", given, _ALLOWED)
        if isinstance(schema, Mapping):
            self.name, plain = "JSON of the schema", dict(schema)
        else:
            self._adapter, plain = described("schema", schema, _ALLOWED)
            self.name = getattr(schema, "__name__", str(schema))
        try:
            text = json.dumps({"x-guidance": SPACING} | plain, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError) as error:
            why = str(error).partition("\n")[0]
            raise ConfigError(f"schema is no JSON: {why}", hint=f"give {_ALLOWED}") from None
        self.grammar = Grammar(kind="json_schema", text=text)

    def read(self, text: str, *, cut: bool) -> T:
        """The value that an answer is; `cut` if its length ended it.

        Raises:
            AnswerInvalid: It is cut, or the type wants more than its schema says.
        """
        try:
            if self._adapter is not None:
                return self._adapter.validate_json(text)
            value: T = json.loads(text)
        except ValueError as error:  # pydantic's errors are such
            if cut:
                raise AnswerInvalid(
                    f"the answer was cut by its length before it was {self.name}",
                    hint="raise max_tokens",
                    text=text,
                ) from None
            raise AnswerInvalid(
                f"the answer is not {self.name}: {refusals(error)[:_SHOWN_CHARS_MAX]}", text=text
            ) from None
        return value


def described(field: str, thing: Any, allowed: str) -> "tuple[TypeAdapter[Any], dict[str, Any]]":
    """What reads values of a type, or calls a function, and the JSON schema of what that takes.

    Raises:
        ConfigError: Pydantic cannot; the error names `field`, and what is `allowed`.
    """
    from pydantic import TypeAdapter

    try:
        adapter: TypeAdapter[Any] = TypeAdapter(thing)
        return adapter, _tidied(adapter.json_schema())
    # Pydantic's own errors are of the first kind; the others are of annotations in quotes, and of
    # what has no signature.
    except (RuntimeError, NameError, SyntaxError, TypeError, ValueError) as error:
        why = " ".join(str(error).partition("\n")[0].split())[:_SHOWN_CHARS_MAX]
        raise ConfigError.of(field, thing, f"{allowed}: {why}") from None


def _tidied(schema: dict[str, Any]) -> dict[str, Any]:
    """Without titles, which pydantic makes of names, and with no properties but those it names.

    Pydantic ignores others, so that a model could go on and on with them.
    """
    left: list[Any] = [schema]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            part.pop("title", None)
            if "properties" in part:
                part.setdefault("additionalProperties", False)
            left += [inner for _, inner in parts_of(part)]
    return schema


def refusals(error: ValueError) -> str:
    """What pydantic refused, in one line: "days: Input should be greater than 0"."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return str(error)
    refused = error.errors(include_url=False, include_context=False, include_input=False)
    return "; ".join(
        ": ".join(filter(None, (".".join(map(str, one["loc"])), one["msg"]))) for one in refused
    )
