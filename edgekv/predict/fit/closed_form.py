"""Fits a predictor to text, without gradients: in one pass, or in as many as memory asks for.

Both models run over the text. What the predictor would see (x) and what it should say (y) goes into
sums of products, one set to fit and one, of every 16th piece of text, to choose by; the rest is
linear algebra (`solve`). Sums are f32, solving is f64. Where the sums of all targets are too large
each pass takes some of them (`passes`), runs no layer behind theirs, and is solved at its end; sums
of features alone are kept from one to the next.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import mlx.core as mx
import numpy as np

from edgekv.models.decoder import Decoder
from edgekv.predict.features import Place, Recorder, Trail, gather
from edgekv.predict.fit.checkpoint import load_partial, save_partial, with_prefix
from edgekv.predict.fit.corpus import HELD_EVERY
from edgekv.predict.fit.importance import Importance
from edgekv.predict.fit.passes import Part, Pass, layers_of, one_pass, target_width
from edgekv.predict.fit.shapes import BlockShape
from edgekv.predict.fit.solve import (
    RIDGES,
    Sums,
    fit_ridge,
    is_smaller,
    panels,
    r2_by_group,
    reduce_rank,
)
from edgekv.predict.forward import ArrayView, run
from edgekv.predict.predictor import Block, Kind, Predictor, Target

SKIPPED = 4  # first tokens of a piece: sinks, computed exactly, and unlike all others
Use = Literal["fit", "held"]
Seen = dict[Place, mx.array]
_COUNTS = ("pass_index", "num_pieces", "num_tokens")


def is_held_out(number: int) -> bool:
    """Whether a piece of text that is added, by its number from 0, is held out: to choose by."""
    return number % HELD_EVERY == HELD_EVERY - 1


class BlockSums:
    """Sums of one block's rows, to fit and to choose by; f32, on the device. See `Sums`.

    Rows are taken less by the means of the first piece (`shift.x`, `shift.y`): sums of squares in
    f32 lose the spread of numbers whose mean is a hundred times as large.
    """

    def __init__(self, arrays: dict[str, mx.array] | None = None) -> None:
        self.arrays = arrays or {}

    def add(self, x: mx.array, y: mx.array, use: Use, *, knows_features: bool = False) -> None:
        """Add rows: `x (N, F)`, `y (N, out)`; no squares of `x` if an earlier pass had them."""
        for name, array in (("shift.x", x), ("shift.y", y)):
            if name not in self.arrays:
                self.arrays[name] = mx.mean(array.astype(mx.float32), axis=0)
        x = (x - self.arrays["shift.x"]).astype(mx.float32)
        y = (y - self.arrays["shift.y"]).astype(mx.float32)
        x = mx.concatenate([x, mx.ones((x.shape[0], 1))], axis=1)
        if not knows_features:
            self._add_product(f"{use}.xx", x, x)
        self._add_product(f"{use}.xy", x, y)
        squares = self.arrays.get(f"{use}.yy", 0.0) + mx.sum(y * y, axis=0)
        self.arrays[f"{use}.yy"] = squares
        mx.eval(self.arrays)

    def _add_product(self, name: str, left: mx.array, right: mx.array) -> None:
        # In place, and a panel at a time: nothing of the size of the sums is made beside them.
        shape = (left.shape[1], right.shape[1])
        total = _host(self.arrays.setdefault(name, mx.zeros(shape)))
        for rows in panels(shape[0]):
            total[rows] += _host(left[:, rows].T @ right)

    def to_host(self, use: Use) -> Sums:
        """The same numbers, to solve."""
        return Sums(*(_host(self.arrays[f"{use}.{name}"]) for name in Sums._fields))

    def of_features(self) -> "BlockSums":
        """Those that the next pass goes on with."""
        kept = ("shift.x", "fit.xx", "held.xx")
        return BlockSums({name: self.arrays[name] for name in kept})


class BlockMap(NamedTuple):
    """A block's map of full rank, as far as passes have come: NumPy's view of MLX's arrays."""

    weight: mx.array  # `(F + 1, out)`: the bias, below, is of rows as they are summed
    mean: mx.array  # `(out,)`: the targets' own


class Fit:
    """A predictor in the making. Owned by who makes it; uses MLX on that thread."""

    def __init__(
        self,
        base: Decoder,
        aux: Decoder,
        kind: Kind,
        depth: int,
        shapes: tuple[BlockShape, ...],
        *,
        rank: int | None = None,
        passes: tuple[Pass, ...] | None = None,
    ) -> None:
        """Nothing is summed yet.

        Args:
            base: Whose KV is predicted.
            aux: From whose pass; the base itself for kind "self".
            kind: Which of the two.
            depth: Layers of it that run.
            shapes: The blocks.
            rank: Of the factors; None for full rank.
            passes: What is summed up together; all at once by default.
        """
        self.pass_index = self.num_pieces = self.num_tokens = 0  # pieces and tokens: of this pass
        self._base, self._aux, self._kind, self._depth = base, aux, kind, depth
        self._shapes, self._rank, self._passes = shapes, rank, passes or one_pass(shapes)
        self._sums: dict[int, BlockSums] = {}
        self._maps: dict[int, BlockMap] = {}
        self._blocks: list[Block] = []
        self._r2: list[float] = []  # of each layer that is solved, block by block
        self._num_layers = sum(len(layers_of(shape.targets)) for shape in shapes)
        self._wanted = frozenset(tap.place for shape in shapes for tap in shape.taps)
        targets = frozenset(target.place for shape in shapes for target in shape.targets)
        seen = self._wanted | targets if kind == "self" else targets
        self._importance = Importance(seen, SKIPPED)

    # --- text ---

    @property
    def is_done(self) -> bool:
        """Whether every pass is over."""
        return self.pass_index == len(self._passes)

    def progress(self, num_tokens: int) -> tuple[int, int]:
        """How much text is run, of how much, in all passes of `num_tokens`.

        Tokens of whole passes: one that runs half of the base's layers counts half.
        """
        depths = [self._last_layer(parts) for parts in self._passes]
        done = num_tokens * sum(depths[: self.pass_index])
        if not self.is_done:
            done += min(self.num_tokens, num_tokens) * depths[self.pass_index]
        whole = self._base.config.num_layers
        return done // whole, num_tokens * sum(depths) // whole

    def _last_layer(self, parts: Pass) -> int:
        return 1 + max(target.layer for part in parts for target in self._targets(part))

    def _targets(self, part: Part) -> tuple[Target, ...]:
        return self._shapes[part.block].targets[part.start : part.end]

    def add(self, token_ids: list[int]) -> None:
        """Add a piece of text; every pass must be given the same ones."""
        parts = self._passes[self.pass_index]
        ours, theirs = self._record(token_ids)
        use: Use = "held" if is_held_out(self.num_pieces) else "fit"
        for part in parts:
            taps, span = self._shapes[part.block].taps, (0, len(token_ids))
            x = gather(taps, ours, span, SKIPPED, Trail.start(taps))
            y = mx.concatenate([theirs[t.place][SKIPPED:] for t in self._targets(part)], 1)
            sums = self._sums.setdefault(part.block, BlockSums())
            sums.add(x, y, use, knows_features=part.start > 0)
        self.num_pieces += 1
        self.num_tokens += len(token_ids)

    def _record(self, token_ids: list[int]) -> tuple[Seen, Seen]:
        """What the predictor would see of a piece, and what it should say."""
        theirs, last = self._importance, self._last_layer(self._passes[self.pass_index])
        run(self._base, token_ids, ArrayView(), last_layer=last, taps=theirs)
        if self._kind == "self":
            return theirs.seen, theirs.seen
        ours = Recorder(self._wanted)
        run(self._aux, token_ids, ArrayView(), last_layer=self._depth, taps=ours)
        return ours.seen, theirs.seen

    # --- solving ---

    def end_pass(self, watch: Callable[[int, int], object] | None = None) -> None:
        """Solve what this pass has summed up, and begin the next one.

        `watch` is told how much is solved, of how much in all passes; what it raises leaves the
        pass at its end.
        """
        parts = self._passes[self.pass_index]
        r2: list[float] = []
        for part in parts:
            solved = len(RIDGES) * (len(self._r2) + len(r2))

            def note(done: int, solved: int = solved) -> None:
                if watch is not None:
                    watch(solved + done, len(RIDGES) * self._num_layers)

            r2 += self._solve(part, note)
        # Sums of targets are done with, and a reduced rank needs the room.
        self._sums = {index: sums.of_features() for index, sums in self._sums.items()}
        for index in (part.block for part in parts if self._is_last(part)):
            self._blocks.append(self._block(index))
            del self._sums[index], self._maps[index]
        self._r2 += r2
        self.pass_index, self.num_pieces, self.num_tokens = self.pass_index + 1, 0, 0

    def _is_last(self, part: Part) -> bool:
        return part.end == len(self._shapes[part.block].targets)

    def _solve(self, part: Part, watch: Callable[[int], object]) -> tuple[float, ...]:
        """Put a part's columns into its block's map; the share of variance explained, by layer."""
        running, shape, config = self._sums[part.block], self._shapes[part.block], self._base.config
        sums, held = running.to_host("fit"), running.to_host("held")
        if part.block not in self._maps:
            width = target_width(shape.targets, config)
            self._maps[part.block] = BlockMap(mx.zeros((len(sums.xx), width)), mx.zeros(width))
        start, end = (target_width(shape.targets[:at], config) for at in (part.start, part.end))
        weight, mean = (_host(array)[..., start:end] for array in self._maps[part.block])
        targets = self._targets(part)
        groups = [
            slice(*(target_width(targets[:at], config) for at in layer))
            for layer in layers_of(targets)
        ]
        fit_ridge(sums, held, groups, weight, watch)
        mean[:] = sums.mean_y + _host(running.arrays["shift.y"])
        return r2_by_group(held, weight, groups)

    def _block(self, index: int) -> Block:
        """A block all of whose targets are solved, through its rank."""
        shape, running = self._shapes[index], self._sums[index]
        xx, (weight, mean) = _host(running.arrays["fit.xx"]), map(_host, self._maps[index])
        sums = Sums(xx, xy=np.empty((len(xx), 0)), yy=np.empty(0))
        down, up = None, weight[:-1]
        if self._rank is not None and is_smaller(self._rank, *up.shape):
            importance = self._importance.of(self._base, shape.targets)
            down, up = reduce_rank(sums, weight, self._rank, importance)
            down, up = down.astype(np.float32), up.astype(np.float32)
        # The bias takes means to means, of rows as they are before the shift.
        means = sums.mean_x + _host(running.arrays["shift.x"])
        if down is not None:
            means = means @ down
        bias = mean - sum(means[rows] @ up[rows] for rows in panels(len(up)))
        return Block(
            taps=shape.taps,
            targets=shape.targets,
            down=None if down is None else mx.array(down),
            up=mx.array(up),
            bias=mx.array(bias.astype(np.float32)),
        )

    def predictor(self) -> tuple[Predictor, float]:
        """What the sums say, and the share of variance that it explains.

        That is the mean of its layers on held-out text, before the rank is reduced.
        """
        assert self.is_done
        return Predictor(self._kind, self._depth, tuple(self._blocks)), float(np.mean(self._r2))

    # --- checkpoints ---

    def save(self, path: Path, key: str) -> None:
        """Write all of it, so that an interrupted fit can go on; `key` names what is fitted."""
        arrays = self._importance.to_arrays()
        for index, sums in self._sums.items():
            arrays |= {f"{index}.sums.{name}": array for name, array in sums.arrays.items()}
        for index, found in self._maps.items():
            arrays |= {f"{index}.map.{name}": array for name, array in found._asdict().items()}
        arrays |= Predictor(self._kind, self._depth, tuple(self._blocks)).arrays
        arrays["r2"] = mx.array(self._r2)
        counts = {name: getattr(self, name) for name in _COUNTS}
        save_partial(path, key, {**arrays, **counts})

    def resume(self, path: Path, key: str) -> None:
        """Take in what `save` wrote, if it is there, whole, and of the same fit."""
        arrays = load_partial(path, key)
        if arrays is None:
            return
        self._importance.from_arrays(arrays)
        self.pass_index, self.num_pieces, self.num_tokens = (int(arrays[name]) for name in _COUNTS)
        self._r2 = [float(share) for share in np.array(arrays["r2"])]
        for index, shape in enumerate(self._shapes):
            if sums := with_prefix(f"{index}.sums.", arrays):
                self._sums[index] = BlockSums(sums)
            if found := with_prefix(f"{index}.map.", arrays):
                self._maps[index] = BlockMap(**found)
            if f"{index}.up" in arrays:
                down, up, bias = (arrays.get(f"{index}.{name}") for name in ("down", "up", "bias"))
                assert up is not None
                assert bias is not None
                self._blocks.append(
                    Block(taps=shape.taps, targets=shape.targets, down=down, up=up, bias=bias)
                )


def _host(array: mx.array) -> np.ndarray:
    """The same memory as NumPy sees it. What is written there MLX sees when it reads it next."""
    mx.eval(array)
    return np.asarray(memoryview(array))  # type: ignore[arg-type]  # it is a buffer
