"""A predictor as a file: one safetensors file whose metadata say what it was made of and for.

metadata    edgekv_predictor: "2"       format version; "4" with thin layers
            info: JSON                  `PredictorInfo`
            blocks: JSON                taps and targets of every block
            thin: JSON                  heads and neurons of each thin layer
tensors     {i}.down (F, r), {i}.up (r or F, out), {i}.bias (out,), f16
            thin.{i}.weight (hidden + S, hidden), thin.{i}.bias (hidden,), f16
"""

import json
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import mlx.core as mx

from edgekv.errors import PredictorCorrupt, PredictorMismatch
from edgekv.models.config import DecoderConfig
from edgekv.predict.features import Tap, place_width
from edgekv.predict.gate import NUM_GATES, Gate
from edgekv.predict.predictor import PARTS, Block, Kind, Predictor, Target
from edgekv.predict.tensor_file import load_safetensors, write_safetensors
from edgekv.predict.thin import ThinLayer

FORMAT, THIN_FORMAT = "2", "4"
_LAG_MAX = 64


@dataclass(frozen=True, kw_only=True)
class PredictorInfo:
    """What a predictor was made of.

    Attributes:
        kind, depth: See `Predictor`.
        features, neighbours: Name of the feature set, and previous tokens that it looks at.
        rank: Of the factors; None is full rank.
        base, base_fingerprint: Name of the base model, and of its weights.
        aux, aux_fingerprint: The same of the auxiliary; "" and the base's for kind "self".
        tokenizer_fingerprint: Of the tokenizer that both shared at the fit; for the record.
        corpus, num_tokens: What it was fitted on, and how much of it.
        finetune_steps: Gradient steps after the closed form.
        quality: Figures on held-out text.
        num_answers, critical: See `Gate`.
    """

    kind: Kind
    depth: int
    features: str
    neighbours: int
    rank: int | None
    base: str
    base_fingerprint: str
    aux: str = ""
    aux_fingerprint: str
    tokenizer_fingerprint: str
    corpus: str
    num_tokens: int
    finetune_steps: int = 0
    quality: dict[str, float] = field(default_factory=dict)
    num_answers: int = 0
    critical: list[list[float]] = field(default_factory=lambda: [[]] * NUM_GATES)

    @property
    def gate(self) -> Gate:
        """How sure is sure enough, before anything else was learned of that."""
        return Gate(num_answers=self.num_answers, critical=tuple(map(tuple, self.critical)))

    def uncalibrated(self) -> Self:
        """Of the predictor it is trained to: how sure is sure enough is not known of that."""
        return replace(self, num_answers=0, critical=[[]] * NUM_GATES)


# --- written ---


def save_predictor(path: Path, predictor: Predictor, info: PredictorInfo) -> None:
    """Write a predictor; under its final name there is the whole file or none.

    Raises:
        PredictorCorrupt: Its numbers are not finite, or too large.
        OSError: It cannot be written.
    """
    blocks = [{"taps": block.taps, "targets": block.targets} for block in predictor.blocks]
    metadata = {
        "edgekv_predictor": THIN_FORMAT if predictor.thin else FORMAT,
        "info": json.dumps(asdict(info)),
        "blocks": json.dumps(blocks),
    }
    if predictor.thin:
        thin = [{"heads": one.heads, "neurons": one.neurons} for one in predictor.thin]
        metadata["thin"] = json.dumps(thin)
    write_safetensors(path, predictor.mapped(_half).arrays, metadata)


def as_saved(predictor: Predictor) -> Predictor:
    """A predictor with its numbers as a file has them: rounded to f16.

    Raises:
        PredictorCorrupt: Not all of them are finite there.
    """
    return predictor.mapped(_half).mapped(lambda _, array: array.astype(mx.float32))


def _half(_: str, array: mx.array) -> mx.array:
    half = array.astype(mx.float16)
    if not mx.all(mx.isfinite(half)).item():
        raise PredictorCorrupt("a predictor whose numbers are not finite, or too large for a file")
    return half


# --- read ---


def read_info(path: Path) -> PredictorInfo:
    """What a predictor file says of itself; its tensors are not read.

    Raises:
        PredictorCorrupt: Not a whole predictor of a version that edgekv reads.
    """
    return _read(path)[0]


def load_predictor(path: Path, dtype: mx.Dtype) -> tuple[Predictor, PredictorInfo]:
    """Read a predictor, its arrays in the compute dtype.

    Raises:
        PredictorCorrupt: See `read_info`.
    """
    info, described, layers, tensors = _read(path)
    try:
        blocks = tuple(_block(index, entry, tensors) for index, entry in enumerate(described))
        thin = tuple(_thin_layer(index, entry, tensors) for index, entry in enumerate(layers))
    except (KeyError, TypeError, ValueError) as error:
        raise PredictorCorrupt(f"{path}: {type(error).__name__}: {error}") from error
    if thin and (info.kind != "self" or blocks):
        raise PredictorCorrupt(f"{path}: thin layers are the base's own")
    saved = Predictor(info.kind, info.depth, blocks, thin)
    predictor = saved.mapped(lambda _, array: array.astype(dtype))
    mx.eval(predictor.arrays)
    return predictor, info


def _read(path: Path) -> tuple[PredictorInfo, list[Any], list[Any], dict[str, mx.array]]:
    try:
        tensors, metadata = load_safetensors(path)
        version = metadata.get("edgekv_predictor")
        if version not in (FORMAT, THIN_FORMAT):
            raise PredictorCorrupt(
                f"{path}: predictor format {version!r}; this edgekv reads {FORMAT!r} and "
                f"{THIN_FORMAT!r}"
            )
        info = PredictorInfo(**json.loads(metadata["info"]))
        _check_types(info)
        thin = json.loads(metadata["thin"]) if version == THIN_FORMAT else []
        return info, json.loads(metadata["blocks"]), thin, tensors
    except (RuntimeError, OSError, KeyError, TypeError, ValueError) as error:
        raise PredictorCorrupt(f"{path}: not a predictor: {error}") from error


def _check_types(info: PredictorInfo) -> None:
    """Raise ValueError if a field is not what it is declared to be: others rely on that."""
    numbers = ("depth", "neighbours", "rank", "num_tokens", "finetune_steps", "num_answers")
    wanted_types = dict.fromkeys(numbers, int) | {"quality": dict, "critical": list}
    for name, value in vars(info).items():
        wanted = wanted_types.get(name, str)
        if type(value) is not wanted and not (name == "rank" and value is None):
            raise ValueError(f"{name} is {value!r}, no {wanted.__name__}")
    for name, value in info.quality.items():
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"quality {name} is {value!r}, no number")
    if len(info.critical) != NUM_GATES:
        raise ValueError(f"{info.num_answers} answers were asked {len(info.critical)} times")
    for values in info.critical:
        if any(type(value) not in (int, float) or not math.isfinite(value) for value in values):
            raise ValueError(f"critical values are {values!r}, no numbers")
        if values != sorted(values) or len(values) > info.num_answers:
            raise ValueError(f"{len(values)} critical values of {info.num_answers} answers")


def _block(index: int, entry: Any, tensors: dict[str, mx.array]) -> Block:
    taps = tuple(Tap(*tap) for tap in entry["taps"])
    targets = tuple(Target(*target) for target in entry["targets"])
    numbers = [*(n for tap in taps for n in tap[1:]), *(target.layer for target in targets)]
    if any(type(n) is not int for n in numbers):
        raise TypeError(f"block {index}: layers and lags are whole numbers")
    down, up, bias = (tensors.get(f"{index}.{name}") for name in ("down", "up", "bias"))
    if up is None or bias is None:
        raise ValueError(f"block {index} lacks a tensor")
    if up.ndim != 2 or bias.shape != (up.shape[1],):
        raise ValueError(f"block {index}: up is {up.shape}, bias {bias.shape}")
    if down is not None and (down.ndim != 2 or down.shape[1] != up.shape[0]):
        raise ValueError(f"block {index}: down is {down.shape}, up {up.shape}")
    if not all(mx.all(mx.isfinite(a)).item() for a in (down, up, bias) if a is not None):
        raise ValueError(f"block {index}: numbers that are not finite")
    return Block(taps=taps, targets=targets, down=down, up=up, bias=bias)


def _thin_layer(index: int, entry: Any, tensors: dict[str, mx.array]) -> ThinLayer:
    heads, neurons = tuple(entry["heads"]), tuple(entry["neurons"])
    if any(type(n) is not int for n in (*heads, *neurons)):
        raise TypeError(f"thin layer {index}: heads and neurons are whole numbers")
    weight, bias = tensors[f"thin.{index}.weight"], tensors[f"thin.{index}.bias"]
    if weight.ndim != 2 or bias.shape != (weight.shape[1],):
        raise ValueError(f"thin layer {index}: weight is {weight.shape}, bias {bias.shape}")
    if not all(mx.all(mx.isfinite(array)).item() for array in (weight, bias)):
        raise ValueError(f"thin layer {index}: numbers that are not finite")
    return ThinLayer(heads=heads, neurons=neurons, weight=weight, bias=bias)


# --- compared with the models that it is to connect ---


def check_made_for(info: PredictorInfo, path: Path, *, base: str, aux: str) -> None:
    """Accept a predictor if it was fitted to models with these fingerprints.

    Both models read the same ids, whichever text they stand for: the fit saw to it that they mean
    the same to both, and how a text becomes ids is nothing to a predictor.

    Raises:
        PredictorMismatch: It was fitted to others; names both fingerprints.
    """
    for what, theirs, ours in (
        ("base model", info.base_fingerprint, base),
        ("auxiliary model", info.aux_fingerprint, aux),
    ):
        if theirs != ours:
            raise PredictorMismatch(
                f"{path}: fitted to a {what} with fingerprint {theirs}; this one has {ours}",
                hint=f"this one is for {info.base}; edgekv fit makes one for this model",
            )


def check_fits(predictor: Predictor, base: DecoderConfig, aux: DecoderConfig, path: Path) -> None:
    """Make sure that every feature of a file exists and every prediction has its place.

    Fingerprints say what a predictor was made for; a file can be right about that and wrong inside.

    Raises:
        PredictorCorrupt: It does not fit.
    """
    try:
        last = base.num_layers - 1 if predictor.kind == "self" else aux.num_layers
        _demand(predictor.kind in ("self", "aux"), f"kind {predictor.kind!r}")
        _demand(0 < predictor.depth <= last, f"depth {predictor.depth} of {aux.num_layers} layers")
        if predictor.thin:
            _check_thin(predictor, base)
            return
        for index, block in enumerate(predictor.blocks):
            first = block.up if block.down is None else block.down
            num_features, num_outputs = first.shape[0], block.up.shape[1]
            width = sum(_tap_width(tap, predictor.depth, aux) for tap in block.taps)
            what = f"block {index}: {num_features} features, {width} are tapped"
            _demand(num_features == width, what)
            width = sum(_target_width(target, base) for target in block.targets)
            what = f"block {index}: {num_outputs} outputs, {width} are predicted"
            _demand(num_outputs == width, what)
        found = sorted(target for block in predictor.blocks for target in block.targets)
        layers = range(predictor.first_layer, base.num_layers)
        wanted = [Target(layer, part) for layer in layers for part in PARTS]
        _demand(found == wanted, "not every layer's keys and values are predicted once")
    except (ValueError, TypeError) as error:
        raise PredictorCorrupt(f"{path}: it does not fit its models: {error}") from error


def _check_thin(predictor: Predictor, base: DecoderConfig) -> None:
    wanted, found = base.num_layers - predictor.depth, len(predictor.thin)
    _demand(found == wanted, f"{found} thin layers in place of {wanted}")
    for index, layer in enumerate(predictor.thin):
        own, width = base.layers[predictor.depth + index], base.hidden_size
        for what, kept, size in (
            ("heads", layer.heads, own.num_heads),
            ("neurons", layer.neurons, own.ffn_size),
        ):
            in_place = list(kept) == sorted(set(kept) & set(range(size)))
            _demand(in_place, f"thin layer {index}: not {what} of {size}, in order")
        whole = base.qk_norm != "whole" or len(layer.heads) in (0, own.num_heads)
        _demand(whole, f"thin layer {index}: its norms are of all heads")
        shape = (width + len(layer.neurons), width)
        _demand(layer.weight.shape == shape, f"thin layer {index}: weight {layer.weight.shape}")


def _tap_width(tap: Tap, depth: int, aux: DecoderConfig) -> int:
    _demand(0 <= tap.lag <= _LAG_MAX, f"a tap {tap.lag} tokens back")
    _demand(tap.kind in ("hidden", "key", "value"), f"a tap of kind {tap.kind!r}")
    last = depth if tap.kind == "hidden" else depth - 1
    _demand(0 <= tap.layer <= last, f"a tap of {tap.kind} {tap.layer} of {depth} layers")
    return place_width(tap.place, aux)


def _target_width(target: Target, base: DecoderConfig) -> int:
    exists = target.part in PARTS and 0 <= target.layer < base.num_layers
    _demand(exists, f"target {target.part!r} of layer {target.layer} of {base.num_layers}")
    return place_width(target.place, base)


def _demand(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)
