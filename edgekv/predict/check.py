"""Does a predictor's body fit the models that its metadata name?

Fingerprints say what it was made for; a file can be right about that and wrong inside.
"""

from pathlib import Path

from edgekv.errors import PredictorCorrupt
from edgekv.models.config import DecoderConfig
from edgekv.predict.features import Tap, place_width
from edgekv.predict.predictor import Block, Predictor, Target

_LAG_MAX = 64


def check_fits(predictor: Predictor, base: DecoderConfig, aux: DecoderConfig, path: Path) -> None:
    """Make sure that every feature exists and every prediction has its place.

    Args:
        predictor: As it was loaded.
        base: Of the model whose KV it predicts.
        aux: Of the model that it looks at; the base's for kind "self".
        path: Its file, for the error.

    Raises:
        PredictorCorrupt: It does not fit.
    """
    try:
        last = base.num_layers - 1 if predictor.kind == "self" else aux.num_layers
        _demand(predictor.kind in ("self", "aux"), f"kind {predictor.kind!r}")
        _demand(0 < predictor.depth <= last, f"depth {predictor.depth} of {aux.num_layers} layers")
        for index, block in enumerate(predictor.blocks):
            width = sum(_tap_width(tap, predictor.depth, aux) for tap in block.taps)
            found = (block.up if block.down is None else block.down).shape[0]
            _demand(found == width, f"block {index}: {found} features, {width} are tapped")
            _check_targets(index, block, base)
        _check_coverage(predictor, base)
    except (ValueError, TypeError) as error:
        raise PredictorCorrupt(f"{path}: it does not fit its models: {error}") from error


def _tap_width(tap: Tap, depth: int, aux: DecoderConfig) -> int:
    _demand(0 <= tap.lag <= _LAG_MAX, f"a tap {tap.lag} tokens back")
    _demand(tap.kind in ("hidden", "key", "value"), f"a tap of kind {tap.kind!r}")
    last = depth if tap.kind == "hidden" else depth - 1
    _demand(0 <= tap.index <= last, f"a tap of {tap.kind} {tap.index} of {depth} layers")
    return place_width(tap.place, aux)


def _check_targets(index: int, block: Block, base: DecoderConfig) -> None:
    width = 0
    for target in block.targets:
        _demand(
            target.part in ("key", "value") and 0 <= target.layer < base.num_layers,
            f"target {target.part!r} of layer {target.layer} of {base.num_layers}",
        )
        width += place_width(target.place, base)
    found = block.up.shape[1]
    _demand(found == width, f"block {index}: {found} outputs, {width} are predicted")


def _check_coverage(predictor: Predictor, base: DecoderConfig) -> None:
    found = sorted(target for block in predictor.blocks for target in block.targets)
    layers = range(predictor.first_layer, base.num_layers)
    wanted = sorted(Target(layer, part) for layer in layers for part in ("key", "value"))
    _demand(found == wanted, "not every layer's keys and values are predicted once")


def _demand(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)
