import json
import stat
import time

import pytest
from command_errors import error_of

from edgekv.cli.apps import table
from edgekv.cli.main import main
from edgekv.server.keys import AppEntry, AppsFile


@pytest.fixture(autouse=True)
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEKV_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state" / "apps.json"


@pytest.fixture
def apps(capsys):
    """Run `edgekv apps`; it must succeed. Returns (stdout, stderr)."""

    def run(*arguments):
        assert main(["apps", *arguments]) == 0
        captured = capsys.readouterr()
        return captured.out, captured.err

    return run


def test_no_app_has_a_key(apps, file):
    assert apps() == ("", "No app has a key; edgekv apps add NAME makes one.\n")
    assert apps("--json") == ('{"apps": []}\n', "")
    assert not file.parent.exists(), "looking makes nothing"


def test_add_prints_the_key_alone(apps, file):
    out, err = apps("add", "mail")
    key = out.removesuffix("\n")
    assert AppsFile(file).find(key).name == "mail"
    assert "mail" in err
    assert key not in err
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_add_as_json(apps, file):
    out, err = apps("add", "mail", "--json")
    assert err == ""
    added = json.loads(out)
    assert added.keys() == {"name", "key"}
    assert AppsFile(file).find(added["key"]).name == added["name"] == "mail"


def test_what_an_app_may_have(apps, file):
    terms = ["--weight", "2.5", "--priority", "background", "--min-kv", "0.5"]
    apps("add", "mail", *terms, "--max-sessions", "3", "--rate", "60", "--key-only")
    entry = AppsFile(file).entries()["mail"]
    assert entry.terms == {
        "weight": 2.5,
        "priority": "background",
        "pinned_bytes": 1 << 29,
        "num_sessions_max": 3,
    }
    assert (entry.rate_per_min, entry.key_only) == (60, True)


def test_set_changes_what_is_named_and_keeps_the_key(apps, file):
    key = apps("add", "mail", "--weight", "2", "--rate", "60", "--max-sessions", "3")[0].strip()
    out, _ = apps("set", "mail", "--priority", "background", "--key-only", "--json")
    assert json.loads(out)["priority"] == "background"
    entry = AppsFile(file).find(key)
    assert (entry.weight, entry.rate_per_min, entry.num_sessions_max) == (2.0, 60, 3)
    assert entry.key_only
    out, _ = apps("set", "mail", "--rate", "0", "--max-sessions", "0", "--no-key-only")
    assert out.splitlines()[1].split()[:2] == ["mail", "background"]
    entry = AppsFile(file).find(key)
    assert (entry.rate_per_min, entry.num_sessions_max, entry.key_only) == (None, None, False)


def test_revoke(apps, file):
    key = apps("add", "mail")[0].strip()
    apps("add", "notes")
    assert apps("revoke", "mail") == ("revoked mail\n", "")
    assert AppsFile(file).find(key) is None
    assert apps("revoke", "notes", "--json")[0] == '{"revoked": "notes"}\n'
    assert apps("--json")[0] == '{"apps": []}\n'


def test_the_list_says_no_key(apps, file):
    keys = [apps("add", name)[0].strip() for name in ("mail", "notes")]
    out, _ = apps("--json")
    listed = json.loads(out)["apps"]
    assert [app["name"] for app in listed] == ["mail", "notes"]
    assert abs(listed[0]["created_s"] - time.time()) < 60
    text = out + apps()[0]
    for entry, key in zip(AppsFile(file).entries().values(), keys, strict=True):
        assert key not in text
        assert entry.key_sha256 not in text


def test_the_list_is_aligned():
    common = {"key_sha256": "0" * 64, "created_s": 1e9}
    lines = table(
        [
            AppEntry(name="mail", weight=2.5, pinned_bytes=1 << 30, rate_per_min=60, **common),
            AppEntry(name="news reader", priority="background", key_only=True, **common),
        ]
    )
    for heading, cells in (("WEIGHT", ("2.5", "1")), ("MIN KV", ("1.1 GB", "-"))):
        end = lines[0].index(heading) + len(heading)
        assert tuple(line[:end].rsplit("  ", 1)[1].strip() for line in lines[1:]) == cells
    assert lines[2].split()[:3] == ["news", "reader", "background"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["add", "mail"], "mail"),
        (["add", "a\nb"], "name"),
        (["add", ""], "name"),
        (["add", "news", "--weight", "0"], "weight"),
        (["add", "news", "--priority", "urgent"], "priority"),
        (["add", "news", "--min-kv", "-1"], "min-kv"),
        (["add", "news", "--min-kv", "nan"], "min-kv"),
        (["add", "news", "--max-sessions", "-1"], "num_sessions_max"),
        (["add", "news", "--rate", "-1"], "rate_per_min"),
        (["set", "news"], "news"),
        (["set", "mail", "--weight", "1e9"], "weight"),
        (["revoke", "news"], "news"),
        (["add"], "name"),
        (["forget", "mail"], "forget"),
    ],
    ids=str,
)
def test_what_cannot_be_is_named(apps, file, capsys, arguments, named):
    apps("add", "mail")
    before = file.read_bytes()
    assert main(["apps", *arguments]) == 2
    what, _ = error_of(capsys)
    assert named in what
    assert file.read_bytes() == before


def test_a_damaged_file_is_told(file, capsys):
    file.parent.mkdir()
    file.touch(mode=0o600)
    file.write_text("{")
    for arguments in ([], ["add", "mail"], ["revoke", "mail"]):
        assert main(["apps", *arguments]) == 1
        what, _ = error_of(capsys)
        assert str(file) in what
    assert file.read_text() == "{"
