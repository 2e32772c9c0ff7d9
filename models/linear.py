"""Matrix products with dense or quantised weights, fused by rows where that is possible."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from edgekv.models.checkpoint import Dense, Quantised, Tensor, concat_rows
from edgekv.models.split import PLAIN, ROWS_MAX, FewRows, SplitMatrix

Linear = Callable[[mx.array], mx.array]  # `x (N, in)` → `(N, out)`, the bias added if there is one


@dataclass(frozen=True)
class DenseLinear:
    """A weight in the compute dtype."""

    matrix: mx.array  # `(in, out)`: the transpose of `(out, in)`, as a view or in memory
    bias: mx.array | None
    split: SplitMatrix | None = None  # the same, for a few rows

    def __call__(self, x: mx.array) -> mx.array:
        """`x (N, in)` → `(N, out)`."""
        if self.split is not None and x.shape[0] <= ROWS_MAX:
            y = self.split(x)
            return y if self.bias is None else y + self.bias
        if self.bias is None:
            return x @ self.matrix
        return mx.addmm(self.bias, x, self.matrix)


@dataclass(frozen=True)
class QuantisedLinear:
    """A quantised weight, multiplied without being expanded."""

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
            mode=w.mode,
        )
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True)
class StackedLinear:
    """Parts of unlike quantisation, which cannot be one matrix; outputs are concatenated."""

    parts: tuple[Linear, ...]

    def __call__(self, x: mx.array) -> mx.array:
        """`x (N, in)` → `(N, out)`, the parts side by side."""
        return mx.concatenate([part(x) for part in self.parts], axis=-1)


def expanded(linear: Linear, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """A product's matrix `(in, out)` and bias `(out,)`, zeros where it has none, in a dtype."""
    if isinstance(linear, StackedLinear):
        matrices, biases = zip(*(expanded(part, dtype) for part in linear.parts), strict=True)
        return mx.concatenate(list(matrices), axis=1), mx.concatenate(list(biases))
    assert isinstance(linear, DenseLinear | QuantisedLinear)
    matrix = (
        linear.matrix if isinstance(linear, DenseLinear) else linear.weight.dequantised().array.T
    ).astype(dtype)
    bias = mx.zeros(matrix.shape[1]) if linear.bias is None else linear.bias
    return matrix, bias.astype(dtype)


def make_linear(
    parts: list[Tensor], biases: list[mx.array] | None, few_rows: FewRows = PLAIN
) -> Linear:
    """One product that yields the parts' outputs side by side, in as few matrices as can be."""
    if len(parts) > 1 and (fused := concat_rows(parts)) is not None:
        parts, biases = [fused], None if biases is None else [mx.concatenate(biases)]
    made = tuple(
        _one(part, None if biases is None else biases[i], few_rows) for i, part in enumerate(parts)
    )
    return made[0] if len(made) == 1 else StackedLinear(made)


def _one(weight: Tensor, bias: mx.array | None, few_rows: FewRows) -> Linear:
    # Evaluated now, so that the parts it was fused from are freed before the next are loaded.
    mx.eval(*weight.arrays, *(() if bias is None else (bias,)))
    if isinstance(weight, Dense):
        matrix = mx.contiguous(weight.array.T) if few_rows.transposed else weight.array.T
        mx.eval(matrix)
        stream = few_rows.stream
        split = None if stream is None else SplitMatrix.of(weight.array, stream)
        return DenseLinear(matrix, bias, split)
    return QuantisedLinear(weight, bias)


@dataclass(frozen=True)
class Embedding:
    """The token table, which may also be the head."""

    weight: Tensor
    tokens: range | None = None  # those that it has a row of; None: all

    def __call__(self, tokens: mx.array) -> mx.array:
        """`tokens (N,)` → `(N, hidden)`; zeros for those that it has no row of."""
        if self.tokens is None:
            return self._rows(tokens)
        places = tokens.astype(mx.int32) - self.tokens.start
        here = (places >= 0) & (places < len(self.tokens))
        return mx.where(here[:, None], self._rows(mx.where(here, places, 0)), 0)

    def _rows(self, tokens: mx.array) -> mx.array:
        w = self.weight
        if isinstance(w, Dense):
            return w.array[tokens]
        return mx.dequantize(
            w.weight[tokens],
            w.scales[tokens],
            None if w.biases is None else w.biases[tokens],
            group_size=w.group_size,
            bits=w.bits,
            mode=w.mode,
            dtype=w.dtype,
        )
