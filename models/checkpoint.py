"""A checkpoint on disk, whatever its format: a configuration, and tensors loaded by name.

A loaded weight is a plain array, or codes and scales in one of MLX's modes; logical shapes are
(out, in), or (experts, out, in). Owned by whoever loads the model; all of it runs on the calling
thread.
"""

import pathlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import mlx.core as mx
import numpy as np

from edgekv.device import DeviceProfile
from edgekv.errors import FETCH_AGAIN, CheckpointCorrupt, UnsupportedModel
from edgekv.models.float_codes import code_table
from edgekv.models.parts import Axis, Places
from edgekv.models.quantisation import MODES, QuantSpec

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
    def kind(self) -> QuantSpec | None:
        """What tensors must have in common to become one."""
        return None

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape, (out, in) for a linear layer."""
        return tuple(self.array.shape)

    def like(self, arrays: Sequence[mx.array]) -> "Dense":
        """A tensor of this kind that has other arrays."""
        (array,) = arrays
        return Dense(array)

    def rows(self, order: mx.array) -> "Dense":
        """The rows `order` (an integer array over the out axis), as a new tensor."""
        return Dense(mx.take(self.array, order, axis=max(self.array.ndim - 2, 0)))

    def columns(self, order: Places) -> "Dense":
        """The same of columns."""
        return Dense(mx.take(self.array, mx.array(order), axis=-1))


@dataclass(frozen=True, eq=False)
class Quantised:
    """Codes and scales as `mx.quantized_matmul` and `mx.gather_qmm` take them."""

    weight: mx.array  # uint32 (…, out, in * bits / 32); the lowest bits of a word are the first
    scales: mx.array  # (…, out, in / group_size): floats if affine, else uint8
    biases: mx.array | None  # like `scales`; None unless affine
    group_size: int  # weights that share a scale
    bits: int  # of a code
    mode: str = "affine"  # see `quantisation.MODES`
    dtype: mx.Dtype | None = None  # of the floats that it stands for; None: that of the scales

    @property
    def arrays(self) -> tuple[mx.array, ...]:
        """What is stored, to be evaluated: weight, scales and, if affine, biases."""
        return (self.weight, self.scales, *(() if self.biases is None else (self.biases,)))

    @property
    def kind(self) -> QuantSpec:
        """What tensors must have in common to become one."""
        return QuantSpec(self.group_size, self.bits, self.mode)

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape, as if dequantised: (out, in)."""
        return (*self.weight.shape[:-1], self.weight.shape[-1] * WORD_BITS // self.bits)

    def like(self, arrays: Sequence[mx.array]) -> "Quantised":
        """A tensor of this kind that has other arrays."""
        weight, scales, *biases = arrays
        return replace(self, weight=weight, scales=scales, biases=biases[0] if biases else None)

    def rows(self, order: mx.array) -> "Quantised":
        """The rows `order` (an integer array over the out axis), as a new tensor."""
        return self.like([mx.take(array, order, axis=-2) for array in self.arrays])

    def columns(self, order: Places) -> "Tensor":
        """The same of columns; as floats where these are not whole groups."""
        groups = whole_groups(order, self.group_size)
        if groups is None:
            return self.dequantised().columns(order)
        num_groups = self.scales.shape[-1]

        def taken(array: mx.array) -> mx.array:
            grouped = array.reshape(*array.shape[:-1], num_groups, -1)
            return mx.take(grouped, mx.array(groups), axis=-2).flatten(-2)

        return self.like([taken(array) for array in self.arrays])

    def dequantised(self) -> Dense:
        """The floats that the codes stand for."""
        flat = [array.reshape(-1, array.shape[-1]) for array in self.arrays]
        ranges = row_ranges(flat[0].shape[0], self.shape[-1])
        pieces = (Dense(self._floats([a[start:end] for a in flat])) for start, end in ranges)
        (values,) = joined(pieces, flat[0].shape[0]).arrays
        return Dense(values.reshape(self.shape))

    def _floats(self, arrays: Sequence[mx.array]) -> mx.array:
        dtype = self.scales.dtype if self.dtype is None else self.dtype
        if MODES[self.mode].is_affine:
            weight, scales, biases = arrays
            return mx.dequantize(weight, scales, biases, self.group_size, self.bits).astype(dtype)
        words, factors = (np.array(array, copy=False) for array in arrays)
        return mx.array(code_table(self.mode).floats(words.view(np.uint8), factors)).astype(dtype)


Tensor = Dense | Quantised


def whole_groups(places: Places, size: int) -> Places | None:
    """The groups of so many that these places are; None where they are not whole ones."""
    groups = places[::size] // size
    whole = (groups[:, None] * size + np.arange(size)).reshape(-1)
    return groups if np.array_equal(whole, places) else None


def concat_rows(tensors: Sequence[Tensor]) -> Tensor | None:
    """Put the rows of tensors of equal width one behind the other, along the out axis.

    None where they are not of one kind: q, k and v of one layer may differ in a checkpoint with
    per-layer overrides.
    """
    if len({tensor.kind for tensor in tensors}) != 1:
        return None
    columns = zip(*(tensor.arrays for tensor in tensors), strict=True)
    axis = max(tensors[0].arrays[0].ndim - 2, 0)
    return tensors[0].like([mx.concatenate(list(arrays), axis=axis) for arrays in columns])


def stack(tensors: Iterable[Tensor], count: int, *, what: str) -> Tensor:
    """Make one tensor (experts, out, in) of `count` tensors (out, in), with `what` for errors.

    Give it a generator: then each tensor is in memory only until it has been copied to its place.

    Raises:
        UnsupportedModel: They are quantised in different ways.
    """

    def pieces() -> Iterator[Tensor]:
        kinds = set()
        for tensor in tensors:
            kinds.add(tensor.kind)
            if len(kinds) > 1:
                raise UnsupportedModel(
                    f"{what} are not quantised alike",
                    hint="use a model whose experts all have one kind of quantisation",
                )
            yield tensor.like([array[None] for array in tensor.arrays])

    return joined(pieces(), count)


PIECE_VALUES = 1 << 20  # 4 MiB as float32: in a cache, and little beside a layer


def row_ranges(num_rows: int, width: int) -> Iterator[tuple[int, int]]:
    """Half-open ranges of rows, each of which is one piece, in order."""
    step = max(1, PIECE_VALUES // max(1, width))
    for start in range(0, max(1, num_rows), step):
        yield start, min(start + step, num_rows)


def joined(pieces: Iterable[Tensor], num_rows: int) -> Tensor:
    """One tensor of `num_rows` rows (axis 0) of pieces that come in order, all of one kind.

    A piece is evaluated, copied and freed before the one after the next is made. Copying is in
    place, for nobody else knows of the arrays that are written to.
    """
    whole: list[mx.array] = []
    start = 0
    for piece in pieces:
        end = start + piece.arrays[0].shape[0]
        if end - start == num_rows:
            return piece
        if not whole:
            whole = [mx.zeros((num_rows, *a.shape[1:]), a.dtype) for a in piece.arrays]
        for i, rows in enumerate(piece.arrays):
            whole[i][start:end] = rows
        mx.eval(whole)
        start = end
    assert start == num_rows, f"pieces of {start} rows for {num_rows}"
    return piece.like(whole)


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

    @property
    def group_size(self) -> int:
        """Neighbours in a row that stay together, in any tensor: those that share a scale."""
        return 1

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
        self._check(name, shape)
        return self._load(name)

    def _check(self, name: str, shape: tuple[int, ...] | None) -> None:
        found = self.shape(name)
        if shape is not None and found != shape:
            raise CheckpointCorrupt(
                f"{self._files[name]}: tensor {name!r} has shape {found}, expected {shape}",
                hint=f"file and configuration are not of the same model: {FETCH_AGAIN}",
            )

    def take_axes(self, name: str, axes: Sequence[Axis]) -> Tensor:
        """Load what these axes take of a tensor of so many; what they leave out is not read.

        Raises:
            CheckpointCorrupt: See `take`.
            UnsupportedModel: See `take`; or it is kept quantised, and groups would be cut.
        """
        shape = tuple(axis.size for axis in axes)
        if any(axis.is_part for axis in axes):
            self._check(name, shape)
            return self._take_part(name, axes)
        tensor = self.take(name, shape=shape)
        if len(axes) > 1 and axes[-2].index is not None:
            tensor = tensor.rows(mx.array(axes[-2].index))
        return tensor if axes[-1].index is None else tensor.columns(axes[-1].index)

    def _take_part(self, name: str, axes: Sequence[Axis]) -> Tensor:
        """Read in the file's order as a matrix, and put in the order and shape of the axes."""
        *lead, last = axes
        rows = np.zeros(1, np.int64)
        for axis in lead:
            rows = (rows[:, None] * axis.size + axis.places).reshape(-1)
        size, kept = self._units(name)
        if kept and whole_groups(last.places, size) is None:
            raise UnsupportedModel(
                f"{self._files[name]}: {last.count} of {last.size} columns of tensor {name!r} are "
                f"not whole groups of {size}",
                hint="cut it for fewer ranks, or take a model of smaller groups or of floats",
            )
        ascending, units = np.sort(rows), np.unique(last.places // size)
        tensor = self._load_part(name, ascending, units)
        within = np.searchsorted(units, last.places // size) * size + last.places % size
        if not np.array_equal(within, np.arange(len(units) * size)):
            tensor = tensor.columns(within)
        if not np.array_equal(rows, ascending):
            tensor = tensor.rows(mx.array(np.searchsorted(ascending, rows)))
        shape = [axis.count for axis in lead]
        return tensor.like([array.reshape(*shape, -1) for array in tensor.arrays])

    def take_stack(self, names: Sequence[str], axes: Sequence[Axis]) -> Tensor:
        """Load matrices of one shape as one tensor (len(names), out, in), one after the other.

        Raises:
            CheckpointCorrupt, UnsupportedModel: See `take_axes` and `stack`.
        """
        what = f"{self.path}: tensors {names[0]!r} to {names[-1]!r}"
        tensors = (self.take_axes(name, axes) for name in names)
        return stack(tensors, len(names), what=what)

    @abstractmethod
    def _shape(self, name: str) -> tuple[int, ...]: ...

    @abstractmethod
    def _load(self, name: str) -> Tensor: ...

    def _units(self, name: str) -> tuple[int, bool]:
        """How many neighbours in a row are stored together, and whether they stay so."""
        raise NotImplementedError(f"{type(self).__name__} has no parts")

    def _load_part(self, name: str, rows: Places, units: Places) -> Tensor:
        """Some rows of a tensor seen as a matrix, of these some units; ascending both."""
        raise NotImplementedError(f"{type(self).__name__} has no parts")
