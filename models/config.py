"""What a decoder is made of, said once, whatever family or file format it came from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from edgekv.config import check_float, check_int
from edgekv.errors import CheckpointCorrupt, ConfigError

Activation = Literal["silu", "gelu_tanh"]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding over all dimensions of a head, halves rotated together.

    Attributes:
        base: The wavelength base (theta).
        position_scale: Positions are multiplied by this ("linear" scaling is 1 / factor).
        llama3: (factor, low_freq_factor, high_freq_factor, original_context) of Llama 3.1's
            frequency-dependent scaling, or None.
        wavelength_factors: Per-frequency multipliers of the wavelength, as GGUF files carry them
            in `rope_freqs.weight`, or None.
    """

    base: float
    position_scale: float = 1.0
    llama3: tuple[float, float, float, float] | None = None
    wavelength_factors: tuple[float, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """One transformer block.

    Attributes:
        num_heads: Query heads; a multiple of `num_kv_heads`.
        num_kv_heads: Key and value heads.
        head_dim: Size of one head.
        ffn_size: Width of the gated MLP.
        rope: Rotary embedding of this layer.
        sliding_window: Tokens (itself included) that a token may attend to, or None for all.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    rope: RopeConfig
    sliding_window: int | None = None

    def __post_init__(self) -> None:
        assert self.num_heads % self.num_kv_heads == 0
        assert self.head_dim % 2 == 0


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A whole decoder.

    Attributes:
        family: Name of the family, the `model_type` of its `config.json`.
        hidden_size: Width of the residual stream.
        vocab_size: Rows of the embedding.
        context_max: Longest sequence the model was made for, in tokens.
        layers: One entry a block; they may differ (OpenELM).
        norm_eps: Added to the mean square in every RMSNorm.
        norm_offset: Added to every norm weight on load (Gemma stores weight - 1).
        activation: Of the gated MLP.
        attention_scale: Multiplies query-key products.
        embedding_scale: Multiplies embedded tokens.
        qk_norm: RMSNorm on each head's query and key, before RoPE.
        post_norms: RMSNorm also on the outputs of attention and MLP (Gemma).
        qkv_bias: Query, key and value projections have biases.
        out_bias: The attention's output projection has a bias.
        mlp_bias: The MLP's projections have biases.
        tied_head: Logits come from the embedding matrix; None leaves it to whether the checkpoint
            has a head.
    """

    family: str
    hidden_size: int
    vocab_size: int
    context_max: int
    layers: tuple[LayerConfig, ...]
    norm_eps: float
    attention_scale: float
    norm_offset: float = 0.0
    activation: Activation = "silu"
    embedding_scale: float = 1.0
    qk_norm: bool = False
    post_norms: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tied_head: bool | None = None

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return len(self.layers)


def prompt_macs(
    config: DecoderConfig,
    start: int,
    end: int,
    *,
    first_layer: int = 0,
    last_layer: int | None = None,
) -> float:
    """Multiplications of the rows `[start, end)` of a prompt through some layers, with attention.

    The head is left out: one row of the prompt needs it, whatever was predicted.
    """
    layers = config.layers[first_layer:last_layer]
    num_rows = end - start
    num_pairs = (end * (end + 1) - start * (start + 1)) / 2
    return sum(
        num_rows * _row_macs(config, layer) + 2 * num_pairs * layer.num_heads * layer.head_dim
        for layer in layers
    )


def _row_macs(config: DecoderConfig, layer: LayerConfig) -> int:
    qkv = config.hidden_size * (layer.num_heads + 2 * layer.num_kv_heads) * layer.head_dim
    out = layer.num_heads * layer.head_dim * config.hidden_size
    return qkv + out + 3 * config.hidden_size * layer.ffn_size


_OptionalBool = bool | None  # named here: inside the class, `bool` is a method


class Fields:
    """Checked access to a `config.json`: every error names the file and the field."""

    def __init__(self, raw: Mapping[str, object], source: str) -> None:
        self.raw = raw
        self.source = source

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.raw.get(name) is not None

    def _get(self, name: str, default: object) -> object:
        value = self.raw.get(name)
        if value is None:
            value = default
        if value is None:
            raise CheckpointCorrupt(
                f"{self.source}: field {name!r} is missing",
                hint="the file is not a complete model configuration; fetch it again",
            )
        return value

    def _wrong(self, name: str, value: object, wanted: str) -> CheckpointCorrupt:
        return CheckpointCorrupt(
            f"{self.source}: field {name!r} is {value!r}", hint=f"it must be {wanted}"
        )

    def mapping(self, name: str) -> "Fields | None":
        """A nested object, or None where it is absent or null."""
        value = self.raw.get(name)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self._wrong(name, value, "an object")
        return Fields(value, f"{self.source}: {name}")

    def ints(self, name: str, count: int) -> tuple[int, ...]:
        """A list of `count` positive whole numbers."""
        return tuple(self._list(name, count, lambda v: check_int(name, v, 1, 1 << 24)))

    def floats(self, name: str, count: int) -> tuple[float, ...]:
        """A list of `count` positive numbers."""
        return tuple(self._list(name, count, lambda v: check_float(name, v, 1e-9, 1e9)))

    def _list(self, name: str, count: int, check: Callable[[object], T]) -> list[T]:
        value = self._get(name, None)
        try:
            if isinstance(value, list | tuple) and len(value) == count:
                return [check(item) for item in value]
        except ConfigError:
            pass
        raise self._wrong(name, value, f"a list of {count} positive numbers")

    # Last, for below these names mean the methods also to whoever reads an annotation.

    def int(
        self, name: str, default: int | None = None, *, low: int = 1, high: int = 1 << 24
    ) -> int:
        """A whole number from `low` to `high`."""
        value = self._get(name, default)
        try:
            return check_int(name, value, low, high)
        except ConfigError:
            raise self._wrong(name, value, f"a whole number from {low} to {high}") from None

    def float(self, name: str, default: float | None = None, *, low: float = 1e-12) -> float:
        """A finite number from `low`; positive where nothing else is said."""
        value = self._get(name, default)
        try:
            return check_float(name, value, low, 1e12)
        except ConfigError:
            raise self._wrong(name, value, f"a number from {low:g} to 1e+12") from None

    def bool(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def optional_bool(self, name: str) -> _OptionalBool:
        """True, false, or None where the field is absent or null."""
        return self.bool(name, False) if self.has(name) else None

    def str(self, name: str, default: str | None = None) -> str:
        """A string."""
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self._wrong(name, value, "a string")
        return value
