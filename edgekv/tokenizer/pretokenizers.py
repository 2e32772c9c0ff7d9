"""How byte-level BPE cuts text into words before it merges, by the name that GGUF gives it.

The reference is each model's own tokenizer.json, not llama.cpp, which rewrites some of these
patterns for its own regex engine. "default" has no such reference; it is llama.cpp's.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgekv.errors import TokenizerError

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# GPT-4's pattern; {digits} is how many digits make one word.
_GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, kw_only=True)
class BpeStyle:
    """What a byte-level BPE model does besides merging."""

    patterns: tuple[str, ...]  # applied in turn; each cuts the pieces that the one before left
    single_digits: bool = False  # first cut off each digit, in any script
    nfc: bool = False  # normalise to NFC first
    ignore_merges: bool = False  # a whole word that is a token is that token, whatever they say
    adds_bos: bool = False  # begin with BOS unless the file says otherwise

    def pre_tokenizer(self) -> "PreTokenizer":
        """The cutting and the spelling of bytes, as one step."""
        from tokenizers import Regex, pre_tokenizers

        steps: list[PreTokenizer] = []
        if self.single_digits:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        steps.extend(
            pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in self.patterns
        )
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        return pre_tokenizers.Sequence(steps)


_LLAMA3 = BpeStyle(patterns=(_GPT4.replace("DIGITS", "{1,3}"),), ignore_merges=True, adds_bos=True)
_QWEN2 = BpeStyle(patterns=(_GPT4.replace("DIGITS", ""),), nfc=True)

BPE_STYLES = {
    "default": BpeStyle(patterns=(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": BpeStyle(patterns=(_GPT2,)),
    "smollm": BpeStyle(patterns=(_GPT2,), single_digits=True),
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "smaug-bpe": BpeStyle(patterns=_LLAMA3.patterns),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": BpeStyle(patterns=(_TEKKEN,), ignore_merges=True, adds_bos=True),
}


def bpe_style(name: str, origin: str) -> BpeStyle:
    """The style that GGUF calls `name`; TokenizerError naming `origin` where it is not known."""
    if name not in BPE_STYLES:
        raise TokenizerError(
            f"{origin}: unknown pre-tokenizer {name!r} (tokenizer.ggml.pre)",
            hint=f"supported: {', '.join(sorted(BPE_STYLES))}",
        )
    return BPE_STYLES[name]
