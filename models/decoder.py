"""One decoder for every family: a packed forward over segments, any range of layers.

Rows of all sessions run through norms, projections and the MLP together, so a step reads the
weights once; attention runs per segment on that session's own keys and values. What a layer does
with the rows' past is its mixer: attention by heads, latent attention, or a recurrence.
"""

from dataclasses import dataclass, replace

import mlx.core as mx

from edgekv.device import DeviceProfile
from edgekv.models.batch import PackedBatch, Taps
from edgekv.models.config import DecoderConfig
from edgekv.models.feed_forward import Experts, GatedMlp, gelu_tanh
from edgekv.models.heads import HeadAttention, HeadWeights
from edgekv.models.latent import LatentAttention, LatentWeights
from edgekv.models.linear import Embedding, Linear
from edgekv.models.recurrent import ConvWeights, DeltaWeights, GatedDelta, ShortConv
from edgekv.models.rope import Rope
from edgekv.ranks.group import ALONE, Group

MixerWeights = HeadWeights | LatentWeights | DeltaWeights | ConvWeights
Mixer = HeadAttention | LatentAttention | GatedDelta | ShortConv


@dataclass(frozen=True, kw_only=True)
class PerLayerWeights:
    """What a block makes of its own view of a row's token (Gemma 3n and 4)."""

    gate: Linear
    out: Linear
    norm: mx.array


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """Tensors of one block; what the family lacks is None."""

    mixer: MixerWeights
    attn_norm: mx.array | None
    attn_post_norm: mx.array | None
    ffn_norm: mx.array | None
    ffn_post_norm: mx.array | None
    mlp: GatedMlp | None
    experts: Experts | None = None
    # Where both are there: of the outputs of the MLP and the experts, before they are added.
    beside_norms: tuple[mx.array, mx.array] | None = None
    per_layer: PerLayerWeights | None = None
    scale: mx.array | None = None  # (1,): multiplies the block's output


@dataclass(frozen=True, kw_only=True)
class PerLayerTable:
    """Where the layers' own views of a token come from: a table, and the embedding."""

    table: Embedding  # rows of all layers' numbers side by side
    projection: Linear  # from the embedding to as many
    norm: mx.array


@dataclass(frozen=True, kw_only=True)
class DecoderWeights:
    """All tensors of a decoder."""

    embedding: Embedding
    layers: tuple[LayerWeights, ...]
    final_norm: mx.array
    head: Linear
    per_layer: PerLayerTable | None = None


class Decoder:
    """A decoder's forward pass. Holds weights only; all state is in the KV views.

    Of several ranks it is one's part (`edgekv.models.parts`): all of `group` call the same methods
    in the same order, with the same rows, and `group.begin()` before each new graph.
    """

    def __init__(
        self,
        config: DecoderConfig,
        weights: DecoderWeights,
        device: DeviceProfile,
        group: Group = ALONE,
        whole: DecoderConfig | None = None,
    ) -> None:
        """`whole` is the model's configuration, of which `config` is a part; None: it is all."""
        self.config = config
        self.whole = whole or config
        self.weights = weights
        self.device = device
        self.group = group
        ropes: dict[tuple[object, int], Rope] = {}
        self._mixers = [self._mixer(index, ropes) for index in range(config.num_layers)]

    def _mixer(self, index: int, ropes: dict[tuple[object, int], Rope]) -> Mixer:
        layer, weights = self.config.layers[index], self.weights.layers[index].mixer
        match weights:
            case DeltaWeights():
                return GatedDelta(self.config, index, weights)
            case ConvWeights():
                return ShortConv(self.config, index, weights)
        rope = None
        if layer.rope is not None:
            width = layer.head_dim if layer.latent is None else layer.latent.rope_dim
            if (layer.rope, width) not in ropes:
                made = Rope(layer.rope, width, fused=self.device.fused_rope)
                ropes[layer.rope, width] = made
            rope = ropes[layer.rope, width]
        if isinstance(weights, LatentWeights):
            return LatentAttention(self.config, index, weights, rope, self.device)
        return HeadAttention(self.config, index, weights, rope, self.device, self.group)

    def without_head(self) -> "Decoder":
        """The same for passes whose logits nobody asks for: a head can be a third of a model."""

        def no_head(_rows: mx.array) -> mx.array:
            raise AssertionError("it was left out")

        weights = replace(self.weights, head=no_head)
        return Decoder(self.config, weights, self.device, self.group, self.whole)

    def embed(self, tokens: mx.array) -> mx.array:
        """`tokens (N,)` → hidden states `(N, hidden)` before the first layer."""
        hidden = self.group.all_sum(self.weights.embedding(tokens))
        if self.config.embedding_scale != 1.0:
            hidden = hidden * self.config.embedding_scale
        return hidden

    def run_layers(
        self,
        hidden: mx.array,
        batch: PackedBatch,
        *,
        first_layer: int = 0,
        last_layer: int | None = None,
        taps: Taps | None = None,
    ) -> mx.array:
        """Run layers `[first_layer, last_layer)`, by default all, and append their KV to the views.

        `(N, hidden)`, the output of layer `first_layer - 1` (or of `embed`) → `(N, hidden)`, before
        the final norm. `taps` are shown what these layers get and compute.
        """
        last = self.config.num_layers if last_layer is None else last_layer
        assert 0 <= first_layer <= last <= self.config.num_layers
        assert hidden.shape[0] == batch.num_rows
        for index in range(first_layer, last):
            if taps is not None:
                taps.see_hidden(index, hidden)
            hidden = self.feed(index, self.mix(index, hidden, batch, taps), batch)
        if taps is not None:
            taps.see_hidden(last, hidden)
        return hidden

    def attention(self, layer: int) -> HeadAttention:
        """A layer's attention, of a model whose layers all attend by heads."""
        mixer = self._mixers[layer]
        assert isinstance(mixer, HeadAttention)
        return mixer

    def logits(self, hidden: mx.array) -> mx.array:
        """Final norm and head: `(R, hidden)` → `(R, vocab)`."""
        logits = self.weights.head(self._norm(hidden, self.weights.final_norm))
        if self.config.logits_scale != 1.0:
            logits = logits * self.config.logits_scale
        softcap = self.config.logits_softcap
        return self._gathered(logits if softcap is None else softcap * mx.tanh(logits / softcap))

    def _gathered(self, logits: mx.array) -> mx.array:
        """Logits of this rank's tokens → of all; the last rank may have fewer."""
        if self.group.size == 1:
            return logits
        vocab_size = self.config.vocab_size
        short = -(-vocab_size // self.group.size) - logits.shape[1]
        by_token = mx.pad(logits.T, [(0, short), (0, 0)])
        return self.group.all_gather(by_token)[:vocab_size].T

    def _norm(self, x: mx.array, weight: mx.array | None) -> mx.array:
        return x if weight is None else mx.fast.rms_norm(x, weight, self.config.norm_eps)

    def mix(
        self, index: int, x: mx.array, batch: PackedBatch, taps: Taps | None = None
    ) -> mx.array:
        """The first half of a layer, which knows the rows' past: `(N, hidden)` → `(N, hidden)`."""
        return self.join(index, x, self._mixers[index](self.mixer_input(index, x), batch, taps))

    def join(self, index: int, x: mx.array, mixed: mx.array) -> mx.array:
        """Rows, and what heads of this rank make of them, behind the output's matrix."""
        mixed = self.group.all_sum(mixed)
        return x + self._added(mixed, self.weights.layers[index].attn_post_norm)

    def mixer_input(self, index: int, x: mx.array) -> mx.array:
        """What a layer's attention, or what stands in its place, gets of rows."""
        return self._norm(x, self.weights.layers[index].attn_norm)

    def mlp_input(self, index: int, x: mx.array) -> mx.array:
        """What a layer's MLP gets of rows that are mixed."""
        return self._norm(x, self.weights.layers[index].ffn_norm)

    def feed(self, index: int, x: mx.array, batch: PackedBatch) -> mx.array:
        """The second half of a layer, of each row alone: `(N, hidden)` → `(N, hidden)`."""
        w = self.weights.layers[index]
        x = x + self._added(self._feed_forward(w, x), w.ffn_post_norm)
        if w.per_layer is not None:
            told = gelu_tanh(w.per_layer.gate(x)) * self._per_layer(batch)[:, index]
            x = x + self._norm(w.per_layer.out(told), w.per_layer.norm)
        return x if w.scale is None else x * w.scale

    def _added(self, x: mx.array, post_norm: mx.array | None) -> mx.array:
        x = self._norm(x, post_norm)
        return x if self.config.residual_scale == 1.0 else x * self.config.residual_scale

    def _feed_forward(self, w: LayerWeights, x: mx.array) -> mx.array:
        all_sum = self.group.all_sum
        if w.mlp is None:
            assert w.experts is not None
            return all_sum(w.experts(self._norm(x, w.ffn_norm)))
        dense = all_sum(w.mlp(self._norm(x, w.ffn_norm)))
        if w.experts is None:
            return dense
        assert w.beside_norms is not None
        first, second = w.beside_norms
        return self._norm(dense, first) + self._norm(all_sum(w.experts(x)), second)

    def _per_layer(self, batch: PackedBatch) -> mx.array:
        """What the layers are told of the rows' tokens, `(N, layers, size)`; once a step."""
        table, config = self.weights.per_layer, self.config.per_layer
        assert table is not None and config is not None and batch.tokens is not None  # noqa: PT018
        if batch.per_layer is None:
            shape = (batch.num_rows, self.config.num_layers, config.size)
            told = table.table(batch.tokens).reshape(shape) * config.size**0.5
            seen = table.projection(self.embed(batch.tokens)) * self.config.hidden_size**-0.5
            batch.per_layer = (self._norm(seen.reshape(shape), table.norm) + told) * 2**-0.5
        return batch.per_layer
