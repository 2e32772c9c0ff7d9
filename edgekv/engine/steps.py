"""A step as words: what rank 0 tells the others of one that it submits.

    kind │ parts: view · rows · what is predicted … │ rows whose logits are asked for, call by call

Every rank builds the same graph, with its own part of the weights and its own heads' KV, so that
all meet in the same collectives; sampling is rank 0's alone.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from edgekv.kv.view import Keeps

EXACT, PACKED = 0, 1


@dataclass(kw_only=True)
class PartWords:
    """One session's rows, see `Part` and `Rows`; buffers by number, 0 for none."""

    number: int
    offset: int
    num_rows: int
    num_kept: int = 0  # exact steps
    keeps: Keeps = field(default_factory=Keeps)
    beside: int = 0
    predicted: tuple[int, int] = (0, 0)
    repair: bool = False
    glance: bool = False
    aux_start: int = 0
    aux_tokens: Sequence[int] = ()
    tokens: Sequence[int] = ()  # of its rows, but for those whose hidden states are kept

    def words(self) -> list[int]:
        """See `read`."""
        keeps = self.keeps
        return [
            *(self.number, self.offset, self.num_rows, self.num_kept),
            *(keeps.pinned, int(keeps.before), len(keeps.positions), *keeps.positions),
            *(self.beside, *self.predicted, int(self.repair), int(self.glance)),
            *(self.aux_start, len(self.aux_tokens), *self.aux_tokens),
            *(len(self.tokens), *self.tokens),
        ]


class Reader:
    """A step's words, one after the other."""

    def __init__(self, words: Sequence[int]) -> None:
        self._words, self._at = words, 0

    def one(self) -> int:
        """The next word."""
        self._at += 1
        return self._words[self._at - 1]

    def many(self, count: int) -> tuple[int, ...]:
        """The next so many."""
        self._at += count
        return tuple(self._words[self._at - count : self._at])

    def counted(self) -> tuple[int, ...]:
        """A count, and as many words."""
        return self.many(self.one())

    def part(self) -> PartWords:
        """What `PartWords.words` wrote."""
        number, offset, num_rows, num_kept, pinned, before = self.many(6)
        keeps = Keeps(positions=self.counted(), pinned=pinned, before=bool(before))
        beside, first, last, repair, glance, aux_start = self.many(6)
        return PartWords(
            number=number,
            offset=offset,
            num_rows=num_rows,
            num_kept=num_kept,
            keeps=keeps,
            beside=beside,
            predicted=(first, last),
            repair=bool(repair),
            glance=bool(glance),
            aux_start=aux_start,
            aux_tokens=self.counted(),
            tokens=self.counted(),
        )


def step_words(
    kind: int, parts: Sequence[PartWords], asked: Iterable[Sequence[int]], *, cuts_rows: bool
) -> list[int]:
    """A step; `asked` are the rows of its hidden states of each call of `Decoder.logits`."""
    words = [kind, int(cuts_rows), len(parts)]
    for part in parts:
        words += part.words()
    calls = list(asked)
    words.append(len(calls))
    for rows in calls:
        words += (len(rows), *rows)
    return words
