"""One small file a family: how its `config.json` reads and how its tensors are called."""

from edgekv.errors import UnsupportedModel
from edgekv.models.families import gemma3, llama, openelm, qwen2, qwen3
from edgekv.models.families.base import Family

FAMILIES: dict[str, Family] = {
    model_type: module.FAMILY
    for module in (llama, qwen2, qwen3, gemma3, openelm)
    for model_type in module.FAMILY.model_types
}


def find_family(model_type: str, source: str) -> Family:
    """The family of a `model_type`.

    Raises:
        UnsupportedModel: It is none of ours; the hint lists what is.
    """
    family = FAMILIES.get(model_type)
    if family is None:
        raise UnsupportedModel(
            f"{source}: model_type {model_type!r} is not supported",
            hint="supported: " + ", ".join(sorted(FAMILIES)),
        )
    return family


__all__ = ["FAMILIES", "Family", "find_family"]
