"""What benchmarks open: a model, its KV's layout, and a folder to write KV in that is theirs."""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Iterator

import mlx.core as mx

from edgekv.bench.synthetic_model import SYNTHETIC, write_synthetic_model
from edgekv.config import StoreOptions
from edgekv.device import DeviceProfile, profile
from edgekv.kv.layout import KVLayout
from edgekv.models.cache import Progress, models_dir
from edgekv.models.checkpoint import Checkpoint
from edgekv.models.hub import resolve
from edgekv.models.open_model import open_checkpoint
from edgekv.models.weights import parse_checkpoint

NO_STORE = StoreOptions(disk_bytes=0)  # of what a benchmark opens: never the user's own


@contextlib.contextmanager
def scratch_folder() -> Iterator[pathlib.Path]:
    """An empty folder beside the stores that real runtimes keep, so on the same disk.

    It is gone after the block, with all that is in it.
    """
    root = models_dir().parent
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=root) as folder:
        yield pathlib.Path(folder)


def model_path(model: str, scratch: pathlib.Path, progress: Progress | None) -> pathlib.Path:
    """The file or folder of a model; `synthetic` is written into the scratch folder."""
    if model == SYNTHETIC:
        return write_synthetic_model(scratch / "model")
    return resolve(model, progress=progress)


def layout_of(path: pathlib.Path) -> KVLayout:
    """Shapes of the KV that the runtime will keep for the model at this path."""
    device = profile()
    return kv_layout(open_checkpoint(path, device), device)


def kv_layout(checkpoint: Checkpoint, device: DeviceProfile) -> KVLayout:
    """Shapes of the KV that the runtime will keep."""
    config, _ = parse_checkpoint(checkpoint)
    dtype: mx.Dtype = getattr(mx, device.compute_dtype)
    return KVLayout(
        heads=tuple((layer.num_kv_heads, layer.head_dim) for layer in config.layers),
        dtype_bytes=dtype.size,
        context_max=config.context_max,
    )


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
