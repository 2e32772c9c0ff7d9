import json
from dataclasses import replace
from pathlib import Path

import pytest

from edgekv.cli.sessions import (
    Kept,
    ago,
    choose,
    description,
    parse_age,
    table,
    to_prune,
    total_line,
)
from edgekv.config import GIB
from edgekv.errors import ConfigError
from edgekv.runtime.conversation import ChatMessage, Conversation, dump
from edgekv.store import StoredSession, StoreView

NOW = 1_800_000_000.0
DAY = 86_400.0


def talk(*contents):
    roles = ("user", "assistant")
    return dump(
        Conversation(
            messages=tuple(
                ChatMessage(role=roles[i % 2], content=content)
                for i, content in enumerate(contents)
            )
        )
    )


def kept(name="trip", *, model="small", app="chat", age_s=0.0, size=0, text=None, tokens=0):
    folder = Path("/kv") / model.replace("/", "-")
    return Kept(
        store=StoreView(folder=folder, model=model, file_bytes=1_000_000, in_use=False),
        session=StoredSession(
            key=1,
            app=app,
            name=name,
            persistent=True,
            token_ids=(7,) * tokens,
            records=(),
            conversation=text,
            created_s=NOW - 30 * DAY,
            used_s=NOW - age_s,
            payload_bytes=size,
        ),
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "just now"),
        (59, "just now"),
        (60, "1 minute ago"),
        (3599, "59 minutes ago"),
        (3600, "1 hour ago"),
        (2 * DAY, "2 days ago"),
        (30 * DAY, "4 weeks ago"),
    ],
)
def test_ago(seconds, text):
    assert ago(seconds) == text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0s", 0), ("90s", 90), ("30m", 1800), ("12h", 43_200), ("7d", 604_800), (" 1.5w ", 907_200)],
)
def test_ages(text, seconds):
    assert parse_age("older-than", text) == seconds


@pytest.mark.parametrize("text", ["", "7", "d", "-7d", "7 d", "7y", "1e3d", "nand", "∞d", "٧d7"])
def test_absurd_ages_are_refused(text):
    with pytest.raises(ConfigError, match="older-than is") as caught:
        parse_age("older-than", text)
    assert "7d" in caught.value.hint


def test_table():
    lines = table(
        [
            kept("trip", text=talk("a", "b"), tokens=412, size=9_400_000, age_s=200),
            kept("\x1b[31mred\n", app="mail", model="a/larger", text="{", age_s=3 * DAY),
            kept("new"),
        ],
        NOW,
    )
    assert lines == [
        "NAME  APP   MODEL     MESSAGES  TOKENS    DISK  LAST USED",
        "trip  chat  small            2     412  9.4 MB  3 minutes ago",
        "red   mail  a/larger   damaged       0    0 kB  3 days ago",
        "new   chat  small            0       0    0 kB  just now",
    ]


def test_total_counts_each_stores_files_once():
    assert total_line([kept("a")]) == "1 session; files of 1.0 MB in /kv/small"
    several = [kept("a"), kept("b"), kept("c", model="larger")]
    assert total_line(several) == "3 sessions; files of 2.0 MB in /kv/larger, /kv/small"


def test_description():
    one = kept("trip", text=talk("Hi\x1b[31m", "Two\nlines"), tokens=412, size=9_400_000)
    lines = description(one, NOW, on_terminal=True)
    assert lines[:3] == ["name       trip", "app        chat", "model      small"]
    assert lines[4].endswith("(just now)")
    assert lines[5] == "on disk    KV of 412 tokens, 9.4 MB"
    assert lines[6:] == ["", "user: Hi", "", "assistant: Two\nlines"]
    raw = description(one, NOW, on_terminal=False)
    assert raw[7] == "user: Hi\x1b[31m"


def test_description_of_a_damaged_one():
    assert "cannot be read" in description(kept(text="{"), NOW, on_terminal=True)[-1]


def test_facts_are_plain_values():
    facts = kept("trip", text=talk("a", "b"), tokens=412, size=9_400_000).facts()
    assert json.loads(json.dumps(facts)) == {
        "name": "trip",
        "app": "chat",
        "model": "small",
        "num_messages": 2,
        "num_tokens": 412,
        "payload_bytes": 9_400_000,
        "created_s": NOW - 30 * DAY,
        "used_s": NOW,
    }
    assert kept(text="{").facts()["num_messages"] is None


def test_choosing_by_name():
    a, b = kept("a"), kept("b")
    assert choose([a, b], "b") == [b]
    with pytest.raises(ConfigError, match="no session is called 'c'") as caught:
        choose([a, b], "c")
    assert "sessions list" in caught.value.hint


def test_a_name_that_several_have():
    both = [kept("a", app="chat"), kept("a", app="mail", model="larger")]
    with pytest.raises(ConfigError, match="2 sessions") as caught:
        choose(both, "a")
    assert "app mail, model larger" in str(caught.value)
    assert "--app" in caught.value.hint


def test_all_ranks_parts_of_a_session_are_chosen():
    part, whole, older = kept("a", tokens=9), kept("a", text=talk("Hi")), kept("a", text=talk("Yo"))
    assert choose([part, whole, kept("b"), older], "a") == [whole, older, part]


SIZES = [
    kept("old", age_s=9 * DAY, size=GIB),
    kept("new", age_s=0, size=GIB),
    kept("empty", age_s=8 * DAY, size=0),
    kept("middle", age_s=2 * DAY, size=2 * GIB),
]


@pytest.mark.parametrize(
    ("unused_s", "keep_gib", "names"),
    [
        (7 * DAY, None, ["empty", "old"]),
        (9 * DAY, None, ["old"]),
        (10 * DAY, None, []),
        (0.0, None, ["new", "middle", "empty", "old"]),
        (None, 4.0, []),
        (None, 3.5, ["old"]),
        (None, 3.0, ["old"]),
        (None, 1.0, ["middle", "empty", "old"]),
        (None, 0.0, ["new", "middle", "empty", "old"]),
        (9 * DAY, 3.0, ["old"]),
        (7 * DAY, 1.0, ["middle", "empty", "old"]),
    ],
)
def test_pruning_takes_the_least_recently_used(unused_s, keep_gib, names):
    going = to_prune(SIZES, unused_s=unused_s, keep_gib=keep_gib, now_s=NOW)
    assert [one.session.name for one in going] == names


@pytest.mark.parametrize("keep_gib", [-1.0, float("nan"), float("inf")])
def test_absurd_sizes_are_refused(keep_gib):
    with pytest.raises(ConfigError, match="keep-gib"):
        to_prune(SIZES, unused_s=None, keep_gib=keep_gib, now_s=NOW)


def test_a_session_from_the_future_is_young():
    ahead = replace(SIZES[0], session=replace(SIZES[0].session, used_s=NOW + DAY))
    assert to_prune([ahead], unused_s=60.0, keep_gib=None, now_s=NOW) == []
