"""Predictors that come with edgekv, and how one is named."""

from dataclasses import dataclass
from pathlib import Path

from edgekv.config import user_path
from edgekv.errors import PredictorNotFound
from edgekv.predict.artifact import PredictorInfo, read_info
from edgekv.predict.tensor_file import SUFFIX

FOLDER = Path(__file__).parent / "shipped"


@dataclass(frozen=True, kw_only=True)
class ShippedPredictor:
    """A predictor that comes with edgekv."""

    name: str
    path: Path
    info: PredictorInfo


def shipped_predictors(model: str, fingerprint: str | None = None) -> list[ShippedPredictor]:
    """Those for a model by its name, or by the fingerprint of its weights, whatever its name is.

    The deepest, which is nearest to exact, comes first.
    """
    mine = [
        one for one in _all() if model == one.info.base or fingerprint == one.info.base_fingerprint
    ]
    return sorted(mine, key=lambda one: -one.info.depth)


def _all() -> list[ShippedPredictor]:
    return [
        ShippedPredictor(name=path.name.removesuffix(SUFFIX), path=path, info=read_info(path))
        for path in sorted(FOLDER.glob(f"*{SUFFIX}"))
    ]


def find_predictor(
    model: str, predictor: str | Path | None, fingerprint: str | None = None
) -> Path:
    """The file that `PredictionOptions.predictor` means; of the model see `shipped_predictors`.

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
    hint = f"fit one: edgekv fit --base {model} --self-depth LAYERS -o FILE"
    if names:
        hint = f"known: {names}; or fit one"
    raise PredictorNotFound(f"there is {what} for {model}", hint=hint)
