r"""A record is a file: a header, then a session's KV for one contiguous range of tokens.

    offset  bytes  field
         0      8  magic, b"edgekvR\n"
         8      4  format version, 2
        12      4  header bytes, a multiple of 4096
        16     64  fingerprint of the model, ASCII, padded with zeros
        80      8  start: index of the first token whose KV this is
        88      8  end: index after the last one
        96      8  payload bytes, those of a state included
       104      8  xxh3_64 of the payload's KV
       112     16  xxh3_128 of the ids of all tokens [0, end), each as a little-endian u32
       128      4  number of layers
       132      4  bytes of a layer's entry, 48
       136  48 a layer: what it holds and where
             0     12  kind of state, ASCII, padded with zeros
            12     12  type of its numbers, ASCII, padded with zeros
            24      2  bytes of one number
            26      2  zeros
            28      4  number of KV heads; of kind "state", of its parts
            32      8  numbers of one head and token; of kind "state", of a part
            40      8  offset in the payload; its bytes end where the next layer's begin
         …      8  xxh3_64 of all before
         …      …  zeros, up to the header's length
         …      …  payload: layer by layer; of kind "kv" `[k|v][head][token][dim]`, raw values
         …      …  of a record that has one: the state behind token `end - 1`, of all entries of
                   kind "state", and 8 bytes more, its xxh3_64

Integers are little-endian, xxh3_64 among them; the xxh3_128 stands as its canonical (big-endian) 16
bytes. KV depends on all tokens before it, hence that hash is from token 0.

A state has a checksum of its own, because most readers want KV alone: of all records of a session
they need the state of the last one. The payload's length says whether there is one.

The header says what the payload is, whoever points at it: a reader that names what it expects (a
`Record`) cannot take torn, foreign or stale bytes for what it asked. Whole pages of header keep the
payload on a page of the file, which uncached I/O on macOS needs to be direct.

A file is nobody's until the index names it; nothing changes it after that. What a process that was
killed had not committed is removed when the store is opened.
"""

import contextlib
import struct
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import xxhash

from edgekv.errors import RecordCorrupt
from edgekv.store.disk_io import Buffer, Files, read_from, total_bytes, write_to
from edgekv.store.values import LayerState, RecordRef

MAGIC = b"edgekvR\n"
FORMAT_VERSION = 2
FINGERPRINT_BYTES = 64
PAGE_BYTES = 4096

_FIELDS = struct.Struct(f"<8sII{FINGERPRINT_BYTES}sQQQQ16sII")
_LAYER = struct.Struct("<12s12sHHIQQ")
_CHECKSUM = struct.Struct("<Q")
_PAYLOAD_XXH3 = slice(104, 112)
# Fields by their place in `_FIELDS`; what says most about a record that is another comes first.
_COMPARED = {
    1: "format version",
    3: "model fingerprint",
    4: "start",
    5: "end",
    8: "tokens' hash",
    9: "number of layers",
    10: "length of a layer's entry",
    6: "payload length",
    2: "header length",
}


@dataclass(eq=False, kw_only=True, slots=True)
class Record:
    """KV of tokens [start, end), once on disk: a row of the index, and what memory adds."""

    # Fields in the order of the table's columns.
    record_id: int
    start: int
    end: int
    payload_bytes: int  # bytes of KV, and of a state
    token_ids: "array[int]"  # of [start, end) alone, typecode "I"
    tokens_xxh3: bytes  # `hash_tokens` of all ids [0, end)
    # Not in the table.
    num_links: int = 0  # sessions that have it
    in_index: bool = False  # the index has its row
    state_bytes: int = 0  # of the payload, its checksum included; 0: there is no state

    @property
    def file_name(self) -> str:
        """What its file is called."""
        return f"{self.record_id:016x}.kv"

    def ref(self, use_end: int) -> RecordRef:
        """The record as a session sees it that uses its tokens [start, use_end)."""
        return RecordRef(
            record_id=self.record_id,
            start=self.start,
            end=self.end,
            use_end=use_end,
            payload_bytes=self.payload_bytes,
            state_bytes=self.state_bytes,
        )


@dataclass(frozen=True)
class RecordFormat:
    """What all records of a store have in common."""

    fingerprint: str  # the model's, at most 64 ASCII characters
    # What each layer holds of a token, in the order of the payload; none where a store is opened
    # without its model.
    layers: tuple[LayerState, ...]

    @cached_property
    def token_bytes(self) -> int:
        """KV of one token."""
        return sum(layer.range_bytes(1) for layer in self.layers)

    @cached_property
    def state_bytes(self) -> int:
        """A state of all layers, without its checksum."""
        return sum(layer.state_bytes for layer in self.layers)

    def state_bytes_of(self, num_tokens: int, payload_bytes: int) -> int:
        """What of a payload of so many tokens is a state, its checksum included."""
        return max(0, payload_bytes - num_tokens * self.token_bytes) if self.layers else 0

    @property
    def stored_state_bytes(self) -> int:
        """A state and its checksum, where layers have one."""
        return self.state_bytes + _CHECKSUM.size if self.state_bytes else 0

    @cached_property
    def header_bytes(self) -> int:
        """Length of a header: whole pages."""
        return taken_bytes(_FIELDS.size + len(self.layers) * _LAYER.size + _CHECKSUM.size)

    def file_bytes(self, record: Record) -> int:
        """Length of a record's file."""
        return self.header_bytes + record.payload_bytes

    def header(self, record: Record, payload_xxh3: int) -> bytes:
        """The header to write in front of a payload."""
        assert is_fingerprint(self.fingerprint)
        assert 0 <= record.start < record.end
        assert len(record.tokens_xxh3) == 16
        fields = _FIELDS.pack(
            MAGIC,
            FORMAT_VERSION,
            self.header_bytes,
            self.fingerprint.encode("ascii"),
            record.start,
            record.end,
            record.payload_bytes,
            payload_xxh3,
            record.tokens_xxh3,
            len(self.layers),
            _LAYER.size,
        )
        packed = fields + self._pack_layers(record.end - record.start, bool(record.state_bytes))
        checksum = _CHECKSUM.pack(xxhash.xxh3_64_intdigest(packed))
        return (packed + checksum).ljust(self.header_bytes, b"\0")

    def _pack_layers(self, num_tokens: int, has_state: bool) -> bytes:
        offset, packed = 0, b""
        for layer in self.layers:
            kind, dtype = layer.kind.encode("ascii"), layer.dtype.encode("ascii")
            packed += _LAYER.pack(
                kind, dtype, layer.dtype_bytes, 0, layer.num_heads, layer.head_dim, offset
            )
            offset += layer.range_bytes(num_tokens) + has_state * layer.state_bytes
        return packed


def is_fingerprint(text: str) -> bool:
    """Whether a header has room for it, and gives it back."""
    return 0 < len(text) <= FINGERPRINT_BYTES and text.isascii() and "\0" not in text


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


def hash_tokens(token_ids: "array[int]") -> bytes:
    """xxh3_128 of token ids, of typecode "I", as little-endian u32."""
    assert (token_ids.typecode, token_ids.itemsize) == ("I", 4)
    assert sys.byteorder == "little"  # as every machine is that MLX runs on
    return xxhash.xxh3_128_digest(token_ids)


def write_record(
    files: Files, path: Path, form: RecordFormat, record: Record, payload: Sequence[Buffer]
) -> int:
    """Write a new file, `payload` cut anywhere; return how many calls its bytes took.

    Raises:
        OSError: The system refuses; a part of the file may be left.
    """
    state_bytes = form.state_bytes if record.state_bytes else 0
    kv, state = _divided(payload, record.payload_bytes - record.state_bytes)
    assert total_bytes(state) == state_bytes
    checksum = [_CHECKSUM.pack(hash_payload(state))] if state_bytes else []
    header = form.header(record, hash_payload(kv))
    fd = files.open(path, create=True)
    try:
        num_calls = write_to(files, fd, [header, *payload, *checksum])
    except BaseException:
        with contextlib.suppress(OSError):  # the first error says more
            files.close(fd)
        raise
    files.close(fd)
    return num_calls


def read_record(
    files: Files, path: Path, form: RecordFormat, record: Record, into: Sequence[Buffer]
) -> int:
    """Fill buffers, in order, with a record's whole KV, verified; return the calls it took.

    Where they have room for a state too, with that. After an error what is in them is undefined.

    Raises:
        RecordCorrupt: It is not, bit by bit, that record; the error says what differs first.
        FileNotFoundError: There is no such file.
        OSError: The system refuses.
    """
    kv, state = _divided(into, record.payload_bytes - record.state_bytes)
    assert total_bytes(state) in {0, form.state_bytes if record.state_bytes else 0}
    header, checksum = bytearray(form.header_bytes), bytearray(_CHECKSUM.size if state else 0)
    fd = files.open(path, create=False)
    try:
        num_read, num_calls = read_from(files, fd, [header, *kv, *state, checksum])
    finally:
        files.close(fd)
    difference = find_difference(header, kv, num_read, form, record)
    if not difference and state and bytes(checksum) != _CHECKSUM.pack(hash_payload(state)):
        difference = "the state's checksum"
    if difference:
        raise RecordCorrupt(path, difference)
    return num_calls


def _divided(buffers: Sequence[Buffer], num_bytes: int) -> tuple[list[Buffer], list[Buffer]]:
    """Buffers up to `num_bytes`, and those behind."""
    first: list[Buffer] = []
    for i, buffer in enumerate(buffers):
        view = memoryview(buffer)
        if view.nbytes > num_bytes:
            parts = [view[num_bytes:], *buffers[i + 1 :]]
            return [*first, *([view[:num_bytes]] if num_bytes else [])], parts
        first.append(buffer)
        num_bytes -= view.nbytes
    assert not num_bytes
    return first, []


def find_difference(
    header: Buffer, payload: Sequence[Buffer], num_read: int, form: RecordFormat, record: Record
) -> str:
    """In what the first `num_read` bytes of a file are not this record; "" if they are."""
    payload_xxh3 = int.from_bytes(header[_PAYLOAD_XXH3], "little")
    # Nothing in the header is outside its own checksum or the reader's expectation.
    expected = form.header(record, payload_xxh3)
    if num_read < _FIELDS.size or bytes(header[: len(MAGIC)]) != MAGIC:
        return "the magic: no record begins here"
    if header != expected and (difference := _differing_field(header, expected)):
        return difference
    whole_bytes = form.file_bytes(record) - record.state_bytes  # whose checksum is its own
    if num_read < whole_bytes:
        return f"the length: {num_read} bytes, expected {whole_bytes}"
    if header != expected:
        return _differing_part(header, expected, len(form.layers))
    return "" if hash_payload(payload) == payload_xxh3 else "the payload's checksum"


def _differing_field(header: Buffer, expected: bytes) -> str:
    """The first field that is not the expected one, or an empty string."""
    found, wanted = _FIELDS.unpack_from(header), _FIELDS.unpack_from(expected)
    for index, name in _COMPARED.items():
        if found[index] != wanted[index]:
            return f"the {name}: {_shown(found[index])}, expected {_shown(wanted[index])}"
    return ""


def _shown(value: int | bytes) -> int | str:
    if isinstance(value, int):
        return value
    text = value.rstrip(b"\0")
    return text.decode("ascii") if text.isalnum() else value.hex()


def _differing_part(header: Buffer, expected: bytes, num_layers: int) -> str:
    """Which part behind the fields differs in a header whose fields are as expected."""
    end = _FIELDS.size
    for layer in range(num_layers):
        start, end = end, end + _LAYER.size
        if header[start:end] != expected[start:end]:
            return f"the description of layer {layer}"
    end += _CHECKSUM.size
    return "the header's padding" if header[:end] == expected[:end] else "the header's checksum"
