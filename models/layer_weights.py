"""The tensors of one block, found under their names, checked, put in order and fused."""

import mlx.core as mx
import numpy as np

from edgekv.errors import CheckpointCorrupt
from edgekv.models.checkpoint import Dense, Quantised, Tensor, concat_rows
from edgekv.models.config import (
    ConvConfig,
    DeltaConfig,
    ExpertsConfig,
    LatentConfig,
    LayerConfig,
)
from edgekv.models.decoder import LayerWeights, MixerWeights, PerLayerWeights
from edgekv.models.feed_forward import ExpertMatrix, Experts, GatedMlp, Router
from edgekv.models.gguf_config import row_order
from edgekv.models.heads import HeadWeights
from edgekv.models.latent import LatentWeights
from edgekv.models.linear import Linear, make_linear
from edgekv.models.parts import Axis, Places, beside
from edgekv.models.recurrent import ConvWeights, DeltaWeights
from edgekv.models.tensor_source import TensorSource


class LayerBuilder:
    """Builds one block's weights: those that a rank has of it."""

    def __init__(self, source: TensorSource, index: int) -> None:
        self._source, self._config, self._names = source, source.config, source.names
        self._layer = source.config.layers[index]
        self._part = source.part.layer(self._layer)
        self._at = source.names.block.format(index)
        self._hidden = Axis(source.config.hidden_size)

    def build(self) -> LayerWeights:
        """All of the block's weights, evaluated."""
        c, names = self._config, self._names
        gated = self._layer.experts is not None and self._layer.experts.beside
        return LayerWeights(
            mixer=self._mixer(),
            attn_norm=self._norm(names.attn_norm) if c.pre_norms else None,
            attn_post_norm=self._norm(names.attn_post_norm) if c.post_norms else None,
            ffn_norm=self._norm(names.ffn_norm) if c.pre_norms else None,
            ffn_post_norm=self._norm(names.ffn_post_norm) if c.post_norms else None,
            mlp=self._mlp(names.gate_up, names.down, self._ffn, bias=c.mlp_bias),
            experts=self._experts(),
            beside_norms=self._beside_norms() if gated else None,
            per_layer=self._per_layer(),
            scale=self._scale(),
        )

    @property
    def _ffn(self) -> Axis:
        return Axis.of(self._part.ffn, self._layer.ffn_size)

    def _norm(self, name: str, axis: Axis | None = None) -> mx.array:
        return self._source.norm(self._at + name, axis or self._hidden)

    def _mixer(self) -> MixerWeights:
        layer = self._layer
        if layer.delta is not None:
            return self._delta(layer.delta)
        if layer.conv is not None:
            return self._conv(layer.conv)
        if layer.latent is not None:
            return self._latent(layer, layer.latent)
        return self._heads(layer)

    # --- attention by heads ---

    def _heads(self, layer: LayerConfig) -> HeadWeights:
        c, names = self._config, self._names
        q = Axis.of(self._part.heads, layer.num_heads, layer.head_dim)
        kv = Axis.of(self._part.kv_heads, layer.num_kv_heads, layer.head_dim)
        whole, head = c.qk_norm == "whole", Axis(layer.head_dim)
        q_norm = k_norm = sinks = None
        if c.qk_norm != "none":
            q_norm = self._norm(names.q_norm, q if whole else head)
        if c.qk_norm != "none" and layer.makes_kv:
            k_norm = self._norm(names.k_norm, kv if whole else head)
        if c.sinks:
            heads = Axis.of(self._part.heads, layer.num_heads)
            sinks = self._source.vector(self._at + names.sinks, heads)
        return HeadWeights(
            qkv=self._qkv(layer, q, kv),
            out=self._source.linear([(self._at + names.out, self._hidden)], q, bias=c.out_bias),
            q_norm=q_norm,
            k_norm=k_norm,
            sinks=sinks,
        )

    def _qkv(self, layer: LayerConfig, q: Axis, kv: Axis) -> Linear:
        """Queries, keys, values and the output's gate: as many of these as the layer has."""
        c, at = self._config, self._at
        if len(self._names.qkv) == 1:
            parts = [(at + self._names.qkv[0], beside(q, kv, kv))]
            return self._source.linear(parts, self._hidden, bias=c.qkv_bias)
        names = self._names.qkv[: 1 if not layer.makes_kv else 2 if layer.values_are_keys else 3]
        if c.output_gate:
            return self._gated_qkv([at + name for name in names], layer, q, kv)
        parts = [
            (at + name, axis.through(row_order(self._source.arch, name, layer)))
            for name, axis in zip(names, (q, kv, kv), strict=False)
        ]
        return self._source.linear(parts, self._hidden, bias=c.qkv_bias)

    def _gated_qkv(self, names: list[str], layer: LayerConfig, q: Axis, kv: Axis) -> Linear:
        """The same of a file whose rows of one head are its query's, then its gate's."""
        source = self._source
        by_head = np.arange(2 * q.size).reshape(layer.num_heads, 2, layer.head_dim)
        axes = [beside(q, q).through(by_head.swapaxes(0, 1).reshape(-1)), *[kv] * (len(names) - 1)]
        both, *others = (
            source.take(name, axis, self._hidden) for name, axis in zip(names, axes, strict=True)
        )
        queries, gates = mx.arange(q.count), mx.arange(q.count, 2 * q.count)
        tensors = [both.rows(queries), *others, both.rows(gates)]
        biases = None
        if self._config.qkv_bias:
            bias, *own = (
                source.vector(f"{name}.bias", axis) for name, axis in zip(names, axes, strict=True)
            )
            biases = [bias[: q.count], *own, bias[q.count :]]
        return make_linear(tensors, biases, source.few_rows)

    # --- latent attention ---

    def _latent(self, layer: LayerConfig, latent: LatentConfig) -> LatentWeights:
        c, names, at = self._config, self._names, self._at
        heads, query_dim = layer.num_heads, latent.plain_dim + latent.rope_dim
        turned = _halves(heads, latent.plain_dim, latent.rope_dim)
        by_head = Axis.of(self._part.heads, heads, query_dim).through(turned)
        both = Axis(latent.rank + latent.rope_dim).through(_halves(1, latent.rank, latent.rope_dim))
        if latent.query_rank is None:
            queries, q_norm, q_up = (at + names.qkv[0], by_head), None, None
        else:
            rank = Axis(latent.query_rank)
            queries = (at + names.query_down, rank)
            q_norm = self._norm(names.query_norm, rank)
            q_up = self._source.linear([(at + names.query_up, by_head)], rank)
        keys, values = self._latent_heads(layer, latent)
        width = Axis.of(self._part.heads, heads, latent.value_dim)
        return LatentWeights(
            down=self._source.linear(
                [queries, (at + names.latent_down, both)], self._hidden, bias=c.qkv_bias
            ),
            q_norm=q_norm,
            q_up=q_up,
            latent_norm=self._norm(names.latent_norm, Axis(latent.rank)),
            keys=keys,
            values=values,
            out=self._source.linear([(at + names.out, self._hidden)], width, bias=c.out_bias),
        )

    def _latent_heads(self, layer: LayerConfig, latent: LatentConfig) -> tuple[mx.array, mx.array]:
        """From a head's plain query into the latent, and from there to its value, in floats.

        Checkpoints have one matrix for both, or MLX's two.
        """
        names, at, taken = self._names, self._at, self._part.heads
        rank, plain = Axis(latent.rank), Axis(latent.plain_dim)
        if self._source.has(f"{at}{names.latent_keys}.weight"):
            heads = Axis.of(taken, layer.num_heads)
            keys = self._floats(names.latent_keys, heads, rank, plain)
            values = self._floats(names.latent_values, heads, Axis(latent.value_dim), rank)
            keys = keys.swapaxes(1, 2)
        else:
            rows = Axis.of(taken, layer.num_heads, latent.plain_dim + latent.value_dim)
            both = self._floats(names.latent_up, rows, rank)
            both = both.reshape(len(taken), -1, latent.rank)
            keys, values = both[:, : latent.plain_dim], both[:, latent.plain_dim :]
        keys, values = mx.contiguous(keys), mx.contiguous(values.swapaxes(1, 2))
        mx.eval(keys, values)
        return keys, values

    def _floats(self, name: str, *axes: Axis) -> mx.array:
        return _dense(self._source.take(self._at + name, *axes)).array

    # --- recurrent layers ---

    def _conv(self, conv: ConvConfig) -> ConvWeights:
        names, at, hidden = self._names, self._at, self._hidden
        channels = Axis.of(self._part.channels, conv.num_channels)
        three = beside(channels, channels, channels)
        conv_bias = None
        if conv.bias:
            conv_bias = self._source.vector(f"{at}{names.conv}.bias", channels)
        return ConvWeights(
            into=self._source.linear([(at + names.conv_in, three)], hidden, bias=conv.bias),
            conv=self._taps(names.conv, channels, conv.size),
            conv_bias=conv_bias,
            out=self._source.linear([(at + names.conv_out, hidden)], channels, bias=conv.bias),
        )

    def _delta(self, delta: DeltaConfig) -> DeltaWeights:
        names, at, arch, layer = self._names, self._at, self._source.arch, self._layer
        heads = Axis.of(self._part.value_heads, delta.num_value_heads)
        keys = Axis.of(self._part.key_heads, delta.num_key_heads, delta.key_dim)
        values = Axis.of(self._part.value_heads, delta.num_value_heads, delta.value_dim)
        channels = beside(keys, keys, values)
        decay = self._delta_vector(names.delta_decay, heads).astype(mx.float32)
        conv = channels.through(row_order(arch, names.delta_conv, layer))
        out = values.through(_by_head(row_order(arch, names.delta_out, layer), delta.value_dim))
        return DeltaWeights(
            into=self._delta_in(delta, channels, values, heads),
            conv=self._taps(names.delta_conv, conv, delta.conv_size),
            decay=mx.log(-decay) if names.delta_decay_is_rate else decay,
            decay_bias=self._delta_vector(names.delta_bias, heads),
            norm=self._source.norm(at + names.delta_norm, Axis(delta.value_dim), offset=False),
            out=make_linear(
                [self._source.take(at + names.delta_out, self._hidden, out)],
                None,
                self._source.few_rows,
            ),
        )

    def _delta_in(self, delta: DeltaConfig, channels: Axis, values: Axis, heads: Axis) -> Linear:
        """What goes into the layer, of as many parts as the names have."""
        names = self._names.delta_in
        axes = [channels, values, heads, heads]
        orders = [row_order(self._source.arch, name, self._layer) for name in names]
        if len(names) < 4:  # write strengths and decays are one, key head by key head
            axes[2:], orders[-1] = [beside(heads, heads)], _by_part(delta)
        if len(names) < 3:  # and so are the others
            axes[:2], orders[0] = [beside(channels, values)], _by_kind(delta)
        parts = [
            (self._at + name, axis.through(order))
            for name, axis, order in zip(names, axes, orders, strict=True)
        ]
        return self._source.linear(parts, self._hidden)

    def _delta_vector(self, name: str, heads: Axis) -> mx.array:
        order = row_order(self._source.arch, name, self._layer)
        return self._source.vector(self._at + name, heads.through(order))

    def _taps(self, name: str, channels: Axis, size: int) -> mx.array:
        """A convolution's weight `(size, channels)`: torch has `(channels, 1, size)`."""
        full, count = f"{self._at}{name}.weight", channels.size
        shape = self._source.checkpoint.shape(full)
        known = ((count, 1, size), (count, size, 1), (count, size))
        shape = shape if shape in known else known[0]
        taps = self._source.vector(full, channels, *map(Axis, shape[1:]))
        taps = mx.contiguous(taps.reshape(channels.count, size).T)
        mx.eval(taps)
        return taps

    # --- what a block does to each row alone ---

    def _mlp(
        self, gate_up: tuple[str, ...], down: str, ffn: Axis, *, bias: bool = False
    ) -> GatedMlp | None:
        if not ffn.size:
            return None
        at, axes = self._at, [beside(ffn, ffn)] if len(gate_up) == 1 else [ffn, ffn]
        parts = [(at + name, axis) for name, axis in zip(gate_up, axes, strict=True)]
        return GatedMlp(
            gate_up=self._source.linear(parts, self._hidden, bias=bias),
            down=self._source.linear([(at + down, self._hidden)], ffn, bias=bias),
            activation=self._config.activation,
            composed=not self._source.profile.fused_attention,
        )

    def _experts(self) -> Experts | None:
        experts = self._layer.experts
        if experts is None:
            return None
        at, names = self._at, self._names.experts
        shared_gate = None
        if experts.shared_gate:
            shared_gate = self._source.linear([(at + names.shared_gate, Axis(1))], self._hidden)
        shared = Axis.of(self._part.shared_ffn, experts.shared_size)
        gate_up, down = self._expert_matrices(experts)
        return Experts(
            router=self._router(experts),
            gate_up=gate_up,
            down=down,
            activation=self._config.activation,
            tiled=self._source.profile.tiles_experts,
            shared=self._mlp(names.shared[:2], names.shared[2], shared),
            shared_gate=shared_gate,
            in_norm=self._norm(names.in_norm) if experts.beside else None,
            norm_eps=self._config.norm_eps,
        )

    def _router(self, experts: ExpertsConfig) -> Router:
        at, names, count = self._at, self._names.experts, Axis(experts.num_experts)
        choice_bias = norm = scales = None
        if experts.choice_bias:
            choice_bias = self._source.vector(at + names.choice_bias, count).astype(mx.float32)
        if experts.beside:
            norm = self._source.vector(at + names.router_norm, self._hidden)
            norm = norm * self._hidden.size**-0.5
        if experts.expert_scales:
            scales = self._source.vector(at + names.router_scales, count)
        return Router(
            config=experts,
            logits=self._source.linear(
                [(at + names.router, count)], self._hidden, bias=experts.router_bias
            ),
            norm=norm,
            norm_eps=self._config.norm_eps,
            choice_bias=choice_bias,
            scales=scales,
        )

    def _expert_matrices(self, experts: ExpertsConfig) -> tuple[ExpertMatrix, ExpertMatrix]:
        """Gate and up of all experts side by side, and down: of whichever form is there."""
        source, names, at = self._source, self._names.experts, self._at
        count, hidden = Axis(experts.num_experts), self._hidden
        wide = Axis.of(self._part.expert_ffn, experts.ffn_size)
        if source.has(at + names.fused[0]):
            return self._fused_experts(experts, count, wide)
        if source.has(f"{at}{names.stacked[0]}.weight"):
            gate, up = (source.take(at + name, count, wide, hidden) for name in names.stacked[:2])
            down = source.take(at + names.stacked[2], count, hidden, wide)
        else:
            axes = ((wide, hidden), (wide, hidden), (hidden, wide))
            gate, up, down = map(self._stacked, names.each, axes)
        bias = down_bias = None
        if experts.bias:
            biases = [source.vector(f"{at}{n}.bias", count, wide) for n in names.stacked[:2]]
            bias = mx.concatenate(biases, axis=1)
            if source.has_bias(wide):
                down_bias = source.vector(f"{at}{names.stacked[2]}.bias", count, hidden)
        both = concat_rows([gate, up])
        if both is None:
            both = concat_rows([_dense(gate), _dense(up)])
        assert both is not None
        return self._matrix(both, bias), self._matrix(down, down_bias)

    def _stacked(self, name: str, axes: tuple[Axis, Axis]) -> Tensor:
        """One tensor of those that each expert has."""
        experts = self._layer.experts
        assert experts is not None
        names = [f"{self._at}{name.format(i)}.weight" for i in range(experts.num_experts + 1)]
        if self._source.has(names[-1]):
            raise CheckpointCorrupt(
                f"{self._source.checkpoint.path}: tensor {names[-1]!r} is of an expert too many",
                hint=f"by the configuration there are {experts.num_experts} in a layer",
            )
        return self._source.checkpoint.take_stack(names[:-1], axes)

    def _fused_experts(
        self, experts: ExpertsConfig, count: Axis, wide: Axis
    ) -> tuple[ExpertMatrix, ExpertMatrix]:
        """As transformers keeps them: gate and up in one tensor, side by side or by turns."""
        source, names, at, hidden = self._source, self._names.experts, self._at, self._hidden
        take = source.checkpoint.take_axes
        two = beside(wide, wide)
        if names.by_turns:
            two = two.through(np.arange(two.size).reshape(-1, 2).T.reshape(-1))
        quantised = source.checkpoint.config.get("quantization_config") is not None
        if names.fused_in_first and not quantised:
            both = _turned(take(at + names.fused[0], (count, hidden, two)))
            down = _turned(take(at + names.fused[1], (count, wide, hidden)))
        else:
            both = take(at + names.fused[0], (count, two, hidden))
            down = take(at + names.fused[1], (count, hidden, wide))
        bias = down_bias = None
        if experts.bias:
            bias = source.vector(f"{at}{names.fused[0]}_bias", count, two)
            if source.has_bias(wide):
                down_bias = source.vector(f"{at}{names.fused[1]}_bias", count, hidden)
        return self._matrix(both, bias), self._matrix(down, down_bias)

    def _matrix(self, tensor: Tensor, bias: mx.array | None) -> ExpertMatrix:
        if isinstance(tensor, Quantised):
            mx.eval(*tensor.arrays)
            return ExpertMatrix(tensor, bias)
        matrix = tensor.array.swapaxes(1, 2)
        if self._source.profile.tiles_experts:
            matrix = mx.contiguous(matrix)
        mx.eval(matrix)
        return ExpertMatrix(matrix, bias)

    def _beside_norms(self) -> tuple[mx.array, mx.array]:
        first, second = self._names.experts.beside_norms
        return self._norm(first), self._norm(second)

    # --- Gemma 4's own ---

    def _per_layer(self) -> PerLayerWeights | None:
        if self._config.per_layer is None:
            return None
        names, at, size = self._names, self._at, Axis(self._config.per_layer.size)
        return PerLayerWeights(
            gate=self._source.linear([(at + names.per_layer_gate, size)], self._hidden),
            out=self._source.linear([(at + names.per_layer_out, self._hidden)], size),
            norm=self._norm(names.per_layer_norm),
        )

    def _scale(self) -> mx.array | None:
        if not self._config.layer_scales:
            return None
        return self._source.vector(self._at + self._names.layer_scale, Axis(1))


def _dense(tensor: Tensor) -> Dense:
    return tensor.dequantised() if isinstance(tensor, Quantised) else tensor


def _turned(tensor: Tensor) -> Tensor:
    """Each expert's matrix the other way round."""
    return Dense(_dense(tensor).array.swapaxes(1, 2))


def _by_head(order: Places | None, width: int) -> Places | None:
    """An order of heads as that of their columns."""
    if order is None:
        return None
    return (order[:, None] * width + np.arange(width)).reshape(-1)


def _halves(num_heads: int, plain: int, turned: int) -> np.ndarray:
    """Rows of heads whose last `turned` are rotary pairs side by side, as halves instead."""
    width = plain + turned
    rows = np.arange(num_heads * width).reshape(num_heads, width)
    pairs = rows[:, plain:].reshape(num_heads, turned // 2, 2).swapaxes(1, 2)
    return np.concatenate([rows[:, :plain], pairs.reshape(num_heads, turned)], axis=1).reshape(-1)


def _by_kind(delta: DeltaConfig) -> np.ndarray:
    """Rows that stand by key head, as queries, keys, values and gates of all heads."""
    values = delta.num_value_heads // delta.num_key_heads * delta.value_dim
    ends = np.cumsum([delta.key_dim, delta.key_dim, values, values])
    rows = np.arange(delta.num_key_heads * ends[-1]).reshape(delta.num_key_heads, -1)
    return np.concatenate([part.reshape(-1) for part in np.split(rows, ends[:-1], axis=1)])


def _by_part(delta: DeltaConfig) -> np.ndarray:
    """The same of write strengths and decays."""
    rows = np.arange(2 * delta.num_value_heads).reshape(delta.num_key_heads, 2, -1)
    return rows.swapaxes(0, 1).reshape(-1)
