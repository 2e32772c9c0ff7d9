"""Which taps and targets a feature set means for a pair of models."""

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from edgekv.config import check_choice, check_int
from edgekv.errors import ConfigError
from edgekv.models.config import DecoderConfig, prompt_macs
from edgekv.predict.features import Tap, place_width
from edgekv.predict.predictor import PARTS, Kind, Target
from edgekv.predict.prune import source_layer

FeatureSet = Literal["all", "mapped", "paper"]
_HIDDEN_EVERY = 2  # layers, for kind "self"
_AUX_DEPTHS = 3  # hidden states of an auxiliary model, evenly spaced
RANK_MIN = 512
_MAP_SHARE = 0.04  # of the base's multiplications, where that is room for more than that rank


class BlockShape(NamedTuple):
    """A block before it is fitted."""

    taps: tuple[Tap, ...]
    targets: tuple[Target, ...]


@dataclass(frozen=True, kw_only=True)
class FeatureOptions:
    """What a predictor looks at."""

    # "paper": the mapped auxiliary layer, keys to keys and values to values. "mapped": the mapped
    # layer and those on both sides, keys and values together. "all": keys and values of all layers
    # and hidden states of several depths; for kind "self" hidden states alone, of which its keys
    # and values are linear maps.
    features: FeatureSet = "all"
    neighbours: int = 2  # previous tokens whose hidden states are looked at too; not for "paper"
    neighbour_depths: int = 1  # at how many depths, the last layer's first

    def __post_init__(self) -> None:
        check_choice("features", self.features, get_args(FeatureSet))
        check_int("neighbours", self.neighbours, 0, 16)
        check_int("neighbour depths", self.neighbour_depths, 1, 64)


def mapped_layer(layer: int, num_base: int, num_aux: int) -> int:
    """The auxiliary layer that feeds a base layer (arXiv 2410.08391).

    With n_base = q n_aux + r, the first r auxiliary layers feed q + 1 base layers each, the rest q.
    """
    quotient, rest = divmod(num_base, num_aux)
    wide = rest * (quotient + 1)
    return layer // (quotient + 1) if layer < wide else rest + (layer - wide) // max(1, quotient)


def block_shapes(
    kind: Kind, depth: int, base: DecoderConfig, options: FeatureOptions, fraction: str = ""
) -> tuple[BlockShape, ...]:
    """The blocks of a predictor; `fraction` is of the base, if the auxiliary is cut out of it.

    Raises:
        ConfigError: No layer would be left to predict, or none to predict from.
    """
    if kind == "self" and not 1 <= depth < base.num_layers:
        raise ConfigError.of("self-depth", depth, f"from 1 to {base.num_layers - 1}")
    first = depth if kind == "self" else 0
    layers = range(first, base.num_layers)
    if options.features == "all":
        taps = (*_all_taps(kind, depth), *_neighbour_taps(depth, options))
        targets = tuple(Target(layer, part) for layer in layers for part in PARTS)
        return (BlockShape(taps, targets),)
    shapes = []
    for layer in layers:
        if fraction:
            at = source_layer(fraction, layer)
        else:
            at = mapped_layer(layer - first, base.num_layers - first, depth)
        if options.features == "paper":
            shapes += [BlockShape((Tap(part, at),), (Target(layer, part),)) for part in PARTS]
            continue
        near = range(max(0, at - 1), min(depth, at + 2))
        mapped = [Tap(part, index) for index in near for part in PARTS]
        taps = (*mapped, *_neighbour_taps(depth, options))
        shapes.append(BlockShape(taps, tuple(Target(layer, part) for part in PARTS)))
    return tuple(shapes)


def usual_rank(shapes: tuple[BlockShape, ...], base: DecoderConfig, aux: DecoderConfig) -> int:
    """What rank the factors of all blocks have that take 4% of the base's multiplications.

    512 is enough for the default model; of a base with three times as many keys and values it loses
    most of what full rank recalls (measured: see docs/prediction.md).
    """
    width = sum(
        sum(place_width(tap.place, aux) for tap in shape.taps)
        + sum(place_width(target.place, base) for target in shape.targets)
        for shape in shapes
    )
    return max(RANK_MIN, int(_MAP_SHARE * prompt_macs(base, 0, 1) / width))


def _all_taps(kind: Kind, depth: int) -> tuple[Tap, ...]:
    if kind == "self":
        return tuple(Tap("hidden", index) for index in sorted(range(depth, 0, -_HIDDEN_EVERY)))
    depths = sorted({depth - depth * i // _AUX_DEPTHS for i in range(_AUX_DEPTHS)})
    return (
        *(Tap(part, layer) for layer in range(depth) for part in PARTS),
        *(Tap("hidden", index) for index in depths),
    )


def _neighbour_taps(depth: int, options: FeatureOptions) -> tuple[Tap, ...]:
    step = max(1, depth // options.neighbour_depths)
    depths = [depth - step * i for i in range(options.neighbour_depths)]
    return tuple(
        Tap("hidden", index, lag)
        for index in depths
        if index > 0
        for lag in range(1, options.neighbours + 1)
    )
