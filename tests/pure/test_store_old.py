"""A store that the first release wrote: what was said is carried over, KV is a miss.

`old_stores.tar.xz` holds two, of the same sessions: one that was closed, one of a process that was
killed, whose rows still are in the log. It was written with 16 bytes a token and two apps:

    mail    inbox       400 tokens in two records     a conversation
    mail    entwürfe    200 of them                   a conversation
    notes   日記          50 tokens                    a conversation
    notes   says nothing 20 tokens
    notes   unnamed     20 tokens, not persistent; the killed one still has its bytes
"""

import random
import sqlite3
import tarfile
from pathlib import Path

import pytest
import tiny_store
from tiny_store import FINGERPRINT, kept, layers_of, open_store, tokens, verify_all

from edgekv.errors import StoreUnusable
from edgekv.store import Store, StoreView

OLD_STORES = Path(tiny_store.__file__).with_name("old_stores.tar.xz")
SAID = {
    ("mail", "inbox"): '{"version": 1, "said": "Grüße aus Köln, ça va? \\u2028 emoji: 🦊"}',
    ("mail", "entwürfe"): '{"said": "nur im Entwurf"}',
    ("notes", "日記"): '{"said": "今日は雨"}',
    ("notes", "says nothing"): None,
}
NUM_TOKENS = {"inbox": 400, "entwürfe": 200, "日記": 50, "says nothing": 20}


@pytest.fixture(params=["closed", "killed"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    with tarfile.open(OLD_STORES) as archive:
        archive.extractall(tmp_path, filter="data")
    assert list((tmp_path / request.param).rglob("segment-*"))
    return tmp_path / request.param


def view_of(root: Path) -> StoreView:
    (view,) = Store.open_readonly(root)
    return view


def said(sessions) -> dict[tuple[str, str], str | None]:
    return {(one.app, one.name): one.conversation for one in sessions}


def test_it_can_be_listed(root: Path) -> None:
    view = view_of(root)
    assert (view.model, view.fingerprint) == ("tiny, of the first release", FINGERPRINT)
    assert (view.token_bytes, view.damage, view.in_use) == (16, "", False)
    assert said(view.sessions) == SAID
    assert {one.name: one.num_tokens for one in view.sessions} == NUM_TOKENS
    draw = random.Random(3)
    diary = next(one for one in view.sessions if one.name == "日記")
    assert list(diary.token_ids) == [draw.randrange(64) for _ in range(50)]
    assert list(root.rglob("segment-*"))


def test_what_was_said_is_carried_over(root: Path) -> None:
    before = view_of(root)
    with open_store(root, layers=layers_of(16), model="tiny") as store:
        assert said(store.sessions()) == SAID
        assert [s.name for s in store.sessions()] == [s.name for s in before.sessions]
        figures = store.snapshot()
        assert (figures.num_tokens, figures.num_records, figures.used_bytes) == (0, 0, 0)
        assert figures.num_records_lost == 4
        assert figures.num_index_lost == 0
        assert figures.total_kv_written_bytes > 0
        assert not list(root.rglob("segment-*"))
        verify_all(store)
        kept(store, "mail", "inbox", tokens(100))
        verify_all(store)
    with open_store(root, layers=layers_of(16)) as again:
        assert said(again.sessions()) == SAID
        assert again.snapshot().num_records_lost == 0
        assert again.find("mail", "inbox").num_tokens == 100  # type: ignore[union-attr]
        verify_all(again)
    assert view_of(root).token_bytes == 16


def test_a_session_can_be_removed_before_its_model_is_used_again(root: Path) -> None:
    with Store.reopen(view_of(root)) as store:
        store.remove(next(s.key for s in store.sessions() if s.name == "日記"))
    left = view_of(root)
    assert said(left.sessions) == {
        where: text for where, text in SAID.items() if "日記" not in where
    }
    assert b"\xe4\xbb\x8a\xe6\x97\xa5" not in b"".join(
        path.read_bytes() for path in root.rglob("index*")
    )
    with open_store(root, layers=layers_of(16)) as again:
        assert len(again.sessions()) == 3
        verify_all(again)


def test_of_another_model_it_is_not_touched(root: Path) -> None:
    (folder,) = (path for path in root.iterdir() if path.is_dir())
    before = {path.name: path.stat().st_size for path in folder.glob("segment-*")}
    with pytest.raises(StoreUnusable, match="another model"):
        open_store(root, fingerprint=FINGERPRINT[:32] + "f" * 32)
    assert {path.name: path.stat().st_size for path in folder.glob("segment-*")} == before
    assert said(view_of(root).sessions) == SAID


def test_damaged_it_is_put_aside_and_what_was_said_is_carried_over(root: Path) -> None:
    with open_store(root, layers=layers_of(16)):
        pass  # so that all is in the database
    (path,) = root.rglob("index.sqlite")
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA user_version = 1")
    connection.execute("DROP TABLE records")
    connection.close()
    with open_store(root, layers=layers_of(16)) as store:
        assert said(store.sessions()) == {who: text for who, text in SAID.items() if text}
        assert store.snapshot().num_index_lost == 1
        verify_all(store)


def test_an_idle_one_counts_and_gives_way(root: Path) -> None:
    with open_store(root, fingerprint="b" * 64, disk_bytes=1 << 20) as store:
        kept(store, "mail", "a", tokens(10))
        assert store.snapshot().root_bytes > 300_000
        kept(store, "mail", "b", tokens(2000))
        assert store.snapshot().num_evicted == 0
        verify_all(store)
    assert not list(root.rglob("segment-*"))
    assert SAID in [said(view.sessions) for view in Store.open_readonly(root)]
