import pathlib
import random
import struct

import pytest
from fuzz import fuzz
from hypothesis import strategies as st

from edgekv.errors import CheckpointCorrupt, EdgeKVError, UnsupportedModel
from edgekv.models import gguf_file
from edgekv.models.gguf_file import GGML_TYPES, GgufTensorInfo, read_header

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
CODES = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?"}
CODES |= {U64: "Q", I64: "q", F64: "d"}


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def scalar(kind: int, value: object) -> bytes:
    return text(value) if kind == STRING else struct.pack("<" + CODES[kind], value)


def key(name: str | bytes, kind: int, value: object) -> bytes:
    return text(name) + struct.pack("<I", kind) + scalar(kind, value)


def array(name: str, kind: int, values: list, count: int | None = None) -> bytes:
    head = struct.pack("<IIQ", ARRAY, kind, len(values) if count is None else count)
    return text(name) + head + b"".join(scalar(kind, value) for value in values)


def tensor(name: str | bytes, dims: tuple[int, ...], type_number: int, offset: int) -> bytes:
    info = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return text(name) + info + struct.pack("<IQ", type_number, offset)


def gguf(
    keys: list[bytes] = (),
    tensors: list[bytes] = (),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    alignment: int = 32,
    num_data_bytes: int = 64,
    counts: tuple[int, int] | None = None,
) -> bytes:
    counts = counts or (len(tensors), len(keys))
    head = magic + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + bytes(num_data_bytes)


def written(folder: pathlib.Path, raw: bytes) -> pathlib.Path:
    path = folder / "model.gguf"
    path.write_bytes(raw)
    return path


KEYS = [
    key("u8", U8, 200),
    key("i8", I8, -5),
    key("u16", U16, 60000),
    key("i16", I16, -3),
    key("u32", U32, 4_000_000_000),
    key("i32", I32, -7),
    key("f32", F32, 0.5),
    key("yes", BOOL, True),
    key("name", STRING, "Grüße"),
    key("u64", U64, 1 << 63),
    key("i64", I64, -9),
    key("f64", F64, 0.1),
    array("tokens", STRING, ["a", "Ġ", "", "end"]),
    array("scores", F32, [0.25, -1.0]),
    array("flags", BOOL, [True, False]),
    array("none", I32, []),
]
TENSORS = [tensor("a.weight", (4, 2), 0, 0), tensor("b.weight", (32, 1), 2, 32)]
GOOD = gguf(KEYS, TENSORS)


def test_every_value_type_becomes_a_plain_python_value(tmp_path):
    header = read_header(written(tmp_path, GOOD))
    assert header.metadata == {
        "u8": 200,
        "i8": -5,
        "u16": 60000,
        "i16": -3,
        "u32": 4_000_000_000,
        "i32": -7,
        "f32": 0.5,
        "yes": True,
        "name": "Grüße",
        "u64": 1 << 63,
        "i64": -9,
        "f64": 0.1,
        "tokens": ["a", "Ġ", "", "end"],
        "scores": [0.25, -1.0],
        "flags": [True, False],
        "none": [],
    }
    assert type(header.metadata["yes"]) is bool


def test_tensors_have_logical_shapes_and_places_in_the_file(tmp_path):
    header = read_header(written(tmp_path, GOOD))
    at = len(GOOD) - 64
    assert at % 32 == 0
    assert header.tensors == {
        "a.weight": GgufTensorInfo(type=GGML_TYPES[0], shape=(2, 4), start=at, end=at + 32),
        "b.weight": GgufTensorInfo(type=GGML_TYPES[2], shape=(1, 32), start=at + 32, end=at + 50),
    }


def test_version_2_and_another_alignment(tmp_path):
    raw = gguf([key("general.alignment", U32, 128)], TENSORS[:1], version=2, alignment=128)
    start = read_header(written(tmp_path, raw)).tensors["a.weight"].start
    assert (start, start % 128) == (len(raw) - 64, 0)


def test_a_header_larger_than_a_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_file, "CHUNK_BYTES", 7)
    tokens = [f"token{i}" * (i % 4) for i in range(300)]
    raw = gguf([*KEYS, array("many", STRING, tokens)], TENSORS)
    header = read_header(written(tmp_path, raw))
    assert header.metadata["many"] == tokens
    assert header.metadata["name"] == "Grüße"
    assert set(header.tensors) == {"a.weight", "b.weight"}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "goes on past byte 0"),
        (gguf(magic=b"GGML"), "not a GGUF file"),
        (gguf(counts=(1 << 60, 0)), "number of tensors"),
        (gguf(counts=(0, 1 << 60)), "number of keys"),
        (gguf([key("a", U8, 1), key("a", U8, 1)]), "'a' occurs twice"),
        (gguf([text("a") + struct.pack("<I", 99)]), "'a' has value type 99"),
        (gguf([array("a", ARRAY, [])]), "'a' has value type 9"),
        (gguf([key(b"\xff", U8, 1)]), "a key is not UTF-8"),
        (gguf([key("a", STRING, b"\xff")]), "'a' is not UTF-8"),
        (gguf([array("a", STRING, ["x", b"\xff"])]), "a string of 'a' is not UTF-8"),
        (gguf([key("k" * 5000, U8, 1)]), "length of a key is 5000"),
        (gguf([array("a", U8, [], count=1 << 40)]), "number of elements of 'a'"),
        (gguf([array("a", F32, [], count=1 << 20)]), "goes on past"),
        (gguf([array("a", STRING, ["x"], count=1 << 20)]), "goes on past|length of a string"),
        (gguf([key("general.alignment", U32, 24)]), "power of two"),
        (gguf([key("general.alignment", U32, 0)]), "power of two"),
        (gguf([key("general.alignment", STRING, "32")]), "power of two"),
        (gguf([], [tensor("t", (), 0, 0)]), "'t' has 0 dimensions"),
        (gguf([], [tensor("t", (1,) * 5, 0, 0)]), "'t' has 5 dimensions"),
        (gguf([], [tensor("t", (0,), 0, 0)]), "'t' has a malformed shape"),
        (gguf([], [tensor("t", (1 << 40,), 0, 0)]), "'t' has a malformed shape"),
        (gguf([], [tensor("t", (33,), 2, 0)]), "not whole Q4_0 blocks"),
        (gguf([], [tensor("t", (4,), 0, 4)]), "'t' does not start at a multiple of 32"),
        (gguf([], [tensor("t", (17,), 0, 0)]), "'t' ends at byte"),
        (gguf([], [tensor("t", (4,), 0, 1 << 62)]), "'t' ends at byte"),
        (gguf([], [tensor("t", (4,), 0, 0), tensor("t", (4,), 0, 32)]), "'t' occurs twice"),
        (gguf([], [tensor("t", (4,), 0, 0), tensor("u", (4,), 0, 0)]), "overlap"),
        (gguf([], [tensor(b"\xff", (4,), 0, 0)]), "name is not UTF-8"),
    ],
)
def test_a_malformed_file_is_corrupt(tmp_path, raw, message):
    path = written(tmp_path, raw)
    with pytest.raises(CheckpointCorrupt, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (gguf(version=1), "version 1"),
        (gguf(version=4), "version 4"),
        (gguf(version=3 << 24), "big-endian"),
        (gguf([key("split.count", U16, 3)]), "one of 3 parts"),
        (gguf([], [tensor("t", (4,), 28, 0)]), r"'t' has ggml type 28 \(F64\)"),
        (gguf([], [tensor("t", (64,), 40, 0)]), r"'t' has ggml type 40 \(NVFP4\)"),
        (gguf([], [tensor("t", (64,), 99, 0)]), "'t' has ggml type 99$"),
        (gguf([], [tensor("t", (4,), 4, 0)]), "'t' has ggml type 4"),
    ],
)
def test_what_is_not_supported_says_what_is(tmp_path, raw, message):
    with pytest.raises(UnsupportedModel, match=message) as caught:
        read_header(written(tmp_path, raw))
    assert caught.value.hint


def test_a_string_beyond_the_limit_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_file, "STRING_BYTES_MAX", 8)
    for keys in ([key("a", STRING, "123456789")], [array("a", STRING, ["x", "123456789"])]):
        with pytest.raises(CheckpointCorrupt, match="more than the limit of 8"):
            read_header(written(tmp_path, gguf(keys)))


def test_an_unreadable_file_is_corrupt(tmp_path):
    with pytest.raises(CheckpointCorrupt, match="cannot be read"):
        read_header(tmp_path)


def test_a_truncated_file_is_corrupt_at_every_length(tmp_path):
    used = len(GOOD) - 64 + 50
    for length in range(used):
        with pytest.raises(CheckpointCorrupt):
            read_header(written(tmp_path, GOOD[:length]))
    assert read_header(written(tmp_path, GOOD[:used]))


def test_flipped_bytes_load_or_are_typed_errors(tmp_path):
    rng = random.Random(1)
    num_errors = 0
    for _ in range(600):
        raw = bytearray(GOOD)
        for _ in range(rng.randint(1, 4)):
            raw[rng.randrange(len(raw) - 64)] = rng.choice((0, 1, 0x7F, 0xFF, rng.randrange(256)))
        try:
            read_header(written(tmp_path, bytes(raw)))
        except EdgeKVError:
            num_errors += 1
    assert num_errors > 200


@fuzz(
    examples=150,
    cut=st.integers(0, len(GOOD)),
    paste=st.binary(max_size=24),
    drop=st.integers(0, 24),
)
def test_spliced_bytes_load_or_are_typed_errors(tmp_path_factory, cut, paste, drop):
    path = written(tmp_path_factory.getbasetemp(), GOOD[:cut] + paste + GOOD[cut + drop :])
    size = path.stat().st_size
    try:
        header = read_header(path)
    except EdgeKVError:
        return
    for info in header.tensors.values():
        assert 24 <= info.start < info.end <= size


@pytest.mark.parametrize("chunk", [1, 2, 3, 8, 13, 64])
def test_strings_round_trip_whatever_the_chunk(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(gguf_file, "CHUNK_BYTES", chunk)
    rng = random.Random(chunk)
    values = {
        f"k{i}": ["".join(rng.choices("aé漢😀", k=rng.randrange(20))) for _ in range(i * 3)]
        for i in range(8)
    }
    raw = gguf([array(name, STRING, strings) for name, strings in values.items()])
    assert read_header(written(tmp_path, raw)).metadata == values
