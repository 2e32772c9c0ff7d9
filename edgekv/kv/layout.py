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
        return capacity * self.token_bytes + self.states_bytes if capacity else 0

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

    @cached_property
    def largest_layer_token_bytes(self) -> int:
        """Bytes of one token in the widest layer."""
        return max(self.layer_token_bytes(i) for i in range(self.num_layers))

    @property
    def rows_max(self) -> int:
        """Most rows of a session in one step: no more snapshots than can be kept beside one."""
        return (SNAPSHOTS_MAX - 1) * self.snapshot_tokens if self.states else self.context_max

    def growth_bytes(self, held: int, capacity: int) -> int:
        """What growing takes at its worst moment: the difference, and one layer twice."""
        more_bytes = self.capacity_bytes(capacity) - self.capacity_bytes(held)
        return more_bytes + held * self.largest_layer_token_bytes


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
