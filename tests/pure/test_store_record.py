"""Records: the bytes are those of the docstring, and no others pass for what was asked."""

import itertools
import struct
from array import array
from dataclasses import replace
from pathlib import Path

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekv.errors import RecordCorrupt
from edgekv.store.record import HEADER_BYTES, RecordKey, hash_payload, hash_tokens, pack, verify

TOKENS = list(range(100, 148))
PAYLOAD = bytes(range(256)) * 3
KEY = RecordKey(
    fingerprint="f" * 64,
    start=16,
    end=48,
    payload_bytes=len(PAYLOAD),
    tokens_xxh3=hash_tokens(TOKENS),
)
PATH = Path("folder/segment-0000.kv")


def check(header, payload=(PAYLOAD,), key=KEY):
    verify(header, payload, key, path=PATH, offset=65536)


def resealed(header: bytes) -> bytes:
    """A header with a checksum of its own that is right."""
    return header[:128] + struct.pack("<Q", xxhash.xxh3_64_intdigest(header[:128])) + header[136:]


def test_the_bytes_are_as_documented():
    header = pack(KEY, [PAYLOAD])
    assert len(header) == HEADER_BYTES == 4096
    assert header[:16] == b"edgekvR\n" + struct.pack("<II", 1, 4096)
    assert header[16:80] == b"f" * 64
    assert struct.unpack("<QQQ", header[80:104]) == (16, 48, len(PAYLOAD))
    assert header[104:112] == xxhash.xxh3_64_digest(PAYLOAD)[::-1]
    ids = struct.pack("<48I", *TOKENS)
    assert header[112:128] == xxhash.xxh3_128_digest(ids)
    assert header[128:136] == xxhash.xxh3_64_digest(header[:128])[::-1]
    assert not any(header[136:])


def test_the_format_did_not_change_unawares():
    digest = xxhash.xxh3_64_hexdigest(pack(KEY, [PAYLOAD]))
    assert digest == "50bd3889e69efb0a", "a change of format needs a new FORMAT_VERSION"


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    payload=st.binary(min_size=1, max_size=300),
    cuts=st.lists(st.integers(0, 300), max_size=5),
    start=st.integers(0, 1 << 40),
    num_tokens=st.integers(1, 1 << 20),
    fingerprint=st.text("0123456789abcdef", min_size=1, max_size=64),
)
def test_what_was_packed_verifies_however_it_is_cut(payload, cuts, start, num_tokens, fingerprint):
    key = RecordKey(
        fingerprint=fingerprint,
        start=start,
        end=start + num_tokens,
        payload_bytes=len(payload),
        tokens_xxh3=hash_tokens([1, 2, 3]),
    )
    edges = [0, *sorted(min(cut, len(payload)) for cut in cuts), len(payload)]
    pieces = [memoryview(payload)[a:b] for a, b in itertools.pairwise(edges)]
    check(pack(key, [payload]), pieces, key)
    assert pack(key, pieces) == pack(key, [payload])
    assert hash_payload(pieces) == xxhash.xxh3_64_intdigest(payload)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"fingerprint": "e" * 64}, "model fingerprint"),
        ({"fingerprint": "f" * 32}, "model fingerprint"),
        ({"start": 0}, "token range"),
        ({"end": 49}, "token range"),
        ({"payload_bytes": 767}, "payload length"),
        ({"tokens_xxh3": hash_tokens(TOKENS[1:])}, "tokens' hash"),
    ],
)
def test_a_record_of_something_else_is_refused_by_name(change, named):
    key = replace(KEY, **change)
    with pytest.raises(RecordCorrupt, match=named) as caught:
        check(pack(KEY, [PAYLOAD]), [PAYLOAD[: key.payload_bytes]], key)
    assert (caught.value.path, caught.value.offset) == (PATH, 65536)
    assert named in caught.value.difference
    assert "recomputed" in caught.value.hint


def test_every_byte_of_the_header_matters():
    header = bytearray(pack(KEY, [PAYLOAD]))
    for index in range(HEADER_BYTES):
        header[index] ^= 1 << index % 8
        with pytest.raises(RecordCorrupt):
            check(header)
        header[index] ^= 1 << index % 8
    check(header)


def test_every_byte_of_the_payload_matters():
    header, payload = pack(KEY, [PAYLOAD]), bytearray(PAYLOAD)
    for index in range(len(payload)):
        payload[index] ^= 1 << index % 8
        with pytest.raises(RecordCorrupt, match="payload's checksum"):
            check(header, [payload])
        payload[index] ^= 1 << index % 8
    check(header, [payload])


@pytest.mark.parametrize(
    ("header", "named"),
    [
        (bytes(4096), "no record begins here"),
        (PAYLOAD, "no record begins here"),
        (pack(KEY, [PAYLOAD])[:100], "no record begins here"),
        (b"edgekvR\n" + struct.pack("<I", 2) + bytes(4084), "version: 2, this edgekv reads 1"),
        (b"edgekvR\n" + struct.pack("<I", 1) + bytes(4084), "the header's checksum"),
        (
            resealed(b"edgekvR\n" + struct.pack("<I", 0) + pack(KEY, [PAYLOAD])[12:]),
            "the format version: 0, expected 1",
        ),
        (
            resealed(pack(KEY, [PAYLOAD])[:12] + struct.pack("<I", 64) + bytes(4080)),
            "the header length: 64, expected 4096",
        ),
        (pack(KEY, [PAYLOAD])[:4095] + b"\1", "the header's padding"),
    ],
)
def test_what_is_no_header_is_refused_by_name(header, named):
    with pytest.raises(RecordCorrupt, match=named):
        check(header)


def test_tokens_hash_alike_in_every_form():
    whole = array("I", TOKENS)
    assert hash_tokens(TOKENS) == hash_tokens(tuple(TOKENS)) == hash_tokens(whole)
    assert hash_tokens(array("q", TOKENS)) == hash_tokens(array("i", TOKENS)) == hash_tokens(whole)
    assert hash_tokens(range(100, 148)) == hash_tokens(whole)
    assert hash_tokens(whole[:16]) == hash_tokens(TOKENS[:16]) != hash_tokens(whole)
    assert hash_tokens([]) == xxhash.xxh3_128_digest(b"")


def test_a_range_that_is_none_is_a_bug():
    for change in ({"end": 16}, {"start": -1}, {"payload_bytes": 0}, {"fingerprint": "f" * 65}):
        with pytest.raises(AssertionError):
            replace(KEY, **change)
    with pytest.raises(AssertionError):
        pack(KEY, [PAYLOAD[1:]])
