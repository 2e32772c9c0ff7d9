"""One small file a family: how its `config.json` reads and how its tensors are called."""

from edgekv.errors import FETCH_AGAIN, CheckpointCorrupt
from edgekv.models.config import DecoderConfig, Fields
from edgekv.models.families import (
    gemma2,
    gemma3,
    gemma4,
    glm4_moe_lite,
    gpt_oss,
    granite,
    lfm2,
    llama,
    ministral3,
    mistral,
    mixtral,
    olmo3,
    openelm,
    phi3,
    qwen2,
    qwen3,
    qwen3_5,
    qwen3_moe,
    smollm3,
)
from edgekv.models.families.base import WIDTH_MAX, Family, unsupported

_ALL = (
    llama.FAMILY,
    mistral.FAMILY,
    ministral3.FAMILY,
    ministral3.MULTIMODAL,
    mixtral.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    qwen3_moe.FAMILY,
    qwen3_5.FAMILY,
    qwen3_5.MOE,
    qwen3_5.NEXT,
    gemma2.FAMILY,
    gemma3.FAMILY,
    gemma4.FAMILY,
    gpt_oss.FAMILY,
    glm4_moe_lite.FAMILY,
    phi3.FAMILY,
    smollm3.FAMILY,
    granite.FAMILY,
    olmo3.FAMILY,
    lfm2.FAMILY,
    openelm.FAMILY,
)
FAMILIES: dict[str, Family] = {
    model_type: family for family in _ALL for model_type in family.model_types
}


_DAMAGED = f"the configuration is damaged or not of this family: {FETCH_AGAIN}"


def find_family(fields: Fields) -> Family:
    """The family of a configuration.

    Raises:
        UnsupportedModel: It is none of ours; the hint lists what is.
    """
    model_type = fields.str("model_type")
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise unsupported(fields, f"model_type {model_type!r}", f"supported: {known}")
    return FAMILIES[model_type]


def parse_config(fields: Fields, context_max: int | None = None) -> DecoderConfig:
    """A decoder whose figures fit each other.

    Args:
        fields: The configuration.
        context_max: Longest sequence that it is opened for, if not the model's own; the shorter
            of the two counts.

    Raises:
        UnsupportedModel: The family is none of ours, or the model has what edgekv does not run.
        CheckpointCorrupt: A field is missing or garbled, or heads cannot be shared out or rotated.
    """
    config = find_family(fields).parse(fields, context_max)
    for layer in config.layers:
        if layer.num_heads % layer.num_kv_heads or layer.head_dim % 2:
            raise CheckpointCorrupt(
                f"{fields.source}: {layer.num_heads} query heads of size {layer.head_dim} do not "
                f"divide over {layer.num_kv_heads} key-value heads",
                hint=_DAMAGED,
            )
        width = layer.num_heads * layer.head_dim
        if max(width, layer.delta.conv_dim if layer.delta else 0) > WIDTH_MAX:
            raise CheckpointCorrupt(
                f"{fields.source}: {layer.num_heads} query heads of size {layer.head_dim}, or what "
                f"a layer has in place of them, are wider than {WIDTH_MAX}",
                hint=_DAMAGED,
            )
    return config


__all__ = ["FAMILIES", "find_family", "parse_config"]
