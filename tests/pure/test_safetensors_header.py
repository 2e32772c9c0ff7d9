import json
import pathlib
import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekv.errors import CheckpointCorrupt, EdgeKVError
from edgekv.models.safetensors_file import HEADER_BYTES_MAX, SafetensorInfo, read_header

A = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
B = {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]}


def raw_file(header: bytes, num_data_bytes: int = 32) -> bytes:
    return struct.pack("<Q", len(header)) + header + bytes(num_data_bytes)


def written(folder: pathlib.Path, raw: bytes) -> pathlib.Path:
    path = folder / "model.safetensors"
    path.write_bytes(raw)
    return path


def with_header(folder: pathlib.Path, header: object) -> pathlib.Path:
    return written(folder, raw_file(json.dumps(header).encode()))


def test_reads_shapes_dtypes_and_places(tmp_path):
    path = with_header(tmp_path, {"__metadata__": {"format": "mlx"}, "a": A, "b": B})
    found = read_header(path)
    size = path.stat().st_size
    assert found == {
        "a": SafetensorInfo(dtype="F32", shape=(2, 3), start=size - 32, end=size - 8),
        "b": SafetensorInfo(dtype="BF16", shape=(4,), start=size - 8, end=size),
    }


def test_metadata_may_be_absent_or_null(tmp_path):
    assert set(read_header(with_header(tmp_path, {"a": A}))) == {"a"}
    assert set(read_header(with_header(tmp_path, {"__metadata__": None, "a": A}))) == {"a"}


def test_scalars_and_empty_tensors_are_legal(tmp_path):
    scalar = {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}
    empty = {"dtype": "F32", "shape": [0, 4], "data_offsets": [2, 2]}
    found = read_header(with_header(tmp_path, {"s": scalar, "e": empty}))
    assert found["s"].shape == ()
    assert found["e"].shape == (0, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": None}, "no dtype"),
        ({"shape": None}, "malformed shape"),
        ({"shape": [-2, -3]}, "malformed shape"),
        ({"shape": [True, 6]}, "malformed shape"),
        ({"shape": [2.0, 3]}, "malformed shape"),
        ({"shape": [1] * 9}, "malformed shape"),
        ({"shape": [1 << 31, 0]}, "malformed shape"),
        ({"shape": [2, 4]}, "needs 32 bytes"),
        ({"data_offsets": None}, "malformed data_offsets"),
        ({"data_offsets": [0, 24, 48]}, "malformed data_offsets"),
        ({"data_offsets": [24, 0]}, "malformed data_offsets"),
        ({"data_offsets": [-24, 0]}, "malformed data_offsets"),
        ({"data_offsets": [0, 23]}, "span 23"),
        ({"data_offsets": [1000, 1024]}, "ends at byte"),
        ({"data_offsets": [8, 32]}, "overlap"),
    ],
)
def test_a_malformed_tensor_is_named(tmp_path, change, message):
    path = with_header(tmp_path, {"a": A | change, "b": B})
    with pytest.raises(CheckpointCorrupt, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert "'a'" in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize("dtype", ["F8_E5M2", "F4", "F64", "of tomorrow"])
def test_an_unknown_dtype_leaves_the_others_readable(tmp_path, dtype):
    found = read_header(with_header(tmp_path, {"a": A | {"dtype": dtype, "shape": [7]}, "b": B}))
    assert (found["a"].dtype, found["b"].dtype) == (dtype, "BF16")
    change = {"dtype": dtype, "data_offsets": [0, 1000]}
    with pytest.raises(CheckpointCorrupt, match="'a' ends at byte"):
        read_header(with_header(tmp_path, {"a": A | change, "b": B}))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "0 bytes are too few"),
        (b"1234567", "7 bytes are too few"),
        (struct.pack("<Q", HEADER_BYTES_MAX + 1), "exceeds the limit"),
        (struct.pack("<Q", 100) + b"{}", "exceeds the file's 10"),
        (raw_file(b"{"), "not valid JSON"),
        (raw_file(b""), "not valid JSON"),
        (raw_file(b"[]"), "not a JSON object"),
        (raw_file(b'{"a": 1}'), "'a' is not described"),
        (raw_file(b'{"a": [], "a": []}'), "occurs twice"),
        (raw_file(b'{"a": NaN}'), "not valid JSON"),
        (raw_file(b'{"\\ud800": {}}'), "not valid JSON"),
        (raw_file(b'{"\xff": {}}'), "not valid JSON"),
        (raw_file('{"a": {}}'.encode("utf-16")), "not valid JSON"),
        (raw_file(b"[" * 100_000), "not valid JSON"),
        (raw_file(b'{"a": ' + b"9" * 5000 + b"}"), "not valid JSON"),
        (raw_file(b'{"__metadata__": {"n": 1}}'), "__metadata__"),
        (raw_file(b'{"__metadata__": []}'), "__metadata__"),
    ],
)
def test_a_malformed_file_is_corrupt(tmp_path, raw, message):
    with pytest.raises(CheckpointCorrupt, match=message):
        read_header(written(tmp_path, raw))


def test_a_truncated_file_is_corrupt_at_every_length(tmp_path):
    raw = raw_file(json.dumps({"a": A, "b": B}).encode())
    for length in range(len(raw)):
        with pytest.raises(CheckpointCorrupt):
            read_header(written(tmp_path, raw[:length]))


def test_an_unreadable_file_is_corrupt(tmp_path):
    with pytest.raises(CheckpointCorrupt, match="cannot be read"):
        read_header(tmp_path)


def test_flipped_bytes_load_or_are_typed_errors(tmp_path):
    rng = random.Random(2)
    good = raw_file(json.dumps({"__metadata__": {"k": "v"}, "a": A, "b": B}).encode())
    num_errors = 0
    for _ in range(400):
        raw = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            raw[rng.randrange(len(raw) - 32)] = rng.randrange(256)
        try:
            read_header(written(tmp_path, bytes(raw)))
        except EdgeKVError:
            num_errors += 1
    assert num_errors > 200


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=8,
)
TENSOR = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U32", "F64", "BOOL"]) | JSON,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 40), min_size=2, max_size=2) | JSON,
    }
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, derandomize=True)
@given(header=st.dictionaries(st.text(max_size=4), TENSOR | JSON, max_size=4) | JSON)
def test_any_json_loads_or_is_a_typed_error(tmp_path_factory, header):
    path = with_header(tmp_path_factory.getbasetemp(), header)
    size = path.stat().st_size
    try:
        found = read_header(path)
    except EdgeKVError:
        return
    assert all(8 <= info.start <= info.end <= size for info in found.values())
