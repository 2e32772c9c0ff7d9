"""Reads and writes move all bytes, whatever single calls do; what a system lacks is not missed."""

import errno
import fcntl
import os
import stat
import struct

import pytest
from faulty_files import Fault, FaultyFiles
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekv.store import disk_io
from edgekv.store.disk_io import BUFFERS_MAX, OS_FILES, read_from, write_to


class Both:
    """A file to write, and the same to read."""

    def __init__(self, path, files=OS_FILES) -> None:
        self.path, self.files = path, files
        self.out = files.open(path, create=True)
        self.back = files.open(path, create=False)

    def write(self, buffers) -> int:
        return write_to(self.files, self.out, buffers)

    def read(self, buffers) -> tuple[int, int]:
        return read_from(self.files, self.back, buffers)

    def close(self) -> None:
        self.files.close(self.out)
        self.files.close(self.back)


@pytest.fixture
def both(tmp_path):
    opened = []

    def open_both(files=OS_FILES) -> Both:
        opened.append(Both(tmp_path / "file", files))
        return opened[-1]

    yield open_both
    for each in opened:
        each.close()


def pieces(data: bytes, size: int) -> list[memoryview]:
    return [memoryview(data)[at : at + size] for at in range(0, len(data), size)]


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    data=st.binary(min_size=1, max_size=500),
    write_size=st.integers(1, 100),
    read_size=st.integers(1, 100),
    call_bytes_max=st.integers(1, 600),
    seed=st.integers(0, 100),
    kinds=st.lists(st.sampled_from(["short", "EINTR"]), max_size=6),
)
def test_all_bytes_move_however_calls_cut_them(
    tmp_path_factory, data, write_size, read_size, call_bytes_max, seed, kinds
):
    faults = [Fault(call, 2 * n + 1, kind) for n, kind in enumerate(kinds) for call in CALLS]
    files = FaultyFiles(faults, seed=seed)
    path = tmp_path_factory.getbasetemp() / "cut"
    path.unlink(missing_ok=True)
    file = Both(path, files)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk_io, "CALL_BYTES_MAX", call_bytes_max)
        assert file.write(pieces(data, write_size)) == files.counts["pwritev"]
        into = [bytearray(len(piece)) for piece in pieces(data, read_size)]
        assert file.read(into) == (len(data), files.counts["preadv"])
    file.close()
    assert b"".join(into) == data


CALLS = ("preadv", "pwritev")


def test_more_buffers_than_a_call_takes(both):
    data = os.urandom(3 * BUFFERS_MAX)
    file = both()
    assert file.write([b"", *pieces(data, 1), b""]) == 3
    into = [bytearray(1) for _ in data]
    assert file.read(into) == (len(data), 3)
    assert b"".join(into) == data


def test_buffers_of_any_type_are_bytes(both):
    numbers = memoryview(bytearray(struct.pack("<6d", *range(6)))).cast("d", [2, 3])
    file = both()
    file.write([numbers])
    into = memoryview(bytearray(48)).cast("d", [3, 2])
    assert file.read([into]) == (48, 1)
    assert into.tolist() == [[0, 1], [2, 3], [4, 5]]


def test_a_read_says_where_the_file_ends(both):
    file = both()
    file.write([b"0123456789"])
    first, second = bytearray(6), bytearray(b"------")
    assert file.read([first, second]) == (10, 2)
    assert (first, second) == (b"012345", b"6789--")


def test_a_write_that_moves_nothing_is_an_error(both, monkeypatch):
    files = FaultyFiles()
    monkeypatch.setattr(files, "pwritev", lambda *_: 0)
    with pytest.raises(OSError, match="wrote nothing") as caught:
        both(files).write([b"data"])
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize("call", CALLS)
def test_errors_of_the_system_come_through(both, call):
    file = both(FaultyFiles([Fault(call, 1, "EIO")]))
    transfer = file.read if call == "preadv" else file.write
    with pytest.raises(OSError, match="injected") as caught:
        transfer([bytearray(4)])
    assert caught.value.errno == errno.EIO


def test_files_are_private_new_and_no_links(tmp_path):
    path = tmp_path / "file"
    OS_FILES.close(OS_FILES.open(path, create=True))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(OSError) as caught:
        OS_FILES.open(tmp_path / "link", create=False)
    assert caught.value.errno == errno.ELOOP
    for taken in ("link", "file"):
        with pytest.raises(FileExistsError):
            OS_FILES.open(tmp_path / taken, create=True)
    with pytest.raises(FileNotFoundError):
        OS_FILES.open(tmp_path / "none", create=False)


def test_the_other_calls_are_the_system_s(tmp_path):
    OS_FILES.close(OS_FILES.open(tmp_path / "file", create=True))
    assert OS_FILES.volume_free_bytes(tmp_path) > 0
    OS_FILES.unlink(tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_where_files_can_go_past_the_page_cache_they_do(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(fcntl, "F_NOCACHE", 48, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda *call: asked.append(call))
    for create in (True, False):
        fd = OS_FILES.open(tmp_path / "file", create=create)
        assert asked.pop() == (fd, 48, 1)
        OS_FILES.close(fd)
