"""JSON schemas of every kind that answers are held to, small enough that their answers end."""

from typing import Any


def _object(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": required | optional,
        "required": [*required],
        "additionalProperties": False,
    }


_WORD = {"type": "string", "maxLength": 6}
_DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}

SCHEMAS: dict[str, Any] = {
    "string": _WORD,
    "string of a length": {"type": "string", "minLength": 2, "maxLength": 4},
    "pattern": {"type": "string", "pattern": "^[A-Z][a-z]{1,3}-[0-9]{2}$"},
    "format": {"type": "string", "format": "date"},
    "format that is an annotation": {"type": "string", "format": "password", "maxLength": 5},
    "bounded number": {"type": "integer", "minimum": -12, "exclusiveMaximum": 340},
    "multiple": {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 95},
    "enum": {"enum": ["red", "gr\u00fcn", 3, None, True, {"a": [1]}]},
    "const": {"const": {"kind": "fixed", "n": -1.5}},
    "types": {"type": ["boolean", "null"]},
    "anyOf": {"anyOf": [_object({"a": _DIGIT}), {"type": "boolean"}, {"const": "none"}]},
    "oneOf by a tag": {
        "oneOf": [_object({"kind": {"const": kind}, kind: _DIGIT}) for kind in ("cat", "dog")]
    },
    "allOf": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 7}]},
    "nested": _object({"person": _object({"name": _WORD, "age": _DIGIT}), "ok": {"type": "null"}}),
    "optional": _object({"a": _DIGIT}, b=_DIGIT, c=_WORD),
    "array with bounds": {"type": "array", "items": _DIGIT, "minItems": 2, "maxItems": 4},
    "tuple": {"type": "array", "prefixItems": [_DIGIT, _WORD], "items": False, "minItems": 2},
    "names by pattern": {
        "type": "object",
        "patternProperties": {"^[xy]$": _DIGIT},
        "additionalProperties": False,
    },
    "$ref": {
        **_object({"from": {"$ref": "#/$defs/point"}, "to": {"$ref": "#/$defs/point"}}),
        "$defs": {"point": {"type": "array", "items": _DIGIT, "minItems": 2, "maxItems": 2}},
    },
    "recursion": {
        "$ref": "#/$defs/tree",
        "$defs": {
            "tree": _object(
                {
                    "v": _DIGIT,
                    "kids": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 1},
                }
            )
        },
    },
}
assert len(SCHEMAS) == 20
