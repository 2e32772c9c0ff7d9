"""Our checkpoint as mlx-lm wants it: Hugging Face's fields and tensor names, our numbers.

The values are those that edgekv computes with (same dtype, same quantisation), but arrays of their
own: edgekv fuses some of them, and neither side may profit from the other's memory.
"""

import dataclasses
from collections.abc import Iterator

import mlx.core as mx

from edgekv.errors import UnsupportedModel
from edgekv.models.checkpoint import Checkpoint, Dense, Tensor, concat_rows
from edgekv.models.config import DecoderConfig
from edgekv.models.families import find_family
from edgekv.models.families.base import LayerNames, TensorNames
from edgekv.models.gguf_config import row_order, to_hf_fields
from edgekv.models.weights import parse_checkpoint

_SUFFIXES = (".weight", ".bias")


def hf_checkpoint(checkpoint: Checkpoint) -> tuple[dict[str, object], dict[str, Tensor]]:
    """The `config.json` and the tensors that a Hugging Face folder of this model would hold.

    Raises:
        UnsupportedModel: A GGUF file says something that a `config.json` cannot say.
        CheckpointCorrupt: A tensor is missing or malformed.
    """
    if checkpoint.kind == "folder":
        return dict(checkpoint.config), {n: checkpoint.take(n) for n in checkpoint.names}
    if "rope_freqs.weight" in checkpoint.names:
        raise UnsupportedModel(
            f"{checkpoint.path}: mlx-lm cannot be given rope factors from a GGUF file",
            hint="compare on the model's Hugging Face folder instead",
        )
    source = str(checkpoint.path)
    fields = {k: v for k, v in to_hf_fields(checkpoint.config, source).items() if v is not None}
    config, names = parse_checkpoint(checkpoint)
    # GGUF leaves it to the reader, and mlx-lm's default is the published models' 256.
    fields["query_pre_attn_scalar"] = config.attention_scale**-2
    fields["tie_word_embeddings"] = f"{names.head}.weight" not in checkpoint.names
    tensors = dict(_renamed(checkpoint, config, names, str(fields["model_type"])))
    return fields, tensors


def _renamed(
    checkpoint: Checkpoint, config: DecoderConfig, names: TensorNames, model_type: str
) -> Iterator[tuple[str, Tensor]]:
    theirs = find_family(model_type, str(checkpoint.path)).names
    # Hugging Face's Gemma stores norm weights less 1; the GGUF converter has added it.
    norm_offset = 1.0 if config.family == "gemma3" else 0.0
    for slot in ("embedding", "final_norm", "head"):
        name = f"{getattr(names, slot)}.weight"
        if name in checkpoint.names:
            tensor = _shifted(checkpoint.take(name), slot, norm_offset)
            yield f"{getattr(theirs, slot)}.weight", tensor
    for layer in range(config.num_layers):
        at = theirs.block.format(layer)
        for slot in (field.name for field in dataclasses.fields(LayerNames)):
            targets = _as_tuple(getattr(theirs.layer, slot))
            for suffix in _SUFFIXES:
                parts = _parts(checkpoint, config, names, layer, slot, suffix)
                parts = _as_many_as(parts, len(targets), checkpoint)
                for target, tensor in zip(targets, parts, strict=False):
                    yield f"{at}{target}{suffix}", _shifted(tensor, slot, norm_offset)


def _as_tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    if isinstance(names, tuple):
        return names
    return (names,) if names else ()


def _parts(
    checkpoint: Checkpoint,
    config: DecoderConfig,
    names: TensorNames,
    layer: int,
    slot: str,
    suffix: str,
) -> list[Tensor]:
    """What the checkpoint has for one slot of a block, rows in Hugging Face's order."""
    arch, at = str(checkpoint.config["general.architecture"]), names.block.format(layer)
    found = []
    for part in _as_tuple(getattr(names.layer, slot)):
        if f"{at}{part}{suffix}" in checkpoint.names:
            tensor = checkpoint.take(f"{at}{part}{suffix}")
            order = row_order(arch, part, config)
            found.append(tensor if order is None else tensor.rows(mx.array(order(layer))))
    return found


def _as_many_as(parts: list[Tensor], num_targets: int, checkpoint: Checkpoint) -> list[Tensor]:
    """Parts for which the target has a single name are stacked."""
    if len(parts) <= num_targets:
        return parts
    fused = concat_rows(parts)
    if fused is None:
        raise UnsupportedModel(
            f"{checkpoint.path}: parts of unlike quantisation, which mlx-lm has as one matrix",
            hint="compare on another file of this model",
        )
    return [fused]


def _shifted(tensor: Tensor, slot: str, norm_offset: float) -> Tensor:
    if norm_offset and slot.endswith("norm"):
        assert isinstance(tensor, Dense)
        return Dense(tensor.array - norm_offset)
    return tensor
