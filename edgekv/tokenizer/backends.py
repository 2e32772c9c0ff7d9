"""The two libraries that cut text into tokens, behind one narrow interface."""

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING

from edgekv.errors import TokenizerError
from edgekv.tokenizer.untrusted import any_of

if TYPE_CHECKING:
    import sentencepiece
    import tokenizers


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
        self._lock = threading.Lock()
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

    @property
    def _plain(self) -> "tokenizers.Tokenizer":
        with self._lock:
            return self._without_special

    @cached_property
    def _without_special(self) -> "tokenizers.Tokenizer":
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
