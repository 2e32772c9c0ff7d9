"""The two libraries that cut text into tokens, behind one narrow interface."""

import contextlib
import copy
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from edgekv.errors import FETCH_AGAIN, TokenizerError
from edgekv.tokenizer.vocabulary import any_of

if TYPE_CHECKING:
    import sentencepiece
    import tokenizers

# Kinds of pieces; GGUF's `tokenizer.ggml.token_type` has the same numbers.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_BPE = 2
_VARINT, _BYTES, _FLOAT = 0, 2, 5  # how protobuf writes a field


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
                hint=f"the tokenizer is damaged, {FETCH_AGAIN}, or of an unsupported kind",
            ) from error
        raise


class HuggingFaceBackend:
    """A `tokenizers.Tokenizer`. Added tokens, control or not, are matched before anything else."""

    def __init__(self, tokenizer: "tokenizers.Tokenizer", *, origin: str) -> None:
        self._origin = origin
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder().values()
        special = [token for token in added if token.special]
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
    """A sentencepiece model, and tokens beside it that sentencepiece must not cut, by their text.

    Of these the `special` ones are matched only where the caller asks. Each stretch of text between
    them is encoded by itself and gets its own space prefix, as llama.cpp and the original Llama
    code do.
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


# Cuts text into token ids; adds nothing. Many threads may call it at once. Control tokens spelled
# out in the text become ids only if `parse_special`.
Backend = HuggingFaceBackend | SentencePieceBackend


def load_processor(proto: bytes, *, origin: str) -> "sentencepiece.SentencePieceProcessor":
    """A processor for a serialized ModelProto; TokenizerError where that is none."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    with library_errors(origin):
        processor.LoadFromSerializedProto(proto)
    return processor


def read_pieces(
    processor: "sentencepiece.SentencePieceProcessor", *, origin: str
) -> list[tuple[str, int]]:
    """Text and kind of each piece by id; user-defined ones are told as NORMAL."""
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


def sentencepiece_model(
    pieces: Sequence[str],
    scores: Sequence[float],
    kinds: Sequence[int],
    *,
    space_prefix: bool,
    squeeze_spaces: bool,
    charsmap: bytes,
) -> bytes:
    """The file that sentencepiece reads, for a BPE model: a ModelProto.

    Protobuf by hand, for the message has few fields that matter here, and protobuf itself is no
    dependency. Field numbers are those of sentencepiece_model.proto. `pieces` have U+2581 for a
    space, the pair with the highest score is merged first, and one of the `kinds` is UNKNOWN.
    `charsmap` are compiled normalisation rules; b"" leaves the text as it is.
    """
    message = bytearray()
    for piece, score, kind in zip(pieces, scores, kinds, strict=True):
        text = _field(1, piece.encode("utf-8", "replace"))
        weight = bytes([2 << 3 | _FLOAT]) + struct.pack("<f", score)
        message += _field(1, text + weight + _number(3, kind))
    message += _field(2, _number(3, _BPE) + _number(35, BYTE in kinds))
    normalizer = _field(1, b"identity") + _field(2, charsmap) + _number(3, space_prefix)
    return bytes(message + _field(3, normalizer + _number(4, squeeze_spaces) + _number(5, True)))


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
