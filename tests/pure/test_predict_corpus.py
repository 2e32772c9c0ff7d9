"""Text to fit on: mixed, cut, repeated, without end."""

import itertools

import pytest

from edgekv.errors import ConfigError
from edgekv.predict.corpus import corpus_files, held_out_files, sequences


class Letters:
    """A tokenizer of characters."""

    def encode(self, text, **_):
        return [ord(c) for c in text]


def pieces(texts, num_tokens, length, **options):
    return list(sequences(texts, Letters(), num_tokens=num_tokens, length=length, **options))


def test_pieces_are_of_one_length_and_begin_anew(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefghij" * 5)
    found = pieces([tmp_path / "a.txt"], 400, 40)
    assert [len(piece) for piece in found] == [40] * 10
    assert "".join(map(chr, found[0])) == "abcdefghij" * 4


def test_every_fourth_piece_ends_in_a_passage_that_it_began_with(tmp_path):
    (tmp_path / "a.txt").write_text("".join(chr(200 + i) for i in range(1000)))
    found = pieces([tmp_path / "a.txt"], 480, 20)
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
    assert found == pieces([tmp_path / "a.txt"], 480, 20)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_a_share_is_code(tmp_path, share):
    (tmp_path / "a.txt").write_text("\0" * 5000)
    found = pieces([tmp_path / "a.txt"], 2000, 100, stdlib_share=share)
    assert sum(0 not in piece for piece in found) == round(share * 20)


def test_without_files_it_is_the_standard_library():
    found = list(itertools.islice(sequences((), Letters(), num_tokens=1 << 20, length=500), 8))
    assert all(len(piece) == 500 for piece in found)
    assert not set(corpus_files(())) & set(held_out_files(()))
    assert len(held_out_files(())) > 10


def test_files_that_are_missing_or_too_short_are_named(tmp_path):
    with pytest.raises(ConfigError, match="nothing"):
        corpus_files([tmp_path / "nothing"])
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(ConfigError, match=r"short\.txt"):
        pieces([tmp_path / "short.txt"], 100, 50)
