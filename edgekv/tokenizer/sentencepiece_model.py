"""Builds and reads sentencepiece models.

GGUF stores a sentencepiece model's pieces but not the file that sentencepiece reads. Its format is
one protobuf message with few fields that matter here, so it is written by hand: protobuf itself is
no dependency. Field numbers are those of sentencepiece_model.proto.
"""

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgekv.tokenizer.backends import library_errors

if TYPE_CHECKING:
    import sentencepiece

# Kinds of pieces; GGUF's `tokenizer.ggml.token_type` has the same numbers.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_BPE = 2
_VARINT, _BYTES, _FLOAT = 0, 2, 5


@dataclass(frozen=True, kw_only=True)
class PieceTable:
    """A sentencepiece BPE model as plain values; all sequences are indexed by id.

    Attributes:
        pieces: Text, with U+2581 for a space.
        scores: The pair with the highest score is merged first.
        kinds: NORMAL, UNKNOWN (exactly one), CONTROL, USER_DEFINED, UNUSED or BYTE.
        space_prefix: Put one space before the text.
        squeeze_spaces: Strip the text and make runs of spaces one.
        charsmap: Compiled normalisation rules; b"" leaves the text as it is.
    """

    pieces: Sequence[str]
    scores: Sequence[float]
    kinds: Sequence[int]
    space_prefix: bool
    squeeze_spaces: bool = False
    charsmap: bytes = b""

    def serialize(self) -> bytes:
        """The ModelProto message."""
        return b"".join((*self._pieces(), self._trainer_spec(), self._normalizer_spec()))

    def _pieces(self) -> Iterable[bytes]:
        for piece, score, kind in zip(self.pieces, self.scores, self.kinds, strict=True):
            text = _field(1, piece.encode("utf-8", "replace"))
            weight = bytes([2 << 3 | _FLOAT]) + struct.pack("<f", score)
            yield _field(1, text + weight + _number(3, kind))

    def _trainer_spec(self) -> bytes:
        byte_fallback = BYTE in self.kinds
        return _field(2, _number(3, _BPE) + _number(35, byte_fallback))

    def _normalizer_spec(self) -> bytes:
        spec = _field(1, b"identity") + _field(2, self.charsmap)
        spec += _number(3, self.space_prefix) + _number(4, self.squeeze_spaces)
        return _field(3, spec + _number(5, True))


def load_processor(proto: bytes, *, origin: str) -> "sentencepiece.SentencePieceProcessor":
    """A processor for a serialized ModelProto.

    Raises:
        TokenizerError: `proto` is none, or is inconsistent.
    """
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    with library_errors(origin):
        processor.LoadFromSerializedProto(proto)
    return processor


def read_pieces(
    processor: "sentencepiece.SentencePieceProcessor", *, origin: str
) -> list[tuple[str, int]]:
    """Text and kind of each piece by id; user-defined ones are told as NORMAL.

    Raises:
        TokenizerError: A text is not UTF-8.
    """
    kinds = (
        (CONTROL, processor.IsControl),
        (UNKNOWN, processor.IsUnknown),
        (UNUSED, processor.IsUnused),
        (BYTE, processor.IsByte),
    )
    with library_errors(origin):
        return [
            (processor.IdToPiece(i), next((kind for kind, is_kind in kinds if is_kind(i)), NORMAL))
            for i in range(processor.GetPieceSize())
        ]


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3 | _VARINT) + _varint(value)


def _field(number: int, payload: bytes) -> bytes:
    return _varint(number << 3 | _BYTES) + _varint(len(payload)) + payload
