r"""How byte-level BPE cuts text into words before it merges, by the name that GGUF gives it.

The names and patterns are those of llama.cpp (`llm_tokenizer_bpe` and `llama_vocab::impl::load` in
its llama-vocab.cpp, read in November 2026). The reference is each model's own tokenizer.json, which
llama.cpp quotes where it had to rewrite a pattern for its own regex engine, which knows neither
`(?i:` nor `\p{Lu}`: then it is the quoted one that stands here. What tokenizer.json normalises is
known of a few only (NFC; transformers' classes for Qwen, Cohere and GPT-NeoX); llama.cpp itself
never does.

A name that is not here is refused, for another way of cutting gives other ids and worse answers
without a word. llama.cpp knows some more: those whose words are no byte-level BPE ("gemma4", which
is a model of its own in `gguf.py`, "sarvam-moe", "whitespace", "granite-embed-multi-311m"), those
that it cuts by code of its own ("kimi-k2", "afmoe"), and one of which it has an approximation only
("granite-embed-multi-97m").
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgekv.errors import TokenizerError

if TYPE_CHECKING:
    from tokenizers.pre_tokenizers import PreTokenizer

# GPT-2's.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# GPT-4's, in parts.
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # it's, we'll
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
# GPT-4o's: words end where capitals begin.
_LOWER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_SIGNS_4O = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
# DeepSeek's: letters and signs by their Unicode classes, Chinese and Japanese by themselves.
_CJK = "[一-龥\u3040-ゟ゠-ヿ]+"
_ASCII_SIGN_WORD = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
_LETTERS_V3 = r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
_SIGNS_V3 = r" ?[\p{P}\p{S}]+"
_ALPHABETS = (  # the letters that have cases
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅ"
    "Ὀ-Ὅὐ-ὗὙὛὝὟ-\u1f7dᾀ-ᾴᾶ-ᾼ\u1fbeῂ-ῄῆ-ῌῐ-\u1fd3ῖ-\u1fdbῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\u2126ℨ\u212a-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄ"
    "Ⰰ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_EAST_ASIAN = "[一-龥\u0800-一가-\ud7ff]+"
# BLOOM's: all but spaces and some marks of sentences.
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"


def _words(*alternatives: str) -> str:
    return "|".join(alternatives)


def _gpt4(digits: str) -> str:
    return _words(_SHORT, _LETTERS, digits, _SIGNS, _SPACES)


def _gpt4o(short: str, digits: str) -> str:
    return _words(_LOWER + short, _UPPER + short, digits, _SIGNS_4O, _SPACES)


def _deepseek3(signs_end: str) -> str:
    return _words(_ASCII_SIGN_WORD, _LETTERS_V3, _SIGNS_V3 + signs_end, r"\s+(?!\S)", r"\s+")


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


def _style(*patterns: str) -> BpeStyle:
    return BpeStyle(patterns=patterns)


_PLAIN = _style(_GPT2)
_DIGITS = BpeStyle(patterns=(_GPT2,), single_digits=True)
_THREE_DIGITS = _style(_gpt4(r"\p{N}{1,3}"))
_LLAMA3 = replace(_THREE_DIGITS, ignore_merges=True, adds_bos=True)
_ONE_DIGIT = _style(_gpt4(r"\p{N}"))
_QWEN2 = replace(_ONE_DIGIT, nfc=True)
_TEKKEN = _gpt4o("", r"\p{N}")
_GPT4O = _gpt4o(f"{_SHORT}?", r"\p{N}{1,3}")
_DEEPSEEK3 = _style(r"\p{N}{1,3}", _CJK, _deepseek3(r"[\r\n]*|\s*[\r\n]+"))

_NAMES: tuple[tuple[BpeStyle, str], ...] = (
    (_style(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"), "default"),
    (_style(r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]"), "falcon"),
    (_PLAIN, "gpt-2 phi-2 jais exaone4 trillion granite-docling gigachat a.x-4.0 mellum"),
    (_PLAIN, "modern-bert jina-es jina-de jina-v2-es jina-v2-de jina-v1-en jina-v2-code"),
    (_PLAIN, "roberta-bpe"),
    (replace(_PLAIN, nfc=True), "mpt olmo"),
    (_DIGITS, "smollm starcoder refact codeshell exaone minerva-7b mellum2"),
    (replace(_DIGITS, nfc=True), "command-r"),
    (_LLAMA3, "llama-bpe llama-v3 llama3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano"),
    (_THREE_DIGITS, "smaug-bpe dbrx chatglm-bpe"),
    (replace(_THREE_DIGITS, ignore_merges=True), "glm4 glm5"),
    (
        replace(_style(r"\p{N}{1,3}", _gpt4(r"\p{N}+")), ignore_merges=True),
        "minicpm5",
    ),
    (
        _style(
            _words(_SHORT, _LETTERS, r"\p{N}{1,3}", _SIGNS, r"\s*[\r\n]+")
            + "".join(rf"|\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4))
            + r"|\s{1,2}(?!\S)|\s{1}"
        ),
        "jais-2",
    ),
    (_QWEN2, "qwen2 deepseek-r1-qwen megrez kormo f2llmv2"),
    (_ONE_DIGIT, "stablelm2 hunyuan solar-open grok-2"),
    (
        BpeStyle(
            patterns=(
                _words(
                    _SHORT,
                    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
                    r"\p{N}",
                    r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
                    _SPACES,
                ),
            ),
            nfc=True,
        ),
        "qwen35",
    ),
    (_style(_words(_LETTERS, r"\p{N}", _SIGNS, _SPACES)), "ufakzeka"),
    (_style(r"[^\n]+|[\n]+", _gpt4(r"\p{N}")), "laguna"),
    (
        _style(
            _words(
                r"'(?i:[sdmt]|ll|ve|re)",
                r"[^\r\n\p{L}\p{N}]?+\p{L}+",
                r"\p{N}",
                r" ?[^\s\p{L}\p{N}]++[\r\n]*",
                r"\s*[\r\n]|\s+(?!\S)|\s+",
            )
        ),
        "bailingmoe bailingmoe2 llada-moe",
    ),
    (
        _style(_words(_SHORT, _LETTERS, r"\p{N}{1}", r" ?[^\s\p{L}\p{N}\r\n]+", _SPACES)),
        "seed-coder",
    ),
    (
        _style(
            _words(
                _SHORT,
                r"[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+",
                r"\p{N}",
                r" ?[^\s\p{L}\p{N}]+[\r\n/]?",
                r"\s*[\r\n]|\s+(?!\S)|\s+",
            )
        ),
        "exaone-moe",
    ),
    (BpeStyle(patterns=(_TEKKEN,), ignore_merges=True, adds_bos=True), "tekken"),
    (_style(_GPT4O), "gpt-4o llama4 kanana2 talkie minimax-m2"),
    (_style(r"\d{1,3}(?=(?:\d{3})*\b)", _GPT4O), "tiny_aya cohere2moe"),
    (
        replace(
            _style(
                "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|" + _CJK,
                _gpt4o(f"{_SHORT}?", r"\p{N}"),
            ),
            ignore_merges=True,
        ),
        "youtu",
    ),
    (_DEEPSEEK3, "deepseek-v3 hunyuan-dense joyai-llm hy_v4"),
    (_style(r"\p{N}{1,3}", _CJK, _deepseek3(r"|[\r\n]"), r"\p{N}"), "spark2_5"),
    (
        _style(
            r"[\r\n]",
            rf"\s?[{_ALPHABETS}]+",
            r"\s?[!-/:-~！-／：-～‘-‟\u3000-。]+",
            r"\s+$",
            _EAST_ASIAN,
            r"\p{N}+",
        ),
        "deepseek-llm",
    ),
    (_style(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _EAST_ASIAN, r"\p{N}"), "deepseek-coder"),
    (_style(_BLOOM), "bloom poro-chat gpt3-finnish"),
    (_style(_BLOOM, r"\p{N}"), "viking"),
    (_style(r"\p{N}+", r"(?=(\d{3})+(?!\d))"), "superbpe"),
    (
        replace(
            _style(
                "<sentinel:[0-9]+>",
                "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
                r"([\t\n]|    |  )",
                r"\p{N}",
                r"[\p{P}!-/:-@\[-`{-~]",
                _GPT2,
            ),
            adds_bos=True,
        ),
        "chameleon",
    ),
)
BPE_STYLES = {name: style for style, names in _NAMES for name in names.split()}


def bpe_style(name: str, origin: str) -> BpeStyle:
    """The style that GGUF calls `name`; TokenizerError naming `origin` where it is not known."""
    if name not in BPE_STYLES:
        raise TokenizerError(
            f"{origin}: unknown pre-tokenizer {name!r} (tokenizer.ggml.pre)",
            hint=f"supported: {', '.join(sorted(BPE_STYLES))}",
        )
    return BPE_STYLES[name]
