"""KV as bytes: the contiguous runs of memory that make up a range of tokens.

A range of one session is `[layer][k|v][head]` runs of `(end - start) * head_dim` numbers each, in
the order in which they stand on disk. Exported memory pins the Python object, not the buffer: hold
runs only while nobody updates the arrays, and copy out what a step may run beside.
"""

from edgekv.kv.layout import KVLayout
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


def copy_out(runs: list[memoryview], out: memoryview) -> memoryview:
    """Copy runs to the beginning of `out`; return the part of it that was filled."""
    position = 0
    for run in runs:
        out[position : position + run.nbytes] = run
        position += run.nbytes
    return out[:position]
