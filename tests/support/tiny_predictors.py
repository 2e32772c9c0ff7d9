"""Predictors for tiny random models: one that changes nothing, and one that is fitted."""

from pathlib import Path

import mlx.core as mx
import numpy as np
from stepping import CPU_PROFILE
from tiny_models import VOCAB_SIZE

from edgekv.device import DeviceProfile
from edgekv.models.decoder import Decoder
from edgekv.models.fingerprint import weights_fingerprint
from edgekv.models.open_model import open_decoder, open_tokenizer
from edgekv.predict.artifact import PredictorInfo, save_predictor
from edgekv.predict.fit.closed_form import Fit
from edgekv.predict.fit.shapes import FeatureOptions, block_shapes
from edgekv.predict.fit.thin import ThinOptions, fit_thin
from edgekv.predict.predictor import Block, Kind, Predictor


def load(folder: Path, profile: DeviceProfile = CPU_PROFILE) -> Decoder:
    """The decoder of a tiny model."""
    return open_decoder(folder, profile)


def random_ids(num_tokens: int, seed: int) -> list[int]:
    """Ordinary tokens."""
    return [int(i) for i in np.random.default_rng(seed).integers(4, VOCAB_SIZE, num_tokens)]


def identity(base: Decoder) -> Predictor:
    """Kind "aux", the auxiliary being the base itself: predicts exactly what is exact."""
    shapes = block_shapes(
        "aux", base.config.num_layers, base.config, FeatureOptions(features="paper")
    )
    blocks = []
    for shape in shapes:
        layer = base.config.layers[shape.targets[0].layer]
        width = layer.num_kv_heads * layer.head_dim
        blocks.append(
            Block(
                taps=shape.taps,
                targets=shape.targets,
                down=None,
                up=mx.eye(width),
                bias=mx.zeros((width,)),
            )
        )
    return Predictor("aux", base.config.num_layers, tuple(blocks))


def fitted(
    base: Decoder, kind: Kind, depth: int, *, rank: int | None = None, **options: object
) -> Predictor:
    """Fitted to random tokens; the auxiliary is the base's own first layers."""
    shapes = block_shapes(kind, depth, base.config, FeatureOptions(**options))  # type: ignore[arg-type]
    fit = Fit(base, base, kind, depth, shapes, rank=rank)
    for seed in range(32):
        fit.add(random_ids(48, seed))
    fit.end_pass()
    predictor, _ = fit.predictor()
    return predictor


def fitted_thin(
    base: Decoder, depth: int, *, attending: int, neurons: int, heads: int | None = None
) -> Predictor:
    """Thin layers in place of the base's later ones, fitted to random tokens."""
    pieces = [random_ids(48, seed) for seed in range(32)]
    options = ThinOptions(attending=attending, heads=heads, neurons=neurons)
    return fit_thin(base, depth, options, pieces)


def write_predictor(path: Path, predictor: Predictor, folder: Path) -> Path:
    """As a file, made for the model in a folder, which is its own auxiliary."""
    made_for = weights_fingerprint(folder)
    info = PredictorInfo(
        kind=predictor.kind,
        depth=predictor.depth,
        features="all",
        neighbours=2,
        rank=None,
        base=str(folder),
        base_fingerprint=made_for,
        aux="" if predictor.kind == "self" else str(folder),
        aux_fingerprint=made_for,
        tokenizer_fingerprint=open_tokenizer(folder).fingerprint,
        corpus="random tokens",
        num_tokens=32 * 48,
    )
    save_predictor(path, predictor, info)
    return path


def write_predictors(folder: Path, root: Path, *names: str) -> dict[str, Path]:
    """Files by name: "self", "aux" and "thin" are fitted, "identity" says what is exact."""
    base, files = load(folder), {}
    for name in names:
        if name == "identity":
            predictor = identity(base)
        elif name == "thin":
            # Worse than it could be, so that answers are corrected.
            found = fitted_thin(base, 2, attending=1, heads=1, neurons=8)
            predictor = found.mapped(lambda _, array: 0.3 * array)
        else:
            predictor = fitted(base, name, 2)  # type: ignore[arg-type]
        files[name] = write_predictor(root / f"{name}.safetensors", predictor, folder)
    return files
