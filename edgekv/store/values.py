"""What the store hands out: frozen values, no handles."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

# Arrays of each token that a layer keeps, by its kind.
_ARRAYS = {"kv": 2, "latent": 1, "none": 0, "state": 0}


@dataclass(frozen=True, kw_only=True)
class LayerState:
    """What one layer of a model keeps of a range of tokens."""

    # "kv": keys, then values, each `[head][token][dim]`; "latent": keys alone, of which values are
    # a part; "none": nothing. "state", one more entry for each of its arrays: what a recurrent
    # layer remembers of all tokens up to the range's end, `num_heads * head_dim` numbers.
    kind: str = "kv"
    dtype: str  # name of the numbers' type
    dtype_bytes: int  # bytes of one number
    num_heads: int  # KV heads
    head_dim: int  # numbers of one head and token, of keys as of values

    def __post_init__(self) -> None:
        assert self.kind in _ARRAYS
        assert self.dtype.isascii() and 0 < len(self.dtype) <= 12  # noqa: PT018 - a record's field
        assert (min(self.dtype_bytes, self.num_heads, self.head_dim) > 0) == (self.kind != "none")

    def range_bytes(self, num_tokens: int) -> int:
        """Bytes of so many tokens."""
        numbers = _ARRAYS[self.kind] * num_tokens * self.num_heads * self.head_dim
        return numbers * self.dtype_bytes

    @property
    def state_bytes(self) -> int:
        """Bytes of a state, however many tokens it is of."""
        is_state = self.kind == "state"
        return is_state * self.num_heads * self.head_dim * self.dtype_bytes


@dataclass(frozen=True, kw_only=True)
class RecordRef:
    """One record as one session sees it: KV of tokens [start, end), of which it uses a prefix."""

    record_id: int  # of the record, which several sessions may share
    start: int  # first token
    end: int  # one past the last token that the record holds
    use_end: int  # one past the last token that the session uses, start < use_end <= end
    payload_bytes: int  # bytes of KV, `end - start` tokens of all layers, and of a state
    state_bytes: int = 0  # of them, those of the state behind the last token; 0: it has none

    @property
    def ends_with_state(self) -> bool:
        """Whether it says what layers without KV remember behind the last token that is used."""
        return self.state_bytes > 0 and self.use_end == self.end

    def clipped(self, num_tokens: int) -> "RecordRef":
        """The record as somebody sees it who uses no token from `num_tokens` on."""
        return self if self.use_end <= num_tokens else replace(self, use_end=num_tokens)


def state_ends(records: Iterable[RecordRef]) -> list[int]:
    """Behind how many of a session's tokens its records have a state, ascending."""
    return [ref.use_end for ref in records if ref.ends_with_state]


def resume_point(records: Iterable[RecordRef], num_tokens: int) -> int:
    """The last of these, at most `num_tokens`."""
    return max((end for end in state_ends(records) if end <= num_tokens), default=0)


@dataclass(frozen=True, kw_only=True)
class StoredSession:
    """A session as the store knows it at one moment."""

    key: int  # names the session in the store's calls; never given to another session
    app: str  # who owns it
    name: str  # unique within the app
    persistent: bool  # it outlives the process; others are forgotten when the store is closed
    token_ids: Sequence[int]  # tokens whose KV is stored: as many as the last record's `use_end`
    records: tuple[RecordRef, ...]  # in order and without gaps, from token 0
    conversation: str | None  # JSON text of the runtime, opaque here; None before it was set
    created_s: float  # unix time
    used_s: float  # unix time of the last use; the least is evicted first
    payload_bytes: int  # KV of its records, shared ones included
    has_state: bool = False  # layers of its model keep a state, which cannot be cut back

    @property
    def state_ends(self) -> list[int]:
        """Behind how many tokens a state is stored, ascending."""
        return state_ends(self.records)

    def resume_point(self, num_tokens: int) -> int:
        """How many of its first tokens, at most so many, can be gone on from."""
        return resume_point(self.records, num_tokens) if self.has_state else num_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens whose KV is stored."""
        return len(self.token_ids)


@dataclass(frozen=True, kw_only=True)
class StoreView:
    """One model's store as it stood a moment ago, whether or not a process has it open."""

    folder: Path  # where it is
    model: str = ""  # the model's name; "" if the index cannot be read
    fingerprint: str = ""  # of whatever changes the model's KV; "" if the index cannot be read
    token_bytes: int = 0  # KV of one token; 0 if the index does not say
    sessions: tuple[StoredSession, ...] = ()  # those that persist, the one used last first
    file_bytes: int  # what its files take on disk
    in_use: bool  # some process has it open
    damage: str = ""  # why the index cannot be read; "" if it can


@dataclass(kw_only=True)
class StoreSnapshot:
    """Figures of one store at one moment; counters are of this process."""

    budget_bytes: int = 0  # hard limit of all stores under the root together
    # What they take now, this one included: of others that are open, what they may.
    root_bytes: int = 0
    peak_bytes: int = 0  # the most they took
    file_bytes: int = 0  # record files and index of this store
    used_bytes: int = 0  # record files alone, headers and padding included
    num_sessions: int = 0  # of all apps
    num_records: int = 0  # shared ones counted once
    num_tokens: int = 0  # KV tokens that are stored, shared ones counted once
    num_writes: int = 0  # records written
    num_write_calls: int = 0  # system calls that took
    written_bytes: int = 0  # length of the files that those made, headers included
    # KV of tokens that were not stored before; wear is the ratio of the two.
    kv_written_bytes: int = 0
    num_reads: int = 0  # records read
    num_read_calls: int = 0  # system calls that took
    read_bytes: int = 0  # what those reads took
    num_corrupt: int = 0  # records that were refused, each once, when quarantined
    num_full: int = 0  # writes refused for want of room
    num_unsaved: int = 0  # sessions whose newest text is not on disk: it could not be saved, so far
    num_stale: int = 0  # writes and reads that came too late: the session was cut or removed
    num_evicted: int = 0  # records dropped to make room
    # `written_bytes` since the store was made, as far as the index knows: what a killed
    # process wrote without KV of named sessions is not in it.
    total_written_bytes: int = 0
    total_kv_written_bytes: int = 0  # the same of `kv_written_bytes`
    num_index_lost: int = 0  # 1 if the index was missing or damaged when the store was opened
    # Records of the index whose files were gone, or of an older format, when the store was opened.
    num_records_lost: int = 0
    num_not_removed: int = 0  # times that a file nobody has could not be removed; it is tried again
