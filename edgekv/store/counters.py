"""What a store counts while it is open."""

from dataclasses import dataclass, fields

from edgekv.store.values import StoreSnapshot

# Names in the index's meta table.
TOTAL_PAYLOAD = "payload_written_bytes"
TOTAL_KV = "kv_written_bytes"


@dataclass(kw_only=True)
class Counters:
    """Counters of one store, guarded by its state lock. See `StoreSnapshot` for what they mean."""

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
    num_index_lost: int = 0
    num_records_lost: int = 0
    earlier_payload_bytes: int = 0
    earlier_kv_bytes: int = 0

    @property
    def totals(self) -> dict[str, int]:
        """What was written since the store was made, as the index keeps it."""
        return {
            TOTAL_PAYLOAD: self.earlier_payload_bytes + self.payload_written_bytes,
            TOTAL_KV: self.earlier_kv_bytes + self.kv_written_bytes,
        }

    def load_totals(self, meta: dict[str, str | int]) -> None:
        """Go on from what the index kept."""
        earlier = [meta.get(name, 0) for name in (TOTAL_PAYLOAD, TOTAL_KV)]
        self.earlier_payload_bytes, self.earlier_kv_bytes = (
            value if isinstance(value, int) else 0 for value in earlier
        )

    def figures(self) -> dict[str, int]:
        """Those of `StoreSnapshot` that are counted here, by its names."""
        here = {field.name for field in fields(self)} & {f.name for f in fields(StoreSnapshot)}
        return {name: getattr(self, name) for name in here} | {
            f"total_{name}": total for name, total in self.totals.items()
        }

    def wrote(self, *, written_bytes: int, kv_bytes: int, num_calls: int) -> None:
        """A record was written."""
        self.num_writes += 1
        self.num_write_calls += num_calls
        self.payload_written_bytes += written_bytes
        self.kv_written_bytes += kv_bytes

    def did_read(self, *, read_bytes: int, num_calls: int) -> None:
        """A record was read, whether or not it was whole."""
        self.num_reads += 1
        self.num_read_calls += num_calls
        self.read_bytes += read_bytes
