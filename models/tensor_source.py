"""A checkpoint's tensors as the decoder wants them: found, checked for their shape, fused."""

from collections.abc import Iterable, Sequence

import mlx.core as mx
import numpy as np

from edgekv.device import DeviceProfile
from edgekv.errors import FETCH_AGAIN, CheckpointCorrupt
from edgekv.models.checkpoint import Checkpoint, Dense, Tensor
from edgekv.models.config import DecoderConfig
from edgekv.models.families.names import TensorNames
from edgekv.models.linear import Linear, make_linear
from edgekv.models.split import PLAIN, find_few_rows


class TensorSource:
    """A checkpoint's tensors as the decoder wants them, by name without ".weight"."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: DecoderConfig,
        names: TensorNames,
        profile: DeviceProfile,
    ) -> None:
        self.checkpoint, self.config, self.names = checkpoint, config, names
        self.profile = profile
        self.few_rows = find_few_rows() if profile.measures_few_rows else PLAIN
        self.arch = str(checkpoint.config.get("general.architecture", ""))

    def has(self, name: str) -> bool:
        """Whether the checkpoint has a tensor of exactly this name."""
        return name in self.checkpoint.names

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A weight of a shape that it must have; ggml drops a leading size of one."""
        whole = f"{name}.weight"
        if shape[0] == 1 and self.has(whole) and self.checkpoint.shape(whole) == shape[1:]:
            tensor = self.checkpoint.take(whole)
            return tensor.like([array[None] for array in tensor.arrays])
        return self.checkpoint.take(whole, shape=shape)

    def whole(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor by its whole name, of a shape that it must have."""
        return self.checkpoint.take(name, shape=shape)

    def vector(self, name: str, *shape: int) -> mx.array:
        """A tensor of floats by its whole name."""
        tensor = self.checkpoint.take(name, shape=shape)
        assert isinstance(tensor, Dense)
        return tensor.array

    def norm(self, name: str, size: int, *, offset: bool = True) -> mx.array:
        """An RMSNorm's weight, with the family's offset added."""
        weight = self.vector(f"{name}.weight", size)
        if offset and self.config.norm_offset:
            weight = weight + self.config.norm_offset
        mx.eval(weight)
        return weight

    def linear(
        self,
        parts: Sequence[tuple[str, int]],
        width: int,
        *,
        bias: bool = False,
        orders: Sequence[np.ndarray | None] = (),
    ) -> Linear:
        """One product of parts side by side, each a name and the number of its rows.

        `orders` says which rows of a part are taken, in which order; None: all as they are.
        """
        if self.arch:  # GGUF metadata do not say which projections have biases; the tensors do
            bias = bias or self.has(f"{parts[0][0]}.bias")
        tensors, biases = [], []
        if not (bias or self.arch):
            self._refuse_biases(name for name, _ in parts)
        for (name, count), order in zip(parts, orders or [None] * len(parts), strict=True):
            taken = self.take(name, (count, width))
            vector = self.vector(f"{name}.bias", count) if bias else None
            if order is not None:
                index = mx.array(order)
                taken = taken.rows(index)
                vector = None if vector is None else vector[index]
            tensors.append(taken)
            if vector is not None:
                biases.append(vector)
        return make_linear(tensors, biases if bias else None, self.few_rows)

    def _refuse_biases(self, names: Iterable[str]) -> None:
        """Without them a model that has them would say something else."""
        for name in names:
            if self.has(f"{name}.bias"):
                raise CheckpointCorrupt(
                    f"{self.checkpoint.path}: tensor {name + '.bias'!r} is one too many",
                    hint=f"by the configuration there is no bias: {FETCH_AGAIN}",
                )
