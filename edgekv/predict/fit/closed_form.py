"""Fits a predictor in one pass over text, without gradients.

Both models run over the text once. What the predictor would see (x) and what it should say (y) goes
into sums of products, one set to fit and one, of every 16th piece of text, to choose by; the rest
is linear algebra (`solve`). Sums are f32, solving is f64.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np

from edgekv.config import GIB
from edgekv.device import profile
from edgekv.errors import ConfigError
from edgekv.models.config import DecoderConfig
from edgekv.models.decoder import Decoder
from edgekv.predict.features import Both, Place, Recorder, Trail, gather, place_width
from edgekv.predict.fit.checkpoint import load_partial, save_partial
from edgekv.predict.fit.corpus import HELD_EVERY
from edgekv.predict.fit.importance import Importance
from edgekv.predict.fit.running import RunningSums, Shift, shifted
from edgekv.predict.fit.shapes import BlockShape
from edgekv.predict.fit.solve import Fitted, Sums, fit_ridge, reduce_rank
from edgekv.predict.forward import ArrayView, run
from edgekv.predict.predictor import Block, Kind, Predictor

SKIPPED = 4  # first tokens of a piece: sinks, computed exactly, and unlike all others
Watch = Callable[[int], None]  # blocks solved


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


@dataclass
class Fit:
    """Sums of all blocks, so far. Owned by who makes it; uses MLX on that thread.

    Args:
        base: Whose KV is predicted.
        aux: From whose pass; `base` for kind "self".
        kind: See `Predictor`.
        depth: See `Predictor`.
        shapes: The blocks.
    """

    base: Decoder
    aux: Decoder
    kind: Kind
    depth: int
    shapes: tuple[BlockShape, ...]
    num_pieces: int = 0
    num_tokens: int = 0
    _sums: list[tuple[RunningSums, RunningSums]] = field(default_factory=list)
    _shifts: list[Shift] = field(default_factory=list)
    _importance: Importance = field(default_factory=lambda: Importance(SKIPPED))

    def add(self, token_ids: list[int]) -> None:
        """One more piece of text."""
        seen = self._record(token_ids)
        held = is_held_out(self.num_pieces)
        for index, shape in enumerate(self.shapes):
            span = (0, len(token_ids))
            x = gather(shape.taps, seen.aux, span, SKIPPED, Trail.start(shape.taps))
            y = mx.concatenate([seen.base[t.place][SKIPPED:] for t in shape.targets], 1)
            if index == len(self._sums):
                sizes = (x.shape[1], y.shape[1])
                self._sums.append((RunningSums.empty(*sizes), RunningSums.empty(*sizes)))
                self._shifts.append(Shift.of(x, y))
            shift = self._shifts[index]
            self._sums[index][held].add(x - shift.x, y - shift.y)
        self.num_pieces += 1
        self.num_tokens += len(token_ids)

    def _record(self, token_ids: list[int]) -> "_Seen":
        wanted = frozenset(tap.place for shape in self.shapes for tap in shape.taps)
        targets = frozenset(t.place for shape in self.shapes for t in shape.targets)
        theirs = Recorder(wanted | targets if self.kind == "self" else targets)
        run(self.base, token_ids, ArrayView(), taps=Both(theirs, self._importance))
        ours = theirs
        if self.kind == "aux":
            ours = Recorder(wanted)
            run(self.aux, token_ids, ArrayView(), last_layer=self.depth, taps=ours)
        return _Seen(aux=ours.seen, base=theirs.seen)

    def solve(self, rank: int | None, watch: Watch | None = None) -> "Solved":
        """The predictor that the sums so far say."""
        blocks: list[Block] = []
        r2: list[float] = []
        for number, shape in enumerate(self.shapes):
            (sums, held), shift = self._sums[number], self._shifts[number]
            importance = self._importance.of(self.base, shape.targets)
            block, fitted = _solve_block(
                shape, sums.to_host(), held.to_host(), self.base.config, rank, importance
            )
            block = shifted(block, shift)
            blocks.append(block)
            r2 += fitted.r2
            if watch is not None:
                watch(number + 1)
        predictor = Predictor(self.kind, self.depth, tuple(blocks))
        return Solved(predictor=predictor, r2_mean=float(np.mean(r2)))

    # --- checkpoints ---

    def save(self, path: Path, key: str) -> None:
        """Write the sums, so that an interrupted fit can go on; `key` names what is fitted."""
        arrays = self._importance.to_arrays()
        for index, pair in enumerate(self._sums):
            for name, sums in zip(("fit", "held"), pair, strict=True):
                arrays |= {f"{index}.{name}.{k}": getattr(sums, k) for k in ("xx", "xy", "yy")}
            shift = self._shifts[index]
            arrays |= {f"{index}.shift.x": shift.x, f"{index}.shift.y": shift.y}
        save_partial(path, key, arrays, num_pieces=self.num_pieces, num_tokens=self.num_tokens)

    def resume(self, path: Path, key: str) -> None:
        """Take in what `save` wrote, if it is there, whole, and of the same fit."""
        found = load_partial(path, key)
        if found is None:
            return
        arrays, metadata = found
        self._importance.from_arrays(arrays)
        self.num_pieces = int(metadata["num_pieces"])
        self.num_tokens = int(metadata["num_tokens"])

        def sums(index: int, name: str) -> RunningSums:
            return RunningSums(*(arrays[f"{index}.{name}.{key}"] for key in ("xx", "xy", "yy")))

        blocks = range(len(self.shapes))
        self._sums = [(sums(i, "fit"), sums(i, "held")) for i in blocks]
        self._shifts = [Shift(arrays[f"{i}.shift.x"], arrays[f"{i}.shift.y"]) for i in blocks]


@dataclass(frozen=True, kw_only=True)
class Solved:
    """A predictor, and the mean share of variance that it explains on held-out text."""

    predictor: Predictor
    r2_mean: float


@dataclass(frozen=True, kw_only=True)
class _Seen:
    aux: dict[Place, mx.array]
    base: dict[Place, mx.array]


def _solve_block(
    shape: BlockShape,
    sums: Sums,
    held: Sums,
    base: DecoderConfig,
    rank: int | None,
    importance: np.ndarray,
) -> tuple[Block, Fitted]:
    groups = _groups(shape, base)
    fitted = fit_ridge(sums, held, groups)
    weight = fitted.weight
    down = None
    up = weight[:-1]
    # Through a rank that is no smaller a product of two would cost more than one.
    if rank is not None and rank * (up.shape[0] + up.shape[1]) < up.size:
        down, up = reduce_rank(sums, weight, rank, importance)
    mean_x, mean_y = sums.xx[-1, :-1] / sums.num_rows, sums.xy[-1] / sums.num_rows
    slope_mean = mean_x @ up if down is None else (mean_x @ down) @ up
    block = Block(
        taps=shape.taps,
        targets=shape.targets,
        down=None if down is None else _to_mx(down),
        up=_to_mx(up),
        bias=_to_mx(mean_y - slope_mean),
    )
    return block, fitted


def _groups(shape: BlockShape, base: DecoderConfig) -> list[slice]:
    """Columns of the targets of each layer."""
    groups: list[slice] = []
    at, layer = 0, None
    for target in shape.targets:
        width = place_width(target.place, base)
        if target.layer == layer:
            groups[-1] = slice(groups[-1].start, at + width)
        else:
            groups.append(slice(at, at + width))
        at, layer = at + width, target.layer
    return groups


def _to_mx(array: np.ndarray) -> mx.array:
    return mx.array(np.ascontiguousarray(array, dtype=np.float32))
