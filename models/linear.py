"""Matrix products with dense or quantised weights, fused by rows where that is possible."""

from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from edgekv.models.checkpoint import Dense, Quantised, Tensor, concat_rows
from edgekv.models.split import ROWS_MAX, SplitMatrix


class Linear(Protocol):
    """`x (N, in)` → `(N, out)`."""

    def __call__(self, x: mx.array) -> mx.array:
        """Multiply by the transposed weight and add the bias, if there is one."""
        ...


@dataclass(frozen=True)
class DenseLinear:
    """`weight (out, in)` in the compute dtype."""

    weight: mx.array
    bias: mx.array | None
    split: SplitMatrix | None = None

    def __call__(self, x: mx.array) -> mx.array:
        """`x (N, in)` → `(N, out)`."""
        if self.split is not None and x.shape[0] <= ROWS_MAX:
            y = self.split(x)
            return y if self.bias is None else y + self.bias
        if self.bias is None:
            return x @ self.weight.T
        return mx.addmm(self.bias, x, self.weight.T)


@dataclass(frozen=True)
class QuantisedLinear:
    """Affine-quantised weight, multiplied without being expanded."""

    weight: Quantised
    bias: mx.array | None

    def __call__(self, x: mx.array) -> mx.array:
        """`x (N, in)` → `(N, out)`."""
        w = self.weight
        y = mx.quantized_matmul(
            x,
            w.weight,
            scales=w.scales,
            biases=w.biases,
            transpose=True,
            group_size=w.group_size,
            bits=w.bits,
        )
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True)
class StackedLinear:
    """Parts of unlike quantisation, which cannot be one matrix; outputs are concatenated."""

    parts: tuple[Linear, ...]

    def __call__(self, x: mx.array) -> mx.array:
        """`x (N, in)` → `(N, out)`, the parts side by side."""
        return mx.concatenate([part(x) for part in self.parts], axis=-1)


def make_linear(
    parts: list[Tensor], biases: list[mx.array] | None, split_stream: mx.Stream | None = None
) -> Linear:
    """One product that yields the parts' outputs side by side, in as few matrices as can be."""
    if len(parts) > 1 and (fused := concat_rows(parts)) is not None:
        parts, biases = [fused], None if biases is None else [mx.concatenate(biases)]
    made = tuple(
        _one(part, None if biases is None else biases[i], split_stream)
        for i, part in enumerate(parts)
    )
    return made[0] if len(made) == 1 else StackedLinear(made)


def _one(weight: Tensor, bias: mx.array | None, split_stream: mx.Stream | None) -> Linear:
    # Evaluated now, so that the parts it was fused from are freed before the next are loaded.
    mx.eval(*weight.arrays, *(() if bias is None else (bias,)))
    if isinstance(weight, Dense):
        if split_stream is None:
            return DenseLinear(weight.array, bias)
        return DenseLinear(weight.array, bias, SplitMatrix.of(weight.array, split_stream))
    return QuantisedLinear(weight, bias)


@dataclass(frozen=True)
class Embedding:
    """The token table, which may also be the head."""

    weight: Tensor
    dtype: mx.Dtype

    def __call__(self, tokens: mx.array) -> mx.array:
        """`tokens (N,)` → `(N, hidden)`."""
        w = self.weight
        if isinstance(w, Dense):
            return w.array[tokens]
        rows = mx.dequantize(
            w.weight[tokens],
            w.scales[tokens],
            w.biases[tokens],
            group_size=w.group_size,
            bits=w.bits,
        )
        return rows.astype(self.dtype)

    def as_head(self, split_stream: mx.Stream | None = None) -> Linear:
        """The product with the transposed table: hidden states → logits."""
        return make_linear([self.weight], None, split_stream)
