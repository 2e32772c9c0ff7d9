"""MLX's quantisation modes, and what `config.json` says about them: which tensor has which.

A row's weights are taken in groups; each weight is a code of a few bits, each group has a scale.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from edgekv.errors import CheckpointCorrupt, UnsupportedModel
from edgekv.models.config import brief


@dataclass(frozen=True)
class QuantMode:
    """What a mode allows; the first of each is what MLX takes where a module says nothing."""

    group_sizes: tuple[int, ...]
    bits: tuple[int, ...]
    is_affine: bool  # `scale * code + bias`, all floats; else codes and scales are tiny floats


MODES: Mapping[str, QuantMode] = {
    "affine": QuantMode((64, 32, 128), (4, 1, 2, 3, 5, 6, 8), True),
    "mxfp4": QuantMode((32,), (4,), False),
    "nvfp4": QuantMode((16,), (4,), False),
    "mxfp8": QuantMode((32,), (8,), False),
}

_HINT = (
    "supported: MLX's quantisation ('quantization' in config.json) in the modes "
    f"{', '.join(MODES)}; gpt-oss as published; GGUF; or none"
)
NO_GLOBAL_SCALE = "supported: nvfp4 without a scale for the tensor as a whole"


@dataclass(frozen=True)
class QuantSpec:
    """How one tensor is quantised."""

    group_size: int  # weights of a row that share a scale
    bits: int  # of a code
    mode: str = "affine"  # one of `MODES`

    @property
    def is_affine(self) -> bool:
        """Whether there are biases, and scales are floats."""
        return MODES[self.mode].is_affine


def parse_quantisation(config: Mapping[str, object], source: str) -> dict[str, QuantSpec | None]:
    """Quantisation by module path, "model.layers.3.mlp.down_proj"; that of others under "".

    None is a module of floats; a checkpoint of floats says nothing, and yields nothing.

    Raises:
        UnsupportedModel: GPTQ, AWQ, bitsandbytes, fp8, or what no mode of MLX allows.
        CheckpointCorrupt: Malformed; `source`, the file's name, is in the message.
    """
    fields = config.get("quantization")
    if fields is None:
        fields = config.get("quantization_config")  # older MLX converters; else another scheme
    if fields is None:
        return {}
    if not isinstance(fields, dict):
        raise CheckpointCorrupt(f"{source}: quantization is not an object")
    method = fields.get("quant_method")
    if method == "mxfp4":  # gpt-oss as published; its tensors show which of them are floats
        return {"": QuantSpec(32, 4, "mxfp4")}
    if method is not None:
        raise UnsupportedModel(f"{source}: quantised by {brief(method)}", hint=_HINT)
    default = _spec(fields, source, "quantization")
    specs: dict[str, QuantSpec | None] = {"": default}
    for name, value in fields.items():
        if isinstance(value, bool):
            specs[name] = default if value else None
        elif isinstance(value, dict):
            specs[name] = _spec(value, source, name, is_module=True)
    return specs


def _spec(
    fields: Mapping[str, object], source: str, name: str, *, is_module: bool = False
) -> QuantSpec:
    mode = fields.get("mode", "affine")
    if not isinstance(mode, str) or mode not in MODES:
        raise UnsupportedModel(f"{source}: {name} has quantisation mode {brief(mode)}", hint=_HINT)
    if fields.get("global_scale"):
        raise UnsupportedModel(f"{source}: {name} has a global_scale", hint=NO_GLOBAL_SCALE)
    allowed = MODES[mode]
    usual = (allowed.group_sizes[0], allowed.bits[0]) if is_module else (None, None)
    group_size, bits = fields.get("group_size", usual[0]), fields.get("bits", usual[1])
    if type(group_size) is not int or type(bits) is not int:
        raise CheckpointCorrupt(f"{source}: {name} lacks group_size or bits as whole numbers")
    if group_size not in allowed.group_sizes or bits not in allowed.bits:
        raise UnsupportedModel(
            f"{source}: {name} has {bits} bits in groups of {group_size}, mode {mode!r}",
            hint=f"this mode has bits {allowed.bits} in groups of {allowed.group_sizes}",
        )
    return QuantSpec(group_size, bits, mode)
