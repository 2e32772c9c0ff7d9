"""GGUF headers (versions 2 and 3), read and checked in plain Python before anything maps the file.

Layout, from the GGUF specification in the ggml repository, all little-endian: magic, version,
tensor count, key/value count, the key/values, the tensor infos, padding to `alignment`, data.
"""

import math
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass

from edgekv.errors import CheckpointCorrupt, UnsupportedModel
from edgekv.models.gguf_reader import HeaderReader

MAGIC = b"GGUF"
VERSIONS = (2, 3)
TENSORS_MAX = 1 << 16
KEYS_MAX = 1 << 16
NAME_BYTES_MAX = 1 << 10
NDIM_MAX = 4
DIM_MAX = (1 << 31) - 1
ALIGNMENT_DEFAULT = 32
ALIGNMENT_MAX = 1 << 20


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
    """The place of a tensor, and how it is stored.

    Attributes:
        type: Storage type.
        shape: Logical shape, slowest axis first: (out, in). The file has it the other way round.
        start: First byte, counted from the file's start.
        end: One past the last byte.
    """

    type: GgmlType
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class GgufHeader:
    """All of a GGUF file but the tensors' bytes.

    Attributes:
        metadata: Key/values as plain Python values; arrays are lists.
        tensors: By name, in the file's order.
        alignment: Of every tensor's start, in bytes.
        data_offset: Where the tensors' bytes begin.
    """

    metadata: dict[str, object]
    tensors: dict[str, GgufTensorInfo]
    alignment: int
    data_offset: int


def read_header(path: pathlib.Path) -> GgufHeader:
    """Read and check a GGUF file's header.

    Raises:
        CheckpointCorrupt: Truncated or malformed; names the file and the key or tensor.
        UnsupportedModel: Big-endian, version 1, split over files, or a storage type not known.
    """
    try:
        with path.open("rb") as file:
            return _parse(HeaderReader(path, file))
    except OSError as error:
        raise CheckpointCorrupt(f"{path} cannot be read: {error.strerror or error}") from error


def _parse(reader: HeaderReader) -> GgufHeader:
    _check_version(reader)
    num_tensors = reader.count(TENSORS_MAX, "number of tensors")
    num_keys = reader.count(KEYS_MAX, "number of keys")
    metadata: dict[str, object] = {}
    for _ in range(num_keys):
        key = reader.string(NAME_BYTES_MAX, "a key")
        if key in metadata:
            reader.fail(f"key {key!r} occurs twice")
        metadata[key] = reader.value(key)
    _check_split(reader.path, metadata)
    alignment = _alignment(reader, metadata)
    raw = [_raw_info(reader) for _ in range(num_tensors)]
    data_offset = -(-reader.position // alignment) * alignment
    tensors: dict[str, GgufTensorInfo] = {}
    for info in raw:
        if info.name in tensors:
            reader.fail(f"tensor {info.name!r} occurs twice")
        tensors[info.name] = _place(reader, info, alignment, data_offset)
    _check_overlap(reader, tensors)
    return GgufHeader(
        metadata=metadata, tensors=tensors, alignment=alignment, data_offset=data_offset
    )


def _check_version(reader: HeaderReader) -> None:
    if reader.take(4) != MAGIC:
        reader.fail("not a GGUF file: it does not begin with 'GGUF'")
    version = reader.u32()
    if version in VERSIONS:
        return
    swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
    what = "big-endian" if swapped in VERSIONS else f"version {version}"
    raise UnsupportedModel(
        f"{reader.path}: GGUF file is {what}", hint="supported: little-endian, version 2 and 3"
    )


def _check_split(path: pathlib.Path, metadata: Mapping[str, object]) -> None:
    parts = metadata.get("split.count", 0)
    if isinstance(parts, int) and parts > 1:
        raise UnsupportedModel(
            f"{path} is one of {parts} parts of a split GGUF file",
            hint="join the parts with `llama-gguf-split --merge`, or take a file in one part",
        )


def _alignment(reader: HeaderReader, metadata: Mapping[str, object]) -> int:
    value = metadata.get("general.alignment", ALIGNMENT_DEFAULT)
    if type(value) is not int or not 1 <= value <= ALIGNMENT_MAX or value & (value - 1):
        reader.fail("general.alignment is not a power of two")
    return value


@dataclass(frozen=True)
class _RawInfo:
    name: str
    dims: tuple[int, ...]  # fastest axis first, as the file has them
    type_number: int
    offset: int


def _raw_info(reader: HeaderReader) -> _RawInfo:
    name = reader.string(NAME_BYTES_MAX, "a tensor's name")
    ndim = reader.u32()
    if not 1 <= ndim <= NDIM_MAX:
        reader.fail(f"tensor {name!r} has {ndim} dimensions")
    dims = tuple(reader.u64() for _ in range(ndim))
    if not all(1 <= dim <= DIM_MAX for dim in dims):
        reader.fail(f"tensor {name!r} has a malformed shape")
    return _RawInfo(name, dims, reader.u32(), reader.u64())


def _place(
    reader: HeaderReader, info: _RawInfo, alignment: int, data_offset: int
) -> GgufTensorInfo:
    kind = GGML_TYPES.get(info.type_number)
    if kind is None:
        raise UnsupportedModel(
            f"{reader.path}: tensor {info.name!r} has ggml type {info.type_number}",
            hint="supported: " + ", ".join(known.name for known in GGML_TYPES.values()),
        )
    if info.dims[0] % kind.block_size:
        reader.fail(
            f"tensor {info.name!r}: rows of {info.dims[0]} are not whole {kind.name} blocks "
            f"of {kind.block_size}"
        )
    if info.offset % alignment:
        reader.fail(f"tensor {info.name!r} does not start at a multiple of {alignment} bytes")
    start = data_offset + info.offset
    end = start + math.prod(info.dims) // kind.block_size * kind.block_bytes
    if end > reader.file_bytes:
        reader.fail(f"tensor {info.name!r} ends at byte {end}, the file at {reader.file_bytes}")
    return GgufTensorInfo(type=kind, shape=info.dims[::-1], start=start, end=end)


def _check_overlap(reader: HeaderReader, tensors: Mapping[str, GgufTensorInfo]) -> None:
    end, last = 0, ""
    for name, info in sorted(tensors.items(), key=lambda item: item[1].start):
        if info.start < end:
            reader.fail(f"tensors {last!r} and {name!r} overlap")
        end, last = info.end, name
