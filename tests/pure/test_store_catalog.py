"""The catalog in memory: what a commit has to write is what changed, and no more."""

from array import array

import pytest

from edgekv.store.catalog import Catalog, CatalogSession, common_prefix
from edgekv.store.record import Record, hash_tokens
from edgekv.store.rows import Rows, SessionRow


class Play:
    """A catalog whose records are all of ten tokens."""

    def __init__(self) -> None:
        self.catalog = Catalog()
        self.clock = 0.0

    @property
    def unlinked(self) -> list[int]:
        return [record.record_id for record in self.catalog.unlinked]

    def session(self, name: str, *, persistent: bool = True) -> CatalogSession:
        self.clock += 1
        return self.catalog.add("app", name, persistent=persistent, now_s=self.clock)

    def write(self, session: CatalogSession, count: int = 1) -> Record:
        for _ in range(count):
            record = Record(
                record_id=next(self.catalog.record_ids),
                start=session.end,
                end=session.end + 10,
                token_ids=array("I", range(session.end, session.end + 10)),
                payload_bytes=100,
                tokens_xxh3=bytes(16),
            )
            self.catalog.link(session, record, record.end)
        return record

    def changes(self) -> Rows:
        self.catalog.check_integrity()
        return self.catalog.take_changes()


@pytest.fixture
def play() -> Play:
    return Play()


def test_a_commit_writes_what_is_new(play: Play) -> None:
    session = play.session("a")
    play.write(session, 100)
    assert len(play.changes().records) == 100
    assert not play.changes()
    play.write(session)
    (row,) = (changes := play.changes()).sessions
    assert (row.first_position, len(row.links), len(changes.records)) == (100, 1, 1)
    play.catalog.touch(session, 500.0)
    (row,) = (changes := play.changes()).sessions
    assert (row.used_s, row.first_position, row.links, changes.records) == (500.0, 101, (), [])


@pytest.mark.parametrize(("cut", "first", "num_links"), [(25, 2, 1), (20, 2, 0), (0, 0, 0)])
def test_a_cut_writes_what_is_behind_it(play: Play, cut: int, first: int, num_links: int) -> None:
    session = play.session("a")
    play.write(session, 4)
    play.changes()
    play.catalog.cut(session, cut)
    (row,) = (changes := play.changes()).sessions
    assert (row.first_position, len(row.links)) == (first, num_links)
    assert len(changes.removed_records) == len(play.unlinked) == 4 - first - num_links
    assert changes.records == []


def test_what_was_not_written_is_written_the_next_time(play: Play) -> None:
    a, b, c = (play.session(name) for name in "abc")
    play.write(a, 2)
    play.write(c)
    play.changes()
    play.catalog.remove(c)
    play.write(a)
    play.write(b)
    failed = play.changes()
    play.catalog.cut(a, 25)
    play.catalog.remove(b)
    play.catalog.put_back(failed)
    changes = play.changes()
    assert set(changes.removed_sessions) == {b.key, c.key}
    (row,) = changes.sessions
    assert (row.key, row.first_position, len(row.links)) == (a.key, 2, 1)
    assert len(changes.records) == 1
    assert set(changes.removed_records) > {
        record_id for record_id in play.unlinked if record_id < 4
    }
    assert not play.changes()


def test_what_does_not_persist_is_not_written(play: Play) -> None:
    donor = play.session("unnamed", persistent=False)
    play.write(donor, 3)
    play.catalog.cut(donor, 25)
    assert not play.changes()
    named = play.session("named")
    play.catalog.adopt(named, donor, 15)
    (row,) = (changes := play.changes()).sessions
    assert row.key == named.key
    assert [use_end for _, use_end in row.links] == [10, 15]
    assert len(changes.records) == 2
    play.catalog.remove(donor)
    assert not play.changes()
    play.catalog.persist(play.session("later", persistent=False))
    assert [row.name for row in play.changes().sessions] == ["later"]


def test_rows_that_disagree_end_a_session_there() -> None:
    def record(record_id: int, start: int) -> Record:
        return Record(
            record_id=record_id,
            start=start,
            end=start + 2,
            payload_bytes=100,
            token_ids=array("I", [start, start + 1]),
            tokens_xxh3=hash_tokens(array("I", range(start + 2))),
        )

    records = [record(1, 0), record(2, 2), record(3, 5), record(4, 4), record(5, 2)]
    records[4].token_ids[1] += 1  # another token than the KV was computed for
    links = {
        "gap": ((1, 2), (3, 7)),
        "back": ((2, 4),),
        "much": ((1, 3),),
        "good": ((1, 1), (2, 4)),
    }
    links |= {
        "twice": ((1, 2), (1, 2)),
        "none": ((1, 2), (77, 4)),
        "whole": ((1, 2), (2, 4), (4, 6)),
        "other token": ((1, 2), (5, 4)),
    }
    sessions = [
        SessionRow(
            key=key,
            app="app",
            name=name,
            created_s=0.0,
            used_s=9.0,
            links=named,
        )
        for key, (name, named) in enumerate(links.items(), 1)
    ]
    rows = Rows(sessions=sessions, records=records, removed_records=[9])
    catalog = Catalog()
    assert catalog.restore(rows, lambda _: True, now_s=5.0) == 3
    catalog.check_integrity()
    ends = {session.name: session.end for session in catalog.sessions.values()}
    cut = {"gap": 2, "back": 0, "much": 0, "good": 1, "twice": 2, "none": 2, "other token": 2}
    assert ends == cut | {"whole": 6}
    assert [record.record_id for record in catalog.unlinked] == [3, 5]
    changes = catalog.take_changes()
    assert set(changes.removed_records) == {3, 5, 9}
    assert "whole" not in {row.name for row in changes.sessions}
    assert all(row.links == () for row in changes.sessions)
    assert all(session.used_s == 5.0 for session in catalog.sessions.values())


def test_common_prefix_is_the_slow_one() -> None:
    whole = array("I", [0, 1] * 20)
    for length in range(41):
        for differs in range(41):
            other = array("I", whole[:length])
            if differs < length:
                other[differs] += 7
            assert common_prefix(whole, other) == min(length, differs)
            assert common_prefix(other, whole) == min(length, differs)
