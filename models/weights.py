"""Checkpoint → decoder: every tensor found, checked for its shape, fused and put in place."""

import math
from dataclasses import replace

import mlx.core as mx

from edgekv.device import DeviceProfile
from edgekv.errors import CheckpointCorrupt
from edgekv.models.checkpoint import Checkpoint, Tensor
from edgekv.models.config import DecoderConfig, Fields
from edgekv.models.decoder import Decoder, DecoderWeights, PerLayerTable
from edgekv.models.families import find_family, parse_config
from edgekv.models.families.base import Family
from edgekv.models.families.names import TensorNames
from edgekv.models.folder_files import CONFIG_FILE
from edgekv.models.gguf_config import (
    ROPE_FREQS,
    ROPE_LONG,
    ROPE_SHORT,
    field_names,
    rope_freqs_stretch,
    tensor_names,
    to_hf_fields,
)
from edgekv.models.gguf_tensors import GgufCheckpoint
from edgekv.models.layer_weights import LayerBuilder
from edgekv.models.linear import Embedding, make_linear
from edgekv.models.parts import Axis, Part
from edgekv.models.tensor_source import TensorSource
from edgekv.ranks.group import ALONE, Group


def parse_checkpoint(
    checkpoint: Checkpoint, context_max: int | None = None
) -> tuple[DecoderConfig, TensorNames]:
    """What the checkpoint is and how its tensors are called; for `context_max` see `parse_config`.

    Raises:
        UnsupportedModel: Of a kind that edgekv does not run.
        CheckpointCorrupt: The configuration lacks or garbles a field.
    """
    if not isinstance(checkpoint, GgufCheckpoint):
        fields = Fields(checkpoint.config, str(checkpoint.path / CONFIG_FILE))
        config, family = parse_config(fields, context_max), find_family(fields)
        names = _located(family, checkpoint)
        return (family.settle(config, names, checkpoint) if family.settle else config), names
    source = str(checkpoint.path)
    factors = {
        name: _rope_tensor(checkpoint, name)
        for name in (ROPE_FREQS, ROPE_LONG, ROPE_SHORT)
        if name in checkpoint.names
    }
    raw = to_hf_fields(checkpoint.config, source, factors, checkpoint.names)
    arch = str(checkpoint.config["general.architecture"])
    config = parse_config(Fields(raw, source, field_names(arch)), context_max)
    if ROPE_FREQS in factors and rope_freqs_stretch(arch):
        config = _with_rope_freqs(config, factors[ROPE_FREQS], source)
    return config, tensor_names(arch)


def _located(family: Family, checkpoint: Checkpoint) -> TensorNames:
    """Where the text model's tensors are: alone, within a multimodal one, or bare."""
    places = [family.names, *(family.names.under(*place) for place in family.prefixes)]

    def has(name: str) -> bool:
        return f"{name}.weight" in checkpoint.names

    return next((n for n in places if has(n.embedding) or has(n.final_norm)), family.names)


def _with_rope_freqs(config: DecoderConfig, factors: list[float], source: str) -> DecoderConfig:
    """Llama 3.x GGUF files carry their rope scaling as a tensor; it adds to other scaling."""
    rope = config.layers[0].rope
    if rope is None or len(factors) != (rope.rotated or config.layers[0].head_dim) // 2:
        raise CheckpointCorrupt(
            f"{source}: {ROPE_FREQS} has {len(factors)} values for heads of size "
            f"{config.layers[0].head_dim}"
        )
    layers = []
    for layer in config.layers:
        if layer.rope is None:
            layers.append(layer)
            continue
        both = zip(factors, layer.rope.wavelength_factors or (1.0,) * len(factors), strict=True)
        product = tuple(one * other for one, other in both)
        layers.append(replace(layer, rope=replace(layer.rope, wavelength_factors=product)))
    return replace(config, layers=tuple(layers))


def _rope_tensor(checkpoint: GgufCheckpoint, name: str) -> list[float]:
    # Not in the compute dtype: rounded, they would turn far tokens by another angle.
    factors: list[float] = checkpoint.exact(name).tolist()
    if not all(0 < factor < math.inf for factor in factors):
        raise CheckpointCorrupt(f"{checkpoint.path}: {name} has values that are not > 0")
    return factors


def load_decoder(
    checkpoint: Checkpoint,
    profile: DeviceProfile,
    context_max: int | None = None,
    group: Group = ALONE,
) -> Decoder:
    """Build a rank's part of a checkpoint's decoder and evaluate its weights; see `parse_config`.

    Raises:
        UnsupportedModel, CheckpointCorrupt: See `parse_checkpoint`; also a tensor that is missing
            or has another shape than the configuration says, by name.
        UnsupportedModel: It cannot be cut for so many ranks, see `Part.config`.
    """
    whole, names = parse_checkpoint(checkpoint, context_max)
    part = Part(group.rank, group.size, checkpoint.group_size)
    config = part.config(whole, str(checkpoint.path))
    source = TensorSource(checkpoint, whole, names, profile, part)
    return Decoder(config, _Builder(source).build(), profile, group, whole)


class _Builder:
    def __init__(self, source: TensorSource) -> None:
        self._source, self._config, self._names = source, source.config, source.names
        self._hidden = Axis(source.config.hidden_size)
        self._tokens = source.part.vocabulary(source.config.vocab_size)
        self._vocabulary = Axis.of(self._tokens, source.config.vocab_size)

    def build(self) -> DecoderWeights:
        config, names = self._config, self._names
        table = self._source.take(names.embedding, self._vocabulary, self._hidden)
        mx.eval(*table.arrays)
        layers = range(config.num_layers)
        return DecoderWeights(
            embedding=Embedding(table, self._tokens if self._vocabulary.is_part else None),
            layers=tuple(LayerBuilder(self._source, index).build() for index in layers),
            final_norm=self._source.norm(names.final_norm, self._hidden),
            # A tied head is a copy where matrices are transposed: the table is needed by rows.
            head=make_linear([self._own_head(table) or table], None, self._source.few_rows),
            per_layer=self._per_layer(),
        )

    def _own_head(self, table: Tensor) -> Tensor | None:
        """The checkpoint's head; None where it is the embedding's table.

        A head that is there counts also where the configuration ties it, unless it is the same:
        so transformers 5 (`PreTrainedModel.tie_weights`).
        """
        config, names = self._config, self._names
        if self._source.has(f"{names.head}.weight"):
            head = self._source.take(names.head, self._vocabulary, self._hidden)
            return None if config.tied_head and _same(head, table) else head
        if config.tied_head is False:
            raise CheckpointCorrupt(
                f"{self._source.checkpoint.path}: tensor '{names.head}.weight' is missing",
                hint="the checkpoint is incomplete: its head is not tied to the embedding",
            )
        return None

    def _per_layer(self) -> PerLayerTable | None:
        config, names = self._config, self._names
        if config.per_layer is None:
            return None
        width = Axis(config.num_layers * config.per_layer.size)
        tokens = Axis(config.per_layer.vocab_size)
        table = self._source.take(names.per_layer_table, tokens, width)
        mx.eval(*table.arrays)
        projection = [(names.per_layer_projection, width)]
        return PerLayerTable(
            table=Embedding(table),
            projection=self._source.linear(projection, self._hidden),
            norm=self._source.norm(names.per_layer_projection_norm, Axis(config.per_layer.size)),
        )


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are stored alike, number by number."""
    if type(one) is not type(other) or len(one.arrays) != len(other.arrays):
        return False
    return all(
        a.dtype == b.dtype and a.shape == b.shape and bool(mx.array_equal(a, b).item())
        for a, b in zip(one.arrays, other.arrays, strict=True)
    )
