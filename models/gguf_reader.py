"""A bounded cursor over the front of a GGUF file: no length it reads is believed unchecked."""

import pathlib
import struct
from typing import BinaryIO, NoReturn

from edgekv.errors import CheckpointCorrupt

HEADER_BYTES_MAX = 256 << 20
STRING_BYTES_MAX = 16 << 20
ELEMENTS_MAX = 1 << 24  # of all arrays together; large vocabularies need about 2 million
CHUNK_BYTES = 1 << 20

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")

# GGUF value types: number → `struct` code of a scalar. 8 is a string, 9 an array.
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING = 8
_ARRAY = 9


class HeaderReader:
    """Reads little-endian values forward, fetching the file in chunks as they are needed.

    Every method raises CheckpointCorrupt where the file ends too soon or a limit is exceeded.
    """

    def __init__(self, path: pathlib.Path, file: BinaryIO) -> None:
        self.path = path
        self.position = 0
        self.file_bytes = file.seek(0, 2)
        file.seek(0)
        self._file = file
        self._buffer = bytearray()
        self._num_elements = 0

    def fail(self, what: str) -> NoReturn:
        """Raise CheckpointCorrupt, naming the file."""
        raise CheckpointCorrupt(
            f"{self.path}: {what}",
            hint="the file is damaged or only partly downloaded: fetch it again",
        )

    def take(self, num_bytes: int) -> bytes:
        """The next bytes."""
        start = self._advance(num_bytes)
        return bytes(self._buffer[start : self.position])

    def u32(self) -> int:
        """The next unsigned 32-bit integer."""
        return int(_U32.unpack_from(self._buffer, self._advance(4))[0])

    def u64(self) -> int:
        """The next unsigned 64-bit integer."""
        return int(_U64.unpack_from(self._buffer, self._advance(8))[0])

    def count(self, limit: int, what: str) -> int:
        """The next unsigned 64-bit integer, which must not exceed `limit`."""
        count = self.u64()
        if count > limit:
            self.fail(f"{what} is {count}, more than the limit of {limit}")
        return count

    def string(self, limit: int, what: str) -> str:
        """The next string: a 64-bit length and UTF-8 bytes."""
        raw = self.take(self.count(limit, f"length of {what}"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            self.fail(f"{what} is not UTF-8")

    def value(self, key: str) -> object:
        """The next typed value of a key: a scalar, a string or a list of either."""
        kind = self.u32()
        if kind == _STRING:
            return self.string(STRING_BYTES_MAX, f"{key!r}")
        if kind == _ARRAY:
            return self._array(key)
        return self._scalars(key, kind, 1)[0]

    def _array(self, key: str) -> list[object]:
        kind = self.u32()
        count = self.count(ELEMENTS_MAX - self._num_elements, f"number of elements of {key!r}")
        self._num_elements += count
        if kind == _STRING:
            return self._strings(key, count)
        return list(self._scalars(key, kind, count))

    def _scalars(self, key: str, kind: int, count: int) -> tuple[object, ...]:
        if kind not in _SCALARS:
            self.fail(f"key {key!r} has value type {kind}")
        layout = struct.Struct(f"<{count}{_SCALARS[kind]}")
        return layout.unpack_from(self._buffer, self._advance(layout.size))

    def _strings(self, key: str, count: int) -> list[object]:
        # Vocabularies have some 10^5 of these, so bounds are checked in place: a call for each
        # length and each string would take a good part of a second.
        found: list[object] = []
        unpack = _U64.unpack_from
        position, end = self.position, len(self._buffer)
        try:
            for _ in range(count):
                start = position + 8
                if start <= end:
                    position = start + unpack(self._buffer, position)[0]
                if start > end or position > end or position - start > STRING_BYTES_MAX:
                    self.position = start - 8
                    found.append(self.string(STRING_BYTES_MAX, f"a string of {key!r}"))
                    position, end = self.position, len(self._buffer)
                    continue
                found.append(self._buffer[start:position].decode("utf-8"))
        except UnicodeDecodeError:
            self.fail(f"a string of {key!r} is not UTF-8")
        self.position = position
        return found

    def _advance(self, num_bytes: int) -> int:
        """Move past the next bytes, which are then in the buffer; returns where they begin."""
        start, end = self.position, self.position + num_bytes
        if end > min(self.file_bytes, HEADER_BYTES_MAX):
            limit = min(self.file_bytes, HEADER_BYTES_MAX)
            self.fail(f"the header goes on past byte {limit}, where it must have ended")
        if end > len(self._buffer):
            self._buffer += self._file.read(max(end - len(self._buffer), CHUNK_BYTES))
            if end > len(self._buffer):
                self.fail("the file shrank while it was read")
        self.position = end
        return start
