"""Which targets are summed up together: all at once, or in passes over the text that fit in memory.

Bytes are counted of what grows with features and targets; one pass is the case where all fit.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from edgekv.config import GIB
from edgekv.errors import ConfigError
from edgekv.models.config import DecoderConfig
from edgekv.predict.features import place_width
from edgekv.predict.fit.shapes import BlockShape
from edgekv.predict.fit.solve import PANEL, SPARE, is_smaller
from edgekv.predict.predictor import Target

_F32, _F64 = 4, 8


class Part(NamedTuple):
    """What is summed of one block in one pass: its targets `[start, end)`, whole layers of them."""

    block: int
    start: int
    end: int


Pass = tuple[Part, ...]  # its last block may go on in the next one; no other does


def target_width(targets: Iterable[Target], base: DecoderConfig) -> int:
    """Columns of targets side by side."""
    return sum(place_width(target.place, base) for target in targets)


def layers_of(targets: Sequence[Target]) -> list[tuple[int, int]]:
    """Targets of each layer, half-open: they share a ridge, and so a pass."""
    ends = [0]
    for _, some in itertools.groupby(targets, lambda target: target.layer):
        ends.append(ends[-1] + len(list(some)))
    return list(itertools.pairwise(ends))


class _Size(NamedTuple):
    """Of a block: features with the 1 for the bias, and columns."""

    num_features: int
    width: int  # of all targets
    layer: int  # of the widest layer's
    widths: tuple[int, ...]  # of each target


class MemoryPlan:
    """Bytes that the passes of a fit take, for one pair of models."""

    def __init__(
        self,
        shapes: tuple[BlockShape, ...],
        base: DecoderConfig,
        aux: DecoderConfig,
        rank: int | None,
    ) -> None:
        self._rank = rank
        self._shapes = shapes
        self._sizes = []
        for shape in shapes:
            num_features = 1 + sum(place_width(tap.place, aux) for tap in shape.taps)
            widths = tuple(target_width((target,), base) for target in shape.targets)
            layer = max(sum(widths[start:end]) for start, end in layers_of(shape.targets))
            self._sizes.append(_Size(num_features, sum(widths), layer, widths))

    def num_bytes(self, parts: Pass) -> int:
        """At the worst moment of a pass: its sums, what solves them, and the maps of all blocks."""
        maps = sum(_F32 * size.num_features * size.width for size in self._sizes)
        features = sum(2 * _F32 * self._sizes[part.block].num_features ** 2 for part in parts)
        targets = sum(2 * _F32 * self._columns(part) for part in parts)  # to fit, and held out
        solving = targets + max(self._solving(self._sizes[part.block]) for part in parts)
        reducing = max(self._reducing(self._sizes[part.block]) for part in parts)
        return maps + features + max(solving, reducing)

    def _columns(self, part: Part) -> int:
        size = self._sizes[part.block]
        return size.num_features * sum(size.widths[part.start : part.end])

    def _solving(self, size: _Size) -> int:
        """Of one block: the factor, and columns of a layer and panels beside it."""
        panel = min(PANEL, size.num_features)
        beside = max(2 * size.layer + 2 * panel, 4 * panel)
        return _F64 * size.num_features * (size.num_features + beside)

    def _reducing(self, size: _Size) -> int:
        """Of one block, whose targets' sums are gone: the covariance and vectors, or a copy."""
        if self._rank is None or not is_smaller(self._rank, size.num_features - 1, size.width):
            return _F32 * size.num_features * size.width
        rank, panel = min(self._rank + SPARE, size.width), min(PANEL, size.num_features)
        vectors = 2 * size.num_features * rank + size.width * (6 * rank + panel)
        return _F64 * (size.num_features**2 + vectors)

    def passes(self, num_bytes: int) -> tuple[Pass, ...]:
        """As few as take no more than that, in order of their targets.

        Filled from the last target on: what is left for the first pass are first layers, behind
        which it need not run any.

        Raises:
            ConfigError: The targets of one layer alone take more.
        """
        done: list[Pass] = []
        current: Pass = ()
        for block, shape in reversed(list(enumerate(self._shapes))):
            for start, end in reversed(layers_of(shape.targets)):
                part = Part(block, start, end)
                grown = _joined(part, current)
                if current and self.num_bytes(grown) > num_bytes:
                    done.append(current)
                    grown = (part,)
                if (needed := self.num_bytes(grown)) > num_bytes:
                    raise ConfigError(
                        f"the sums of a single layer's targets take {needed / GIB:.1f} GiB beside "
                        f"the models; there are {max(0, num_bytes) / GIB:.1f}",
                        hint="pass a larger --memory-gib, fewer --neighbours, --features mapped or "
                        "another depth",
                    )
                current = grown
        return (current, *reversed(done))


def one_pass(shapes: tuple[BlockShape, ...]) -> tuple[Pass, ...]:
    """All at once, whatever it takes."""
    return (tuple(Part(block, 0, len(shape.targets)) for block, shape in enumerate(shapes)),)


def _joined(part: Part, parts: Pass) -> Pass:
    if parts and parts[0].block == part.block:
        return (part._replace(end=parts[0].end), *parts[1:])
    return (part, *parts)
