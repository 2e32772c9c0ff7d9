"""How a configuration stretches rotary positions, as one factor for each pair's wavelength.

A cached key is never rotated again, so a model's rope is one for as long as it is loaded, whatever
a sequence's length. That decides two kinds which transformers lets depend on the length:

- "dynamic" (NTK) changes nothing up to `max_position_embeddings` and the base with every token
  beyond. Longer sequences are not taken (it is the context's limit), so it is plain rope, exactly.
- "longrope" has factors for short sequences and for long ones, `original_max_position_embeddings`
  between them. The longest sequence that the model is opened for decides, as in llama.cpp and
  vLLM. Opened for no more than the original context it gives what transformers gives; opened for
  more, short sequences too have the factors of long ones.

Sources: transformers' `modeling_rope_utils` (5.24) for the fields, their defaults and formulas;
YaRN, arXiv 2309.00071; LongRoPE, arXiv 2402.13753; Llama 3.1's reference code; and llama.cpp's
`llama_model::get_rope_factors` for the choice by context.
"""

import math
from dataclasses import dataclass

from edgekv.errors import CheckpointCorrupt, UnsupportedModel
from edgekv.models.config import Fields, RopeConfig

KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclass(frozen=True, kw_only=True)
class RopeUse:
    """What a scaling is applied to."""

    head_dim: int  # even: what is rotated of a head
    model_context: int  # `max_position_embeddings`
    opened_context: int  # the longest sequence that this model will see
    partial: bool = False  # more of a head is not rotated

    @property
    def half(self) -> int:
        """Rotary pairs of a head."""
        return self.head_dim // 2


def scaling_kind(scaling: Fields) -> str:
    """The kind of one `rope_scaling` object; older files call the field "type".

    Raises:
        UnsupportedModel: None of `KINDS`.
    """
    kind = scaling.str("rope_type", scaling.str("type", "default"))
    if kind not in KINDS:
        raise UnsupportedModel(
            f"{scaling.source}: rope_type {kind!r} is not supported",
            hint="supported: " + ", ".join(KINDS),
        )
    return kind


def original_context(scaling: Fields, outer: Fields, model_context: int) -> int:
    """Tokens that the model was trained on before it was stretched.

    Where `outer`, the configuration around the object, says it too, that counts.
    """
    name = "original_max_position_embeddings"
    holder = outer if outer.has(name) else scaling
    return holder.int(name, high=1 << 30) if holder.has(name) else model_context


def read_rope(scaling: Fields, outer: Fields, use: RopeUse, *, base: float) -> RopeConfig:
    """One `rope_scaling` object; `base` counts where it has no `rope_theta` of its own.

    Raises:
        UnsupportedModel: A kind that is none of `KINDS`.
        CheckpointCorrupt: A field is missing or garbled.
    """
    base = scaling.float("rope_theta", base)
    kind = scaling_kind(scaling)
    magnitude, for_short = 1.0, False
    original = original_context(scaling, outer, use.model_context)
    match kind:
        case "default":
            return RopeConfig(base=base)
        case "dynamic":
            scaling.float("factor")  # it must be there, though no sequence is so long
            return RopeConfig(base=base)
        case "linear":
            factors = [scaling.float("factor")] * use.half
        case "llama3":
            factors = _llama3(scaling, original, base, use)
        case "yarn":
            factor = _factor(scaling, original, use)
            factors = _yarn(scaling, factor, original, base, use)
            magnitude = scaling.float("attention_factor", _yarn_magnitude(scaling, factor))
        case _:
            for_short = use.opened_context <= original
            factors = _longrope(scaling, for_short, use)
            known = _longrope_magnitude(scaling, original, use)
            magnitude = scaling.float("attention_factor", known)
    return RopeConfig(
        base=base,
        wavelength_factors=tuple(factors),
        magnitude=magnitude,
        for_short=for_short,
    )


def _factor(scaling: Fields, original: int, use: RopeUse) -> float:
    """How much longer the context has become; null leaves it to the two contexts."""
    if "factor" in scaling.raw and not scaling.has("factor"):
        return use.model_context / original
    return scaling.float("factor")


def _llama3(scaling: Fields, original: int, base: float, use: RopeUse) -> list[float]:
    """Long wavelengths are stretched, short ones are not, and those between are blended."""
    factor = scaling.float("factor")
    low, high = scaling.float("low_freq_factor"), scaling.float("high_freq_factor")
    if high <= low:
        raise CheckpointCorrupt(
            f"{scaling.source}: high_freq_factor is {high:g}",
            hint=f"it must be greater than low_freq_factor, {low:g}",
        )
    factors = []
    for i in range(use.half):
        turns = original / (2 * math.pi * base ** (i / use.half))  # within the original context
        kept = min(1.0, max(0.0, (turns - low) / (high - low)))
        factors.append(1 / (kept + (1 - kept) / factor))
    return factors


def _yarn(scaling: Fields, factor: float, original: int, base: float, use: RopeUse) -> list[float]:
    """Pairs that turn `beta_fast` times in the original context are kept, slow ones stretched."""
    if base <= 1:
        raise CheckpointCorrupt(
            f"{scaling.source}: rope_theta is {base:g}", hint="with yarn it must be greater than 1"
        )

    def pair_of(turns: float) -> float:
        return use.half * math.log(original / (turns * 2 * math.pi)) / math.log(base)

    first = pair_of(scaling.float("beta_fast", 32.0, low=0.0) or 32.0)
    last = pair_of(scaling.float("beta_slow", 1.0, low=0.0) or 1.0)
    if scaling.bool("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, use.head_dim - 1)
    width = last - first or 0.001
    factors = []
    for i in range(use.half):
        stretched = min(1.0, max(0.0, (i - first) / width))
        factors.append(1 / (stretched / factor + 1 - stretched))
    return factors


def _yarn_magnitude(scaling: Fields, factor: float) -> float:
    def grown(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    mscale = scaling.float("mscale", 0.0, low=0.0)
    all_dim = scaling.float("mscale_all_dim", 0.0, low=0.0)
    return grown(mscale) / grown(all_dim) if mscale and all_dim else grown(1.0)


def _longrope(scaling: Fields, for_short: bool, use: RopeUse) -> list[float]:
    short = scaling.floats("short_factor", use.half)
    long = scaling.floats("long_factor", use.half)
    return list(short if for_short else long)


def _longrope_magnitude(scaling: Fields, original: int, use: RopeUse) -> float:
    factor = scaling.float("factor", use.model_context / original)
    if factor <= 1 or original < 2:
        return 1.0
    return math.sqrt(1 + math.log(factor) / math.log(original))
