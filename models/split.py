"""One or two rows times a large matrix, as two halves on two CPU streams.

A decode step of one session is bound by how fast weights are read. Older OpenBLAS packs the whole
matrix before it multiplies one row by it, and reaches half of the memory's bandwidth; small
products it runs on one thread, unpacked. So the matrix is cut into pieces small enough for that,
and half of them run on a second MLX stream, which has a thread of its own. Measured on 2 cores of
an EPYC with OpenBLAS 0.3.21: 20 instead of 13 GB/s for 3072x576, f32. Newer OpenBLAS multiplies
vectors well by itself, which is why `find_split_stream` measures before it says yes.
"""

import functools
import time
from dataclasses import dataclass

import mlx.core as mx

ROWS_MAX = 2
_BYTES_MIN = 2 << 20  # below, the second stream's wake-up costs what it saves
_PIECE_ELEMENTS_MAX = 1 << 17
_PIECE_ROWS_MIN = 16


@dataclass(frozen=True)
class SplitMatrix:
    """Both halves of a weight `(out, in)`, each as `(pieces, rows, in)`, sharing its memory."""

    first: mx.array
    second: mx.array
    stream: mx.Stream

    @classmethod
    def of(cls, weight: mx.array, stream: mx.Stream) -> "SplitMatrix | None":
        """The split of a weight, or None where it is small or does not divide well."""
        rows, width = weight.shape
        if weight.nbytes < _BYTES_MIN or rows % 2:
            return None
        limit = _PIECE_ELEMENTS_MAX // width
        piece = max((p for p in range(1, limit + 1) if (rows // 2) % p == 0), default=0)
        if piece < _PIECE_ROWS_MIN:
            return None
        half = rows // 2
        first = weight[:half].reshape(-1, piece, width)
        second = weight[half:].reshape(-1, piece, width)
        return cls(first, second, stream)

    def __call__(self, x: mx.array) -> mx.array:
        """`x (N, in)` → `(N, out)`."""
        parts = [
            mx.matmul(x[None], self.first.swapaxes(1, 2)),
            mx.matmul(x[None], self.second.swapaxes(1, 2), stream=self.stream),
        ]
        return mx.concatenate(parts).swapaxes(0, 1).reshape(x.shape[0], -1)


def find_split_stream() -> mx.Stream | None:
    """A second stream of the calling thread if splitting pays on this machine, else None."""
    return mx.new_stream(mx.cpu) if _splitting_pays() else None


@functools.cache
def _splitting_pays() -> bool:
    """Costs some 150 ms: both ways are timed in turn on matrices that no cache holds."""
    stream = mx.new_stream(mx.cpu)
    weights = [mx.full((3072, 576), 0.01) for _ in range(12)]
    x = mx.full((1, 576), 0.01)
    splits = [SplitMatrix.of(weight, stream) for weight in weights]
    mx.eval(x, *weights)
    plain_s, split_s = [], []
    for _ in range(3):
        start = time.perf_counter()
        mx.eval([x @ weight.T for weight in weights])
        middle = time.perf_counter()
        mx.eval([split(x) for split in splits if split is not None])
        split_s.append(time.perf_counter() - middle)
        plain_s.append(middle - start)
    return min(split_s) < 0.85 * min(plain_s)
