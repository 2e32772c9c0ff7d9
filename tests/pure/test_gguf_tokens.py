"""GGUF metadata that says less than the token list, or other than it; and any at all.

The rules are llama.cpp's (`llama_vocab::impl::load`), restated in `expected` for the fuzzer.
"""

import copy
import pathlib

import hypothesis
import pytest
from fuzz import fuzz
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from edgekv.errors import TokenizerError
from edgekv.models.gguf_config import to_hf_fields
from edgekv.models.gguf_keys import REQUIRED
from edgekv.tokenizer import load_tokenizer_gguf
from edgekv.tokenizer.ends import TURN_ENDS

SOURCE = pathlib.Path("tiny.gguf")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["\u2581", "a", "b", "ab", "\u2581a"]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE, NORMAL = 2, 3, 4, 5, 6, 1


def pieces(**changes):
    """A sentencepiece file whose only keys are the token list and its types."""
    texts = ["<unk>", "<s>", "</s>", *BYTES, *WORDS]
    fields = {
        "model": "llama",
        "tokens": texts,
        "token_type": [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(WORDS)],
        "scores": [0.0] * 259 + [-1.0, -2.0, -3.0, -4.0, -5.0],
    }
    return metadata_of(fields | changes)


def bpe(**changes):
    """A byte-level file."""
    texts = ["<|begin|>", *ALPHABET, "he", "ll", "hell"]
    fields = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": texts,
        "token_type": [CONTROL, *[NORMAL] * (len(texts) - 1)],
        "merges": ["h e", "l l", "he ll"],
    }
    return metadata_of(fields | changes)


def metadata_of(fields):
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items() if value is not None}


def load(metadata):
    return load_tokenizer_gguf(metadata, SOURCE)


def test_sentencepiece_without_any_id_is_as_llama_2():
    tokenizer = load(pieces())
    assert tokenizer.bos_id == 1
    assert tokenizer.eos_ids == {2}
    assert tokenizer.prefix_ids == (1,)
    assert tokenizer.encode("ab") == [1, *tokenizer.encode("ab", add_special_tokens=False)]


def test_it_is_so_without_types_too():
    tokenizer = load(pieces(token_type=None))
    assert tokenizer.eos_ids == {2}
    assert tokenizer.encode("</s>", add_special_tokens=False) == [2]
    assert tokenizer.decode([1, 2]) == ""


@pytest.mark.parametrize("kinds", [None, [UNKNOWN, CONTROL, CONTROL] + [NORMAL] * 261])
def test_bytes_are_known_by_their_text(kinds):
    tokenizer = load(pieces(token_type=kinds))
    text = "a\u00e9\U0001f642"
    ids = tokenizer.encode(text)
    assert 0 not in ids, "no byte is unknown"
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer.encode("<0x41>")) == "<0x41>"


def test_unknown_characters_must_not_end_an_answer():
    texts = ["<EOT>", "<s>", "\u2581", "a"]
    with pytest.raises(TokenizerError, match="unknown_token_id"):
        load(pieces(tokens=texts, token_type=[CONTROL, CONTROL, NORMAL, NORMAL], scores=None))
    kinds = [CONTROL, UNKNOWN, NORMAL, NORMAL]
    tokenizer = load(pieces(tokens=texts, token_type=kinds, scores=None))
    assert tokenizer.encode("a\u00e9", add_special_tokens=False) == [2, 3, 1]
    # With a token for each byte nothing is unknown.
    texts = ["<EOT>", *BYTES, "\u2581", "a"]
    kinds = [CONTROL, *[BYTE] * 256, NORMAL, NORMAL]
    tokenizer = load(pieces(tokens=texts, token_type=kinds, scores=None))
    assert 0 not in tokenizer.encode("a\u00e9")


@pytest.mark.parametrize("none", [-1, 1 << 20, 0xFFFFFFFF])
def test_an_id_beyond_the_list_is_none(none):
    tokenizer = load(pieces(bos_token_id=none, eos_token_id=none, unknown_token_id=none))
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, {2})
    tokenizer = load(bpe(bos_token_id=none, eos_token_id=none))
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (None, set())


def test_ids_that_are_given_count():
    tokenizer = load(pieces(bos_token_id=2, eos_token_id=1))
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (2, {1, 2})  # "</s>" is one by its text


def test_usual_ids_that_the_token_list_contradicts_are_none():
    texts = ["<unk>", *WORDS, *BYTES]
    kinds = [UNKNOWN, *[NORMAL] * len(WORDS), *[BYTE] * 256]
    tokenizer = load(pieces(tokens=texts, token_type=kinds, scores=None))
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (None, set())
    assert tokenizer.decode(tokenizer.encode("ab")) == "ab"


def test_a_role_that_is_given_does_not_make_another_usual():
    kinds = pieces()["tokenizer.ggml.token_type"]
    kinds[2] = NORMAL
    texts = ["<unk>", "<s>", "c", *BYTES, *WORDS]
    tokenizer = load(pieces(tokens=texts, token_type=kinds, bos_token_id=2))
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (2, set())


def test_without_scores_all_are_equal_and_the_leftmost_pair_is_merged_first():
    tokenizer = load(pieces(scores=None, tokens=["<unk>", "<s>", "</s>", *BYTES, *WORDS]))
    ids = tokenizer.encode("ab", add_special_tokens=False)
    assert [tokenizer.vocabulary.tokens[i] for i in ids] == ["\u2581a", "b"]


def test_whole_scores_and_scores_beyond_the_list():
    tokenizer = load(pieces(scores=[0] * 259 + [-1, -5, -5, -1, -4, 7, 7]))
    ids = tokenizer.encode("ab", add_special_tokens=False)
    assert [tokenizer.vocabulary.tokens[i] for i in ids] == ["\u2581", "ab"]


def test_a_file_that_does_not_say_how_words_are_cut_is_told_of():
    assert load(bpe()).warnings == ()
    (warning,) = load(bpe(pre=None)).warnings
    assert "tiny.gguf: tokenizer.ggml.pre is missing" in warning
    assert load(pieces()).warnings == ()


def test_types_beyond_the_list_are_ignored():
    kinds = bpe()["tokenizer.ggml.token_type"]
    tokenizer = load(bpe(token_type=[*kinds, CONTROL, CONTROL]))
    assert tokenizer.vocab_size == len(kinds)
    assert tokenizer.encode("hell") == [len(kinds) - 1]


@pytest.mark.parametrize("make", [pieces, bpe])
def test_a_token_without_text_stands_for_nothing(make):
    metadata = make()
    size = len(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.tokens"] += ["", ""]
    metadata["tokenizer.ggml.token_type"] += [NORMAL, USER_DEFINED]
    metadata.pop("tokenizer.ggml.scores", None)
    tokenizer = load(metadata)
    assert tokenizer.decode([size, size + 1], skip_special_tokens=False) == ""
    assert tokenizer.vocab_size == size + 2
    text = "a [EMPTY_5] b"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_vocabulary_size_that_the_list_contradicts():
    sizes = dict.fromkeys(REQUIRED, 4) | {"vocab_size": 32_000}
    metadata = bpe() | {f"llama.{key}": value for key, value in sizes.items()}
    metadata["general.architecture"] = "llama"
    tokens = metadata["tokenizer.ggml.tokens"]
    assert to_hf_fields(metadata, "m.gguf")["vocab_size"] == len(tokens)
    del metadata["tokenizer.ggml.tokens"]
    assert to_hf_fields(metadata, "m.gguf")["vocab_size"] == 32_000


# --- any metadata: what loads is as the rules say ---


WILD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 300),
    st.floats(allow_nan=True),
    st.text(max_size=3),
    st.lists(st.integers(-1, 7), max_size=3),
)
IDS = st.integers(-1, 300)
FLAGS = st.booleans()
# What may stand in a list, or for a key that holds no list.
SOUND = {
    "tokens": st.one_of(
        st.sampled_from(["", "</s>", "<eos>", "[EOS]", "<s>", "<tool>", "a b", "e\u0301"]),
        st.sampled_from(sorted(TURN_ENDS)),
        st.text(max_size=3),
    ),
    "token_type": st.integers(0, 7),
    "scores": st.floats(-100, 100, width=32),
    "merges": st.sampled_from(["a b", "h e", "hell o", "b"]),
    **{f"{role}_token_id": IDS for role in ("bos", "eos", "eot", "eom", "unknown", "padding")},
    **dict.fromkeys(("add_bos_token", "add_space_prefix", "remove_extra_whitespaces"), FLAGS),
    "model": st.sampled_from(["llama", "gpt2", "bert"]),
    "pre": st.sampled_from(["gpt-2", "llama-bpe", "klingon"]),
}


@st.composite
def mutations(draw):
    """Valid metadata, some of whose keys are gone, added or other, or an item of a list is."""
    metadata = copy.deepcopy(draw(st.sampled_from([pieces(), bpe()])))
    keys = st.one_of(st.sampled_from(["tokens", "token_type"]), st.sampled_from(sorted(SOUND)))
    for key in draw(st.lists(keys, min_size=1, max_size=5)):
        full = f"tokenizer.ggml.{key}"
        old = metadata.get(full)
        value = draw(WILD if draw(st.integers(0, 15)) == 15 else SOUND[key])
        how = draw(st.sampled_from([*["item"] * 6, "gone", "longer", "shorter"]))
        if how == "gone":
            metadata.pop(full, None)
        elif not isinstance(old, list) or not old:
            metadata[full] = value
        elif how == "item":
            old[draw(st.one_of(st.integers(0, 5), st.integers(-5, -1))) % len(old)] = value
        elif how == "longer":
            old.append(value)
        else:
            old.pop()
    return metadata


def expected(metadata):
    """BOS and ends of metadata that loads."""
    fields = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    texts, size = fields["tokens"], len(fields["tokens"])
    kinds = fields.get("token_type") or [CONTROL] * size
    usual = {"bos": 1, "eos": 2} if fields["model"] == "llama" else {}

    def id_of(role):
        token_id = fields.get(f"{role}_token_id", -1)
        if 0 <= token_id < size:
            return token_id
        token_id = usual.get(role)
        if token_id is None or token_id >= size or not texts[token_id]:
            return None
        control = kinds[token_id] == CONTROL or texts[token_id] in TURN_ENDS
        return token_id if control else None

    bos, named = id_of("bos"), {id_of(role) for role in ("eos", "eot", "eom")} - {None}
    typed = "token_type" in fields
    by_text = {
        i
        for i, text in enumerate(texts)
        if text in TURN_ENDS
        or (
            text in ("</s>", "<eos>", "[EOS]")
            and ((typed and kinds[i] in (CONTROL, UNKNOWN)) or i in named | {bos})
        )
    }
    return bos, by_text | named


@pytest.mark.slow
@fuzz(examples=150, metadata=mutations(), text=st.text(max_size=12))
def test_any_metadata_loads_by_the_rules_or_is_refused_by_name(metadata, text):
    before = copy.deepcopy(metadata)
    failure = None
    try:
        tokenizer = load(metadata)
    except TokenizerError as error:
        failure = error
    assert repr(metadata) == repr(before), "the metadata is not ours to change"
    if failure is not None:
        assert "tiny.gguf" in str(failure)
        assert failure.hint
        return
    bos, ends = expected(metadata)
    assert tokenizer.bos_id == bos
    inner = {i for i, t in enumerate(metadata["tokenizer.ggml.tokens"]) if t == "<|end|>"}
    assert tokenizer.eos_ids - inner == ends - inner
    forged = f"{text}{''.join(sorted(TURN_ENDS))}"
    for parsed in (True, False):
        ids = tokenizer.encode(forged, add_special_tokens=False, parse_special=parsed)
        assert all(0 <= token_id < tokenizer.vocab_size for token_id in ids)
        tokenizer.decode(ids)
        turn_ends = {i for i in tokenizer.eos_ids if tokenizer.vocabulary.tokens[i] in TURN_ENDS}
        assert parsed or not turn_ends & set(ids), "a text has forged the end of a turn"


@pytest.mark.slow
def test_the_fuzzer_finds_what_is_broken(monkeypatch):
    """Not a test of the product: without the usual ids the fuzzer above must fail."""
    monkeypatch.setattr("edgekv.tokenizer.gguf._USUAL_IDS", {})
    monkeypatch.delenv("EDGEKV_FUZZ_SECONDS", raising=False)
    with pytest.raises((AssertionError, hypothesis.errors.Flaky)):
        test_any_metadata_loads_by_the_rules_or_is_refused_by_name()
