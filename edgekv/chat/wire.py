"""Values and events as JSON, and back: what a daemon and its clients say to each other.

A dataclass is an object of its fields, without those that are as they usually are, under its name:

    TextDelta(text="Hi")  ⇄  {"type": "TextDelta", "text": "Hi"}

Bytes are base64. An error is an object of its class, message and hint, and comes back as one of the
same class. What is read is checked against the types of the fields, as it may be anybody's.
"""

import base64
import functools
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from edgekv import errors
from edgekv.config import check_choice, check_float, check_kind
from edgekv.errors import ConfigError, EdgeKVError


def dump(value: object) -> Any:
    """A value as `json.dumps` takes it."""
    if isinstance(value, EdgeKVError):
        return _dump_error(value)
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, tuple | list):
        return [dump(item) for item in value]
    if not is_dataclass(value):
        return value
    told = {field.name: getattr(value, field.name) for field in fields(value)}
    usual = {f.name: f.default for f in fields(value) if f.default is not MISSING}
    said = {n: dump(v) for n, v in told.items() if n not in usual or v != usual[n]}
    return {"type": type(value).__name__, **said}


def load(kind: Any, value: Any, path: str = "") -> Any:
    """What `dump` made JSON of.

    Args:
        kind: The type that it must be of, or a union of types.
        value: Plain values, as `json.loads` makes them.
        path: Where they stand, for the message.

    Raises:
        ConfigError: They are none of that type.
    """
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        return _load_one_of(get_args(kind), value, path)
    if origin is Literal:
        if value not in get_args(kind):
            check_choice(path, None, tuple(map(str, get_args(kind))))
        return value
    if origin is tuple:
        return _load_tuple(get_args(kind), value, path)
    if is_dataclass(kind):
        return _load_dataclass(kind, value, path)
    if kind is EdgeKVError:
        return _load_error(value, path)
    return _load_plain(kind, value, path)


def _load_plain(kind: type, value: Any, path: str) -> Any:
    if kind is bytes:
        try:
            return base64.b64decode(check_kind(path, value, str), validate=True)
        except ValueError:
            raise ConfigError.of(path, value, "base64") from None
    if kind is float:
        return check_float(path, value, float("-inf"), float("inf"))
    if kind is int and isinstance(value, bool):
        raise ConfigError.of(path, value, "a whole number")
    return check_kind(path, value, kind, allowed="a string" if kind is str else "")


def _load_one_of(kinds: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None and NoneType in kinds:
        return None
    left = [kind for kind in kinds if kind is not NoneType]
    if len(left) > 1:
        name = value.get("type") if isinstance(value, Mapping) else None
        left = [kind for kind in left if kind.__name__ == name]
        if not left:
            names = tuple(kind.__name__ for kind in kinds if kind is not NoneType)
            raise ConfigError.of(_at(path, "type"), name, " or ".join(names))
    return load(left[0], value, path)


def _load_tuple(kinds: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    items = check_kind(path, value, list, allowed="a list")
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(items)
    if len(kinds) != len(items):
        raise ConfigError.of(path, value, f"a list of {len(kinds)}")
    pairs = zip(kinds, items, strict=True)
    return tuple(load(kind, item, f"{path}[{i}]") for i, (kind, item) in enumerate(pairs))


def _load_dataclass(kind: Any, value: Any, path: str) -> Any:
    """Of its own fields; others are a newer version's."""
    told = check_kind(path or kind.__name__, value, dict, allowed="an object")
    given: dict[str, Any] = {}
    for field in fields(kind):
        at = _at(path, field.name)
        if field.name in told:
            given[field.name] = load(_types(kind)[field.name], told[field.name], at)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ConfigError(f"{at} is missing", hint=f"{kind.__name__} has it")
    return kind(**given)


@functools.cache
def _types(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _at(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _dump_error(error: EdgeKVError) -> dict[str, Any]:
    more = {name: value for name, value in vars(error).items() if isinstance(value, int | str)}
    return {"type": type(error).__name__, "message": str(error), **more}


def _load_error(value: Any, path: str) -> EdgeKVError:
    """An error of the class that it names, as far as that is known here."""
    more = dict(check_kind(path or "error", value, dict, allowed="an object"))
    name, message = more.pop("type", ""), str(more.pop("message", ""))
    kind = getattr(errors, name, None) if isinstance(name, str) else None
    if not isinstance(kind, type) or not issubclass(kind, EdgeKVError):
        kind = EdgeKVError
    error = kind.__new__(kind, message)
    EdgeKVError.__init__(error, message, hint=str(more.pop("hint", "")))
    vars(error).update(more)
    return error
