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
from edgekv.models.config import DecoderConfig
from edgekv.models.hub import resolve
from edgekv.models.open_model import open_checkpoint
from edgekv.models.weights import parse_checkpoint

NO_STORE = StoreOptions(disk_bytes=0)  # of what a benchmark opens: never the user's own


@contextlib.contextmanager
def scratch_model(
    model: str, progress: Progress | None
) -> Iterator[tuple[pathlib.Path, pathlib.Path]]:
    """A model's file or folder, and an empty folder beside the stores that real runtimes keep.

    So that folder is on the same disk. It is gone after the block, with all that is in it, the
    `synthetic` model among that.
    """
    root = models_dir().parent
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=root) as folder:
        scratch = pathlib.Path(folder)
        if model == SYNTHETIC:
            yield write_synthetic_model(scratch / "model"), scratch
        else:
            yield resolve(model, progress=progress), scratch


def layout_of(path: pathlib.Path) -> KVLayout:
    """Shapes of the KV that the runtime will keep for the model at this path."""
    device = profile()
    config, _ = parse_checkpoint(open_checkpoint(path, device))
    return kv_layout(config, device)


def kv_layout(config: DecoderConfig, device: DeviceProfile) -> KVLayout:
    """Shapes of the KV that the runtime will keep."""
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
