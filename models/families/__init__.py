"""One small file a family: how its `config.json` reads and how its tensors are called."""

from edgekv.errors import FETCH_AGAIN, CheckpointCorrupt
from edgekv.models.config import DecoderConfig, Fields
from edgekv.models.families import gemma3, lfm2, llama, mistral, openelm, qwen2, qwen3
from edgekv.models.families.base import Family, unsupported

FAMILIES: dict[str, Family] = {
    model_type: module.FAMILY
    for module in (llama, mistral, qwen2, qwen3, gemma3, openelm, lfm2)
    for model_type in module.FAMILY.model_types
}


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
                hint=f"the configuration is damaged or not of this family: {FETCH_AGAIN}",
            )
    return config


__all__ = ["FAMILIES", "find_family", "parse_config"]
