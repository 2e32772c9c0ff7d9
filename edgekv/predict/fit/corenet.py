"""Imports KV-prediction checkpoints of apple/corenet: OpenELM pairs trained as in the paper.

    base.*                                                      the base; unchanged, so left out
    auxiliary.*                                                 the auxiliary, trained with the maps
    predicter.auxkv_to_basekv.{key,value}_transforms.{i}.*      the maps, (out, in) and bias

No such checkpoint has been released; names and shapes are those of corenet's code.
"""

import json
import shutil
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np

from edgekv.device import profile
from edgekv.errors import CheckpointCorrupt, ConfigError, UnsupportedModel
from edgekv.models.cache import Progress
from edgekv.models.fingerprint import weights_fingerprint
from edgekv.models.folder_files import CONFIG_FILE
from edgekv.models.open_model import OpenModel, open_decoder
from edgekv.predict.artifact import PredictorInfo, check_fits, save_predictor
from edgekv.predict.features import place_width
from edgekv.predict.fit.shapes import FeatureOptions, block_shapes
from edgekv.predict.fit.torch_file import read_torch
from edgekv.predict.opening import open_pair
from edgekv.predict.predictor import Block, Predictor
from edgekv.predict.prune import fraction_of, kept_layers
from edgekv.predict.tensor_file import check_writable, load_safetensors, write_safetensors

_MAPS = "predicter.auxkv_to_basekv."
_PER_LAYER = ("num_query_heads", "num_kv_heads", "ffn_multipliers")


def import_corenet(
    checkpoint: Path, out: Path, *, base: str, aux: str, progress: Progress | None = None
) -> PredictorInfo:
    """Write a predictor's file, and its trained auxiliary as a folder named `OUT.aux` beside it.

    Args:
        checkpoint: A PyTorch checkpoint, or the same tensors as safetensors.
        out: The predictor's file.
        base: The base model that it was trained for.
        aux: An OpenELM model of the auxiliary's shape, or `prune:FRACTION` of the base.
        progress: Told of a download.

    Raises:
        ConfigError: The predictor cannot be written, or the auxiliary's folder is there already.
        OSError: The disk is full.
        CheckpointCorrupt, PredictorCorrupt: A tensor is missing or has another shape.
        UnsupportedModel: The base is no OpenELM folder.
        ModelError: A model cannot be had.
    """
    check_writable(out)
    folder = out.with_name(f"{out.name}.aux")
    if folder.exists():
        raise ConfigError(
            f"{folder}, where its auxiliary would be written, is there already",
            hint="pass another -o, or remove it",
        )
    tensors = _read(checkpoint)
    model, like = open_pair(base, aux, progress=progress)
    fraction = fraction_of(aux)
    with tempfile.TemporaryDirectory(dir=out.parent) as place:
        half = Path(place) / folder.name
        _write_auxiliary(half, like, tensors, fraction)
        auxiliary = open_decoder(half, profile())
        predictor = _predictor(model, auxiliary.config.num_layers, tensors, fraction, checkpoint)
        check_fits(predictor, model.decoder.config, auxiliary.config, checkpoint)
        info = PredictorInfo(
            kind="aux",
            depth=auxiliary.config.num_layers,
            features="paper",
            neighbours=0,
            rank=None,
            base=model.name,
            base_fingerprint=model.fingerprint,
            aux=str(folder.resolve()),
            aux_fingerprint=weights_fingerprint(half),
            tokenizer_fingerprint=model.tokenizer.fingerprint,
            corpus=f"trained with corenet: {checkpoint.name}",
            num_tokens=0,
        )
        save_predictor(out, predictor, info)
        half.rename(folder)
    return info


def _read(path: Path) -> dict[str, np.ndarray]:
    if path.suffix != ".safetensors":
        return read_torch(path)
    try:
        loaded, _ = load_safetensors(path)
    except (RuntimeError, OSError) as error:
        raise CheckpointCorrupt(f"{path}: {error}") from error
    return {name: np.array(array.astype(mx.float32)) for name, array in loaded.items()}


def _predictor(
    model: OpenModel,
    num_aux: int,
    tensors: dict[str, np.ndarray],
    fraction: str,
    checkpoint: Path,
) -> Predictor:
    config = model.decoder.config
    shapes = block_shapes("aux", num_aux, config, FeatureOptions(features="paper"), fraction)
    blocks = []
    for taps, targets in shapes:
        (target,) = targets
        name = f"{_MAPS}{target.part}_transforms.{target.layer}"
        width = place_width(target.place, config)
        weight = _take(tensors, f"{name}.weight", 2, width, checkpoint)
        bias = mx.array(_take(tensors, f"{name}.bias", 1, width, checkpoint))
        up = mx.array(np.ascontiguousarray(weight.T))
        blocks.append(Block(taps=taps, targets=targets, down=None, up=up, bias=bias))
    return Predictor("aux", num_aux, tuple(blocks))


def _take(
    tensors: dict[str, np.ndarray], name: str, ndim: int, rows: int, checkpoint: Path
) -> np.ndarray:
    array = tensors.get(name)
    if array is None:
        raise CheckpointCorrupt(f"{checkpoint}: tensor {name!r} is missing")
    if array.ndim != ndim or len(array) != rows:
        wanted = "a vector" if ndim == 1 else "a matrix"
        raise CheckpointCorrupt(
            f"{checkpoint}: tensor {name!r} is {array.shape}, not {wanted} of {rows} rows"
        )
    return array


def _write_auxiliary(
    folder: Path, like: OpenModel, tensors: dict[str, np.ndarray], fraction: str
) -> None:
    """The trained auxiliary as a Hugging Face folder."""
    if not like.path.is_dir() or like.decoder.config.family != "openelm":
        raise UnsupportedModel(
            f"{like.name} is no OpenELM folder", hint="corenet's pairs are OpenELM models"
        )
    config = json.loads((like.path / CONFIG_FILE).read_text(encoding="utf-8"))
    if fraction:
        kept = kept_layers(fraction, config["num_transformer_layers"])
        config["num_transformer_layers"] = len(kept)
        for field in _PER_LAYER:
            config[field] = [config[field][layer] for layer in kept]
    arrays = {
        f"transformer.{name.removeprefix('auxiliary.')}": mx.array(array)
        for name, array in tensors.items()
        if name.startswith("auxiliary.")
    }
    folder.mkdir()
    for path in like.path.iterdir():
        if path.is_file() and path.suffix in {".json", ".model"} and "index" not in path.name:
            shutil.copyfile(path, folder / path.name)
    (folder / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
    write_safetensors(folder / "model.safetensors", arrays, {"format": "mlx"})
