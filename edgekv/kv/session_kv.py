"""One session's KV: which tokens it holds, in which buffers, and where they came from."""

import copy
from collections.abc import Sequence

import mlx.core as mx

from edgekv.kv.pool import Buffers, KVPool
from edgekv.kv.provenance import Provenance, ProvenanceMap
from edgekv.kv.residency import Residency, advance

State = tuple[mx.array, ...]  # what a recurrent layer remembers of all tokens so far


def common_prefix(a: Sequence[object], b: Sequence[object]) -> int:
    """Length of the longest common prefix; slices compare in C, so bisection beats a loop."""
    low, high = 0, min(len(a), len(b))
    if high and a[0] != b[0]:  # mostly: slices are copies
        return 0
    if a[:high] == b[:high]:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


class SessionKV:
    """The KV of one session. Owned by the engine thread.

    `tokens[i]` is the token whose key and value stand at position i, in the buffers (which may be
    larger) or, of a session that is not resident, on disk; `stored` of them, from 0, are on disk
    too, and `handed` to the writer:

        0 ── stored ── handed ── num_tokens ── capacity
        on disk   being written   in memory only   room
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.provenance = ProvenanceMap()
        self.residency = Residency.RESIDENT
        self.buffers: Buffers | None = None
        self.stored = 0
        self.handed = 0
        self.states: dict[int, State] = {}  # of recurrent layers, behind all tokens

    @classmethod
    def on_disk(cls, token_ids: Sequence[int]) -> "SessionKV":
        """The KV of a session that an earlier process stored."""
        kv = cls()
        if token_ids:
            kv.adopt(token_ids)
        return kv

    @property
    def num_tokens(self) -> int:
        """Tokens whose KV is valid, in memory or on disk."""
        return len(self.tokens)

    @property
    def is_exact(self) -> bool:
        """Whether none of it is predicted."""
        return self.provenance.exact_prefix == self.num_tokens

    @property
    def resident(self) -> bool:
        """Whether what is valid is in memory."""
        return self.residency is Residency.RESIDENT

    @property
    def moving(self) -> bool:
        """Whether I/O must end before the session can be admitted."""
        return self.residency in {Residency.LEAVING, Residency.ARRIVING}

    @property
    def capacity(self) -> int:
        """Tokens that fit without growing."""
        return 0 if self.buffers is None else self.buffers.capacity

    def reusable_prefix(self, token_ids: Sequence[int]) -> int:
        """How many of these tokens' KV is exact and in memory: what others may copy."""
        if not self.resident or self.buffers is None:
            return 0
        return self.known_prefix(token_ids)

    def known_prefix(self, token_ids: Sequence[int]) -> int:
        """How many of these tokens' KV is exact, wherever it is."""
        return min(common_prefix(self.tokens, token_ids), self.provenance.exact_prefix)

    def move(self, event: str) -> None:
        """Residency's next state."""
        self.residency = advance(self.residency, event)

    def append(self, token_ids: Sequence[int], kind: Provenance = "exact") -> None:
        """Record that a step which is being submitted writes KV for these tokens at the end."""
        start = self.num_tokens
        self.tokens.extend(token_ids)
        self.provenance.mark(start, self.num_tokens, kind)
        assert self.num_tokens <= self.capacity

    def truncate(self, num_tokens: int) -> None:
        """Forget the KV from `num_tokens` on; buffers stay."""
        del self.tokens[num_tokens:]
        self.provenance.truncate(num_tokens)
        self.stored = min(self.stored, num_tokens)
        self.handed = min(self.handed, num_tokens)

    def release(self, pool: KVPool) -> None:
        """Give the buffers back; the tokens stay, because their KV is on disk or on its way."""
        if self.buffers is not None:
            pool.release(self.buffers)
            self.buffers = None

    def drop(self, pool: KVPool) -> None:
        """Give the buffers back and forget everything."""
        assert not self.moving
        self.release(pool)
        self.truncate(0)
        self.residency = Residency.RESIDENT

    def adopt(self, token_ids: Sequence[int]) -> None:
        """Of a session that holds nothing: its KV is on disk, for these tokens."""
        assert self.resident
        assert self.num_tokens == 0
        self.tokens = list(token_ids)
        self.provenance.mark(0, len(token_ids), "exact")
        self.stored = self.handed = len(token_ids)
        self.residency = Residency.SWAPPED

    def copy_prefix(self, other: "SessionKV", num_tokens: int) -> None:
        """Take over the first `num_tokens` tokens of another session, by copy.

        So neither can invalidate the other's KV. What both have already stays as it is, and on disk
        if it is there.
        """
        assert self.buffers is not None
        assert other.buffers is not None
        assert num_tokens <= min(self.capacity, other.provenance.exact_prefix)
        start = self.known_prefix(other.tokens[:num_tokens])
        mine, theirs = self.buffers, other.buffers
        for layer in range(len(mine.keys)):
            mine.keys[layer][:, start:num_tokens] = theirs.keys[layer][:, start:num_tokens]
            mine.values[layer][:, start:num_tokens] = theirs.values[layer][:, start:num_tokens]
        mx.eval(mine.keys, mine.values)
        self.truncate(start)
        self.append(other.tokens[start:num_tokens])

    def check_integrity(self) -> None:
        """Assert what must hold at any time between steps."""
        assert self.provenance.num_tokens == self.num_tokens
        assert self.stored <= self.handed <= self.num_tokens
        if self.resident:
            assert self.num_tokens <= self.capacity
        else:
            # LEAVING, it has buffers until all of it is handed to the writer; SWAPPED, it may have
            # been given some, which get memory before it begins to arrive.
            assert self.buffers is not None or self.residency is not Residency.ARRIVING
            assert self.provenance.exact_prefix == self.num_tokens
            gathered = self.buffers is None or self.residency is not Residency.LEAVING
            assert not gathered or self.handed == self.num_tokens
        if self.residency is Residency.SWAPPED:
            assert self.stored == self.num_tokens


class StagedView:
    """What a step writes to a session's KV, not yet the session's until committed.

    A step's graph is built while the step before still runs, and is thrown away when that step
    ends its session; so the session's own arrays are left alone until `commit`. The aliases share
    the buffer: once committed, the old references are gone and MLX updates it in place.
    """

    def __init__(self, kv: SessionKV, offset: int) -> None:
        assert kv.buffers is not None
        self._kv = kv
        self._buffers = kv.buffers
        self._offset = offset
        self._staged: dict[int, tuple[mx.array, mx.array]] = {}
        self._states: dict[int, State] = {}

    def at(self, offset: int) -> "StagedView":
        """Another place in the same session; what either writes both read, and commit."""
        other = StagedView(self._kv, offset)
        other._staged, other._states = self._staged, self._states
        return other

    @property
    def holds(self) -> bool:
        """Whether the session still has the buffers that the step was built for."""
        return self._kv.resident and self._kv.buffers is self._buffers

    @property
    def offset(self) -> int:
        """Tokens in the view before this step."""
        return self._offset

    def write(self, layer: int, keys: mx.array, values: mx.array) -> None:
        """Put `(num_kv_heads, rows, head_dim)` at the offset."""
        end = self._offset + keys.shape[1]
        assert end <= self._buffers.capacity
        if keys.shape[1] == self._buffers.capacity:
            # An update of the whole array is itself MLX's result: strided, and a part of something
            # larger. A session's buffers are read from disk into, run by run.
            keys, values = mx.contiguous(keys), mx.contiguous(values)
        all_keys, all_values = (copy.copy(array) for array in self._now(layer))
        all_keys[:, self._offset : end] = keys
        all_values[:, self._offset : end] = values
        self._staged[layer] = (all_keys, all_values)

    def read(self, layer: int, num_tokens: int) -> tuple[mx.array, mx.array]:
        """Keys and values of the first tokens, `(num_kv_heads, num_tokens, head_dim)` each."""
        keys, values = self._now(layer)
        return keys[:, :num_tokens], values[:, :num_tokens]

    def state(self, layer: int) -> State | None:
        """A recurrent layer's state behind the offset; None behind no token."""
        return self._states.get(layer) or self._kv.states.get(layer)

    def set_state(self, layer: int, state: State) -> None:
        """Put the state behind this step's rows."""
        self._states[layer] = state

    def _now(self, layer: int) -> tuple[mx.array, mx.array]:
        return self._staged.get(layer, (self._buffers.keys[layer], self._buffers.values[layer]))

    def commit(self) -> list[mx.array]:
        """Make the updates the session's; the arrays returned must be evaluated."""
        arrays: list[mx.array] = []
        for layer, (keys, values) in self._staged.items():
            self._buffers.keys[layer], self._buffers.values[layer] = keys, values
            arrays += (keys, values)
        for layer, state in self._states.items():
            self._kv.states[layer] = state
            arrays += state
        self._staged.clear()
        self._states.clear()
        return arrays
