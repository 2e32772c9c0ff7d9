"""Opens what belongs together: a base and its auxiliary, a predictor and its models."""

from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from edgekv.errors import ConfigError, PredictorMismatch, UnsupportedModel
from edgekv.models.cache import Progress
from edgekv.models.open_model import OpenModel, open_model
from edgekv.predict.artifact import PredictorInfo, check_fits, check_made_for, load_predictor
from edgekv.predict.predictor import Predictor
from edgekv.predict.prune import PREFIX, open_auxiliary
from edgekv.predict.thin import check_thinnable


class OpenPredictor(NamedTuple):
    """A predictor that fits its models, and from whose pass it predicts: the base's, if "self"."""

    predictor: Predictor
    info: PredictorInfo
    aux: OpenModel


def check_predictable(model: OpenModel) -> None:
    """Make sure that all of a model's KV is keys and values of heads, each layer's own.

    Raises:
        UnsupportedModel: It is not, with the reason.
    """
    layers, why = model.decoder.config.layers, ""
    if any(layer.recurrent for layer in layers):
        why = "it has recurrent layers: their states cannot be predicted, nor be repaired in part"
    elif any(layer.latent is not None for layer in layers):
        why = "it caches latents, and predictors are maps to keys and values of heads"
    elif any(layer.kv_from is not None for layer in layers):
        why = "its last layers read the KV of others; its prompts stop before these, exactly"
    elif model.decoder.config.value_norm or any(layer.values_are_keys for layer in layers):
        why = "its values are norms of projections or of keys, which predictors are not made for"
    if why:
        raise UnsupportedModel(
            f"KV of {model.name} cannot be predicted: {why}", hint="leave prediction off for it"
        )


def open_pair(
    base: str, aux: str | None, *, progress: Progress | None = None
) -> tuple[OpenModel, OpenModel]:
    """A base and its auxiliary; the base itself where there is none.

    Raises:
        PredictorMismatch: They have different tokenizers.
        ConfigError: There is no such pruning.
        ModelError: A model cannot be had, or its KV not be predicted.
    """
    model = open_model(base, progress=progress)
    check_predictable(model)
    if aux is None:
        return model, model
    other = open_auxiliary(aux, model, progress=progress)
    check_predictable(other)
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
    """Load a predictor for `base`, or for its part of one, and make sure that it fits its models.

    Its arrays are in the compute dtype of the base, or in the one that is asked for; `aux` is its
    auxiliary, where that is a model of its own.

    Raises:
        PredictorCorrupt, PredictorMismatch: Of the predictor.
        ConfigError: It needs an auxiliary model.
        UnsupportedModel: See `check_predictable`.
    """
    check_predictable(base)
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
    check_predictable(aux)
    check_made_for(info, file, base=base.fingerprint, aux=aux.fingerprint)
    check_fits(predictor, base.decoder.whole, aux.decoder.whole, file)
    if predictor.thin:
        check_thinnable(base.decoder, predictor.depth, base.name)
    return OpenPredictor(predictor.part_for(base.decoder), info, aux)
