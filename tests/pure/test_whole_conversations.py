"""Whole conversations as ids, against `tokenizers` over the whole text, whatever messages hold.

The oracle for messages that spell out control tokens is a twin of the tokenizer and the template in
which all control tokens have other names, which no message knows: so it sees plain text in them.
"""

import json
import unicodedata

import pytest
import tokenizers
import transformers
from fuzz import fuzz
from hypothesis import strategies as st
from tiny_tokenizers import CONTROL, PLAIN, STYLES, TEMPLATES, make
from transformers.utils import chat_template_utils

from edgekv.chat.values import ChatMessage
from edgekv.runtime.conversation import Conversation, Prompt, user_says
from edgekv.tokenizer import RenderedChat, load_tokenizer_folder

OTHER_NAMES = {text: f"⟦{index}⟧" for index, text in enumerate((*CONTROL, *PLAIN))}
CUT = ".split('</think>')[-1]"
FRAGMENTS = (
    *("Hello", " world", "12", "345", " ", "  ", "\n", "\n\n", "'s", "e\u0301", "é", "日本", "🙂"),
    *("x.", "!?", " $", "User:", "\u2581", "<", "|>", "im_end", "\ue000", "\ue001", "\ue002"),
    "<|IM_END|>",
    *CONTROL,
    *PLAIN,
)
CONTENTS = st.one_of(
    st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join), st.text(max_size=12)
)
CHATS = st.lists(CONTENTS, min_size=1, max_size=6)


class Pair:
    """A tokenizer of ours and the library's, with a template."""

    def __init__(self, folder, style, template):
        self.theirs, self.source = make(style), TEMPLATES[template]
        folder.mkdir()
        self.theirs.save(str(folder / "tokenizer.json"))
        (folder / "chat_template.jinja").write_text(self.source)
        self.ours = load_tokenizer_folder(folder)

    def encode(self, text):
        return self.theirs.encode(text, add_special_tokens=False)

    def other_names(self):
        """The tokenizer in which control tokens have names that no user knows, and a renderer."""
        written = {text for text in OTHER_NAMES if text in CONTROL or text in self.source}
        names = {text: OTHER_NAMES[text] for text in written}
        spec = json.loads(self.theirs.to_str())
        for token in spec["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])

        def renamed(text, *, only=OTHER_NAMES):
            for token, name in names.items():
                text = text.replace(token, name) if token in only else text
            return text

        def render(messages):
            source, said = self.source, []
            for message in messages:
                content = message["content"]
                if source == TEMPLATES["cutting"]:
                    content = content.split("</think>")[-1]
                if message["role"] == "assistant":  # which may say what is not special
                    content = renamed(content, only=PLAIN)
                said.append({**message, "content": content})
            return rendered_by_transformers(
                renamed(source.replace(CUT, "") if source == TEMPLATES["cutting"] else source),
                said,
                add_generation_prompt=True,
            )

        return tokenizers.Tokenizer.from_str(json.dumps(spec)), render


def messages_of(contents):
    return [
        {"role": ("user", "assistant")[index % 2], "content": content}
        for index, content in enumerate(contents)
    ]


def rendered_by_transformers(source, messages, **options):
    (text,), _ = chat_template_utils.render_jinja_template(
        [messages], chat_template=source, **options
    )
    return text


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("pairs"), {}

    def pair(style, template):
        if (style, template) not in made:
            made[style, template] = Pair(root / str(len(made)), style, template)
        return made[style, template]

    return pair


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
@fuzz(examples=40, contents=CHATS, template=st.sampled_from(sorted(TEMPLATES)))
def test_ids_are_those_of_the_whole(pairs, style, contents, template):
    check_whole(pairs(style, template), contents)


@pytest.mark.parametrize(
    ("style", "template", "contents"),
    [
        # The template strips what is behind the thoughts of an answer.
        ("qwen", "thinking", ["So?", "<think>\nhm\n</think>\n\n1 < 2", "</think>\n\nAnd?"]),
        # A mark is left of a message that was cut, beside white space that a token takes in.
        ("stripping left", "cutting", ["</think>"]),
        ("metaspace first", "bare", ["<|im_end|> first", "<|im_end|>"]),
    ],
)
def test_ids_are_those_of_the_whole_here_too(pairs, style, template, contents):
    check_whole(pairs(style, template), contents)


def check_whole(pair, contents):
    messages = messages_of(contents)
    chat = pair.ours.render_chat(messages)
    others, render = pair.other_names()
    text = render(messages)
    assert pair.ours.encode_chat(chat) == others.encode(text, add_special_tokens=False).ids
    if not chat.tainted:
        assert pair.ours.encode_chat(chat) == pair.encode(chat.text).ids


@pytest.mark.slow
@pytest.mark.parametrize("style", ["gpt2", "llama3", "qwen", "gemma", "metaspace never"])
@fuzz(examples=40, contents=CHATS, template=st.sampled_from(sorted(TEMPLATES)))
def test_messages_forge_what_they_forge_in_transformers(pairs, style, contents, template):
    """Which is nothing. It cuts texts at such tokens, so that other ids may not be equal."""
    pair = pairs(style, template)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=pair.theirs, chat_template=pair.source
    )
    messages = [{"role": "user", "content": content} for content in contents]
    expected = theirs.apply_chat_template(
        messages, add_generation_prompt=True, sanitize_control_tokens=True, return_dict=False
    )
    ids = pair.ours.encode_chat(pair.ours.render_chat(messages))
    added = pair.theirs.get_added_tokens_decoder()
    assert [i for i in ids if i in added] == [i for i in expected if i in added]
    assert pair.ours.spell(ids) == pair.ours.spell(expected)


def as_it_is(text):
    return ChatMessage(role="assistant", content=text)


ANSWERED = 10**6  # ids of an answer, which no tokenizer gives


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
@fuzz(examples=40, contents=CHATS, template=st.sampled_from(sorted(TEMPLATES)))
def test_what_follows_an_answer_has_the_ids_of_the_whole(pairs, style, contents, template):
    pair = pairs(style, template)
    others, render = pair.other_names()
    conversation, said, known = Conversation(), [], 0
    for question, answer in zip(contents[::2], [*contents[1::2], ""], strict=False):
        if pair.ours.vocabulary.leading_space:
            answer = answer.strip(" ")  # see below
        prompt = conversation.prompt(pair.ours, question)
        said.append({"role": "user", "content": question})
        text = render(said)
        spoken = conversation.spoken
        if spoken is None or not prompt.text.startswith(spoken.text):
            assert list(prompt.ids) == others.encode(text, add_special_tokens=False).ids
        elif prompt.text != pair.ours.render_chat(said).text:  # which trims or cuts an answer
            assert prompt.ids[: len(spoken.ids)] == spoken.ids
            check_end(pair, prompt.ids[len(spoken.ids) :], others.encode(text).ids)
        else:
            assert prompt.ids[: len(spoken.ids)] == spoken.ids
            rest = list(prompt.ids[len(spoken.ids) :])
            check_rest(pair, rest, others.encode(text, add_special_tokens=False), text, known)
        said.append({"role": "assistant", "content": answer})
        known = len(text) + len(answer)
        said_ids = Prompt(text=answer, ids=(ANSWERED,) * len(answer))
        asked = conversation.with_user(question)
        conversation = conversation.after(asked, prompt, as_it_is(answer), said_ids)


def check_end(pair, rest, whole):
    """From its first added token on `rest` is the end of `whole`."""
    added = pair.theirs.get_added_tokens_decoder()
    first = next((at for at, token_id in enumerate(rest) if token_id in added), len(rest))
    assert list(rest[first:]) == whole[len(whole) - (len(rest) - first) :]


def check_rest(pair, rest, whole, text, known):
    """`rest` is what `whole` has behind `known` characters of `text`."""
    tokens = [
        (token_id, start, end)
        for token_id, (start, end) in zip(whole.ids, whole.offsets, strict=True)
        if end > known or start >= known
    ]
    across = [token for token in tokens if token[1] < known]
    expected = [token_id for token_id, start, _ in tokens if start >= known]
    assert expected == rest[len(rest) - len(expected) :]
    begun = rest[: len(rest) - len(expected)]
    if across and across[-1][0] in pair.theirs.get_added_tokens_decoder() and across[-1][0]:
        # It took white space in, before it or behind it.
        token_id, _, end = across[-1]
        assert begun == ([token_id] if text[known:end].strip() else [])
        return
    # Plain text, before which nobody put a space.
    end = tokens[len(across)][1] if expected else len(text)
    if 0 not in begun:  # an unknown character
        spelled = pair.ours.spell(begun)
        normal = unicodedata.normalize("NFC", text[known:end])
        assert spelled in (text[known:end], normal, normal.lower()) if across else not begun


@pytest.mark.parametrize(
    ("template", "writes"),
    [("llama2", " Hello "), ("tight", "Hello")],
)
def test_a_space_that_an_answer_begins_with_is_the_templates_or_nobodys(pairs, template, writes):
    """Of answers of such tokenizers a space is taken away; some templates write it again."""
    pair = pairs("llama2", template)
    ids = tuple(pair.encode("Hello").ids)
    assert pair.ours.decode(ids) == "Hello"
    assert pair.ours.spell(ids) == " Hello"
    asked = Conversation().prompt(pair.ours, "Hi")
    said = Prompt(text=pair.ours.spell(ids), ids=ids)
    answered = Conversation().after((user_says("Hi"),), asked, as_it_is("Hello"), said)
    again = answered.prompt(pair.ours, "So?")
    assert f"{asked.text}{writes}" in again.text
    assert again.ids[: len(asked.ids) + len(ids)] == (*asked.ids, *ids)
    rest = again.ids[len(asked.ids) + len(ids) :]
    whole = pair.encode(again.text)
    behind = len(asked.text) + len(writes.rstrip())
    assert list(rest) == [
        i for i, (start, _) in zip(whole.ids, whole.offsets, strict=True) if start >= behind
    ]


def rest_of(pair, text, known):
    return pair.ours.encode_chat(RenderedChat(text=text), after=known)


@pytest.mark.parametrize("style", ["llama3", "llama2", "metaspace always", "gpt2, prefix"])
def test_a_token_on_both_sides_of_the_end_of_an_answer(tmp_path, style):
    tokenizer = make(style)
    spec = json.loads(tokenizer.to_str())
    end = {"llama3": "ĊĊ", "gpt2, prefix": "ĊĊ"}.get(style, "\n\n")
    for token in (end[0], end, f".{end}"):
        spec["model"]["vocab"].setdefault(token, len(spec["model"]["vocab"]) + 7)
    spec["model"]["merges"] = [[end[0], end[0]], [".", end], *spec["model"]["merges"]]
    spec["added_tokens"] = []
    if style == "gpt2, prefix":  # in which a full stop is no word of its own
        spec["pre_tokenizer"]["use_regex"] = False
    theirs = tokenizers.Tokenizer.from_str(json.dumps(spec))
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer_folder(tmp_path)
    text = "Assistant: Hello.\n\nUser: x"
    whole = theirs.encode(text)
    assert theirs.token_to_id(f".{end}") in whole.ids
    chat = RenderedChat(text=text)
    rest = ours.encode_chat(chat, after=text.index("\n\n"))
    (at,) = (i for i, (start, _) in enumerate(whole.offsets) if start == text.index("User"))
    assert rest == [theirs.token_to_id(end), *whole.ids[at:]]
    # Where a token of the whole begins there, it is the whole's.
    assert ours.encode_chat(chat, after=text.index("User")) == whole.ids[at:]


def test_white_space_that_an_added_token_takes_in(pairs):
    left = pairs("stripping left", "chatml")
    end, start = (left.theirs.token_to_id(text) for text in ("<|im_end|>", "<|im_start|>"))
    text = "<|im_start|>Hello \n<|im_end|>"
    assert left.encode(text).ids[-1] == end
    assert rest_of(left, text, text.index(" ")) == [end]
    assert rest_of(left, text, text.index("\n")) == [end]
    right = pairs("phi, stripping right", "chatml")
    text = "<|im_start|> \n<|im_end|>"
    assert right.encode(text).ids == [start, end]
    assert rest_of(right, text, text.index("\n")) == [end]


def test_what_the_model_makes_of_plain_text_is_spelled_letter_by_letter(tmp_path):
    """A vocabulary may hold a control token's text as a word: Unigram ones do."""
    make("unigram first").save(str(tmp_path / "tokenizer.json"))
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    token_id = next(t["id"] for t in spec["added_tokens"] if t["content"] == "<|im_end|>")
    vocabulary = spec["model"]["vocab"]
    for token in spec["added_tokens"]:
        while len(vocabulary) <= token["id"]:
            vocabulary.append([f"unused {len(vocabulary)}", -99.0])
        vocabulary[token["id"]] = [token["content"], -1.0]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "chat_template.jinja").write_text(TEMPLATES["chatml"])
    ours = load_tokenizer_folder(tmp_path)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(spec))
    assert token_id in [token.id for token in theirs.model.tokenize("x<|im_end|>")]
    chat = ours.render_chat([{"role": "user", "content": "x<|im_end|>y"}])
    assert ours.encode_chat(chat).count(token_id) == 1
