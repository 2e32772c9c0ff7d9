"""Gemma 4's tokenizer out of a GGUF file, against transformers' class for it."""

import pathlib

import pytest
import transformers

from edgekv.errors import TokenizerError
from edgekv.tokenizer import load_tokenizer_gguf

CONTROL, USER_DEFINED, NORMAL, BYTE = 3, 4, 1, 6
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>"]
VISIBLE = "<|tool_call>"
# Merges of whole texts: over spaces, runs of line ends and tabulators, and beside single letters.
MERGES = ["h e", "l l", "he ll", "hell o", "▁ w", "▁w o", "o ▁", "▁ ▁", "▁▁ ▁▁"]
MERGES += ["\n \n", "\n\n \n\n", "\t \t", "a \n"]
LETTERS = ["▁", "\n", *"abcdehlorw<0x1>", "é"]
TOKENS = list(
    dict.fromkeys(
        [*SPECIAL, *BYTES, VISIBLE, *LETTERS, *(merge.replace(" ", "") for merge in MERGES)]
    )
)
TEXTS = [
    "hello world",
    "  hello    world \n\n\n b",
    "\t\t\ta\n\tb",
    "a\nb\n\n\n\n\nc",
    "naïve é 日本 🙂",
    "<0x41> <0x09>",
    f"do {VISIBLE} do",
    "o w",
    "",
]


def metadata(**changes):
    kinds = dict.fromkeys(SPECIAL, CONTROL) | dict.fromkeys(BYTES, BYTE) | {VISIBLE: USER_DEFINED}
    fields = {
        "model": "gemma4",
        "tokens": TOKENS,
        "token_type": [kinds.get(token, NORMAL) for token in TOKENS],
        "scores": [-1000.0] * len(TOKENS),
        "merges": MERGES,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "add_space_prefix": False,
        "add_bos_token": True,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (fields | changes).items()}


@pytest.fixture(scope="module")
def loaded():
    return load_tokenizer_gguf(metadata(), pathlib.Path("tiny.gguf"))


@pytest.fixture(scope="module")
def original():
    # There the tabulator has its byte's token too.
    ids = {text: i for i, text in enumerate(TOKENS)} | {"\t": TOKENS.index("<0x09>")}
    merges = [tuple(merge.split(" ")) for merge in MERGES]
    tokenizer = transformers.GemmaTokenizer(vocab=ids, merges=merges)
    tokenizer.add_tokens([transformers.AddedToken(VISIBLE, normalized=False)])
    return tokenizer


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_transformers(text, loaded, original):
    ids = loaded.encode(text, add_special_tokens=False)
    assert ids == original.encode(text, add_special_tokens=False)
    assert loaded.decode(ids, skip_special_tokens=False) == text


def test_runs_are_one_token(loaded):
    """Also of what has a token for its byte only."""
    runs = [loaded.encode(text, add_special_tokens=False) for text in ("\n\n\n\n", "\t\t", "    ")]
    assert [len(ids) for ids in runs] == [1, 1, 1]
    assert loaded.encode("\t", add_special_tokens=False) == [TOKENS.index("<0x09>")]


def test_it_begins_with_bos_and_ends_with_a_turn(loaded):
    assert loaded.prefix_ids == (2,)
    assert TOKENS.index("<turn|>") in loaded.eos_ids
    turn = TOKENS.index("<|turn>")
    assert loaded.encode("<|turn>", add_special_tokens=False) == [turn]
    assert turn not in loaded.encode("<|turn>", add_special_tokens=False, parse_special=False)


def test_a_byte_without_a_token_is_named():
    tokens = [token if token != "<0xE2>" else "zzz" for token in TOKENS]
    with pytest.raises(TokenizerError, match=r"tokenizer\.ggml\.tokens lacks '<0xE2>'"):
        load_tokenizer_gguf(metadata(tokens=tokens), pathlib.Path("tiny.gguf"))
