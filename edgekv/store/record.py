r"""A record is a file: a header, then a session's KV for one contiguous range of tokens.

    offset  bytes  field
         0      8  magic, b"edgekvR\n"
         8      4  format version, 2
        12      4  header bytes, a multiple of 4096
        16     64  fingerprint of the model, ASCII, padded with zeros
        80      8  start: index of the first token whose KV this is
        88      8  end: index after the last one
        96      8  payload bytes
       104      8  xxh3_64 of the payload
       112     16  xxh3_128 of the ids of all tokens [0, end), each as a little-endian u32
       128      4  number of layers
       132      4  bytes of a layer's entry, 48
       136  48 a layer: what it holds and where
             0     12  kind of state, ASCII, padded with zeros
            12     12  type of its numbers, ASCII, padded with zeros
            24      2  bytes of one number
            26      2  zeros
            28      4  number of KV heads
            32      8  numbers of one head and token
            40      8  offset in the payload; its bytes end where the next layer's begin
         …      8  xxh3_64 of all before
         …      …  zeros, up to the header's length
         …      …  payload: layer by layer; of kind "kv" `[k|v][head][token][dim]`, raw values

Integers are little-endian, xxh3_64 among them; the xxh3_128 stands as its canonical (big-endian) 16
bytes. KV depends on all tokens before it, hence that hash is from token 0.

The header says what the payload is, whoever points at it: a reader that names what it expects
(`RecordKey`) cannot take torn, foreign or stale bytes for what it asked. Whole pages of header keep
the payload on a page of the file, which uncached I/O on macOS needs to be direct.

A file is written under a temporary name and renamed when it is whole; nothing ever changes it.
"""

import contextlib
import struct
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from edgekv.errors import RecordCorrupt
from edgekv.store.files import Buffer, Files, read_from, total_bytes, write_to
from edgekv.store.values import LayerState

MAGIC = b"edgekvR\n"
FORMAT_VERSION = 2
FINGERPRINT_BYTES = 64
PAGE_BYTES = 4096
WHOLE, TEMPORARY = ".kv", ".tmp"

_FIELDS = struct.Struct(f"<8sII{FINGERPRINT_BYTES}sQQQQ16sII")
_LAYER = struct.Struct("<12s12sHHIQQ")
_CHECKSUM = struct.Struct("<Q")


@dataclass(frozen=True, kw_only=True)
class RecordKey:
    """What a record holds: known to whoever writes it, and to whoever wants it back.

    Attributes:
        fingerprint: The model's, at most 64 ASCII characters.
        start: First token.
        end: After the last token.
        tokens_xxh3: `hash_tokens` of all token ids [0, end).
        layers: What each layer holds of these tokens, in the order of the payload.
    """

    fingerprint: str
    start: int
    end: int
    tokens_xxh3: bytes
    layers: tuple[LayerState, ...]

    def __post_init__(self) -> None:
        assert is_fingerprint(self.fingerprint)
        assert 0 <= self.start < self.end
        assert len(self.tokens_xxh3) == 16
        assert self.layers

    @property
    def payload_bytes(self) -> int:
        """Length of the payload."""
        return sum(layer.range_bytes(self.end - self.start) for layer in self.layers)


def is_fingerprint(text: str) -> bool:
    """Whether a header has room for it, and gives it back."""
    return 0 < len(text) <= FINGERPRINT_BYTES and text.isascii() and "\0" not in text


def header_bytes(num_layers: int) -> int:
    """Length of the header of so many layers: whole pages."""
    needed = _FIELDS.size + num_layers * _LAYER.size + _CHECKSUM.size
    return -(-needed // PAGE_BYTES) * PAGE_BYTES


def file_bytes(key: RecordKey) -> int:
    """Length of a record's file."""
    return header_bytes(len(key.layers)) + key.payload_bytes


def taken_bytes(num_bytes: int) -> int:
    """What a file of this length takes on a volume: whole pages."""
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES


def hash_payload(payload: Sequence[Buffer]) -> int:
    """xxh3_64 of the buffers one after the other, without a copy.

    The GIL is released while a large buffer (from 100 KB) is hashed.
    """
    state = xxhash.xxh3_64()
    for buffer in payload:
        state.update(buffer)
    return state.intdigest()


def hash_tokens(token_ids: Sequence[int]) -> bytes:
    """xxh3_128 of token ids as little-endian u32; an `array("I")` is hashed where it is."""
    if not isinstance(token_ids, array) or token_ids.typecode != "I":
        token_ids = array("I", token_ids)
    assert token_ids.itemsize == 4
    assert sys.byteorder == "little"  # as every machine is that MLX runs on
    return xxhash.xxh3_128_digest(token_ids)


def write_record(files: Files, path: Path, key: RecordKey, payload: Sequence[Buffer]) -> int:
    """Write a record's file; return how many calls its bytes took.

    Args:
        files: System calls.
        path: Its final name, which no file has.
        key: What it is.
        payload: `key.payload_bytes` bytes, cut anywhere; not changed meanwhile.

    Raises:
        OSError: The system refuses; a file may be left under either name.
    """
    assert total_bytes(payload) == key.payload_bytes
    header = pack(key, hash_payload(payload))
    temporary = path.with_suffix(TEMPORARY)
    fd = files.open(temporary, create=True)
    try:
        num_calls = write_to(files, fd, [header, *payload])
    except BaseException:
        with contextlib.suppress(OSError):  # the first error says more
            files.close(fd)
        raise
    files.close(fd)
    files.rename(temporary, path)
    return num_calls


def read_record(files: Files, path: Path, key: RecordKey, into: Sequence[Buffer]) -> int:
    """Fill buffers, in order, with a record's whole payload, verified; return the calls it took.

    Args:
        files: System calls.
        path: The file.
        key: What it should be.
        into: Writable, `key.payload_bytes` together; undefined after an error.

    Raises:
        RecordCorrupt: It is not, bit by bit, what `key` names; the error says what differs first.
        FileNotFoundError: There is no such file.
        OSError: The system refuses.
    """
    assert total_bytes(into) == key.payload_bytes
    header = bytearray(header_bytes(len(key.layers)))
    fd = files.open(path, create=False)
    try:
        num_read, num_calls = read_from(files, fd, [header, *into])
    finally:
        files.close(fd)
    if difference := find_difference(header, into, num_read, key):
        raise RecordCorrupt(path, difference)
    return num_calls


def find_difference(
    header: Buffer, payload: Sequence[Buffer], num_read: int, key: RecordKey
) -> str:
    """In what the first `num_read` bytes of a file are not the record of `key`; "" if they are."""
    fields = bytes(header[: _FIELDS.size]) if num_read >= _FIELDS.size else b""
    if difference := _malformed(fields) or _differing_field(fields, key):
        return difference
    if num_read < file_bytes(key):
        return f"the length: {num_read} bytes, expected {file_bytes(key)}"
    (*_, payload_xxh3, _, _, _) = _FIELDS.unpack(fields)
    # Nothing in the header is outside its own checksum or the reader's expectation.
    expected = pack(key, payload_xxh3)
    if bytes(header) != expected:
        return _differing_part(bytes(header), expected, len(key.layers))
    return "" if hash_payload(payload) == payload_xxh3 else "the payload's checksum"


def pack(key: RecordKey, payload_xxh3: int) -> bytes:
    """The header to write in front of a payload."""
    size = header_bytes(len(key.layers))
    fields = _FIELDS.pack(
        MAGIC,
        FORMAT_VERSION,
        size,
        key.fingerprint.encode("ascii"),
        key.start,
        key.end,
        key.payload_bytes,
        payload_xxh3,
        key.tokens_xxh3,
        len(key.layers),
        _LAYER.size,
    )
    packed = fields + _pack_layers(key)
    return (packed + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(packed))).ljust(size, b"\0")


def _pack_layers(key: RecordKey) -> bytes:
    offset, entries = 0, []
    for layer in key.layers:
        entries.append(
            _LAYER.pack(
                layer.kind.encode("ascii"),
                layer.dtype.encode("ascii"),
                layer.dtype_bytes,
                0,
                layer.num_heads,
                layer.head_dim,
                offset,
            )
        )
        offset += layer.range_bytes(key.end - key.start)
    return b"".join(entries)


def _malformed(fields: bytes) -> str:
    """Why these are no fields that this version can read; an empty string if they are."""
    if not fields.startswith(MAGIC):
        return "the magic: no record begins here"
    version = int.from_bytes(fields[8:12], "little")
    if version != FORMAT_VERSION:
        return f"the format version: {version}, this edgekv reads {FORMAT_VERSION}"
    return ""


def _differing_field(fields: bytes, key: RecordKey) -> str:
    """The first field that is not the expected one, or an empty string."""
    expected = _FIELDS.unpack_from(pack(key, 0))
    names = {
        3: "model fingerprint",
        4: "start",
        5: "end",
        8: "tokens' hash",
        9: "number of layers",
        10: "length of a layer's entry",
        6: "payload length",
        2: "header length",
    }
    found = _FIELDS.unpack(fields)
    for index, name in names.items():
        if found[index] != expected[index]:
            return f"the {name}: {_shown(found[index])}, expected {_shown(expected[index])}"
    return ""


def _shown(value: object) -> object:
    if not isinstance(value, bytes):
        return value
    text = value.rstrip(b"\0")
    return text.decode("ascii") if text.isalnum() else value.hex()


def _differing_part(header: bytes, expected: bytes, num_layers: int) -> str:
    """Which part behind the fields differs in a header whose fields are as expected."""
    for layer in range(num_layers):
        at = _FIELDS.size + layer * _LAYER.size
        if header[at : at + _LAYER.size] != expected[at : at + _LAYER.size]:
            return f"the description of layer {layer}"
    end = _FIELDS.size + num_layers * _LAYER.size + _CHECKSUM.size
    return "the header's padding" if header[:end] == expected[:end] else "the header's checksum"
