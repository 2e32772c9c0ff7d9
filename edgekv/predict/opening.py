"""Opens what belongs together: a base and its auxiliary, a predictor and its models."""

from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from edgekv.errors import ConfigError, PredictorMismatch
from edgekv.models.cache import Progress
from edgekv.models.open_model import OpenModel, open_model
from edgekv.predict.artifact import PredictorInfo, check_fits, check_made_for, load_predictor
from edgekv.predict.predictor import Predictor
from edgekv.predict.prune import PREFIX, open_auxiliary


class OpenPredictor(NamedTuple):
    """A predictor that fits its models, and from whose pass it predicts: the base's, if "self"."""

    predictor: Predictor
    info: PredictorInfo
    aux: OpenModel


def open_pair(
    base: str, aux: str | None, *, progress: Progress | None = None
) -> tuple[OpenModel, OpenModel]:
    """A base and its auxiliary; the base itself where there is none.

    Raises:
        PredictorMismatch: They have different tokenizers.
        ConfigError: There is no such pruning.
        ModelError: A model cannot be had.
    """
    model = open_model(base, progress=progress)
    if aux is None:
        return model, model
    other = open_auxiliary(aux, model, progress=progress)
    if other.tokenizer.fingerprint != model.tokenizer.fingerprint:
        raise PredictorMismatch(
            f"the tokenizer of {model.name} has fingerprint {model.tokenizer.fingerprint}, that of "
            f"{other.name} {other.tokenizer.fingerprint}",
            hint="an auxiliary must make the same ids of a text as the base does",
        )
    return model, other


def open_predictor(
    base: OpenModel, file: Path, aux: OpenModel | None = None, *, dtype: mx.Dtype | None = None
) -> OpenPredictor:
    """Load a predictor for `base` and make sure that it fits its models.

    Its arrays are in the compute dtype of the base, or in the one that is asked for; `aux` is its
    auxiliary, where that is a model of its own.

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
        raise ConfigError(
            f"{file} needs its auxiliary model",
            hint=f"name it: --aux {info.aux} (in a program aux={info.aux!r})",
        )
    check_made_for(info, file, base=base.fingerprint, aux=aux.fingerprint)
    check_fits(predictor, base.decoder.config, aux.decoder.config, file)
    return OpenPredictor(predictor, info, aux)
