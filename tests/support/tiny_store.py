"""Small stores, and KV that says of each token which tokens came before it."""

import random
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import xxhash

from edgekv.errors import RecordCorrupt
from edgekv.store import LayerState, RecordRef, Store, StoredSession
from edgekv.store.folder import folder_bytes, store_folders

FINGERPRINT = "0123456789abcdef" * 4
TOKEN_BYTES = 256
MIB = 1 << 20
BUDGET = 8 * MIB


def layers_of(token_bytes: int) -> tuple[LayerState, ...]:
    """Two layers, the second of which holds three times as much as the first."""
    quarter = token_bytes // 4
    return tuple(
        LayerState(dtype="uint8", dtype_bytes=1, num_heads=heads, head_dim=quarter // 2)
        for heads in (1, 3)
    )


LAYERS = layers_of(TOKEN_BYTES)


def open_store(root: Path, **options: Any) -> Store:
    """A store whose budget is 8 MiB and that claims 256 KiB a step, unless told otherwise."""
    defaults = {
        "model": "tiny",
        "fingerprint": FINGERPRINT,
        "layers": LAYERS,
        "disk_bytes": BUDGET,
        "free_reserve_bytes": 0,
    }
    return Store.open(root, **(defaults | options))


def kv_of(token_ids: Sequence[int], start: int = 0, token_bytes: int = TOKEN_BYTES) -> bytes:
    """KV of tokens [start, end): each token's bytes are a hash of all ids up to it, repeated."""
    state = xxhash.xxh3_128()
    pieces = []
    for position, token in enumerate(token_ids):
        state.update(array("I", [token]))
        if position >= start:
            pieces.append(state.digest() * (token_bytes // 16))
    return b"".join(pieces)


def write(store: Store, key: int, token_ids: Sequence[int], start: int = 0) -> RecordRef:
    """Store tokens [start, end) of a session whose tokens these are."""
    payload = kv_of(token_ids, start, store.token_bytes)
    return store.write(key, start, token_ids[start:], [payload])


def kept(store: Store, app: str, name: str, token_ids: Sequence[int]) -> StoredSession:
    """A persistent session with these tokens stored."""
    key = store.session(app, name, persistent=True).key
    if token_ids:
        write(store, key, token_ids)
    found = store.find(app, name)
    assert found is not None
    return found


def read(store: Store, ref: RecordRef) -> bytes:
    """A record's payload, read in two pieces."""
    payload = bytearray(ref.payload_bytes)
    cut = ref.payload_bytes // 3
    store.read(ref, [memoryview(payload)[:cut], memoryview(payload)[cut:]])
    return bytes(payload)


def restored(
    store: Store, session: StoredSession, *errors: type[Exception]
) -> Iterator[tuple[RecordRef, bytes]]:
    """Records of a session as a restore reads them: one that is refused is quarantined.

    It ends what is restored in front of it, and so does one of `errors`.
    """
    for ref in session.records:
        payload = bytearray(ref.payload_bytes)
        try:
            store.read(ref, [payload])
        except RecordCorrupt:
            store.quarantine(session.key, ref.start)
            return
        except errors:
            return
        yield ref, bytes(payload)


def verify(store: Store, session: StoredSession) -> None:
    """Assert that every record of a session holds the KV of the session's own tokens."""
    end = 0
    for ref in session.records:
        assert ref.start == end < ref.use_end <= ref.end
        end = ref.use_end
        used = (ref.use_end - ref.start) * store.token_bytes
        expected = kv_of(session.token_ids[:end], ref.start, store.token_bytes)
        assert read(store, ref)[:used] == expected
    assert end == session.num_tokens


def verify_all(store: Store) -> None:
    """Assert that what the store says is what it holds."""
    for session in store.sessions():
        verify(store, session)
    store.check_integrity()


def record_files(store: Store) -> list[Path]:
    """Files of records, by the records' ids."""
    return sorted((store.folder / "kv").glob("*.kv"))


def root_bytes(root: Path) -> int:
    """What all stores under a root take."""
    return sum(folder_bytes(folder) for folder in store_folders(root))


def tokens(num_tokens: int, seed: int = 0) -> list[int]:
    """Random token ids."""
    return list(array("H", random.Random(seed).randbytes(2 * num_tokens)))
