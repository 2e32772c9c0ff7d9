"""KV as bytes: the contiguous runs of memory that make up a range of tokens.

A range of one session is `[layer][k|v][head]` runs of `(end - start) * head_dim` numbers each, in
the order in which they stand on disk. Exported memory pins the Python object, not the buffer: hold
runs only while nobody updates the arrays, and copy out what a step may run beside.
"""

import itertools

from edgekv.kv.layout import BLOCK_TOKENS, KVLayout
from edgekv.kv.pool import Buffers


def token_runs(layout: KVLayout, buffers: Buffers, start: int, end: int) -> list[memoryview]:
    """Writable memory of tokens [start, end), which must be evaluated; none of an empty range."""
    assert 0 <= start <= end <= buffers.capacity
    runs: list[memoryview] = []
    for layer, (num_kv_heads, head_dim) in enumerate(layout.heads if start < end else ()):
        row_bytes = head_dim * layout.dtype_bytes
        head_bytes, low, high = (n * row_bytes for n in (buffers.capacity, start, end))
        for array in (buffers.keys[layer], buffers.values[layer]):
            # MLX's arrays export their memory; their types do not say so.
            memory = memoryview(array).cast("B")  # type: ignore[arg-type]
            runs += [memory[h * head_bytes :][low:high] for h in range(num_kv_heads)]
    return runs


def block_pieces(
    layout: KVLayout, buffers: Buffers, start: int, end: int
) -> list[list[memoryview]]:
    """The same as a paged cache has it: per 16-token block, layer and k|v, one run a head."""
    pieces: list[list[memoryview]] = []
    for low in range(start, end, BLOCK_TOKENS):
        runs = iter(token_runs(layout, buffers, low, min(low + BLOCK_TOKENS, end)))
        pieces += [list(itertools.islice(runs, n)) for n, _ in layout.heads for _ in "kv"]
    return pieces


def copy_out(runs: list[memoryview], out: memoryview) -> memoryview:
    """Copy runs to the beginning of `out`; return the part of it that was filled."""
    position = 0
    for run in runs:
        out[position : position + run.nbytes] = run
        position += run.nbytes
    return out[:position]
