"""Checkpoints whose weights are never read: whether a model loads is known from its headers.

The decoder is built by the code that always builds it, of tensors that MLX would compute if it were
asked to. So every name, shape and type is checked, and nothing takes time or memory.
"""

import contextlib
import math
import threading
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from edgekv.device import DeviceProfile
from edgekv.models.checkpoint import Checkpoint, Dense, Quantised, Tensor
from edgekv.models.decoder import Decoder
from edgekv.models.gguf_file import GgufTensorInfo
from edgekv.models.gguf_tensors import GgufCheckpoint
from edgekv.models.safetensors_folder import FolderCheckpoint
from edgekv.models.weights import load_decoder

_MLX_DTYPES = {
    "BOOL": mx.bool_,
    "U8": mx.uint8,
    "I8": mx.int8,
    "U16": mx.uint16,
    "I16": mx.int16,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "U32": mx.uint32,
    "I32": mx.int32,
    "F32": mx.float32,
    "U64": mx.uint64,
    "I64": mx.int64,
}


class UnreadCheckpoint(Checkpoint):
    """Tensors without contents, as the device would keep them: to be looked at, not run."""

    @abstractmethod
    def stored(self, name: str) -> tuple[str, int]:
        """How a tensor is stored, "BF16", "4-bit" or "Q4_K", and in how many bytes altogether."""


class _UnreadFolder(UnreadCheckpoint, FolderCheckpoint):
    """Made of zeros is what would be made of the arrays in the files."""

    def __init__(self, path: Path, device: DeviceProfile) -> None:
        super().__init__(path, replace(device, keeps_quantised=True))
        self._expands = not device.keeps_quantised

    def stored(self, name: str) -> tuple[str, int]:
        packed = self._packed.get(name)
        if packed is None:
            info = self._infos[name]
            return info.dtype, info.end - info.start
        spec = self._spec(packed)
        parts = (packed.codes, packed.part("scales"), packed.part("biases"))
        infos = [self._infos[part] for part in parts if part in self._infos]
        num_bytes = sum(info.end - info.start for info in infos)
        return f"{spec.bits}-bit" if spec.is_affine else spec.mode, num_bytes

    def _load(self, name: str) -> Tensor:
        tensor = _unread(super()._load(name))
        if self._expands and isinstance(tensor, Quantised):
            return tensor.dequantised()
        return tensor

    def _array(self, name: str) -> mx.array:
        info = self._infos[name]
        return _zeros(info.shape, _MLX_DTYPES[info.dtype])


class _UnreadGguf(UnreadCheckpoint, GgufCheckpoint):
    """Of a matrix the first row is loaded, and repeated: how it is kept depends on its type."""

    def __init__(self, path: Path, device: DeviceProfile) -> None:
        super().__init__(path, device)
        self._whole = self._infos
        self._infos = {name: _first_row(info) for name, info in self._whole.items()}

    def stored(self, name: str) -> tuple[str, int]:
        info = self._whole[name]
        return info.type.name, info.end - info.start

    def _shape(self, name: str) -> tuple[int, ...]:
        return self._whole[name].shape

    def _load(self, name: str) -> Tensor:
        row, rows = super()._load(name), self._whole[name].shape[:-1]
        return _unread(
            row.like([mx.broadcast_to(array, (*rows, array.shape[-1])) for array in row.arrays])
        )


def _first_row(info: GgufTensorInfo) -> GgufTensorInfo:
    rows = info.shape[:-1]
    row_bytes = (info.end - info.start) // math.prod(rows)
    shape = (*(1 for _ in rows), info.shape[-1])
    return replace(info, shape=shape, end=info.start + row_bytes)


@dataclass(frozen=True, eq=False)
class _UnreadQuantised(Quantised):
    def dequantised(self) -> Dense:
        """Zeros: floats of some modes are looked up without MLX, and would be computed."""
        return Dense(_zeros(self.shape, self.scales.dtype if self.dtype is None else self.dtype))


def _unread(tensor: Tensor) -> Tensor:
    return _UnreadQuantised(**vars(tensor)) if isinstance(tensor, Quantised) else tensor


def _zeros(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """Of one number's memory, even if somebody computes them."""
    return mx.broadcast_to(mx.array(0, dtype), shape)


def open_unread(path: Path, device: DeviceProfile) -> UnreadCheckpoint:
    """`open_checkpoint` of a path that is there, to build decoders that nobody runs."""
    return _UnreadFolder(path, device) if path.is_dir() else _UnreadGguf(path, device)


def build_unread(checkpoint: UnreadCheckpoint, device: DeviceProfile) -> Decoder:
    """`load_decoder` without weights: the same decoder, or the same error; it cannot be run."""
    with _nothing_computed():
        return load_decoder(checkpoint, replace(device, measures_few_rows=False))


_computing = threading.Lock()


@contextlib.contextmanager
def _nothing_computed() -> Iterator[None]:
    """While the block runs, `mx.eval` does nothing on this thread.

    Who builds a decoder evaluates weights as it goes, so that what they are made of is freed before
    the next are loaded. Here nothing may be computed: a large model's weights fit no memory.
    """
    with _computing:
        compute, thread_id = mx.eval, threading.get_ident()

        def skip(*arrays: object) -> None:
            if threading.get_ident() != thread_id:
                compute(*arrays)

        mx.eval = skip
        try:
            yield
        finally:
            mx.eval = compute
