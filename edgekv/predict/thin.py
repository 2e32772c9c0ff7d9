"""Thin layers: what is left of the base's later layers for a row whose KV is predicted.

    exact rows      ─ attention ─ MLP ──────────────────────────▶   (sinks, window, decode)
                       │ ▲
    predicted rows  ─ some heads ─ some neurons, a linear map ──▶   the first thin layers
                    ─ keys, values ─ some neurons, a linear map ▶   the others: no attention

Both run layer by layer, side by side: attention reads the KV of all. What induction and recall need
is attention in the first layers behind those that are exact, and of it few heads, not an MLP's
every neuron; and what later layers' attention adds a map of the row knows nearly as well. A map
from the features of a row and of its neighbours (`predictor.Block`) cannot know what a row has
looked at, however it is trained (measured: see docs/prediction.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from edgekv.errors import UnsupportedModel
from edgekv.models.attention import Segment
from edgekv.models.batch import PackedBatch, Taps
from edgekv.models.config import DecoderConfig, prompt_macs
from edgekv.models.decoder import Decoder
from edgekv.models.feed_forward import gate
from edgekv.models.linear import expanded


class Affine(NamedTuple):
    """A matrix `(in, out)` and a bias `(out,)`."""

    matrix: mx.array
    bias: mx.array

    def __call__(self, x: mx.array) -> mx.array:
        """`(N, in)` → `(N, out)`."""
        return mx.addmm(self.bias, x, self.matrix)

    def outputs(self, chosen: mx.array | slice) -> "Affine":
        """Some of its outputs."""
        return Affine(mx.contiguous(self.matrix[:, chosen]), self.bias[chosen])


class Cut(NamedTuple):
    """What a thin layer takes of the base's own weights."""

    heads: tuple[int, ...]  # H of this rank that stay, counted from its first
    neurons: Affine  # `(hidden, 2 S)`: gate and up of those that stay
    keys_values: Affine  # `(hidden, 2 · kv_heads · head_dim)`, of this rank's heads
    queries: Affine  # `(hidden, H · head_dim)`
    out: Affine  # `(H · head_dim, hidden)`


@dataclass(frozen=True, kw_only=True)
class ThinLayer:
    """One of them. Holds arrays only."""

    heads: tuple[int, ...]  # that attend, by query head
    neurons: tuple[int, ...]  # S of the layer's MLP that are computed
    # `(hidden + S, hidden)` and `(hidden,)`: from what an MLP gets and these neurons to what the
    # layer adds behind its attention.
    weight: mx.array
    bias: mx.array
    cut: Cut | None = None  # once it is made for a base

    def made_for(self, base: Decoder, index: int) -> "ThinLayer":
        """With what it takes of the base's layer `index`; all ranks call it in the same order."""
        cut = _cut(base, index, self.heads, self.neurons)
        mx.eval(cut)
        return replace(self, cut=cut)

    def feed(self, base: Decoder, index: int, x: mx.array) -> mx.array:
        """The layer behind its attention, `(N, hidden)` → `(N, hidden)`."""
        return x + mx.addmm(self.bias, self.features(base, index, x), self.weight)

    def features(self, base: Decoder, index: int, x: mx.array) -> mx.array:
        """What its map sees of rows behind the attention, `(N, hidden + S)`."""
        assert self.cut is not None
        z, mlp = base.mlp_input(index, x), base.weights.layers[index].mlp
        assert mlp is not None
        if not self.neurons:
            return z
        active = gate(mlp.activation, self.cut.neurons(z), composed=mlp.composed)
        return mx.concatenate([z, active], axis=1)

    def write(self, base: Decoder, index: int, x: mx.array, batch: PackedBatch) -> None:
        """Rows' keys and values into their views."""
        assert self.cut is not None
        both = self.cut.keys_values(base.mixer_input(index, x))
        heads = both.reshape(x.shape[0], -1, base.config.layers[index].head_dim)
        keys, values = mx.split(heads, 2, axis=1)
        batch.write(index, base.attention(index).finish_keys(keys, batch), values)

    def mix(self, base: Decoder, index: int, x: mx.array, batch: PackedBatch) -> mx.array:
        """Rows with what the heads make of them, once the KV of all rows is written."""
        if not self.heads:
            return x
        assert self.cut is not None
        if self.cut.heads:  # of this rank
            return base.join(index, x, self.cut.out(self.attended(base, index, x, batch)))
        return base.join(index, x, mx.broadcast_to(self.cut.out.bias, x.shape))

    def attended(self, base: Decoder, index: int, x: mx.array, batch: PackedBatch) -> mx.array:
        """What this rank's heads make of rows, side by side, `(N, H · head_dim)`."""
        assert self.cut is not None
        queries = self.cut.queries(base.mixer_input(index, x))
        queries = queries.reshape(x.shape[0], len(self.cut.heads), -1)
        return base.attention(index).attend_some(queries, self.cut.heads, batch)

    def num_macs(self, base: DecoderConfig, index: int, start: int, end: int) -> float:
        """Multiplications of a prompt's rows `[start, end)`."""
        each = self.weight.size + 2 * base.hidden_size * len(self.neurons)
        some = replace(base.layers[index], num_heads=len(self.heads), ffn_size=0)
        mixed = prompt_macs(replace(base, layers=(some,)), start, end)
        return mixed + (end - start) * each


class Rows(NamedTuple):
    """Rows that enter a layer, and whose they are."""

    hidden: mx.array  # `(N, hidden)`
    segments: list[Segment]


def run_thin(
    base: Decoder,
    layers: Sequence[ThinLayer],
    first_layer: int,
    exact: Rows | None,
    predicted: Rows,
    taps: Taps | None = None,
) -> mx.array | None:
    """Run rows from `first_layer` to the end, some of them through thin layers.

    Writes the KV of all; returns the exact ones, which `taps` see, after all layers, `(N, hidden)`.
    """
    x, y = None if exact is None else exact.hidden, predicted.hidden
    of_exact = PackedBatch([] if exact is None else exact.segments)
    of_predicted = PackedBatch(predicted.segments)
    for index, layer in enumerate(layers, first_layer):
        layer.write(base, index, y, of_predicted)  # before any row reads
        if x is not None:
            x = base.feed(index, base.mix(index, x, of_exact, taps), of_exact)
        y = layer.feed(base, index, layer.mix(base, index, y, of_predicted))
    return x


def check_thinnable(base: Decoder, first_layer: int, name: str) -> None:
    """Make sure that later layers have an attention and an MLP, and nothing else.

    Raises:
        UnsupportedModel: They have more.
    """
    config = base.config
    for layer in base.weights.layers[first_layer:]:
        plain = layer.mlp is not None and layer.experts is None and layer.per_layer is None
        if not plain or layer.scale is not None or config.output_gate:
            raise UnsupportedModel(
                f"the layers of {name} cannot be made thin: they have more than an attention and "
                "a gated MLP",
                hint="fit it without --thin",
            )


def _cut(base: Decoder, index: int, heads: Sequence[int], neurons: Sequence[int]) -> Cut:
    """Columns and rows of a layer's matrices, whatever they are kept as."""
    weights, layer = base.weights.layers[index], base.config.layers[index]
    attention = base.attention(index).weights
    assert weights.mlp is not None
    dtype = base.weights.final_norm.dtype
    first = base.group.rank * layer.num_heads
    own = tuple(head - first for head in heads if 0 <= head - first < layer.num_heads)
    at = mx.array([head * layer.head_dim for head in own], dtype=mx.int32)
    at = (at[:, None] + mx.arange(layer.head_dim)).flatten()
    skip = layer.num_heads * layer.head_dim
    qkv, out = Affine(*expanded(attention.qkv, dtype)), Affine(*expanded(attention.out, dtype))
    return Cut(
        heads=own,
        neurons=_of_all_ranks(base, Affine(*expanded(weights.mlp.gate_up, dtype)), neurons),
        keys_values=qkv.outputs(slice(skip, None)),
        queries=qkv.outputs(at),
        out=Affine(mx.contiguous(out.matrix[at]), out.bias),
    )


def _of_all_ranks(base: Decoder, gate_up: Affine, neurons: Sequence[int]) -> Affine:
    """Gate and up of some neurons, whichever rank has them; ranks may have more or fewer."""
    size = gate_up.bias.shape[0] // 2
    sizes = np.array(base.group.all_gather(mx.array([size], dtype=mx.int32)))
    places = np.array(neurons, dtype=np.int64) - int(sizes[: base.group.rank].sum())
    is_own = (places >= 0) & (places < size)
    places = np.where(is_own, places, 0)
    mine = gate_up.outputs(mx.array(np.concatenate([places, size + places]).astype(np.int32)))
    mask = mx.array(np.tile(is_own, 2))
    return Affine(*(base.group.all_sum(mx.where(mask, array, 0)) for array in mine))
