"""The two libraries that cut text into tokens, behind one narrow interface.

GGUF stores a sentencepiece model's pieces but not the file that sentencepiece reads. That format is
one protobuf message with few fields that matter here, so `PieceTable` writes it by hand: protobuf
itself is no dependency. Field numbers are those of sentencepiece_model.proto.
"""

import contextlib
import copy
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from edgekv.errors import TokenizerError
from edgekv.tokenizer.vocabulary import any_of

if TYPE_CHECKING:
    import sentencepiece
    import tokenizers

# Kinds of pieces; GGUF's `tokenizer.ggml.token_type` has the same numbers.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_BPE = 2
_VARINT, _BYTES, _FLOAT = 0, 2, 5


@contextlib.contextmanager
def library_errors(origin: str) -> Iterator[None]:
    """Turn what `tokenizers` and `sentencepiece` raise into TokenizerError naming `origin`.

    Both are native code: `tokenizers` raises bare Exception, and where it panics a PanicException
    that derives from BaseException and cannot be imported; `sentencepiece` raises RuntimeError.
    So only the two libraries' own calls may stand inside.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            why = " ".join(str(error).split())[:300]
            raise TokenizerError(
                f"{origin}: {why}",
                hint="the tokenizer is damaged or of an unsupported kind; download it again",
            ) from error
        raise


class HuggingFaceBackend:
    """A `tokenizers.Tokenizer`. Added tokens, control or not, are matched before anything else."""

    def __init__(self, tokenizer: "tokenizers.Tokenizer", *, origin: str) -> None:
        self._origin = origin
        self._tokenizer = tokenizer
        special = [token for token in _added_tokens(tokenizer) if token.special]
        self._special = any_of([token.content for token in special])
        # A normalised token also matches spellings that the regex above does not know.
        self._normalised = any(token.normalized for token in special)

    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        """Ids of `text`, nothing added."""
        tokenizer = self._tokenizer
        if not parse_special and (self._normalised or self._special.search(text)):
            tokenizer = self._plain
        with library_errors(self._origin):
            ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    @cached_property
    def _plain(self) -> "tokenizers.Tokenizer":
        # A second copy, because the switch belongs to the tokenizer and not to the call. Text that
        # spells a control token is rare, so few processes ever pay for it.
        plain = copy.deepcopy(self._tokenizer)
        plain.encode_special_tokens = True
        return plain


class SentencePieceBackend:
    """A sentencepiece model, and tokens beside it that sentencepiece must not cut.

    Each stretch of text between such tokens is encoded by itself and gets its own space prefix, as
    llama.cpp and the original Llama code do.

    Args:
        processor: The model.
        special: Control tokens' ids by text; matched only where the caller asks.
        literal: Ids of other added tokens by text; always matched.
        origin: The file, for messages.
    """

    def __init__(
        self,
        processor: "sentencepiece.SentencePieceProcessor",
        *,
        special: Mapping[str, int],
        literal: Mapping[str, int],
        origin: str,
    ) -> None:
        self._encode: Callable[[str], list[int]] = processor.encode
        self._origin = origin
        self._ids = {**special, **literal}
        self._literal = any_of(literal)
        self._added = any_of(self._ids)

    def encode(self, text: str, *, parse_special: bool) -> list[int]:
        """Ids of `text`, nothing added."""
        # A capturing split alternates: text, token, text, ..., text.
        parts = (self._added if parse_special else self._literal).split(text)
        with library_errors(self._origin):
            stretches = [self._encode(stretch) for stretch in parts[::2]]
        ids = stretches[0]
        for token, stretch in zip(parts[1::2], stretches[1:], strict=True):
            ids.append(self._ids[token])
            ids.extend(stretch)
        return ids


def _added_tokens(tokenizer: "tokenizers.Tokenizer") -> list["tokenizers.AddedToken"]:
    return list(tokenizer.get_added_tokens_decoder().values())


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
