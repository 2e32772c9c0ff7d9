"""Text to fit on: mixed, cut, repeated, without end."""

import itertools

import pytest

from edgekv.errors import ConfigError
from edgekv.predict.fit.corpus import Corpus, text_files


class Letters:
    """A tokenizer of characters."""

    def encode(self, text, **_):
        return [ord(c) for c in text]


def pieces(texts, num_pieces, length, *, stdlib_share=0.0, **options):
    corpus = Corpus(texts=tuple(texts), stdlib_share=stdlib_share)
    return list(itertools.islice(corpus.pieces(Letters(), length, **options), num_pieces))


def test_pieces_are_of_one_length_and_begin_anew(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefghij" * 5)
    found = pieces([tmp_path / "a.txt"], 10, 40)
    assert [len(piece) for piece in found] == [40] * 10
    assert "".join(map(chr, found[0])) == "abcdefghij" * 4


def test_every_fourth_piece_ends_in_a_passage_that_it_began_with(tmp_path):
    (tmp_path / "a.txt").write_text("".join(chr(200 + i) for i in range(1000)))
    found = pieces([tmp_path / "a.txt"], 24, 20)
    ends = set()
    for number, piece in enumerate(found):
        said_twice = 20 - len(set(piece))
        assert (said_twice > 0) == (number % 4 == 3)
        if said_twice:
            start = piece.index(piece[-said_twice])
            assert piece[start : start + said_twice] == piece[-said_twice:]
            assert start + said_twice <= 10
            ends.add((start, said_twice))
    assert len(ends) > 1
    assert found == pieces([tmp_path / "a.txt"], 24, 20)
    assert all(len(set(p)) == 20 for p in pieces([tmp_path / "a.txt"], 24, 20, repeats=False))


def test_what_is_held_out_is_never_among_the_others(tmp_path):
    """However often the text is gone through."""
    text = "".join(chr(200 + i) for i in range(20_000))
    (tmp_path / "a.txt").write_text(text)
    size = (tmp_path / "a.txt").stat().st_size
    seen = [
        {
            token
            for piece in pieces([tmp_path / "a.txt"], 3 * size // 20, 20, held_out=h)
            for token in piece
        }
        for h in (False, True)
    ]
    both = seen[0] & seen[1]
    assert len(both) <= 1  # a character that a cut went through reads as a replacement
    assert 0.01 < len(seen[1]) / len(text) < 0.15
    assert len(seen[0] | seen[1]) > 0.98 * len(text)


def test_beside_other_files_the_same_is_held_out(tmp_path):
    size = 300_000  # characters of four bytes, all different
    for start, name in ((0x10000, "a.txt"), (0x60000, "b.txt")):
        (tmp_path / name).write_text("".join(chr(start + i) for i in range(size)))

    def held(*names):
        found = pieces([tmp_path / n for n in names], 4000, 20, held_out=True, repeats=False)
        return {token for piece in found for token in piece if token < 0x60000}

    alone = held("a.txt")
    assert 0.01 < len(alone) / size < 0.15
    assert held("b.txt", "a.txt") == alone


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_a_share_is_code(tmp_path, share):
    (tmp_path / "a.txt").write_text("\0" * 5000)
    found = pieces([tmp_path / "a.txt"], 20, 100, stdlib_share=share)
    assert sum(0 not in piece for piece in found) == round(share * 20)


def test_without_files_it_is_the_standard_library():
    found = pieces((), 8, 500)
    assert all(len(piece) == 500 for piece in found)
    held_out = text_files((), held_out=True)
    assert not set(text_files(())) & set(held_out)
    assert len(held_out) > 10


def test_files_that_are_missing_or_too_short_are_named(tmp_path):
    with pytest.raises(ConfigError, match="nothing"):
        text_files([tmp_path / "nothing"])
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(ConfigError, match=r"short\.txt"):
        pieces([tmp_path / "short.txt"], 2, 50)
