import json
import os
import stat
import threading

import pytest

from edgekv.errors import AppsUnusable, ConfigError
from edgekv.server import keys
from edgekv.server.keys import AppEntry, AppsFile, key_hash, state_dir


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state" / "apps.json"


@pytest.fixture
def apps(path):
    return AppsFile(path)


def test_a_key_leads_to_its_app_alone(apps):
    mail, notes = apps.add("mail", weight=2.0, rate_per_min=60), apps.add("notes")
    assert apps.find(mail).name == "mail"
    assert apps.find(notes).name == "notes"
    assert apps.find(mail).terms == {
        "weight": 2.0,
        "priority": "interactive",
        "pinned_bytes": 0,
        "num_sessions_max": 0,
    }
    for wrong in (
        "",
        "ekv_",
        mail[:-1],
        mail + "x",
        mail.swapcase(),
        "é",
        "\ud800",
        key_hash(mail),
    ):
        assert apps.find(wrong) is None, wrong


def test_keys_are_long_and_never_the_same():
    made = {keys.new_key() for _ in range(100)}
    assert len(made) == 100
    assert all(key.startswith("ekv_") and len(key) == 4 + 43 for key in made)


def test_the_file_holds_no_key_and_is_private(apps, path):
    key = apps.add("mail")
    text = path.read_text()
    assert key not in text
    assert key.removeprefix("ekv_") not in text
    assert json.loads(text)["apps"][0]["key_sha256"] == key_hash(key)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert "key" not in json.dumps(apps.entries()["mail"].facts()).replace("key_only", "")
    assert sorted(file.name for file in path.parent.iterdir()) == ["apps.json", "apps.json.lock"]


def test_every_hash_is_compared_in_constant_time(apps, monkeypatch):
    key = apps.add("first")
    apps.add("second")
    compared = []
    compare = keys.hmac.compare_digest
    monkeypatch.setattr(
        keys.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or compare(a, b)
    )
    assert apps.find(key).name == "first"
    assert len(compared) == 2
    assert {b for _, b in compared} == {key_hash(key)}


def test_a_reader_sees_what_another_process_changes(path):
    reader, writer = AppsFile(path), AppsFile(path)
    assert dict(reader.entries()) == {}
    key = writer.add("mail")
    assert reader.find(key).name == "mail"
    writer.change("mail", weight=3.0, key_only=True)
    assert (reader.find(key).weight, reader.find(key).key_only) == (3.0, True)
    writer.revoke("mail")
    assert reader.find(key) is None
    writer.add("mail")
    assert reader.find(key) is None, "the old key is dead, whoever has the name"
    path.unlink()
    assert dict(reader.entries()) == {}


def test_the_file_is_read_only_when_it_was_changed(apps, monkeypatch):
    key = apps.add("mail")
    assert apps.find(key) is not None
    monkeypatch.setattr(keys, "_read", lambda path: pytest.fail("read again"))
    assert apps.find(key) is not None


def test_changes_at_once_are_all_kept(path):
    def add(number):
        for i in range(5):
            AppsFile(path).add(f"app-{number}-{i}")

    threads = [threading.Thread(target=add, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(AppsFile(path).entries()) == 20


def test_what_cannot_be_leaves_the_file_as_it_is(apps, path, monkeypatch):
    apps.add("mail")
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="'mail'"):
        apps.add("mail")
    with pytest.raises(ConfigError, match="'news'"):
        apps.change("news", weight=2.0)
    with pytest.raises(ConfigError, match="'news'"):
        apps.revoke("news")
    with pytest.raises(ConfigError, match="weight"):
        apps.change("mail", weight=0.0)
    monkeypatch.setattr(keys, "NUM_APPS_MAX", 1)
    with pytest.raises(ConfigError, match="1 apps"):
        apps.add("news")
    assert path.read_bytes() == before


def test_a_full_disk_leaves_the_file_as_it_is(apps, path, monkeypatch):
    apps.add("mail")
    before = path.read_bytes()

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(AppsUnusable, match="No space left"):
        apps.add("news")
    assert path.read_bytes() == before
    assert sorted(file.name for file in path.parent.iterdir()) == ["apps.json", "apps.json.lock"]


@pytest.mark.parametrize(
    "field",
    [
        {"name": ""},
        {"name": "a\nb"},
        {"name": " mail"},
        {"name": "a\x1b[31m"},
        {"name": "\ud800"},
        {"name": "a" * 257},
        {"name": 3},
        {"weight": 0},
        {"weight": "2"},
        {"weight": float("nan")},
        {"priority": "urgent"},
        {"pinned_bytes": -1},
        {"pinned_bytes": True},
        {"num_sessions_max": 0},
        {"rate_per_min": 0},
        {"rate_per_min": 1.5},
        {"key_only": 1},
        {"key_sha256": "ab"},
        {"created_s": None},
    ],
    ids=str,
)
def test_a_field_that_cannot_be_is_named(field):
    good = {"name": "mail", "key_sha256": "0" * 64, "created_s": 1.0}
    assert AppEntry(**good).name == "mail"
    with pytest.raises(ConfigError, match=next(iter(field))):
        AppEntry(**(good | field))


def entry(**fields):
    return {"name": "mail", "key_sha256": "0" * 64, "created_s": 1.0} | fields


DAMAGED = {
    "empty": "",
    "no JSON": "{",
    "no UTF-8": b"\xff",
    "deep": "[" * 100_000,
    "a list": "[]",
    "no apps": '{"version": 1}',
    "a later version": '{"version": 2, "apps": []}',
    "apps are no list": '{"version": 1, "apps": 3}',
    "an app is no object": '{"version": 1, "apps": [3]}',
    "a field lacks": json.dumps({"version": 1, "apps": [{"name": "mail"}]}),
    "a field that is unknown": json.dumps({"version": 1, "apps": [entry(admin=True)]}),
    "a value that cannot be": json.dumps({"version": 1, "apps": [entry(weight=-1)]}),
    "two of one name": json.dumps({"version": 1, "apps": [entry(), entry(key_sha256="1" * 64)]}),
    "two of one key": json.dumps({"version": 1, "apps": [entry(), entry(name="news")]}),
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_told_and_never_written_over(apps, path, text):
    path.parent.mkdir()
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    before = path.read_bytes()
    for act in (apps.entries, lambda: apps.add("news"), lambda: apps.revoke("mail")):
        with pytest.raises(AppsUnusable, match="damaged") as raised:
            act()
        assert raised.value.hint
    assert path.read_bytes() == before


def test_damage_under_a_running_daemon_takes_no_keys(apps, path, caplog):
    key = apps.add("mail")
    assert apps.find(key) is not None
    good = path.read_text()
    path.write_text(good[:-1])
    assert apps.find(key) is not None
    assert apps.find(key) is not None
    assert [record.getMessage() for record in caplog.records if "damaged" in record.message] != []
    assert len(caplog.records) == 1, "told once"
    path.write_text(good.replace('"mail"', '"news"'))
    assert apps.find(key).name == "news"


def test_a_file_that_others_can_read_is_taken_from_them(apps, path, caplog):
    key = apps.add("mail")
    path.chmod(0o644)
    path.parent.chmod(0o755)
    assert AppsFile(path).find(key).name == "mail"
    assert "mode 644" in caplog.text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    apps.add("news")
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_what_is_no_file_of_ours_is_refused(apps, path, monkeypatch):
    apps.add("mail")
    real = path.rename(path.with_name("real"))
    path.symlink_to(real)
    with pytest.raises(AppsUnusable):
        AppsFile(path).entries()
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(AppsUnusable, match="no file"):
        AppsFile(path).entries()
    path.unlink()
    path.mkdir()
    with pytest.raises(AppsUnusable):
        AppsFile(path).entries()
    path.rmdir()
    real.rename(path)
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    with pytest.raises(AppsUnusable, match="another user"):
        AppsFile(path).entries()


def test_where_the_state_is(monkeypatch, tmp_path):
    monkeypatch.setenv("EDGEKV_STATE_DIR", str(tmp_path / "mine"))
    assert state_dir() == tmp_path / "mine"
    assert AppsFile().path == tmp_path / "mine" / "apps.json"
    monkeypatch.delenv("EDGEKV_STATE_DIR")
    monkeypatch.setattr(keys.platformdirs, "user_state_dir", lambda app: str(tmp_path / app))
    assert state_dir() == tmp_path / "edgekv"
    monkeypatch.setattr(keys.platformdirs, "user_state_dir", lambda app: f"~/{app}")
    with pytest.raises(ConfigError, match="home") as raised:
        state_dir()
    assert "EDGEKV_STATE_DIR" in raised.value.hint
