"""Which of a session's KV may be used again."""

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekv.kv.layout import Heads, KVLayout
from edgekv.kv.pool import KVPool
from edgekv.kv.residency import Residency
from edgekv.kv.session_kv import SessionKV, common_prefix
from edgekv.kv.view import StagedView

LAYOUT = KVLayout(heads=(Heads(1, 8, 8),), dtype_bytes=4, context_max=4096)


@pytest.fixture
def pool() -> KVPool:
    return KVPool(LAYOUT, mx.float32, 1 << 22)


def session(pool: KVPool, tokens: list[int]) -> SessionKV:
    kv = SessionKV()
    kv.buffers = pool.allocate(LAYOUT.capacity_for(max(1, len(tokens))))
    kv.append(tokens)
    return kv


def naive_common_prefix(a: list[int], b: list[int]) -> int:
    length = 0
    while length < min(len(a), len(b)) and a[length] == b[length]:
        length += 1
    return length


@settings(max_examples=200, derandomize=True, deadline=None)
@given(
    shared=st.lists(st.integers(0, 2), max_size=40),
    a=st.lists(st.integers(0, 2), max_size=10),
    b=st.lists(st.integers(0, 2), max_size=10),
)
def test_common_prefix_equals_its_naive_twin(shared, a, b):
    left, right = shared + a, shared + b
    assert common_prefix(left, right) == naive_common_prefix(left, right)
    assert common_prefix(tuple(left), tuple(right)) == common_prefix(right, left)


def test_the_longest_common_prefix_is_reusable(pool):
    kv = session(pool, [1, 2, 3, 4, 5])
    assert kv.reusable_prefix([1, 2, 3]) == 3
    assert kv.reusable_prefix([1, 2, 9, 4, 5]) == 2
    assert kv.reusable_prefix([1, 2, 3, 4, 5, 6, 7]) == 5
    assert kv.reusable_prefix([7]) == 0
    assert kv.reusable_prefix([]) == 0


def test_predicted_kv_is_never_reusable(pool):
    kv = session(pool, [1, 2, 3, 4, 5])
    kv.provenance.mark(2, 4, "predicted")
    assert kv.reusable_prefix([1, 2, 3, 4, 5]) == 2
    other = session(pool, [])
    with pytest.raises(AssertionError):
        other.copy_prefix(kv, 3)


@pytest.mark.parametrize("state", [s for s in Residency if s is not Residency.RESIDENT])
def test_kv_that_is_elsewhere_is_not_reusable(pool, state):
    kv = session(pool, [1, 2, 3])
    kv.residency = state
    assert kv.reusable_prefix([1, 2, 3]) == 0


def test_a_dropped_session_holds_nothing(pool):
    kv = session(pool, [1, 2, 3])
    kv.drop(pool)
    assert kv.reusable_prefix([1, 2, 3]) == 0
    assert (kv.num_tokens, kv.capacity) == (0, 0)
    kv.drop(pool)  # twice does no harm
    kv.check_integrity()
    assert pool.snapshot().used_bytes == 0


def test_a_copy_is_independent_of_its_source(pool):
    kv = session(pool, [1, 2, 3])
    assert kv.buffers is not None
    kv.buffers.keys[0][:, :3] = mx.ones((1, 3, 8))
    other = session(pool, [9])
    other.copy_prefix(kv, 2)
    assert other.tokens == [1, 2]
    assert other.provenance.ranges == ((0, 2, "exact"),)
    kv.buffers.keys[0][:, :3] = mx.zeros((1, 3, 8))
    assert other.buffers is not None
    assert mx.array_equal(other.buffers.keys[0][:, :2], mx.ones((1, 2, 8)))


def test_a_copy_of_all_there_is_room_for_is_independent_too(pool):
    """Windows roll, and disks are read, by writing to a session's memory as it is."""
    tokens = list(range(pool.layout.granule_tokens))
    kv, other = session(pool, tokens), session(pool, [])
    other.copy_prefix(kv, len(tokens))
    assert kv.buffers is not None
    assert other.buffers is not None
    assert other.capacity == kv.capacity == len(tokens)
    memoryview(other.buffers.keys[0]).cast("B")[:4] = b"edge"
    assert bytes(memoryview(kv.buffers.keys[0]).cast("B")[:4]) == bytes(4)


def test_tokens_beyond_the_capacity_are_a_bug(pool):
    kv = session(pool, [1])
    with pytest.raises(AssertionError):
        kv.append([0] * kv.capacity)


@pytest.mark.parametrize("missing", [0, 1])
def test_buffers_stay_plain_memory_whatever_is_written(missing):
    """Rows come as a strided part of a larger array, and may fill the buffers in one go."""
    layout = KVLayout(heads=(Heads(3, 8, 8), Heads(3, 8, 8)), dtype_bytes=4, context_max=4096)
    kv = SessionKV()
    kv.buffers = KVPool(layout, mx.float32, 1 << 22).allocate(layout.capacity_for(1))
    rows = kv.capacity - missing
    view = StagedView(kv, 0)
    for layer in range(2):
        both = mx.random.normal((rows, 6, 8)).transpose(1, 0, 2)
        view.write(layer, both[:3], both[3:])
        seen_keys, seen_values = view.read(layer, rows)
        assert mx.array_equal(seen_keys, both[:3])
        assert mx.array_equal(seen_values, both[3:])
    arrays = view.commit()
    mx.eval(arrays)
    for array in arrays:
        memory = memoryview(array)
        assert memory.shape == (3, kv.capacity, 8)
        assert memory.c_contiguous
