"""What one of several ranks has of a model: whole heads, and channels between two products.

Tensor parallelism as in Megatron-LM (arXiv 1909.08053). Of the products into a block's attention
or MLP a rank has rows, of those out of it the same columns, so a block adds up over the ranks
twice: behind its attention, and behind its MLP. Each expert is cut as an MLP is, so ranks have
equally much to do whichever is chosen. Norms, routers, the latent of keys and values, and what
Gemma 4 tells its layers of a token are the same on all ranks.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from edgekv.errors import UnsupportedModel
from edgekv.models.config import DecoderConfig, LayerConfig

Places = npt.NDArray[np.int64]
_RANKS_MAX = 16  # that a hint speaks of


@dataclass(frozen=True, eq=False)
class Axis:
    """An axis of a tensor: its length in the file, and which places are taken, in which order."""

    size: int
    index: Places | None = None  # None: all, as they are

    @classmethod
    def of(cls, taken: range, num_units: int, width: int = 1) -> "Axis":
        """Some of so many heads or channels, each of which is `width` places."""
        if len(taken) == num_units:
            return cls(num_units * width)
        return cls(num_units * width, np.arange(taken.start * width, taken.stop * width))

    @property
    def count(self) -> int:
        """How many places are taken."""
        return self.size if self.index is None else len(self.index)

    @property
    def is_part(self) -> bool:
        """Whether some are left out."""
        return self.count < self.size

    @property
    def places(self) -> Places:
        """Those that are taken."""
        return np.arange(self.size) if self.index is None else self.index

    def through(self, order: Places | None) -> "Axis":
        """The same of a file that has place i at `order[i]`; None: that has it as it is."""
        return self if order is None else Axis(self.size, order[self.places])


def beside(*axes: Axis) -> Axis:
    """Several that one tensor has side by side."""
    size = sum(axis.size for axis in axes)
    if all(axis.index is None for axis in axes):
        return Axis(size)
    starts = np.cumsum([0, *(axis.size for axis in axes)])
    places = [axis.places + start for axis, start in zip(axes, starts, strict=False)]
    return Axis(size, np.concatenate(places))


@dataclass(frozen=True, kw_only=True)
class LayerPart:
    """The heads and channels of a layer that a rank has; what the layer lacks is empty."""

    heads: range
    kv_heads: range
    value_heads: range  # of a delta layer
    key_heads: range
    channels: range  # of a short convolution
    ffn: range
    expert_ffn: range  # of each expert
    shared_ffn: range


class _Uneven(Exception):
    """Its text says what cannot be cut."""


@dataclass(frozen=True)
class Part:
    """The part of one rank of several."""

    rank: int = 0
    size: int = 1
    group_size: int = 1  # channels that share a scale, and so stay together

    def config(self, whole: DecoderConfig, source: str) -> DecoderConfig:
        """The decoder that this rank runs: its own heads and channels, the whole's width and words.

        Raises:
            UnsupportedModel: A number of `source`, the model's name, does not divide.
        """
        if self.size == 1:
            return whole
        try:
            return self._config(whole)
        except _Uneven as uneven:
            raise UnsupportedModel(
                f"{source}: {uneven} cannot be cut for {self.size} ranks", hint=self._hint(whole)
            ) from None

    def _config(self, whole: DecoderConfig) -> DecoderConfig:
        layers = tuple(_local(layer, self.layer(layer)) for layer in whole.layers)
        return replace(whole, layers=layers)

    def _hint(self, whole: DecoderConfig) -> str:
        """Which numbers of ranks the model can be cut for."""
        able = []
        for size in range(2, _RANKS_MAX + 1):
            try:
                Part(0, size, self.group_size)._config(whole)
            except _Uneven:
                continue
            able.append(str(size))
        return f"{' or '.join(able)} ranks can" if able else f"no number up to {_RANKS_MAX} can"

    def layer(self, layer: LayerConfig) -> LayerPart:
        """What it has of a layer that can be cut."""
        heads, kv_heads = range(layer.num_heads), range(layer.num_kv_heads)
        if layer.latent is not None:  # one key for all heads, which each rank keeps
            heads = kv_heads = self._evenly(layer.num_heads, "heads")
        elif not layer.recurrent:
            counts = layer.num_heads, layer.num_kv_heads
            heads, kv_heads = self._sharing(*counts, "heads", "key-value heads")
        value_heads = key_heads = channels = expert_ffn = shared_ffn = range(0)
        if (delta := layer.delta) is not None:
            counts = delta.num_value_heads, delta.num_key_heads
            value_heads, key_heads = self._sharing(*counts, "value heads", "key heads")
        if layer.conv is not None:
            channels = self._evenly(layer.conv.num_channels, "channels of a convolution")
        if (experts := layer.experts) is not None:
            expert_ffn = self._channels(experts.ffn_size, "channels of an expert")
            shared_ffn = self._channels(experts.shared_size, "channels of a shared expert")
        return LayerPart(
            heads=heads,
            kv_heads=kv_heads,
            value_heads=value_heads,
            key_heads=key_heads,
            channels=channels,
            ffn=self._channels(layer.ffn_size, "channels of an MLP"),
            expert_ffn=expert_ffn,
            shared_ffn=shared_ffn,
        )

    def vocabulary(self, vocab_size: int) -> range:
        """Tokens whose rows of embedding and head it has; the last rank may have fewer."""
        step = -(-vocab_size // self.size)
        return range(vocab_size)[self.rank * step : (self.rank + 1) * step]

    def _evenly(self, count: int, what: str) -> range:
        if count % self.size:
            raise _Uneven(f"{count} {what}")
        each = count // self.size
        return range(self.rank * each, (self.rank + 1) * each)

    def _channels(self, count: int, what: str) -> range:
        """About evenly, in whole groups: of four ranks two have 22 of gpt-oss's 90, two 23."""
        self._evenly(count, what)
        group_size = math.gcd(count, self.group_size)
        if 0 < count < group_size * self.size:
            raise _Uneven(f"{count} {what} in groups of {group_size}")
        num_groups = count // group_size
        start, end = (rank * num_groups // self.size for rank in (self.rank, self.rank + 1))
        return range(start * group_size, end * group_size)

    def _sharing(self, count: int, num_shared: int, what: str, shared: str) -> tuple[range, range]:
        """Heads, and those that they share; of fewer of these than ranks each is on several."""
        if count % self.size or (num_shared % self.size and self.size % num_shared):
            shared = shared if num_shared > 1 else shared.removesuffix("s")
            raise _Uneven(f"{count} {what} and {num_shared} {shared}")
        first = self.rank * num_shared // self.size
        return self._evenly(count, what), range(first, first + max(1, num_shared // self.size))


def _local(layer: LayerConfig, part: LayerPart) -> LayerConfig:
    delta, conv, experts = layer.delta, layer.conv, layer.experts
    if delta is not None:
        num_keys = len(part.key_heads)
        delta = replace(delta, num_value_heads=len(part.value_heads), num_key_heads=num_keys)
    if conv is not None:
        conv = replace(conv, num_channels=len(part.channels))
    if experts is not None:
        shared_size = len(part.shared_ffn)
        experts = replace(experts, ffn_size=len(part.expert_ffn), shared_size=shared_size)
    return replace(
        layer,
        num_heads=len(part.heads),
        num_kv_heads=len(part.kv_heads),
        ffn_size=len(part.ffn),
        delta=delta,
        conv=conv,
        experts=experts,
    )
