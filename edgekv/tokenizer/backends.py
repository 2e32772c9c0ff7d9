"""The two libraries that cut text into tokens, behind one narrow interface."""

import contextlib
import json
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from edgekv.errors import FETCH_AGAIN, TokenizerError
from edgekv.tokenizer.vocabulary import any_of

if TYPE_CHECKING:
    import sentencepiece
    import tokenizers

# Kinds of pieces; GGUF's `tokenizer.ggml.token_type` has the same numbers.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# A token's id, and of which characters it was made: [start, end).
Cut = tuple[int, int, int]
# Where a piece of text is: some tokenizers put a space before a text, and some of them also before
# what stands behind an added token; none does so in the middle of such a stretch.
Place = Literal["start", "stretch", "middle"]

_BPE = 2
_VARINT, _BYTES, _FLOAT = 0, 2, 5  # how protobuf writes a field
_BATCH_CHARS_MIN = 1 << 14  # some 20 ms


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
        tokens = tokenizer.get_added_tokens_decoder()
        self.added: Mapping[int, str] = {i: token.content for i, token in tokens.items()}
        # These also match spellings that are not theirs.
        self.normalised_ids = frozenset(i for i, token in tokens.items() if token.normalized)
        self.anchors = any_of(
            t.content for t in tokens.values() if not (t.normalized or t.single_word)
        )

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, nothing added."""
        with library_errors(self._origin):
            ids: list[int] = self._encoding(text).ids
        return ids

    def cut(self, text: str) -> list[Cut]:
        """`encode`, and where each token is."""
        with library_errors(self._origin):
            encoding = self._encoding(text)
            return [(i, *place) for i, place in zip(encoding.ids, encoding.offsets, strict=True)]

    def _encoding(self, text: str) -> "tokenizers.Encoding":
        """A text of megabytes takes seconds, in which only a batch lets other threads run."""
        if len(text) < _BATCH_CHARS_MIN:
            return self._tokenizer.encode(text, add_special_tokens=False)
        return self._tokenizer.encode_batch([text], add_special_tokens=False)[0]

    def to_json(self) -> str:
        """As `tokenizer.json` has it."""
        written: str = self._tokenizer.to_str()
        return written

    def plain(self, texts: Collection[str], place: Place) -> "HuggingFaceBackend":
        """A twin for pieces of a text, to which none of `texts` are tokens."""
        import tokenizers

        spec = json.loads(self.to_json())
        for token in spec["added_tokens"]:
            token["special"] = token["content"] in texts
        for step in ("normalizer", "pre_tokenizer"):
            spec[step] = _prefix_as_in(spec[step], place)
        with library_errors(self._origin):
            twin = tokenizers.Tokenizer.from_str(json.dumps(spec))
        twin.encode_special_tokens = True
        return HuggingFaceBackend(twin, origin=self._origin)


def _prefix_as_in(step: Any, place: Place) -> Any:
    """Steps of a `tokenizers` pipeline that put before a text what belongs before that place."""
    if isinstance(step, list):
        return [_prefix_as_in(each, place) for each in step]
    if not isinstance(step, dict):
        return step
    step = {key: _prefix_as_in(value, place) for key, value in step.items()}
    kind = step.get("type")
    if kind == "Metaspace" and place != "start":
        if place == "middle" or step["prepend_scheme"] == "first":
            step["prepend_scheme"] = "never"
    elif kind == "ByteLevel" and place == "middle":
        step["add_prefix_space"] = False
    elif kind == "Prepend" and place == "middle":
        step["prepend"] = ""
    return step


class SentencePieceBackend:
    """A sentencepiece model, and tokens beside it that sentencepiece must not cut, by their text.

    Each stretch of text between them is encoded by itself. The first one is at `first`, and the
    others at `later`: by default each gets its own space prefix, as llama.cpp and the original
    Llama code do.
    """

    def __init__(
        self,
        processor: "sentencepiece.SentencePieceProcessor",
        *,
        added: Mapping[str, int],
        origin: str,
        first: Place = "start",
        later: Place = "start",
    ) -> None:
        self._processor = processor
        self._origin = origin
        self._places = first, later
        self._ids = added
        self.added: Mapping[int, str] = {token_id: text for text, token_id in added.items()}
        self.normalised_ids: frozenset[int] = frozenset()
        self.anchors = any_of(added)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, nothing added."""
        return [token_id for token_id, _, _ in self.cut(text)]

    def cut(self, text: str) -> list[Cut]:
        """`encode`, and where each token is: somewhere in its stretch.

        More need not be known: neither the best of all ways to cut a text nor merging by scores
        treats what is behind a place where it cuts otherwise than if that stood alone.
        """
        cuts: list[Cut] = []
        start = 0
        place, later = self._places
        # A capturing split alternates: text, token, text, ..., text.
        for index, part in enumerate(self.anchors.split(text)):
            end = start + len(part)
            if index % 2:
                cuts.append((self._ids[part], start, end))
            else:
                processor = self._processor if place == "start" else self._without_prefix
                with library_errors(self._origin):
                    ids: list[int] = processor.encode(part)
                cuts += [(token_id, start, end) for token_id in ids]
                place = later
            start = end
        return cuts

    def plain(self, texts: Collection[str], place: Place) -> "SentencePieceBackend":
        """A twin for pieces of a text, to which none of `texts` are tokens."""
        first, later = self._places
        if place == "stretch":
            first = later
        elif place == "middle":
            first = later = place
        added = {text: token_id for text, token_id in self._ids.items() if text not in texts}
        return SentencePieceBackend(
            self._processor, added=added, origin=self._origin, first=first, later=later
        )

    @cached_property
    def _without_prefix(self) -> "sentencepiece.SentencePieceProcessor":
        # Of a message that occurs twice protobuf takes the last word on each field.
        proto = self._processor.serialized_model_proto() + _normalizer(False, False)
        return load_processor(proto, origin=self._origin)


# Cuts text into tokens, among them the `added` ones, which are matched before anything else; where
# one of `anchors` is matched the text may be cut without changing any id. Adds nothing.
# Many threads may call it at once.
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
    rules = _field(1, b"identity") + _field(2, charsmap) + _number(5, True)
    return bytes(message + _field(3, rules) + _normalizer(space_prefix, squeeze_spaces))


def _normalizer(space_prefix: bool, squeeze_spaces: bool) -> bytes:
    """These two of a ModelProto's fields, and no others."""
    return _field(3, _number(3, space_prefix) + _number(4, squeeze_spaces))


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
