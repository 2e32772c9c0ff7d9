"""What the store hands out: frozen values, no handles."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class LayerState:
    """What one layer of a model keeps of a range of tokens.

    Attributes:
        kind: "kv": keys, then values, each `[head][token][dim]`. Others will follow.
        dtype: Name of the numbers' type.
        dtype_bytes: Bytes of one number.
        num_heads: KV heads.
        head_dim: Numbers of one head and token, of keys as of values.
    """

    kind: str = "kv"
    dtype: str
    dtype_bytes: int
    num_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        assert self.kind == "kv"
        assert min(self.dtype_bytes, self.num_heads, self.head_dim) > 0

    def range_bytes(self, num_tokens: int) -> int:
        """Bytes of so many tokens."""
        return 2 * num_tokens * self.num_heads * self.head_dim * self.dtype_bytes


@dataclass(frozen=True, kw_only=True)
class RecordRef:
    """One record as one session sees it: KV of tokens [start, end), of which it uses a prefix.

    Attributes:
        record_id: Of the record, which several sessions may share.
        start: First token.
        end: One past the last token that the record holds.
        use_end: One past the last token that the session uses, start < use_end <= end.
        payload_bytes: Bytes of KV, `end - start` tokens of all layers.
    """

    record_id: int
    start: int
    end: int
    use_end: int
    payload_bytes: int

    def clipped(self, num_tokens: int) -> "RecordRef":
        """The record as somebody sees it who uses no token from `num_tokens` on."""
        return self if self.use_end <= num_tokens else replace(self, use_end=num_tokens)


@dataclass(frozen=True, kw_only=True)
class StoredSession:
    """A session as the store knows it at one moment.

    Attributes:
        key: Names the session in the store's calls; never given to another session.
        app: Who owns it.
        name: Unique within the app.
        persistent: It outlives the process; others are forgotten when the store is closed.
        token_ids: Tokens whose KV is stored: as many as the last record's `use_end`.
        records: In order and without gaps, from token 0.
        conversation: JSON text of the runtime, opaque here; None before it was set.
        created_s: Unix time.
        used_s: Unix time of the last use; the least is evicted first.
        payload_bytes: KV of its records, shared ones included.
    """

    key: int
    app: str
    name: str
    persistent: bool
    token_ids: Sequence[int]
    records: tuple[RecordRef, ...]
    conversation: str | None
    created_s: float
    used_s: float
    payload_bytes: int

    @property
    def num_tokens(self) -> int:
        """Tokens whose KV is stored."""
        return len(self.token_ids)


@dataclass(frozen=True, kw_only=True)
class StoreView:
    """One model's store as it stood a moment ago, whether or not a process has it open.

    Attributes:
        folder: Where it is.
        model: The model's name; "" if the index cannot be read.
        fingerprint: Of whatever changes the model's KV; "" if the index cannot be read.
        token_bytes: KV of one token; 0 if the index does not say.
        sessions: Those that persist, the one used last first.
        file_bytes: What its files take on disk.
        in_use: Some process has it open.
        damage: Why the index cannot be read; "" if it can.
    """

    folder: Path
    model: str = ""
    fingerprint: str = ""
    token_bytes: int = 0
    sessions: tuple[StoredSession, ...] = ()
    file_bytes: int
    in_use: bool
    damage: str = ""


@dataclass(kw_only=True)
class StoreSnapshot:
    """Figures of one store at one moment; counters are of this process.

    Attributes:
        budget_bytes: Hard limit of all stores under the root together.
        root_bytes: What they take now, this one included: of others that are open, what they may.
        peak_bytes: The most they took.
        file_bytes: Record files and index of this store.
        used_bytes: Record files alone, headers and padding included.
        num_sessions: Of all apps.
        num_records: Shared ones counted once.
        num_tokens: KV tokens that are stored, shared ones counted once.
        num_writes: Records written.
        num_write_calls: System calls that took.
        payload_written_bytes: What those writes took, headers and padding included.
        kv_written_bytes: KV of tokens that were not stored before; wear is the ratio of the two.
        num_reads: Records read.
        num_read_calls: System calls that took.
        read_bytes: What those reads took.
        num_corrupt: Records that were refused, each once, when quarantined.
        num_full: Writes refused for want of room.
        num_stale: Writes and reads that came too late: the session was cut or removed.
        num_evicted: Records dropped to make room.
        total_payload_written_bytes: `payload_written_bytes` since the store was made, as far as
            the index knows: what a killed process wrote without KV of named sessions is not in it.
        total_kv_written_bytes: The same of `kv_written_bytes`.
        num_index_lost: 1 if the index was missing or damaged when the store was opened.
        num_records_lost: Records of the index whose files were gone, or of an older format, when
            the store was opened.
        num_not_removed: Times that a file nobody has could not be removed; it is tried again.
    """

    budget_bytes: int = 0
    root_bytes: int = 0
    peak_bytes: int = 0
    file_bytes: int = 0
    used_bytes: int = 0
    num_sessions: int = 0
    num_records: int = 0
    num_tokens: int = 0
    num_writes: int = 0
    num_write_calls: int = 0
    payload_written_bytes: int = 0
    kv_written_bytes: int = 0
    num_reads: int = 0
    num_read_calls: int = 0
    read_bytes: int = 0
    num_corrupt: int = 0
    num_full: int = 0
    num_stale: int = 0
    num_evicted: int = 0
    total_payload_written_bytes: int = 0
    total_kv_written_bytes: int = 0
    num_index_lost: int = 0
    num_records_lost: int = 0
    num_not_removed: int = 0
