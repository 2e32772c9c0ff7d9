"""Predictors that come with edgekv, and how one is named."""

from dataclasses import dataclass
from pathlib import Path

from edgekv.config import user_path
from edgekv.errors import PredictorNotFound
from edgekv.predict.artifact import PredictorInfo, read_info
from edgekv.predict.tensor_file import SUFFIX

FIT_HINT = "fit one: edgekv fit --base {} --self-depth LAYERS -o FILE"
FOLDER = Path(__file__).parent / "shipped"


@dataclass(frozen=True, kw_only=True)
class ShippedPredictor:
    """A predictor that comes with edgekv."""

    name: str
    path: Path
    info: PredictorInfo


def shipped_predictors(model: str, fingerprint: str | None = None) -> list[ShippedPredictor]:
    """Those for a model, the deepest, which is nearest to exact, first.

    Args:
        model: Its name.
        fingerprint: Of its weights, if they are known: it may go by another name, or a path.
    """
    mine = [
        known
        for known in _all()
        if known.info.base == model or known.info.base_fingerprint == fingerprint
    ]
    return sorted(mine, key=lambda predictor: -predictor.info.depth)


def _all() -> list[ShippedPredictor]:
    return [
        ShippedPredictor(name=path.name.removesuffix(SUFFIX), path=path, info=read_info(path))
        for path in sorted(FOLDER.glob(f"*{SUFFIX}"))
    ]


def find_predictor(
    model: str, predictor: str | Path | None, fingerprint: str | None = None
) -> Path:
    """The file that `PredictionOptions.predictor` means.

    Args:
        model: Name of the model that it is for.
        predictor: A file, or the name of one that comes with edgekv; None is the first of those
            for the model.
        fingerprint: Of the model's weights, if they are known.

    Raises:
        PredictorNotFound: There is none.
    """
    shipped = shipped_predictors(model, fingerprint)
    if predictor is None and shipped:
        return shipped[0].path
    if predictor is not None:
        for known in _all():
            if predictor == known.name:
                return known.path
        path = user_path(predictor)
        if path.is_file():
            return path
    names = ", ".join(known.name for known in shipped)
    what = f"no KV predictor {str(predictor)!r}" if predictor else "no KV predictor"
    raise PredictorNotFound(
        f"there is {what} for {model}",
        hint=f"known: {names}; or fit one" if names else FIT_HINT.format(model),
    )
