"""Where stores lie: a root for all, a folder for each model's fingerprint, and who owns which.

    <root>/lock                      held for the moment in which a store grows
    <root>/<fingerprint[:32]>/lock   held by the process that has the store open
                             /index.sqlite, index.sqlite-wal, index.sqlite-shm
                             /index.damaged.sqlite     the last index that could not be read
                             /segment-0000.kv, …

Folders are 0700 and files 0600: KV can be turned back into what was said.
"""

import contextlib
import fcntl
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from edgekv.errors import StoreBusy, StoreUnusable
from edgekv.store.index import INDEX_NAME, index_files

LOCK_NAME = "lock"
DAMAGED_NAME = "index.damaged.sqlite"
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
    """Make a store's folder, or see that it is ours and nobody else's.

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
            fd = _open_lock(path)
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
    """Wait until no other store under the root grows, and keep others from it meanwhile.

    Raises:
        OSError: The lock file cannot be written.
    """
    fd = _open_lock(root / LOCK_NAME)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _open_lock(path: Path) -> int:
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


def folder_bytes(folder: Path) -> int:
    """What the files of one store take."""
    total = 0
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                total += entry.stat(follow_symlinks=False).st_size
    return total


def root_bytes(root: Path) -> int:
    """What all stores under a root take."""
    with os.scandir(root) as entries:
        folders = [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
    return sum(folder_bytes(Path(folder)) for folder in folders)


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


def drop_segments(folder: Path) -> int:
    """Remove the KV of a store that nobody has open; its sessions and conversations stay.

    Returns:
        Bytes that were given back; 0 if somebody has it open or the system refuses.
    """
    try:
        lock = FolderLock(folder)
    except (StoreBusy, StoreUnusable):
        return 0
    freed_bytes = 0
    try:
        with contextlib.suppress(OSError):
            # The last first: what is left is then always a beginning of the address space.
            for path in sorted(folder.glob("segment-*.kv"), reverse=True):
                num_bytes = path.stat().st_size
                path.unlink()
                freed_bytes += num_bytes
    finally:
        lock.release()
    return freed_bytes


def idle_stores(folder: Path) -> list[tuple[float, Path]]:
    """Other stores under the root that have KV: (Unix time of the last use, folder)."""
    found = []
    for other in store_folders(folder.parent):
        if other == folder or not any(other.glob("segment-*.kv")):
            continue
        used = [path.stat().st_mtime for path in index_files(other / INDEX_NAME) if path.exists()]
        found.append((max(used, default=0.0), other))
    return sorted(found)
