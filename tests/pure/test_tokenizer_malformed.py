"""Damaged tokenizers: each is a TokenizerError that names the file and gives a hint."""

import contextlib
import copy
import json
import pathlib

import hypothesis
import pytest
from hypothesis import strategies as st
from tiny_sentencepiece import train_model
from tokenizers import pre_tokenizers

from edgekv.errors import ChatTemplateError, ConfigError, TokenizerError
from edgekv.tokenizer import load_tokenizer_folder, load_tokenizer_gguf

SOURCE = pathlib.Path("tiny.gguf")
ANY_FOLDER = {  # each example writes over the folder of the one before
    **{"derandomize": True, "deadline": None},
    "suppress_health_check": [hypothesis.HealthCheck.function_scoped_fixture],
}
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = ["<|im_end|>", *ALPHABET, "he", "ll", "hell"]


def bpe_metadata():
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": list(TOKENS),
        "tokenizer.ggml.token_type": [3, *[1] * (len(TOKENS) - 1)],
        "tokenizer.ggml.merges": ["h e", "l l", "he ll"],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ messages }}",
    }


def sentencepiece_metadata():
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *[f"<0x{byte:02X}>" for byte in range(256)],
        "\u2581",
        "a",
        "b",
    ]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, 1, 1, 1],
        "tokenizer.ggml.scores": [0.0] * len(tokens),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def tokenizer_json():
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": 0,
                "content": "<|im_end|>",
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {
                "<|im_end|>": {"id": "<|im_end|>", "ids": [0], "tokens": ["<|im_end|>"]}
            },
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(TOKENS)},
            "merges": [["h", "e"], ["l", "l"], ["he", "ll"]],
        },
    }


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, "tokenizer.json", tokenizer_json())
    return tmp_path


def write(folder, name, value):
    (folder / name).write_text(json.dumps(value), encoding="utf-8")


def refused(call, *words):
    """`call` raises TokenizerError with a hint and each of `words` in its one line."""
    with pytest.raises(TokenizerError) as caught:
        call()
    text = str(caught.value)
    assert caught.value.hint
    assert "\n" not in text
    for word in words:
        assert word in text


@contextlib.contextmanager
def works_or_refuses(word):
    """Nothing is raised, or a TokenizerError with a hint and `word` in it."""
    failure = None
    try:
        yield
    except TokenizerError as error:
        failure = error
    assert failure is None or (word in str(failure) and failure.hint)


def test_the_undamaged_ones_load(folder):
    for tokenizer in (
        load_tokenizer_folder(folder),
        load_tokenizer_gguf(bpe_metadata(), SOURCE),
    ):
        assert tokenizer.encode("hell", add_special_tokens=False) == [len(TOKENS) - 1]
    tokenizer = load_tokenizer_gguf(sentencepiece_metadata(), SOURCE)
    assert tokenizer.decode(tokenizer.encode("ab")) == "ab"


GGUF_DAMAGE = {
    "no model": (("model", None), "tokenizer.ggml.model is missing"),
    "model no text": (("model", 3), "tokenizer.ggml.model is no str"),
    "unknown model": (("model", "t5"), "t5"),
    "no tokens": (("tokens", None), "tokens is missing"),
    "empty": (("tokens", []), "tokens has 0 entries"),
    "tokens no list": (("tokens", "abc"), "tokens is no list"),
    "tokens no text": (("tokens", ["a", 1]), "int"),
    "short types": (("token_type", [1]), "token_type has 1 entries"),
    "types no ints": (("token_type", [True] * len(TOKENS)), "bool"),
    "id no int": (("eos_token_id", "0"), "eos_token_id is no int"),
    "flag no bool": (("add_bos_token", 1), "add_bos_token is no bool"),
    "pre no text": (("pre", 1), "pre is no str"),
    "no merges": (("merges", None), "merges is missing"),
    "unknown left": (("merges", ["zz e"]), "merges"),
    "unknown result": (("merges", ["h l"]), "merges"),
    "equal tokens": (("tokens", [*TOKENS[:-1], "he"]), "tokens holds 'he' twice"),
    "no pair": (("merges", ["he"]), "merges"),
    "three parts": (("merges", ["h e l"]), "merges"),
    "merges no text": (("merges", [["h", "e"]]), "list"),
    "surrogate": (("tokens", ["\ud800", *TOKENS[1:]]), "tiny.gguf"),
}


@pytest.mark.parametrize("name", GGUF_DAMAGE)
def test_damaged_gguf_bpe(name):
    (key, value), word = GGUF_DAMAGE[name]
    metadata = bpe_metadata()
    metadata[f"tokenizer.ggml.{key}"] = value
    if value is None:
        del metadata[f"tokenizer.ggml.{key}"]
    refused(lambda: load_tokenizer_gguf(metadata, SOURCE), "tiny.gguf", word)


NUM_PIECES = len(sentencepiece_metadata()["tokenizer.ggml.tokens"])
PIECE_DAMAGE = {
    "short scores": (("scores", [0.0]), "scores has 1 entries"),
    "scores no numbers": (("scores", ["x"] * NUM_PIECES), "str"),
    "infinite score": (("scores", [1e300] * NUM_PIECES), "scores"),
    "too few bytes": (("token_type", [2, 3, 3, *[6] * 255, *[1] * 4]), "byte"),
    "negative kind": (("token_type", [-2] * NUM_PIECES), "token_type"),
    "equal pieces": (("tokens", ["a"] * NUM_PIECES), "tokens holds 'a' twice"),
    "prefix no bool": (("add_space_prefix", "no"), "add_space_prefix"),
    "charsmap no ints": (("precompiled_charsmap", [1.5]), "float"),
    "charsmap garbage": (("precompiled_charsmap", [1, 2, 3]), "tiny.gguf"),
    "template no text": (("../chat_template", 5), "chat_template"),
}


@pytest.mark.parametrize("name", PIECE_DAMAGE)
def test_damaged_gguf_sentencepiece(name):
    (key, value), word = PIECE_DAMAGE[name]
    key = f"tokenizer.ggml.{key}".replace("ggml.../", "")
    metadata = sentencepiece_metadata()
    metadata[key] = value
    if value is None:
        del metadata[key]
    refused(lambda: load_tokenizer_gguf(metadata, SOURCE), "tiny.gguf", word)


PLAIN = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.binary(max_size=2)
)


@pytest.mark.slow
@hypothesis.given(base=st.sampled_from([bpe_metadata(), sentencepiece_metadata()]), data=st.data())
@hypothesis.settings(derandomize=True, max_examples=150, deadline=None)
def test_gguf_fuzz(base, data):
    metadata = copy.deepcopy(base)
    key = data.draw(st.sampled_from(sorted(metadata)))
    value = data.draw(st.one_of(PLAIN, st.lists(PLAIN, max_size=3)))
    if isinstance(metadata[key], list) and data.draw(st.booleans()):
        metadata[key][data.draw(st.integers(0, len(metadata[key]) - 1))] = value
    else:
        metadata[key] = value
    with works_or_refuses("tiny.gguf"):
        tokenizer = load_tokenizer_gguf(metadata, SOURCE)
        tokenizer.decode(tokenizer.encode("he\U0001f642<|im_end|>"))


def test_nothing_there(tmp_path):
    refused(lambda: load_tokenizer_folder(tmp_path), str(tmp_path), "tokenizer.json")


JSON_DAMAGE = {
    "empty": b"",
    "truncated": json.dumps(tokenizer_json()).encode()[:-40],
    "no object": b"[]",
    "empty object": b"{}",
    "no utf-8": b'{"a": "\xff"}',
    "deep": b"[" * 100_000,
    "number": b"1" * 5000,
}


@pytest.mark.parametrize("name", JSON_DAMAGE)
def test_damaged_tokenizer_json(tmp_path, name):
    (tmp_path / "tokenizer.json").write_bytes(JSON_DAMAGE[name])
    refused(lambda: load_tokenizer_folder(tmp_path), str(tmp_path / "tokenizer.json"))


SPEC_DAMAGE = {
    "decoder": {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True},
    "model": {"type": "BPE", "vocab": {"a": 4_000_000_000}, "merges": []},
    "added_tokens": [{**tokenizer_json()["added_tokens"][0], "id": 7}],
    "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"},  # panics in the library
    "pre_tokenizer": {"type": "Klingon"},
}


@pytest.mark.parametrize("key", SPEC_DAMAGE)
def test_damaged_part_of_tokenizer_json(folder, key):
    write(folder, "tokenizer.json", {**tokenizer_json(), key: SPEC_DAMAGE[key]})
    refused(lambda: load_tokenizer_folder(folder), "tokenizer.json")


def test_no_tokens_at_all(folder):
    spec = tokenizer_json() | {
        "added_tokens": [],
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    }
    write(folder, "tokenizer.json", spec)
    refused(lambda: load_tokenizer_folder(folder), "tokenizer.json")


def paths(value, at=()):
    """Every place in a JSON value, as a path of keys; the vocabulary as one place."""
    yield at
    if isinstance(value, dict) and at[-1:] != ("vocab",):
        for key in value:
            yield from paths(value[key], (*at, key))
    elif isinstance(value, list):
        for index in range(len(value)):
            yield from paths(value[index], (*at, index))


JSON_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 300),
    st.text(max_size=3),
    st.just([]),
    st.just({}),
    st.sampled_from([{"type": "Sequence"}, {"Sequence": {"id": "B", "type_id": 0}}]),
)


@pytest.mark.slow
@hypothesis.given(
    path=st.sampled_from([p for p in paths(tokenizer_json()) if p]), value=JSON_VALUES
)
@hypothesis.settings(max_examples=200, **ANY_FOLDER)
def test_tokenizer_json_fuzz(tmp_path, path, value):
    spec = tokenizer_json()
    at = spec
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    write(tmp_path, "tokenizer.json", spec)
    with works_or_refuses("tokenizer.json"):
        tokenizer = load_tokenizer_folder(tmp_path)
        tokenizer.decode(tokenizer.encode("hell\U0001f642<|im_end|>"))


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        ("config.json", {"eos_token_id": "2"}, "eos_token_id"),
        ("config.json", {"eos_token_id": [True]}, "eos_token_id"),
        ("config.json", {"text_config": {"eos_token_id": 1.5}}, "eos_token_id"),
        ("special_tokens_map.json", [], "no JSON object"),
        ("tokenizer_config.json", {"bos_token": 1}, "bos_token"),
        ("tokenizer_config.json", {"add_bos_token": "yes"}, "add_bos_token"),
        ("tokenizer_config.json", {"added_tokens_decoder": []}, "added_tokens_decoder"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}, "added_tokens_decoder"),
        ("tokenizer_config.json", {"chat_template": 5}, "chat_template"),
        (
            "tokenizer_config.json",
            {"chat_template": [{"name": "default", "template": 5}]},
            "chat_template",
        ),
        *(
            ("tokenizer_config.json", {"chat_template": [entry]}, "chat_template")
            for entry in (5, {}, {"name": [], "template": "x"}, {"template": "x"})
        ),
        ("special_tokens_map.json", {"eos_token": {"content": 1}}, "eos_token"),
        ("added_tokens.json", {"<x>": "1"}, "<x>"),
    ],
)
def test_damaged_file_beside_the_tokenizer(folder, name, value, word):
    write(folder, name, value)
    refused(lambda: load_tokenizer_folder(folder), str(folder / name), word)


def test_template_precedence_and_named_templates(folder):
    named = [
        {"name": "tool_use", "template": "tools"},
        {"name": "default", "template": "from tokenizer_config"},
    ]
    write(folder, "tokenizer_config.json", {"chat_template": named})
    assert load_tokenizer_folder(folder).render_chat([]).text == "from tokenizer_config"
    write(folder, "chat_template.json", {"chat_template": "from json"})
    assert load_tokenizer_folder(folder).render_chat([]).text == "from json"
    (folder / "chat_template.jinja").write_text("from jinja {% if %}")
    tokenizer = load_tokenizer_folder(folder)
    with pytest.raises(ChatTemplateError, match=r"chat_template\.jinja"):
        tokenizer.render_chat([])
    # Whoever needs no template is not kept from the model.
    assert tokenizer.decode(tokenizer.encode("<|im_end|>", parse_special=False)) == "<|im_end|>"


def test_of_templates_without_default_the_only_one_is_taken(folder):
    only = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": " \n"}]
    write(folder, "tokenizer_config.json", {"chat_template": only})
    assert load_tokenizer_folder(folder).render_chat([]).text == "tools"


def test_several_templates_without_default_want_a_choice(folder):
    (folder / "additional_chat_templates").mkdir()
    for name in ("rag", "tool_use"):
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(f"for {name}")
    tokenizer = load_tokenizer_folder(folder)
    with pytest.raises(ChatTemplateError, match="rag, tool_use") as caught:
        tokenizer.render_chat([])
    assert "--chat-template NAME" in caught.value.hint
    assert tokenizer.encode("hell") == load_tokenizer_folder(folder).encode("hell")
    assert tokenizer.with_template("rag").render_chat([]).text == "for rag"
    with pytest.raises(ConfigError, match="chat_template is 'plain'") as caught:
        tokenizer.with_template("plain")
    assert "rag, tool_use" in caught.value.hint
    (folder / "chat_template.jinja").write_text("for all")
    tokenizer = load_tokenizer_folder(folder)
    assert tokenizer.render_chat([]).text == "for all"
    assert tokenizer.with_template("tool_use").render_chat([]).text == "for tool_use"
    assert tokenizer.with_template(None) is tokenizer


def test_an_empty_template_is_none(folder):
    write(folder, "tokenizer_config.json", {"chat_template": "older"})
    (folder / "chat_template.jinja").write_text("\n")
    assert load_tokenizer_folder(folder).chat_template is None
    with pytest.raises(ConfigError, match="chat_template"):
        load_tokenizer_folder(folder).with_template("default")


def test_named_templates_of_gguf():
    metadata = bpe_metadata()
    metadata["tokenizer.chat_templates"] = ["rag", "tool_use"]
    metadata["tokenizer.chat_template.rag"] = "for rag"
    metadata["tokenizer.chat_template.tool_use"] = "for tool_use"
    metadata["tokenizer.chat_template"] = "for all"
    tokenizer = load_tokenizer_gguf(metadata, SOURCE)
    assert tokenizer.render_chat([]).text == "for all"
    assert tokenizer.with_template("rag").render_chat([]).text == "for rag"
    del metadata["tokenizer.chat_template"]
    with pytest.raises(ChatTemplateError, match="rag, tool_use"):
        load_tokenizer_gguf(metadata, SOURCE).render_chat([])
    metadata["tokenizer.chat_templates"] = ["rag"]
    assert load_tokenizer_gguf(metadata, SOURCE).render_chat([]).text == "for rag"


def test_directory_in_place_of_a_file(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").mkdir()
    refused(lambda: load_tokenizer_folder(folder), str(folder))


@pytest.fixture(scope="module")
def proto():
    return train_model(["hello world"] * 4, vocab_size=20)


def test_damaged_tokenizer_model(tmp_path, proto):
    for data in (b"", b"garbage", proto[:-9], proto[: len(proto) // 2], b"\0" * 64):
        (tmp_path / "tokenizer.model").write_bytes(data)
        refused(lambda: load_tokenizer_folder(tmp_path), str(tmp_path / "tokenizer.model"))


@pytest.mark.parametrize("token_id", [4_000_000_000, -4])
def test_absurd_added_token_beside_tokenizer_model(tmp_path, proto, token_id):
    (tmp_path / "tokenizer.model").write_bytes(proto)
    write(tmp_path, "added_tokens.json", {"<x>": token_id})
    write(tmp_path, "tokenizer_config.json", {"eos_token": "<x>"})
    refused(lambda: load_tokenizer_folder(tmp_path), "tokenizer.model", str(token_id))


@pytest.mark.slow
@hypothesis.given(at=st.integers(0, 2000), byte=st.integers(0, 255))
@hypothesis.settings(max_examples=150, **ANY_FOLDER)
def test_tokenizer_model_fuzz(tmp_path, proto, at, byte):
    damaged = bytearray(proto)
    damaged[at % len(proto)] = byte
    (tmp_path / "tokenizer.model").write_bytes(bytes(damaged))
    with works_or_refuses("tokenizer.model"):
        tokenizer = load_tokenizer_folder(tmp_path)
        tokenizer.decode(tokenizer.encode("hello world"))
