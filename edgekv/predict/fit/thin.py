"""Fits thin layers to text, one behind the other, without gradients.

Pieces of text run through the base layer by layer, exactly and beside that through the thin layers
that are fitted already; each new one is the ridge that leads from there to what the exact layer
gives, so it makes up for what those before it have lost. What every piece is at one depth is kept
in memory (`kept_bytes`); nothing of it is saved: the whole takes minutes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from edgekv.config import check_int
from edgekv.models.attention import Segment
from edgekv.models.batch import PackedBatch
from edgekv.models.decoder import Decoder
from edgekv.predict.fit.closed_form import SKIPPED
from edgekv.predict.forward import ArrayView
from edgekv.predict.predictor import Predictor
from edgekv.predict.thin import ThinLayer

_PIECES = 8  # that run at once
_RIDGE = 1e-4  # of the mean square of a feature
_OUTLIER = 100.0  # squares beyond do not make a neuron more important


@dataclass(frozen=True, kw_only=True)
class ThinOptions:
    """Which thin layers are fitted."""

    attending: int = 8  # the first ones, which keep their attention
    neurons: int = 128  # of each MLP, that are computed

    def __post_init__(self) -> None:
        check_int("thin", self.attending, 0, 1 << 12)
        check_int("neurons", self.neurons, 0, 1 << 20)


@dataclass
class _Group:
    """Pieces of text of one length side by side, at some depth; `(N, hidden)` each."""

    num_pieces: int
    exact: mx.array
    thin: mx.array  # what the thin layers before made of the same

    def batch(self) -> PackedBatch:
        size = self.exact.shape[0] // self.num_pieces
        return PackedBatch([Segment(ArrayView(), size) for _ in range(self.num_pieces)])

    def sinks(self) -> mx.array:
        """Which rows are a piece's first, `(N, 1)`: exact in any prompt."""
        size = self.exact.shape[0] // self.num_pieces
        return (mx.arange(self.exact.shape[0]) % size < SKIPPED)[:, None]


def kept_bytes(base: Decoder, num_tokens: int) -> int:
    """Of a fit, at its worst: the rows of all text, exact and thin, before and behind a layer."""
    return 4 * num_tokens * base.config.hidden_size * 4


def fit_thin(
    base: Decoder,
    depth: int,
    options: ThinOptions,
    pieces: Sequence[list[int]],
    watch: Callable[[int, int], object] = lambda *_: None,
) -> Predictor:
    """A predictor of thin layers in place of the base's from `depth` on.

    Args:
        base: Whose layers.
        depth: How many stay as they are.
        options: What the others become.
        pieces: Token ids, all of one length.
        watch: Is told how many layers of how many are done.
    """
    starts = range(0, len(pieces), _PIECES)
    groups = [_begin(base, depth, pieces[start : start + _PIECES]) for start in starts]
    layers = []
    for index in range(depth, base.config.num_layers):
        attends = index < depth + options.attending
        layers.append(_fit_layer(base, index, attends, options.neurons, groups))
        mx.clear_cache()  # else it keeps buffers of every layer
        watch(index + 1, base.config.num_layers)
    return Predictor("self", depth, (), tuple(layers))


def _begin(base: Decoder, depth: int, pieces: Sequence[list[int]]) -> _Group:
    rows = base.embed(mx.array([token for piece in pieces for token in piece], dtype=mx.uint32))
    group = _Group(len(pieces), rows, rows)
    group.exact = group.thin = base.run_layers(rows, group.batch(), last_layer=depth)
    mx.eval(group.exact)
    return group


def _fit_layer(
    base: Decoder, index: int, attends: bool, num_neurons: int, groups: list[_Group]
) -> ThinLayer:
    """One layer; `groups` go behind it, exactly and thinly."""
    width = base.config.hidden_size
    for group in groups:
        batch = group.batch()
        mixed = base.mix(index, group.exact, batch)
        thin = mx.where(group.sinks(), group.exact, group.thin)
        group.thin = base.mix(index, thin, group.batch()) if attends else thin
        group.exact = base.feed(index, mixed, batch)
        mx.eval(group.exact, group.thin)
    neurons = _important(base, index, groups[0].thin, num_neurons)
    layer = ThinLayer(
        attends=attends,
        neurons=neurons,
        weight=mx.zeros((width + len(neurons), width)),
        bias=mx.zeros(width),
    ).made_for(base, index)
    layer = _solved(base, index, layer, groups)
    for group in groups:
        group.thin = layer.feed(base, index, group.thin)
        mx.eval(group.thin)
    return layer


def _important(base: Decoder, index: int, rows: mx.array, count: int) -> tuple[int, ...]:
    """The neurons whose outputs are largest on the average, ascending."""
    mlp = base.weights.layers[index].mlp
    size = base.config.layers[index].ffn_size
    assert mlp is not None
    everything = ThinLayer(
        attends=False, neurons=tuple(range(size)), weight=mx.zeros((1, 1)), bias=mx.zeros(1)
    ).made_for(base, index)
    active = everything.features(base, index, rows)[:, base.config.hidden_size :]
    down = mlp.down(mx.eye(size, dtype=rows.dtype)) - mlp.down(
        mx.zeros((1, size), dtype=rows.dtype)
    )
    weight = mx.mean(mx.minimum(active * active, _OUTLIER), axis=0) * mx.sum(down * down, axis=1)
    best = np.argsort(-np.array(weight.astype(mx.float32)), kind="stable")[:count]
    return tuple(sorted(int(neuron) for neuron in best))


def _solved(base: Decoder, index: int, layer: ThinLayer, groups: list[_Group]) -> ThinLayer:
    """The layer whose map leads nearest to the exact layer's rows."""
    num = layer.weight.shape[0] + 1
    xx, xy = np.zeros((num, num)), np.zeros((num, base.config.hidden_size))
    for group in groups:
        keep = mx.array(np.flatnonzero(~np.array(group.sinks())[:, 0]).astype(np.int32))
        x = layer.features(base, index, group.thin)[keep].astype(mx.float32)
        x = mx.concatenate([x, mx.ones((x.shape[0], 1))], axis=1)
        y = (group.exact - group.thin)[keep].astype(mx.float32)
        xx += np.array(x.T @ x)
        xy += np.array(x.T @ y)
    penalty = np.full(num, _RIDGE * float(np.mean(np.diag(xx))))
    penalty[-1] = 0.0
    solved = np.linalg.solve(xx + np.diag(penalty), xy).astype(np.float32)
    return replace(layer, weight=mx.array(solved[:-1]), bias=mx.array(solved[-1]))
