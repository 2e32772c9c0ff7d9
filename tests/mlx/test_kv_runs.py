"""KV as bytes: what is copied out of one session's buffers and into another's is the same KV."""

import itertools

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekv.bench.sessions.slow_swap import block_pieces
from edgekv.engine.restores import whole_payload
from edgekv.kv.layout import BLOCK_TOKENS, NOTHING, Heads, KVLayout
from edgekv.kv.pool import Buffers, KVPool
from edgekv.kv.runs import copy_out, roll, slot_runs, token_runs
from edgekv.store import RecordRef

ONE_KIND = (Heads(2, 16, 16),) * 3
EACH_ITS_OWN = (Heads(2, 16, 16), Heads(1, 64, 64), Heads(4, 32, 32))  # as OpenELM has it
# A latent of which values are a part, and layers that read another's KV.
NOT_ALL = (Heads(1, 48, 0), NOTHING, Heads(2, 16, 16), NOTHING)
LAYOUTS = {
    "not all layers cache, f32": (NOT_ALL, mx.float32),
    "equal layers, f32": (ONE_KIND, mx.float32),
    "layers differ, f32": (EACH_ITS_OWN, mx.float32),
    "equal layers, bf16": (ONE_KIND, mx.bfloat16),
    "layers differ, f16": (EACH_ITS_OWN, mx.float16),
}


def layout_of(heads, dtype):
    return KVLayout(heads=heads, dtype_bytes=dtype.size, context_max=4096)


def filled(layout, dtype, capacity, seed=0):
    """Buffers of random numbers, as a session owns them."""
    pool = KVPool(layout, dtype, 1 << 26)
    buffers = pool.allocate(capacity)
    draw = np.random.default_rng(seed)
    for arrays in (buffers.keys, buffers.values):
        for layer, array in enumerate(arrays):
            values = draw.standard_normal(array.shape, dtype=np.float32)
            arrays[layer] = mx.array(values).astype(dtype)
    mx.eval(buffers.keys, buffers.values)
    return buffers


def numbers(buffers: Buffers, start, end):
    """Tokens [start, end) of all arrays, as f32: exact for every dtype."""
    arrays = [a for pair in zip(buffers.keys, buffers.values, strict=True) for a in pair]
    return [np.array(array[:, start:end].astype(mx.float32)) for array in arrays]


def assert_equal(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(mine, other)


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS.keys())
def kind(request):
    heads, dtype = request.param
    layout = layout_of(heads, dtype)
    return layout, dtype, layout.granule_tokens


@pytest.mark.parametrize(("start", "end"), [(0, 1), (0, 37), (5, 6), (13, 64), (0, 0)])
def test_what_goes_out_comes_in(kind, start, end):
    layout, dtype, capacity = kind
    ours = filled(layout, dtype, capacity)
    # Where it comes in, buffers are larger: rows of heads lie at other distances.
    theirs = filled(layout, dtype, 2 * capacity, seed=1)
    before = numbers(theirs, 0, 2 * capacity)
    out = copy_out(token_runs(layout, ours, start, end), memoryview(bytearray(1 << 20)))
    assert out.nbytes == (end - start) * layout.token_bytes
    position = 0
    for run in token_runs(layout, theirs, start, end):
        run[:] = out[position : position + run.nbytes]
        position += run.nbytes
    assert_equal(numbers(theirs, start, end), numbers(ours, start, end))
    after = numbers(theirs, 0, 2 * capacity)
    assert_equal([a[:, :start] for a in after], [b[:, :start] for b in before])
    assert_equal([a[:, end:] for a in after], [b[:, end:] for b in before])


def test_bytes_stand_by_layer_then_kind_then_head(kind):
    layout, dtype, capacity = kind
    buffers = filled(layout, dtype, capacity)
    start, end = 3, 20
    expected = b"".join(
        bytes(memoryview(array[head, start:end]).cast("B"))
        for pair in zip(buffers.keys, buffers.values, strict=True)
        for array in pair
        if array.size
        for head in range(array.shape[0])
    )
    runs = token_runs(layout, buffers, start, end)
    assert b"".join(runs) == expected
    assert len(runs) == sum(bool(dim) * heads.num for heads in layout.heads for dim in heads[1:])


def test_pieces_are_the_same_bytes_in_blocks(kind):
    layout, dtype, capacity = kind
    buffers = filled(layout, dtype, capacity)
    start, end = 5, 5 + 3 * BLOCK_TOKENS + 1
    pieces = block_pieces(layout, buffers, start, end)
    num_blocks = 4
    assert len(pieces) == num_blocks * sum(bool(d) for heads in layout.heads for d in heads[1:])
    theirs = filled(layout, dtype, capacity, seed=1)
    for mine, other in zip(pieces, block_pieces(layout, theirs, start, end), strict=True):
        data, position = b"".join(mine), 0
        for run in other:
            run[:] = data[position : position + run.nbytes]
            position += run.nbytes
    assert_equal(numbers(theirs, start, end), numbers(buffers, start, end))


def test_a_record_used_in_part_leaves_the_rest_alone(kind):
    """What another session goes on with differently is read, and thrown away."""
    layout, dtype, capacity = kind
    ours = filled(layout, dtype, capacity)
    start, end, use_end = 4, 60, 21
    payload = b"".join(token_runs(layout, ours, start, end))
    whole = RecordRef(record_id=1, start=start, end=end, use_end=end, payload_bytes=len(payload))
    ref = whole.clipped(use_end)
    assert (ref.start, ref.use_end, ref.end) == (start, use_end, end)
    assert whole.clipped(end) is whole
    theirs = filled(layout, dtype, capacity, seed=1)
    before = numbers(theirs, 0, capacity)
    position = 0
    for run in whole_payload(ref, slot_runs(layout, theirs, start, use_end)):
        run[:] = payload[position : position + run.nbytes]
        position += run.nbytes
    assert position == len(payload)
    assert_equal(numbers(theirs, start, use_end), numbers(ours, start, use_end))
    after = numbers(theirs, 0, capacity)
    assert_equal([a[:, use_end:] for a in after], [b[:, use_end:] for b in before])


def test_runs_are_memory_that_mlx_reads(kind):
    """Reader threads write through them: no copy is made on the way."""
    layout, dtype, capacity = kind
    buffers = filled(layout, dtype, capacity)
    for run in token_runs(layout, buffers, 0, capacity):
        assert not run.readonly
        run[:] = bytes(run.nbytes)
    del run
    assert_equal(
        numbers(buffers, 0, capacity), [np.zeros_like(a) for a in numbers(buffers, 0, capacity)]
    )


@given(
    heads=st.lists(
        st.tuples(st.integers(1, 3), st.sampled_from([8, 16, 64]), st.sampled_from([0, 8, 64])),
        min_size=1,
        max_size=3,
    ),
    bounds=st.tuples(st.integers(0, 200), st.integers(1, 60)),
    extra=st.integers(0, 2),
)
@settings(max_examples=12, deadline=None, derandomize=True, database=None)
def test_any_range_of_any_shape_goes_round(heads, bounds, extra):
    layout = layout_of(tuple(itertools.starmap(Heads, heads)), mx.float16)
    start, end = bounds[0], bounds[0] + bounds[1]
    capacity = layout.capacity_for(end)
    ours = filled(layout, mx.float16, capacity)
    theirs = filled(layout, mx.float16, capacity + extra * layout.granule_tokens, seed=1)
    data = copy_out(token_runs(layout, ours, start, end), memoryview(bytearray(1 << 20)))
    position = 0
    for run in token_runs(layout, theirs, start, end):
        run[:] = data[position : position + run.nbytes]
        position += run.nbytes
    assert position == data.nbytes == (end - start) * layout.token_bytes
    assert_equal(numbers(theirs, start, end), numbers(ours, start, end))


WINDOWED = KVLayout(
    heads=(Heads(2, 32, 32), Heads(1, 64, 64), NOTHING),
    dtype_bytes=4,
    context_max=4096,
    windows=(0, 40, 0),
)


def test_where_windows_lack_the_first_tokens_the_rest_has_slots():
    slots = WINDOWED.window_slots
    buffers = filled(WINDOWED, mx.float32, 2 * slots)
    before = [np.array(array) for array in (*buffers.keys, *buffers.values)]
    base, end = 100, slots - 3
    roll(WINDOWED, buffers, base, end)
    after = [np.array(array) for array in (*buffers.keys, *buffers.values)]
    for layer, (ours, theirs) in enumerate(zip(after, before, strict=True)):
        moved = layer % 3 == 1
        first = base if moved else 0
        np.testing.assert_array_equal(ours[:, : end - first], theirs[:, first:end])
    for start, stop in [(0, 60), (90, 120), (100, 300), (300, end), (0, end)]:
        runs = slot_runs(WINDOWED, buffers, start, stop)
        lacking = max(0, min(base, stop) - start)
        assert [run.skipped_bytes // run.row_bytes for run in runs] == [0] * 4 + [lacking] * 2
        for run in runs:
            assert run.skipped_bytes + run.memory.nbytes == (stop - start) * run.row_bytes
        keys = runs[4].memory
        np.testing.assert_array_equal(
            np.frombuffer(keys, np.float32).reshape(-1, 64), before[1][0, start + lacking : stop]
        )
        ref = RecordRef(record_id=1, start=start, end=stop + 7, use_end=stop, payload_bytes=0)
        sizes = sum(part.nbytes for part in whole_payload(ref, runs))
        assert sizes == (stop + 7 - start) * WINDOWED.token_bytes
    with pytest.raises(AssertionError):
        token_runs(WINDOWED, buffers, 90, 120)
    roll(WINDOWED, buffers, 200, end)
    np.testing.assert_array_equal(np.array(buffers.keys[1])[:, : end - 200], before[1][:, 200:end])
