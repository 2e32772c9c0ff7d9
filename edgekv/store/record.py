r"""The bytes of a record: a header of 4096 bytes, then a session's KV for one range of tokens.

    offset  bytes  field
         0      8  magic, b"edgekvR\n"
         8      4  format version, 1
        12      4  header bytes, 4096
        16     64  fingerprint of the model, ASCII, padded with zeros
        80      8  start: index of the first token whose KV this is
        88      8  end: index after the last one
        96      8  payload bytes
       104      8  xxh3_64 of the payload
       112     16  xxh3_128 of the ids of all tokens [0, end), each as a little-endian u32
       128      8  xxh3_64 of the 128 bytes before
       136   3960  zeros
      4096      …  payload: `[layer][k|v][head][token][dim]`, raw values of the KV dtype

Integers are little-endian, xxh3_64 among them; the xxh3_128 stands as its canonical (big-endian) 16
bytes. KV depends on all tokens before it, hence that hash is from token 0.

The header says what the payload is, whoever points at it: a reader that names what it expects
(`RecordKey`) cannot take torn, foreign or stale bytes for what it asked. 4096 bytes keep the
payload on a page of the file, which uncached I/O on macOS needs to be direct.
"""

import struct
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from edgekv.errors import RecordCorrupt
from edgekv.store.files import Buffer

MAGIC = b"edgekvR\n"
FORMAT_VERSION = 1
HEADER_BYTES = 4096
FINGERPRINT_BYTES = 64

_FIELDS = struct.Struct(f"<8sII{FINGERPRINT_BYTES}sQQQQ16s")
_CHECKSUM = struct.Struct("<Q")
_ZEROS = bytes(HEADER_BYTES - _FIELDS.size - _CHECKSUM.size)


@dataclass(frozen=True, kw_only=True)
class RecordKey:
    """What a record holds: known to whoever writes it, and to whoever wants it back.

    Attributes:
        fingerprint: The model's, at most 64 ASCII characters.
        start: First token.
        end: After the last token.
        payload_bytes: Length of the payload.
        tokens_xxh3: `hash_tokens` of all token ids [0, end).
    """

    fingerprint: str
    start: int
    end: int
    payload_bytes: int
    tokens_xxh3: bytes

    def __post_init__(self) -> None:
        assert 0 < len(self.fingerprint) <= FINGERPRINT_BYTES
        assert self.fingerprint.isascii()
        assert "\0" not in self.fingerprint
        assert 0 <= self.start < self.end
        assert self.payload_bytes > 0
        assert len(self.tokens_xxh3) == 16


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


def pack(key: RecordKey, payload: Sequence[Buffer]) -> bytes:
    """The header to write in front of a payload: 4096 bytes."""
    assert sum(memoryview(buffer).nbytes for buffer in payload) == key.payload_bytes
    return _pack(key, hash_payload(payload))


def _pack(key: RecordKey, payload_xxh3: int) -> bytes:
    fields = _FIELDS.pack(
        MAGIC,
        FORMAT_VERSION,
        HEADER_BYTES,
        key.fingerprint.encode("ascii"),
        key.start,
        key.end,
        key.payload_bytes,
        payload_xxh3,
        key.tokens_xxh3,
    )
    return fields + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(fields)) + _ZEROS


def verify(
    header: Buffer, payload: Sequence[Buffer], key: RecordKey, *, path: Path, offset: int
) -> None:
    """Check that what was read is, bit by bit, the record that `key` names.

    Args:
        header: The 4096 bytes in front of the payload.
        payload: The whole payload, in order, cut anywhere.
        key: What the reader expects.
        path: The file it came from, for the error.
        offset: Where in that file the header begins, for the error.

    Raises:
        RecordCorrupt: It is not; the error names what differs first.
    """
    assert sum(memoryview(buffer).nbytes for buffer in payload) == key.payload_bytes
    fields = bytes(memoryview(header)[: _FIELDS.size])
    if difference := _malformed(fields, header) or _differing_field(fields, key):
        raise RecordCorrupt(path, offset, difference)
    payload_xxh3: int = _FIELDS.unpack(fields)[7]
    if hash_payload(payload) != payload_xxh3:
        raise RecordCorrupt(path, offset, "the payload's checksum")
    # Nothing in the header is outside its own checksum or the reader's expectation.
    if bytes(header) != _pack(key, payload_xxh3):
        raise RecordCorrupt(path, offset, "the header's padding")


def _malformed(fields: bytes, header: Buffer) -> str:
    """Why this is no header that this version can read; an empty string if it is one."""
    if len(header) != HEADER_BYTES or not fields.startswith(MAGIC):
        return "the magic: no record begins here"
    (checksum,) = _CHECKSUM.unpack_from(header, _FIELDS.size)
    version = int.from_bytes(fields[8:12], "little")
    if version > FORMAT_VERSION:
        return f"the format version: {version}, this edgekv reads {FORMAT_VERSION}"
    if xxhash.xxh3_64_intdigest(fields) != checksum:
        return "the header's checksum"
    return ""


def _differing_field(fields: bytes, key: RecordKey) -> str:
    """The first field in which a well-formed header is not the expected one, or an empty string."""
    _, version, header_bytes, fingerprint, start, end, payload_bytes, _, tokens = _FIELDS.unpack(
        fields
    )
    pairs: tuple[tuple[str, object, object], ...] = (
        ("format version", version, FORMAT_VERSION),
        ("header length", header_bytes, HEADER_BYTES),
        ("model fingerprint", fingerprint.rstrip(b"\0"), key.fingerprint.encode("ascii")),
        ("token range", (start, end), (key.start, key.end)),
        ("payload length", payload_bytes, key.payload_bytes),
        ("tokens' hash", tokens.hex(), key.tokens_xxh3.hex()),
    )
    for name, found, expected in pairs:
        if found != expected:
            return f"the {name}: {found!r}, expected {expected!r}"
    return ""
