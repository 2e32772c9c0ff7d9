"""Fields of a request's JSON, each of the type that it must have; and what is wrong otherwise."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

FaultKind = Literal[
    "invalid",  # 400
    "context",  # 400: more tokens than fit
    "unauthorized",  # 401
    "forbidden",  # 403
    "not_found",  # 404
    "too_large",  # 413
    "overloaded",  # 429
    "internal",  # 500
    "unavailable",  # 503
]
STATUS: dict[FaultKind, int] = {
    "invalid": 400,
    "context": 400,
    "unauthorized": 401,
    "forbidden": 403,
    "not_found": 404,
    "too_large": 413,
    "overloaded": 429,
    "internal": 500,
    "unavailable": 503,
}


class Fault(Exception):
    """Why a request is not answered; each dialect says it in its API's own shape.

    Attributes:
        kind: Whose fault it is, and so the status.
        message: For the client's user.
        param: The field that it is about, as "messages[2].content"; "" if none.
        code: A word that clients know; "" if none.
        retry_after_s: When to come again.
    """

    def __init__(
        self,
        kind: FaultKind,
        message: str,
        *,
        param: str = "",
        code: str = "",
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.kind, self.message = kind, message
        self.param, self.code = param, code
        self.retry_after_s = retry_after_s

    @property
    def status(self) -> int:
        """The HTTP status."""
        return STATUS[self.kind]


def invalid(param: str, allowed: str) -> Fault:
    """A field that is not what it must be."""
    return Fault("invalid", f"{param} must be {allowed}", param=param)


class Fields:
    """A JSON object of a request, read field by field; null is as if the field were not there."""

    def __init__(self, value: object, path: str = "") -> None:
        """`path` is where it stands, "" for the body. Raises Fault: it is no object."""
        if not isinstance(value, Mapping):
            raise invalid(path or "the body", "a JSON object")
        self._values: Mapping[str, Any] = value
        self._path = path

    def path(self, name: str) -> str:
        """Where a field stands."""
        return f"{self._path}.{name}" if self._path else name

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self._values.get(name) is not None

    def raw(self, name: str) -> Any:
        """Whatever it is; None if it is not there."""
        return self._values.get(name)

    def text(self, name: str, default: str | None = None) -> str:
        """A string; without default it must be there."""
        return str(self._typed(name, str, "a string", default))

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        return bool(self._typed(name, bool, "true or false", default))

    def number(self, name: str, low: float, high: float) -> float | None:
        """A number in [low, high]; None if it is not there."""
        value = self._values.get(name)
        if value is None:
            return None
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not low <= value <= high:
            raise invalid(self.path(name), f"a number from {low:g} to {high:g}")
        return float(value)

    def integer(self, name: str, low: int, high: int) -> int | None:
        """A whole number in [low, high]; None if it is not there."""
        value = self._values.get(name)
        if value is None:
            return None
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise invalid(self.path(name), f"a whole number from {low} to {high}")
        return value

    def mapping(self, name: str) -> "Fields | None":
        """An object; None if it is not there."""
        value = self._values.get(name)
        return None if value is None else Fields(value, self.path(name))

    def items(self, name: str) -> Sequence[Any]:
        """A list; empty if it is not there."""
        value = self._values.get(name)
        if value is None:
            return ()
        if not isinstance(value, list):
            raise invalid(self.path(name), "a list")
        return value

    def objects(self, name: str) -> list["Fields"]:
        """A list of objects; empty if it is not there."""
        values = self.items(name)
        return [Fields(value, f"{self.path(name)}[{i}]") for i, value in enumerate(values)]

    def texts(self, name: str) -> tuple[str, ...]:
        """A string or a list of strings; () if it is not there."""
        value = self._values.get(name)
        if value is None:
            return ()
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(text, str) for text in values):
            raise invalid(self.path(name), "a string or a list of strings")
        return tuple(values)

    def _typed(self, name: str, kind: type[object], allowed: str, default: object) -> object:
        value = self._values.get(name)
        if value is None:
            if default is None:
                raise Fault("invalid", f"{self.path(name)} is missing", param=self.path(name))
            return default
        if not isinstance(value, kind):
            raise invalid(self.path(name), allowed)
        return value
