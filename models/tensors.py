"""A loaded weight: a plain array, or MLX's affine-quantised triple. Logical shapes are (out, in).

Owned by whoever loads the model; all of it runs on the calling thread.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

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
