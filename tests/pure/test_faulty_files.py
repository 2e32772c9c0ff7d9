"""The fake disk itself: each fault does what it says, once, where it was told."""

import errno
import os

import pytest
from faulty_files import Fault, FaultyFiles

from edgekv.store.disk_io import Files

DATA = bytes(range(64))


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(DATA)
    return path


class InPlace(Files):
    """Files that can be read and written, whatever they are opened for."""

    def open(self, path, *, create):
        return os.open(path, os.O_RDWR)


def with_fault(path, *fault, **options):
    files = FaultyFiles([Fault(*fault)], files=InPlace(), **options)
    return files, files.open(path, create=False)


def differing_bits(one: bytes, other: bytes) -> int:
    assert len(one) == len(other)
    return sum((a ^ b).bit_count() for a, b in zip(one, other, strict=True))


def test_without_faults_it_is_the_system_and_counts(path, tmp_path):
    files = FaultyFiles()
    new = files.open(tmp_path / "new", create=True)
    into = bytearray(64)
    assert files.pwritev(new, [DATA], 0) == 64
    fd = files.open(tmp_path / "new", create=False)
    assert files.preadv(fd, [into], 0) == 64
    assert files.volume_free_bytes(tmp_path) > 0
    files.close(fd)
    files.close(new)
    files.unlink(tmp_path / "new")
    assert into == DATA
    assert files.injected == []
    assert files.counts.pop("*") == 8
    assert files.counts == {
        **{"open": 2, "close": 2, "preadv": 1, "pwritev": 1, "unlink": 1},
        "volume_free_bytes": 1,
    }


def test_the_nth_call_fails_and_no_other(path):
    files, fd = with_fault(path, "preadv", 2, "ENOSPC")
    into = [bytearray(1)]
    files.preadv(fd, into, 0)
    with pytest.raises(OSError, match="injected into preadv 2") as caught:
        files.preadv(fd, into, 0)
    assert caught.value.errno == errno.ENOSPC
    files.preadv(fd, into, 0)
    files.close(fd)
    assert files.injected == [("preadv", "ENOSPC")]


def test_a_dead_disk_stays_dead(path):
    files, fd = with_fault(path, "*", 3, "EIO", True)
    files.volume_free_bytes(path)
    for call, argument in (
        (files.volume_free_bytes, path),
        (files.unlink, path),
        (files.close, fd),
    ):
        with pytest.raises(OSError, match="injected"):
            call(argument)
    assert [call for call, _ in files.injected] == ["volume_free_bytes", "unlink", "close"]


def test_eintr_is_what_python_calls_it(path):
    files, fd = with_fault(path, "preadv", 1, "EINTR")
    with pytest.raises(InterruptedError):
        files.preadv(fd, [bytearray(1)], 0)
    files.close(fd)


@pytest.mark.parametrize("kind", ["short", "torn"])
def test_some_bytes_move_and_not_all(path, kind):
    for call in ("preadv", "pwritev"):
        path.write_bytes(DATA)
        files, fd = with_fault(path, call, 1, kind)
        buffers = [bytearray(b"\xff" * 32), bytearray(b"\xff" * 32)]
        if kind == "short":
            assert 0 < getattr(files, call)(fd, buffers, 0) < 64
        else:
            with pytest.raises(OSError, match="injected after"):
                getattr(files, call)(fd, buffers, 0)
        files.close(fd)
        moved = b"".join(buffers) if call == "preadv" else path.read_bytes()
        assert moved not in (DATA, b"\xff" * 64)


def test_a_lost_write_is_not_noticed(path):
    files, fd = with_fault(path, "pwritev", 1, "lost")
    assert files.pwritev(fd, [b"new", b"er"], 0) == 5
    files.close(fd)
    assert path.read_bytes() == DATA


def test_one_bit_flips_and_the_seed_says_which(path):
    written = []
    for seed in (1, 1, 2):
        path.write_bytes(DATA)
        files, fd = with_fault(path, "pwritev", 1, "flip", seed=seed)
        assert files.pwritev(fd, [DATA[:10], DATA[10:]], 0) == 64
        files.close(fd)
        written.append(path.read_bytes())
        assert differing_bits(written[-1], DATA) == 1
    assert written[0] == written[1] != written[2]

    path.write_bytes(DATA)
    files, fd = with_fault(path, "preadv", 1, "flip")
    into = [bytearray(10), bytearray(100)]
    assert files.preadv(fd, into, 0) == 64
    files.close(fd)
    assert differing_bits(b"".join(into)[:64], DATA) == 1
    assert path.read_bytes() == DATA


def test_a_fault_that_means_nothing_to_a_call_is_not_counted_as_injected(path):
    files, fd = with_fault(path, "*", 2, "flip", True)
    files.volume_free_bytes(path)
    files.pwritev(fd, [b"x"], 0)
    files.close(fd)
    assert files.injected == [("pwritev", "flip")]


def test_the_volume_looks_as_full_as_told(tmp_path):
    files = FaultyFiles()
    files.free_bytes = 123
    assert files.volume_free_bytes(tmp_path) == 123
