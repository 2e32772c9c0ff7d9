"""Record, segment file and a bad disk together: what comes back is what was written, or refused."""

import os
import tracemalloc
from collections.abc import Callable
from typing import get_args

import pytest
from faulty_files import Fault, FaultKind, FaultyFiles

from edgekv.errors import RecordCorrupt
from edgekv.store.extents import BLOCK_BYTES
from edgekv.store.record import HEADER_BYTES, RecordKey, hash_tokens, pack, verify
from edgekv.store.segment_file import SegmentFile

PAYLOAD_BYTES = 3000
OFFSET = BLOCK_BYTES


def key_of(start: int, payload_bytes: int = PAYLOAD_BYTES) -> RecordKey:
    end = start + 16
    return RecordKey(
        fingerprint="a" * 64,
        start=start,
        end=end,
        payload_bytes=payload_bytes,
        tokens_xxh3=hash_tokens(range(end)),
    )


def write(segments: SegmentFile, key: RecordKey, payload: bytes, *, vectored: bool) -> None:
    pieces = [memoryview(payload)[at : at + 1000] for at in range(0, len(payload), 1000)]
    segments.write(OFFSET, [pack(key, pieces), *pieces], vectored=vectored)


def read(segments: SegmentFile, key: RecordKey, *, vectored: bool) -> bytes:
    header, into = bytearray(HEADER_BYTES), [bytearray(1500), bytearray(1500)]
    segments.read(OFFSET, [header, *into], vectored=vectored)
    path, offset = segments.path(OFFSET)
    verify(header, into, key, path=path, offset=offset)
    return b"".join(into)


def run(folder, files: FaultyFiles, *, vectored: bool) -> list[type[Exception] | None]:
    """Write a record over an older one and read it twice; what each step came to (None: well)."""
    segments = SegmentFile(folder, files=files)
    new = os.urandom(PAYLOAD_BYTES)

    def write_both() -> None:
        segments.grow(2 * BLOCK_BYTES)
        write(segments, key_of(0), bytes(PAYLOAD_BYTES), vectored=vectored)
        write(segments, key_of(16), new, vectored=vectored)

    def read_back() -> None:
        assert read(segments, key_of(16), vectored=vectored) == new

    outcomes = [outcome(write_both)]
    if segments.size_bytes:
        outcomes += [outcome(read_back), outcome(read_back)]
    segments.close()
    return outcomes


def outcome(step: Callable[[], None]) -> type[Exception] | None:
    try:
        step()
    except (OSError, RecordCorrupt) as error:
        return type(error)
    return None


@pytest.mark.parametrize("vectored", [True, False])
@pytest.mark.parametrize("kind", get_args(FaultKind))
def test_a_record_is_what_was_written_or_it_is_refused(tmp_path, kind, vectored):
    recorded, injected = FaultyFiles(), 0
    (tmp_path / "good").mkdir()
    assert run(tmp_path / "good", recorded, vectored=vectored) == [None] * 3
    for call in sorted(set(recorded.counts) - {"*", "close"}):
        for nth in range(1, recorded.counts[call] + 1):
            folder = tmp_path / f"{call}-{nth}"
            folder.mkdir()
            files = FaultyFiles([Fault(call, nth, kind)], seed=nth)
            outcomes = run(folder, files, vectored=vectored)
            injected += len(files.injected)
            if kind == "short" or (kind == "EINTR" and call in {"preadv", "pwritev"}):
                assert outcomes == [None] * 3
            if kind in {"lost", "flip"} and call == "pwritev" and nth > recorded.counts[call] // 2:
                assert outcomes == [None, RecordCorrupt, RecordCorrupt]
            if kind == "flip" and call == "preadv":
                assert sorted(map(str, outcomes)) == sorted(map(str, [None, None, RecordCorrupt]))
    assert injected >= 2


@pytest.mark.parametrize("vectored", [True, False])
@pytest.mark.parametrize("num_buffers", [1, 256])
def test_nothing_of_the_payload_is_copied(tmp_path, num_buffers, vectored):
    num_bytes = 4 << 20
    payload = [memoryview(bytearray(num_bytes // num_buffers)) for _ in range(num_buffers)]
    key = key_of(0, num_bytes)
    header = bytearray(HEADER_BYTES)
    segments = SegmentFile(tmp_path)
    segments.grow(8 << 20)
    tracemalloc.start()
    try:
        segments.write(0, [pack(key, payload), *payload], vectored=vectored)
        segments.read(0, [header, *payload], vectored=vectored)
        verify(header, payload, key, path=tmp_path, offset=0)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        segments.close()
    assert peak_bytes < 256 << 10
