"""A checkpoint's tensors as the decoder wants them: found, checked for their shape, fused."""

from collections.abc import Iterable, Sequence

import mlx.core as mx

from edgekv.device import DeviceProfile
from edgekv.errors import FETCH_AGAIN, CheckpointCorrupt
from edgekv.models.checkpoint import Checkpoint, Dense, Tensor
from edgekv.models.config import DecoderConfig
from edgekv.models.families.names import TensorNames
from edgekv.models.linear import Linear, make_linear
from edgekv.models.parts import Axis, Part
from edgekv.models.split import PLAIN, find_few_rows


class TensorSource:
    """A checkpoint's tensors as the decoder wants them, by name without ".weight"."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: DecoderConfig,
        names: TensorNames,
        profile: DeviceProfile,
        part: Part,
    ) -> None:
        """Of the whole `config`; what is taken of it says `part`."""
        self.checkpoint, self.config, self.names, self.part = checkpoint, config, names, part
        self.profile = profile
        self.few_rows = find_few_rows() if profile.measures_few_rows else PLAIN
        self.arch = str(checkpoint.config.get("general.architecture", ""))

    def has(self, name: str) -> bool:
        """Whether the checkpoint has a tensor of exactly this name."""
        return name in self.checkpoint.names

    def take(self, name: str, *axes: Axis) -> Tensor:
        """What these axes take of a weight; ggml drops a leading size of one."""
        full = f"{name}.weight"
        shape = tuple(axis.size for axis in axes[1:])
        if axes[0].size == 1 and self.has(full) and self.checkpoint.shape(full) == shape:
            tensor = self.checkpoint.take_axes(full, axes[1:])
            return tensor.like([array[None] for array in tensor.arrays])
        return self.checkpoint.take_axes(full, axes)

    def vector(self, name: str, *axes: Axis) -> mx.array:
        """A tensor of floats by its whole name, of which all is read."""
        tensor = self.checkpoint.take(name, shape=tuple(axis.size for axis in axes))
        assert isinstance(tensor, Dense)
        array = tensor.array
        for number, axis in enumerate(axes):
            if axis.index is not None:
                array = mx.take(array, mx.array(axis.index), axis=number)
        return array

    def norm(self, name: str, axis: Axis, *, offset: bool = True) -> mx.array:
        """An RMSNorm's weight, with the family's offset added."""
        weight = self.vector(f"{name}.weight", axis)
        if offset and self.config.norm_offset:
            weight = weight + self.config.norm_offset
        mx.eval(weight)
        return weight

    def linear(
        self, parts: Sequence[tuple[str, Axis]], width: Axis, *, bias: bool = False
    ) -> Linear:
        """One product of parts side by side, each a name and its rows."""
        if self.arch:  # GGUF metadata do not say which projections have biases; the tensors do
            bias = bias or self.has(f"{parts[0][0]}.bias")
        elif not bias:
            self._refuse_biases(name for name, _ in parts)
        tensors = [self.take(name, rows, width) for name, rows in parts]
        biases = None
        if bias and self.has_bias(width):
            biases = [self.vector(f"{name}.bias", rows) for name, rows in parts]
        return make_linear(tensors, biases, self.few_rows)

    def has_bias(self, width: Axis) -> bool:
        """Whether a product of such columns adds its bias: ranks' products add up, so one does."""
        return self.part.rank == 0 or not width.is_part

    def _refuse_biases(self, names: Iterable[str]) -> None:
        """Without them a model that has them would say something else."""
        for name in names:
            if self.has(f"{name}.bias"):
                raise CheckpointCorrupt(
                    f"{self.checkpoint.path}: tensor {name + '.bias'!r} is one too many",
                    hint=f"by the configuration there is no bias: {FETCH_AGAIN}",
                )
