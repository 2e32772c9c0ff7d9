"""What a decoder is made of, said once, whatever family or file format it came from."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, TypeVar

from edgekv.config import check_float, check_int
from edgekv.errors import FETCH_AGAIN, CheckpointCorrupt, ConfigError

Activation = Literal["silu", "gelu_tanh"]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding over all dimensions of a head, halves rotated together.

    Every kind of scaling comes down to these (`edgekv.models.rope_scaling`).
    """

    base: float  # of wavelengths (theta)
    # Each pair's wavelength is multiplied by its own, `(head_dim / 2,)`; None: by one.
    wavelength_factors: tuple[float, ...] | None = None
    # Multiplies what is rotated, queries and keys both, and so scores by its square.
    magnitude: float = 1.0
    # These are longrope's factors for short contexts: opened for a longer one it has others.
    for_short: bool = False


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """One transformer block; `num_heads` is a multiple of `num_kv_heads`."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int  # width of the gated MLP
    rope: RopeConfig
    sliding_window: int | None = None  # tokens, itself included, that a token sees; None: all


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A whole decoder."""

    family: str
    hidden_size: int  # width of the residual stream
    vocab_size: int  # rows of the embedding
    context_max: int  # longest sequence the model was made for, in tokens
    layers: tuple[LayerConfig, ...]  # they may differ (OpenELM)
    norm_eps: float  # added to the mean square in every RMSNorm
    attention_scale: float  # multiplies query-key products
    norm_offset: float = 0.0  # added to every norm weight on load (Gemma stores weight - 1)
    activation: Activation = "silu"  # of the gated MLP
    embedding_scale: float = 1.0  # multiplies embedded tokens
    qk_norm: bool = False  # RMSNorm on each head's query and key, before RoPE
    post_norms: bool = False  # RMSNorm also on the outputs of attention and MLP (Gemma)
    qkv_bias: bool = False
    out_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    # Logits come from the embedding; None leaves it to whether the checkpoint has a head.
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
    num_rows = end - start
    num_pairs = (end * (end + 1) - start * (start + 1)) / 2
    total = 0.0
    for layer in config.layers[first_layer:last_layer]:
        heads = 2 * (layer.num_heads + layer.num_kv_heads) * layer.head_dim  # q and out, k and v
        total += num_rows * config.hidden_size * (heads + 3 * layer.ffn_size)
        total += 2 * num_pairs * layer.num_heads * layer.head_dim
    return total


_OptionalBool = bool | None  # named here: inside the class, `bool` is a method


class Fields:
    """Checked access to a `config.json`: every error names the file and the field.

    A field that is absent has the family's default. One that is null counts as absent, but not
    where a number is asked for that decides a shape: `int` refuses it, `optional_int` returns it.

    Args:
        raw: The object.
        source: What errors call it.
        names: What errors call a field instead of its name (GGUF has keys of its own).
    """

    def __init__(
        self, raw: Mapping[str, object], source: str, names: Mapping[str, str] | None = None
    ) -> None:
        self.raw = raw
        self.source = source
        self.names = names or {}

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.raw.get(name) is not None

    def mapping(self, name: str) -> "Fields | None":
        """A nested object, or None where it is absent."""
        if not self.has(name):
            return None
        value = self.raw[name]
        if not isinstance(value, Mapping):
            raise self._wrong(name, value, "it must be an object")
        return Fields(value, f"{self.source}: {self.names.get(name, name)}", self.names)

    def ints(self, name: str, count: int) -> tuple[int, ...]:
        """A list of `count` positive whole numbers."""
        return self._list(name, count, lambda item: check_int(name, item, 1, 1 << 24))

    def floats(self, name: str, count: int) -> tuple[float, ...]:
        """A list of `count` positive numbers."""
        return self._list(name, count, lambda item: check_float(name, item, 1e-9, 1e9))

    def _list(self, name: str, count: int, check: Callable[[object], T]) -> tuple[T, ...]:
        value = self._get(name, None)
        with suppress(ConfigError):
            if isinstance(value, list | tuple) and len(value) == count:
                return tuple(map(check, value))
        raise self._wrong(name, value, f"it must be a list of {count} positive numbers")

    def _get(self, name: str, default: object) -> object:
        value = self.raw[name] if self.has(name) else default
        if value is None:
            raise CheckpointCorrupt(
                f"{self.source}: field {self.names.get(name, name)!r} is missing",
                hint=f"the file is not a complete model configuration: {FETCH_AGAIN}",
            )
        return value

    def _number(self, name: str, default: object, check: Callable[[object], T]) -> T:
        value = self._get(name, default)
        try:
            return check(value)
        except ConfigError as error:
            raise self._wrong(name, value, error.hint) from None

    def _typed(self, name: str, default: object, kind: type[T], wanted: str) -> T:
        value = self._get(name, default)
        if not isinstance(value, kind):
            raise self._wrong(name, value, f"it must be {wanted}")
        return value

    def _wrong(self, name: str, value: object, hint: str) -> CheckpointCorrupt:
        shown = self.names.get(name, name)
        return CheckpointCorrupt(f"{self.source}: field {shown!r} is {brief(value)}", hint=hint)

    def optional_int(self, name: str, default: int | None) -> int | None:
        """A whole number from 1, or None where the field is null."""
        if name in self.raw:
            return self.int(name) if self.has(name) else None
        return default

    # Last, for below these names mean the methods also to whoever reads an annotation.

    def int(
        self, name: str, default: int | None = None, *, low: int = 1, high: int = 1 << 24
    ) -> int:
        """A whole number from `low` to `high`; null is refused."""
        default = None if name in self.raw else default
        return self._number(name, default, lambda value: check_int(name, value, low, high))

    def float(self, name: str, default: float | None = None, *, low: float = 1e-12) -> float:
        """A finite number from `low`; positive where nothing else is said."""
        return self._number(name, default, lambda value: check_float(name, value, low, 1e12))

    def bool(self, name: str, default: bool) -> bool:
        """True or false."""
        return self._typed(name, default, bool, "true or false")

    def optional_bool(self, name: str) -> _OptionalBool:
        """True, false, or None where the field is absent."""
        return self.bool(name, False) if self.has(name) else None

    def str(self, name: str, default: str | None = None) -> str:
        """A string."""
        return self._typed(name, default, str, "a string")


def brief(value: object) -> str:
    """A value as errors show it: the whole of a short one."""
    shown = repr(value)
    return shown if len(shown) <= 200 else f"{shown[:200]} …"
