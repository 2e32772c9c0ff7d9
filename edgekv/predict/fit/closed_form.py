"""Fits a predictor in one pass over text, without gradients.

Both models run over the text once. What the predictor would see (x) and what it should say (y) goes
into sums of products, one set to fit and one, of every 16th piece of text, to choose by; the rest
is linear algebra (`solve`). Sums are f32, solving is f64.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import mlx.core as mx
import numpy as np

from edgekv.config import GIB
from edgekv.device import profile
from edgekv.errors import ConfigError
from edgekv.models.config import DecoderConfig
from edgekv.models.decoder import Decoder
from edgekv.predict.features import Place, Recorder, Trail, gather, place_width
from edgekv.predict.fit.checkpoint import load_partial, save_partial, with_prefix
from edgekv.predict.fit.corpus import HELD_EVERY
from edgekv.predict.fit.importance import Importance
from edgekv.predict.fit.shapes import BlockShape
from edgekv.predict.fit.solve import Sums, fit_ridge, r2_by_group, reduce_rank
from edgekv.predict.forward import ArrayView, run
from edgekv.predict.predictor import Block, Kind, Predictor

SKIPPED = 4  # first tokens of a piece: sinks, computed exactly, and unlike all others
Use = Literal["fit", "held"]
Seen = dict[Place, mx.array]


def is_held_out(number: int) -> bool:
    """Whether a piece of text that is added, by its number from 0, is held out: to choose by."""
    return number % HELD_EVERY == HELD_EVERY - 1


def check_memory(shapes: tuple[BlockShape, ...], base: DecoderConfig, aux: DecoderConfig) -> None:
    """Make sure that sums and their solution fit, before minutes are spent.

    Raises:
        ConfigError: They do not.
    """
    held, solving = 0, 0
    for shape in shapes:
        num_features = sum(place_width(tap.place, aux) for tap in shape.taps)
        num_outputs = sum(place_width(target.place, base) for target in shape.targets)
        square, numbers = num_features**2, num_features * (num_features + num_outputs)
        held += 2 * 4 * numbers  # f32, to fit and to choose by
        # f64: both, the covariance and what is made of it; of the solution six are alive at a time.
        wide = num_features * num_outputs
        solving = max(solving, 8 * (2 * numbers + 3 * square + 6 * wide))
    needed, memory = held + solving, profile().memory_bytes
    if needed > memory:
        raise ConfigError(
            f"the sums of this fit take {needed / GIB:.1f} GiB; the device has {memory / GIB:.1f}",
            hint="fewer neighbours, --features mapped, or another depth",
        )


class BlockSums:
    """Sums of one block's rows, to fit and to choose by; f32, on the device. See `Sums`.

    Rows are taken less by the means of the first piece (`shift.x`, `shift.y`): sums of squares in
    f32 lose the spread of numbers whose mean is a hundred times as large.
    """

    def __init__(self, arrays: dict[str, mx.array] | None = None) -> None:
        self.arrays = arrays or {}

    def add(self, x: mx.array, y: mx.array, use: Use) -> None:
        """Add rows: `x (N, F)`, `y (N, out)`."""
        for name, array in (("shift.x", x), ("shift.y", y)):
            if name not in self.arrays:
                self.arrays[name] = mx.mean(array.astype(mx.float32), axis=0)
        x = (x - self.arrays["shift.x"]).astype(mx.float32)
        y = (y - self.arrays["shift.y"]).astype(mx.float32)
        x = mx.concatenate([x, mx.ones((x.shape[0], 1))], axis=1)
        for name, more in (("xx", x.T @ x), ("xy", x.T @ y), ("yy", mx.sum(y * y, axis=0))):
            self.arrays[f"{use}.{name}"] = self.arrays.get(f"{use}.{name}", 0.0) + more
        mx.eval(self.arrays)

    def to_host(self, use: Use) -> Sums:
        """The same in f64, to solve."""
        arrays = (self.arrays[f"{use}.{name}"] for name in Sums._fields)
        return Sums(*(np.array(array, dtype=np.float64) for array in arrays))


class Fit:
    """Sums of all blocks, so far. Owned by who makes it; uses MLX on that thread."""

    def __init__(
        self, base: Decoder, aux: Decoder, kind: Kind, depth: int, shapes: tuple[BlockShape, ...]
    ) -> None:
        """Nothing is summed yet; `aux` is the base itself for kind "self"."""
        self.num_pieces = self.num_tokens = 0
        self._base, self._aux, self._kind, self._depth = base, aux, kind, depth
        self._shapes = shapes
        self._sums = [BlockSums() for _ in shapes]
        self._wanted = frozenset(tap.place for shape in shapes for tap in shape.taps)
        targets = frozenset(target.place for shape in shapes for target in shape.targets)
        seen = self._wanted | targets if kind == "self" else targets
        self._importance = Importance(seen, SKIPPED)

    def add(self, token_ids: list[int]) -> None:
        """Add a piece of text."""
        ours, theirs = self._record(token_ids)
        use: Use = "held" if is_held_out(self.num_pieces) else "fit"
        for shape, sums in zip(self._shapes, self._sums, strict=True):
            span = (0, len(token_ids))
            x = gather(shape.taps, ours, span, SKIPPED, Trail.start(shape.taps))
            y = mx.concatenate([theirs[t.place][SKIPPED:] for t in shape.targets], 1)
            sums.add(x, y, use)
        self.num_pieces += 1
        self.num_tokens += len(token_ids)

    def _record(self, token_ids: list[int]) -> tuple[Seen, Seen]:
        """What the predictor would see of a piece, and what it should say."""
        theirs = self._importance
        run(self._base, token_ids, ArrayView(), taps=theirs)
        if self._kind == "self":
            return theirs.seen, theirs.seen
        ours = Recorder(self._wanted)
        run(self._aux, token_ids, ArrayView(), last_layer=self._depth, taps=ours)
        return ours.seen, theirs.seen

    def solve(
        self, rank: int | None, watch: Callable[[int], object] | None = None
    ) -> tuple[Predictor, float]:
        """The predictor that the sums so far say, and the share of variance that it explains.

        That is the mean of its layers on held-out text. `watch` is told how many blocks are solved.
        """
        blocks: list[Block] = []
        r2: list[float] = []
        for shape, sums in zip(self._shapes, self._sums, strict=True):
            importance = self._importance.of(self._base, shape.targets)
            block, found = _solve_block(shape, sums, self._base.config, rank, importance)
            blocks.append(block)
            r2 += found
            if watch is not None:
                watch(len(blocks))
        return Predictor(self._kind, self._depth, tuple(blocks)), float(np.mean(r2))

    # --- checkpoints ---

    def save(self, path: Path, key: str) -> None:
        """Write the sums, so that an interrupted fit can go on; `key` names what is fitted."""
        arrays = self._importance.to_arrays()
        for index, sums in enumerate(self._sums):
            arrays |= {f"{index}.{name}": array for name, array in sums.arrays.items()}
        counts = {"num_pieces": self.num_pieces, "num_tokens": self.num_tokens}
        save_partial(path, key, {**arrays, **counts})

    def resume(self, path: Path, key: str) -> None:
        """Take in what `save` wrote, if it is there, whole, and of the same fit."""
        arrays = load_partial(path, key)
        if arrays is None:
            return
        self._importance.from_arrays(arrays)
        self.num_pieces, self.num_tokens = int(arrays["num_pieces"]), int(arrays["num_tokens"])
        self._sums = [BlockSums(with_prefix(f"{i}.", arrays)) for i in range(len(self._shapes))]


def _solve_block(
    shape: BlockShape,
    running: BlockSums,
    base: DecoderConfig,
    rank: int | None,
    importance: np.ndarray,
) -> tuple[Block, tuple[float, ...]]:
    """A block, and the share of variance that it explains, layer by layer."""
    sums, held, groups = running.to_host("fit"), running.to_host("held"), _groups(shape, base)
    weight, _ = fit_ridge(sums, held, groups)
    down, up = None, weight[:-1]
    # Through a rank that is no smaller a product of two would cost more than one.
    if rank is not None and rank * (up.shape[0] + up.shape[1]) < up.size:
        down, up = reduce_rank(sums, weight, rank, importance)
        down = down.astype(np.float32)
    up = up.astype(np.float32)
    # The bias takes means to means, of rows as they are before the shift.
    mean_x = sums.mean_x + np.array(running.arrays["shift.x"])
    mean_y = sums.mean_y + np.array(running.arrays["shift.y"])
    bias = mean_y - (mean_x @ up if down is None else (mean_x @ down) @ up)
    block = Block(
        taps=shape.taps,
        targets=shape.targets,
        down=None if down is None else mx.array(down),
        up=mx.array(up),
        bias=mx.array(bias.astype(np.float32)),
    )
    return block, r2_by_group(held, weight, groups)


def _groups(shape: BlockShape, base: DecoderConfig) -> list[slice]:
    """Columns of the targets of each layer."""
    groups, end = [], 0
    for _, targets in itertools.groupby(shape.targets, lambda target: target.layer):
        start, end = end, end + sum(place_width(target.place, base) for target in targets)
        groups.append(slice(start, end))
    return groups
