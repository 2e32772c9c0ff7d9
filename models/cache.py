"""Where models are kept, and how a download says how far it is."""

import os
import pathlib
from typing import Protocol

CACHE_ENV = "EDGEKV_CACHE_DIR"


class Progress(Protocol):
    """Told now and then how far a download is; may be called from a worker thread."""

    def __call__(self, what: str, done_bytes: int, total_bytes: int | None, /) -> None:
        """`what` is being fetched: `done_bytes` of `total_bytes` (None: not known)."""
        ...


def ignore_progress(what: str, done_bytes: int, total_bytes: int | None) -> None:
    """A Progress that nobody watches."""
    del what, done_bytes, total_bytes


def models_dir() -> pathlib.Path:
    """The folder of models that edgekv itself downloads; need not exist yet."""
    root = os.environ.get(CACHE_ENV)
    if root:
        return pathlib.Path(root).expanduser() / "models"
    import platformdirs

    return platformdirs.user_cache_path("edgekv") / "models"
