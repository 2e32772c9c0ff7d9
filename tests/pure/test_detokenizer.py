"""The incremental detokenizer and the stop matcher, each against a naive twin."""

import hypothesis
import pytest
from hypothesis import strategies as st

from edgekv.config import SamplingParams
from edgekv.errors import ConfigError
from edgekv.tokenizer import IncrementalDetokenizer, StopMatcher, Tokenizer
from edgekv.tokenizer.vocabulary import Vocabulary

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
END, WORD, SPACED = 256, 257, 258


def vocabulary(*, leading_space=False):
    """Every byte as a token, an end token, and two words."""
    return Vocabulary(
        tokens=[*BYTES, "<|im_end|>", "word", "\N{LOWER ONE EIGHTH BLOCK}word", None],
        scheme="sentencepiece",
        hidden_ids=frozenset({END}),
        leading_space=leading_space,
    )


def decode(vocabulary, ids):
    tokenizer = Tokenizer(
        backend=None,
        vocabulary=vocabulary,
        bos_id=None,
        eos_ids=frozenset(),
        prefix_ids=(),
        chat_template=None,
        fingerprint="",
        sampling=SamplingParams(),
        warnings=(),
    )
    return tokenizer.decode(ids)


TEXT_IDS = st.text(max_size=12).map(lambda text: list(text.encode()))
ANY_IDS = st.lists(st.integers(0, 262), max_size=24)


@pytest.mark.parametrize("leading_space", [False, True])
@hypothesis.given(ids=st.one_of(TEXT_IDS, ANY_IDS))
@hypothesis.settings(derandomize=True, max_examples=200, deadline=None)
def test_pieces_joined_equal_decode(leading_space, ids):
    words = vocabulary(leading_space=leading_space)
    detokenizer = IncrementalDetokenizer(words)
    pieces = [detokenizer.push(token_id) for token_id in ids]
    assert "".join(pieces) + detokenizer.flush() == decode(words, ids)


@hypothesis.given(text=st.text(max_size=12))
@hypothesis.settings(derandomize=True, max_examples=100, deadline=None)
def test_every_character_comes_with_its_last_byte_and_whole(text):
    detokenizer = IncrementalDetokenizer(vocabulary())
    for character in text:
        *first, last = character.encode()
        assert [detokenizer.push(byte) for byte in first] == [""] * len(first)
        assert detokenizer.push(last) == character
    assert detokenizer.flush() == ""


def test_unfinished_character_becomes_a_replacement_at_the_end():
    detokenizer = IncrementalDetokenizer(vocabulary())
    assert [detokenizer.push(byte) for byte in "🙂".encode()[:3]] == ["", "", ""]
    assert detokenizer.flush() == "\ufffd"


def test_broken_character_shows_as_soon_as_it_is_known():
    detokenizer = IncrementalDetokenizer(vocabulary())
    assert detokenizer.push(0xF0) == ""
    assert detokenizer.push(WORD) == "\ufffdword"


def test_control_tokens_and_ids_without_token_show_nothing():
    detokenizer = IncrementalDetokenizer(vocabulary())
    assert [detokenizer.push(i) for i in (END, 259, 10**9, -1, WORD)] == ["", "", "", "", "word"]


def test_only_the_first_space_is_dropped():
    detokenizer = IncrementalDetokenizer(vocabulary(leading_space=True))
    assert [detokenizer.push(SPACED) for _ in range(2)] == ["word", " word"]


# Few letters, so that stops overlap themselves and one another.
LETTERS = st.text(alphabet="ab", max_size=14)
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=4)


def naive_stop(stops, text):
    """The text before the stop that is complete first (the longest of those), and that stop."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end - len(stop)], stop
    return text, None


def naive_held(stops, text):
    """The longest suffix of `text` that begins a stop."""
    sizes = range(len(text) + 1)
    return max(n for n in sizes if not n or any(s.startswith(text[-n:]) for s in stops))


@hypothesis.given(stops=STOPS, pieces=st.lists(LETTERS, max_size=6))
@hypothesis.settings(derandomize=True, max_examples=200, deadline=None)
def test_stop_matcher_equals_naive_search(stops, pieces):
    matcher = StopMatcher(stops)
    shown, seen, matched = "", "", None
    for piece in pieces:
        safe, matched = matcher.push(piece)
        shown, seen = shown + safe, seen + piece
        if matched is not None:
            break
        assert len(seen) - len(shown) == naive_held(stops, seen)
    assert (shown + matcher.flush(), matched) == naive_stop(stops, "".join(pieces))


def test_stop_spans_tokens_and_false_starts_are_shown():
    matcher = StopMatcher(["\n\nUser:"])
    assert matcher.push("Hi\n") == ("Hi", None)
    assert matcher.push("\nUs") == ("", None)
    assert matcher.push("ual\n") == ("\n\nUsual", None)
    assert matcher.push("\nUser: no") == ("", "\n\nUser:")
    assert matcher.push("more") == ("", "\n\nUser:")
    assert matcher.flush() == ""


def test_stop_that_is_complete_first_wins():
    assert StopMatcher(["abcd", "bc"]).push("xabcd") == ("xa", "bc")
    assert StopMatcher(["bc", "abc"]).push("xabc") == ("x", "abc")


def test_without_stops_everything_is_safe():
    matcher = StopMatcher([])
    assert matcher.push("anything") == ("anything", None)
    assert matcher.flush() == ""


def test_empty_stop_is_refused():
    with pytest.raises(ConfigError):
        StopMatcher(["x", ""])


def test_long_repetitive_stop_is_linear():
    stop = "a" * 1023 + "b"
    matcher = StopMatcher([stop] * 16)
    text = "a" * 4096
    assert matcher.push(text) == ("a" * (4096 - 1023), None)
    assert matcher.push("b") == ("", stop)
