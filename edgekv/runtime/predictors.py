"""Finds and loads the predictor that a runtime's options ask for."""

from pathlib import Path

import mlx.core as mx

from edgekv.config import PredictionOptions
from edgekv.device import DeviceProfile
from edgekv.engine.prefill import PredictedPrefill, side_bytes
from edgekv.errors import ConfigError
from edgekv.kv.layout import KVLayout
from edgekv.kv.pool import KVPool
from edgekv.models.config import prompt_macs
from edgekv.models.decoder import Decoder
from edgekv.models.fingerprint import weights_fingerprint
from edgekv.models.hub import resolve
from edgekv.models.open_model import open_decoder
from edgekv.predict.artifact import (
    PredictorInfo,
    check_fits,
    check_made_for,
    load_predictor,
)
from edgekv.predict.predictor import Predictor
from edgekv.predict.prune import PREFIX, fraction_of, pruned, pruned_fingerprint
from edgekv.predict.shipped import find_predictor
from edgekv.predict.state import Prediction, side_layout

_TYPICAL_TOKENS = 1024  # at which the cost of a predicted row is compared with an exact one


def load_prefill(
    base: Decoder,
    path: Path,
    model: str,
    device: DeviceProfile,
    options: PredictionOptions,
    tokenizer: str,
    layout: KVLayout,
    budget_bytes: int,
) -> PredictedPrefill:
    """Load the predictor, and its auxiliary model if it has one; set memory aside for it.

    Args:
        base: The model.
        path: Its file or folder.
        model: Its name.
        device: What it runs on.
        options: Which predictor.
        tokenizer: Fingerprint of the model's tokenizer.
        layout: Of the model's KV.
        budget_bytes: Of all KV; a part of it becomes the strategy's own.

    Raises:
        PredictorNotFound, PredictorCorrupt, PredictorMismatch: Of the predictor.
        ConfigError: Its auxiliary model is not named.
        ModelError: That cannot be loaded.
    """
    dtype: mx.Dtype = getattr(mx, device.compute_dtype)
    base_print = weights_fingerprint(path)
    file = find_predictor(model, options.predictor, base_print)
    predictor, info = load_predictor(file, dtype)
    aux, aux_print = base, base_print
    if predictor.kind == "aux":
        aux, aux_print = _open_aux(options.aux or _cut_from_base(info), base, base_print, device)
    check_made_for(info, file, base=base_print, aux=aux_print, tokenizer=tokenizer)
    check_fits(predictor, base.config, aux.config, file)
    prediction = Prediction(predictor=predictor, aux=aux, row_share=row_share(base, aux, predictor))
    pool = KVPool(
        side_layout(prediction, layout), dtype, side_bytes(prediction, layout, budget_bytes)
    )
    return PredictedPrefill(prediction, pool, options, base.config.num_layers)


def _cut_from_base(info: PredictorInfo) -> str:
    """The auxiliary's name if nothing but the base is needed to make it.

    Raises:
        ConfigError: It is a model of its own.
    """
    if not info.aux.startswith(PREFIX):
        raise ConfigError(
            f"a predictor for {info.base} needs its auxiliary model",
            hint=f"name it: --aux {info.aux} (in a program aux={info.aux!r})",
        )
    return info.aux


def _open_aux(
    reference: str, base: Decoder, base_print: str, device: DeviceProfile
) -> tuple[Decoder, str]:
    if reference.startswith(PREFIX):
        fraction = fraction_of(reference)
        return pruned(base, fraction), pruned_fingerprint(base_print, reference)
    path = resolve(reference)
    return open_decoder(path, device), weights_fingerprint(path)


def row_share(base: Decoder, aux: Decoder, predictor: Predictor) -> float:
    """What a predicted row costs, in multiplications, relative to an exact one."""
    config = base.config if predictor.kind == "self" else aux.config
    predicted = prompt_macs(config, 0, _TYPICAL_TOKENS, last_layer=predictor.depth)
    predicted += _TYPICAL_TOKENS * predictor.num_macs
    return predicted / prompt_macs(base.config, 0, _TYPICAL_TOKENS)
