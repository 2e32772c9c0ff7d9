"""Sentencepiece BPE: models rebuilt from GGUF metadata against the originals."""

import json
import pathlib
import re

import hypothesis
import pytest
import sentencepiece
import tokenizers
import transformers
from fuzz import fuzz
from hypothesis import strategies as st
from tiny_sentencepiece import train_model
from tokenizers import decoders, models, normalizers, pre_tokenizers

from edgekv.tokenizer import ChatTemplate, load_tokenizer_folder, load_tokenizer_gguf

SOURCE = pathlib.Path("tiny.gguf")
ANY_FOLDER = {  # each example writes over the folder of the one before
    **{"derandomize": True, "deadline": None},
    "suppress_health_check": [hypothesis.HealthCheck.function_scoped_fixture],
}
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
USER_DEFINED = ["<tool>", SPACE * 2, "\n\n"]
CORPUS = [
    "Hello world, the quick brown fox jumps over the lazy dog 1234 times.",
    "def f(x):\n    return x + 10  # hello",
    "naïve café über straße 日本語のテキスト 🙂🙃 Привет мир",
] * 8
FLAVOURS = {
    "llama": {"add_dummy_prefix": True, "remove_extra_whitespaces": False},
    "gemma": {"add_dummy_prefix": False, "remove_extra_whitespaces": False},
    "squeezing": {"add_dummy_prefix": True, "remove_extra_whitespaces": True},
}


def train(flavour):
    """A tiny serialized sentencepiece model with byte fallback."""
    return train_model(
        CORPUS,
        vocab_size=400,
        byte_fallback=True,
        user_defined_symbols=USER_DEFINED,
        control_symbols=["<|im_end|>"],
        split_digits=True,
        **FLAVOURS[flavour],
    )


def processor_of(proto):
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(proto)
    return processor


def kind(processor, token_id):
    for number, asked in ((2, "IsUnknown"), (3, "IsControl"), (5, "IsUnused"), (6, "IsByte")):
        if getattr(processor, asked)(token_id):
            return number
    return 4 if processor.id_to_piece(token_id) in USER_DEFINED else 1


def gguf_metadata(processor, flavour):
    """The GGUF metadata that a converter writes, which spells user-defined spaces plainly."""
    ids = range(processor.vocab_size())
    kinds = [kind(processor, i) for i in ids]
    pieces = [processor.id_to_piece(i) for i in ids]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [
            piece.replace(SPACE, " ") if kind == 4 else piece
            for piece, kind in zip(pieces, kinds, strict=True)
        ],
        "tokenizer.ggml.scores": [processor.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": processor.bos_id(),
        "tokenizer.ggml.eos_token_id": processor.eos_id(),
        "tokenizer.ggml.unknown_token_id": processor.unk_id(),
        "tokenizer.ggml.add_space_prefix": FLAVOURS[flavour]["add_dummy_prefix"],
        "tokenizer.ggml.remove_extra_whitespaces": FLAVOURS[flavour]["remove_extra_whitespaces"],
    }


@pytest.fixture(scope="module")
def protos():
    return {flavour: train(flavour) for flavour in FLAVOURS}


@pytest.fixture(scope="module")
def originals(protos):
    return {flavour: processor_of(proto) for flavour, proto in protos.items()}


@pytest.fixture(scope="module")
def loaded(originals):
    return {
        flavour: load_tokenizer_gguf(gguf_metadata(processor, flavour), SOURCE)
        for flavour, processor in originals.items()
    }


@pytest.fixture
def folder(protos, tmp_path):
    """A Hugging Face folder with nothing but a tokenizer.model."""
    (tmp_path / "tokenizer.model").write_bytes(protos["llama"])
    return tmp_path


FRAGMENTS = (
    "Hello",
    " world",
    "  ",
    "   x",
    "\n",
    "\n\n",
    "12",
    "é",
    "日本",
    "🙂",
    SPACE,
    "<tool>",
)
TEXTS = st.one_of(
    st.text(max_size=40), st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join)
)


@pytest.mark.parametrize("flavour", FLAVOURS)
@hypothesis.given(text=TEXTS)
@hypothesis.settings(derandomize=True, max_examples=150, deadline=None)
def test_gguf_ids_equal_the_original_models(originals, loaded, flavour, text):
    ids = loaded[flavour].encode(text, add_special_tokens=False, parse_special=False)
    assert ids == originals[flavour].encode(text)


@pytest.mark.parametrize("flavour", ["llama", "gemma"])
@hypothesis.given(text=TEXTS.filter(lambda text: SPACE not in text))
@hypothesis.settings(derandomize=True, max_examples=100, deadline=None)
def test_encode_decode_round_trip(loaded, flavour, text):
    tokenizer = loaded[flavour]
    assert tokenizer.decode(tokenizer.encode(text, parse_special=False)) == text


@pytest.mark.parametrize("flavour", FLAVOURS)
@hypothesis.given(text=TEXTS)
@hypothesis.settings(derandomize=True, max_examples=60, deadline=None)
def test_decode_equals_the_original_models(originals, loaded, flavour, text):
    ids = originals[flavour].encode(text)
    assert loaded[flavour].decode(ids) == originals[flavour].decode(ids)


def test_control_tokens_are_parsed_only_on_request(loaded, originals):
    tokenizer, processor = loaded["llama"], originals["llama"]
    end = processor.piece_to_id("<|im_end|>")
    ids = tokenizer.encode("Hello<|im_end|>Hello", add_special_tokens=False)
    # Each stretch begins anew, with a space prefix of its own.
    assert ids == [*processor.encode("Hello"), end, *processor.encode("Hello")]
    plain = tokenizer.encode("Hello<|im_end|>", parse_special=False)
    assert end not in plain
    assert tokenizer.decode(plain) == "Hello<|im_end|>"
    assert tokenizer.eos_ids == {processor.eos_id(), end}


def test_bos_and_its_switch(originals):
    metadata = gguf_metadata(originals["llama"], "llama")
    tokenizer = load_tokenizer_gguf(metadata, SOURCE)
    assert tokenizer.encode("hi")[0] == tokenizer.bos_id == 1
    assert tokenizer.encode("<s>hi").count(1) == 1
    assert tokenizer.decode(tokenizer.encode("hi"), skip_special_tokens=False) == "<s> hi"
    metadata["tokenizer.ggml.add_bos_token"] = False
    assert load_tokenizer_gguf(metadata, SOURCE).encode("hi")[0] != 1


def test_token_bytes(loaded, originals):
    tokenizer, processor = loaded["gemma"], originals["gemma"]
    assert tokenizer.vocabulary.token_bytes(processor.piece_to_id("<0xF0>")) == b"\xf0"
    assert tokenizer.vocabulary.token_bytes(processor.piece_to_id(SPACE * 2)) == b"  "
    assert tokenizer.vocabulary.token_bytes(processor.piece_to_id("\n\n")) == b"\n\n"
    assert tokenizer.vocabulary.token_bytes(processor.piece_to_id("<|im_end|>")) == b""
    assert tokenizer.vocabulary.token_bytes(processor.unk_id()) == b""


@pytest.mark.parametrize("kinds_of_unknown", [[3], [2, 2]])
def test_files_without_exactly_one_unknown_token_load(originals, kinds_of_unknown):
    metadata = gguf_metadata(originals["llama"], "llama")
    expected = load_tokenizer_gguf(metadata, SOURCE).encode("Hello 日本")
    kinds = metadata["tokenizer.ggml.token_type"]
    kinds[: len(kinds_of_unknown)] = kinds_of_unknown
    assert load_tokenizer_gguf(metadata, SOURCE).encode("Hello 日本") == expected


def test_normalisation_rules_in_the_file_apply(originals):
    proto = train_model(CORPUS, vocab_size=100, normalization_rule_name="nfkc")
    original = processor_of(proto)
    metadata = gguf_metadata(original, "squeezing")
    metadata["tokenizer.ggml.precompiled_charsmap"] = list(charsmap_of(proto))
    text = "ﬁne ＨＥＬＬＯ"
    ids = load_tokenizer_gguf(metadata, SOURCE).encode(text, add_special_tokens=False)
    assert ids == original.encode(text)
    del metadata["tokenizer.ggml.precompiled_charsmap"]
    assert load_tokenizer_gguf(metadata, SOURCE).encode(text, add_special_tokens=False) != ids


def charsmap_of(proto):
    """`normalizer_spec.precompiled_charsmap`: field 2 inside of field 3 of the message."""
    return fields_of(fields_of(proto)[3])[2]


def fields_of(message):
    """Length-delimited fields of a protobuf message by number; the last one of each."""
    found, at = {}, 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at, value, shift = at + 1, value | (byte & 0x7F) << shift, shift + 7
            if byte < 0x80:
                return value

    while at < len(message):
        key = varint()
        if key & 7 == 0:
            varint()
        elif key & 7 == 5:
            at += 4
        else:
            length = varint()
            found[key >> 3] = message[at : at + length]
            at += length
    return found


def test_folder_with_tokenizer_model(folder, originals):
    tokenizer = load_tokenizer_folder(folder)
    processor = originals["llama"]
    assert tokenizer.encode("Hello  <tool>") == [1, *processor.encode("Hello  <tool>")]
    assert tokenizer.decode(tokenizer.encode(" Hello")) == " Hello"
    assert tokenizer.bos_id == 1
    assert tokenizer.eos_ids == {2, processor.piece_to_id("<|im_end|>")}
    assert tokenizer.vocab_size == processor.vocab_size()


@pytest.mark.parametrize(
    "config", [{}, {"legacy": False}, {"legacy": True}, {"add_prefix_space": False}]
)
def test_where_a_folder_puts_spaces_is_as_in_transformers(folder, config):
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "LlamaTokenizer", **special, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder))
    ours = load_tokenizer_folder(folder)
    # Before a space theirs puts no other, and sentencepiece itself does.
    for text in ("Hello", "Hello<|im_end|>Hello  world</s>Hello", "<s>Hello"):
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_folder_adds_tokens_beside_the_model(folder, originals):
    size = originals["llama"].vocab_size()
    (folder / "added_tokens.json").write_text(json.dumps({"<think>": size, "<|eot_id|>": size + 1}))
    decoder = {
        str(size + 1): {"content": "<|eot_id|>", "special": True},
        str(size + 5): {"content": "<late>", "special": False},
    }
    config = {"added_tokens_decoder": decoder, "add_bos_token": False, "eos_token": "<|eot_id|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer_folder(folder)
    assert tokenizer.vocab_size == size + 6
    assert size + 1 in tokenizer.eos_ids
    ids = tokenizer.encode("<think><|eot_id|><late>")
    assert [i for i in ids if i >= size] == [size, size + 1, size + 5]
    plain = tokenizer.encode("<think><|eot_id|>", parse_special=False)
    assert size in plain
    assert size + 1 not in plain
    assert tokenizer.decode([size, size + 1, size + 2, size + 5]) == "<think><late>"


def converted(style):
    """A tokenizer.json of the kind that Llama 2, Gemma and T5-like models have."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), SPACE]
    pieces += [*"abehlorwd", "he", "ll", f"{SPACE}he", "lo"]
    merges = [("h", "e"), ("l", "l"), (SPACE, "he"), ("l", "o")]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", SPACE)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if style == "gemma":
        tokenizer.normalizer = spaces
        tokenizer.decoder = decoders.Sequence(steps)
    elif style == "llama":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces])
        tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=style)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme=style)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


@pytest.mark.parametrize("style", ["gemma", "llama", "always", "first", "never"])
@hypothesis.given(text=st.text(alphabet="hello world", max_size=16))
@hypothesis.settings(max_examples=40, **ANY_FOLDER)
def test_tokenizer_json_of_sentencepiece_origin(tmp_path, style, text):
    original = converted(style)
    original.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer_folder(tmp_path)
    ids = tokenizer.encode(text)
    assert ids == original.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == original.decode(ids)


@pytest.mark.parametrize("style", ["gemma", "llama"])
@hypothesis.given(text=st.text(max_size=16).filter(lambda text: SPACE not in text))
@hypothesis.settings(max_examples=40, **ANY_FOLDER)
def test_byte_fallback_of_tokenizer_json_round_trips(tmp_path, style, text):
    converted(style).save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer_folder(tmp_path)
    assert tokenizer.decode(tokenizer.encode(text, parse_special=False)) == text


TEMPLATE = (
    "{% for m in messages %}{{ '<s>' }}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
CONTENTS = st.lists(
    st.lists(st.sampled_from((*FRAGMENTS, "<s>", "<|im_end|>", "<unk>")), max_size=6).map("".join),
    min_size=3,
    max_size=3,
)


@pytest.mark.slow
@pytest.mark.parametrize("flavour", FLAVOURS)
@fuzz(examples=40, contents=CONTENTS)
def test_a_conversation_is_encoded_as_a_whole(originals, flavour, contents):
    processor = originals[flavour]
    metadata = gguf_metadata(processor, flavour) | {"tokenizer.chat_template": TEMPLATE}
    made = load_tokenizer_gguf(metadata, SOURCE)
    roles = ("user", "assistant", "user")
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
    # As if the messages did not know the control tokens' names.
    others = ChatTemplate(TEMPLATE.replace("<s>", "\0S").replace("<|im_end|>", "\0E"), origin="")
    ids = {"\0S": processor.bos_id(), "\0E": processor.piece_to_id("<|im_end|>")}

    def whole(text):
        parts = re.split("(\0S|\0E)", text)
        return [i for p in parts for i in ([ids[p]] if p in ids else processor.encode(p))]

    chat = made.render_chat(messages)
    assert made.encode_chat(chat) == whole(others.render(messages))
    known = len(made.render_chat(messages[:1]).text) + len(contents[1])
    rest = made.encode_chat(chat, after=known)  # begins with the end of the answer's turn
    text = others.render(messages)
    assert rest == whole(text[text.rindex("\0E", 0, text.rindex("\0Suser")) :])


def test_what_follows_an_answer_gets_no_space(originals):
    processor = originals["llama"]
    made = load_tokenizer_gguf(gguf_metadata(processor, "llama"), SOURCE)
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "world"}]
    messages += messages[:1]
    chat = made.render_chat(messages)  # without a template nothing stands between two turns
    known = chat.text.index("world") + len("world")
    rest = made.encode_chat(chat, after=known)
    assert made.spell(rest) == chat.text[known:]
    assert rest == made.encode_chat(chat)[-len(rest) :]


def test_what_is_unknown_is_no_control_token(protos):
    """It has the id of <unk>, which is one where somebody writes it."""
    original = processor_of(train_model(CORPUS, vocab_size=100))
    metadata = gguf_metadata(original, "squeezing")
    made = load_tokenizer_gguf(metadata, SOURCE)
    text = "Hello \u4dff fox, <unk> world"
    assert original.unk_id() in original.encode(text)
    assert made.encode(text, parse_special=False, add_special_tokens=False) == original.encode(text)
