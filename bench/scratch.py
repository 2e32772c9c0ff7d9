"""Where benchmarks that write KV do so, and the model they open."""

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator

from edgekv.bench.speed.ours import kv_layout
from edgekv.bench.synthetic_model import SYNTHETIC, write_synthetic_model
from edgekv.device import profile
from edgekv.kv.layout import KVLayout
from edgekv.models.cache import Progress, models_dir
from edgekv.models.hub import resolve
from edgekv.models.open_model import checkpoint_for


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
    return kv_layout(checkpoint_for(path, device), device)
