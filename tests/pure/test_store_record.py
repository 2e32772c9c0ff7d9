"""Records: the bytes are those of the docstring, and no others pass for what was asked."""

import itertools
import os
import struct
import tracemalloc
from array import array
from dataclasses import replace
from typing import get_args

import pytest
import xxhash
from faulty_files import Fault, FaultKind, FaultyFiles
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekv.errors import RecordCorrupt
from edgekv.store import LayerState
from edgekv.store.disk_io import OS_FILES
from edgekv.store.record import (
    Record,
    RecordFormat,
    find_difference,
    hash_payload,
    hash_tokens,
    read_record,
    write_record,
)

TOKENS = array("I", range(100, 148))
LAYERS = (
    LayerState(dtype="float16", dtype_bytes=2, num_heads=1, head_dim=2),
    LayerState(dtype="float32", dtype_bytes=4, num_heads=2, head_dim=1),
)
TOKENS_XXH3 = hash_tokens(TOKENS)
PAYLOAD = bytes(range(256)) * 3  # 32 tokens of 24 bytes


def what(fingerprint="f" * 64, layers=LAYERS, start=16, end=48, tokens_xxh3=TOKENS_XXH3):
    """A record of these tokens: what it shares with others, and what it is."""
    form = RecordFormat(fingerprint, layers)
    record = Record(
        record_id=1,
        start=start,
        end=end,
        payload_bytes=(end - start) * form.token_bytes,
        token_ids=TOKENS[start:end],
        tokens_xxh3=tokens_xxh3,
    )
    return form, record


FORM, RECORD = what()
CHECKED = 136 + 2 * 48  # bytes of a header of two layers in front of its checksum
WHOLE = FORM.header(RECORD, hash_payload([PAYLOAD]))


def check(header, payload=PAYLOAD):
    """In what header and payload are not the record; "" if they are."""
    return find_difference(header, [payload], len(header) + len(payload), FORM, RECORD)


def resealed(header: bytes) -> bytes:
    """A header with a checksum of its own that is right."""
    digest = struct.pack("<Q", xxhash.xxh3_64_intdigest(header[:CHECKED]))
    return header[:CHECKED] + digest + header[CHECKED + 8 :]


def test_the_bytes_are_as_documented():
    assert len(WHOLE) == FORM.header_bytes == 4096
    assert WHOLE[:16] == b"edgekvR\n" + struct.pack("<II", 2, 4096)
    assert WHOLE[16:80] == b"f" * 64
    assert struct.unpack("<QQQ", WHOLE[80:104]) == (16, 48, len(PAYLOAD))
    assert WHOLE[104:112] == xxhash.xxh3_64_digest(PAYLOAD)[::-1]
    ids = struct.pack("<48I", *TOKENS)
    assert WHOLE[112:128] == xxhash.xxh3_128_digest(ids)
    assert struct.unpack("<II", WHOLE[128:136]) == (2, 48)
    for at, name, size, heads, dim, offset in (
        (136, b"float16", 2, 1, 2, 0),
        (184, b"float32", 4, 2, 1, 256),
    ):
        assert WHOLE[at : at + 24] == b"kv".ljust(12, b"\0") + name.ljust(12, b"\0")
        rest = struct.unpack("<HHIQQ", WHOLE[at + 24 : at + 48])
        assert rest == (size, 0, heads, dim, offset)
    assert WHOLE[232:240] == xxhash.xxh3_64_digest(WHOLE[:232])[::-1]
    assert not any(WHOLE[240:])


def test_the_format_did_not_change_unawares():
    digest = xxhash.xxh3_64_hexdigest(WHOLE)
    assert digest == "f43d3be51edda806", "a change of format needs a new FORMAT_VERSION"


@pytest.mark.parametrize(("num_layers", "size"), [(1, 4096), (82, 4096), (83, 8192), (200, 12288)])
def test_a_header_grows_with_its_layers(tmp_path, num_layers, size):
    layers = LAYERS[:1] * num_layers
    form, record = what(layers=layers)
    assert form.header_bytes == size
    payload = bytes(record.payload_bytes)
    path = tmp_path / "a.kv"
    write_record(OS_FILES, path, form, record, [payload])
    assert path.stat().st_size == form.file_bytes(record) == size + len(payload)
    into = bytearray(len(payload))
    read_record(OS_FILES, path, form, record, [into])
    last_differs = what(layers=(*layers[:-1], replace(LAYERS[0], dtype="bfloat16")))
    with pytest.raises(RecordCorrupt, match=f"description of layer {num_layers - 1}"):
        read_record(OS_FILES, path, *last_differs, [into])


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    payload=st.binary(min_size=24, max_size=300).filter(lambda data: len(data) % 24 == 0),
    cuts=st.lists(st.integers(0, 300), max_size=5),
    start=st.integers(0, 1 << 40),
    fingerprint=st.text("0123456789abcdef", min_size=1, max_size=64),
)
def test_what_was_packed_is_right_however_it_is_cut(payload, cuts, start, fingerprint):
    form, record = what(fingerprint, start=start, end=start + len(payload) // 24)
    edges = [0, *sorted(min(cut, len(payload)) for cut in cuts), len(payload)]
    pieces = [memoryview(payload)[a:b] for a, b in itertools.pairwise(edges)]
    header = form.header(record, hash_payload(pieces))
    whole_bytes = form.file_bytes(record)
    assert find_difference(header, pieces, whole_bytes, form, record) == ""
    assert hash_payload(pieces) == xxhash.xxh3_64_intdigest(payload)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"fingerprint": "e" * 64}, "model fingerprint"),
        ({"fingerprint": "f" * 32}, "model fingerprint"),
        ({"start": 0}, "start: 16, expected 0"),
        ({"end": 49}, "end: 48, expected 49"),
        ({"tokens_xxh3": hash_tokens(TOKENS[1:])}, "tokens' hash"),
        ({"layers": LAYERS[:1]}, "number of layers: 2, expected 1"),
        ({"layers": LAYERS[::-1]}, "description of layer 0"),
        ({"layers": (LAYERS[0], replace(LAYERS[1], num_heads=1, head_dim=2))}, "of layer 1"),
        ({"layers": (LAYERS[0], replace(LAYERS[1], num_heads=3))}, "payload length"),
    ],
)
def test_a_record_of_something_else_is_refused_by_name(tmp_path, change, named):
    path, (form, record) = tmp_path / "a.kv", what(**change)
    write_record(OS_FILES, path, FORM, RECORD, [PAYLOAD])
    with pytest.raises(RecordCorrupt, match=named) as caught:
        read_record(OS_FILES, path, form, record, [bytearray(record.payload_bytes)])
    assert caught.value.path == path
    assert named in caught.value.difference
    assert "recomputed" in caught.value.hint


def test_every_byte_of_the_header_matters():
    header = bytearray(WHOLE)
    for index in range(len(header)):
        header[index] ^= 1 << index % 8
        assert check(header), index
        header[index] ^= 1 << index % 8
    assert check(header) == ""


def test_every_byte_of_the_payload_matters():
    payload = bytearray(PAYLOAD)
    for index in range(len(payload)):
        payload[index] ^= 1 << index % 8
        assert check(WHOLE, payload) == "the payload's checksum"
        payload[index] ^= 1 << index % 8
    assert check(WHOLE, payload) == ""


@pytest.mark.parametrize(
    ("header", "named"),
    [
        (bytes(4096), "no record begins here"),
        (PAYLOAD, "no record begins here"),
        (b"edgekvR\n" + struct.pack("<I", 3) + bytes(4084), "version: 3, expected 2"),
        (b"edgekvR\n" + struct.pack("<I", 1) + bytes(4084), "version: 1, expected 2"),
        (resealed(WHOLE[:12] + struct.pack("<I", 8192) + WHOLE[16:]), "header length: 8192"),
        (WHOLE[:133] + b"\1" + WHOLE[134:], "length of a layer's entry"),
        (WHOLE[:CHECKED] + bytes(8) + WHOLE[CHECKED + 8 :], "the header's checksum"),
        (WHOLE[:104] + bytes(8) + WHOLE[112:], "the header's checksum"),
        (resealed(WHOLE[:104] + bytes(8) + WHOLE[112:]), "the payload's checksum"),
        (WHOLE[:4095] + b"\1", "the header's padding"),
    ],
)
def test_what_is_no_header_is_refused_by_name(header, named):
    assert named in check(header)


@pytest.mark.parametrize("num_read", [0, 8, 135, 136, 4096, 4096 + 767])
def test_a_file_that_is_too_short_is_refused(tmp_path, num_read):
    (tmp_path / "a.kv").write_bytes((WHOLE + PAYLOAD)[:num_read])
    with pytest.raises(RecordCorrupt, match="magic" if num_read < 136 else "length: "):
        read_record(OS_FILES, tmp_path / "a.kv", FORM, RECORD, [bytearray(768)])


def test_a_file_that_is_not_there_is_no_damage(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_record(OS_FILES, tmp_path / "a.kv", FORM, RECORD, [bytearray(768)])


# --- record and bad disk together ---


def outcome(step) -> type[Exception] | None:
    try:
        step()
    except (OSError, RecordCorrupt) as error:
        return type(error)
    return None


def write_and_read(folder, files) -> list[type[Exception] | None]:
    """Write a record and read it twice; what each step came to (None: well)."""
    path, data = folder / "a.kv", os.urandom(768)
    pieces = [data[:300], data[300:]]

    def read_back() -> None:
        into = [bytearray(500), bytearray(268)]
        read_record(files, path, FORM, RECORD, into)
        assert b"".join(into) == data

    outcomes = [outcome(lambda: write_record(files, path, FORM, RECORD, pieces))]
    if path.exists():
        outcomes += [outcome(read_back), outcome(read_back)]
    return outcomes


@pytest.mark.parametrize("kind", get_args(FaultKind))
def test_a_record_is_what_was_written_or_it_is_refused(tmp_path, kind):
    recorded, injected = FaultyFiles(), 0
    (tmp_path / "good").mkdir()
    assert write_and_read(tmp_path / "good", recorded) == [None] * 3
    for call in sorted(set(recorded.counts) - {"*"}):
        for nth in range(1, recorded.counts[call] + 1):
            folder = tmp_path / f"{call}-{nth}"
            folder.mkdir()
            files = FaultyFiles([Fault(call, nth, kind)], seed=nth)
            outcomes = write_and_read(folder, files)
            injected += len(files.injected)
            if kind == "short" or (kind == "EINTR" and call in {"preadv", "pwritev"}):
                assert outcomes == [None] * 3
            if kind in {"lost", "flip"} and call == "pwritev":
                assert outcomes == [None, RecordCorrupt, RecordCorrupt]
            if kind == "flip" and call == "preadv":
                assert sorted(map(str, outcomes)) == sorted(map(str, [None, None, RecordCorrupt]))
            if kind in {"EIO", "ENOSPC", "torn"} and call == "pwritev":
                assert outcomes == [OSError, RecordCorrupt, RecordCorrupt]
    assert injected >= 1


@pytest.mark.parametrize("num_buffers", [1, 256])
def test_nothing_of_the_payload_is_copied(tmp_path, num_buffers):
    num_bytes = 4 << 20
    payload = [memoryview(bytearray(num_bytes // num_buffers)) for _ in range(num_buffers)]
    form, record = what(layers=(replace(LAYERS[0], head_dim=num_bytes // 32 // 4),))
    tracemalloc.start()
    try:
        assert write_record(OS_FILES, tmp_path / "a.kv", form, record, payload) == 1
        assert read_record(OS_FILES, tmp_path / "a.kv", form, record, payload) == 1
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 256 << 10


def test_tokens_hash_as_documented():
    assert hash_tokens(TOKENS[:16]) != hash_tokens(TOKENS)
    assert hash_tokens(array("I")) == xxhash.xxh3_128_digest(b"")
    for other in (array("q", TOKENS), array("i", TOKENS)):
        with pytest.raises(AssertionError):
            hash_tokens(other)


def test_a_range_that_is_none_is_a_bug(tmp_path):
    for change in ({"end": 16}, {"start": -1}, {"fingerprint": "f" * 65}):
        form, record = what(**change)
        with pytest.raises(AssertionError):
            write_record(OS_FILES, tmp_path / "a.kv", form, record, [bytes(record.payload_bytes)])
    with pytest.raises(AssertionError):
        write_record(OS_FILES, tmp_path / "a.kv", FORM, RECORD, [PAYLOAD[1:]])
    assert not list(tmp_path.iterdir())
