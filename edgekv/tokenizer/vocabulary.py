"""What each token id stands for, as bytes."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Scheme = Literal["byte_level", "sentencepiece"]

# A larger id is a damaged file; the largest vocabularies in use have about 262k tokens.
VOCAB_SIZE_MAX = 1 << 22


@dataclass(frozen=True, kw_only=True, eq=False)
class Vocabulary:
    """Token texts as a model stores them, and the bytes they stand for.

    "byte_level" (GPT-2) writes each byte as one printable character; "sentencepiece" writes a space
    as U+2581 and a lone byte as `<0x0A>`.
    """

    tokens: Sequence[str | None]  # by id; None where there is no token, or one marked as unused
    scheme: Scheme
    hidden_ids: frozenset[int] = frozenset()  # control, unknown: no bytes of an answer
    literal_ids: frozenset[int] = frozenset()  # added by hand: their text stands as it is
    leading_space: bool = False  # encoding put one before the text, so decoding takes one away

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of one token; b"" for hidden tokens and for ids that have no token.

        A model's embedding is often padded to more rows than it has tokens, so a sampled id
        without a token is no error.
        """
        if token_id in self.hidden_ids:
            return b""
        return self.spelled_bytes(token_id)

    def spelled_bytes(self, token_id: int) -> bytes:
        """Like `token_bytes`, but a hidden token is spelled out: b"<|im_end|>"."""
        token = self.tokens[token_id] if 0 <= token_id < len(self.tokens) else None
        if token is None:
            return b""
        if self.scheme == "sentencepiece":
            return _sentencepiece_bytes(token)
        if token_id in self.literal_ids or token_id in self.hidden_ids:
            return token.encode("utf-8", "replace")
        return _byte_level_bytes(token)

    @cached_property
    def hidden_tokens(self) -> dict[str, int]:
        """Ids of hidden tokens by their text."""
        return {token: i for i in sorted(self.hidden_ids) if (token := self.tokens[i])}


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches the longest of `texts` as one group, or nothing at all if there are none."""
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})" if longest_first else r"(?!)")


# What spells each byte, turned around: code point → chr(byte). Bytes that are printable in Latin-1
# spell themselves; the other 68 take the code points from 256 on, in order (Radford et al.,
# "Language Models are Unsupervised Multitask Learners", 2019).
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTE_OF_CHARACTER = dict(
    zip([*_PRINTABLE, *range(256, 324)], map(chr, _PRINTABLE + _OTHERS), strict=True)
)

_BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")


def _byte_level_bytes(token: str) -> bytes:
    if any(ord(character) not in _BYTE_OF_CHARACTER for character in token):
        return token.encode("utf-8", "replace")
    return token.translate(_BYTE_OF_CHARACTER).encode("latin-1")


def _sentencepiece_bytes(token: str) -> bytes:
    if byte := _BYTE_TOKEN.fullmatch(token):
        return bytes.fromhex(byte[1])
    return token.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode("utf-8", "replace")
