"""How big KV is: shapes, capacities and bytes. Pure arithmetic, no arrays."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

BLOCK_TOKENS = 16
PAGE_BYTES = 16384
# Earlier states that a session keeps in memory, beside the one behind all of its tokens: that
# before the generation prompt, and the newest at group boundaries.
SNAPSHOTS_MAX = 3
# Tokens between two snapshots: as many as take as many bytes as a state, so that on disk states
# take no more than KV, within these bounds. More would be long to compute again (a state of
# Qwen 3.5 is as large as 1,500 tokens of its KV), fewer would cost steps more than they save.
SNAPSHOT_TOKENS_MIN, SNAPSHOT_TOKENS_MAX = 256, 1024
# Of layers with a window, in memory: what the window reaches, a group of new tokens, and so many
# older ones, so that the last few tokens can be taken back.
WINDOW_GROUP_TOKENS = 256
WINDOW_BACK_TOKENS = 64
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


class Heads(NamedTuple):
    """What one layer caches of each token; nothing where there are no heads."""

    num: int  # key-value heads
    key_dim: int  # numbers of a key
    value_dim: int  # of a value; 0: its values are a part of its keys


NOTHING = Heads(0, 0, 0)  # of a layer that reads another's KV, or has none


class StateArray(NamedTuple):
    """An array of what a recurrent layer remembers of all tokens of one sequence."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """What it takes."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, kw_only=True)
class KVLayout:
    """Shapes of one session's KV, and of its state where layers keep one in place of KV."""

    heads: tuple[Heads, ...]  # of every layer
    dtype_bytes: int  # bytes of one number
    context_max: int  # no session holds more tokens than this
    states: tuple[tuple[StateArray, ...], ...] = ()  # of every layer; empty if none keeps one
    # Of every layer: the last tokens, a row's own included, that it sees; 0: all. Empty if all see
    # all, or what a layer no longer sees is to stay in memory.
    windows: tuple[int, ...] = ()

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.heads)

    @cached_property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return sum(self.layer_token_bytes(i) for i in range(self.num_layers))

    def layer_token_bytes(self, layer: int) -> int:
        """Bytes of one token's key and value in one layer."""
        heads = self.heads[layer]
        return heads.num * (heads.key_dim + heads.value_dim) * self.dtype_bytes

    @cached_property
    def window(self) -> int:
        """The largest window, at which all layers that have one keep what they do; 0: none does."""
        assert not (self.windows and self.states), "one of both says where a session can go on"
        return max(self.windows, default=0)

    @cached_property
    def windowed_token_bytes(self) -> int:
        """What of `token_bytes` is that of layers with a window."""
        return sum(self.layer_token_bytes(i) for i, window in enumerate(self.windows) if window)

    @cached_property
    def window_slots(self) -> int:
        """Tokens whose KV is in memory of a layer with a window, at most; the last ones."""
        kept = self.window + WINDOW_BACK_TOKENS + WINDOW_GROUP_TOKENS
        return -(-kept // self.granule_tokens) * self.granule_tokens

    def slots(self, layer: int, capacity: int) -> int:
        """Tokens that a layer's arrays have room for, of buffers of a capacity."""
        has_window = self.windows and self.windows[layer]
        return min(capacity, self.window_slots) if has_window else capacity

    def window_base(self, num_tokens: int) -> int:
        """From which token on layers with a window keep a session of so many, when others go."""
        return max(0, num_tokens - self.window - WINDOW_BACK_TOKENS) if self.window else 0

    def first_slot(self, num_tokens: int) -> int:
        """From which token on they get what is read back of so many: from 0, if all have slots."""
        return 0 if num_tokens <= self.window_slots else self.window_base(num_tokens)

    @cached_property
    def granule_tokens(self) -> int:
        """Smallest multiple of a block for which every buffer is a multiple of 16 KiB.

        MLX donates a buffer to an in-place update only if the allocator gave it no larger one
        than asked for; whole pages make sure of that.
        """
        granule = BLOCK_TOKENS
        for count, *dims in self.heads:
            for row_bytes in (count * dim * self.dtype_bytes for dim in dims if dim):
                granule = math.lcm(granule, PAGE_BYTES // math.gcd(PAGE_BYTES, row_bytes))
        return granule

    def capacity_for(self, num_tokens: int) -> int:
        """Tokens of the smallest capacity class that holds `num_tokens`.

        Classes are 1, 2, 3, 4, 6, 8, 12, 16, 24, ... granules: few enough that a released buffer
        finds a new owner, close enough that at most a third is unused. None exceeds what
        `context_max` needs.
        """
        assert 0 < num_tokens <= self.context_max
        granule = self.granule_tokens
        wanted = -(-num_tokens // granule)
        size = 1
        while size < wanted:
            size = size * 3 // 2 if size > 1 and size & (size - 1) == 0 else -(-size * 4 // 3)
        return min(size, -(-self.context_max // granule)) * granule

    def capacity_bytes(self, capacity: int) -> int:
        """Bytes that a session owns whose buffers have a capacity; 0 without buffers.

        States that it may keep are counted from the first, so that taking one needs no plan.
        """
        if not capacity:
            return 0
        windowed = self.windowed_token_bytes
        kv_bytes = capacity * (self.token_bytes - windowed)
        if windowed:
            kv_bytes += min(capacity, self.window_slots) * windowed
        return kv_bytes + self.states_bytes

    @cached_property
    def state_bytes(self) -> int:
        """Bytes of a session's state at one position, of all layers."""
        return sum(array.num_bytes for arrays in self.states for array in arrays)

    @property
    def states_bytes(self) -> int:
        """Bytes of all states of a session that are in memory at a time, at most."""
        return (1 + SNAPSHOTS_MAX) * self.state_bytes

    @cached_property
    def snapshot_tokens(self) -> int:
        """Tokens from one snapshot to the next; 0 where there is no state."""
        if not self.state_bytes:
            return 0
        even = -(-self.state_bytes // (self.token_bytes * BLOCK_TOKENS)) * BLOCK_TOKENS
        return max(SNAPSHOT_TOKENS_MIN, min(even, SNAPSHOT_TOKENS_MAX))

    @property
    def rows_max(self) -> int:
        """Most rows of a session in one step.

        No more snapshots than can be kept beside one; what there is room for beside a window.
        """
        if self.window:
            return self.window_slots - self.window - WINDOW_BACK_TOKENS
        return (SNAPSHOTS_MAX - 1) * self.snapshot_tokens if self.states else self.context_max

    def growth_bytes(self, held: int, capacity: int) -> int:
        """What growing takes at its worst moment: the difference, and one layer twice."""
        more_bytes = self.capacity_bytes(capacity) - self.capacity_bytes(held)
        copied = (
            self.slots(layer, held) * self.layer_token_bytes(layer)
            for layer in range(self.num_layers)
            if self.slots(layer, held) < self.slots(layer, capacity)
        )
        return more_bytes + max(copied, default=0)


@dataclass(frozen=True, kw_only=True)
class PoolSnapshot:
    """The pool at one moment."""

    budget_bytes: int  # hard limit of `allocated_bytes`
    used_bytes: int  # owned by sessions
    free_bytes: int  # on the recycling list
    peak_bytes: int  # highest `allocated_bytes` so far
    staging_bytes: int = 0  # set aside for KV on its way to disk
    # Beside the budget: buffers that MLX keeps when they are freed, of the whole process; see
    # `DeviceProfile.freed_bytes_max`.
    freed_bytes: int = 0

    @property
    def allocated_bytes(self) -> int:
        """Owned and recyclable capacity together, and staging."""
        return self.staging_bytes + self.used_bytes + self.free_bytes

    @property
    def sessions_bytes(self) -> int:
        """What sessions can own altogether."""
        return self.budget_bytes - self.staging_bytes

    @property
    def available_bytes(self) -> int:
        """What can still be given to sessions."""
        return self.sessions_bytes - self.used_bytes
