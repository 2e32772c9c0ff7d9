"""Checkpoint → decoder: every tensor found, checked for its shape, fused and put in place."""

import math
from dataclasses import replace

import mlx.core as mx
import numpy as np

from edgekv.device import DeviceProfile
from edgekv.errors import CheckpointCorrupt
from edgekv.models.checkpoint import Checkpoint, Dense, Tensor
from edgekv.models.config import DecoderConfig, Fields, LayerConfig
from edgekv.models.decoder import Decoder, DecoderWeights, LayerWeights
from edgekv.models.families import find_family, parse_config
from edgekv.models.families.base import Family, TensorNames
from edgekv.models.folder_files import CONFIG_FILE
from edgekv.models.gguf_config import (
    ROPE_FREQS,
    ROPE_LONG,
    ROPE_SHORT,
    field_names,
    row_order,
    tensor_names,
    to_hf_fields,
)
from edgekv.models.linear import Embedding, Linear, make_linear
from edgekv.models.split import PLAIN, find_few_rows


def parse_checkpoint(
    checkpoint: Checkpoint, context_max: int | None = None
) -> tuple[DecoderConfig, TensorNames]:
    """What the checkpoint is and how its tensors are called; for `context_max` see `parse_config`.

    Raises:
        UnsupportedModel: Of a kind that edgekv does not run.
        CheckpointCorrupt: The configuration lacks or garbles a field.
    """
    if checkpoint.kind == "folder":
        fields = Fields(checkpoint.config, str(checkpoint.path / CONFIG_FILE))
        return parse_config(fields, context_max), _located(find_family(fields), checkpoint)
    source = str(checkpoint.path)
    longrope = {
        name: _rope_tensor(checkpoint, name)
        for name in (ROPE_LONG, ROPE_SHORT)
        if name in checkpoint.names
    }
    raw = to_hf_fields(checkpoint.config, source, longrope)
    arch = str(checkpoint.config["general.architecture"])
    config = parse_config(Fields(raw, source, field_names(arch)), context_max)
    return _with_rope_freqs(config, checkpoint), tensor_names(arch)


def _located(family: Family, checkpoint: Checkpoint) -> TensorNames:
    """Where the text model's tensors are: alone, within a multimodal one, or bare."""
    places = [family.names, *(family.names.under(*place) for place in family.prefixes)]
    there = (n for n in places if f"{n.embedding}.weight" in checkpoint.names)
    return next(there, family.names)


def _with_rope_freqs(config: DecoderConfig, checkpoint: Checkpoint) -> DecoderConfig:
    """Llama 3.x GGUF files carry their rope scaling as a tensor; it adds to other scaling."""
    if ROPE_FREQS not in checkpoint.names:
        return config
    factors = _rope_tensor(checkpoint, ROPE_FREQS)
    if len(factors) != config.layers[0].head_dim // 2:
        raise CheckpointCorrupt(
            f"{checkpoint.path}: {ROPE_FREQS} has {len(factors)} values for heads of size "
            f"{config.layers[0].head_dim}"
        )
    layers = []
    for layer in config.layers:
        both = zip(factors, layer.rope.wavelength_factors or (1.0,) * len(factors), strict=True)
        product = tuple(one * other for one, other in both)
        layers.append(replace(layer, rope=replace(layer.rope, wavelength_factors=product)))
    return replace(config, layers=tuple(layers))


def _rope_tensor(checkpoint: Checkpoint, name: str) -> list[float]:
    tensor = checkpoint.take(name)
    assert isinstance(tensor, Dense)
    factors = [float(factor) for factor in np.array(tensor.array.astype(mx.float32)).reshape(-1)]
    if not all(0 < factor < math.inf for factor in factors):
        raise CheckpointCorrupt(f"{checkpoint.path}: {name} has values that are not > 0")
    return factors


def load_decoder(
    checkpoint: Checkpoint, profile: DeviceProfile, context_max: int | None = None
) -> Decoder:
    """Build the decoder of a checkpoint and evaluate its weights; see `parse_config`.

    Raises:
        UnsupportedModel, CheckpointCorrupt: See `parse_checkpoint`; also a tensor that is missing
            or has another shape than the configuration says, by name.
    """
    config, names = parse_checkpoint(checkpoint, context_max)
    weights = _Builder(checkpoint, config, names, profile).build()
    return Decoder(config, weights, profile)


class _Builder:
    def __init__(
        self,
        checkpoint: Checkpoint,
        config: DecoderConfig,
        names: TensorNames,
        profile: DeviceProfile,
    ) -> None:
        self.checkpoint = checkpoint
        self.config = config
        self.names = names
        self.few_rows = find_few_rows() if profile.measures_few_rows else PLAIN
        self.arch = str(checkpoint.config.get("general.architecture", ""))

    def build(self) -> DecoderWeights:
        config, names = self.config, self.names
        table = self._take(names.embedding, (config.vocab_size, config.hidden_size))
        mx.eval(*table.arrays)
        layers = tuple(self._layer(i, layer) for i, layer in enumerate(config.layers))
        return DecoderWeights(
            embedding=Embedding(table),
            layers=layers,
            final_norm=self._norm(names.final_norm, config.hidden_size),
            # A tied head is a copy where matrices are transposed: the table is needed by rows.
            head=make_linear([self._own_head(table) or table], None, self.few_rows),
        )

    def _own_head(self, table: Tensor) -> Tensor | None:
        """The checkpoint's head; None where it is the embedding's table.

        A head that is there counts also where the configuration ties it, unless it is the same:
        so transformers 5 (`PreTrainedModel.tie_weights`).
        """
        config, names = self.config, self.names
        if f"{names.head}.weight" in self.checkpoint.names:
            head = self._take(names.head, (config.vocab_size, config.hidden_size))
            return None if config.tied_head and _same(head, table) else head
        if config.tied_head is False:
            raise CheckpointCorrupt(
                f"{self.checkpoint.path}: tensor '{names.head}.weight' is missing",
                hint="the checkpoint is incomplete: its head is not tied to the embedding",
            )
        return None

    def _layer(self, index: int, layer: LayerConfig) -> LayerWeights:
        c, names = self.config, self.names
        at, hidden = names.block.format(index), c.hidden_size
        q, kv = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
        qkv = _rows_of(names.qkv, (q, kv, kv))
        ffn = _rows_of(names.gate_up, (layer.ffn_size, layer.ffn_size))

        def norm(name: str, size: int = hidden) -> mx.array:
            return self._norm(at + name, size)

        return LayerWeights(
            attn_norm=norm(names.attn_norm),
            qkv=self._linear(at, layer, qkv, hidden, c.qkv_bias),
            q_norm=norm(names.q_norm, layer.head_dim) if c.qk_norm else None,
            k_norm=norm(names.k_norm, layer.head_dim) if c.qk_norm else None,
            out=self._linear(at, layer, {names.out: hidden}, q, c.out_bias),
            attn_post_norm=norm(names.attn_post_norm) if c.post_norms else None,
            ffn_norm=norm(names.ffn_norm),
            gate_up=self._linear(at, layer, ffn, hidden, c.mlp_bias),
            down=self._linear(at, layer, {names.down: hidden}, layer.ffn_size, c.mlp_bias),
            ffn_post_norm=norm(names.ffn_post_norm) if c.post_norms else None,
        )

    def _linear(
        self, at: str, layer: LayerConfig, rows: dict[str, int], width: int, bias: bool
    ) -> Linear:
        if self.arch:  # GGUF metadata do not say which projections have biases; the tensors do
            bias = f"{at}{next(iter(rows))}.bias" in self.checkpoint.names or bias
        parts, biases = [], []
        for name, count in rows.items():
            order = row_order(self.arch, name, layer)
            part = self._take(at + name, (count, width))
            parts.append(part if order is None else part.rows(mx.array(order)))
            if bias:
                vector = self._vector(f"{at}{name}.bias", count)
                biases.append(vector if order is None else vector[mx.array(order)])
        return make_linear(parts, biases if bias else None, self.few_rows)

    def _take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self.checkpoint.take(f"{name}.weight", shape=shape)

    def _vector(self, name: str, size: int) -> mx.array:
        tensor = self.checkpoint.take(name, shape=(size,))
        assert isinstance(tensor, Dense)
        return tensor.array

    def _norm(self, name: str, size: int) -> mx.array:
        weight = self._vector(f"{name}.weight", size)
        if self.config.norm_offset:
            weight = weight + self.config.norm_offset
        mx.eval(weight)
        return weight


def _rows_of(names: tuple[str, ...], rows: tuple[int, ...]) -> dict[str, int]:
    """Rows of each named part; a checkpoint that fused them has one name for the sum."""
    return {names[0]: sum(rows)} if len(names) == 1 else dict(zip(names, rows, strict=True))


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are stored alike, number by number."""
    if type(one) is not type(other) or len(one.arrays) != len(other.arrays):
        return False
    return all(
        a.dtype == b.dtype and a.shape == b.shape and bool(mx.array_equal(a, b).item())
        for a, b in zip(one.arrays, other.arrays, strict=True)
    )
