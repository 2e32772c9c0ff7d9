"""Files that say what apps send."""

import json

import pytest

from edgekv.bench.serving.traffic import AppTraffic, Scenario, read_scenario
from edgekv.errors import ConfigError

TOML = """
[[apps]]
name = "editor"
key = "secret"
class = "interactive"
share = 4
prompt_tokens = [64, 128]
output_tokens = 16

[[apps]]
name = "chat"
kind = "conversations"
class = "background"
users = 20
turns = 4
session_tokens = 512
"""


def write(tmp_path, text, name="mix.toml"):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_a_file_says_what_apps_send(tmp_path):
    editor = AppTraffic(
        name="editor", key="secret", share=4, prompt_tokens=(64, 128), output_tokens=(16, 16)
    )
    chat = AppTraffic(
        name="chat",
        kind="conversations",
        priority="background",
        users=20,
        turns=4,
        session_tokens=512,
    )
    scenario = Scenario(name="mix", apps=(editor, chat))
    assert read_scenario(write(tmp_path, TOML)) == scenario
    assert scenario.rate_of(editor, 10.0) == 8.0

    as_json = {
        "apps": [
            {"name": "editor", "key": "secret", "share": 4, "output_tokens": 16},
            {"name": "chat", "kind": "conversations", "class": "background", "users": 20}
            | {"turns": 4, "session_tokens": 512},
        ]
    }
    for values in (as_json, as_json["apps"]):
        path = write(tmp_path, json.dumps(values), "mix.json")
        assert read_scenario(path) == scenario


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "an app's name is None"),
        ({"name": 3}, "an app's name is 3"),
        ({"name": ""}, "name is ''"),
        ({"name": "a\nb"}, "name is"),
        ({"name": "a", "key": 3}, "a.key is 3"),
        ({"name": "a", "key": "two\nlines"}, "a.key is"),
        ({"name": "a", "class": "urgent"}, "a.class is 'urgent'"),
        ({"name": "a", "kind": "floods"}, "a.kind is 'floods'"),
        ({"name": "a", "share": 0}, "a.share is 0"),
        ({"name": "a", "share": "x"}, "a.share is 'x'"),
        ({"name": "a", "prompt_tokens": 0}, "a.prompt_tokens is 0"),
        ({"name": "a", "prompt_tokens": [9, 8]}, "a.prompt_tokens is 8"),
        ({"name": "a", "prompt_tokens": [1, 2, 3]}, r"a.prompt_tokens is \[1, 2, 3\]"),
        ({"name": "a", "output_tokens": True}, "a.output_tokens is True"),
        ({"name": "a", "users": 3}, "a.users is 3, which means nothing"),
        ({"name": "a", "colour": 3}, "a.colour is 3, which means nothing"),
        ({"name": "a", "kind": "conversations", "users": 0}, "a.users is 0"),
        ({"name": "a", "kind": "conversations", "turns": 0.5}, "a.turns is 0.5"),
        ({"name": "a", "kind": "conversations", "prompt_tokens": 5}, "a.prompt_tokens is 5"),
        ({"name": "a", "kind": ["x"]}, "a.kind is"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(tmp_path, fields, message):
    path = write(tmp_path, json.dumps([fields]), "apps.json")
    with pytest.raises(ConfigError, match=message):
        read_scenario(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("apps = 3", "a list of apps|apps is"),
        ("apps = [3]", "apps is"),
        ("", "apps is"),
        ("no [ toml", "apps .*toml"),
        ("apps = []", "number of apps is 0"),
        ('[[apps]]\nname = "a"\n[[apps]]\nname = "a"', "name is 'a'"),
        ("#" * (1 << 21), "apps is"),
    ],
    ids=range(7),
)
def test_a_file_that_is_no_list_of_apps(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read_scenario(write(tmp_path, text))


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.toml").write_bytes(b"name = '\xe4'")
    for path in (tmp_path / "missing.toml", tmp_path, tmp_path / "latin.toml"):
        with pytest.raises(ConfigError, match="apps "):
            read_scenario(path)
