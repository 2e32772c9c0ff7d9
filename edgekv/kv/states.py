"""What a session's recurrent layers remember of its tokens, by how many these are.

A state is made of all tokens before and cannot be cut back. So a session goes on only from where
one is: behind its last token, or at an earlier position of which a snapshot was kept. A layer's
step makes new arrays and changes none: to keep a reference is to keep a snapshot.
"""

from collections.abc import Iterable

import mlx.core as mx

from edgekv.kv.layout import SNAPSHOTS_MAX, KVLayout

State = tuple[mx.array, ...]  # of one layer
States = dict[int, State]  # of all that have one


class SessionStates:
    """States of one session, by position. Owned by its SessionKV.

    Attributes:
        now: Behind all tokens, while that is in memory.
        kept: Snapshots in memory, ascending; one may be behind all tokens too.
        written: Positions whose state is in a record, on disk or on its way there, ascending.

    All are empty without tokens, and of a model without such layers.
    """

    def __init__(self) -> None:
        self.recurrent = False  # there was one, once, and so the model has such layers
        self.now: States = {}
        self.kept: dict[int, States] = {}
        self.written: list[int] = []
        self._pinned = 0  # is not dropped for newer ones
        self._again = 0  # is replaced by the next of its kind

    def at(self, position: int, num_tokens: int) -> States | None:
        """The state behind so many tokens of the session's `num_tokens`, if it is in memory."""
        now = self.now if position == num_tokens else None
        return now or self.kept.get(position)

    def resume_point(self, wanted: int, num_tokens: int, *, resident: bool) -> int:
        """The last position, at most `wanted`, from which a session of `num_tokens` can go on.

        That is, any, if no layer has a state. What is on disk is of use to who is not resident.
        """
        if wanted >= num_tokens or not self.recurrent:
            return min(wanted, num_tokens)
        points = [*self.kept, *(() if resident else self.written)]
        return max((point for point in points if point <= wanted), default=0)

    def move_on(self, states: States) -> None:
        """The state behind all tokens, of which there are more now, or which are in memory now."""
        self.recurrent |= bool(states)
        self.now = states

    def note_written(self, positions: Iterable[int]) -> None:
        """Behind these tokens, and no others, a state is on disk."""
        self.written = sorted(positions)
        self.recurrent |= bool(self.written)

    def keep(self, position: int, states: States, *, pinned: bool = False) -> None:
        """Keep a snapshot; of too many the oldest goes that is not pinned."""
        self.kept[position] = states
        self.kept = dict(sorted(self.kept.items()))
        if pinned:
            self._pinned = position
        for old in [point for point in self.kept if point != self._pinned]:
            if len(self.kept) > SNAPSHOTS_MAX:
                del self.kept[old]

    def keep_again(self, position: int) -> None:
        """Keep the state of now, in place of the one that was kept so last."""
        if self._again != self._pinned:
            self.kept.pop(self._again, None)
        self._again = 0
        if position not in self.kept and self.now:
            self.keep(position, self.now)
            self._again = position

    @property
    def lasting(self) -> list[int]:
        """Positions of the snapshots that go to disk: those at group boundaries.

        To the others a session comes back soon, or never, and a group before them there is one.
        """
        return [point for point in self.kept if point not in {self._pinned, self._again}]

    def truncate(self, position: int, num_tokens: int) -> None:
        """Forget all behind a position from which `num_tokens` tokens can go on."""
        if position < num_tokens:
            self.now = self.kept.get(position, {})
        self.kept = {point: states for point, states in self.kept.items() if point <= position}
        self.unwrite(position)

    def unwrite(self, position: int) -> None:
        """What is behind a position is not on disk, or not of use there."""
        self.written = [point for point in self.written if point <= position]

    def forget_arrays(self) -> None:
        """Let go of all that is in memory."""
        self.now, self.kept = {}, {}

    def take(self, other: "SessionStates", position: int, num_tokens: int) -> None:
        """Go on from another's state; of the first `position` tokens both have the same.

        Arrays are never changed, so that both may have them. The other has `num_tokens`.
        """
        self.move_on(other.at(position, num_tokens) or {})
        for point, states in other.kept.items():
            if point <= position:
                self.keep(point, states)

    def check_integrity(self, layout: KVLayout, num_tokens: int) -> None:
        """Assert that there are no more than the pool counts, and none behind the last token."""
        points = [*self.kept]
        assert points == sorted(points)
        assert len(points) <= SNAPSHOTS_MAX
        assert all(0 < point <= num_tokens for point in [*points, *self.written])
        assert self.written == sorted({*self.written})
        arrays = {id(array): array for array in arrays_of([self.now, *self.kept.values()])}
        assert sum(array.nbytes for array in arrays.values()) <= layout.states_bytes
        wanted = [tuple(a.shape for a in arrays) for arrays in layout.states if arrays]
        for states in [*self.kept.values(), *([self.now] if self.now else [])]:
            assert [tuple(a.shape for a in states[layer]) for layer in sorted(states)] == wanted


def arrays_of(states: Iterable[States]) -> list[mx.array]:
    """All arrays of some states."""
    return [array for of_layers in states for state in of_layers.values() for array in state]
