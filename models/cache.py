"""The folders of models and KV, and how a download says how far it is."""

import os
import pathlib
from typing import Protocol

from edgekv.config import user_path

CACHE_ENV = "EDGEKV_CACHE_DIR"
KV_ENV = "EDGEKV_KV_DIR"  # KV alone, perhaps on another volume


class Progress(Protocol):
    """A listener, told now and then how far a download is; may be called from a worker thread."""

    def __call__(self, what: str, done_bytes: int, total_bytes: int | None, /) -> None:
        """`what` is being fetched: `done_bytes` of `total_bytes` (None: not known)."""
        ...


def ignore_progress(what: str, done_bytes: int, total_bytes: int | None) -> None:
    """A Progress that nobody watches."""
    del what, done_bytes, total_bytes


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

    return platformdirs.user_cache_path("edgekv")
