"""The store against a dictionary: any sequence of calls, restarts and crashes."""

import copy
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from tiny_store import MIB, open_store, tokens, verify_all, write

from edgekv.errors import StoreFull, StoreStale

PLACES = st.sampled_from([(app, name) for app in ("mail", "notes") for name in "abcd"])
ROOMY, SCARCE = 64 * MIB, MIB

# What a session has: token ids, conversation.
Model = dict[tuple[str, str], tuple[list[int], str | None]]


def shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Leading elements that two sequences share, one by one."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


class StoreMachine(RuleBasedStateMachine):
    """Sessions called "d" do not persist."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="edgekv-machine-"))
        self.num_lives = 0
        self.model: Model = {}
        self.committed: Model = {}

    @initialize(
        disk_bytes=st.sampled_from([ROOMY, SCARCE]),
        lengths=st.lists(st.tuples(PLACES, st.integers(1, 900)), min_size=2, max_size=8),
    )
    def begin(self, disk_bytes: int, lengths: list[tuple[tuple[str, str], int]]) -> None:
        self.disk_bytes = disk_bytes
        self._open()
        for place, num_tokens in lengths:
            self.write(place, num_tokens, seed=num_tokens % 3, back=num_tokens % 7)

    def _open(self) -> None:
        self.store = open_store(self.folder / str(self.num_lives), disk_bytes=self.disk_bytes)
        assert self.store.snapshot().num_records_lost == 0
        assert self.store.snapshot().num_index_lost == 0

    def _commit(self) -> None:
        self.committed = {
            place: copy.deepcopy(kept) for place, kept in self.model.items() if place[1] < "d"
        }

    def _key(self, place: tuple[str, str]) -> int:
        """The session's key; it is made if it is not there, as any caller would."""
        stored = self.store.session(*place, persistent=place[1] < "d")
        ids, said = self.model.setdefault(place, ([], None))
        assert stored.conversation == said
        self.model[place] = (ids[: stored.num_tokens], said)  # the rest was evicted
        return stored.key

    @rule(
        place=PLACES,
        num_tokens=st.integers(1, 1500),
        seed=st.integers(0, 3),
        back=st.integers(0, 300),
    )
    def write(self, place: tuple[str, str], num_tokens: int, seed: int, back: int) -> None:
        key = self._key(place)
        ids, said = self.model[place]
        ids = ids[: max(len(ids) - back, 0)]
        longer = ids + tokens(num_tokens, seed)
        self.model[place] = (ids, said)
        try:
            event("write")
            write(self.store, key, longer, start=len(ids))
        except StoreFull:
            assert self.disk_bytes == SCARCE
        else:
            self.model[place] = (longer, said)
            self._commit()

    @rule(place=PLACES, num_tokens=st.integers(0, 1500))
    def truncate(self, place: tuple[str, str], num_tokens: int) -> None:
        key = self._key(place)
        self.store.truncate(key, num_tokens)
        self.model[place] = (self.model[place][0][:num_tokens], self.model[place][1])

    @rule(place=PLACES, extra=st.integers(0, 50))
    def match_and_adopt(self, place: tuple[str, str], extra: int) -> None:
        """A session takes what another one of its app has of its prompt."""
        key = self._key(place)
        prompt = self.model[place][0] + tokens(extra, seed=0)
        donor, common = self.store.match(place[0], prompt, but_not=key)
        others = [s for s in self.store.sessions() if s.app == place[0] and s.key != key]
        assert common == max([shared(s.token_ids, prompt) for s in others], default=0)
        if donor and common > len(self.model[place][0]):
            assert self.store.adopt(key, donor, common) == common
            self.model[place] = (prompt[:common], self.model[place][1])

    @rule(place=PLACES, text=st.text(alphabet=st.characters(codec="utf-8"), max_size=30))
    def say(self, place: tuple[str, str], text: str) -> None:
        key = self._key(place)
        self.store.set_conversation(key, text)
        if place[1] < "d":
            self.model[place] = (self.model[place][0], text)
            self._commit()

    @rule(place=PLACES)
    def remove(self, place: tuple[str, str]) -> None:
        key = self._key(place)
        self.store.remove(key)
        del self.model[place]
        if place[1] < "d":
            self._commit()
        with pytest.raises(StoreStale):
            write(self.store, key, [1])

    @rule(place=PLACES, nth=st.integers(0, 3))
    def quarantine(self, place: tuple[str, str], nth: int) -> None:
        found = self.store.find(*place)
        if found is None or nth >= len(found.records):
            return
        bad = found.records[nth]
        self.store.quarantine(found.key, bad.start)
        for session in self.store.sessions():
            assert bad.record_id not in {ref.record_id for ref in session.records}
            ids, said = self.model[session.app, session.name]
            self.model[session.app, session.name] = (ids[: session.num_tokens], said)

    @rule()
    def flush(self) -> None:
        self.store.flush()
        self._commit()

    @rule(dice=st.integers(0, 3))
    def restart(self, dice: int) -> None:
        if dice:  # lives should be long
            return
        self.store.close()
        self._commit()
        self.model = copy.deepcopy(self.committed)
        self._open()

    @rule(dice=st.integers(0, 3))
    def crash(self, dice: int) -> None:
        """The process is gone; what the system has of its files is there."""
        if dice:
            return
        before = self.folder / str(self.num_lives)
        event("crash")
        self.num_lives += 1
        shutil.copytree(before, self.folder / str(self.num_lives))
        self.store.close()
        shutil.rmtree(before)
        self.model = copy.deepcopy(self.committed)
        self._open()

    @invariant()
    def it_is_as_it_should_be(self) -> None:
        if not hasattr(self, "store"):
            return
        sessions = {(s.app, s.name): s for s in self.store.sessions()}
        assert sessions.keys() == self.model.keys()
        for place, (ids, said) in self.model.items():
            stored = list(sessions[place].token_ids)
            assert stored == ids[: len(stored)]
            assert sessions[place].conversation == said
        figures = self.store.snapshot()
        assert figures.peak_bytes <= self.disk_bytes
        if self.disk_bytes == ROOMY:
            assert figures.num_evicted == 0
            assert all(
                sessions[place].num_tokens == len(ids) for place, (ids, _) in self.model.items()
            )

    def teardown(self) -> None:
        if hasattr(self, "store"):
            verify_all(self.store)
            event("evicted" if self.store.snapshot().num_evicted else "all fits")
            self.store.close()
        shutil.rmtree(self.folder)


TestStoreMachine = pytest.mark.slow(StoreMachine.TestCase)
TestStoreMachine.settings = settings(
    max_examples=25, stateful_step_count=30, derandomize=True, deadline=None
)
