"""Where stores lie: a root for all, a folder for each model's fingerprint, and who owns which.

    <root>/lock                      held for the moment in which a store's claim changes
    <root>/<fingerprint[:32]>/lock   held by the process that has the store open
                             /claim                    how much of the disk it may take (`budget`)
                             /index.sqlite, index.sqlite-wal, index.sqlite-shm
                             /index.damaged.sqlite     the last index that could not be read
                             /kv/0000000000000001.kv   a record each; .tmp while it is written
                             /segment-0000.kv, …       of the first release; removed when opened

Folders are 0700 and files 0600: KV can be turned back into what was said.
"""

import contextlib
import fcntl
import math
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from edgekv.errors import StoreBusy, StoreError, StoreUnusable
from edgekv.store.catalog import Catalog
from edgekv.store.index import (
    INDEX_NAME,
    Meta,
    check_version,
    connect_readonly,
    index_files,
    read_conversations,
    read_meta,
    read_rows,
    typed_errors,
    unpack_layers,
)
from edgekv.store.record import taken_bytes
from edgekv.store.values import StoredSession, StoreView

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
    assert len(name) == _NAME_CHARS
    assert name.isalnum()
    assert name.isascii()
    return root / name


def is_folder_of(folder: Path, fingerprint: str) -> bool:
    """Whether a fingerprint, wherever it comes from, gives a folder its name."""
    return len(fingerprint) >= _NAME_CHARS and folder.name == fingerprint[:_NAME_CHARS]


def store_folders(root: Path) -> list[Path]:
    """Folders under the root that look like stores, by name.

    Raises:
        StoreUnusable: The root cannot be read.
    """
    try:
        return sorted(path for path in root.iterdir() if (path / LOCK_NAME).is_file())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StoreUnusable(f"{root}: {error.strerror}") from error


def make_folder(folder: Path) -> None:
    """Make a folder of ours, or see that it is ours and nobody else's.

    Raises:
        StoreUnusable: It cannot be made, belongs to someone else, or is no folder.
    """
    try:
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
    except OSError as error:
        raise StoreUnusable(f"{folder}: {error.strerror}") from error


# --- locks ---


class FolderLock:
    """Says to other processes that a store is in use; the system ends it with the process."""

    def __init__(self, folder: Path) -> None:
        """Take the lock.

        Raises:
            StoreBusy: Somebody else has it.
            StoreUnusable: The lock file cannot be written.
        """
        self._fd = -1
        path = folder / LOCK_NAME
        try:
            fd = _open_private(path)
        except OSError as error:
            raise StoreUnusable(f"{path}: {error.strerror}") from error
        try:
            taken = _try_to_lock(fd)
        except OSError as error:
            os.close(fd)
            raise StoreUnusable(f"{path}: {error.strerror}") from error
        if not taken:
            owner = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
            os.close(fd)
            raise StoreBusy(
                f"{folder} is in use by {f'process {owner}' if owner else 'another process'}",
                hint="close it, or choose another store folder; sessions can be listed meanwhile",
            )
        self._fd = fd
        # The number is for people; a full volume need not keep us from reading.
        with contextlib.suppress(OSError):
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Let others have the store. Releasing twice does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


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
    """Wait until no other store under the root changes its claim, and keep others from it.

    Raises:
        OSError: The lock file cannot be written.
    """
    fd = _open_private(root / LOCK_NAME)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _open_private(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def is_in_use(folder: Path) -> bool:
    """Whether some process, perhaps this one, has the store open."""
    try:
        fd = os.open(folder / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
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


def root_bytes(root: Path) -> int:
    """What all stores under a root take."""
    return sum(folder_bytes(folder) for folder in store_folders(root))


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


def used_s(folder: Path) -> float:
    """Unix time of the last use of a store that nobody has open."""
    paths = index_files(folder / INDEX_NAME)
    return max((path.stat().st_mtime for path in paths if path.exists()), default=0.0)


def put_index_aside(folder: Path) -> None:
    """Keep a damaged index for whoever wants to look at it, and make room for a new one.

    Raises:
        StoreUnusable: The system refuses.
    """
    path = folder / INDEX_NAME
    try:
        # The log first: a new database would take up an old one's.
        for leftover in index_files(path)[1:]:
            leftover.unlink(missing_ok=True)
        path.replace(folder / DAMAGED_NAME)
    except OSError as error:
        raise StoreUnusable(f"{path}: {error.strerror}") from error


# --- what stands in stores that others may have open: never a payload ---


def read_stores(root: Path) -> list[StoreView]:
    """Views of all stores under a root, by folder name; what cannot be read is said, not repaired.

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
    found = [
        session.stored(conversations.get(session.key)) for session in catalog.sessions.values()
    ]
    return meta, sorted(found, key=lambda session: session.used_s, reverse=True)
