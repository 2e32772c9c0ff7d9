"""KV as bytes: the contiguous runs of memory that make up a range of tokens, or a state.

A range of one session is `[layer][k|v][head]` runs of `(end - start) * dim` numbers each, in the
order in which they stand on disk; what a layer does not cache is not there. Exported memory pins
the Python object, not the buffer: hold runs only while nobody updates the arrays, and copy out what
a step may run beside.
"""

from collections.abc import Iterator
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from edgekv.kv.layout import KVLayout
from edgekv.kv.pool import Buffers
from edgekv.kv.states import States


class Run(NamedTuple):
    """One head's numbers of a range of tokens."""

    skipped_bytes: int  # of the first tokens, which have no slot
    memory: memoryview  # of the others; writable
    row_bytes: int  # of one token


def token_runs(layout: KVLayout, buffers: Buffers, start: int, end: int) -> list[memoryview]:
    """Writable memory of tokens [start, end), which must be evaluated; none of an empty range.

    All layers must have them, see `Buffers.base`.
    """
    runs = slot_runs(layout, buffers, start, end)
    assert not any(run.skipped_bytes for run in runs)
    return [run.memory for run in runs]


def slot_runs(layout: KVLayout, buffers: Buffers, start: int, end: int) -> list[Run]:
    """The same where layers with a window may lack the first of the tokens, or all."""
    assert 0 <= start <= end <= buffers.capacity
    runs: list[Run] = []
    for layer in range(layout.num_layers if start < end else 0):
        base = buffers.first_token(layer)
        low, high = max(start, base), max(end, base)
        for head, row_bytes in _heads(layout, buffers, layer):
            memory = head[(low - base) * row_bytes : (high - base) * row_bytes]
            assert memory.nbytes == (high - low) * row_bytes, "there is no slot"
            runs.append(Run((min(low, end) - start) * row_bytes, memory, row_bytes))
    return runs


def _heads(layout: KVLayout, buffers: Buffers, layer: int) -> Iterator[tuple[memoryview, int]]:
    """All memory of each head of a layer, keys and then values; and the bytes of one token."""
    heads = layout.heads[layer]
    for array, dim in zip((buffers.keys[layer], buffers.values[layer]), heads[1:], strict=True):
        if array.size:
            row_bytes = dim * layout.dtype_bytes
            head_bytes = layout.slots(layer, buffers.capacity) * row_bytes
            # MLX's arrays export their memory; their types do not say so.
            memory = memoryview(array).cast("B")  # type: ignore[arg-type]
            for head in range(heads.num):
                yield memory[head * head_bytes :][:head_bytes], row_bytes


def roll(layout: KVLayout, buffers: Buffers, base: int, end: int) -> None:
    """Move the tokens [base, end) of layers with a window to the first slots; others go.

    Arrays must be evaluated, and no step may know them.
    """
    assert buffers.base <= base <= end
    for layer, window in enumerate(layout.windows):
        for head, row_bytes in _heads(layout, buffers, layer) if window else ():
            low, high = ((token - buffers.base) * row_bytes for token in (base, end))
            head[: high - low] = head[low:high]  # which may overlap: it is one memmove
    buffers.base = base


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
