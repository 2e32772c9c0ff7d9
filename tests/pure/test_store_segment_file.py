"""Segment files: one address space over several files, whatever is found when they are opened."""

import errno
import os

import pytest
from faulty_files import Fault, FaultyFiles

from edgekv.errors import RecordCorrupt
from edgekv.store.extents import BLOCK_BYTES
from edgekv.store.segment_file import SegmentFile

SEGMENT = 4 * BLOCK_BYTES


@pytest.fixture
def opened():
    """Open segment files of 4 blocks; they are closed at the end."""
    opened = []

    def open_files(folder, **options) -> SegmentFile:
        opened.append(SegmentFile(folder, segment_bytes=SEGMENT, **options))
        return opened[-1]

    yield open_files
    for segments in opened:
        segments.close()


def lengths(folder) -> list[int]:
    return [path.stat().st_size for path in sorted(folder.iterdir())]


def test_a_new_folder_is_empty_and_grows_in_files(tmp_path, opened):
    segments = opened(tmp_path)
    assert segments.size_bytes == 0
    assert lengths(tmp_path) == []
    segments.grow(BLOCK_BYTES)
    assert lengths(tmp_path) == [BLOCK_BYTES]
    segments.grow(2 * SEGMENT + BLOCK_BYTES)
    assert segments.size_bytes == 2 * SEGMENT + BLOCK_BYTES
    assert lengths(tmp_path) == [SEGMENT, SEGMENT, BLOCK_BYTES]
    assert [path.name for path in sorted(tmp_path.iterdir())][-1] == "segment-0002.kv"
    assert segments.path(SEGMENT + 5) == (tmp_path / "segment-0001.kv", 5)


@pytest.mark.parametrize("vectored", [True, False])
def test_what_was_written_is_read_by_another_opener(tmp_path, opened, vectored):
    files = FaultyFiles()
    segments = opened(tmp_path, files=files)
    segments.grow(2 * SEGMENT)
    data = [os.urandom(5000), b"", os.urandom(BLOCK_BYTES - 5000)]
    for offset in (0, SEGMENT - BLOCK_BYTES, SEGMENT + BLOCK_BYTES):
        segments.write(offset, data, vectored=vectored)
    assert files.counts["pwritev"] == (3 if vectored else 6)
    segments.sync()
    assert files.counts["fsync"] == 2
    segments.close()

    again = opened(tmp_path, files=files)
    assert again.size_bytes == 2 * SEGMENT
    for offset in (0, SEGMENT - BLOCK_BYTES, SEGMENT + BLOCK_BYTES):
        into = [bytearray(100), bytearray(BLOCK_BYTES - 100)]
        again.read(offset, into, vectored=vectored)
        assert b"".join(into) == b"".join(data)
    assert files.counts["preadv"] == (3 if vectored else 6)


def test_shrinking_gives_files_back(tmp_path, opened):
    segments = opened(tmp_path)
    segments.grow(3 * SEGMENT)
    segments.shrink(SEGMENT + BLOCK_BYTES)
    assert segments.size_bytes == SEGMENT + BLOCK_BYTES
    assert lengths(tmp_path) == [SEGMENT, BLOCK_BYTES]
    segments.shrink(SEGMENT)
    assert lengths(tmp_path) == [SEGMENT]
    segments.grow(SEGMENT + BLOCK_BYTES)
    assert lengths(tmp_path) == [SEGMENT, BLOCK_BYTES]
    segments.shrink(0)
    assert segments.size_bytes == 0
    assert lengths(tmp_path) == []


def test_files_behind_a_gap_or_a_short_one_are_removed(tmp_path, opened):
    opened(tmp_path).grow(4 * SEGMENT)
    (tmp_path / "segment-0002.kv").unlink()
    assert opened(tmp_path).size_bytes == 2 * SEGMENT
    assert lengths(tmp_path) == [SEGMENT, SEGMENT]
    os.truncate(tmp_path / "segment-0000.kv", BLOCK_BYTES)
    assert opened(tmp_path).size_bytes == BLOCK_BYTES
    assert lengths(tmp_path) == [BLOCK_BYTES]


def test_bytes_that_no_address_leads_to_are_cut_off(tmp_path, opened):
    path = tmp_path / "segment-0000.kv"
    path.write_bytes(bytes(BLOCK_BYTES + 77))
    assert opened(tmp_path).size_bytes == BLOCK_BYTES == path.stat().st_size
    path.write_bytes(bytes(SEGMENT + BLOCK_BYTES))
    assert opened(tmp_path).size_bytes == SEGMENT == path.stat().st_size


def test_other_files_of_the_folder_are_left_alone(tmp_path, opened):
    (tmp_path / "index.sqlite").write_bytes(b"rows")
    opened(tmp_path).grow(BLOCK_BYTES)
    assert lengths(tmp_path) == [4, BLOCK_BYTES]


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_growth_that_fails_leaves_what_is_counted(tmp_path, opened, nth):
    files = FaultyFiles([Fault("allocate", nth, "ENOSPC")])
    segments = opened(tmp_path, files=files)
    with pytest.raises(OSError) as caught:
        segments.grow(2 * SEGMENT + BLOCK_BYTES)
    assert caught.value.errno == errno.ENOSPC
    assert segments.size_bytes == sum(lengths(tmp_path)) == (nth - 1) * SEGMENT
    segments.grow(3 * SEGMENT)
    assert lengths(tmp_path) == [SEGMENT] * 3


def test_what_failed_growth_had_got_is_given_back(tmp_path, opened):
    class HalfFull(FaultyFiles):
        def allocate(self, fd, start, end):
            super().allocate(fd, start, (start + end) // 2)
            raise OSError(errno.ENOSPC, "full")

    segments = opened(tmp_path, files=HalfFull())
    with pytest.raises(OSError, match="full"):
        segments.grow(SEGMENT)
    assert lengths(tmp_path) == [0]
    assert opened(tmp_path).size_bytes == 0
    segments.shrink(0)
    assert lengths(tmp_path) == []


@pytest.mark.parametrize("call", ["unlink", "truncate", "close"])
def test_shrinking_that_fails_says_what_it_reached(tmp_path, opened, call):
    files = FaultyFiles([Fault(call, 1, "EIO")])
    segments = opened(tmp_path, files=files)
    segments.grow(2 * SEGMENT + BLOCK_BYTES)
    with pytest.raises(OSError, match="injected"):
        segments.shrink(SEGMENT + BLOCK_BYTES)
    assert segments.size_bytes == sum(lengths(tmp_path))
    segments.shrink(SEGMENT + BLOCK_BYTES)
    assert lengths(tmp_path) == [SEGMENT, BLOCK_BYTES]


@pytest.mark.parametrize("call", ["open", "size", "unlink"])
def test_opening_that_fails_closes_what_it_opened(tmp_path, opened, call):
    opened(tmp_path).grow(2 * SEGMENT)
    (tmp_path / "segment-0007.kv").touch()
    files = FaultyFiles([Fault(call, 1 if call == "unlink" else 2, "EIO")])
    with pytest.raises(OSError, match="injected"):
        SegmentFile(tmp_path, segment_bytes=SEGMENT, files=files)
    num_opened = files.counts["open"] - (call == "open")
    assert files.counts["close"] == num_opened == (1 if call == "open" else 2)


def test_a_file_that_somebody_cut_is_corrupt_and_named(tmp_path, opened):
    segments = opened(tmp_path)
    segments.grow(2 * SEGMENT)
    os.truncate(tmp_path / "segment-0001.kv", BLOCK_BYTES + 10)
    for vectored in (True, False):
        with pytest.raises(RecordCorrupt, match=f"ends at {BLOCK_BYTES + 10}") as caught:
            segments.read(SEGMENT + BLOCK_BYTES, [bytearray(8), bytearray(8)], vectored=vectored)
        assert caught.value.path == tmp_path / "segment-0001.kv"
        assert caught.value.offset == BLOCK_BYTES


def test_addresses_outside_and_across_are_bugs(tmp_path, opened):
    segments = opened(tmp_path)
    segments.grow(2 * SEGMENT)
    for offset in (-1, SEGMENT - 5, 2 * SEGMENT - 5, 2 * SEGMENT):
        with pytest.raises(AssertionError):
            segments.read(offset, [bytearray(10)])
        with pytest.raises(AssertionError):
            segments.write(offset, [bytes(10)])
    with pytest.raises(AssertionError):
        segments.shrink(3 * SEGMENT)


def test_closing_twice_is_harmless(tmp_path, opened):
    segments = opened(tmp_path)
    segments.grow(SEGMENT)
    segments.close()
    segments.close()
    assert segments.size_bytes == 0
