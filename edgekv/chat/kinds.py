"""What kinds of JSON values a schema allows, and text read as one of them."""

import ast
import json
from collections.abc import Mapping
from typing import Any

_DEPTH_MAX = 16
_UNION = ("anyOf", "oneOf")


def properties_of(schema: Any) -> Mapping[str, Any]:
    """An object's properties and their schemas; none if the schema names none."""
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    return properties if isinstance(properties, Mapping) else {}


def kinds_of(schema: Any, root: Any, depth: int = 0) -> frozenset[str]:
    """JSON schema's names of the types that it allows; empty if it allows any, or does not say."""
    if not isinstance(schema, Mapping) or depth > _DEPTH_MAX:
        return frozenset()
    if "$ref" in schema:
        return kinds_of(referred(schema["$ref"], root), root, depth + 1)
    if "type" in schema:
        kinds = schema["type"]
        return frozenset([kinds] if isinstance(kinds, str) else map(str, _listed(kinds)))
    if "const" in schema:
        return frozenset([kind_of(schema["const"])])
    if isinstance(schema.get("enum"), list):
        return frozenset(map(kind_of, schema["enum"]))
    for union in _UNION:
        parts = [kinds_of(part, root, depth + 1) for part in _listed(schema.get(union))]
        if parts:
            return frozenset().union(*parts) if all(parts) else frozenset()
    parts = [kinds_of(part, root, depth + 1) for part in _listed(schema.get("allOf"))]
    return next(filter(None, parts), frozenset())


def kind_of(value: object) -> str:
    """JSON schema's name of a value's type."""
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
        case list() | tuple():
            return "array"
    return "object"


def as_json(text: str, kinds: frozenset[str]) -> str:
    """JSON of what `text` spells, of one of the `kinds` (empty: any); else it is a string."""
    try:
        value, spelled = _spelled(text.strip())
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return json.dumps(text, ensure_ascii=False)
    kind = kind_of(value)
    allowed = not kinds or kind in kinds or (kind == "integer" and "number" in kinds)
    if kind == "string" or not allowed:
        return json.dumps(text, ensure_ascii=False)
    return spelled


def _spelled(text: str) -> tuple[Any, str]:
    """The value that it spells, and JSON of it: as it is written, or a literal of Python's."""
    try:
        return json.loads(text, parse_constant=_refuse), text
    except ValueError:
        value = ast.literal_eval(text)
        return value, json.dumps(value, ensure_ascii=False, allow_nan=False)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def referred(reference: object, root: Any) -> Any:
    """What a reference within the schema points at; None if it is elsewhere."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    found = root
    for key in reference.removeprefix("#").removeprefix("/").split("/"):
        name = key.replace("~1", "/").replace("~0", "~")
        if name:
            found = found.get(name) if isinstance(found, Mapping) else None
    return found
