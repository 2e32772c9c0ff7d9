import stat

import platformdirs
import pytest
from prompt_toolkit.history import InMemoryHistory

from edgekv.cli import prompt as history_module
from edgekv.cli.prompt import PrivateHistory, open_history


def entries(path):
    history = open_history(path)
    assert isinstance(history, PrivateHistory)
    return list(history.load_history_strings())  # newest first


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_kept_for_the_owner_only(tmp_path, capsys):
    path = tmp_path / "state" / "chat_history"
    history = open_history(path)
    history.append_string("one\ntwo")
    history.append_string("three \udcff")
    assert capsys.readouterr().err == ""
    assert entries(path) == ["three ?", "one\ntwo"]
    assert mode(path) == 0o600
    assert mode(path.parent) == 0o700


def test_old_file_is_closed_to_others(tmp_path):
    path = tmp_path / "chat_history"
    path.touch(mode=0o644)
    entries(path)
    assert mode(path) == 0o600


def test_default_place_is_the_state_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("EDGEKV_STATE_DIR")
    monkeypatch.setattr(platformdirs, "user_state_dir", lambda app: str(tmp_path / app))
    open_history()
    assert (tmp_path / "edgekv" / "chat_history").exists()


def no_home(_app):
    raise RuntimeError("there is no home folder")


@pytest.mark.parametrize("found", [lambda app: f"~/{app}", no_home])
def test_without_a_home_it_is_not_kept_in_the_current_folder(tmp_path, monkeypatch, capsys, found):
    monkeypatch.delenv("EDGEKV_STATE_DIR")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(platformdirs, "user_state_dir", found)
    assert isinstance(open_history(), InMemoryHistory)
    assert "has no home folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_oldest_entries_go_when_it_grows_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(history_module, "_HISTORY_BYTES_MAX", 4000)
    path = tmp_path / "chat_history"
    history = open_history(path)
    for index in range(100):
        history.append_string(f"entry {index}\nsecond line")
    kept = entries(path)
    assert path.stat().st_size <= 2000
    assert kept == [f"entry {index}\nsecond line" for index in range(99, 99 - len(kept), -1)]
    assert len(kept) > 10


def test_place_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "state").write_text("a file, not a folder")
    history = open_history(tmp_path / "state" / "chat_history")
    assert isinstance(history, InMemoryHistory)
    assert capsys.readouterr().err.startswith("warning: history is not kept")


def test_failing_write_does_not_end_the_conversation(tmp_path):
    path = tmp_path / "chat_history"
    history = open_history(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(OSError):
        path.open("ab")
    history.append_string("hello")
    assert history.get_strings()[-1] == "hello"
