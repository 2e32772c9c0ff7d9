"""Typed access to a GGUF file's tokenizer metadata."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from edgekv.errors import TokenizerError

T = TypeVar("T")


@dataclass(frozen=True)
class GgufFields:
    """Metadata under `tokenizer.`; every key is given without that prefix.

    All methods raise TokenizerError, naming the file and the key, for a value of a wrong type.

    Attributes:
        metadata: Plain values by full GGUF key.
        origin: The file, for messages.
    """

    metadata: Mapping[str, object]
    origin: str

    def has(self, key: str) -> bool:
        """Whether the file says anything under `key`."""
        return f"tokenizer.{key}" in self.metadata

    def optional(self, key: str, kind: type[T], default: T) -> T:
        """The value, or `default` if there is none."""
        value = self.metadata.get(f"tokenizer.{key}", default)
        if type(value) is not kind:  # bool is no int here
            raise self.wrong(key, f"is no {kind.__name__}: {str(value)[:40]!r}")
        return value

    def required(self, key: str, kind: type[T]) -> T:
        """The value, which must be there."""
        if not self.has(key):
            raise self.wrong(key, "is missing")
        return self.optional(key, kind, kind())

    def values(self, key: str, *kinds: type[T], length: int | None = None) -> list[T]:
        """A list whose items are of `kinds`, and `length` of them."""
        values: list[T] = self.required(key, list)
        if strange := set(map(type, values)) - set(kinds):
            names = ", ".join(sorted(kind.__name__ for kind in strange))
            raise self.wrong(key, f"holds values of type {names}")
        if length is not None and len(values) != length:
            raise self.wrong(key, f"has {len(values)} entries for {length} tokens")
        return values

    def token_id(self, role: str, vocab_size: int) -> int | None:
        """Id of the token with this role; None if absent, or out of range as some files have it."""
        token_id = self.optional(f"ggml.{role}_token_id", int, -1)
        return token_id if 0 <= token_id < vocab_size else None

    def wrong(self, key: str, what: str) -> TokenizerError:
        """An error about `key`."""
        return TokenizerError(
            f"{self.origin}: tokenizer.{key} {what}",
            hint="the GGUF file is damaged; download it again",
        )
