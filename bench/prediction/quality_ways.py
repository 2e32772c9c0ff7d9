"""The ways to prefill a context that `bench quality` compares: exact, approximate, or cheaper."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from edgekv.bench.prediction.quality_text import QualityOptions
from edgekv.models.attention import Segment
from edgekv.models.cache import Progress
from edgekv.models.config import prompt_macs
from edgekv.models.decoder import Decoder, PackedBatch
from edgekv.models.open_model import OpenModel, open_model
from edgekv.predict.forward import ArrayView, predicted_context, run
from edgekv.predict.opening import open_predictor
from edgekv.predict.predictor import Predictor, predicted_macs
from edgekv.predict.prune import open_auxiliary
from edgekv.predict.shipped import find_predictor

EXACT = "exact"
TRUNCATED = "truncated"
ALONE = "auxiliary alone"
PREDICTED = "predicted, sinks + window"
_REPAIR_ROWS = 128


@dataclass(frozen=True)
class Prefilled:
    """KV of a context, and the hidden state of its last token `(1, hidden)`."""

    decoder: Decoder
    view: ArrayView
    last: mx.array
    num_tokens: int

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Of every token of a continuation, `(T, vocab)`, as it is forced through."""
        view = self.view.copy(self.num_tokens)
        rows = self.last
        if len(token_ids) > 1:
            rows = mx.concatenate([rows, run(self.decoder, list(token_ids[:-1]), view)])
        return np.array(self.decoder.logits(rows).astype(mx.float32))


Prefill = Callable[[list[int]], Prefilled]


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to prefill.

    Attributes:
        name: What it does.
        predictor: The name of the predictor that it uses or is compared with; "" for none.
        prefill: Does it.
        flops_ratio: Of it, relative to exact.
    """

    name: str
    predictor: str
    prefill: Prefill
    flops_ratio: float


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is measured beside the base itself.

    Attributes:
        name: Of the predictor, or of the auxiliary alone.
        aux: What the predictor looks at: the base itself for kind "self".
        predictor: None measures the auxiliary alone.
    """

    name: str
    aux: Decoder
    predictor: Predictor | None


def open_subjects(
    reference: str,
    predictors: Sequence[str | None],
    aux: str | None,
    progress: Progress | None = None,
) -> tuple[OpenModel, list[Subject]]:
    """Load what is measured.

    Args:
        reference: The base, see `open_model`.
        predictors: See `find_predictor`; none, with an auxiliary, measures that alone.
        aux: The auxiliary of those that need one.
        progress: Told of a download.

    Raises:
        ModelError: A model or predictor cannot be had, or they do not fit together.
        ConfigError: A predictor needs an auxiliary model.
    """
    base = open_model(reference, progress=progress)
    other = None if aux is None else open_auxiliary(aux, base, progress=progress)
    if not predictors and other is not None:
        return base, [Subject(name=other.name, aux=other.decoder, predictor=None)]
    wanted = predictors or (None,)
    files = [find_predictor(base.name, predictor, base.fingerprint) for predictor in wanted]
    subjects = [_open(base, file, other) for file in files]
    if len({file.name for file in files}) < len(files):
        subjects = [
            replace(subject, name=str(file)) for subject, file in zip(subjects, files, strict=True)
        ]
    return base, subjects


def _open(base: OpenModel, file: Path, aux: OpenModel | None) -> Subject:
    opened = open_predictor(base, file, aux)
    return Subject(name=file.name, aux=opened.aux.decoder, predictor=opened.predictor)


def ways(base: Decoder, subjects: Sequence[Subject], options: QualityOptions) -> list[Way]:
    """All that are compared; exact comes first."""
    found = [
        Way(name=EXACT, predictor="", prefill=exact_prefill(base), flops_ratio=1.0),
        Way(name="no context", predictor="", prefill=truncated_prefill(base, 1), flops_ratio=0.0),
    ]
    for subject in subjects:
        found += _ways(base, subject, options)
    return found


def _ways(base: Decoder, subject: Subject, options: QualityOptions) -> list[Way]:
    aux, predictor, context = subject.aux, subject.predictor, options.context
    exact = prompt_macs(base.config, 0, context)
    found: list[Way] = []

    def add(name: str, prefill: Prefill, share: float) -> None:
        found.append(Way(name=name, predictor=subject.name, prefill=prefill, flops_ratio=share))

    if predictor is None or predictor.kind == "aux":
        add(ALONE, exact_prefill(aux), prompt_macs(aux.config, 0, context) / exact)
    if predictor is None:
        return found
    ends = {
        "predicted, no sinks, no window": (0, 1),
        "predicted, sinks": (options.sinks, 1),
        PREDICTED: (options.sinks, options.window),
    }

    def macs(name: str) -> float:
        sinks, window = ends[name]
        return predicted_macs(
            base.config, aux.config, predictor, context, sinks=sinks, window=window
        )

    same_cost = _same_cost(base, context, macs(PREDICTED))
    add(TRUNCATED, truncated_prefill(base, same_cost), macs(PREDICTED) / exact)
    for name, (sinks, window) in ends.items():
        prefill = predicted_prefill(base, aux, predictor, sinks, window)
        add(name, prefill, macs(name) / exact)
    add("after repair", repaired_prefill(base, aux, predictor, options.sinks, options.window), 1.0)
    return found


def exact_prefill(decoder: Decoder) -> Prefill:
    """All of the context, exactly."""

    def prefill(ids: list[int]) -> Prefilled:
        view = ArrayView()
        hidden = run(decoder, ids, view)
        return Prefilled(decoder, view, hidden[-1:], len(ids))

    return prefill


def truncated_prefill(decoder: Decoder, keep: int) -> Prefill:
    """The last `keep` tokens of the context, as if there were no others."""
    whole = exact_prefill(decoder)
    return lambda ids: whole(ids[-keep:])


def predicted_prefill(
    base: Decoder, aux: Decoder, predictor: Predictor, sinks: int, window: int
) -> Prefill:
    """The middle predicted."""

    def prefill(ids: list[int]) -> Prefilled:
        view, rows = predicted_context(base, aux, predictor, ids, sinks=sinks, window=window)
        return Prefilled(base, view, rows[-1:], len(ids))

    return prefill


def repaired_prefill(
    base: Decoder, aux: Decoder, predictor: Predictor, sinks: int, window: int
) -> Prefill:
    """What repair makes of that: exact KV, from hidden states at the first predicted layer."""
    first = predictor.first_layer

    def prefill(ids: list[int]) -> Prefilled:
        view, _ = predicted_context(base, aux, predictor, ids, sinks=sinks, window=window)
        entering = base.embed(mx.array(ids, dtype=mx.uint32))
        if first:
            entering = run(base, ids, ArrayView(), last_layer=first)
        for start in range(sinks, len(ids), _REPAIR_ROWS):
            rows = entering[start : start + _REPAIR_ROWS]
            view.offset = start
            batch = PackedBatch([Segment(view, rows.shape[0])])
            hidden = base.run_layers(rows, batch, first_layer=first)
        return Prefilled(base, view, hidden[-1:], len(ids))

    return prefill


def _same_cost(base: Decoder, context: int, macs: float) -> int:
    """Tokens whose exact prefill costs as much."""
    low, high = 1, context
    while low < high:
        middle = (low + high + 1) // 2
        if prompt_macs(base.config, 0, middle) <= macs:
            low = middle
        else:
            high = middle - 1
    return low
