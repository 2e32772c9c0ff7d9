"""What benchmarks open: a model, its KV's layout, and a folder to write KV in that is theirs."""

import contextlib
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterator

import filelock

from edgekv.bench.synthetic_model import SYNTHETIC, write_synthetic_model
from edgekv.config import StoreOptions
from edgekv.device import profile
from edgekv.kv.layout import KVLayout
from edgekv.models.cache import Progress, models_dir
from edgekv.models.hub import resolve
from edgekv.models.kv_layout import kv_layout
from edgekv.models.open_model import open_checkpoint
from edgekv.models.weights import parse_checkpoint

_PREFIX = "bench-"
_LOCK_NAME = "in-use.lock"
_OLD_S = 7 * 86_400.0  # of a folder that was never locked

NO_STORE = StoreOptions(disk_bytes=0)  # of what a benchmark opens: never the user's own


@contextlib.contextmanager
def scratch_model(
    model: str, progress: Progress | None
) -> Iterator[tuple[pathlib.Path, pathlib.Path]]:
    """A model's file or folder, and an empty folder beside the stores that real runtimes keep.

    So that folder is on the same disk. It is gone after the block, with all that is in it, the
    `synthetic` model among that; what a benchmark that was killed left goes before.
    """
    root = models_dir().parent
    root.mkdir(parents=True, exist_ok=True)
    remove_leftovers(root)
    with (
        tempfile.TemporaryDirectory(prefix=_PREFIX, dir=root) as folder,
        _lock(pathlib.Path(folder)),
    ):
        scratch = pathlib.Path(folder)
        if model == SYNTHETIC:
            yield write_synthetic_model(scratch / "model"), scratch
        else:
            yield resolve(model, progress=progress), scratch


def remove_leftovers(root: pathlib.Path) -> None:
    """Remove folders of benchmarks that were killed; those of who runs have a lock that is held."""
    for folder in root.glob(f"{_PREFIX}*"):
        if not (folder / _LOCK_NAME).exists() and not _is_old(folder):
            continue  # somebody may be about to lock it
        with contextlib.suppress(filelock.Timeout, OSError), _lock(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _lock(folder: pathlib.Path) -> filelock.BaseFileLock:
    """Raises filelock.Timeout on entering if somebody holds it; the system ends it with us."""
    return filelock.FileLock(folder / _LOCK_NAME, timeout=0)


def _is_old(folder: pathlib.Path) -> bool:
    return time.time() - folder.stat().st_mtime > _OLD_S


def layout_of(path: pathlib.Path) -> KVLayout:
    """Shapes of the KV that the runtime will keep for the model at this path."""
    device = profile()
    config, _ = parse_checkpoint(open_checkpoint(path, device))
    return kv_layout(config, device)


def drop_page_cache(folder: pathlib.Path) -> bool:
    """Drop all files below a folder from the page cache, as far as the system offers that.

    Returns:
        Whether it was tried. Where it is not (macOS), readers of the store bypass the cache anyway.
    """
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)  # only clean pages are dropped
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)
    return True
