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
from edgekv.models.recurrent import ConvWeights, DeltaWeights
from edgekv.models.tensor_source import TensorSource


class LayerBuilder:
    """Builds one block's weights."""

    def __init__(self, source: TensorSource, index: int) -> None:
        self._source, self._config, self._names = source, source.config, source.names
        self._index, self._layer = index, source.config.layers[index]
        self._at = source.names.block.format(index)
        self._hidden = source.config.hidden_size

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
            mlp=self._mlp(names.gate_up, names.down, self._layer.ffn_size, bias=c.mlp_bias),
            experts=self._experts(),
            beside_norms=self._beside_norms() if gated else None,
            per_layer=self._per_layer(),
            scale=self._scale(),
        )

    def _norm(self, name: str, size: int | None = None) -> mx.array:
        return self._source.norm(self._at + name, size or self._hidden)

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
        whole = c.qk_norm == "whole"
        q_norm = k_norm = sinks = None
        if c.qk_norm != "none":
            q_norm = self._norm(names.q_norm, layer.head_dim * (layer.num_heads if whole else 1))
        if c.qk_norm != "none" and layer.makes_kv:
            k_norm = self._norm(names.k_norm, layer.head_dim * (layer.num_kv_heads if whole else 1))
        if c.sinks:
            sinks = self._source.vector(self._at + names.sinks, layer.num_heads)
        width = layer.num_heads * layer.head_dim
        return HeadWeights(
            qkv=self._qkv(layer),
            out=self._source.linear([(self._at + names.out, self._hidden)], width, bias=c.out_bias),
            q_norm=q_norm,
            k_norm=k_norm,
            sinks=sinks,
        )

    def _qkv(self, layer: LayerConfig) -> Linear:
        """Queries, keys, values and the output's gate: as many of these as the layer has."""
        c, at = self._config, self._at
        q, kv = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
        if len(self._names.qkv) == 1:
            parts = [(at + self._names.qkv[0], q + 2 * kv)]
            return self._source.linear(parts, self._hidden, bias=c.qkv_bias)
        counts = [q, kv, kv][: 1 if not layer.makes_kv else 2 if layer.values_are_keys else 3]
        names = self._names.qkv[: len(counts)]
        parts = [(at + name, count) for name, count in zip(names, counts, strict=True)]
        orders = [row_order(self._source.arch, name, layer) for name in names]
        if not c.output_gate:
            return self._source.linear(parts, self._hidden, bias=c.qkv_bias, orders=orders)
        # Rows of one head are its query's, then its gate's.
        rows = np.arange(2 * q).reshape(layer.num_heads, 2, layer.head_dim).swapaxes(0, 1)
        queries = self._source.take(parts[0][0], (2 * q, self._hidden))
        others = [self._source.take(name, (count, self._hidden)) for name, count in parts[1:]]
        order = mx.array(rows.reshape(-1))
        tensors = [queries.rows(order[:q]), *others, queries.rows(order[q:])]
        biases = None
        if c.qkv_bias:
            bias = self._source.vector(f"{parts[0][0]}.bias", 2 * q)
            own = [self._source.vector(f"{name}.bias", count) for name, count in parts[1:]]
            biases = [bias[order[:q]], *own, bias[order[q:]]]
        return make_linear(tensors, biases, self._source.few_rows)

    # --- latent attention ---

    def _latent(self, layer: LayerConfig, latent: LatentConfig) -> LatentWeights:
        c, names, at = self._config, self._names, self._at
        heads, query_dim = layer.num_heads, latent.plain_dim + latent.rope_dim
        turned = _halves(heads, latent.plain_dim, latent.rope_dim)
        compressed = (at + names.latent_down, latent.rank + latent.rope_dim)
        down_order = _halves(1, latent.rank, latent.rope_dim)
        if latent.query_rank is None:
            queries, q_norm, q_up = (at + names.qkv[0], heads * query_dim), None, None
            orders: list[np.ndarray | None] = [turned, down_order]
        else:
            queries, orders = (at + names.query_down, latent.query_rank), [None, down_order]
            q_norm = self._norm(names.query_norm, latent.query_rank)
            up = [(at + names.query_up, heads * query_dim)]
            q_up = self._source.linear(up, latent.query_rank, orders=[turned])
        keys, values = self._latent_heads(layer, latent)
        width = heads * latent.value_dim
        return LatentWeights(
            down=self._source.linear(
                [queries, compressed], self._hidden, bias=c.qkv_bias, orders=orders
            ),
            q_norm=q_norm,
            q_up=q_up,
            latent_norm=self._norm(names.latent_norm, latent.rank),
            keys=keys,
            values=values,
            out=self._source.linear([(at + names.out, self._hidden)], width, bias=c.out_bias),
        )

    def _latent_heads(self, layer: LayerConfig, latent: LatentConfig) -> tuple[mx.array, mx.array]:
        """From a head's plain query into the latent, and from there to its value, in floats.

        Checkpoints have one matrix for both, or MLX's two.
        """
        names, at, heads = self._names, self._at, layer.num_heads
        if self._source.has(f"{at}{names.latent_keys}.weight"):
            keys = self._floats(names.latent_keys, (heads, latent.rank, latent.plain_dim))
            values = self._floats(names.latent_values, (heads, latent.value_dim, latent.rank))
            keys = keys.swapaxes(1, 2)
        else:
            rows = heads * (latent.plain_dim + latent.value_dim)
            both = self._floats(names.latent_up, (rows, latent.rank)).reshape(
                heads, -1, latent.rank
            )
            keys, values = both[:, : latent.plain_dim], both[:, latent.plain_dim :]
        keys, values = mx.contiguous(keys), mx.contiguous(values.swapaxes(1, 2))
        mx.eval(keys, values)
        return keys, values

    def _floats(self, name: str, shape: tuple[int, ...]) -> mx.array:
        tensor = self._source.take(self._at + name, shape)
        return (tensor.dequantised() if isinstance(tensor, Quantised) else tensor).array

    # --- recurrent layers ---

    def _conv(self, conv: ConvConfig) -> ConvWeights:
        names, at, hidden = self._names, self._at, self._hidden
        return ConvWeights(
            into=self._source.linear([(at + names.conv_in, 3 * hidden)], hidden, bias=conv.bias),
            conv=self._taps(names.conv, hidden, conv.size),
            conv_bias=self._source.vector(f"{at}{names.conv}.bias", hidden) if conv.bias else None,
            out=self._source.linear([(at + names.conv_out, hidden)], hidden, bias=conv.bias),
        )

    def _delta(self, delta: DeltaConfig) -> DeltaWeights:
        names, at, heads = self._names, self._at, delta.num_value_heads
        decay = self._delta_vector(names.delta_decay, heads).astype(mx.float32)
        out = self._source.take(at + names.delta_out, (self._hidden, heads * delta.value_dim))
        order = row_order(self._source.arch, names.delta_out, self._layer)
        return DeltaWeights(
            into=self._delta_in(delta),
            conv=self._taps(names.delta_conv, delta.conv_dim, delta.conv_size),
            decay=mx.log(-decay) if names.delta_decay_is_rate else decay,
            decay_bias=self._delta_vector(names.delta_bias, heads),
            norm=self._source.norm(at + names.delta_norm, delta.value_dim, offset=False),
            out=make_linear(
                [out if order is None else _columns_by_head(out, order)],
                None,
                self._source.few_rows,
            ),
        )

    def _delta_in(self, delta: DeltaConfig) -> Linear:
        """What goes into the layer, of as many parts as the names have."""
        arch, names, heads = self._source.arch, self._names.delta_in, delta.num_value_heads
        width = heads * delta.value_dim
        counts = [delta.conv_dim, width, heads, heads]
        orders = [row_order(arch, name, self._layer) for name in names]
        if len(names) < 4:  # write strengths and decays are one, key head by key head
            counts[2:], orders[-1] = [2 * heads], _by_part(delta)
        if len(names) < 3:  # and so are the others
            counts[:2], orders[0] = [delta.conv_dim + width], _by_kind(delta)
        parts = [(self._at + name, count) for name, count in zip(names, counts, strict=True)]
        return self._source.linear(parts, self._hidden, orders=orders)

    def _delta_vector(self, name: str, heads: int) -> mx.array:
        vector = self._source.vector(self._at + name, heads)
        order = row_order(self._source.arch, name, self._layer)
        return vector if order is None else vector[mx.array(order)]

    def _taps(self, name: str, channels: int, size: int) -> mx.array:
        """A convolution's weight `(size, channels)`: torch has `(channels, 1, size)`."""
        full = f"{self._at}{name}.weight"
        shape = self._source.checkpoint.shape(full)
        known = ((channels, 1, size), (channels, size, 1), (channels, size))
        tensor = self._source.take(self._at + name, shape if shape in known else known[0])
        assert isinstance(tensor, Dense)
        rows = tensor.array.reshape(channels, size)
        order = row_order(self._source.arch, name, self._layer)
        taps = mx.contiguous((rows if order is None else rows[mx.array(order)]).T)
        mx.eval(taps)
        return taps

    # --- what a block does to each row alone ---

    def _mlp(
        self, gate_up: tuple[str, ...], down: str, size: int, *, bias: bool = False
    ) -> GatedMlp | None:
        if not size:
            return None
        at, counts = self._at, [2 * size] if len(gate_up) == 1 else [size, size]
        parts = [(at + name, count) for name, count in zip(gate_up, counts, strict=True)]
        return GatedMlp(
            gate_up=self._source.linear(parts, self._hidden, bias=bias),
            down=self._source.linear([(at + down, self._hidden)], size, bias=bias),
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
            shared_gate = self._source.linear([(at + names.shared_gate, 1)], self._hidden)
        gate_up, down = self._expert_matrices(experts)
        return Experts(
            router=self._router(experts),
            gate_up=gate_up,
            down=down,
            activation=self._config.activation,
            tiled=self._source.profile.tiles_experts,
            shared=self._mlp(names.shared[:2], names.shared[2], experts.shared_size),
            shared_gate=shared_gate,
            in_norm=self._norm(names.in_norm) if experts.beside else None,
            norm_eps=self._config.norm_eps,
        )

    def _router(self, experts: ExpertsConfig) -> Router:
        at, names, count = self._at, self._names.experts, experts.num_experts
        choice_bias = norm = scales = None
        if experts.choice_bias:
            choice_bias = self._source.vector(at + names.choice_bias, count).astype(mx.float32)
        if experts.beside:
            norm = self._source.vector(at + names.router_norm, self._hidden) * self._hidden**-0.5
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
        names, at = self._names.experts, self._at
        count, wide, hidden = experts.num_experts, experts.ffn_size, self._hidden
        if self._source.has(at + names.fused[0]):
            return self._fused_experts(experts)
        if self._source.has(f"{at}{names.stacked[0]}.weight"):
            gate, up = (self._source.take(at + n, (count, wide, hidden)) for n in names.stacked[:2])
            down = self._source.take(at + names.stacked[2], (count, hidden, wide))
        else:
            shapes = ((wide, hidden), (wide, hidden), (hidden, wide))
            gate, up, down = map(self._stacked, names.each, shapes)
        bias = down_bias = None
        if experts.bias:
            biases = [self._source.vector(f"{at}{n}.bias", count, wide) for n in names.stacked[:2]]
            bias = mx.concatenate(biases, axis=1)
            down_bias = self._source.vector(f"{at}{names.stacked[2]}.bias", count, hidden)
        both = concat_rows([gate, up])
        if both is None:
            both = concat_rows([_dense(gate), _dense(up)])
        assert both is not None
        return self._matrix(both, bias), self._matrix(down, down_bias)

    def _stacked(self, name: str, shape: tuple[int, int]) -> Tensor:
        """One tensor of those that each expert has."""
        experts = self._layer.experts
        assert experts is not None
        names = [f"{self._at}{name.format(i)}.weight" for i in range(experts.num_experts + 1)]
        if self._source.has(names[-1]):
            raise CheckpointCorrupt(
                f"{self._source.checkpoint.path}: tensor {names[-1]!r} is of an expert too many",
                hint=f"by the configuration there are {experts.num_experts} in a layer",
            )
        return self._source.checkpoint.take_stack(names[:-1], shape=shape)

    def _fused_experts(self, experts: ExpertsConfig) -> tuple[ExpertMatrix, ExpertMatrix]:
        """As transformers keeps them: gate and up in one tensor, side by side or by turns."""
        names, at = self._names.experts, self._at
        count, wide, hidden = experts.num_experts, experts.ffn_size, self._hidden
        shapes = [(count, 2 * wide, hidden), (count, hidden, wide)]
        turned = [(count, hidden, 2 * wide), (count, wide, hidden)]
        quantised = self._source.checkpoint.config.get("quantization_config") is not None
        in_first = names.fused_in_first and not quantised
        both, down = (
            self._source.whole(at + name, shape)
            for name, shape in zip(names.fused, turned if in_first else shapes, strict=True)
        )
        if in_first:
            both, down = (Dense(_dense(t).array.swapaxes(1, 2)) for t in (both, down))
        bias = down_bias = None
        if experts.bias:
            bias = self._source.vector(f"{at}{names.fused[0]}_bias", count, 2 * wide)
            down_bias = self._source.vector(f"{at}{names.fused[1]}_bias", count, hidden)
        if names.by_turns:
            order = mx.array(np.arange(2 * wide).reshape(wide, 2).T.reshape(-1))
            both, bias = both.rows(order), None if bias is None else bias[:, order]
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
        names, at, size = self._names, self._at, self._config.per_layer.size
        return PerLayerWeights(
            gate=self._source.linear([(at + names.per_layer_gate, size)], self._hidden),
            out=self._source.linear([(at + names.per_layer_out, self._hidden)], size),
            norm=self._norm(names.per_layer_norm),
        )

    def _scale(self) -> mx.array | None:
        if not self._config.layer_scales:
            return None
        return self._source.vector(self._at + self._names.layer_scale, 1)


def _dense(tensor: Tensor) -> Dense:
    return tensor.dequantised() if isinstance(tensor, Quantised) else tensor


def _columns_by_head(tensor: Tensor, order: np.ndarray) -> Tensor:
    """A matrix whose columns stand by head, with its heads in another order."""
    if any(array.shape[-1] % len(order) for array in tensor.arrays):
        tensor = _dense(tensor)  # a head is no whole number of groups

    def ordered(array: mx.array) -> mx.array:
        by_head = array.reshape(array.shape[0], len(order), -1)
        return by_head[:, mx.array(order)].reshape(array.shape)

    return tensor.like([ordered(array) for array in tensor.arrays])


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
