"""The Unix socket's file, and who may open it."""

import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from edgekv.errors import SocketUnusable
from edgekv.server import sockets
from edgekv.server.limits import Limits
from edgekv.server.sockets import allow_open_files, peer_uid, unix_socket


@pytest.fixture
def path(tmp_path):
    return tmp_path / "s" / "edgekv.sock"


def connects(path):
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except OSError:
            return False
        return True


def test_it_listens_and_leaves_nothing_but_its_lock(path):
    with unix_socket(path) as listener:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert connects(path)
    assert listener.fileno() == -1
    assert [file.name for file in path.parent.iterdir()] == ["edgekv.sock.lock"]
    with unix_socket(path):
        assert connects(path)


def test_it_is_private_from_the_first_moment(path, monkeypatch):
    modes = []
    chmod = Path.chmod

    def noted(self, mode):
        modes.append(stat.S_IMODE(self.lstat().st_mode))
        chmod(self, mode)

    monkeypatch.setattr(Path, "chmod", noted)
    before = os.umask(0)
    try:
        with unix_socket(path):
            assert os.umask(0) == 0, "the umask is as it was"
    finally:
        os.umask(before)
    assert [mode & 0o077 for mode in modes] == [0]


def test_of_two_daemons_the_second_is_refused(path):
    with unix_socket(path):
        with pytest.raises(SocketUnusable, match="already") as raised:
            unix_socket(path).__enter__()
        assert "--uds" in raised.value.hint
        assert connects(path)


def test_somebody_else_who_listens_is_left_alone(path):
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen(0)
        for _ in range(3):  # the last ones with its backlog full
            with pytest.raises(SocketUnusable, match="already"):
                unix_socket(path).__enter__()
        assert path.exists()


@pytest.mark.slow
def test_what_a_killed_daemon_left_is_in_nobodys_way(path):
    code = (
        "import sys, time, pathlib\n"
        "from edgekv.server.sockets import unix_socket\n"
        "with unix_socket(pathlib.Path(sys.argv[1])):\n"
        "    print('listens', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as daemon:
        assert daemon.stdout.readline() == "listens\n"
        with pytest.raises(SocketUnusable, match="already"):
            unix_socket(path).__enter__()
        daemon.send_signal(signal.SIGKILL)
    assert path.exists()
    assert not connects(path)
    with unix_socket(path):
        assert connects(path)


def test_what_is_no_socket_is_left_alone(path, tmp_path):
    path.parent.mkdir()
    elsewhere = tmp_path / "elsewhere"
    for make in (
        lambda: path.write_text("text"),
        lambda: path.mkdir(),
        lambda: path.symlink_to(elsewhere),
    ):
        make()
        with pytest.raises(SocketUnusable, match="no socket"):
            unix_socket(path).__enter__()
        path.rmdir() if path.is_dir() else path.unlink()
    with unix_socket(elsewhere):
        path.symlink_to(elsewhere)
        with pytest.raises(SocketUnusable, match="no socket"):
            unix_socket(path).__enter__()


def test_a_place_that_others_rule_is_refused(path, monkeypatch):
    path.parent.mkdir()
    path.parent.chmod(0o777)
    with pytest.raises(SocketUnusable, match="mode 777"):
        unix_socket(path).__enter__()
    path.parent.chmod(0o700)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    own = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    with pytest.raises(SocketUnusable, match="another user"):
        unix_socket(path).__enter__()
    theirs = os.stat_result((0o40700, 0, 0, 0, own + 1, *[0] * 5))
    monkeypatch.setattr(Path, "stat", lambda self: theirs)  # of the folder
    monkeypatch.setattr(Path, "lstat", lambda self: os.lstat(self))
    with pytest.raises(SocketUnusable, match=f"{path} belongs"):
        unix_socket(path).__enter__()


def test_paths_that_cannot_be(tmp_path):
    with pytest.raises(SocketUnusable, match="103"):
        unix_socket(tmp_path / ("é" * 50)).__enter__()
    (tmp_path / "file").touch()
    with pytest.raises(SocketUnusable, match="can be made"):
        unix_socket(tmp_path / "file" / "s").__enter__()


def test_anothers_file_in_its_place_is_left_alone(path):
    with unix_socket(path):
        path.unlink()
        path.write_text("mine")
    assert path.read_text() == "mine"


def test_errors_of_the_daemon_are_its_own(path):
    with pytest.raises(BrokenPipeError), unix_socket(path):
        raise BrokenPipeError
    assert not path.exists()


# --- who is there ---


def test_the_system_says_who_is_there():
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours, theirs:
        assert peer_uid(ours) == os.geteuid()


def test_as_macos_says_it(monkeypatch):
    class Connection:
        def getsockopt(self, level, option, size):
            assert (level, option) == (0, 1)
            return bytes([0, 0, 0, 0, 0xF5, 1, 0, 0, 1, 0, 0, 0]).ljust(size, b"\0")

    monkeypatch.delattr(sockets.socket, "SO_PEERCRED", raising=False)
    assert peer_uid(Connection()) == 501


def test_open_files_are_allowed_as_far_as_they_can_be(monkeypatch):
    set_to = []
    limit = sockets.resource.RLIM_INFINITY
    wanted = 2 * 100 + 512
    for now, then in (
        ((256, limit), [(wanted, limit)]),
        ((256, 500), [(500, 500)]),
        ((1 << 20, 1 << 20), []),
        ((limit, limit), []),
    ):
        set_to.clear()
        monkeypatch.setattr(sockets.resource, "getrlimit", lambda _, now=now: now)
        monkeypatch.setattr(sockets.resource, "setrlimit", lambda _, to: set_to.append(to))
        allow_open_files(Limits(num_connections_max=100))
        assert set_to == then
