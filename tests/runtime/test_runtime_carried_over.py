"""What was said under an earlier fingerprint of the same model goes on under the new one."""

import pytest
from tiny_runtime import sampling

from edgekv.errors import StoreFull
from edgekv.runtime import loading
from edgekv.runtime import runtime as runtime_module
from edgekv.store import Store
from edgekv.store.disk import Disk


def opened_as(monkeypatch, name):
    """From now on the model's fingerprint is this."""
    monkeypatch.setattr(loading, "kv_fingerprint", lambda *_, **__: name)


OLD, NEW, NEWER = "a" * 32, "b" * 32 + "w2", "c" * 32 + "w2"


def test_what_was_said_under_an_earlier_fingerprint_is_carried_over(
    restart, stored, kv_folder, monkeypatch
):
    opened_as(monkeypatch, OLD)
    app = restart()
    for name in ("inbox", "outbox"):
        app.session(name, system="Be brief.").respond(f"In {name}", sampling=sampling(3))
    said = {name: app.session(name).messages for name in ("inbox", "outbox")}
    restart.close()
    before = stored()
    opened_as(monkeypatch, NEW)
    app = restart()
    assert [info.name for info in app.sessions()] == ["outbox", "inbox"]
    for name, messages in said.items():
        session = app.session(name)
        assert (session.messages, session.warning) == (messages, "")
        spoken = session._talk.conversation.spoken
        assert spoken is None, "another tokenizer may have made its tokens"
    reply = app.session("inbox").respond("More", sampling=sampling(3))
    assert reply.stats.num_cached_tokens < 30, "of its KV nothing"
    restart.close()
    assert stored()["outbox"].created_s == before["outbox"].created_s
    assert [len(view.sessions) for view in Store.open_readonly(kv_folder)] == [0, 2]


def test_a_namesake_stays_where_it_is(restart, kv_folder, monkeypatch):
    opened_as(monkeypatch, NEW)
    restart().session("inbox").respond("New", sampling=sampling(3))
    restart.close()
    opened_as(monkeypatch, OLD)
    restart().session("inbox").respond("Old", sampling=sampling(3))
    restart.close()
    opened_as(monkeypatch, NEW)
    assert restart().session("inbox").messages[0].content == "New"
    assert [len(view.sessions) for view in Store.open_readonly(kv_folder)] == [1, 1]


def test_who_is_killed_while_it_is_carried_over_leaves_it_once(
    restart, stored, kv_folder, monkeypatch
):
    opened_as(monkeypatch, OLD)
    restart().session("inbox").respond("One", sampling=sampling(3))
    restart.close()
    opened_as(monkeypatch, NEW)
    with monkeypatch.context() as patch:
        patch.setattr(Store, "forget", lambda store, key: None)
        restart()
        restart.close()
    assert [len(view.sessions) for view in Store.open_readonly(kv_folder)] == [1, 1]
    assert len(restart().session("inbox").messages) == 2
    assert [len(view.sessions) for view in Store.open_readonly(kv_folder)] == [0, 1]


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), StoreFull("no room")])
def test_what_cannot_be_carried_over_waits_for_the_next_time(restart, monkeypatch, error):
    opened_as(monkeypatch, OLD)
    restart().session("inbox").respond("One", sampling=sampling(3))
    restart.close()
    opened_as(monkeypatch, NEW)

    def refuse(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Disk, "commit_text", refuse)
        assert restart().session().respond("Hi", sampling=sampling(3)).text is not None
        restart.close()
    assert len(restart().session("inbox").messages) == 2


def test_of_a_path_only_what_an_earlier_release_kept_is_carried_over(restart, monkeypatch):
    """In another folder the same path may be another model; a name is the same everywhere."""
    opened_as(monkeypatch, NEW)
    restart().session("inbox").respond("One", sampling=sampling(3))
    restart.close()
    opened_as(monkeypatch, NEWER)
    assert restart().session("inbox").messages == []
    restart.close()
    opened_as(monkeypatch, "d" * 32 + "w2")
    carry = runtime_module.carry_over
    monkeypatch.setattr(
        runtime_module, "carry_over", lambda store, is_place: carry(store, is_place=False)
    )
    assert len(restart().session("inbox").messages) == 2
