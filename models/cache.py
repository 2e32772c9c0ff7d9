"""The folders of models and KV, and how a download says how far it is."""

import contextlib
import os
import pathlib
from collections.abc import Callable

from edgekv.config import user_path
from edgekv.errors import ConfigError

CACHE_ENV = "EDGEKV_CACHE_DIR"
KV_ENV = "EDGEKV_KV_DIR"  # KV alone, perhaps on another volume

# Told now and then how far a download is, perhaps from a worker thread: what is being fetched, the
# bytes that are here, and those of all of it (None: not known).
Progress = Callable[[str, int, int | None], None]


def ignore_progress(*report: object) -> None:
    """A Progress that nobody watches."""
    del report


def models_dir() -> pathlib.Path:
    """The folder of models that edgekv itself downloads; need not exist yet."""
    return _cache_dir() / "models"


def kv_dir() -> pathlib.Path:
    """The root of the stores of KV; need not exist yet."""
    root = os.environ.get(KV_ENV)
    return user_path(root) if root else _cache_dir() / "kv"


def _cache_dir() -> pathlib.Path:
    root = os.environ.get(CACHE_ENV)
    if root:
        return user_path(root)
    import platformdirs

    # Of a user without a home it says "~/…" or raises, depending on its version.
    with contextlib.suppress(RuntimeError):
        folder = platformdirs.user_cache_path("edgekv")
        if folder.is_absolute():
            return folder
    raise ConfigError(
        "this user has no home folder, where the cache would be",
        hint=f"set {CACHE_ENV} to a folder",
    )
