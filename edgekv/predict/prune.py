"""Auxiliary models cut out of a base: some of its layers, KVP-LP of arXiv 2410.08391."""

from dataclasses import replace

from edgekv.errors import ConfigError
from edgekv.models.cache import Progress
from edgekv.models.decoder import Decoder
from edgekv.models.open_model import OpenModel, open_model

PREFIX = "prune:"
_KEPT = {"0.25": (0,), "0.5": (0, 2), "0.75": (0, 1, 2)}  # of every four layers


def kept_layers(fraction: str, num_layers: int) -> list[int]:
    """Which of a base's layers its pruned auxiliary has."""
    return [layer for layer in range(num_layers) if layer % 4 in _KEPT[fraction]]


def source_layer(fraction: str, layer: int) -> int:
    """The auxiliary's layer that feeds a base layer."""
    per_four = len(_KEPT[fraction])
    place = {1: (0, 0, 0, 0), 2: (0, 0, 1, 1), 3: (0, 1, 2, 2)}[per_four][layer % 4]
    return per_four * (layer // 4) + place


def pruned(base: Decoder, fraction: str) -> Decoder:
    """The base without some of its layers; weights are shared, not copied."""
    kept = kept_layers(fraction, base.config.num_layers)
    config, whole = (
        replace(of, layers=tuple(of.layers[i] for i in kept)) for of in (base.config, base.whole)
    )
    weights = replace(base.weights, layers=tuple(base.weights.layers[i] for i in kept))
    return Decoder(config, weights, base.device, base.group, whole)


def open_auxiliary(
    reference: str, base: OpenModel, *, progress: Progress | None = None
) -> OpenModel:
    """An auxiliary by its reference: a model's, or `prune:0.25`, `prune:0.5`, `prune:0.75`.

    Raises:
        ConfigError: There is no such pruning.
        ModelError: The model cannot be had.
    """
    fraction = fraction_of(reference)
    if not fraction:
        return open_model(reference, progress=progress)
    fingerprint = pruned_fingerprint(base.fingerprint, reference)
    decoder = pruned(base.decoder, fraction)
    return replace(base, name=reference, decoder=decoder, fingerprint=fingerprint)


def fraction_of(reference: str | None) -> str:
    """The part of the layers that `prune:FRACTION` keeps; "" of any other reference.

    Raises:
        ConfigError: There is no such pruning.
    """
    if reference is None or not reference.startswith(PREFIX):
        return ""
    fraction = reference.removeprefix(PREFIX)
    if fraction not in _KEPT:
        raise ConfigError.of("prune", fraction, " or ".join(_KEPT))
    return fraction


def pruned_fingerprint(base: str, reference: str) -> str:
    """Fingerprint of the auxiliary that is cut out of a base with this fingerprint."""
    return f"{base}:{reference}"
