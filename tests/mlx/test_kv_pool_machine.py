"""The KV pool and its sessions as a state machine, against plain numpy arrays a session."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)

from edgekv.kv.layout import PAGE_BYTES, Heads, KVLayout
from edgekv.kv.pool import KVPool
from edgekv.kv.session_kv import SessionKV
from edgekv.kv.view import StagedView

HEADS = (Heads(2, 8, 8), Heads(1, 16, 16), Heads(1, 8, 8))
CONTEXT_MAX = 4096
LAYOUT = KVLayout(heads=HEADS, dtype_bytes=4, context_max=CONTEXT_MAX)
GRANULE = LAYOUT.granule_tokens
BUDGET_BYTES = LAYOUT.capacity_bytes(18 * GRANULE) + 5000  # not a multiple of anything


class Twin:
    """What a session must hold: tokens, and `(heads, tokens, dim)` per layer and side."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.arrays = [np.zeros((h, 0, d), np.float32) for h, d, _ in HEADS for _ in "kv"]

    def truncate(self, num_tokens: int) -> None:
        del self.tokens[num_tokens:]
        self.arrays = [a[:, :num_tokens] for a in self.arrays]

    def extend(self, tokens: list[int], rows: list[np.ndarray]) -> None:
        self.tokens += tokens
        self.arrays = [np.concatenate(p, axis=1) for p in zip(self.arrays, rows, strict=True)]


class Session:
    def __init__(self) -> None:
        self.kv = SessionKV()
        self.twin = Twin()


class PoolMachine(RuleBasedStateMachine):
    sessions = Bundle("sessions")

    @initialize()
    def make_pool(self) -> None:
        self.pool = KVPool(LAYOUT, mx.float32, BUDGET_BYTES)
        self.open: list[Session] = []
        self.generator = np.random.default_rng(0)

    @rule(target=sessions, num_tokens=st.integers(1, CONTEXT_MAX))
    def allocate(self, num_tokens):
        session = Session()
        capacity = LAYOUT.capacity_for(num_tokens)
        if self.pool.can_allocate(capacity):
            session.kv.buffers = self.pool.allocate(capacity)
            assert session.kv.capacity == capacity >= num_tokens
        else:
            with pytest.raises(AssertionError, match="budget"):
                self.pool.allocate(capacity)
        self.open.append(session)
        return session

    def stage(self, session: Session, num_rows: int) -> tuple[StagedView, list[np.ndarray]]:
        rows = []
        view = StagedView(session.kv, session.kv.num_tokens)
        for layer, (heads, dim, _) in enumerate(HEADS):
            shape = (heads, num_rows, dim)
            keys, values = (
                self.generator.standard_normal(shape).astype(np.float32) for _ in range(2)
            )
            view.write(layer, mx.array(keys), mx.array(values))
            rows += [keys, values]
        return view, rows

    @rule(session=sessions, num_rows=st.integers(1, 3 * GRANULE))
    def append(self, session, num_rows):
        num_rows = min(num_rows, session.kv.capacity - session.kv.num_tokens)
        if num_rows <= 0:
            return
        view, rows = self.stage(session, num_rows)
        mx.eval(view.commit())
        tokens = [int(t) for t in self.generator.integers(0, 3, num_rows)]
        session.kv.append(tokens)
        session.twin.extend(tokens, rows)

    @rule(session=sessions, evaluate=st.booleans())
    def stage_and_throw_away(self, session, evaluate):
        if session.kv.num_tokens == session.kv.capacity:
            return
        view = StagedView(session.kv, session.kv.num_tokens)
        view.write(0, mx.ones((2, 1, 8)), mx.ones((2, 1, 8)))
        shown, _ = view.read(0, session.kv.num_tokens + 1)
        if evaluate:
            mx.eval(shown)

    @rule(session=sessions, num_tokens=st.integers(1, CONTEXT_MAX))
    def grow(self, session, num_tokens):
        capacity = LAYOUT.capacity_for(num_tokens)
        buffers = session.kv.buffers
        if buffers is None or capacity <= buffers.capacity:
            return
        if self.pool.can_grow(buffers, capacity):
            self.pool.grow(buffers, capacity, session.kv.num_tokens)
            assert session.kv.capacity == capacity
        else:
            with pytest.raises(AssertionError, match="budget"):
                self.pool.grow(buffers, capacity, session.kv.num_tokens)

    @rule(session=sessions, num_tokens=st.integers(0, CONTEXT_MAX))
    def truncate(self, session, num_tokens):
        session.kv.truncate(num_tokens)
        session.twin.truncate(num_tokens)

    @rule(session=sessions, other=sessions, num_tokens=st.integers(0, CONTEXT_MAX))
    def copy_prefix(self, session, other, num_tokens):
        if session is other or session.kv.buffers is None or other.kv.buffers is None:
            return
        num_tokens = min(num_tokens, session.kv.capacity, other.kv.num_tokens)
        start = session.kv.known_prefix(other.kv.tokens[:num_tokens])
        session.kv.copy_prefix(other.kv, num_tokens)
        session.twin.truncate(start)  # what both have is not copied
        session.twin.extend(
            other.twin.tokens[start:num_tokens], [a[:, start:num_tokens] for a in other.twin.arrays]
        )

    @rule(session=consumes(sessions))
    def drop(self, session):
        session.kv.drop(self.pool)
        self.open.remove(session)
        assert session.kv.num_tokens == 0
        assert session.kv.buffers is None

    @precondition(lambda self: hasattr(self, "pool"))
    @invariant()
    def integrity(self):
        self.pool.check_integrity()
        snapshot = self.pool.snapshot()
        owned = sum(LAYOUT.capacity_bytes(s.kv.capacity) for s in self.open)
        assert snapshot.used_bytes == owned
        assert snapshot.allocated_bytes <= snapshot.peak_bytes <= BUDGET_BYTES
        assert snapshot.available_bytes == BUDGET_BYTES - owned

    @precondition(lambda self: hasattr(self, "pool"))
    @invariant()
    def contents(self):
        for session in self.open:
            kv, twin = session.kv, session.twin
            kv.check_integrity()
            assert kv.tokens == twin.tokens
            if kv.buffers is None:
                continue
            for layer in range(len(HEADS)):
                for side, arrays in enumerate((kv.buffers.keys, kv.buffers.values)):
                    held = np.array(arrays[layer][:, : kv.num_tokens])
                    assert np.array_equal(held, twin.arrays[2 * layer + side])


PoolMachine.TestCase.settings = settings(
    max_examples=25, stateful_step_count=30, derandomize=True, deadline=None
)
TestPoolMachine = pytest.mark.slow(PoolMachine.TestCase)


class TestRecycling:
    def test_buffers_of_the_same_capacity_come_back(self):
        pool = KVPool(LAYOUT, mx.float32, BUDGET_BYTES)
        first = pool.allocate(GRANULE)
        pool.release(first)
        assert pool.allocate(2 * GRANULE) is not first
        assert pool.allocate(GRANULE) is first

    def test_the_oldest_are_dropped_first_and_only_as_many_as_needed(self):
        pool = KVPool(LAYOUT, mx.float32, LAYOUT.capacity_bytes(6 * GRANULE))
        buffers = [pool.allocate(2 * GRANULE) for _ in range(3)]
        for released in buffers:
            pool.release(released)
        assert pool.snapshot().allocated_bytes == LAYOUT.capacity_bytes(6 * GRANULE)
        pool.allocate(GRANULE)
        assert pool.snapshot().free_bytes == LAYOUT.capacity_bytes(4 * GRANULE)
        again = {id(pool.allocate(2 * GRANULE)) for _ in range(2)}
        assert again == {id(buffers[1]), id(buffers[2])}

    def test_what_is_dropped_is_freed_in_mlx_too(self):
        pool = KVPool(LAYOUT, mx.float32, LAYOUT.capacity_bytes(8 * GRANULE))
        mx.clear_cache()
        before = mx.get_active_memory() + mx.get_cache_memory()
        for capacity in (4, 6, 8, 3, 8):
            buffers = pool.allocate(capacity * GRANULE)
            mx.eval(buffers.keys, buffers.values)
            assert mx.get_active_memory() + mx.get_cache_memory() - before <= BUDGET_BYTES
            pool.release(buffers)
            del buffers

    def test_growth_needs_no_more_than_it_says(self):
        layout = KVLayout(heads=(Heads(4, 64, 64),) * 6, dtype_bytes=4, context_max=1 << 16)
        pool = KVPool(layout, mx.float32, 1 << 30)
        buffers = pool.allocate(4096)
        mx.eval(buffers.keys, buffers.values)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        expected = layout.growth_bytes(buffers.capacity, 6144)
        pool.grow(buffers, 6144, 4000)
        # Within a page: MLX also makes the scalar zero.
        assert abs(mx.get_peak_memory() - before - expected) < PAGE_BYTES
        assert mx.get_active_memory() - before == layout.capacity_bytes(2048)


class TestStagedView:
    def test_rows_beyond_the_capacity_are_a_bug(self):
        pool = KVPool(LAYOUT, mx.float32, BUDGET_BYTES)
        kv = SessionKV()
        kv.buffers = pool.allocate(GRANULE)
        view = StagedView(kv, GRANULE - 1)
        rows = mx.ones((2, 2, 8))
        with pytest.raises(AssertionError):
            view.write(0, rows, rows)

    def test_what_it_returns_ends_with_the_new_rows(self):
        pool = KVPool(LAYOUT, mx.float32, BUDGET_BYTES)
        kv = SessionKV()
        kv.buffers = pool.allocate(GRANULE)
        view = StagedView(kv, 3)
        view.write(0, mx.full((2, 2, 8), 7.0), mx.full((2, 2, 8), 9.0))
        keys, values = view.read(0, 5)
        assert keys.shape == values.shape == (2, 5, 8)
        assert mx.array_equal(keys[:, 3:], mx.full((2, 2, 8), 7.0))
        assert mx.array_equal(values[:, 3:], mx.full((2, 2, 8), 9.0))
        assert len(view.commit()) == 2
        assert view.commit() == []
