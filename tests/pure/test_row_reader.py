"""Parts of a matrix in a file: the right bytes, and no others."""

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekv.errors import CheckpointCorrupt
from edgekv.models import row_reader
from edgekv.models.row_reader import StoredMatrix, runs

START = 7


def matrix_in(path, num_rows: int, num_units: int, unit_bytes: int) -> tuple:
    """A file of random rows behind a few other bytes; what they are."""
    shape = (num_rows, num_units, unit_bytes)
    values = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    path.write_bytes(b"before!" + values.tobytes() + b"behind")
    stored = StoredMatrix(
        what=f"{path}: tensor 't'",
        start=START,
        row_bytes=num_units * unit_bytes,
        unit_bytes=unit_bytes,
    )
    return stored, values


def read(stored: StoredMatrix, path, rows, units) -> np.ndarray:
    out = np.zeros((len(rows), len(units) * stored.unit_bytes), np.uint8)
    with path.open("rb") as file:
        stored.read(file, np.array(rows), np.array(units), out)
    return out.reshape(len(rows), len(units), -1)


@pytest.fixture
def num_read(monkeypatch) -> list[int]:
    """Bytes that were read so far, as its sum."""
    counted: list[int] = []
    preadv = os.preadv

    def counting(fd, buffers, offset):
        num_bytes = preadv(fd, buffers, offset)
        counted.append(num_bytes)
        return num_bytes

    monkeypatch.setattr(os, "preadv", counting)
    return counted


@given(data=st.data(), gaps=st.sampled_from([0, 5, 4096]), piece=st.sampled_from([1, 50, 1 << 20]))
def test_any_rows_and_units(tmp_path_factory, data, gaps, piece):
    path = tmp_path_factory.mktemp("rows") / "file"
    stored, values = matrix_in(path, 9, 6, 5)
    rows = sorted(data.draw(st.sets(st.integers(0, 8), min_size=1)))
    units = sorted(data.draw(st.sets(st.integers(0, 5), min_size=1)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_reader, "_GAPS_BYTES", gaps)
        patch.setattr(row_reader, "_PIECE_BYTES", piece)
        found = read(stored, path, rows, units)
    np.testing.assert_array_equal(found, values[rows][:, units])


def test_rows_are_read_at_once_and_alone(tmp_path, num_read):
    stored, values = matrix_in(tmp_path / "file", 100, 8, 64)
    found = read(stored, tmp_path / "file", range(20, 70), range(8))
    np.testing.assert_array_equal(found, values[20:70])
    assert num_read == [50 * 512]


def test_half_of_long_rows_is_half_of_the_bytes(tmp_path, num_read):
    stored, values = matrix_in(tmp_path / "file", 10, 64, 256)
    found = read(stored, tmp_path / "file", range(10), range(16, 48))
    np.testing.assert_array_equal(found, values[:, 16:48])
    assert sum(num_read) == values.nbytes / 2


def test_short_gaps_are_read_too_in_pieces(tmp_path, num_read, monkeypatch):
    stored, values = matrix_in(tmp_path / "file", 100, 8, 64)
    monkeypatch.setattr(row_reader, "_PIECE_BYTES", 30 * 512)
    found = read(stored, tmp_path / "file", range(100), range(4))
    np.testing.assert_array_equal(found, values[:, :4])
    assert num_read == [30 * 512, 30 * 512, 30 * 512, 10 * 512]


@pytest.mark.parametrize("units", [range(8), range(4)])
def test_a_file_that_ends_too_soon(tmp_path, units):
    path = tmp_path / "file"
    stored, values = matrix_in(path, 10, 8, 4)
    os.truncate(path, START + values.nbytes - 1)
    with pytest.raises(CheckpointCorrupt, match="tensor 't' is cut off"):
        read(stored, path, range(5, 10), units)


def test_runs():
    assert runs(np.array([3])) == [(3, 4)]
    assert runs(np.array([0, 1, 2, 7, 9, 10])) == [(0, 3), (7, 8), (9, 11)]
