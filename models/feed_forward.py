"""What a block does to each row alone: a gated MLP, or a mixture of many, of few a row."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, cast

import mlx.core as mx

from edgekv.models.checkpoint import Quantised
from edgekv.models.config import CLAMP, CLAMP_SLOPE, Activation, ExpertsConfig
from edgekv.models.exponential import sigmoid_times
from edgekv.models.linear import Linear

_MANY = 1 << 14  # fewer numbers gain nothing from our own exponential


_SQRT_8_BY_PI = 1.5957691216057308


# Each activation is its input times a sigmoid: of which `(input, argument, up)` this is.
_Gate = tuple[mx.array, mx.array, mx.array]


def _silu_gate(gate: mx.array, up: mx.array) -> _Gate:
    return gate, gate, up


def _gelu_gate(gate: mx.array, up: mx.array) -> _Gate:
    """0.5 * (1 + tanh(x)) is sigmoid(2 * x)."""
    return gate, _SQRT_8_BY_PI * (gate + 0.044715 * (gate * gate * gate)), up


def _clamped_gate(gate: mx.array, up: mx.array) -> _Gate:
    gate = mx.minimum(gate, CLAMP)
    return gate, CLAMP_SLOPE * gate, mx.clip(up, -CLAMP, CLAMP) + 1.0


_GATES: dict[Activation, Callable[[mx.array, mx.array], _Gate]] = {
    "silu": _silu_gate,
    "gelu_tanh": _gelu_gate,
    "clamped_silu": _clamped_gate,
}


def _fused(activation: Activation) -> Callable[[mx.array, mx.array], mx.array]:
    @mx.compile
    def gated(gate: mx.array, up: mx.array) -> mx.array:
        x, argument, factor = _GATES[activation](gate, up)
        return x * mx.sigmoid(argument) * factor

    return cast("Callable[[mx.array, mx.array], mx.array]", gated)


_FUSED = {activation: _fused(activation) for activation in _GATES}
_ARGUMENTS = {activation: mx.compile(parts) for activation, parts in _GATES.items()}


def gelu_tanh(x: mx.array) -> mx.array:
    """GELU by the hyperbolic tangent's approximation."""
    return _FUSED["gelu_tanh"](x, mx.array(1.0, dtype=x.dtype))


def gate(activation: Activation, gate_up: mx.array, *, composed: bool = False) -> mx.array:
    """`(…, 2F)`, gate and up side by side → `(…, F)`: activation(gate) * up.

    `composed` takes the exponential of `edgekv.models.exponential` where there are rows enough.
    """
    left, up = mx.split(gate_up, 2, axis=-1)
    if composed and gate_up.size >= _MANY:
        x, argument, factor = _ARGUMENTS[activation](left, up)
        return sigmoid_times(x, argument) * factor
    return _FUSED[activation](left, up)


@dataclass(frozen=True, kw_only=True)
class GatedMlp:
    """A gated MLP; `gate_up` yields both side by side."""

    gate_up: Linear
    down: Linear
    activation: Activation
    composed: bool = False  # see `gate`

    def __call__(self, x: mx.array) -> mx.array:
        """`(N, hidden)` → `(N, hidden)`."""
        return self.down(gate(self.activation, self.gate_up(x), composed=self.composed))


# --- mixtures of experts ---


@dataclass(frozen=True)
class ExpertMatrix:
    """One product of each expert: dense `(experts, in, out)` or quantised `(…, out, in)`."""

    weight: mx.array | Quantised
    bias: mx.array | None = None  # (experts, out)

    def __call__(self, x: mx.array, experts: mx.array, *, in_order: bool = False) -> mx.array:
        """`x (tiles, rows, in)`, each tile through its expert of `(tiles,)` → `(tiles, rows, out)`.

        `in_order`: the experts ascend.
        """
        w = self.weight
        if isinstance(w, Quantised):
            y = mx.gather_qmm(
                x,
                w.weight,
                w.scales,
                w.biases,
                rhs_indices=experts,
                transpose=True,
                group_size=w.group_size,
                bits=w.bits,
                mode=w.mode,
                sorted_indices=in_order,
            )
        else:
            y = mx.gather_mm(x, w, rhs_indices=experts, sorted_indices=in_order)
        return y if self.bias is None else y + self.bias[experts][:, None]


@dataclass(frozen=True, kw_only=True)
class Router:
    """Chooses the experts of each row, and their weights."""

    config: ExpertsConfig
    logits: Linear  # (N, hidden) → (N, num_experts)
    norm: mx.array | None = None  # of an RMSNorm before it
    norm_eps: float = 0.0
    choice_bias: mx.array | None = None  # (num_experts,) f32
    scales: mx.array | None = None  # (num_experts,)

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """`(N, hidden)` → experts and their weights, `(N, num_chosen)` both; weights in f32."""
        c = self.config
        if self.norm is not None:
            x = mx.fast.rms_norm(x, self.norm, self.norm_eps)
        logits = self.logits(x).astype(mx.float32)
        scores = mx.sigmoid(logits) if c.scores == "sigmoid" else mx.softmax(logits, axis=-1)
        wanted = scores if self.choice_bias is None else scores + self.choice_bias
        if c.num_groups > 1:
            wanted = _best_groups(wanted, c)
        chosen = mx.argpartition(-wanted, kth=c.num_chosen - 1, axis=-1)[:, : c.num_chosen]
        weights = mx.take_along_axis(scores, chosen, axis=-1)
        if c.normalised:
            weights = weights / (mx.sum(weights, axis=-1, keepdims=True) + 1e-20)
        if self.scales is not None:
            weights = weights * self.scales[chosen].astype(mx.float32)
        return chosen, weights * c.scale


def _best_groups(wanted: mx.array, config: ExpertsConfig) -> mx.array:
    """Scores without those outside of the best groups; a group is as good as its best two."""
    grouped = wanted.reshape(wanted.shape[0], config.num_groups, -1)
    worth = mx.sum(mx.topk(grouped, 2, axis=-1), axis=-1, keepdims=True)
    num_left_out = config.num_groups - config.num_groups_chosen
    if num_left_out == 0:
        return wanted
    worst = mx.argpartition(worth, kth=num_left_out - 1, axis=1)[:, :num_left_out]
    return mx.put_along_axis(grouped, worst, mx.array(-mx.inf), axis=1).reshape(wanted.shape)


@dataclass(frozen=True, kw_only=True)
class Experts:
    """A mixture of experts, with the one that all rows go through if there is one."""

    router: Router
    gate_up: ExpertMatrix
    down: ExpertMatrix
    activation: Activation
    tiled: bool  # rows of one expert are multiplied together, see `_Tiles`
    shared: GatedMlp | None = None
    shared_gate: Linear | None = None
    in_norm: mx.array | None = None  # before the experts, not before the router
    norm_eps: float = 0.0

    def __call__(self, x: mx.array) -> mx.array:
        """`(N, hidden)` → `(N, hidden)`."""
        chosen, weights = self.router(x)
        if self.in_norm is not None:
            x = mx.fast.rms_norm(x, self.in_norm, self.norm_eps)
        outputs = self._tiled(x, chosen) if self.tiled else self._by_row(x, chosen)
        mixed = mx.sum(outputs * weights[..., None].astype(x.dtype), axis=1)
        if self.shared is None:
            return mixed
        shared = self.shared(x)
        if self.shared_gate is not None:
            shared = shared * mx.sigmoid(self.shared_gate(x))
        return mixed + shared

    def _by_row(self, x: mx.array, chosen: mx.array) -> mx.array:
        """Each row through each of its experts, `(N, num_chosen, hidden)`."""
        num_rows, num_chosen = chosen.shape
        experts, in_order = chosen.reshape(-1), num_rows * num_chosen >= _MANY_TO_SORT
        rows = mx.arange(num_rows * num_chosen) // num_chosen
        back = None
        if in_order:
            order = mx.argsort(experts)
            experts, rows, back = experts[order], rows[order], mx.argsort(order)
        y = self._through(x[rows][:, None], experts, in_order=in_order)[:, 0]
        y = y if back is None else y[back]
        return y.reshape(num_rows, num_chosen, -1)

    def _tiled(self, x: mx.array, chosen: mx.array) -> mx.array:
        """The same, with rows of one expert in tiles of several."""
        tiles = _tiles(chosen, self.router.config.num_experts)
        y = self._through(x[tiles.rows], tiles.experts)
        return y.reshape(-1, y.shape[-1])[tiles.places].reshape(*chosen.shape, -1)

    def _through(self, x: mx.array, experts: mx.array, *, in_order: bool = False) -> mx.array:
        gate_up = self.gate_up(x, experts, in_order=in_order)
        gated = gate(self.activation, gate_up, composed=self.tiled)
        return self.down(gated, experts, in_order=in_order)


_MANY_TO_SORT = 64  # fewer rows gain nothing from standing in the order of their experts
_TILE_ROWS_MAX = 64


class _Tiles(NamedTuple):
    """Rows by their experts, in tiles of equal height, some places of which are filled in vain.

    Without a kernel for it each product of a few rows by a matrix is a call that reads the matrix;
    so rows that chose the same expert should come in one. How many chose which is not known when
    the graph is built, but how many tiles there are at most is.
    """

    rows: mx.array  # (tiles, height): which row stands there; the first one where none does
    experts: mx.array  # (tiles,)
    places: mx.array  # (N * num_chosen,): where each choice of each row stands


def _tiles(chosen: mx.array, num_experts: int) -> _Tiles:
    num_choices = chosen.size
    height = _tile_height(num_choices, num_experts)
    num_tiles = num_choices // height + min(num_experts, num_choices)
    mine = (chosen.reshape(-1, 1) == mx.arange(num_experts)).astype(mx.int32)
    before = mx.cumsum(mine, axis=0)  # (choices, experts): how many chose it so far
    tiles_of = (before[-1] + height - 1) // height
    ends = mx.cumsum(tiles_of)
    flat = chosen.reshape(-1)
    nth = mx.take_along_axis(before, chosen.reshape(-1, 1), axis=1)[:, 0] - 1
    places = (ends - tiles_of)[flat] * height + nth
    rows = mx.zeros((num_tiles * height,), dtype=mx.int32)
    rows[places] = mx.arange(num_choices, dtype=mx.int32) // chosen.shape[1]
    experts = mx.sum(ends[None] <= mx.arange(num_tiles)[:, None], axis=1)
    experts = mx.minimum(experts, num_experts - 1)
    return _Tiles(rows.reshape(num_tiles, height), experts, places)


def _tile_height(num_choices: int, num_experts: int) -> int:
    """A power of two, about as many as choose an expert on average; one row needs none."""
    if num_choices <= num_experts // 2:
        return 1
    height = 4
    while height < min(_TILE_ROWS_MAX, num_choices / num_experts):
        height *= 2
    return height
