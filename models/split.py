"""A few rows times a large matrix, without OpenBLAS's threads, on two CPU streams instead.

A decode step of few sessions is bound by how fast weights are read. OpenBLAS before 0.3.27 packs
the whole matrix before it multiplies a few rows by it, which halves that; small products it does
not pack, nor share between threads. So the matrix is cut into pieces that count as small, rows are
taken four at a time while a piece is in the cache, and half of the pieces go to a second MLX
stream, which has a thread of its own. Measured on 2 cores of an EPYC with OpenBLAS 0.3.21, all
products of SmolLM2-135M, f32: 41 instead of 52 ms for one row, 41 for 61 with four, 51 for 59 with
eight.

Elsewhere OpenBLAS reads a matrix that is stored `(in, out)` faster than its transpose: 25.5 against
30.2 ms for all products of one row, 49 against 54 with eight, the same with 256 (another EPYC). So
where splitting does not pay, that is how weights are kept.

It pays only while OpenBLAS's own threads sleep: after a shared product they spin for some 25 ms
and take the second stream's core. Hence `SplitMatrix` for the small matrices too, so that a step
of few rows has no shared product at all.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from edgekv.device import second_stream

ROWS_MAX = 8
_GROUP_ROWS_MAX = 4
_TWO_STREAMS_BYTES = 3 << 20  # below, the second stream's wake-up costs what it saves
_PIECE_ELEMENTS_MAX = 1 << 17
_PIECE_ROWS_MIN = 16
_SPIN_S = 0.06


@dataclass(frozen=True)
class SplitMatrix:
    """A weight `(out, in)` as pieces `(pieces, rows, in)`, in one or two parts sharing its memory.

    The second part, where there is one, is computed on `stream`.
    """

    parts: tuple[mx.array, ...]
    stream: mx.Stream

    @classmethod
    def of(cls, weight: mx.array, stream: mx.Stream) -> "SplitMatrix | None":
        """The split of a weight, or None where it does not divide well."""
        rows, width = weight.shape
        num_parts = 2 if weight.nbytes >= _TWO_STREAMS_BYTES and rows % 2 == 0 else 1
        part_rows = rows // num_parts
        limit = _PIECE_ELEMENTS_MAX // width
        piece = max((p for p in range(1, limit + 1) if part_rows % p == 0), default=0)
        if piece < _PIECE_ROWS_MIN:
            return None
        parts = [
            weight[i * part_rows : (i + 1) * part_rows].reshape(-1, piece, width)
            for i in range(num_parts)
        ]
        return cls(tuple(parts), stream)

    def __call__(self, x: mx.array) -> mx.array:
        """`x (N, in)` → `(N, out)`, for N up to `ROWS_MAX`."""
        num_rows = x.shape[0]
        assert num_rows <= ROWS_MAX
        if num_rows > _GROUP_ROWS_MAX and num_rows % 2:
            return self(mx.pad(x, [(0, 1), (0, 0)]))[:num_rows]
        num_groups = 1 if num_rows <= _GROUP_ROWS_MAX else 2
        groups = x.reshape(1, num_groups, num_rows // num_groups, -1)
        streams = (None, self.stream)
        products = [  # (pieces, groups, rows of a group, rows of a piece)
            mx.matmul(groups, part[:, None].swapaxes(2, 3), stream=stream)
            for part, stream in zip(self.parts, streams, strict=False)
        ]
        whole = products[0] if len(products) == 1 else mx.concatenate(products)
        return whole.reshape(whole.shape[0], num_rows, -1).swapaxes(0, 1).reshape(num_rows, -1)


@dataclass(frozen=True)
class FewRows:
    """How a few rows are multiplied by a matrix fastest."""

    stream: mx.Stream | None = None  # the second one for `SplitMatrix`; None does not split
    transposed: bool = False  # matrices are kept `(in, out)`


PLAIN = FewRows()


def find_few_rows() -> FewRows:
    """What pays on this machine; a stream is the calling thread's."""
    stream = second_stream()
    return FewRows(stream=stream) if _splitting_pays(stream) else FewRows(transposed=True)


_measured: list[bool] = []  # once a process


def _splitting_pays(stream: mx.Stream) -> bool:
    """Time both ways on matrices that no cache holds; costs some 300 ms.

    OpenBLAS's threads may spin for longer than they are waited for here: the second stream shows
    what it can do only when they have gone to sleep, so it gets more tries.
    """
    if not _measured:
        weights = [mx.full((3072, 576), 0.01) for _ in range(12)]
        matrices = [mx.contiguous(weight.T) for weight in weights]
        x = mx.full((1, 576), 0.01)
        mx.eval(x, *weights, *matrices)
        plain_s = _best_of(4, lambda: mx.eval([x @ matrix for matrix in matrices]))
        time.sleep(_SPIN_S)
        splits = [SplitMatrix.of(weight, stream) for weight in weights]
        found = [split for split in splits if split is not None]
        split_s = _best_of(16, lambda: mx.eval([split(x) for split in found]))
        _measured.append(split_s < 0.85 * plain_s)
    return _measured[0]


def _best_of(tries: int, run: Callable[[], None]) -> float:
    seconds = []
    for _ in range(tries):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
