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
from edgekv.errors import ConfigError
from edgekv.models.attention import Segment
from edgekv.models.batch import PackedBatch
from edgekv.models.decoder import Decoder
from edgekv.models.linear import expanded
from edgekv.predict.fit.closed_form import SKIPPED
from edgekv.predict.forward import ArrayView
from edgekv.predict.predictor import Predictor
from edgekv.predict.thin import ThinLayer

_PIECES = 8  # that run at once
_ROWS = 512  # of which all neurons are looked at, at once
_RIDGE = 1e-4  # of the mean square of a feature
_OUTLIER = 100.0  # squares beyond do not make a neuron more important


@dataclass(frozen=True, kw_only=True)
class ThinOptions:
    """Which thin layers are fitted."""

    attending: int = 8  # the first ones, which keep heads of their attention
    heads: int | None = None  # how many of each of these; None: all
    neurons: int = 128  # of each MLP, that are computed

    def __post_init__(self) -> None:
        check_int("thin", self.attending, 0, 1 << 12)
        if self.heads is not None:
            check_int("heads", self.heads, 1, 1 << 12)
            if not self.attending:
                raise ConfigError("no layer attends with --thin 0", hint="leave --heads out")
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

    def kept(self) -> mx.array:
        """Which rows are fitted to, by number."""
        return mx.array(np.flatnonzero(~np.array(self.sinks())[:, 0]).astype(np.int32))


def kept_bytes(base: Decoder, num_tokens: int) -> int:
    """Of a fit, at its worst: the rows of all text, exact and thin, before and behind a layer.

    And the widest MLP's matrices once more, with what all its neurons make of some rows.
    """
    width, ffn = base.config.hidden_size, max(layer.ffn_size for layer in base.config.layers)
    return 4 * (4 * num_tokens * width + 4 * width * ffn + 6 * _ROWS * ffn)


def check_shape(base: Decoder, depth: int, options: ThinOptions) -> None:
    """Make sure that there are as many layers, heads and neurons as are to stay.

    Raises:
        ConfigError: There are not, or heads cannot stay alone.
    """
    config = base.config
    later = config.layers[depth:]
    check_int("thin", options.attending, 0, len(later))
    check_int("neurons", options.neurons, 0, min(layer.ffn_size for layer in later))
    if options.heads is not None:
        check_int("heads", options.heads, 1, min(layer.num_heads for layer in later))
        if config.qk_norm == "whole":
            raise ConfigError(
                "this model norms queries over all heads, so none can stay alone",
                hint="leave --heads out",
            )


def fit_thin(
    base: Decoder,
    depth: int,
    options: ThinOptions,
    pieces: Sequence[list[int]],
    watch: Callable[[str, int, int], object] = lambda *_: None,
) -> Predictor:
    """A predictor of thin layers in place of the base's from `depth` on.

    Args:
        base: Whose layers.
        depth: How many stay as they are.
        options: What the others become.
        pieces: Token ids, all of one length.
        watch: Is told what is going on, and how many pieces or layers of how many are done.
    """
    groups, layers = [], []
    for start in range(0, len(pieces), _PIECES):
        watch("running text", start, len(pieces))
        groups.append(_begin(base, depth, pieces[start : start + _PIECES]))
    for index in range(depth, base.config.num_layers):
        layers.append(_fit_layer(base, index, index - depth < options.attending, options, groups))
        mx.clear_cache()  # else it keeps buffers of every layer
        watch("fitting layers", index + 1, base.config.num_layers)
    return Predictor("self", depth, (), tuple(layers))


def _begin(base: Decoder, depth: int, pieces: Sequence[list[int]]) -> _Group:
    rows = base.embed(mx.array([token for piece in pieces for token in piece], dtype=mx.uint32))
    group = _Group(len(pieces), rows, rows)
    group.exact = group.thin = base.run_layers(rows, group.batch(), last_layer=depth)
    mx.eval(group.exact)
    return group


def _fit_layer(
    base: Decoder, index: int, attends: bool, options: ThinOptions, groups: list[_Group]
) -> ThinLayer:
    """One layer; `groups` go behind it, exactly and thinly."""
    heads = _telling(base, index, groups[0], options.heads) if attends else ()
    mixer = _layer(base, index, heads)
    for group in groups:
        batch = group.batch()
        mixed = base.mix(index, group.exact, batch)
        thin, batch = mx.where(group.sinks(), group.exact, group.thin), group.batch()
        mixer.write(base, index, thin, batch)
        group.thin = mixer.mix(base, index, thin, batch)
        group.exact = base.feed(index, mixed, batch)
        mx.eval(group.exact, group.thin)
    layer = _layer(base, index, heads, _important(base, index, groups[0].thin, options.neurons))
    layer = _solved(base, index, layer, groups)
    for group in groups:
        group.thin = layer.feed(base, index, group.thin)
        mx.eval(group.thin)
    return layer


def _layer(
    base: Decoder, index: int, heads: Sequence[int], neurons: Sequence[int] = ()
) -> ThinLayer:
    """One whose map is nothing yet."""
    width = base.config.hidden_size
    weight, bias = mx.zeros((width + len(neurons), width)), mx.zeros(width)
    layer = ThinLayer(heads=tuple(heads), neurons=tuple(neurons), weight=weight, bias=bias)
    return layer.made_for(base, index)


def _telling(base: Decoder, index: int, group: _Group, count: int | None) -> tuple[int, ...]:
    """The heads that add most which a linear map of the row does not know, ascending.

    All of them where norms are taken over all.
    """
    layer = base.config.layers[index]
    if count is None or count >= layer.num_heads or base.config.qk_norm == "whole":
        return tuple(range(layer.num_heads))
    mixer, batch = _layer(base, index, range(layer.num_heads)), group.batch()
    assert mixer.cut is not None
    mixer.write(base, index, group.exact, batch)
    x = _with_ones(base.mixer_input(index, group.exact)[group.kept()])
    y = mixer.attended(base, index, group.exact, batch)[group.kept()].astype(mx.float32)
    left = y - x @ _ridge(np.array(x.T @ x), np.array(x.T @ y))
    parts = zip(
        mx.split(left, layer.num_heads, axis=1),
        mx.split(mixer.cut.out.matrix.astype(mx.float32), layer.num_heads),
        strict=True,
    )
    # One after the other: side by side they would take as much memory as the layer's rows do.
    added = [mx.sum(mx.var(rows @ out, axis=0)).item() for rows, out in parts]
    return _largest(np.array(added), count)


def _largest(weights: np.ndarray, count: int) -> tuple[int, ...]:
    best = np.argsort(-weights, kind="stable")[:count]
    return tuple(sorted(int(index) for index in best))


def _important(base: Decoder, index: int, rows: mx.array, count: int) -> tuple[int, ...]:
    """The neurons whose outputs are largest on the average, ascending."""
    mlp = base.weights.layers[index].mlp
    size = base.config.layers[index].ffn_size
    assert mlp is not None
    everything = _layer(base, index, (), range(size))
    squares = np.zeros(size)
    for start in range(0, rows.shape[0], _ROWS):
        active = everything.features(base, index, rows[start : start + _ROWS])
        active = active[:, base.config.hidden_size :].astype(mx.float32)
        squares += np.array(mx.sum(mx.minimum(active * active, _OUTLIER), axis=0))
    down = expanded(mlp.down, mx.float32)[0]
    return _largest(squares * np.array(mx.sum(down * down, axis=1)), count)


def _solved(base: Decoder, index: int, layer: ThinLayer, groups: list[_Group]) -> ThinLayer:
    """The layer whose map leads nearest to the exact layer's rows."""
    num = layer.weight.shape[0] + 1
    xx, xy = np.zeros((num, num)), np.zeros((num, base.config.hidden_size))
    for group in groups:
        keep = group.kept()
        x = _with_ones(layer.features(base, index, group.thin)[keep])
        y = (group.exact - group.thin)[keep].astype(mx.float32)
        xx += np.array(x.T @ x)
        xy += np.array(x.T @ y)
    solved = _ridge(xx, xy)
    return replace(layer, weight=solved[:-1], bias=solved[-1])


def _with_ones(x: mx.array) -> mx.array:
    return mx.concatenate([x.astype(mx.float32), mx.ones((x.shape[0], 1))], axis=1)


def _ridge(xx: np.ndarray, xy: np.ndarray) -> mx.array:
    """What leads from rows with a 1 at the end to others, by the sums of their products."""
    penalty = np.full(len(xx), _RIDGE * float(np.mean(np.diag(xx))))
    penalty[-1] = 0.0
    solved = np.linalg.solve(xx.astype(np.float64) + np.diag(penalty), xy.astype(np.float64))
    return mx.array(solved.astype(np.float32))
