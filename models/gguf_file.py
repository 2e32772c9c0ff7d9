"""GGUF headers (versions 2 and 3), read and checked in plain Python before anything maps the file.

Layout, from the GGUF specification in the ggml repository, all little-endian: magic, version,
tensor count, key/value count, the key/values, the tensor infos, padding to `alignment`, data. No
length that is read is believed unchecked.
"""

import math
import pathlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import BinaryIO, NoReturn

from edgekv.errors import CheckpointCorrupt, UnsupportedModel
from edgekv.models.folder_files import opened, stand_in

VERSIONS = (2, 3)
TENSORS_MAX = 1 << 16
KEYS_MAX = 1 << 16
NAME_BYTES_MAX = 1 << 10
NDIM_MAX = 4
DIM_MAX = (1 << 31) - 1
ALIGNMENT_MAX = 1 << 20
HEADER_BYTES_MAX = 256 << 20
STRING_BYTES_MAX = 16 << 20
ELEMENTS_MAX = 1 << 24  # of all arrays together; large vocabularies need about 2 million
CHUNK_BYTES = 1 << 20

# GGUF value types: number → `struct` code of a scalar. 8 is a string, 9 an array.
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING = 8
_ARRAY = 9
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


@dataclass(frozen=True)
class GgmlType:
    """A storage type of ggml: `block_size` weights take `block_bytes` bytes."""

    name: str
    block_size: int
    block_bytes: int


# Numbers and sizes as in ggml's `ggml_type`; a test compares them with the gguf package's table.
GGML_TYPES: Mapping[int, GgmlType] = {
    0: GgmlType("F32", 1, 4),
    1: GgmlType("F16", 1, 2),
    2: GgmlType("Q4_0", 32, 18),
    3: GgmlType("Q4_1", 32, 20),
    6: GgmlType("Q5_0", 32, 22),
    7: GgmlType("Q5_1", 32, 24),
    8: GgmlType("Q8_0", 32, 34),
    10: GgmlType("Q2_K", 256, 84),
    11: GgmlType("Q3_K", 256, 110),
    12: GgmlType("Q4_K", 256, 144),
    13: GgmlType("Q5_K", 256, 176),
    14: GgmlType("Q6_K", 256, 210),
    16: GgmlType("IQ2_XXS", 256, 66),
    17: GgmlType("IQ2_XS", 256, 74),
    18: GgmlType("IQ3_XXS", 256, 98),
    19: GgmlType("IQ1_S", 256, 50),
    20: GgmlType("IQ4_NL", 32, 18),
    21: GgmlType("IQ3_S", 256, 110),
    22: GgmlType("IQ2_S", 256, 82),
    23: GgmlType("IQ4_XS", 256, 136),
    29: GgmlType("IQ1_M", 256, 56),
    30: GgmlType("BF16", 1, 2),
    34: GgmlType("TQ1_0", 256, 54),
    35: GgmlType("TQ2_0", 256, 66),
    39: GgmlType("MXFP4", 32, 17),
}


@dataclass(frozen=True, kw_only=True)
class GgufTensorInfo:
    """The place of a tensor, `[start, end)` in bytes from the file's start, and how it is stored.

    `shape` is the logical one, slowest axis first: (out, in). The file has it the other way round.
    """

    type: GgmlType
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class GgufHeader:
    """All of a GGUF file but the tensors' bytes; arrays in the metadata are lists."""

    metadata: dict[str, object]
    tensors: dict[str, GgufTensorInfo]


def read_header(path: pathlib.Path) -> GgufHeader:
    """Read and check a GGUF file's header.

    Raises:
        CheckpointCorrupt: Truncated or malformed; names the file and the key or tensor.
        UnsupportedModel: Big-endian, version 1, split over files, or a storage type not known.
    """
    with opened(path) as file:
        return parse_header(path, file)


def parse_header(path: pathlib.PurePath, file: BinaryIO) -> GgufHeader:
    """`read_header` of an open file, of which no more is read; `path` is what errors call it."""
    return _parse(_Reader(path, file))


class _Reader:
    """Reads values forward, fetching the file in chunks as they are needed.

    Every method raises CheckpointCorrupt where the file ends too soon or a limit is exceeded.
    """

    def __init__(self, path: pathlib.PurePath, file: BinaryIO) -> None:
        self.path = path
        self.position = 0
        self.file_bytes = file.seek(0, 2)
        file.seek(0)
        self._file = file
        self._buffer = bytearray()
        self._num_elements = 0

    def fail(self, what: str) -> NoReturn:
        raise CheckpointCorrupt(f"{self.path}: {what}")

    def take(self, num_bytes: int) -> bytes:
        start = self._advance(num_bytes)
        return bytes(self._buffer[start : self.position])

    def peek(self) -> bytes:
        """What is in the buffer already; no more is read."""
        return bytes(self._buffer[self.position :])

    def u32(self) -> int:
        return int(_U32.unpack_from(self._buffer, self._advance(4))[0])

    def u64(self) -> int:
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
        if kind != _ARRAY:
            return self._scalars(key, kind, 1)[0]
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
        limit = min(self.file_bytes, HEADER_BYTES_MAX)
        if end > limit:
            self.fail(f"the header goes on past byte {limit}, where it must have ended")
        if end > len(self._buffer):
            self._buffer += self._file.read(max(end - len(self._buffer), CHUNK_BYTES))
            if end > len(self._buffer):
                self.fail("the file shrank while it was read")
        self.position = end
        return start


def _parse(reader: _Reader) -> GgufHeader:
    _check_version(reader)
    num_tensors = reader.count(TENSORS_MAX, "number of tensors")
    num_keys = reader.count(KEYS_MAX, "number of keys")
    metadata: dict[str, object] = {}
    for _ in range(num_keys):
        key = reader.string(NAME_BYTES_MAX, "a key")
        if key in metadata:
            reader.fail(f"key {key!r} occurs twice")
        metadata[key] = reader.value(key)
    parts = metadata.get("split.count", 0)
    if isinstance(parts, int) and parts > 1:
        raise UnsupportedModel(
            f"{reader.path} is one of {parts} parts of a split GGUF file",
            hint="join the parts with `llama-gguf-split --merge`, or take a file in one part",
        )
    alignment = metadata.get("general.alignment", 32)
    if (
        type(alignment) is not int
        or not 1 <= alignment <= ALIGNMENT_MAX
        or alignment.bit_count() > 1
    ):
        reader.fail("general.alignment is not a power of two")
    infos: dict[str, GgufTensorInfo] = {}
    for _ in range(num_tensors):
        name = reader.string(NAME_BYTES_MAX, "a tensor's name")
        if name in infos:
            reader.fail(f"tensor {name!r} occurs twice")
        infos[name] = _tensor_info(reader, name, alignment)
    data_start = -(-reader.position // alignment) * alignment
    return GgufHeader(metadata=metadata, tensors=_in_file(reader, infos, data_start))


def _check_version(reader: _Reader) -> None:
    if (magic := reader.take(4)) != b"GGUF":
        what = stand_in(magic + reader.peek()) or "not a GGUF file: it does not begin with 'GGUF'"
        reader.fail(what)
    version = reader.u32()
    if version in VERSIONS:
        return
    swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
    what = "big-endian" if swapped in VERSIONS else f"version {version}"
    raise UnsupportedModel(
        f"{reader.path}: GGUF file is {what}", hint="supported: little-endian, version 2 and 3"
    )


def _tensor_info(reader: _Reader, name: str, alignment: int) -> GgufTensorInfo:
    """The next tensor info; `start` and `end` count from where data begin, which follows them."""
    ndim = reader.u32()
    if not 1 <= ndim <= NDIM_MAX:
        reader.fail(f"tensor {name!r} has {ndim} dimensions")
    dims = tuple(reader.u64() for _ in range(ndim))  # fastest axis first
    if not all(1 <= dim <= DIM_MAX for dim in dims):
        reader.fail(f"tensor {name!r} has a malformed shape")
    number, start = reader.u32(), reader.u64()
    kind = GGML_TYPES.get(number)
    if kind is None:
        raise UnsupportedModel(
            f"{reader.path}: tensor {name!r} has ggml type {_name_of_type(number)}",
            hint="supported: " + ", ".join(known.name for known in GGML_TYPES.values()),
        )
    if dims[0] % kind.block_size:
        reader.fail(
            f"tensor {name!r}: rows of {dims[0]} are not whole {kind.name} blocks "
            f"of {kind.block_size}"
        )
    if start % alignment:
        reader.fail(f"tensor {name!r} does not start at a multiple of {alignment} bytes")
    end = start + math.prod(dims) // kind.block_size * kind.block_bytes
    return GgufTensorInfo(type=kind, shape=dims[::-1], start=start, end=end)


def _name_of_type(number: int) -> str:
    """A type that is not in the table, by name where the gguf package knows one."""
    from gguf.constants import GGMLQuantizationType

    names = {kind.value: kind.name for kind in GGMLQuantizationType}
    return f"{number} ({names[number]})" if number in names else str(number)


def _in_file(
    reader: _Reader, infos: Mapping[str, GgufTensorInfo], data_start: int
) -> dict[str, GgufTensorInfo]:
    """Tensors with their places in the file, where none may overlap another or the file's end."""
    placed: dict[str, GgufTensorInfo] = {}
    last, last_end = "", 0
    for name, info in sorted(infos.items(), key=lambda item: item[1].start):
        start, end = data_start + info.start, data_start + info.end
        if end > reader.file_bytes:
            reader.fail(f"tensor {name!r} ends at byte {end}, the file at {reader.file_bytes}")
        if start < last_end:
            reader.fail(f"tensors {last!r} and {name!r} overlap")
        placed[name] = replace(info, start=start, end=end)
        last, last_end = name, end
    return placed
