"""Predictors that come with edgekv, and how one is named."""

from dataclasses import dataclass
from pathlib import Path

from edgekv.errors import PredictorNotFound
from edgekv.predict.artifact import SUFFIX, PredictorInfo, read_info

FOLDER = Path(__file__).parent / "shipped"


@dataclass(frozen=True, kw_only=True)
class ShippedPredictor:
    """A predictor that comes with edgekv."""

    name: str
    path: Path
    info: PredictorInfo


def shipped_predictors(model: str) -> list[ShippedPredictor]:
    """Those for a model by name, the deepest, which is nearest to exact, first."""
    found = [
        ShippedPredictor(name=path.name.removesuffix(SUFFIX), path=path, info=read_info(path))
        for path in sorted(FOLDER.glob(f"*{SUFFIX}"))
    ]
    mine = [predictor for predictor in found if predictor.info.base == model]
    return sorted(mine, key=lambda predictor: -predictor.info.depth)


def find_predictor(model: str, predictor: str | Path | None) -> Path:
    """The file that `PredictionOptions.predictor` means.

    Raises:
        PredictorNotFound: Neither a file nor the name of one that comes with edgekv for the model.
    """
    shipped = shipped_predictors(model)
    if predictor is None and shipped:
        return shipped[0].path
    if predictor is not None:
        for known in shipped:
            if predictor == known.name:
                return known.path
        path = Path(predictor).expanduser()
        if path.is_file():
            return path
    names = ", ".join(known.name for known in shipped)
    what = f"no KV predictor {str(predictor)!r}" if predictor else "no KV predictor"
    raise PredictorNotFound(
        f"there is {what} for {model}",
        hint=f"known: {names}; or fit one" if names else "fit one: edgekv fit --base ...",
    )
