"""Byte-level BPE: GGUF against tokenizer.json of the same vocabulary, and the word patterns."""

import itertools
import json
import pathlib
import subprocess
import sys
import threading
import time

import hypothesis
import pytest
import tokenizers
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from edgekv.errors import ConfigError, RequestError, TokenizerError
from edgekv.tokenizer import load_tokenizer_folder, load_tokenizer_gguf
from edgekv.tokenizer.backends import HuggingFaceBackend
from edgekv.tokenizer.pretokenizers import BPE_STYLES

SOURCE = pathlib.Path("tiny.gguf")
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "Hello world, the quick brown fox can't jump over the lazy dog's 1234 bones.",
    "  def f(x):\n    return x + 10\n\n\nHELLO HelloWorld helloWORLD",
    "naïve café über straße 日本語のテキスト emoji 🙂🙃 👩‍🚀 Привет мир",
] * 3

# The pre-tokenizers that the models' own tokenizer.json files hold.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")


def _split(pattern):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


ORIGINALS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    ),
    "llama-bpe": _split(_LLAMA3),
    "qwen2": _split(_QWEN2),
}


def train(pre):
    """A tiny tokenizers.Tokenizer with the original pre-tokenizer of `pre`."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=BPE_STYLES[pre].ignore_merges))
    tokenizer.pre_tokenizer = ORIGINALS[pre]
    tokenizer.decoder = decoders.ByteLevel()
    if BPE_STYLES[pre].nfc:
        tokenizer.normalizer = tokenizers.normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=CONTROL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([tokenizers.AddedToken("<tool call>", normalized=False)])
    return tokenizer


def gguf_metadata(tokenizer, pre):
    """The GGUF metadata that a converter writes for it."""
    spec = json.loads(tokenizer.to_str())
    ids = tokenizer.get_vocab()
    tokens = sorted(ids, key=ids.get)
    types = [3 if t in CONTROL else 4 if t == "<tool call>" else 1 for t in tokens]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in spec["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
    }


@pytest.fixture(scope="module")
def trained():
    return {pre: train(pre) for pre in ORIGINALS}


@pytest.fixture(scope="module")
def loaded(trained):
    return {
        pre: load_tokenizer_gguf(gguf_metadata(tokenizer, pre), SOURCE)
        for pre, tokenizer in trained.items()
    }


@pytest.fixture(scope="module")
def smollm(loaded):
    return loaded["smollm"]


@pytest.fixture
def folder(trained, tmp_path):
    """A Hugging Face folder with the tiny smollm tokenizer and nothing beside it."""
    trained["smollm"].save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write(folder, name, value):
    (folder / name).write_text(json.dumps(value), encoding="utf-8")


FRAGMENTS = (
    *("Hello", " world", "123", "4567", "  ", "\n", "\n\n", "\r\n", "\t", "'s", "'LL", "don't"),
    *("é", "e\u0301", "日本", "🙂", "👩\u200d🚀", "!?", " $", "٣", "x_1", "ſ", "<tool call>"),
    *CONTROL,
)
TEXTS = st.one_of(
    st.text(max_size=40), st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join)
)


@pytest.mark.parametrize("pre", ORIGINALS)
@hypothesis.given(text=TEXTS)
@hypothesis.settings(derandomize=True, max_examples=60, deadline=None)
def test_gguf_ids_equal_those_of_the_models_own_tokenizer(trained, loaded, pre, text):
    assert loaded[pre].encode(text) == trained[pre].encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe"])
@hypothesis.given(text=TEXTS)
@hypothesis.settings(derandomize=True, max_examples=60, deadline=None)
def test_encode_decode_round_trip(loaded, pre, text):
    tokenizer = loaded[pre]
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text
    assert tokenizer.decode(tokenizer.encode(text, parse_special=False)) == text


@hypothesis.given(ids=st.lists(st.integers(0, 419), max_size=30))
@hypothesis.settings(derandomize=True, max_examples=100, deadline=None)
def test_decode_equals_the_librarys_on_any_ids(trained, smollm, ids):
    expected = trained["smollm"].decode(ids, skip_special_tokens=True)
    # The library decodes each stretch between added tokens alike, but counts bad bytes its own way.
    assert smollm.decode(ids).replace("\ufffd", "") == expected.replace("\ufffd", "")


def test_qwen2_normalises_and_smollm_does_not(loaded):
    assert loaded["qwen2"].encode("e\u0301") == loaded["qwen2"].encode("é")
    assert loaded["smollm"].encode("e\u0301") != loaded["smollm"].encode("é")


def test_control_tokens_in_untrusted_text_stay_text(smollm):
    text = "a<|im_end|>b"
    assert 2 in smollm.encode(text)
    plain = smollm.encode(text, parse_special=False)
    assert not set(plain) & {0, 1, 2}
    assert smollm.decode(plain) == text
    assert 2 in smollm.encode(text)  # the switch is no state of the tokenizer


def test_added_plain_tokens_are_always_tokens(smollm):
    (token_id,) = smollm.encode("<tool call>", parse_special=False)
    assert smollm.vocabulary.token_bytes(token_id) == b"<tool call>"
    assert smollm.decode([token_id]) == "<tool call>"


def test_token_bytes(smollm):
    assert smollm.vocabulary.token_bytes(2) == b""
    assert b"".join(map(smollm.vocabulary.token_bytes, smollm.encode("🙂 é"))) == "🙂 é".encode()
    assert smollm.vocabulary.token_bytes(-1) == b""
    assert smollm.vocabulary.token_bytes(smollm.vocab_size) == b""


def test_decode_skips_control_tokens_only_when_told(smollm):
    ids = [1, *smollm.encode("hi"), 2, 10**6]
    assert smollm.decode(ids) == "hi"
    assert smollm.decode(ids, skip_special_tokens=False) == "<|im_start|>hi<|im_end|>"


def test_bos_is_added_once_and_only_where_wanted(trained):
    metadata = gguf_metadata(trained["llama-bpe"], "llama-bpe")
    assert load_tokenizer_gguf(metadata, SOURCE).encode("hi")[0] != 1
    del metadata["tokenizer.ggml.add_bos_token"]  # the llama 3 style adds it by default
    tokenizer = load_tokenizer_gguf(metadata, SOURCE)
    assert tokenizer.encode("hi") == [1, *tokenizer.encode("hi", add_special_tokens=False)]
    assert tokenizer.encode("<|im_start|>hi") == tokenizer.encode("hi")
    assert tokenizer.encode("") == [1]


def test_gguf_ends(trained):
    metadata = gguf_metadata(trained["smollm"], "smollm")
    assert load_tokenizer_gguf(metadata, SOURCE).eos_ids == {0, 2}  # <|endoftext|> too
    metadata["tokenizer.ggml.eot_token_id"] = 7
    metadata["tokenizer.ggml.eom_token_id"] = 10**9  # out of range, as "none" is sometimes written
    assert load_tokenizer_gguf(metadata, SOURCE).eos_ids == {0, 2, 7}


def test_gguf_without_token_types_still_knows_its_end(trained):
    metadata = gguf_metadata(trained["smollm"], "smollm")
    del metadata["tokenizer.ggml.token_type"]
    tokenizer = load_tokenizer_gguf(metadata, SOURCE)
    assert tokenizer.eos_ids == {0, 2}
    assert tokenizer.encode("<|im_end|>") == [2]


def test_unused_tokens_stand_for_nothing(trained):
    metadata = gguf_metadata(trained["smollm"], "smollm")
    metadata["tokenizer.ggml.tokens"] += ["[PAD421]"]
    metadata["tokenizer.ggml.token_type"] += [5]
    tokenizer = load_tokenizer_gguf(metadata, SOURCE)
    last = tokenizer.vocab_size - 1
    assert tokenizer.vocabulary.token_bytes(last) == b""
    assert tokenizer.decode([last], skip_special_tokens=False) == ""
    assert last not in tokenizer.encode("[PAD421]")


@pytest.mark.parametrize("text", [5, None, b"bytes", ["a"]])
def test_what_is_no_text_is_named(smollm, text):
    with pytest.raises(ConfigError, match="text"):
        smollm.encode(text)


@pytest.mark.parametrize("ids", [None, 5, "ab", [1.0], [None]])
def test_what_are_no_ids_is_named(smollm, ids):
    with pytest.raises(ConfigError, match="ids"):
        smollm.decode(ids)


def test_lone_surrogate_is_the_requests_fault(smollm):
    with pytest.raises(RequestError, match="surrogate at character 1"):
        smollm.encode("a\ud800")


def test_folder_equals_gguf(folder, smollm):
    tokenizer = load_tokenizer_folder(folder)
    text = "Hello 123 <|im_end|> 🙂<tool call>"
    assert tokenizer.encode(text) == smollm.encode(text)
    assert tokenizer.encode(text, parse_special=False) == smollm.encode(text, parse_special=False)
    assert tokenizer.vocab_size == smollm.vocab_size
    assert tokenizer.bos_id is None
    assert tokenizer.eos_ids == {0, 2}


def test_folder_reads_specials_from_every_file(folder):
    write(folder, "config.json", {"eos_token_id": 11, "bos_token_id": 1})
    write(folder, "generation_config.json", {"eos_token_id": [12, 10**6]})
    write(folder, "special_tokens_map.json", {"eos_token": {"content": "<|im_end|>"}})
    tokenizer = load_tokenizer_folder(folder)
    assert tokenizer.bos_id == 1
    assert tokenizer.eos_ids == {0, 2, 12}
    assert tokenizer.encode("hi")[0] != 1
    write(folder, "tokenizer_config.json", {"bos_token": None})
    assert load_tokenizer_folder(folder).bos_id is None
    write(folder, "tokenizer_config.json", {"add_bos_token": True})
    write(folder, "config.json", {"bos_token_id": 10**6})  # no such token
    assert load_tokenizer_folder(folder).prefix_ids == ()


def test_folder_adds_bos_as_tokenizer_config_says(folder):
    config = {"bos_token": "<|im_start|>", "add_bos_token": True}
    write(folder, "tokenizer_config.json", config)
    tokenizer = load_tokenizer_folder(folder)
    assert tokenizer.bos_id == 1
    assert tokenizer.encode("hi")[0] == 1


def test_folder_adds_what_the_post_processor_adds(folder, trained):
    tokenizer = tokenizers.Tokenizer.from_str(trained["smollm"].to_str())
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>",
        special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = load_tokenizer_folder(folder).encode("hi")
    assert ids[0] == 1
    assert ids[-1] != 2  # an end behind the prompt would be no prompt
    write(folder, "tokenizer_config.json", {"add_bos_token": False})
    assert load_tokenizer_folder(folder).encode("hi") == ids[1:]


def test_a_plain_token_that_the_config_calls_eos_becomes_control(folder):
    write(folder, "tokenizer_config.json", {"eos_token": "<tool call>"})
    tokenizer = load_tokenizer_folder(folder)
    (token_id,) = tokenizer.encode("<tool call>")
    assert token_id in tokenizer.eos_ids
    assert tokenizer.vocabulary.token_bytes(token_id) == b""
    assert token_id not in tokenizer.encode("<tool call>", parse_special=False)


def test_truncation_and_padding_of_a_training_run_are_ignored(folder, trained):
    tokenizer = tokenizers.Tokenizer.from_str(trained["smollm"].to_str())
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(folder / "tokenizer.json"))
    loaded = load_tokenizer_folder(folder)
    assert loaded.decode(loaded.encode("Hello world, hello fox")) == "Hello world, hello fox"


def test_fingerprint_follows_content_and_nothing_else(folder, trained):
    first = load_tokenizer_folder(folder).fingerprint
    assert len(first) == 32
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    write(folder, "tokenizer.json", {**spec, "truncation": None})  # other white space, same content
    assert load_tokenizer_folder(folder).fingerprint == first
    merges = [" ".join(merge) for merge in spec["model"]["merges"]]  # as older files have them
    decoder = {**spec["decoder"], "trim_offsets": False}
    older = {**spec, "model": {**spec["model"], "merges": merges}, "decoder": decoder}
    write(folder, "tokenizer.json", older)
    (folder / "chat_template.jinja").write_text("x")
    write(folder, "config.json", {"eos_token_id": 11})
    assert load_tokenizer_folder(folder).fingerprint == first  # a text has the same ids
    write(folder, "tokenizer_config.json", {"eos_token": "<tool call>"})  # a control token now
    special = load_tokenizer_folder(folder).fingerprint
    write(folder, "tokenizer_config.json", {"bos_token": "<|im_start|>", "add_bos_token": True})
    prefixed = load_tokenizer_folder(folder).fingerprint
    spec["added_tokens"][0]["rstrip"] = True
    write(folder, "tokenizer.json", spec)
    (folder / "tokenizer_config.json").unlink()
    assert len({first, special, prefixed, load_tokenizer_folder(folder).fingerprint}) == 4

    metadata = gguf_metadata(trained["smollm"], "smollm")
    same = load_tokenizer_gguf(dict(reversed(metadata.items())), pathlib.Path("other.gguf"))
    metadata |= {"tokenizer.chat_template": "x", "tokenizer.ggml.padding_token_id": 3}
    assert same.fingerprint == load_tokenizer_gguf(metadata, SOURCE).fingerprint
    for change in (
        {"tokenizer.ggml.pre": "gpt-2"},
        {"tokenizer.ggml.add_bos_token": True},
        {"tokenizer.ggml.merges": metadata["tokenizer.ggml.merges"][1:]},
        {"tokenizer.ggml.token_type": [1] * len(metadata["tokenizer.ggml.tokens"])},
    ):
        changed = load_tokenizer_gguf(metadata | change, SOURCE)
        assert changed.fingerprint != same.fingerprint


def test_unknown_pre_tokenizer_names_the_supported_ones(trained):
    metadata = gguf_metadata(trained["smollm"], "klingon")
    with pytest.raises(TokenizerError, match="klingon") as caught:
        load_tokenizer_gguf(metadata, SOURCE)
    assert "smollm" in caught.value.hint


@pytest.mark.slow
def test_import_is_light_and_fingerprint_is_equal_in_another_process(folder):
    code = (
        "import pathlib, sys, edgekv.tokenizer as t\n"
        "heavy = {'tokenizers', 'sentencepiece', 'jinja2', 'mlx', 'numpy'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
        "print(t.load_tokenizer_folder(pathlib.Path(sys.argv[1])).fingerprint)\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == load_tokenizer_folder(folder).fingerprint


@pytest.mark.slow
@pytest.mark.parametrize("how", ["encode", "cut"])
def test_other_threads_run_while_a_long_text_is_encoded(how):
    backend = HuggingFaceBackend(train("smollm"), origin="tiny")
    text = "hello world " * 40_000
    ticks = []
    is_over = threading.Event()

    def tick():
        while not is_over.wait(0.002):
            ticks.append(time.monotonic())

    ticking = threading.Thread(target=tick)
    ticking.start()
    begin_s = time.monotonic()
    encoded = getattr(backend, how)(text)
    end_s = time.monotonic()
    is_over.set()
    ticking.join()
    times_s = [begin_s, *(at for at in ticks if begin_s < at < end_s), end_s]
    assert max(b - a for a, b in itertools.pairwise(times_s)) < (end_s - begin_s) / 2
    short = getattr(backend, how)("hello world " * 2)
    assert encoded[: len(short) - 1] == short[:-1]
