"""A checkpoint on disk, whatever its format: a configuration, and tensors loaded by name.

A loaded weight is a plain array or MLX's affine-quantised triple; logical shapes are (out, in).
Owned by whoever loads the model; all of it runs on the calling thread.
"""

import pathlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import mlx.core as mx

from edgekv.device import DeviceProfile
from edgekv.errors import FETCH_AGAIN, CheckpointCorrupt

WORD_BITS = 32


@dataclass(frozen=True, eq=False)
class Dense:
    """A tensor of floats in the compute dtype."""

    array: mx.array

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """What is stored, to be evaluated."""
        return (self.array,)

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape, (out, in) for a linear layer."""
        return tuple(self.array.shape)

    def rows(self, order: mx.array) -> "Dense":
        """The rows `order` (an integer array over axis 0), as a new tensor."""
        return Dense(mx.take(self.array, order, axis=max(0, self.array.ndim - 2)))


@dataclass(frozen=True, eq=False)
class Quantised:
    """`scales * codes + biases`, the form that `mx.quantized_matmul` takes."""

    weight: mx.array  # uint32 (out, in * bits / 32); the lowest bits of a word are the first code
    scales: mx.array  # (out, in / group_size), compute dtype
    biases: mx.array  # like `scales`
    group_size: int  # weights that share a scale and a bias
    bits: int  # of a code

    @property
    def arrays(self) -> tuple[mx.array, mx.array, mx.array]:
        """What is stored, to be evaluated."""
        return (self.weight, self.scales, self.biases)

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape, as if dequantised: (out, in)."""
        return (*self.weight.shape[:-1], self.weight.shape[-1] * WORD_BITS // self.bits)

    def rows(self, order: mx.array) -> "Quantised":
        """The rows `order` (an integer array over axis 0), as a new tensor."""
        weight, scales, biases = (mx.take(array, order, axis=-2) for array in self.arrays)
        return replace(self, weight=weight, scales=scales, biases=biases)

    def dequantised(self) -> Dense:
        """The floats that the codes stand for, in the dtype of the scales."""
        return Dense(mx.dequantize(*self.arrays, self.group_size, self.bits))


Tensor = Dense | Quantised


def concat_rows(tensors: Sequence[Tensor]) -> Tensor | None:
    """Stack tensors of equal width along axis 0; None where they are not of one kind.

    Quantised tensors are of one kind if group size and bits agree: q, k and v of one layer may
    differ in a checkpoint with per-layer overrides.
    """
    kinds = {(t.group_size, t.bits) if isinstance(t, Quantised) else None for t in tensors}
    if len(kinds) != 1:
        return None
    columns = zip(*(tensor.arrays for tensor in tensors), strict=True)
    parts = [
        mx.concatenate(list(arrays), axis=max(0, len(tensors[0].shape) - 2)) for arrays in columns
    ]
    if isinstance(tensors[0], Dense):
        return Dense(parts[0])
    return replace(tensors[0], weight=parts[0], scales=parts[1], biases=parts[2])


def stack(tensors: Iterable[Tensor], count: int, *, what: str) -> Tensor:
    """One tensor of several of one kind, along a new first axis."""
    found = list(tensors)
    assert len(found) == count, what
    columns = zip(*(tensor.arrays for tensor in found), strict=True)
    arrays = [mx.stack(list(column)) for column in columns]
    if isinstance(found[0], Dense):
        return Dense(arrays[0])
    return replace(found[0], weight=arrays[0], scales=arrays[1], biases=arrays[2])


class Checkpoint(ABC):
    """An opened folder or GGUF file; headers are checked, tensors are loaded as they are taken.

    `config` is `config.json`, or the GGUF metadata as plain values; `names` are those of logical
    tensors: "model.layers.0.self_attn.q_proj.weight", "blk.0.attn_q.weight".
    """

    kind: Literal["folder", "gguf"]

    def __init__(
        self,
        path: pathlib.Path,
        config: dict[str, object],
        files: dict[str, pathlib.Path],
        device: DeviceProfile,
    ) -> None:
        self.path = path
        self.config = config
        self.names = frozenset(files)
        self._files = files
        self._compute_dtype: mx.Dtype = getattr(mx, device.compute_dtype)
        self._keep_quantised = device.keeps_quantised

    def shape(self, name: str) -> tuple[int, ...]:
        """Logical (dequantised) shape of a tensor, (out, in) for a linear layer.

        Raises:
            CheckpointCorrupt: There is no such tensor, or its parts do not fit each other.
        """
        if name not in self.names:
            raise CheckpointCorrupt(
                f"{self.path}: tensor {name!r} is missing",
                hint="the checkpoint is incomplete, or not of the kind that its config says",
            )
        return self._shape(name)

    def take(self, name: str, *, shape: tuple[int, ...] | None = None) -> Tensor:
        """Load one tensor, perhaps of a logical shape that it must have.

        Raises:
            CheckpointCorrupt: It is missing, malformed or of another shape.
            UnsupportedModel: Its dtype or quantisation is not supported.
        """
        found = self.shape(name)
        if shape is not None and found != shape:
            raise CheckpointCorrupt(
                f"{self._files[name]}: tensor {name!r} has shape {found}, expected {shape}",
                hint=f"file and configuration are not of the same model: {FETCH_AGAIN}",
            )
        return self._load(name)

    @abstractmethod
    def _shape(self, name: str) -> tuple[int, ...]: ...

    @abstractmethod
    def _load(self, name: str) -> Tensor: ...
