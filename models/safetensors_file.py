"""Safetensors headers, read and checked in plain Python before any other loader sees the file.

Layout, from the safetensors format description: 8 bytes little-endian header length, a JSON object
`{name: {"dtype", "shape", "data_offsets": [start, end)}}`, then the tensors' bytes.

By hand, for the errors of the `safetensors` library (0.8) cannot be told apart: of 15 kinds of a
damaged tensor it names the tensor in three, in one of them the wrong one, it has one message for
overlap, gap and the file's end, and it takes a name that occurs twice. Where one tensor has a dtype
that it does not know, it reads none of the file; here the others can be read.
"""

import json
import math
import pathlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO, NoReturn, TypeGuard

from edgekv.errors import CheckpointCorrupt
from edgekv.models.folder_files import opened, stand_in

HEADER_BYTES_MAX = 100_000_000
DIM_MAX = (1 << 31) - 1
NDIM_MAX = 8
_START_BYTES = 64
_DTYPE_CHARS_MAX = 32

# The dtypes that MLX loads, by the bytes of an element.
_DTYPES = {
    1: ("BOOL", "U8", "I8"),
    2: ("U16", "I16", "F16", "BF16"),
    4: ("U32", "I32", "F32"),
    8: ("U64", "I64"),
}
DTYPE_BYTES = {dtype: size for size, dtypes in _DTYPES.items() for dtype in dtypes}
FLOAT_DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True, kw_only=True)
class SafetensorInfo:
    """One tensor of a header; `start` and `end` count from the file's first byte."""

    dtype: str  # perhaps one that MLX does not load: not in `DTYPE_BYTES`
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: pathlib.Path) -> dict[str, SafetensorInfo]:
    """The tensors of a safetensors file, checked against each other and the file's size.

    Raises:
        CheckpointCorrupt: Truncated or malformed; the message names the file and the tensor.
    """
    with opened(path) as file:
        return parse_header(path, file)


def parse_header(path: pathlib.PurePath, file: BinaryIO) -> dict[str, SafetensorInfo]:
    """`read_header` of an open file, of which no more is read; `path` is what errors call it."""
    raw, file_bytes = _read_json_bytes(path, file)
    header = _parse(path, raw)
    notes = header.pop("__metadata__", None)
    if notes is None:  # MLX writes null where it is given none
        notes = {}
    if not isinstance(notes, dict) or not all(isinstance(note, str) for note in notes.values()):
        _fail(path, "__metadata__ is not an object of strings")
    tensors = {
        name: _check_tensor(path, name, fields, 8 + len(raw), file_bytes)
        for name, fields in header.items()
    }
    _check_overlap(path, tensors)
    return tensors


def _fail(path: pathlib.PurePath, what: str) -> NoReturn:
    raise CheckpointCorrupt(f"{path}: {what}")


def _read_json_bytes(path: pathlib.PurePath, file: BinaryIO) -> tuple[bytes, int]:
    file_bytes = file.seek(0, 2)
    file.seek(0)
    prefix = file.read(8)
    if len(prefix) < 8:
        _fail(path, f"{file_bytes} bytes are too few for a safetensors file")
    if (instead := stand_in(prefix + file.read(_START_BYTES))) is not None:
        raise CheckpointCorrupt(f"{path} is {instead}")
    file.seek(len(prefix))
    (length,) = struct.unpack("<Q", prefix)
    if length > HEADER_BYTES_MAX:
        _fail(path, f"header of {length} bytes exceeds the limit of {HEADER_BYTES_MAX}")
    if 8 + length > file_bytes:
        _fail(path, f"header of {length} bytes exceeds the file's {file_bytes}")
    raw = file.read(length)
    if len(raw) < length:
        _fail(path, "the file shrank while it was read")
    return raw, file_bytes


def _parse(path: pathlib.PurePath, raw: bytes) -> dict[str, object]:
    try:
        # Python's json would guess UTF-16 and take NaN and duplicate names; MLX takes none of them.
        header = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        _fail(path, f"header is not valid JSON ({' '.join(str(error).split())[:120]})")
    if not isinstance(header, dict):
        _fail(path, "header is not a JSON object")
    return header


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    for name in found:
        name.encode("utf-8")  # a lone surrogate is a ValueError
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


def _check_tensor(
    path: pathlib.PurePath, name: str, fields: object, data_start: int, file_bytes: int
) -> SafetensorInfo:
    if not isinstance(fields, dict):
        _fail(path, f"tensor {name!r} is not described by a JSON object")
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or len(dtype) > _DTYPE_CHARS_MAX:
        _fail(path, f"tensor {name!r} has no dtype")
    if not _are_counts(shape) or len(shape) > NDIM_MAX or any(dim > DIM_MAX for dim in shape):
        _fail(path, f"tensor {name!r} has a malformed shape")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _fail(path, f"tensor {name!r} has malformed data_offsets")
    start, end = data_start + offsets[0], data_start + offsets[1]
    # How long others are nobody knows here, and nobody reads them.
    num_bytes = math.prod(shape) * DTYPE_BYTES[dtype] if dtype in DTYPE_BYTES else end - start
    if end - start != num_bytes:
        _fail(
            path,
            f"tensor {name!r} of shape {tuple(shape)} and dtype {dtype} needs {num_bytes} bytes, "
            f"its data_offsets span {end - start}",
        )
    if end > file_bytes:
        _fail(path, f"tensor {name!r} ends at byte {end}, the file at {file_bytes}")
    return SafetensorInfo(dtype=dtype, shape=tuple(shape), start=start, end=end)


def _are_counts(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_overlap(path: pathlib.PurePath, tensors: Mapping[str, SafetensorInfo]) -> None:
    end, last = 0, ""
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start < end and info.end > info.start:
            _fail(path, f"tensors {last!r} and {name!r} overlap")
        if info.end > end:
            end, last = info.end, name
