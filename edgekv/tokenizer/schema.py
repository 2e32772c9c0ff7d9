"""JSON schemas before they are compiled: parsed, rid of what means nothing, and where they fail."""

import json
from collections.abc import Callable, Iterator
from typing import Any

from edgekv.errors import GrammarError

# Formats that llguidance enforces; all others are annotations, as the standard has it, and stand in
# the schemas of many tools ("uint32", "password", "path").
_FORMATS = frozenset(
    {
        *("date-time", "time", "date", "duration", "email", "hostname"),
        *("ipv4", "ipv6", "uuid", "uri", "unknown"),
    }
)
# Keywords whose value is a schema, a list of schemas, or schemas by name.
_OF_ONE = (
    *("items", "additionalProperties", "not", "if", "then", "else", "contains"),
    *("propertyNames", "unevaluatedProperties", "unevaluatedItems", "additionalItems"),
)
_OF_LIST = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_OF_NAMES = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
DEFINITIONS = ("$defs", "definitions")
_TRIES_MAX = 200


def parse_schema(text: str) -> Any:
    """A schema from JSON text.

    Raises:
        GrammarError: It is no JSON, no schema, or nested too deeply.
    """
    try:
        schema = json.loads(text)
    except ValueError as error:
        raise GrammarError(f"the schema is not JSON: {error}") from None
    except RecursionError:
        raise GrammarError("the schema is nested too deeply") from None
    if not isinstance(schema, dict | bool):
        raise GrammarError("#: a schema is an object, true or false")
    _drop_annotations(schema)
    return schema


def place_of(schema: Any, refusal: Callable[[Any], str]) -> str:
    """Where a schema fails, as "#/properties/a: ": the innermost part that is refused likewise.

    `refusal` says why a schema by itself is refused. Parts are tried with the definitions of the
    whole; `_TRIES_MAX` of them at most.
    """
    why, place, parts = refusal(schema), "#", parts_of(schema)
    shared = {key: schema[key] for key in DEFINITIONS if key in schema} if _is(schema) else {}
    for _ in range(_TRIES_MAX):
        name, part = next(parts, ("", None))
        if part is None or not why:
            break
        if refusal(shared | part if _is(part) else part) == why:
            place, parts = f"{place}/{name}", parts_of(part)
    return f"{place}: "


def _drop_annotations(schema: Any) -> None:
    """Take out formats that are not enforced, in all of a schema's parts."""
    left = [schema]
    while left:
        part = left.pop()
        if _is(part):
            if part.get("format", "unknown") not in _FORMATS:
                del part["format"]
            left += [inner for _, inner in parts_of(part)]


def parts_of(schema: Any) -> Iterator[tuple[str, Any]]:
    """The schemas right inside one, and where in it they are, as a JSON pointer has it."""
    if not _is(schema):
        return
    for key, value in schema.items():
        if key in _OF_ONE and isinstance(value, dict | bool):
            yield key, value
        elif key in _OF_LIST and isinstance(value, list):
            yield from ((f"{key}/{i}", inner) for i, inner in enumerate(value))
        elif key in _OF_NAMES and isinstance(value, dict):
            for name, inner in value.items():
                yield f"{key}/{name.replace('~', '~0').replace('/', '~1')}", inner


def _is(schema: Any) -> bool:
    """Whether it is a schema that has parts, and not true or false."""
    return isinstance(schema, dict)
