"""Tensors of a PyTorch checkpoint, without PyTorch and without running what it pickles.

A checkpoint is a zip archive: `*/data.pkl` describes the tensors, `*/data/N` holds their bytes.
Only the few names that tensors need are resolved; anything else is refused.
"""

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from edgekv.errors import CheckpointCorrupt

_DTYPES: dict[str, "np.dtype[Any]"] = {
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "DoubleStorage": np.dtype("<f8"),
    "LongStorage": np.dtype("<i8"),
    "BFloat16Storage": np.dtype("<u2"),
}

# What a pickle that is damaged, or made to do harm, makes the reader raise.
_DAMAGED = (
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    NotImplementedError,
    TypeError,
    ValueError,
)


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint by name, floats as f32; steps and options are left out.

    Raises:
        CheckpointCorrupt: Not such a file, damaged, or it pickles something else than tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (pickled,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
            root = pickled.removesuffix("data.pkl")
            loaded = _Unpickler(archive, root, archive.read(pickled)).load()
        return {name: value for name, value in loaded.items() if isinstance(value, np.ndarray)}
    except _DAMAGED as error:
        raise CheckpointCorrupt(f"{path}: not a PyTorch checkpoint: {error}") from error


class _Unpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, root: str, pickled: bytes) -> None:
        super().__init__(io.BytesIO(pickled))
        self._archive = archive
        self._root = root

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch._utils" and name == "_rebuild_tensor_v2":
            return _rebuild
        if module == "torch" and name in _DTYPES:
            return name
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> np.ndarray:
        kind, storage, key, _place, size = pid
        if kind != "storage" or storage not in _DTYPES:
            raise pickle.UnpicklingError(f"a {storage} cannot be read")
        data = self._archive.read(f"{self._root}data/{key}")
        array: np.ndarray = np.frombuffer(data, dtype=_DTYPES[storage])
        if array.size < size:
            raise ValueError(f"storage {key} holds {array.size} numbers of {size}")
        if storage == "BFloat16Storage":
            array = (array.astype(np.uint32) << 16).view(np.float32)
        return array


def _rebuild(
    storage: np.ndarray, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> np.ndarray:
    if min((offset, *size, *stride)) < 0:
        raise ValueError("a tensor has negative sizes or strides")
    count = math.prod(size)
    reach = sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if count > storage.size or (count and offset + reach >= storage.size):
        raise ValueError("a tensor reaches beyond its storage")
    strides = tuple(step * storage.itemsize for step in stride)
    view = np.lib.stride_tricks.as_strided(storage[offset:], size, strides)
    dtype = np.float32 if storage.dtype.kind == "f" else storage.dtype
    return np.array(view, dtype=dtype)
