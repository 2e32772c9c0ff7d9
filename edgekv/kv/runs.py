"""KV as bytes: the contiguous runs of memory that make up a range of tokens, or a state.

A range of one session is `[layer][k|v][head]` runs of `(end - start) * dim` numbers each, in the
order in which they stand on disk; what a layer does not cache is not there. Exported memory pins
the Python object, not the buffer: hold runs only while nobody updates the arrays, and copy out what
a step may run beside.
"""

import mlx.core as mx
import numpy as np

from edgekv.kv.layout import KVLayout
from edgekv.kv.pool import Buffers
from edgekv.kv.states import States


def token_runs(layout: KVLayout, buffers: Buffers, start: int, end: int) -> list[memoryview]:
    """Writable memory of tokens [start, end), which must be evaluated; none of an empty range."""
    assert 0 <= start <= end <= buffers.capacity
    runs: list[memoryview] = []
    for layer, heads in enumerate(layout.heads if start < end else ()):
        pair = zip((buffers.keys[layer], buffers.values[layer]), heads[1:], strict=True)
        for array, dim in pair:
            if array.size == 0:
                continue
            row_bytes = dim * layout.dtype_bytes
            head_bytes, low, high = (n * row_bytes for n in (buffers.capacity, start, end))
            # MLX's arrays export their memory; their types do not say so.
            memory = memoryview(array).cast("B")  # type: ignore[arg-type]
            runs += [memory[h * head_bytes :][low:high] for h in range(heads.num)]
    return runs


def state_runs(states: States) -> list[memoryview]:
    """Memory of a state, which must be evaluated: layer by layer, array by array."""
    arrays = [array for layer in sorted(states) for array in states[layer]]
    return [memoryview(array).cast("B") for array in arrays]  # type: ignore[arg-type]


def unpack_state(layout: KVLayout, data: bytearray) -> States:
    """The state that these bytes are: a copy, evaluated."""
    states, start = {}, 0
    for layer, kinds in enumerate(layout.states):
        arrays = []
        for kind in kinds:
            numbers = np.frombuffer(data, np.uint8, kind.num_bytes, start)
            arrays.append(mx.array(numbers).view(getattr(mx, kind.dtype)).reshape(kind.shape))
            start += kind.num_bytes
        if arrays:
            states[layer] = tuple(arrays)
    assert start == len(data)
    mx.eval([array for state in states.values() for array in state])
    return states


def copy_out(runs: list[memoryview], out: memoryview) -> memoryview:
    """Copy runs to the beginning of `out`; return the part of it that was filled."""
    position = 0
    for run in runs:
        out[position : position + run.nbytes] = run
        position += run.nbytes
    return out[:position]
