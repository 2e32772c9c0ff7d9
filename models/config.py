"""What a decoder is made of, said once, whatever family or file format it came from."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, TypeVar

from edgekv.config import check_float, check_int
from edgekv.errors import FETCH_AGAIN, CheckpointCorrupt, ConfigError
from edgekv.kv.layout import NOTHING, Heads

Activation = Literal["silu", "gelu_tanh", "clamped_silu"]
CLAMP, CLAMP_SLOPE = 7.0, 1.702  # of "clamped_silu", gpt-oss's

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding, halves of what is rotated together.

    Every kind of scaling comes down to these (`edgekv.models.rope_scaling`).
    """

    base: float  # of wavelengths (theta)
    rotated: int | None = None  # a head's first dimensions, which are rotated; None: all
    # Each pair's wavelength is multiplied by its own, `(rotated / 2,)`; None: by one; infinite: it
    # is not rotated.
    wavelength_factors: tuple[float, ...] | None = None
    # Multiplies what is rotated, queries and keys both, and so scores by its square.
    magnitude: float = 1.0
    # These are longrope's factors for short contexts: opened for a longer one it has others.
    for_short: bool = False


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).

    A token's keys and values of all heads are linear maps of one latent, which is what is cached.
    """

    rank: int  # numbers of the latent
    query_rank: int | None  # of the queries' latent; None: they have none
    plain_dim: int  # of a head's query and key: what comes from the latent
    rope_dim: int  # of them: what is rotated, one key for all heads
    value_dim: int  # of a head's value


@dataclass(frozen=True, kw_only=True)
class DeltaConfig:
    """Gated DeltaNet (arXiv 2412.06464): a matrix a value head, behind a short convolution."""

    num_key_heads: int
    num_value_heads: int  # a multiple of `num_key_heads`
    key_dim: int  # of a head
    value_dim: int
    conv_size: int  # tokens that the convolution sees, the token itself included

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution: queries, keys and values of all heads."""
        return 2 * self.num_key_heads * self.key_dim + self.num_value_heads * self.value_dim


@dataclass(frozen=True, kw_only=True)
class ConvConfig:
    """A gated short convolution (LFM2) of so many tokens, the token itself included."""

    size: int
    num_channels: int
    bias: bool = False  # of its three products


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """A mixture of experts: each row goes through the few that its router chooses."""

    num_experts: int
    num_chosen: int  # of a row
    ffn_size: int  # width of one expert
    scores: Literal["softmax", "sigmoid"] = "softmax"  # of the router's logits
    normalised: bool = True  # the weights of those chosen add up to one
    scale: float = 1.0  # multiplies the weights
    # Experts stand in groups, of which only those with the best two experts are chosen from.
    num_groups: int = 1
    num_groups_chosen: int = 1
    choice_bias: bool = False  # a bias that counts in the choice and not in the weights
    router_bias: bool = False
    expert_scales: bool = False  # each expert's weight has a factor of its own
    bias: bool = False  # of the experts' products
    shared_size: int = 0  # width of the expert that all rows go through; 0: there is none
    shared_gate: bool = False  # its output is weighed by a sigmoid
    # Beside the dense MLP, not in its place: input and output have norms of their own, and the
    # router sees a row before them (Gemma 4).
    beside: bool = False


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """One transformer block; `num_heads` is a multiple of `num_kv_heads`.

    Of `latent`, `delta` and `conv` one at most is there, in place of attention by heads.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int  # width of the gated MLP; 0: there is none, but experts
    rope: RopeConfig | None  # None: tokens have no positions
    sliding_window: int | None = None  # tokens, itself included, that a token sees; None: all
    kv_from: int | None = None  # the layer before whose keys and values it reads; None: its own
    values_are_keys: bool = False  # values are the keys before norm and rope
    latent: LatentConfig | None = None
    delta: DeltaConfig | None = None
    conv: ConvConfig | None = None
    experts: ExpertsConfig | None = None

    @property
    def recurrent(self) -> bool:
        """Whether it keeps a state in place of keys and values."""
        return self.delta is not None or self.conv is not None

    @property
    def makes_kv(self) -> bool:
        """Whether it adds to what is kept of a sequence."""
        return self.kv_from is None

    @property
    def state_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of a recurrent layer's state, of one sequence; none of any other.

        The last inputs of its convolution, in the compute dtype, and a delta layer's matrices, f32.
        """
        if (conv := self.conv) is not None:
            return ((conv.size - 1, conv.num_channels),)
        if (delta := self.delta) is not None:
            matrices = (delta.num_value_heads, delta.value_dim, delta.key_dim)
            return ((delta.conv_size - 1, delta.conv_dim), matrices)
        return ()

    @property
    def kv_heads(self) -> Heads:
        """What it caches of a token."""
        if self.kv_from is not None or self.recurrent:
            return NOTHING
        if self.latent is not None:
            return Heads(1, self.latent.rank + self.latent.rope_dim, 0)
        return Heads(self.num_kv_heads, self.head_dim, self.head_dim)


@dataclass(frozen=True, kw_only=True)
class PerLayerInputs:
    """What each layer of Gemma 3n and 4 is told of a row's token, in a table of its own."""

    size: int  # numbers a layer and token
    vocab_size: int  # rows of the table


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
    residual_scale: float = 1.0  # multiplies what a block adds (Granite)
    logits_scale: float = 1.0  # multiplies logits
    # RMSNorm before RoPE on each head's query and key, or on those of all heads together.
    qk_norm: Literal["none", "heads", "whole"] = "none"
    value_norm: bool = False  # RMSNorm without weights on each head's value (Gemma 4)
    pre_norms: bool = True  # RMSNorm before attention and MLP
    post_norms: bool = False  # RMSNorm also on the outputs of attention and MLP (Gemma)
    qkv_bias: bool = False
    out_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    sinks: bool = False  # a logit a head that takes attention and gives nothing (gpt-oss)
    output_gate: bool = False  # sigmoid of a gate a head on what attention gives (Qwen 3.5)
    attention_softcap: float | None = None  # scores are bent by tanh to stay below it
    logits_softcap: float | None = None
    # Queries grow with the logarithm of how many times their position fills this many tokens, by
    # this much: (tokens, growth) (Ministral 3).
    query_growth: tuple[int, float] | None = None
    per_layer: PerLayerInputs | None = None
    layer_scales: bool = False  # each block's output has a factor of its own (Gemma 4)
    # Logits come from the embedding; None leaves it to whether the checkpoint has a head.
    tied_head: bool | None = None

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return len(self.layers)

    @property
    def kv_layers(self) -> int:
        """Layers up to the last that adds to what is kept of a sequence.

        Rows whose logits nobody asks for need no more.
        """
        return max(i + 1 for i, layer in enumerate(self.layers) if layer.makes_kv)

    @property
    def kv_heads(self) -> tuple[Heads, ...]:
        """What each layer caches of a token."""
        return tuple(layer.kv_heads for layer in self.layers)


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
        experts = 0 if layer.experts is None else layer.experts.num_chosen
        mlp = _mlp_macs(layer, config, experts)
        total += num_rows * (_mixer_macs(layer, config.hidden_size) + mlp)
        total += num_pairs * _pair_macs(layer)
    return total


def num_parameters(config: DecoderConfig) -> int:
    """About how many weights it has: all matrices, and neither norms nor biases."""
    total = config.hidden_size * config.vocab_size * (2 if config.tied_head is False else 1)
    if config.per_layer is not None:
        total += config.num_layers * config.per_layer.size * config.per_layer.vocab_size
    for layer in config.layers:
        experts = 0 if layer.experts is None else layer.experts.num_experts
        total += int(_mixer_macs(layer, config.hidden_size) + _mlp_macs(layer, config, experts))
    return total


def _mixer_macs(layer: LayerConfig, hidden_size: int) -> float:
    """Of one row's attention, or what stands in its place, without what it reads of others."""
    if (conv := layer.conv) is not None:
        return conv.num_channels * (4 * hidden_size + conv.size)
    if (delta := layer.delta) is not None:
        values = delta.num_value_heads * delta.value_dim
        products = hidden_size * (delta.conv_dim + 2 * values + 2 * delta.num_value_heads)
        return products + delta.conv_size * delta.conv_dim + 3 * values * delta.key_dim
    if (latent := layer.latent) is not None:
        keys = latent.plain_dim + latent.rope_dim
        queries = layer.num_heads * keys * (latent.query_rank or hidden_size)
        down = hidden_size * ((latent.query_rank or 0) + latent.rank + latent.rope_dim)
        heads = layer.num_heads * latent.rank * (latent.plain_dim + latent.value_dim)
        return down + queries + heads + hidden_size * layer.num_heads * latent.value_dim
    num_kv = layer.num_kv_heads if layer.makes_kv else 0
    return hidden_size * 2 * (layer.num_heads + num_kv) * layer.head_dim


def _mlp_macs(layer: LayerConfig, config: DecoderConfig, num_experts: int) -> float:
    """Of a row that goes through so many experts."""
    total = 3 * config.hidden_size * layer.ffn_size
    if (experts := layer.experts) is not None:
        width = num_experts * experts.ffn_size + experts.shared_size
        total += config.hidden_size * (3 * width + experts.num_experts)
    if config.per_layer is not None:
        total += 3 * config.hidden_size * config.per_layer.size
    return total


def _pair_macs(layer: LayerConfig) -> float:
    """Of a row and one token that it sees."""
    if layer.recurrent:
        return 0
    if layer.latent is not None:
        return layer.num_heads * (2 * layer.latent.rank + layer.latent.rope_dim)
    return 2 * layer.num_heads * layer.head_dim


# Named here: inside the class, these are methods.
_Int = int
_OptionalBool = bool | None
_OptionalFloat = float | None


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

    def flags(self, name: str, usual: list[_Int]) -> list[_Int]:
        """A list of zeros and ones, as long as `usual`, which counts where the field is absent."""
        value = self._get(name, usual)
        if (
            not isinstance(value, list)
            or len(value) != len(usual)
            or not all(flag in (0, 1) for flag in value)
        ):
            raise self._wrong(name, value, f"it must be a list of {len(usual)} zeros and ones")
        return value

    def indices(self, name: str, count: _Int) -> frozenset[_Int]:
        """A list of places below `count`; empty where the field is absent."""
        value = self._get(name, [])
        if not isinstance(value, list) or not all(type(v) is int and 0 <= v < count for v in value):
            raise self._wrong(name, value, f"it must list whole numbers from 0 to {count - 1}")
        return frozenset(value)

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

    def optional_float(self, name: str, default: _OptionalFloat) -> _OptionalFloat:
        """A positive number, or None where the field is null."""
        if name in self.raw:
            return self.float(name) if self.has(name) else None
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
