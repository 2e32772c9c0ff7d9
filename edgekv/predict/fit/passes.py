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
from edgekv.predict.fit.solve import PANEL, SPARE
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
    """Of a block: features with the 1 for the bias, columns of all targets, and of each of them."""

    num_features: int
    width: int
    widths: tuple[int, ...]


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
            self._sizes.append(_Size(num_features, sum(widths), widths))

    def num_bytes(self, parts: Pass) -> int:
        """At the worst moment of a pass: its sums, what solves them, and the maps of all blocks."""
        maps = sum(_F32 * size.num_features * size.width for size in self._sizes)
        summed = sum(self._summed(part) for part in parts)
        return maps + summed + max(self._solving(part) for part in parts)

    def _summed(self, part: Part) -> int:
        size = self._sizes[part.block]
        columns = sum(size.widths[part.start : part.end])
        return 2 * _F32 * size.num_features * (size.num_features + columns)  # to fit, and held out

    def _solving(self, part: Part) -> int:
        """Of one block: the factor, a layer's columns and panels, or what makes a reduced rank."""
        size, targets = self._sizes[part.block], self._shapes[part.block].targets
        layer = max(sum(size.widths[start:end]) for start, end in layers_of(targets))
        panel = min(PANEL, size.num_features)
        ridge = 4 * size.num_features * (layer + panel)
        if self._rank is None:
            return max(_F64 * (size.num_features**2 + ridge), _F32 * size.num_features * size.width)
        rank = min(self._rank + SPARE, size.width)
        reduced = 2 * size.num_features * rank + size.width * (6 * rank + panel)
        return _F64 * (size.num_features**2 + max(ridge, reduced))

    def passes(self, num_bytes: int) -> tuple[Pass, ...]:
        """As few as take no more than that, the first layers' targets first.

        Raises:
            ConfigError: The targets of one layer alone take more.
        """
        done: list[Pass] = []
        current: Pass = ()
        for block, shape in enumerate(self._shapes):
            for start, end in layers_of(shape.targets):
                part = Part(block, start, end)
                grown = _joined(current, part)
                if current and self.num_bytes(grown) > num_bytes:
                    done.append(current)
                    grown = (part,)
                if (needed := self.num_bytes(grown)) > num_bytes:
                    raise ConfigError(
                        f"the sums of a single layer's targets take {needed / GIB:.1f} GiB beside "
                        f"the models; there are {max(0, num_bytes) / GIB:.1f}",
                        hint="--memory-gib, fewer neighbours, --features mapped, or another depth",
                    )
                current = grown
        return (*done, current)


def one_pass(shapes: tuple[BlockShape, ...]) -> tuple[Pass, ...]:
    """All at once, whatever it takes."""
    return (tuple(Part(block, 0, len(shape.targets)) for block, shape in enumerate(shapes)),)


def _joined(parts: Pass, part: Part) -> Pass:
    if parts and parts[-1].block == part.block:
        return (*parts[:-1], parts[-1]._replace(end=part.end))
    return (*parts, part)
