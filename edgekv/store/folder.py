"""Where stores lie: a root for all, a folder for each model's fingerprint, and who owns which.

    <root>/lock                      held for the moment in which a store's claim changes
    <root>/<fingerprint[:32]>/lock   held by the process that has the store open
                             /claim                    how much of the disk it may take (`budget`)
                             /index.sqlite, index.sqlite-wal, index.sqlite-shm
                             /index.damaged.sqlite     the last index that could not be read, until
                                                       something that was said is removed
                             /kv/0000000000000001.kv   a record each
                             /segment-0000.kv, …       of the first release; removed when opened

Folders are 0700 and files 0600: KV can be turned back into what was said.
"""

import contextlib
import fcntl
import math
import os
import sqlite3
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from edgekv.errors import StoreBusy, StoreError, StoreUnusable
from edgekv.process import close_locked, open_locked
from edgekv.store.catalog import Catalog
from edgekv.store.record import taken_bytes
from edgekv.store.rows import (
    SQLITE_ERRORS,
    Meta,
    check_version,
    read_conversations,
    read_meta,
    read_rows,
    typed_errors,
    unpack_layers,
)
from edgekv.store.values import StoredSession, StoreView

INDEX_NAME = "index.sqlite"
LOCK_NAME = "lock"
CLAIM_NAME = "claim"
DAMAGED_NAME = "index.damaged.sqlite"
KV_NAME = "kv"
_NAME_CHARS = 32
_LOCK_TRIES = 5
_LOCK_PAUSE_S = 0.01


def store_folder(root: Path, fingerprint: str) -> Path:
    """The folder of one model's store."""
    name = fingerprint[:_NAME_CHARS]
    assert len(name) == _NAME_CHARS and name.isalnum() and name.isascii()  # noqa: PT018
    return root / name


def is_folder_of(folder: Path, fingerprint: str) -> bool:
    """Whether a fingerprint, wherever it comes from, gives a folder its name."""
    return len(fingerprint) >= _NAME_CHARS and folder.name == fingerprint[:_NAME_CHARS]


@contextlib.contextmanager
def usable(path: Path) -> Iterator[None]:
    """Raise StoreUnusable where the system refuses something inside."""
    try:
        yield
    except OSError as error:
        raise StoreUnusable(f"{path}: {error.strerror or error}") from error


def store_folders(root: Path) -> list[Path]:
    """Folders under the root that look like stores, by name. Raises StoreUnusable."""
    with usable(root), contextlib.suppress(FileNotFoundError):
        return sorted(path for path in root.iterdir() if (path / LOCK_NAME).is_file())
    return []


def make_folder(folder: Path) -> None:
    """Make a folder of ours, or see that it is ours and nobody else's. Raises StoreUnusable."""
    with usable(folder):
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode):
            raise StoreUnusable(f"{folder} is not a folder")
        if status.st_uid != os.geteuid():
            raise StoreUnusable(f"{folder} belongs to another user")
        if status.st_mode & 0o077:
            folder.chmod(0o700)


# --- locks ---


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Own a store, as other processes can see; the system ends it with the process.

    Raises StoreBusy if somebody else has it, StoreUnusable.
    """
    with usable(folder / LOCK_NAME):
        fd = _open_private(folder / LOCK_NAME)
    try:
        with usable(folder / LOCK_NAME):
            if not _try_to_lock(fd):
                owner = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
                raise StoreBusy(
                    f"{folder} is in use by {f'process {owner}' if owner else 'another process'}",
                    hint="close it, or choose another store folder; sessions can be listed "
                    "meanwhile",
                )
        # The number is for people; a full volume need not keep us from reading.
        with contextlib.suppress(OSError):
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        close_locked(fd)


def _try_to_lock(fd: int) -> bool:
    """Lock a file, though somebody may look for a moment whether it is locked."""
    for _ in range(_LOCK_TRIES):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_LOCK_PAUSE_S)
        else:
            return True
    return False


@contextlib.contextmanager
def root_lock(root: Path) -> Iterator[None]:
    """Keep other stores under the root from changing their claims. Raises OSError."""
    fd = _open_private(root / LOCK_NAME)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        close_locked(fd)


def _open_private(path: Path) -> int:
    return open_locked(path, os.O_RDWR | os.O_CREAT)


def is_in_use(folder: Path) -> bool:
    """Whether some process, perhaps this one, has the store open."""
    try:
        fd = open_locked(folder / LOCK_NAME, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        close_locked(fd)
    return False


# --- sizes ---


def files_of(folder: Path) -> dict[str, int]:
    """What the files directly in a folder take, by name; nothing where there is no folder."""
    found: dict[str, int] = {}
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                if not entry.is_dir(follow_symlinks=False):
                    found[entry.name] = taken_bytes(entry.stat(follow_symlinks=False).st_size)
    return found


def folder_bytes(folder: Path) -> int:
    """What the files of one store take."""
    return sum(files_of(folder).values()) + sum(files_of(folder / KV_NAME).values())


def has_kv(folder: Path) -> bool:
    """Whether there is KV in a store, in whatever format."""
    return bool(files_of(folder / KV_NAME)) or any(folder.glob("segment-*.kv"))


def remove_kv(folder: Path) -> None:
    """Remove all KV of a store that is ours; what was said stays. Raises OSError."""
    for name in files_of(folder / KV_NAME):
        (folder / KV_NAME / name).unlink(missing_ok=True)
    remove_segments(folder)


def remove_segments(folder: Path) -> None:
    """Remove what the first release kept KV in. Raises OSError."""
    for path in folder.glob("segment-*.kv"):
        path.unlink(missing_ok=True)


def index_files(folder: Path) -> list[Path]:
    """The database, its log and the log's index."""
    return [folder / f"{INDEX_NAME}{suffix}" for suffix in ("", "-wal", "-shm")]


def used_s(folder: Path) -> float:
    """Unix time of the last use of a store that nobody has open."""
    paths = index_files(folder)
    return max((path.stat().st_mtime for path in paths if path.exists()), default=0.0)


def put_index_aside(folder: Path) -> None:
    """Keep a damaged index for whoever wants to look, and make room. Raises StoreUnusable."""
    path, *leftovers = index_files(folder)
    with usable(path):
        # The log first: a new database would take up an old one's.
        for leftover in leftovers:
            leftover.unlink(missing_ok=True)
        path.replace(folder / DAMAGED_NAME)


def remove_damaged(root: Path, *, before_s: float) -> None:
    """Remove damaged indexes that were put aside and not written to since a Unix time.

    Raises StoreUnusable.
    """
    for folder in store_folders(root):
        path = folder / DAMAGED_NAME
        with usable(path), contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime <= before_s:
                path.unlink()


# --- what stands in them; others may have them open ---


def read_stores(root: Path) -> list[StoreView]:
    """What stands in the stores under a root, by folder name, never a payload; nothing is repaired.

    What cannot be read is said.

    SQLite's WAL lets a reader in beside the process that writes.

    Raises:
        StoreUnusable: The root cannot be read.
    """
    return [_read_store(folder) for folder in store_folders(root)]


def _read_store(folder: Path) -> StoreView:
    file_bytes, in_use = folder_bytes(folder), is_in_use(folder)
    try:
        meta, sessions = _read_index(folder / INDEX_NAME)
    except StoreError as error:
        return StoreView(folder=folder, file_bytes=file_bytes, in_use=in_use, damage=str(error))
    return StoreView(
        folder=folder,
        model=str(meta.get("model", "")),
        fingerprint=str(meta.get("fingerprint", "")),
        token_bytes=_token_bytes(meta),
        sessions=tuple(sessions),
        file_bytes=file_bytes,
        in_use=in_use,
    )


def _token_bytes(meta: Meta) -> int:
    with contextlib.suppress(StoreUnusable):
        return sum(layer.range_bytes(1) for layer in unpack_layers(meta.get("layers")))
    old = meta.get("token_bytes")  # of the first release
    return old if isinstance(old, int) and old > 0 else 0


def _read_index(path: Path) -> tuple[Meta, list[StoredSession]]:
    with typed_errors(path), contextlib.closing(connect_readonly(path)) as connection:
        if not check_version(connection, path):
            return {}, []
        connection.execute("BEGIN")  # all of it as of one commit
        meta = read_meta(connection)
        conversations = read_conversations(connection)
        rows = read_rows(connection)
    catalog = Catalog()
    catalog.restore(rows, accept=lambda _: True, now_s=math.inf)
    return meta, catalog.stored(conversations)


def connect_readonly(path: Path) -> sqlite3.Connection:
    """Open for reading; on a volume that cannot be written, without the files that WAL needs."""
    uri = path.absolute().as_uri()
    connection = sqlite3.connect(f"{uri}?mode=ro", uri=True, timeout=10, isolation_level=None)
    try:
        connection.execute("SELECT 1 FROM sqlite_master")
    except SQLITE_ERRORS as error:
        connection.close()
        if not isinstance(error, sqlite3.OperationalError) or error.sqlite_errorcode & 0xFF not in (
            sqlite3.SQLITE_CANTOPEN,
            sqlite3.SQLITE_READONLY,
        ):
            raise
        uri += "?mode=ro&immutable=1"
        connection = sqlite3.connect(uri, uri=True, isolation_level=None)
    return connection
