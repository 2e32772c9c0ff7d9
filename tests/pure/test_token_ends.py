"""What ends a turn is found by its text, whatever type a file gives it, as llama.cpp does."""

import json
import pathlib

import pytest
import tokenizers
from tiny_sentencepiece import train_model
from tokenizers import decoders, models, pre_tokenizers

from edgekv.tokenizer import load_tokenizer_folder, load_tokenizer_gguf
from edgekv.tokenizer.ends import TURN_ENDS, ends_by_text

SOURCE = pathlib.Path("tiny.gguf")
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
# Of llama.cpp's list, those that models of the supported families have.
KNOWN = [
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<EOT>"),
    *("<|endoftext|>", "<|end_of_text|>", "<｜end▁of▁sentence｜>"),
]


def bpe(*special, kind):
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*ALPHABET, *special],
        "tokenizer.ggml.token_type": [*[NORMAL] * len(ALPHABET), *[kind] * len(special)],
        "tokenizer.ggml.merges": [],
    }


def pieces(*special, kind):
    texts = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], "a", *special]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, 1, *[kind] * len(special)],
        "tokenizer.ggml.scores": [0.0] * len(texts),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def folder_with(path, tokens, *, added):
    """A folder whose tokenizer.json has `tokens` as words of the model, or as added plain ones."""
    vocab = {text: token_id for token_id, text in enumerate([*ALPHABET, *tokens])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if added:
        tokenizer.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in tokens])
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def ends(tokenizer):
    return {tokenizer.vocabulary.tokens[token_id] for token_id in tokenizer.eos_ids}


def assert_ends_a_turn(tokenizer, text):
    """One id that ends, is not shown, and that no text of a user's becomes."""
    assert text in ends(tokenizer)
    (token_id,) = tokenizer.encode(text, add_special_tokens=False)
    assert token_id in tokenizer.eos_ids
    assert tokenizer.decode([token_id]) == ""
    assert token_id not in tokenizer.encode(f"a{text}", parse_special=False)


@pytest.mark.parametrize("kind", [NORMAL, USER_DEFINED, CONTROL])
@pytest.mark.parametrize("text", KNOWN)
@pytest.mark.parametrize("make", [bpe, pieces])
def test_gguf_whatever_the_type_says(make, text, kind):
    assert_ends_a_turn(load_tokenizer_gguf(make(text, kind=kind), SOURCE), text)


def test_gguf_without_types():
    metadata = bpe(*KNOWN, kind=NORMAL)
    del metadata["tokenizer.ggml.token_type"]
    tokenizer = load_tokenizer_gguf(metadata, SOURCE)
    assert ends(tokenizer) == set(KNOWN)


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("text", KNOWN)
def test_tokenizer_json_whatever_it_says(tmp_path, text, added):
    assert_ends_a_turn(load_tokenizer_folder(folder_with(tmp_path, [text], added=added)), text)


def test_tokenizer_model(tmp_path):
    proto = train_model(
        ["hello world"] * 4, vocab_size=24, user_defined_symbols=["<end_of_turn>", "<tool>"]
    )
    (tmp_path / "tokenizer.model").write_bytes(proto)
    tokenizer = load_tokenizer_folder(tmp_path)
    assert_ends_a_turn(tokenizer, "<end_of_turn>")
    assert ends(tokenizer) == {"</s>", "<end_of_turn>"}


@pytest.mark.parametrize("text", ["</s>", "<eos>", "[EOS]"])
def test_what_is_html_and_prose_elsewhere_ends_only_as_control_token(text):
    assert ends(load_tokenizer_gguf(bpe(text, kind=CONTROL), SOURCE)) == {text}
    tokenizer = load_tokenizer_gguf(bpe(text, kind=USER_DEFINED), SOURCE)
    assert ends(tokenizer) == set()
    assert tokenizer.decode(tokenizer.encode(f"a{text}", parse_special=False)) == f"a{text}"


def test_the_key_of_an_end_counts_whatever_its_text_is():
    metadata = bpe("</s>", kind=NORMAL) | {"tokenizer.ggml.eos_token_id": len(ALPHABET)}
    assert ends(load_tokenizer_gguf(metadata, SOURCE)) == {"</s>"}


@pytest.mark.parametrize(
    ("texts", "inner"),
    [
        ({"<|end|>", "<|return|>", "<|call|>"}, {"<|end|>"}),
        ({"<|end|>", "<|calls|>", "<|flush|>"}, {"<|end|>"}),
        ({"<|end|>", "<|call|>"}, set()),
        ({"<|end|>", "<|endoftext|>"}, set()),
    ],
)
def test_an_end_of_a_message_that_is_no_end_of_an_answer(texts, inner):
    assert ends_by_text(texts) == texts - inner
    tokenizer = load_tokenizer_gguf(bpe(*sorted(texts), kind=NORMAL), SOURCE)
    assert ends(tokenizer) == texts - inner
    assert "<|end|>" in tokenizer.vocabulary.hidden_tokens


def test_what_fills_in_code_ends_nothing():
    fills = ["<|fim_prefix|>", "<|file_sep|>", "<|repo_name|>", "<|fim_pad|>"]
    assert not TURN_ENDS & set(fills)
    assert ends(load_tokenizer_gguf(bpe(*fills, kind=CONTROL), SOURCE)) == set()


def test_the_lists_are_equal_in_a_folder_and_in_gguf(tmp_path):
    texts = sorted(TURN_ENDS)
    of_folder = load_tokenizer_folder(folder_with(tmp_path, texts, added=True))
    of_gguf = load_tokenizer_gguf(bpe(*texts, kind=USER_DEFINED), SOURCE)
    assert ends(of_folder) == ends(of_gguf) == set(texts) - {"<|end|>"}
    ids = json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]
    assert {ids[text] for text in ends(of_folder)} == of_folder.eos_ids
