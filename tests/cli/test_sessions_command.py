"""`edgekv sessions` on real stores, written by the store itself."""

import json
import os
import subprocess
import sys
import tarfile
from contextlib import closing
from pathlib import Path

import pytest
import tiny_store
from tiny_store import layers_of

from edgekv.cli.main import main
from edgekv.runtime.conversation import ChatMessage, Conversation, dump
from edgekv.store import Store

TOKEN_BYTES = 1024
OLD_STORES = Path(tiny_store.__file__).with_name("old_stores.tar.xz")


class Disk:
    """The stores of two models, filled by hand; time passes as the test says."""

    def __init__(self, root):
        self.root = root
        self.now_s = 1_000_000_000.0

    def open(self, model, part=""):
        return Store.open(
            self.root,
            model=model,
            fingerprint=part + model[0] * (32 - len(part)),
            layers=layers_of(TOKEN_BYTES),
            disk_bytes=1 << 30,
            free_reserve_bytes=0,
            wall_clock_s=lambda: self.now_s,
        )

    def add(self, model, name, *, app="chat", contents=("Hi", "Hello"), num_tokens=0, text=None):
        self.now_s += 60
        with closing(self.open(model)) as store:
            key = store.session(app, name, persistent=True).key
            roles = ("user", "assistant")
            messages = [ChatMessage(role=roles[i % 2], content=c) for i, c in enumerate(contents)]
            conversation = Conversation(messages=tuple(messages))
            store.set_conversation(key, text or dump(conversation))
            if num_tokens:
                payload = [bytes(num_tokens * TOKEN_BYTES)]
                store.write(key, 0, list(range(num_tokens)), payload)


@pytest.fixture
def disk(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEKV_KV_DIR", str(tmp_path / "kv"))
    return Disk(tmp_path / "kv")


@pytest.fixture
def sessions(capsys):
    """Run `edgekv sessions` and return (exit code, stdout, stderr)."""

    def run(*arguments):
        code = main(["sessions", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def names(sessions, *options):
    code, out, _ = sessions("list", "--json", *options)
    assert code == 0
    return [row["name"] for row in json.loads(out)["sessions"]]


@pytest.fixture
def filled(disk):
    disk.add("small", "trip", num_tokens=100)
    disk.add("small", "inbox", app="mail", num_tokens=200)
    disk.add("larger", "trip", contents=("One", "Two", "Three", "Four"), num_tokens=50)
    disk.add("small", "notes")
    return disk


@pytest.fixture
def of_the_hub(filled):
    filled.add("owner/name", "far")


# --- list ---


def test_nothing_is_kept(disk, sessions):
    assert sessions("list") == (0, "", "No session is kept.\n")
    assert sessions("list", "--json") == (0, '{"sessions": []}\n', "")
    assert not disk.root.exists(), "looking makes nothing"


def test_list(filled, sessions):
    code, out, err = sessions("list")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].split() == [
        "NAME",
        "APP",
        "MODEL",
        "MESSAGES",
        "TOKENS",
        "DISK",
        "LAST",
        "USED",
    ]
    assert [line.split()[:6] for line in lines[1:]] == [
        ["notes", "chat", "small", "2", "0", "0"],
        ["trip", "chat", "larger", "4", "50", "51"],
        ["inbox", "mail", "small", "2", "200", "205"],
        ["trip", "chat", "small", "2", "100", "102"],
    ]
    assert err.startswith("4 sessions; files of ")
    assert str(filled.root) in err


def test_list_beside_who_uses_them(filled, sessions):
    with closing(filled.open("small")) as store:
        assert names(sessions) == ["notes", "trip", "inbox", "trip"]
        store.session("chat", "unnamed", persistent=False)
        store.flush()
        assert "unnamed" not in names(sessions)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--app", "mail"], ["inbox"]),
        (["-m", "larger"], ["trip"]),
        (["-m", "https://huggingface.co/owner/name/tree/main"], ["far"]),
        (["--app", "chat", "--model", "small"], ["notes", "trip"]),
        (["--app", "nobody"], []),
    ],
)
def test_filters(filled, of_the_hub, sessions, options, expected):
    assert names(sessions, *options) == expected


def test_a_damaged_store_is_said_and_the_others_are_listed(filled, sessions):
    index = filled.root / ("l" * 32) / "index.sqlite"
    for log in index.parent.glob("index.sqlite-*"):
        log.unlink()
    index.write_bytes(b"not a database" * 1000)
    code, out, err = sessions("list")
    assert code == 0
    assert len(out.splitlines()) == 4
    assert "warning: " in err
    assert "index.sqlite" in err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_cannot_be_read(disk, sessions):
    disk.root.mkdir(mode=0o000)
    code, out, err = sessions("list")
    assert (code, out) == (1, "")
    assert err.startswith("error: ")


def test_a_root_that_is_no_folder(disk, sessions):
    disk.root.write_text("a file")
    code, out, err = sessions("list")
    assert (code, out) == (1, "")
    assert err.startswith("error: ")


def test_a_store_of_the_first_release(disk, sessions, tmp_path, monkeypatch):
    with tarfile.open(OLD_STORES) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.setenv("EDGEKV_KV_DIR", str(tmp_path / "killed"))
    assert sorted(names(sessions)) == ["entwürfe", "inbox", "says nothing", "日記"]
    code, out, _ = sessions("rm", "日記", "inbox")
    assert (code, len(out.splitlines())) == (0, 2)
    code, out, err = sessions("prune", "--older-than", "0s", "--app", "notes")
    assert (code, out) == (
        0,
        "removed says nothing (app notes, model tiny, of the first release)\n",
    )
    assert err == ""
    assert names(sessions) == ["entwürfe"]


# --- show ---


def test_show(filled, sessions):
    code, out, _ = sessions("show", "trip", "-m", "larger")
    assert code == 0
    facts, *messages = out.rstrip("\n").split("\n\n")
    assert "on disk    KV of 50 tokens, 51 kB" in facts
    assert messages == ["user: One", "assistant: Two", "user: Three", "assistant: Four"]


def test_show_json(filled, sessions):
    code, out, _ = sessions("show", "inbox", "--json")
    assert code == 0
    shown = json.loads(out)
    assert (shown["name"], shown["app"], shown["model"]) == ("inbox", "mail", "small")
    assert (shown["num_tokens"], shown["payload_bytes"]) == (200, 200 * TOKEN_BYTES)
    assert shown["messages"] == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    ]


def test_show_what_cannot_be_read(disk, sessions):
    disk.add("small", "trip", text="{")
    code, out, _ = sessions("show", "trip")
    assert code == 0
    assert "cannot be read" in out
    _, out, _ = sessions("show", "trip", "--json")
    assert json.loads(out)["messages"] is None
    assert json.loads(out)["num_messages"] is None


def test_a_name_that_several_have(filled, sessions):
    for command in ("show", "rm"):
        code, out, err = sessions(command, "trip")
        assert (code, out) == (2, "")
        assert "2 sessions are called 'trip'" in err
        assert "--model" in err
    assert len(names(sessions)) == 4


def test_a_name_that_nobody_has(filled, sessions):
    for command in (["show", "x"], ["rm", "notes", "x"]):
        code, out, err = sessions(*command)
        assert (code, out) == (2, "")
        assert "no session is called 'x'" in err
    assert len(names(sessions)) == 4, "none is removed if one is unknown"


def test_names_and_messages_are_made_safe_for_a_terminal(disk, sessions, monkeypatch):
    disk.add("small", "\x1b]0;title\x07red\n", contents=("\x1b[31mHi\x9b2J", "ok"))
    _, out, _ = sessions("list")
    assert "\x1b" not in out
    assert out.splitlines()[1].startswith("red ")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    _, out, _ = sessions("show", "\x1b]0;title\x07red\n")
    assert out.endswith("user: Hi\n\nassistant: ok\n")
    assert "\x1b" not in out


# --- rm, prune ---


def test_rm(filled, sessions):
    code, out, _ = sessions("rm", "inbox", "notes", "inbox")
    assert code == 0
    assert out == "removed inbox (app mail, model small)\nremoved notes (app chat, model small)\n"
    assert names(sessions) == ["trip", "trip"]
    with closing(filled.open("small")) as store:
        assert store.find("mail", "inbox") is None
        assert store.snapshot().num_tokens == 100
        store.check_integrity()


def test_a_session_of_several_ranks_is_one(disk, sessions):
    for part, said in (("1", None), ("0", "Hi")):
        with closing(disk.open("small", part)) as store:
            key = store.session("chat", "trip", persistent=True).key
            store.write(key, 0, [1, 2], [bytes(2 * TOKEN_BYTES)])
            if said:
                store.set_conversation(
                    key, dump(Conversation(messages=(ChatMessage(role="user", content=said),)))
                )
        disk.now_s -= 60  # what has the conversation was used before
    _, out, _ = sessions("show", "trip")
    assert out.endswith("user: Hi\n")
    assert sessions("rm", "trip")[:2] == (0, "removed trip (app chat, model small)\n")
    assert names(sessions) == []
    assert not list(disk.root.rglob("*.kv"))


def test_what_was_said_in_a_removed_session_is_nowhere(disk, sessions):
    disk.add("small", "trip", contents=("xyzzy" * 10_000, "plugh"))
    disk.add("small", "other")

    def stands_somewhere():
        return any(b"xyzzy" in path.read_bytes() for path in disk.root.rglob("*.*"))

    assert stands_somewhere()
    sessions("rm", "trip")
    assert not stands_somewhere()
    assert names(sessions) == ["other"]


def test_rm_json(filled, sessions):
    code, out, _ = sessions("rm", "trip", "-m", "larger", "--json")
    assert code == 0
    (removed,) = json.loads(out)["removed"]
    assert (removed["name"], removed["model"], removed["num_tokens"]) == ("trip", "larger", 50)


def test_a_store_that_is_in_use_keeps_its_sessions(filled, sessions):
    with closing(filled.open("small")):
        code, out, err = sessions("prune", "--older-than", "0s")
    assert code == 1
    assert out == "removed trip (app chat, model larger)\n", "the other one's are gone"
    assert "in use" in err
    assert f"process {os.getpid()}" in err
    assert names(sessions) == ["notes", "inbox", "trip"]


@pytest.mark.parametrize(
    ("options", "left"),
    [
        (["--older-than", "0s"], []),
        (["--older-than", "0s", "--app", "mail"], ["notes", "trip", "trip"]),
        (["--older-than", "99999w"], ["notes", "trip", "inbox", "trip"]),
        (["--keep-gib", "1"], ["notes", "trip", "inbox", "trip"]),
        (["--keep-gib", "0.0003"], ["notes", "trip", "inbox"]),
        (["--keep-gib", "0"], ["notes"]),
        (["--keep-gib", "0", "-m", "larger"], ["notes", "inbox", "trip"]),
    ],
)
def test_prune(filled, sessions, options, left):
    code, out, err = sessions("prune", *options)
    assert code == 0
    assert len(out.splitlines()) == 4 - len(left)
    assert (err == "Nothing to remove.\n") is (len(left) == 4)
    assert names(sessions) == left


@pytest.mark.parametrize(
    ("options", "stays"),
    [
        (["--older-than", "0s"], False),
        (["--older-than", "99999w"], True),
        (["--older-than", "0s", "--app", "mail"], True),
        (["--keep-gib", "1"], True),
    ],
)
def test_prune_takes_what_was_put_aside_of_a_damaged_index(filled, sessions, options, stays):
    """Text that no session has any more is in it, and nobody could ask for that by name."""
    (index, _) = sorted(filled.root.rglob("index.sqlite"))
    index.write_bytes(b"junk" + index.read_bytes())
    filled.add("larger" if index.parent.name[0] == "l" else "small", "new")
    assert list(filled.root.rglob("index.damaged.sqlite"))
    code, _, _ = sessions("prune", *options)
    assert code == 0
    # What is removed of a store takes along what was put aside there; here "mail" has nothing.
    assert bool(list(filled.root.rglob("index.damaged.sqlite"))) is stays


def test_prune_gives_the_disk_back(filled, sessions):
    sessions("prune", "--older-than", "0s")
    assert [*filled.root.rglob("*.kv")] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "what may go"),
        (["--older-than", "soon"], "older-than is 'soon'"),
        (["--keep-gib", "-1"], "keep-gib is -1"),
        (["--keep-gib", "much"], "keep-gib"),
    ],
)
def test_absurd_prunes_are_refused(filled, sessions, options, message):
    code, out, err = sessions("prune", *options)
    assert (code, out) == (2, "")
    assert message in err
    assert "hint: " in err
    assert len(names(sessions)) == 4


@pytest.mark.slow
def test_sessions_are_listed_without_mlx(filled):
    code = (
        "import sys, edgekv.cli.main as m\n"
        "assert m.main(['sessions', 'list', '--json']) == 0\n"
        "print([name for name in ('mlx', 'numpy') if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert len(json.loads(done.stdout)["sessions"]) == 4
