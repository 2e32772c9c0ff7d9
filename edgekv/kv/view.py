"""What one step reads and writes of a session's KV: the model's side of it.

SessionKV ──▶ StagedView: at an offset, layer by layer ──commit──▶ SessionKV
"""

import copy
from dataclasses import dataclass

import mlx.core as mx

from edgekv.kv.session_kv import SessionKV
from edgekv.kv.states import State, States, arrays_of


@dataclass(frozen=True, kw_only=True)
class Keeps:
    """Which states a step keeps, by position."""

    positions: tuple[int, ...] = ()  # ascending, behind rows of the step
    pinned: int = 0  # stays while newer ones come
    before: bool = False  # its rows may have to run again: what was before them is kept, too


KEEPS_NONE = Keeps()


class StagedView:
    """What a step writes to a session's KV, not yet the session's until committed.

    A step's graph is built while the step before still runs, and is thrown away when that step
    ends its session; so the session's own arrays are left alone until `commit`. The aliases share
    the buffer: once committed, the old references are gone and MLX updates it in place.

    Of recurrent layers it keeps snapshots behind some of its rows (`Keeps`).
    """

    def __init__(self, kv: SessionKV, offset: int, keeps: Keeps = KEEPS_NONE) -> None:
        assert kv.buffers is not None
        self._kv = kv
        self._buffers = kv.buffers
        self._offset = offset
        self._base = kv.buffers.base
        self.keeps = keeps
        self._staged: dict[int, tuple[mx.array, mx.array]] = {}
        self._states: States = {}
        self._snapshots: dict[int, States] = {position: {} for position in keeps.positions}

    def at(self, offset: int) -> "StagedView":
        """Another place in the same session; what either writes both read, and commit."""
        other = StagedView(self._kv, offset)
        other._staged = self._staged
        return other

    @property
    def number(self) -> int:
        """By which other ranks know the session's buffers."""
        return self._buffers.number

    @property
    def holds(self) -> bool:
        """Whether the session still has the buffers that the step was built for."""
        kv, buffers = self._kv, self._buffers
        return kv.resident and kv.buffers is buffers and buffers.base == self._base

    @property
    def offset(self) -> int:
        """Tokens in the view before this step."""
        return self._offset

    def write(self, layer: int, keys: mx.array, values: mx.array) -> None:
        """Put `(num_kv_heads, rows, head_dim)` at the offset."""
        all_keys, all_values = (copy.copy(array) for array in self._now(layer))
        start = self._offset - self._buffers.first_token(layer)
        end = start + keys.shape[1]
        assert 0 <= start < end <= all_keys.shape[1]
        if keys.shape == all_keys.shape:
            # An update of the whole array is itself MLX's result: strided, and a part of something
            # larger. A session's buffers are read from disk into, run by run.
            keys, values = mx.contiguous(keys), mx.contiguous(values)
        all_keys[:, start:end] = keys
        all_values[:, start:end] = values
        self._staged[layer] = (all_keys, all_values)

    def read(self, layer: int, num_tokens: int) -> tuple[mx.array, mx.array]:
        """Keys and values of the first tokens, `(num_kv_heads, num_tokens, head_dim)` each.

        Of a layer with a window fewer where the first are out of reach.
        """
        keys, values = self._now(layer)
        end = num_tokens - self._buffers.first_token(layer)
        return keys[:, :end], values[:, :end]

    def stops(self, num_rows: int) -> list[int]:
        """Rows, of so many, behind which states are told; the last is always one of them."""
        rows = [position - self._offset for position in self.keeps.positions]
        return [*(row for row in rows if 0 < row < num_rows), num_rows]

    def state(self, layer: int) -> State | None:
        """A recurrent layer's state behind the offset; None behind no token."""
        assert self._offset == self._kv.num_tokens, "there is a state at the end alone"
        assert not self._offset or layer in self._kv.states.now
        return self._kv.states.now.get(layer)

    def set_state(self, layer: int, num_rows: int, state: State) -> None:
        """Put the state behind the first so many rows of this step."""
        self._states[layer] = state
        if (snapshot := self._snapshots.get(self._offset + num_rows)) is not None:
            snapshot[layer] = state

    def _now(self, layer: int) -> tuple[mx.array, mx.array]:
        return self._staged.get(layer, (self._buffers.keys[layer], self._buffers.values[layer]))

    def commit(self) -> list[mx.array]:
        """Make the updates the session's; the arrays returned must be evaluated."""
        arrays: list[mx.array] = []
        for layer, (keys, values) in self._staged.items():
            self._buffers.keys[layer], self._buffers.values[layer] = keys, values
            arrays += (keys, values)
        self._staged.clear()
        if self._states:
            arrays += self._commit_states()
        return arrays

    def _commit_states(self) -> list[mx.array]:
        states = self._kv.states
        if self.keeps.before:
            states.keep_again(self._offset)
        states.move_on(dict(self._states))
        for position, snapshot in self._snapshots.items():
            if snapshot:
                states.keep(position, snapshot, pinned=position == self.keeps.pinned)
        self._states.clear()
        self._snapshots.clear()
        return arrays_of([states.now, *states.kept.values()])
