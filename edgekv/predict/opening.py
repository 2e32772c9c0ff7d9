"""A predictor's file, with the models that it was made for."""

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from edgekv.errors import ConfigError
from edgekv.models.open_model import OpenModel
from edgekv.predict.artifact import PredictorInfo, check_made_for, load_predictor
from edgekv.predict.check import check_fits
from edgekv.predict.predictor import Predictor
from edgekv.predict.prune import PREFIX, open_auxiliary


@dataclass(frozen=True, kw_only=True)
class OpenPredictor:
    """A predictor that fits its models.

    Attributes:
        predictor: Its arrays are in the compute dtype of the base, or in the one asked for.
        info: What it was made of.
        aux: From whose pass it predicts; the base for kind "self".
    """

    predictor: Predictor
    info: PredictorInfo
    aux: OpenModel


def open_predictor(
    base: OpenModel, file: Path, aux: OpenModel | None = None, *, dtype: mx.Dtype | None = None
) -> OpenPredictor:
    """Load a predictor and make sure that it fits its models.

    Args:
        base: Whose KV it predicts.
        file: Where it is.
        aux: Its auxiliary, where that is a model of its own.
        dtype: Of its arrays.

    Raises:
        PredictorCorrupt, PredictorMismatch: Of the predictor.
        ConfigError: It needs an auxiliary model.
    """
    predictor, info = load_predictor(file, dtype or base.decoder.weights.final_norm.dtype)
    if predictor.kind == "self":
        aux = base
    elif aux is None and info.aux.startswith(PREFIX):
        aux = open_auxiliary(info.aux, base)
    if aux is None:
        raise ConfigError(f"{file} needs its auxiliary model", hint=f"pass --aux {info.aux}")
    check_made_for(
        info,
        file,
        base=base.fingerprint,
        aux=aux.fingerprint,
        tokenizer=base.tokenizer.fingerprint,
    )
    check_fits(predictor, base.decoder.config, aux.decoder.config, file)
    return OpenPredictor(predictor=predictor, info=info, aux=aux)
