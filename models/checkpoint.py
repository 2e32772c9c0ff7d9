"""A checkpoint on disk, whatever its format: a configuration, and tensors loaded by name.

A loaded weight is a plain array or MLX's affine-quantised triple; logical shapes are (out, in).
Owned by whoever loads the model; all of it runs on the calling thread.
"""

import pathlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from edgekv.errors import CheckpointCorrupt

WORD_BITS = 32


@dataclass(frozen=True, eq=False)
class Dense:
    """A tensor of floats in the compute dtype."""

    array: mx.array

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape, (out, in) for a linear layer."""
        return tuple(self.array.shape)

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """What is stored, to be evaluated."""
        return (self.array,)

    def rows(self, order: mx.array) -> "Dense":
        """The rows `order` (an integer array over axis 0), as a new tensor."""
        return Dense(mx.take(self.array, order, axis=0))


@dataclass(frozen=True, eq=False)
class Quantised:
    """`scales * codes + biases`, the form that `mx.quantized_matmul` takes.

    Attributes:
        weight: uint32 (out, in * bits / 32); the lowest bits of a word hold the first code.
        scales: (out, in / group_size), compute dtype.
        biases: Like `scales`.
        group_size: Weights that share a scale and a bias.
        bits: Bits of a code.
    """

    weight: mx.array
    scales: mx.array
    biases: mx.array
    group_size: int
    bits: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape, as if dequantised: (out, in)."""
        return (*self.weight.shape[:-1], self.weight.shape[-1] * WORD_BITS // self.bits)

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """What is stored, to be evaluated."""
        return (self.weight, self.scales, self.biases)

    def rows(self, order: mx.array) -> "Quantised":
        """The rows `order` (an integer array over axis 0), as a new tensor."""
        return Quantised(
            mx.take(self.weight, order, axis=0),
            mx.take(self.scales, order, axis=0),
            mx.take(self.biases, order, axis=0),
            self.group_size,
            self.bits,
        )

    def dequantised(self) -> Dense:
        """The floats that the codes stand for, in the dtype of the scales."""
        return Dense(
            mx.dequantize(self.weight, self.scales, self.biases, self.group_size, self.bits)
        )


Tensor = Dense | Quantised


def concat_rows(tensors: Sequence[Tensor]) -> Tensor | None:
    """Stack tensors of equal width along axis 0; None where they are not of one kind.

    Quantised tensors are of one kind if group size and bits agree: q, k and v of one layer may
    differ in a checkpoint with per-layer overrides.
    """
    assert tensors
    dense = [tensor for tensor in tensors if isinstance(tensor, Dense)]
    if len(dense) == len(tensors):
        return Dense(mx.concatenate([tensor.array for tensor in dense]))
    quantised = [tensor for tensor in tensors if isinstance(tensor, Quantised)]
    if len(quantised) != len(tensors):
        return None
    first = quantised[0]
    if any((t.group_size, t.bits) != (first.group_size, first.bits) for t in quantised):
        return None
    return Quantised(
        mx.concatenate([tensor.weight for tensor in quantised]),
        mx.concatenate([tensor.scales for tensor in quantised]),
        mx.concatenate([tensor.biases for tensor in quantised]),
        first.group_size,
        first.bits,
    )


class Checkpoint(ABC):
    """An opened model; headers are checked, tensors are loaded as they are taken.

    Attributes:
        path: The folder or the GGUF file.
        kind: Its format.
        config: `config.json`, or the GGUF metadata as plain values.
        names: Logical tensors: "model.layers.0.self_attn.q_proj.weight", "blk.0.attn_q.weight".
    """

    kind: Literal["folder", "gguf"]

    def __init__(
        self, path: pathlib.Path, config: dict[str, object], names: frozenset[str]
    ) -> None:
        self.path = path
        self.config = config
        self.names = names

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
        """Load one tensor.

        Args:
            name: One of `names`.
            shape: The logical shape that it must have.

        Raises:
            CheckpointCorrupt: It is missing, malformed or of another shape.
            UnsupportedModel: Its dtype or quantisation is not supported.
        """
        found = self.shape(name)
        if shape is not None and found != shape:
            raise CheckpointCorrupt(
                f"{self._file_of(name)}: tensor {name!r} has shape {found}, expected {shape}",
                hint="the file and the configuration are not of the same model; fetch both again",
            )
        return self._load(name)

    # --- what a format says; names are among `names` ---

    @abstractmethod
    def _shape(self, name: str) -> tuple[int, ...]: ...

    @abstractmethod
    def _file_of(self, name: str) -> pathlib.Path: ...

    @abstractmethod
    def _load(self, name: str) -> Tensor: ...
