"""How text is cut into words, by each name that llama.cpp gives a way of cutting.

Checked by hand against the patterns in llama.cpp's llama-vocab.cpp and, where there is one, against
the model's own tokenizer.json. Ids of whole texts were compared with the vectors in llama.cpp's
models/ folder (command-r, deepseek-coder, deepseek-llm, falcon, gpt-2, llama-bpe, mpt, qwen2,
qwen35, refact, starcoder) and with the tokenizer.json files of DeepSeek V3, GPT-4o, gpt-oss,
Llama 3.1 and Qwen3; they are too large to be kept here.
"""

import pathlib

import pytest
from tokenizers import Regex, pre_tokenizers

from edgekv.errors import TokenizerError
from edgekv.tokenizer.pretokenizers import BPE_STYLES, bpe_style

PLAIN = "Hello 12345 it's'S x+y\n\n"
MIXED = "helloWORLDs naïve日本語ab/\n/x  `a $b 한국어\n"
# Names, and the words of both texts with a bar between them.
CASES = [
    (
        "default",
        "Hello| |123|45| it|'|s|'|S| x|+|y|\n\n",
        "helloWORLDs| naïve日本語ab|/|\n|/|x| | `|a| |$|b| 한국어|\n",
    ),
    (
        "falcon",
        "Hello| |123|45| it|'|s|'|S| x|+|y|\n\n",
        "helloWORLDs| naïve日本語ab|/|\n|/|x|  |`|a| |$|b| 한국어|\n",
    ),
    (
        "gpt-2 phi-2 jais exaone4 trillion granite-docling gigachat a.x-4.0 mellum "
        "modern-bert jina-es jina-de jina-v2-es jina-v2-de jina-v1-en jina-v2-code "
        "roberta-bpe mpt olmo",
        "Hello| 12345| it|'s|'|S| x|+|y|\n\n",
        "helloWORLDs| naïve日本語ab|/|\n|/|x| | `|a| $|b| 한국어|\n",
    ),
    (
        "smollm starcoder refact codeshell exaone minerva-7b mellum2 command-r",
        "Hello| |1|2|3|4|5| it|'s|'|S| x|+|y|\n\n",
        "helloWORLDs| naïve日本語ab|/|\n|/|x| | `|a| $|b| 한국어|\n",
    ),
    (
        "llama-bpe llama-v3 llama3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano "
        "smaug-bpe dbrx chatglm-bpe glm4 glm5 minicpm5 jais-2",
        "Hello| |123|45| it|'s|'S| x|+y|\n\n",
        "helloWORLDs| naïve日本語ab|/\n|/x| | `|a| $|b| 한국어|\n",
    ),
    (
        "qwen2 deepseek-r1-qwen megrez kormo f2llmv2 stablelm2 hunyuan solar-open grok-2 "
        "qwen35 ufakzeka bailingmoe bailingmoe2 llada-moe",
        "Hello| |1|2|3|4|5| it|'s|'S| x|+y|\n\n",
        "helloWORLDs| naïve日本語ab|/\n|/x| | `|a| $|b| 한국어|\n",
    ),
    (
        "laguna seed-coder",
        "Hello| |1|2|3|4|5| it|'s|'S| x|+y|\n\n",
        "helloWORLDs| naïve日本語ab|/|\n|/x| | `|a| $|b| 한국어|\n",
    ),
    (
        "exaone-moe",
        "Hello| |1|2|3|4|5| it|'s|'S| x|+y|\n\n",
        "helloWORLDs naïve日本語ab|/\n|/x| | `|a| $|b 한국어|\n",
    ),
    (
        "tekken",
        "Hello| |1|2|3|4|5| it|'s|'S| x|+y|\n\n",
        "hello|WORLDs| naïve日本語ab|/\n/|x| | `|a| $|b| 한국어|\n",
    ),
    (
        "gpt-4o llama4 kanana2 talkie minimax-m2",
        "Hello| |123|45| it's|'S| x|+y|\n\n",
        "hello|WORLDs| naïve日本語ab|/\n/|x| | `|a| $|b| 한국어|\n",
    ),
    (
        "tiny_aya cohere2moe",
        "Hello| |12|345| it's|'S| x|+y|\n\n",
        "hello|WORLDs| naïve日本語ab|/\n/|x| | `|a| $|b| 한국어|\n",
    ),
    (
        "youtu",
        "Hello| |1|2|3|4|5| it's|'S| x|+y|\n\n",
        "hello|WORLDs| naïve|日本語|ab|/\n/|x| | `|a| $|b| |한국어|\n",
    ),
    (
        "deepseek-v3 hunyuan-dense joyai-llm hy_v4",
        "Hello| |123|45| it|'s|'S| x|+y|\n\n",
        "helloWORLDs| naïve|日本語|ab|/\n|/x| | `|a| $|b| 한국어|\n",
    ),
    (
        "spark2_5",
        "Hello| |1|2|3|4|5| it|'s|'S| x|+y|\n|\n",
        "helloWORLDs| naïve|日本語|ab|/|\n|/x| | `|a| $|b| 한국어|\n",
    ),
    (
        "deepseek-llm",
        "Hello| |12345| it|'|s|'|S| x|+|y|\n|\n",
        "helloWORLDs| na|ï|ve|日本語|ab|/|\n|/|x| | `|a| $|b| |한국어|\n",
    ),
    (
        "deepseek-coder",
        "Hello| |1|2|3|4|5| it|'|s|'|S| x|+|y|\n|\n",
        "helloWORLDs| naïve|日本語|ab|/|\n|/|x|  `|a| $|b| |한국어|\n",
    ),
    (
        "bloom poro-chat gpt3-finnish",
        "Hello| 12345| it's'S| x+y|\n\n",
        "helloWORLDs| naïve日本語ab/|\n|/x| | `a| $b| 한국어|\n",
    ),
    (
        "viking",
        "Hello| |1|2|3|4|5| it's'S| x+y|\n\n",
        "helloWORLDs| naïve日本語ab/|\n|/x| | `a| $b| 한국어|\n",
    ),
    (
        "superbpe",
        "Hello |12|345| it's'S x+y\n\n",
        "helloWORLDs naïve日本語ab/\n/x  `a $b 한국어\n",
    ),
    (
        "chameleon",
        "Hello| |1|2|3|4|5| it|'|s|'|S| x|+|y|\n|\n",
        "helloWORLDs| naïve日本語ab|/|\n|/|x|  |`|a| |$|b| 한국어|\n",
    ),
]


def words(name, text):
    pieces = BPE_STYLES[name].pre_tokenizer().pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in pieces]


@pytest.mark.parametrize(("names", "plain", "mixed"), CASES)
def test_words(names, plain, mixed):
    for name in names.split():
        assert words(name, PLAIN) == plain.split("|")
        assert words(name, MIXED) == mixed.split("|")


def test_every_name_has_a_case():
    assert sorted(BPE_STYLES) == sorted(name for names, *_ in CASES for name in names.split())


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("tiny_aya", "1234567 a", ["1", "234", "567", " a"]),
        ("superbpe", "a 1234567", ["a ", "1", "234", "567"]),
        ("minicpm5", "1234 b", ["123", "4", " b"]),
        ("jais-2", "a" + 8 * " " + "b", ["a", 4 * " ", 2 * " ", " ", " b"]),
        ("llama-bpe", "a" + 8 * " " + "b", ["a", 7 * " ", " b"]),
        ("gpt-4o", "HTTPServer we'LL ÉCOLEs", ["HTTPServer", " we'LL", " ÉCOLEs"]),
        ("gpt-4o", "helloWorld", ["hello", "World"]),
        ("ufakzeka", "İstanbul'da", ["İstanbul", "'da"]),
        ("qwen2", "it'sa", ["it", "'s", "a"]),
        ("ufakzeka", "it'sa", ["it", "'sa"]),
        ("qwen35", "हिन्दी", ["हिन्दी"]),
        ("stablelm2", "हि", ["ह", "ि"]),
        ("exaone-moe", "한 국 어!", ["한 국 어", "!"]),
        ("youtu", "가나ab「漢字」", ["가나", "ab", "「", "漢字", "」"]),
        ("deepseek-v3", "$abc x", ["$abc", " x"]),
        ("deepseek-llm", "Ünï 12", ["Ü", "n", "ï", " ", "12"]),
        ("bloom", "(a,b)", ["(", "a", ",", "b", ")"]),
        ("chameleon", "IMGIMGABZ x", ["IMGIMGABZ", " x"]),
        ("smollm", "x٣٤", ["x", "٣", "٤"]),
    ],
)
def test_what_a_way_of_cutting_is_known_for(name, text, expected):
    assert words(name, text) == expected


O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK3 = (
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+"
    "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\r\n]*"
    "|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
)
# transformers' `PRETOKENIZE_REGEX` for Qwen 2 and 3, and for Qwen 3.5.
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# As the models' own tokenizer.json files hold them.
OWN = {
    "qwen2": [QWEN2],
    "qwen35": [QWEN35],
    "gpt-4o": [O200K],
    "deepseek-v3": [r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", DEEPSEEK3],
}


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize(
    "text",
    [
        *(PLAIN, MIXED, "", " ", "\r\n\r\n a\t\tb ", "It'S we'LL don\u2019t ÉCOLE éCOLE Ǆ ǅ ǆ"),
        *("٣٤٥ Ⅷ½ 1234567", "!?…—“q” <b>x</b> #$%^&*()", "e\u0301 हिन्दी", "日本カタカナ漢字123abc"),
    ],
)
def test_words_are_those_of_the_models_own_pattern(name, text):
    own = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in OWN[name]]
    )
    assert words(name, text) == [piece for piece, _ in own.pre_tokenize_str(text)]


def test_equal_styles_have_one_definition():
    assert BPE_STYLES["llama3"] is BPE_STYLES["llama-bpe"]
    assert BPE_STYLES["deepseek-r1-qwen"] is BPE_STYLES["qwen2"]


@pytest.mark.parametrize(
    "name",
    ["kimi-k2", "afmoe", "gemma4", "sarvam-moe", "whitespace", "granite-embed-multi-97m", ""],
)
def test_what_is_no_pattern_over_bytes_is_refused_by_name(name):
    with pytest.raises(TokenizerError, match=repr(name)) as caught:
        bpe_style(name, str(pathlib.Path("tiny.gguf")))
    assert "deepseek-llm, deepseek-r1-qwen" in caught.value.hint
