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

from edgekv.store import files as files_module
from edgekv.store.files import BUFFERS_MAX, OS_FILES, read_at, write_at


@pytest.fixture
def fd(tmp_path):
    descriptor = OS_FILES.open(tmp_path / "file", create=True)
    yield descriptor
    OS_FILES.close(descriptor)


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
    fd = files.open(tmp_path_factory.getbasetemp() / "cut", create=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files_module, "CALL_BYTES_MAX", call_bytes_max)
        write_at(files, fd, pieces(data, write_size), 7)
        into = [bytearray(len(piece)) for piece in pieces(data, read_size)]
        assert read_at(files, fd, into, 7) == len(data)
    files.close(fd)
    assert b"".join(into) == data


CALLS = ("preadv", "pwritev")


def test_more_buffers_than_a_call_takes(fd):
    files, data = FaultyFiles(), os.urandom(3 * BUFFERS_MAX)
    write_at(files, fd, [b"", *pieces(data, 1), b""], 0)
    into = [bytearray(1) for _ in data]
    assert read_at(files, fd, into, 0) == len(data)
    assert b"".join(into) == data
    assert files.counts["pwritev"] == files.counts["preadv"] == 3


def test_buffers_of_any_type_are_bytes(fd):
    numbers = memoryview(bytearray(struct.pack("<6d", *range(6)))).cast("d", [2, 3])
    write_at(OS_FILES, fd, [numbers], 0)
    into = memoryview(bytearray(48)).cast("d", [3, 2])
    assert read_at(OS_FILES, fd, [into], 0) == 48
    assert into.tolist() == [[0, 1], [2, 3], [4, 5]]


def test_a_read_says_where_the_file_ends(fd):
    write_at(OS_FILES, fd, [b"0123456789"], 0)
    first, second = bytearray(6), bytearray(b"------")
    assert read_at(OS_FILES, fd, [first, second], 0) == 10
    assert (first, second) == (b"012345", b"6789--")
    assert read_at(OS_FILES, fd, [first], 10) == 0


def test_a_write_that_moves_nothing_is_an_error(fd, monkeypatch):
    files = FaultyFiles()
    monkeypatch.setattr(files, "pwritev", lambda *_: 0)
    with pytest.raises(OSError, match="wrote nothing") as caught:
        write_at(files, fd, [b"data"], 0)
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize("call", CALLS)
def test_errors_of_the_system_come_through(fd, call):
    files = FaultyFiles([Fault(call, 1, "EIO")])
    transfer = read_at if call == "preadv" else write_at
    with pytest.raises(OSError, match="injected") as caught:
        transfer(files, fd, [bytearray(4)], 0)
    assert caught.value.errno == errno.EIO


def test_files_are_private_and_no_links(tmp_path):
    path = tmp_path / "file"
    OS_FILES.close(OS_FILES.open(path, create=True))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (tmp_path / "link").symlink_to(path)
    for create in (False, True):
        with pytest.raises(OSError) as caught:
            OS_FILES.open(tmp_path / "link", create=create)
        assert caught.value.errno == errno.ELOOP
    with pytest.raises(FileNotFoundError):
        OS_FILES.open(tmp_path / "none", create=False)


def test_the_other_calls_are_the_system_s(fd, tmp_path):
    OS_FILES.allocate(fd, 0, 1 << 17)
    assert OS_FILES.size(fd) == 1 << 17
    OS_FILES.truncate(fd, 5)
    OS_FILES.fsync(fd)
    assert OS_FILES.size(fd) == (tmp_path / "file").stat().st_size == 5
    assert OS_FILES.volume_free_bytes(tmp_path) > 0
    OS_FILES.unlink(tmp_path / "file")
    assert not (tmp_path / "file").exists()


# --- preallocation, as each system has it ---


def refuse(number: int):
    def call(*_):
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_that_cannot_preallocate_gets_a_longer_file(fd, monkeypatch, number):
    monkeypatch.setattr(files_module, "_preallocate", refuse(number))
    OS_FILES.allocate(fd, 0, 4096)
    assert OS_FILES.size(fd) == 4096


def test_a_full_volume_is_an_error(fd, monkeypatch):
    monkeypatch.setattr(files_module, "_preallocate", refuse(errno.ENOSPC))
    with pytest.raises(OSError) as caught:
        OS_FILES.allocate(fd, 0, 4096)
    assert caught.value.errno == errno.ENOSPC
    assert OS_FILES.size(fd) == 0


def test_where_posix_fallocate_is_it_is_asked(fd, monkeypatch):
    asked = []
    monkeypatch.delattr(fcntl, "F_NOCACHE", raising=False)
    monkeypatch.setattr(os, "posix_fallocate", lambda *call: asked.append(call), raising=False)
    OS_FILES.allocate(fd, 4096, 12288)
    assert asked == [(fd, 4096, 8192)]
    assert OS_FILES.size(fd) == 12288


def test_where_files_can_go_past_the_page_cache_they_do(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(fcntl, "F_NOCACHE", 48, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", lambda *call: asked.append(call))
    fd = OS_FILES.open(tmp_path / "file", create=True)
    OS_FILES.allocate(fd, 4096, 12288)
    # fstore_t: F_ALLOCATEALL, F_PEOFPOSMODE, offset 0, length, bytes allocated (out)
    assert asked == [(fd, 48, 1), (fd, 42, struct.pack("=Iiqqq", 4, 3, 0, 8192, 0))]
    assert OS_FILES.size(fd) == 12288
    OS_FILES.close(fd)
