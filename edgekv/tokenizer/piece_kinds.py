"""Kinds of pieces in a sentencepiece model, changed in the file itself.

sentencepiece cuts user-defined pieces out of any text, and has no switch for it. So one that ends a
turn must be a control piece, as llama.cpp makes it, or any text could forge it. Gemma's
tokenizer.model has such pieces. A ModelProto is read by hand, for protobuf itself is no dependency;
field numbers are those of sentencepiece_model.proto.
"""

from collections.abc import Collection, Iterator

from edgekv.tokenizer.backends import CONTROL, USER_DEFINED

_PIECES, _TEXT, _KIND = 1, 1, 3


def as_control(proto: bytes, texts: Collection[str]) -> bytes:
    """The ModelProto, which sentencepiece can read, with control pieces for these texts."""
    changed = bytearray(proto)
    wanted = {text.encode() for text in texts}
    for number, start, end in _fields(proto, 0, len(proto)):
        if number != _PIECES:
            continue
        piece = {inner: (at, until) for inner, at, until in _fields(proto, start, end)}
        text, kind = piece.get(_TEXT, (0, 0)), piece.get(_KIND, (0, 0))
        if proto[slice(*text)] in wanted and proto[slice(*kind)] == bytes([USER_DEFINED]):
            changed[kind[0]] = CONTROL
    return bytes(changed)


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number of each field of a message, and where its value begins and ends."""
    while at < end:
        key, at = _varint(data, at)
        start, until = at, at
        match key & 7:  # how protobuf writes the field
            case 0:
                _, until = _varint(data, at)
            case 1:
                until += 8
            case 2:
                size, start = _varint(data, at)
                until = start + size
            case 5:
                until += 4
            case kind:
                raise AssertionError(f"sentencepiece has read a field of kind {kind}")
        yield key >> 3, start, until
        at = until


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
