"""Which of a folder's files is heard of what, and what of them a model can do without."""

import json

import pytest
import tokenizers
from fuzz import fuzz
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from edgekv.config import SamplingParams
from edgekv.errors import TokenizerError
from edgekv.tokenizer import load_tokenizer_folder
from edgekv.tokenizer.folder_config import PRECEDENCE

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
A, B, C, D = 10, 11, 12, 13  # ids of ordinary tokens
SPECIAL = ["<x>", "<y>", "<z>"]
X, Y, Z = range(len(ALPHABET), len(ALPHABET) + 3)


@pytest.fixture
def folder(tmp_path):
    """A folder with a tokenizer of bytes and three control tokens, and nothing that names them."""
    vocab = {text: token_id for token_id, text in enumerate([*ALPHABET, *SPECIAL])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([tokenizers.AddedToken(text, special=True) for text in SPECIAL])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def load(folder, **files):
    """The tokenizer beside these files: their names without the end, and what is in them."""
    for name, value in files.items():
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        (folder / f"{name}.json").write_bytes(data)
    return load_tokenizer_folder(folder)


@pytest.mark.parametrize(
    ("generation_config", "config", "expected"),
    [
        ({"eos_token_id": A}, {"eos_token_id": B}, {A}),
        ({"eos_token_id": [A, C]}, {"eos_token_id": [B, D]}, {A, C}),
        ({}, {"eos_token_id": [B, D]}, {B, D}),
        ({"eos_token_id": None}, {"eos_token_id": B}, {B}),
        ({"eos_token_id": []}, {"eos_token_id": B}, {B}),
        ({"eos_token_id": A}, {}, {A}),
        ({}, {"text_config": {"eos_token_id": B}}, {B}),
        ({}, {"eos_token_id": A, "text_config": {"eos_token_id": B}}, {A}),
        ({"eos_token_id": A}, {"text_config": {"eos_token_id": B}}, {A}),
        ({}, {}, set()),
    ],
)
def test_ends_of_generation_config_replace_those_of_config(
    folder, generation_config, config, expected
):
    tokenizer = load(folder, generation_config=generation_config, config=config)
    assert tokenizer.eos_ids == expected
    assert tokenizer.warnings == ()


@pytest.mark.slow
@pytest.mark.parametrize("generation", [{"eos_token_id": A}, {"eos_token_id": [A, C]}, None])
def test_ends_are_those_that_mlx_lm_takes(folder, generation):
    from mlx_lm.utils import load_config

    if generation is not None:
        load(folder, generation_config=generation)
    tokenizer = load(folder, config={"model_type": "llama", "eos_token_id": B})
    ends = load_config(folder)["eos_token_id"]
    assert tokenizer.eos_ids == set(ends if isinstance(ends, list) else [ends])


def test_the_text_of_an_end_is_one_beside_the_ids(folder):
    tokenizer = load(
        folder, generation_config={"eos_token_id": A}, tokenizer_config={"eos_token": "<x>"}
    )
    assert tokenizer.eos_ids == {A, X}


@pytest.mark.parametrize(
    ("tokenizer_config", "special_tokens_map", "expected"),
    [
        ({"eos_token": "<x>"}, {"eos_token": "<y>"}, {X}),
        ({"eos_token": {"content": "<x>"}}, {"eos_token": "<y>"}, {X}),
        ({}, {"eos_token": "<y>"}, {Y}),
        ({"bos_token": "<x>"}, {"eos_token": "<y>"}, {Y}),
        ({"eos_token": None}, {"eos_token": "<y>"}, set()),
    ],
)
def test_special_tokens(folder, tokenizer_config, special_tokens_map, expected):
    tokenizer = load(
        folder, tokenizer_config=tokenizer_config, special_tokens_map=special_tokens_map
    )
    assert tokenizer.eos_ids == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config": {"bos_token": "<x>"}, "config": {"bos_token_id": Y}}, X),
        ({"special_tokens_map": {"bos_token": "<x>"}, "config": {"bos_token_id": Y}}, X),
        ({"generation_config": {"bos_token_id": Z}, "config": {"bos_token_id": Y}}, Z),
        ({"config": {"bos_token_id": Y}}, Y),
        ({"tokenizer_config": {"bos_token": None}, "config": {"bos_token_id": Y}}, None),
        ({}, None),
    ],
)
def test_bos_is_said_by_its_text_or_else_by_id(folder, files, expected):
    assert load(folder, **files).bos_id == expected


def test_templates(folder):
    assert load(folder, tokenizer_config={"chat_template": "1"}).render_chat([]).text == "1"
    assert load(folder, chat_template={"chat_template": "2"}).render_chat([]).text == "2"
    (folder / "chat_template.jinja").write_text("3")
    assert load_tokenizer_folder(folder).render_chat([]).text == "3"


def test_sampling_is_what_generation_config_says_and_nobody_else(folder):
    tokenizer = load(folder, config={"do_sample": True, "temperature": 0.3})
    assert tokenizer.sampling == SamplingParams()
    tokenizer = load(folder, generation_config={"do_sample": True, "temperature": 0.6, "top_k": 9})
    assert tokenizer.sampling == SamplingParams(temperature=0.6, top_k=9)


def test_sampling_does_not_change_the_fingerprint(folder):
    before = load_tokenizer_folder(folder).fingerprint
    after = load(folder, generation_config={"do_sample": True, "temperature": 0.6})
    assert after.fingerprint == before


DAMAGE = [b"", b"{", b"[]", b"\xff", b"[" * 100_000]


@pytest.mark.parametrize("data", DAMAGE)
def test_a_damaged_generation_config_is_a_warning(folder, data):
    tokenizer = load(folder, generation_config=data, config={"eos_token_id": B})
    (warning,) = tokenizer.warnings
    assert str(folder / "generation_config.json") in warning
    assert "\n" not in warning
    assert tokenizer.eos_ids == {B}
    assert tokenizer.sampling == SamplingParams()


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"eos_token_id": "2"}, "eos_token_id"),
        ({"eos_token_id": [True]}, "eos_token_id"),
        ({"bos_token_id": {}}, "bos_token_id"),
        ({"do_sample": True, "temperature": "hot"}, "temperature"),
    ],
)
def test_a_strange_value_in_a_generation_config_is_a_warning(folder, values, word):
    config = {"eos_token_id": B, "bos_token_id": Y}
    tokenizer = load(folder, generation_config=values, config=config)
    (warning,) = tokenizer.warnings
    assert word in warning
    assert "generation_config.json" in warning
    assert tokenizer.eos_ids == {B}
    assert tokenizer.bos_id == Y


@pytest.mark.parametrize("data", [*DAMAGE, b'{"chat_template": {}}'])
def test_a_damaged_template_file_is_a_warning_and_the_next_is_taken(folder, data):
    tokenizer = load(folder, chat_template=data, tokenizer_config={"chat_template": "older"})
    (warning,) = tokenizer.warnings
    assert "chat_template.json" in warning
    assert tokenizer.render_chat([]).text == "older"
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    tokenizer = load_tokenizer_folder(folder)
    assert ["UTF-8" in warning for warning in tokenizer.warnings] == [True, False]
    assert tokenizer.render_chat([]).text == "older"


@pytest.mark.parametrize("name", [[], {}, None, 1])
@pytest.mark.parametrize("file", ["chat_template", "tokenizer_config"])
def test_a_strange_name_of_a_template_is_no_crash(folder, file, name):
    strange = {"chat_template": [{"name": name, "template": "x"}]}
    try:
        tokenizer = load(folder, **{file: strange})
    except TokenizerError as error:
        assert f"{file}.json" in str(error)  # noqa: PT017 - either is right
    else:
        assert tokenizer.chat_template is None


def test_every_file_of_the_table_is_read():
    assert {name for names in PRECEDENCE.values() for name in names} == {
        *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
        *("generation_config.json", "config.json", "chat_template.json", "chat_template.jinja"),
        "additional_chat_templates",
    }


JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-1, 300),
        st.floats(),
        st.sampled_from([*SPECIAL, "</s>", "<|im_end|>", "", "q", "{% if"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["content", "special", "5", "name"]), inner, max_size=3),
    ),
    max_leaves=4,
)
KEYS = [
    *("bos_token", "eos_token", "unk_token", "bos_token_id", "eos_token_id", "add_bos_token"),
    *("added_tokens_decoder", "chat_template", "text_config", "do_sample", "temperature", "top_k"),
]
WHOLE = st.one_of(st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4), JSON)
SPARED = ("generation_config", "chat_template")


@pytest.mark.slow
@fuzz(
    examples=100,
    files=st.dictionaries(
        st.sampled_from(
            [*SPARED, "config", "tokenizer_config", "special_tokens_map", "added_tokens"]
        ),
        st.one_of(WHOLE, WHOLE, WHOLE, st.binary(max_size=3)),
        min_size=1,
        max_size=3,
    ),
)
def test_any_files_load_or_one_that_matters_is_refused_by_name(folder, files):
    for path in folder.glob("*.json"):
        if path.name != "tokenizer.json":
            path.unlink()
    failure = None
    try:
        tokenizer = load(folder, **files)
    except TokenizerError as error:
        failure = error
    if failure is not None:
        (name,) = [name for name in files if f"/{name}.json" in str(failure)]
        assert name not in SPARED
        assert failure.hint
        return
    assert all(0 <= token_id < tokenizer.vocab_size for token_id in tokenizer.eos_ids)
    assert tokenizer.bos_id is None or 0 <= tokenizer.bos_id < tokenizer.vocab_size
    assert tokenizer.decode(tokenizer.encode("a b", add_special_tokens=False)) == "a b"
    SamplingParams().over(tokenizer.sampling)
