"""Records that end with a state: where a session can be gone on from, and what damage costs."""

import struct
from pathlib import Path

import pytest
import xxhash
from tiny_store import FINGERPRINT, kv_of, open_store, record_files, tokens

from edgekv.errors import RecordCorrupt
from edgekv.store import LayerState, Store
from edgekv.store.disk_io import OS_FILES
from edgekv.store.record import RecordFormat, read_record, write_record

TOKEN_BYTES = 64
LAYERS = (
    LayerState(dtype="uint8", dtype_bytes=1, num_heads=1, head_dim=TOKEN_BYTES // 2),
    LayerState(kind="none", dtype="uint8", dtype_bytes=1, num_heads=0, head_dim=0),
    LayerState(kind="state", dtype="float32", dtype_bytes=4, num_heads=3, head_dim=5),
    LayerState(kind="state", dtype="bfloat16", dtype_bytes=2, num_heads=2, head_dim=4),
)
STATE_BYTES = 3 * 5 * 4 + 2 * 4 * 2
IDS = tokens(100)


def state_of(num_tokens: int) -> bytes:
    return xxhash.xxh3_128_digest(kv_of(IDS[:num_tokens]))[:4] * (STATE_BYTES // 4)


def opened(root: Path) -> Store:
    return open_store(root, layers=LAYERS)


def write(store: Store, key: int, start: int, end: int, *, state: bool) -> None:
    payload = [kv_of(IDS[:end], start, TOKEN_BYTES)]
    store.write(key, start, IDS[start:end], payload + [state_of(end)] * state)


@pytest.fixture
def store(tmp_path):
    """A session of 100 tokens with states behind 20, 60 and 100."""
    with opened(tmp_path) as store:
        key = store.session("mail", "inbox", persistent=True).key
        for start, end, state in ((0, 20, True), (20, 40, False), (40, 60, True), (60, 100, True)):
            write(store, key, start, end, state=state)
        store.check_integrity()
        yield store


def test_it_says_from_where_a_session_can_go_on(store):
    stored = store.find("mail", "inbox")
    assert stored.num_tokens == 100
    assert stored.state_ends == [20, 60, 100]
    points = [stored.resume_point(n) for n in (0, 19, 20, 59, 60, 99, 100)]
    assert points == [0, 0, 20, 20, 60, 60, 100]


def test_a_record_used_in_part_has_no_state(store):
    key = store.find("mail", "inbox").key
    store.truncate(key, 90)
    assert store.find("mail", "inbox").state_ends == [20, 60]
    assert store.find("mail", "inbox").num_tokens == 90


def test_a_match_ends_where_there_is_a_state(store):
    other = store.session("mail", "other", persistent=True).key
    assert store.match("mail", [*IDS[:75], *tokens(9, seed=1)], but_not=other)[1] == 60
    assert store.match("mail", IDS[:15], but_not=other) == (0, 0)
    donor, num_tokens = store.match("mail", IDS, but_not=other)
    assert num_tokens == 100
    store.adopt(other, donor, 60)
    assert store.find("mail", "other").state_ends == [20, 60]


def test_the_longest_that_can_be_gone_on_from_wins(store):
    """Not the longest that is the same."""
    other = store.session("mail", "other", persistent=True).key
    write(store, other, 0, 80, state=True)
    assert store.match("mail", IDS[:85]) == (other, 80)
    assert store.match("mail", IDS[:70]) == (store.find("mail", "inbox").key, 60)


def test_kv_is_read_with_and_without_the_state(store):
    for ref in store.find("mail", "inbox").records:
        kv_bytes = (ref.end - ref.start) * TOKEN_BYTES
        expected = kv_of(IDS[: ref.end], ref.start, TOKEN_BYTES)
        kv, state = bytearray(kv_bytes), bytearray(STATE_BYTES)
        store.read(ref, [kv])
        assert bytes(kv) == expected
        if ref.ends_with_state:
            store.read(ref, [memoryview(kv)[:10], memoryview(kv)[10:], state])
            assert bytes(state) == state_of(ref.end)
            assert bytes(kv) == expected
            assert ref.payload_bytes == kv_bytes + STATE_BYTES + 8
        else:
            assert ref.payload_bytes == kv_bytes


def test_a_restart_knows_them(store, tmp_path):
    store.close()
    with opened(tmp_path) as again:
        stored = again.find("mail", "inbox")
        assert stored.state_ends == [20, 60, 100]
        assert again.snapshot().num_records_lost == 0
        again.check_integrity()


def test_a_damaged_state_is_of_no_interest_until_it_is_read(store):
    path = record_files(store)[-1]
    data = bytearray(path.read_bytes())
    data[-1 - 8] ^= 1
    path.write_bytes(data)
    ref = store.find("mail", "inbox").records[-1]
    kv = bytearray(40 * TOKEN_BYTES)
    store.read(ref, [kv])
    assert bytes(kv) == kv_of(IDS, 60, TOKEN_BYTES)
    with pytest.raises(RecordCorrupt, match="the state's checksum"):
        store.read(ref, [kv, bytearray(STATE_BYTES)])


@pytest.mark.parametrize("at", range(-STATE_BYTES - 8, 0))
def test_every_byte_of_a_state_and_its_checksum_matters(tmp_path, at):
    path, form, record = written(tmp_path, state=True)
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << at % 8
    path.write_bytes(data)
    with pytest.raises(RecordCorrupt, match="the state's checksum"):
        read_record(OS_FILES, path, form, record, [bytearray(TOKEN_BYTES), bytearray(STATE_BYTES)])


@pytest.mark.parametrize("num_lost", [1, 8, 9, STATE_BYTES + 8])
def test_a_truncated_state_is_refused(tmp_path, num_lost):
    path, form, record = written(tmp_path, state=True)
    path.write_bytes(path.read_bytes()[:-num_lost])
    read_record(OS_FILES, path, form, record, [bytearray(TOKEN_BYTES)])
    with pytest.raises(RecordCorrupt, match="the state's checksum"):
        read_record(OS_FILES, path, form, record, [bytearray(TOKEN_BYTES), bytearray(STATE_BYTES)])


def written(folder, *, state):
    """A record of one token."""
    form = RecordFormat(FINGERPRINT, LAYERS)
    with opened(folder / "other") as store:
        key = store.session("a", "b", persistent=True).key
        write(store, key, 0, 1, state=state)
        record = store._catalog.records[store.find("a", "b").records[0].record_id]
    path = folder / "a.kv"
    payload = [kv_of(IDS[:1], 0, TOKEN_BYTES)] + [state_of(1)] * state
    write_record(OS_FILES, path, form, record, payload)
    return path, form, record


@pytest.mark.parametrize("state", [False, True])
def test_the_bytes_are_as_documented(tmp_path, state):
    path, form, _ = written(tmp_path, state=state)
    data = path.read_bytes()
    stored = state_of(1) + xxhash.xxh3_64_digest(state_of(1))[::-1] if state else b""
    kv = kv_of(IDS[:1], 0, TOKEN_BYTES)
    assert data[form.header_bytes :] == kv + stored
    assert struct.unpack("<Q", data[96:104]) == (TOKEN_BYTES + len(stored),)
    assert data[104:112] == xxhash.xxh3_64_digest(kv)[::-1]
    offsets = [struct.unpack("<Q", data[176 + 48 * i : 184 + 48 * i])[0] for i in range(4)]
    assert offsets == [0, TOKEN_BYTES, TOKEN_BYTES, TOKEN_BYTES + state * 60]
    assert data[136 + 2 * 48 :][:12] == b"state".ljust(12, b"\0")


def test_a_record_with_a_state_is_none_without_one(tmp_path):
    """Whoever expects the other kind takes neither for what it is not."""
    for state in (False, True):
        path, form, record = written(tmp_path / str(state), state=state)
        record.state_bytes = 0 if state else form.stored_state_bytes
        record.payload_bytes = TOKEN_BYTES + record.state_bytes
        with pytest.raises(RecordCorrupt, match="payload length"):
            read_record(OS_FILES, path, form, record, [bytearray(TOKEN_BYTES)])
