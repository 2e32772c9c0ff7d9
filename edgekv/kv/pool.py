"""KV buffers under a hard byte budget, recycled by capacity."""

from collections.abc import Iterable
from dataclasses import dataclass

import mlx.core as mx

from edgekv.kv.layout import KVLayout, PoolSnapshot
from edgekv.ranks.orders import NO_ORDERS, Orders, Verb, from_int


@dataclass
class Buffers:
    """Keys and values of one session, one array a layer, `(heads, slots, dim)`.

    They are of size 0 where a layer caches none. There are as many slots as `capacity`, but for a
    layer with a window (`KVLayout.slots`), whose first slot is that of token `base`.
    """

    capacity: int
    keys: list[mx.array]
    values: list[mx.array]
    num_ready: int = 0  # layers, from the first, that have memory of their own by now
    base: int = 0
    windows: tuple[int, ...] = ()  # of the layout
    orders: Orders = NO_ORDERS  # for other ranks, which know these buffers by `number`
    number: int = 0

    def order(self, verb: Verb, *words: int) -> None:
        """Have the other ranks do the same to theirs."""
        self.orders.add(verb, self.number, *words)

    def begin_at(self, base: int) -> None:
        """Say of which token the first slots of layers with a window will be."""
        self.order(Verb.BASE, base)
        self.base = base

    def first_token(self, layer: int) -> int:
        """The token of a layer's first slot."""
        return self.base if self.windows and self.windows[layer] else 0

    @property
    def ready(self) -> bool:
        """Whether all layers have memory."""
        return self.num_ready == len(self.keys)

    def make_ready(self) -> None:
        """Get memory for one more layer.

        New pages cost time in proportion to their number. All at once they would be a gap that
        every decoding session sees.
        """
        assert not self.ready
        self.order(Verb.READY)
        mx.eval(self.keys[self.num_ready], self.values[self.num_ready])
        self.num_ready += 1


class KVPool:
    """All KV buffers of a runtime. Owned by the engine thread.

    What sessions own and what waits for its next owner is counted together and never exceeds the
    budget. Recycling matters more than it seems: on Metal, allocation churn is what hurts.
    """

    def __init__(
        self,
        layout: KVLayout,
        dtype: mx.Dtype,
        budget_bytes: int,
        *,
        staging_bytes: int = 0,
        orders: Orders = NO_ORDERS,
        index: int = 0,
    ) -> None:
        """An empty pool; `staging_bytes` is what somebody else may use of its budget.

        What is done to it is noted in `orders` for the same pool, by `index`, of other ranks.
        """
        assert dtype.size == layout.dtype_bytes
        assert 0 <= staging_bytes < budget_bytes
        self._staging_bytes = staging_bytes
        self.layout = layout
        self._dtype = dtype
        self._orders, self._index = orders, index
        self._budget_bytes = budget_bytes
        self._owned: dict[int, Buffers] = {}
        # Oldest first; counted as what they will be, with the states of their next session.
        self._free: list[Buffers] = []
        self._peak_bytes = 0

    def snapshot(self) -> PoolSnapshot:
        """The pool's figures as a value."""
        return PoolSnapshot(
            budget_bytes=self._budget_bytes,
            staging_bytes=self._staging_bytes,
            used_bytes=self._bytes(self._owned.values()),
            free_bytes=self._bytes(self._free),
            peak_bytes=self._peak_bytes,
        )

    def _bytes(self, buffers: Iterable[Buffers]) -> int:
        return sum(self.layout.capacity_bytes(b.capacity) for b in buffers)

    def can_allocate(self, capacity: int) -> bool:
        """Whether buffers of this capacity fit beside all that sessions own."""
        return self.layout.capacity_bytes(capacity) <= self.snapshot().available_bytes

    def allocate(self, capacity: int) -> Buffers:
        """Buffers of a capacity class: recycled ones with old bytes; they need not be `ready`.

        The caller has asked `can_allocate`; exceeding the budget is a bug.
        """
        assert self.can_allocate(capacity), "allocation beyond the pool's budget"
        for i, buffers in enumerate(self._free):
            if buffers.capacity == capacity:
                del self._free[i]
                buffers.base = 0
                self._own(buffers)
                return buffers
        self._trim(self._budget_bytes - self.layout.capacity_bytes(capacity))
        pairs = [self._zeros(layer, capacity) for layer in range(self.layout.num_layers)]
        keys, values = (list(arrays) for arrays in zip(*pairs, strict=True))
        buffers = Buffers(capacity, keys, values, windows=self.layout.windows, orders=self._orders)
        self._own(buffers)
        return buffers

    def _own(self, buffers: Buffers) -> None:
        self._owned[id(buffers)] = buffers
        buffers.number = self._orders.number()
        self._orders.add(Verb.ALLOCATE, self._index, buffers.number, buffers.capacity)
        self._peak_bytes = max(self._peak_bytes, self.snapshot().allocated_bytes)

    def release(self, buffers: Buffers) -> None:
        """Take buffers back; their bytes stay counted until dropped or reused."""
        del self._owned[id(buffers)]
        buffers.order(Verb.RELEASE)
        self._free.append(buffers)

    def can_grow(self, buffers: Buffers, capacity: int) -> bool:
        """Whether `grow` would stay within the budget."""
        needed_bytes = self.layout.growth_bytes(buffers.capacity, capacity)
        return needed_bytes <= self.snapshot().available_bytes

    def grow(self, buffers: Buffers, capacity: int, num_tokens: int) -> None:
        """Enlarge buffers in place, keeping their first `num_tokens` tokens.

        Layer by layer, so that old and new exist together for one layer only.
        """
        assert capacity > buffers.capacity
        assert self.can_grow(buffers, capacity), "growth beyond the pool's budget"
        worst_bytes = self.layout.growth_bytes(buffers.capacity, capacity)
        buffers.order(Verb.GROW, capacity, num_tokens)
        self._trim(self._budget_bytes - worst_bytes)
        allocated_bytes = self.snapshot().allocated_bytes + worst_bytes
        self._peak_bytes = max(self._peak_bytes, allocated_bytes)
        for layer in range(self.layout.num_layers):
            slots = self.layout.slots(layer, buffers.capacity)
            if slots == self.layout.slots(layer, capacity):
                mx.eval(buffers.keys[layer], buffers.values[layer])
                continue
            larger, num_kept = self._zeros(layer, capacity), min(num_tokens, slots)
            for arrays, array in zip((buffers.keys, buffers.values), larger, strict=True):
                array[:, :num_kept] = arrays[layer][:, :num_kept]
                arrays[layer] = array
            mx.eval(buffers.keys[layer], buffers.values[layer])
        buffers.capacity = capacity
        buffers.num_ready = self.layout.num_layers
        mx.clear_cache()

    def _zeros(self, layer: int, capacity: int) -> tuple[mx.array, mx.array]:
        """Keys and values of a layer."""
        count, *dims = self.layout.heads[layer]
        slots = self.layout.slots(layer, capacity)
        keys, values = (mx.zeros((count, slots, dim), dtype=self._dtype) for dim in dims)
        return keys, values

    def trim(self, limit_bytes: int) -> bool:
        """Drop recyclable buffers, oldest first, until no more is allocated; True if any were."""
        self._orders.add(Verb.TRIM, self._index, *from_int(limit_bytes))
        return self._trim(limit_bytes)

    def _trim(self, limit_bytes: int) -> bool:
        dropped = False
        while self._free and self.snapshot().allocated_bytes > limit_bytes:
            del self._free[0]
            dropped = True
        if dropped:
            mx.clear_cache()  # else MLX would keep the bytes that the budget counts as gone
        return dropped

    def check_integrity(self) -> None:
        """Assert what must hold at any time between steps."""
        snapshot = self.snapshot()
        assert snapshot.allocated_bytes <= snapshot.budget_bytes
        assert snapshot.peak_bytes <= snapshot.budget_bytes
        for buffers in [*self._owned.values(), *self._free]:
            assert len(buffers.keys) == len(buffers.values) == self.layout.num_layers
            for layer, heads in enumerate(self.layout.heads):
                slots = self.layout.slots(layer, buffers.capacity)
                arrays = buffers.keys[layer], buffers.values[layer]
                for array, dim in zip(arrays, heads[1:], strict=True):
                    assert array.shape == (heads.num, slots, dim)
        assert not {id(b) for b in self._free} & set(self._owned)

    def owns(self, buffers: Buffers) -> bool:
        """Whether these buffers are counted as owned by a session."""
        return id(buffers) in self._owned
