"""One session's KV: which tokens it holds, in which buffers, and where they came from."""

from collections.abc import Sequence

import mlx.core as mx

from edgekv.kv.layout import KVLayout
from edgekv.kv.pool import Buffers, KVPool
from edgekv.kv.provenance import Provenance, ProvenanceMap
from edgekv.kv.residency import Residency, advance
from edgekv.kv.runs import roll
from edgekv.kv.states import SessionStates
from edgekv.ranks.orders import Verb


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

    Where layers keep a state, the tokens that are left when some are forgotten end where there is
    one; where they have a window, where all that it reaches is in memory, or on disk: `truncate`
    says how many these are, and `resume_point` beforehand.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.provenance = ProvenanceMap()
        self.residency = Residency.RESIDENT
        self.buffers: Buffers | None = None
        self.stored = 0
        self.handed = 0
        self.states = SessionStates()

    @classmethod
    def on_disk(cls, token_ids: Sequence[int], state_ends: Sequence[int] = ()) -> "SessionKV":
        """The KV of a session that an earlier process stored; see `adopt`."""
        kv = cls()
        if token_ids:
            kv.adopt(token_ids, state_ends)
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
    def next_to_hand(self) -> int:
        """The first token whose KV the writer lacks, or a state behind it.

        One that it has is written once more where only the state behind all tokens is lacking.
        """
        end, states = self.num_tokens, self.states
        lacks_state = states.recurrent and end == self.handed > 0 and end not in states.written
        return self.handed - lacks_state

    @property
    def num_to_hand(self) -> int:
        """Tokens from there on that can be written."""
        return self.provenance.exact_prefix - self.next_to_hand

    @property
    def lost_rows(self) -> bool:
        """Whether layers with a window lack some of what the writer lacks.

        It could not take it when that had to go, or it was never here: a copy may begin behind what
        another session has on disk. Otherwise what is behind cannot be written any more.
        """
        return self.buffers is not None and self.next_to_hand < self.buffers.base

    def note_stored(self, num_tokens: int) -> None:
        """No more than so many tokens are on disk, and none on their way."""
        self.handed = self.stored = num_tokens
        self.states.unwrite(num_tokens)

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
        """How many of these tokens' KV is exact, wherever it is, up to where it can go on."""
        known = min(common_prefix(self.tokens, token_ids), self.provenance.exact_prefix)
        return self.resume_point(known)

    def resume_point(self, num_tokens: int) -> int:
        """How many tokens `truncate` would leave."""
        point = self.states.resume_point(num_tokens, self.num_tokens, resident=self.resident)
        return point if not self.resident or self.in_reach(point) else 0

    def resume_point_on_disk(self, num_tokens: int) -> int:
        """The same if the session left memory first."""
        num_tokens = min(num_tokens, self.handed if self.lost_rows else self.num_tokens)
        return self.states.resume_point(num_tokens, self.num_tokens, resident=False)

    def in_reach(self, num_tokens: int) -> bool:
        """Whether memory has all that the token behind these sees."""
        buffers = self.buffers
        if buffers is None or not buffers.base:
            return True
        return num_tokens - max(buffers.windows) + 1 >= buffers.base

    def has_slots(self, layout: KVLayout, num_tokens: int) -> bool:
        """Whether layers with a window have room for the KV of so many tokens."""
        buffers = self.buffers
        assert buffers is not None
        slots = min(layout.window_slots, buffers.capacity)
        return not layout.window or num_tokens - buffers.base <= slots

    def roll(self, layout: KVLayout) -> None:
        """Forget of layers with a window what is long out of it."""
        assert self.resident
        assert self.buffers is not None
        self.buffers.order(Verb.ROLL)
        roll(layout, self.buffers, layout.window_base(self.num_tokens), self.num_tokens)

    def move(self, event: str) -> None:
        """Residency's next state."""
        self.residency = advance(self.residency, event)

    def append(self, token_ids: Sequence[int], kind: Provenance = "exact") -> None:
        """Record that a step which is being submitted writes KV for these tokens at the end."""
        start = self.num_tokens
        self.tokens.extend(token_ids)
        self.provenance.mark(start, self.num_tokens, kind)
        assert self.num_tokens <= self.capacity

    def truncate(self, num_tokens: int) -> int:
        """Forget the KV from `num_tokens` on, or from where it can go on before; buffers stay.

        Returns:
            How many tokens are left.
        """
        num_tokens = self.resume_point(num_tokens)
        if self.buffers is not None:
            if num_tokens < self.num_tokens:
                self.buffers.order(Verb.CUT, num_tokens)
            if not num_tokens:
                self.buffers.base = 0
        self.states.truncate(num_tokens, self.num_tokens)
        del self.tokens[num_tokens:]
        self.provenance.truncate(num_tokens)
        self.stored = min(self.stored, num_tokens)
        self.handed = min(self.handed, num_tokens)
        return num_tokens

    def release(self, pool: KVPool) -> None:
        """Give the buffers back; the tokens stay, because their KV is on disk or on its way."""
        self.states.forget_arrays()
        if self.buffers is not None:
            pool.release(self.buffers)
            self.buffers = None

    def drop(self, pool: KVPool) -> None:
        """Give the buffers back and forget everything."""
        assert not self.moving
        self.release(pool)
        self.truncate(0)
        self.residency = Residency.RESIDENT

    def adopt(self, token_ids: Sequence[int], state_ends: Sequence[int] = ()) -> None:
        """Of a session that holds nothing: its KV is on disk, for these tokens.

        So are the states behind so many of them each, the last one behind all, where there are any.
        """
        assert self.resident
        assert self.num_tokens == 0
        self.tokens = list(token_ids)
        self.states.note_written(state_ends)
        self.provenance.mark(0, len(token_ids), "exact")
        self.stored = self.handed = len(token_ids)
        self.residency = Residency.SWAPPED

    def copy_prefix(self, other: "SessionKV", num_tokens: int) -> None:
        """Take over the first `num_tokens` tokens of another session, by copy.

        So neither can invalidate the other's KV. What both have already stays as it is, and on disk
        if it is there. Of layers with a window it has what the other has, and so may lack rows that
        only the other has written: `lost_rows`.
        """
        assert self.buffers is not None
        assert other.buffers is not None
        assert num_tokens <= min(self.capacity, other.provenance.exact_prefix)
        assert num_tokens == other.resume_point(num_tokens)
        self.truncate(self.known_prefix(other.tokens[:num_tokens]))
        self.take_rows(other, num_tokens)

    def take_rows(self, other: "SessionKV", num_tokens: int) -> None:
        """Copy what another session has behind one's own last token, until both have as many."""
        start, mine, theirs = self.num_tokens, self.buffers, other.buffers
        assert mine is not None
        assert theirs is not None
        mine.order(Verb.TAKE, theirs.number, num_tokens)
        mine.base = max(mine.base, theirs.base)
        for layer in range(len(mine.keys)):
            base, their_base = mine.first_token(layer), theirs.first_token(layer)
            first = base or start
            for ours, others in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
                rows = others[layer][:, first - their_base : num_tokens - their_base]
                if rows.shape == ours[layer].shape:
                    rows = mx.array(rows)  # else the update would be the other's array itself
                ours[layer][:, first - base : num_tokens - base] = rows
            mx.eval(mine.keys[layer], mine.values[layer])  # no more than one layer is there twice
        self.append(other.tokens[start:num_tokens])
        self.states.take(other.states, num_tokens, other.num_tokens)

    def check_integrity(self, layout: KVLayout | None = None) -> None:
        """Assert what must hold at any time between steps."""
        if layout is not None:
            self._check_states(layout)
            self._check_slots(layout)
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

    def _check_slots(self, layout: KVLayout) -> None:
        """Assert that layers with a window have what is in reach."""
        if self.buffers is None:
            return
        assert self.buffers.windows == layout.windows
        if self.resident:
            assert 0 <= self.buffers.base <= self.num_tokens
            assert self.has_slots(layout, self.num_tokens)
            assert self.in_reach(self.num_tokens)

    def _check_states(self, layout: KVLayout) -> None:
        """Assert that there is a state wherever it may have to go on from."""
        states = self.states
        states.check_integrity(layout, self.num_tokens)
        assert not states.written or states.written[-1] <= self.handed
        if layout.state_bytes and self.num_tokens:
            in_memory = self.resident or (
                self.buffers is not None and self.handed < self.num_tokens
            )
            assert not in_memory or states.now
            is_written = self.num_tokens in states.written
            assert self.residency is not Residency.SWAPPED or is_written
        assert self.buffers is not None or not (states.now or states.kept)
