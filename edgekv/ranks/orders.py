"""What rank 0 does to KV and has computed, as words that the other ranks carry out.

    rank 0:  pool, sessions, I/O, steps ──add──▶ Orders ──one array a step──▶ others: `decoded`

Everything that decides is done by rank 0 alone. What it decides on comes down to a few verbs about
numbered buffers, and each rank has as many buffers, of as many heads of its own, so that what one
does to its own the others can repeat.
"""

from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum, auto

import numpy as np
from xxhash import xxh3_64, xxh3_64_intdigest

WORDS_MAX = 1 << 30  # of what is told at once; more is a bug


class Verb(IntEnum):
    """What is to be done; the words behind it, `n` being buffers by number."""

    OPEN = auto()  # text: what to load, as JSON
    END = auto()  # the runtime has ended
    LEAVE = auto()  # rank 0 ends, and so do all
    REST = auto()  # until rank 0 wakes all
    # Memory.
    ALLOCATE = auto()  # pool, n, capacity
    READY = auto()  # n: the next layer gets memory
    GROW = auto()  # n, capacity, tokens that stay
    RELEASE = auto()  # n
    TRIM = auto()  # pool, bytes in two words
    CUT = auto()  # n, tokens that stay
    ROLL = auto()  # n
    BASE = auto()  # n, the token of the first slot of layers with a window
    TAKE = auto()  # n, another n, tokens it has then
    # What a session keeps beside its KV while some of it is predicted.
    TRAIL = auto()  # n: what it remembers of the last rows is forgotten
    # Disk.
    SESSION = auto()  # key, whether it persists, app and name as text
    GATHER = auto()  # slot of staging, n, start, end, whether with the state behind them
    UNGATHER = auto()  # slot
    WRITE = auto()  # job, key, how many writes; of each: slot, start, number of tokens, tokens
    # job, key, n, bytes of a state, how many records; of each: start, end, use_end, and a hash of
    # all tokens up to there, two words
    READ = auto()
    ARRIVED = auto()  # n, tokens, job whose state is the one behind them or -1
    STORE_CUT = auto()  # key, tokens that stay
    STORE_ADOPT = auto()  # key, key of the donor, tokens
    STORE_FORGET = auto()  # app and name as text
    STORE_KEEP = auto()  # hashes of the sessions that there are, two words each
    # Computing.
    STEP = auto()  # see `engine/steps.py`


class Orders:
    """What was done since it was told last, in order. Owned by the engine thread of rank 0."""

    def __init__(self) -> None:
        self.words: list[int] = []
        self._last_number = 0

    def number(self) -> int:
        """A number for new buffers."""
        self._last_number += 1
        return self._last_number

    def add(self, verb: Verb, *words: int) -> None:
        """Note something that was done."""
        self.words += (verb, len(words), *words)

    def take(self) -> list[int]:
        """What is to be told now."""
        words, self.words = self.words, []
        assert len(words) < WORDS_MAX
        return words


class NoOrders(Orders):
    """Of who is alone: nothing is noted."""

    def number(self) -> int:
        """Nobody asks."""
        return 0

    def add(self, verb: Verb, *words: int) -> None:
        """Nobody is told."""


NO_ORDERS = NoOrders()


def decoded(words: Sequence[int]) -> Iterator[tuple[Verb, list[int]]]:
    """Orders in order, each a verb and its words."""
    at = 0
    while at < len(words):
        verb, count = words[at], words[at + 1]
        at += 2 + count
        yield Verb(verb), list(words[at - count : at])


def from_text(text: str) -> list[int]:
    """A text as words: how many bytes, and these, four a word."""
    data = text.encode("utf-8", "surrogatepass")
    padded = np.frombuffer(data + bytes(-len(data) % 4), np.int32)
    return [len(data), *padded.tolist()]


def to_text(words: Sequence[int], at: int = 0) -> tuple[str, int]:
    """The text that begins at a word, and where the next word is."""
    num_bytes = words[at]
    end = at + 1 + -(-num_bytes // 4)
    data = np.array(words[at + 1 : end], np.int32).tobytes()[:num_bytes]
    return data.decode("utf-8", "surrogatepass"), end


def from_int(value: int) -> tuple[int, int]:
    """A number of up to 62 bits as two words."""
    return value >> 31, value & 0x7FFFFFFF


def to_int(high: int, low: int) -> int:
    """The number that two words are."""
    return high << 31 | low


def name_hash(app: str, name: str) -> int:
    """Of an app's session, 62 bits."""
    return xxh3_64_intdigest(f"{app}\0{name}".encode("utf-8", "surrogatepass")) >> 2


def prefix_hashes(token_ids: Sequence[int], ends: Iterable[int]) -> list[int]:
    """Of the tokens up to each of these ends, which ascend: 62 bits."""
    hashed, start, hashes = xxh3_64(), 0, []
    for end in ends:
        hashed.update(np.array(token_ids[start:end], np.uint32).tobytes())
        hashes.append(hashed.intdigest() >> 2)
        start = end
    return hashes
