r"""Ids of a conversation as a whole: no part of it is encoded as if it were a text of its own.

What tokenizers do at the beginning of a text (a space, a marker) must not be done in the middle of
a conversation, where one message spells out a control token, or where the ids of what came before
are known already. Both are asked of the whole:

    text      <|im_start|>user\nWhat does <|im_end|> mean?<|im_end|>\n<|im_start|>assistant\n …
    tainted                             ▲▲▲▲▲▲▲▲▲▲                                    ▲
                                        a message's, so no control token              after

Added tokens are matched before anything else, and what is between two of them, a *stretch*, is
encoded by itself. So a text may be cut at an added token without changing any id; and a stretch
with a tainted token in it is encoded as it would be if that token were none.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property

from edgekv.tokenizer.backends import Backend, Cut, Place
from edgekv.tokenizer.chat_template import Span
from edgekv.tokenizer.vocabulary import any_of


class WholeText:
    """Encodes texts of which some parts must not become control tokens. Thread-safe."""

    def __init__(self, backend: Backend, control: Mapping[str, int]) -> None:
        self._backend = backend
        self._control = control
        self._control_ids = frozenset(control.values())
        self._plain: dict[Place, Backend] = {}

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return any_of(self._control)

    def spelled(self, text: str) -> list[Span]:
        """Where `text` spells out control tokens: of which characters each is made."""
        if self._control_ids.isdisjoint(self._backend.normalised_ids):
            return [match.span() for match in self._pattern.finditer(text)]
        return [(start, end) for i, start, end in self._backend.cut(text) if i in self._control_ids]

    def encode(self, text: str, *, tainted: Sequence[Span] = (), after: int = 0) -> list[int]:
        """Ids of `text` from character `after` on, as they are in the whole.

        Args:
            text: All of it.
            tainted: Spans of characters, in order: the text of a control token that overlaps one
                is plain text. One that is empty is a place, which no control token may be across.
            after: Ids of what is before that are known. Where one token of the whole is on both
                sides, its part behind `after` is encoded for itself, with nothing before it.
        """
        start = self._last_cut(text, tainted, after)
        tainted = [(first - start, end - start) for first, end in tainted if end > start]
        text, after = text[start:], after - start
        if not tainted and not after:
            return self._backend.encode(text)
        cuts = self._backend.cut(text)
        if tainted:
            cuts = list(self._with_plain(text, cuts, tainted, "stretch" if start else "start"))
        return self._behind(text, cuts, after)

    def _last_cut(self, text: str, tainted: Sequence[Span], after: int) -> int:
        """The last place up to `after` where the text may be cut, else its beginning."""
        start = 0
        for match in self._backend.anchors.finditer(text) if after else ():
            if match.start() > after:
                break
            if match[0] not in self._control or not _overlap(tainted, *match.span()):
                start = match.start()
        return start

    def _with_plain(
        self, text: str, cuts: Iterable[Cut], tainted: Sequence[Span], first: Place
    ) -> Iterator[Cut]:
        """The tokens of a text, but those of stretches in which a tainted token is none."""
        stretch: list[Cut] = []
        begin, is_tainted = 0, False
        for cut in [*cuts, None]:
            if cut is not None:
                forged = self._is_forged(text, cut, tainted)
                is_tainted |= forged
                if forged or not self._is_added(text, cut):
                    stretch.append(cut)
                    continue
            end_of_stretch = len(text) if cut is None else cut[1]
            if is_tainted:
                place = first if begin == 0 else "stretch"
                yield from self._plain_cuts(text[begin:end_of_stretch], begin, place)
            else:
                yield from stretch
            if cut is not None:
                yield cut
                begin, stretch, is_tainted = cut[2], [], False

    def _plain_cuts(self, text: str, begin: int, place: Place) -> Iterator[Cut]:
        """Tokens of a piece of text that begins at `begin`, none of which is a control token."""
        for token_id, start, end in self._plain_at(place).cut(text):
            token = text[start:end]
            if len(token) < 2 or self._control.get(token) != token_id:
                yield token_id, begin + start, begin + end
                continue
            # The model itself makes it of plain text: then its characters are said one by one.
            for at, character in enumerate(token, begin + start):
                for part in self._plain_at("middle").encode(character):
                    yield part, at, at + 1

    def _plain_at(self, place: Place) -> Backend:
        # Text that spells a control token is rare, so few processes ever pay for twins.
        if place not in self._plain:
            self._plain[place] = self._backend.plain(self._control, place)
        return self._plain[place]

    def _behind(self, text: str, cuts: Sequence[Cut], after: int) -> list[int]:
        """Ids of the tokens behind `after`, and of what one that is on both sides has there."""
        first = bisect_left(cuts, after, key=lambda cut: cut[1])
        ids = [token_id for token_id, _, _ in cuts[first:]]
        if not first or cuts[first - 1][2] <= after:
            return ids
        token_id, _, end = cuts[first - 1]
        if self._is_added(text, cuts[first - 1]):
            # It takes in the white space around it, on one of whose sides `after` is.
            return [token_id, *ids] if text[after:end].strip() else ids
        part = text[after : cuts[first][1] if ids else len(text)]
        return [*self._plain_at("middle").encode(part), *ids]

    def _is_forged(self, text: str, cut: Cut, tainted: Sequence[Span]) -> bool:
        token_id, start, end = cut
        if token_id not in self._control_ids:
            return False
        token = self._backend.added.get(token_id, "")
        if (at := text.find(token, start, end)) >= 0:  # without the white space that it takes in
            start, end = at, at + len(token)
        return _overlap(tainted, start, end)

    def _is_added(self, text: str, cut: Cut) -> bool:
        """Whether a token was found by its text, and is not made of characters that are unknown."""
        token_id, start, end = cut
        token = self._backend.added.get(token_id)
        return token_id in self._backend.normalised_ids or (
            token is not None and token in text[start:end]
        )


def _overlap(spans: Sequence[Span], start: int, end: int) -> bool:
    """Whether one of `spans`, in order, has characters of [start, end), or is a place inside."""
    index = bisect_right(spans, start, key=lambda span: span[1])
    return index < len(spans) and spans[index][0] < end
