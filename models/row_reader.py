"""Rows and columns of a stored matrix, read from their places in a file and no others."""

import os
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from edgekv.errors import CheckpointCorrupt
from edgekv.models.parts import Places

Bytes = npt.NDArray[np.uint8]

# Gaps in a row that together are less are read too: a disk has no smaller pages, and each read is
# a call.
_GAPS_BYTES = 4096
_PIECE_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True)
class StoredMatrix:
    """Where a matrix stands in a file: rows of equal bytes, one behind the other."""

    what: str  # for errors: the file and the tensor
    start: int
    row_bytes: int
    unit_bytes: int  # of neighbours in a row that are stored together: a number, a group, a block

    def read(self, file: BinaryIO, rows: Places, units: Places, out: Bytes) -> None:
        """Read these units of these rows, ascending both, into `out` `(rows, bytes)`.

        Raises:
            CheckpointCorrupt: The file ends too soon.
        """
        spans = [(start * self.unit_bytes, end * self.unit_bytes) for start, end in runs(units)]
        through = self.row_bytes - out.shape[1] < _GAPS_BYTES
        step = max(1, _PIECE_BYTES // self.row_bytes) if through else 1
        done = 0
        for first, last in runs(rows):
            for row in range(first, last, step):
                piece = out[done : done + min(step, last - row)]
                (self._rows if through else self._row)(file, row, spans, piece)
                done += len(piece)

    def _rows(self, file: BinaryIO, row: int, spans: list[tuple[int, int]], out: Bytes) -> None:
        offset = self.start + row * self.row_bytes
        if out.shape[1] == self.row_bytes:
            self._fill(file, offset, out)
            return
        whole = np.empty((len(out), self.row_bytes), np.uint8)
        self._fill(file, offset, whole)
        np.concatenate([whole[:, start:end] for start, end in spans], axis=1, out=out)

    def _row(self, file: BinaryIO, row: int, spans: list[tuple[int, int]], out: Bytes) -> None:
        offset, done = self.start + row * self.row_bytes, 0
        for start, end in spans:
            self._fill(file, offset + start, out[0, done : done + end - start])
            done += end - start

    def _fill(self, file: BinaryIO, offset: int, out: Bytes) -> None:
        left = out.reshape(-1)
        while left.size:
            num_bytes = os.preadv(file.fileno(), [left.data], offset)
            if num_bytes == 0:
                raise CheckpointCorrupt(
                    f"{self.what} is cut off", hint="the file changed while in use"
                )
            left, offset = left[num_bytes:], offset + num_bytes


def runs(places: Places) -> list[tuple[int, int]]:
    """Ascending places as half-open ranges."""
    parts = np.split(places, np.flatnonzero(np.diff(places) != 1) + 1)
    return [(int(part[0]), int(part[-1]) + 1) for part in parts]
