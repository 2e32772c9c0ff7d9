"""What `config.json` says about quantisation: MLX's affine scheme, or a refusal."""

from collections.abc import Mapping
from dataclasses import dataclass

from edgekv.errors import CheckpointCorrupt, UnsupportedModel

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)

_HINT = "supported: MLX affine quantisation ('quantization' in config.json), GGUF, or none"


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """How a tensor is quantised: `group_size` weights of a row share a scale and a bias."""

    group_size: int
    bits: int


@dataclass(frozen=True, kw_only=True)
class QuantTable:
    """The specs of a checkpoint: a default and what single layers have instead.

    Attributes:
        default: For layers that are not listed.
        layers: By module path, "model.layers.3.mlp.down_proj"; None is not quantised.
    """

    default: QuantSpec
    layers: Mapping[str, QuantSpec | None]

    def of(self, module: str) -> QuantSpec | None:
        """The spec of a module that has scales; None where the table says it has none."""
        return self.layers.get(module, self.default)


def parse_quantisation(config: Mapping[str, object], source: str) -> QuantTable | None:
    """Read the quantisation of a `config.json`; None for a checkpoint of floats.

    Args:
        config: The parsed file.
        source: Its name, for messages.

    Raises:
        UnsupportedModel: GPTQ, AWQ, bitsandbytes, fp8, or an MLX mode other than affine.
        CheckpointCorrupt: Malformed.
    """
    fields = config.get("quantization")
    if fields is None:
        fields = config.get("quantization_config")  # older MLX converters; else another scheme
    if fields is None:
        return None
    if not isinstance(fields, dict):
        raise CheckpointCorrupt(f"{source}: quantization is not an object")
    method = fields.get("quant_method")
    if method is not None:
        raise UnsupportedModel(f"{source}: quantised by {method!r}", hint=_HINT)
    default = _spec(fields, source, "quantization")
    layers = {
        name: _layer(value, default, source, name)
        for name, value in fields.items()
        if isinstance(value, dict | bool)
    }
    return QuantTable(default=default, layers=layers)


def _layer(
    value: dict[str, object] | bool, default: QuantSpec, source: str, name: str
) -> QuantSpec | None:
    if isinstance(value, bool):
        return default if value else None
    return _spec(value, source, name)


def _spec(fields: Mapping[str, object], source: str, name: str) -> QuantSpec:
    mode = fields.get("mode", "affine")
    if mode != "affine":
        raise UnsupportedModel(f"{source}: {name} has quantisation mode {mode!r}", hint=_HINT)
    group_size, bits = fields.get("group_size"), fields.get("bits")
    if type(group_size) is not int or type(bits) is not int:
        raise CheckpointCorrupt(f"{source}: {name} lacks group_size or bits as whole numbers")
    if group_size not in GROUP_SIZES or bits not in BITS:
        raise UnsupportedModel(
            f"{source}: {name} has {bits} bits in groups of {group_size}",
            hint=f"supported: bits {BITS}, groups of {GROUP_SIZES}",
        )
    return QuantSpec(group_size=group_size, bits=bits)
