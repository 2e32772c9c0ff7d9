"""The ways to prefill a context that `bench quality` compares: exact, approximate, or cheaper."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import numpy as np

from edgekv.bench.prediction.quality_text import QualityOptions
from edgekv.models.attention import Segment
from edgekv.models.batch import PackedBatch
from edgekv.models.cache import Progress
from edgekv.models.config import DecoderConfig, prompt_macs
from edgekv.models.decoder import Decoder
from edgekv.models.open_model import OpenModel, open_model
from edgekv.predict.forward import ArrayView, predicted_context, run
from edgekv.predict.look import ROWS_AGAIN, SHARE
from edgekv.predict.opening import open_predictor
from edgekv.predict.predictor import Predictor
from edgekv.predict.prune import open_auxiliary
from edgekv.predict.shipped import find_predictor

EXACT = "exact"
TRUNCATED = "truncated"
ALONE = "auxiliary alone"
PREDICTED = "predicted, sinks + window"
LOOKED = "predicted, looked twice"
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
    """One way to prefill."""

    name: str  # what it does
    predictor: str  # the name of the predictor that it uses or is compared with; "" for none
    prefill: Prefill  # does it
    flops_ratio: float  # of it, relative to exact


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is measured beside the base itself."""

    name: str  # of the predictor, or of the auxiliary alone
    aux: Decoder  # what the predictor looks at: the base itself for kind "self"
    predictor: Predictor | None  # None measures the auxiliary alone


def open_subjects(
    reference: str,
    predictors: Sequence[str | None],
    aux: str | None,
    progress: Progress | None = None,
) -> tuple[OpenModel, list[Subject]]:
    """Load what is measured: a base, and predictors (see `find_predictor`) or an auxiliary alone.

    Raises:
        ModelError: A model or predictor cannot be had, or they do not fit together.
        ConfigError: A predictor needs an auxiliary model.
    """
    base = open_model(reference, progress=progress)
    other = None if aux is None else open_auxiliary(aux, base, progress=progress)
    if not predictors and other is not None:
        return base, [Subject(name=other.name, aux=other.decoder, predictor=None)]
    files = [find_predictor(base.name, each, base.fingerprint) for each in predictors or (None,)]
    alike = len({file.name for file in files}) < len(files)
    subjects = []
    for file in files:
        opened = open_predictor(base, file, other)
        name = str(file) if alike else file.name
        aux_decoder = opened.aux.decoder
        subjects.append(Subject(name=name, aux=aux_decoder, predictor=opened.predictor))
    return base, subjects


def ways(base: Decoder, subjects: Sequence[Subject], options: QualityOptions) -> list[Way]:
    """All that are compared; exact comes first."""
    found = [
        Way(name=EXACT, predictor="", prefill=partial(_exact, base), flops_ratio=1.0),
        Way(name="no context", predictor="", prefill=_truncated(base, 1), flops_ratio=0.0),
    ]
    for subject in subjects:
        if subject.predictor is None or subject.predictor.kind == "aux":
            found.append(_alone(base, subject, options.context))
        if subject.predictor is not None:
            found += _predicting(base, subject.aux, subject.predictor, subject.name, options)
    return found


def _alone(base: Decoder, subject: Subject, context: int) -> Way:
    macs = prompt_macs(subject.aux.config, 0, context)
    return Way(
        name=ALONE,
        predictor=subject.name,
        prefill=partial(_exact, subject.aux),
        flops_ratio=macs / prompt_macs(base.config, 0, context),
    )


def _predicting(
    base: Decoder, aux: Decoder, predictor: Predictor, name: str, options: QualityOptions
) -> list[Way]:
    """A predictor with more and more of the context computed, between truncation and repair."""
    context = options.context
    exact = prompt_macs(base.config, 0, context)
    costs: dict[str, float] = {}
    prefills: dict[str, Prefill] = {}
    for way, sinks, window, look in (
        ("predicted, no sinks, no window", 0, 1, 0.0),
        ("predicted, sinks", options.sinks, 1, 0.0),
        (PREDICTED, options.sinks, options.window, 0.0),
        (LOOKED, options.sinks, options.window, SHARE),
    ):
        costs[way] = _predicted_macs(
            base.config, aux.config, predictor, context, sinks=sinks, window=window, look=look
        )
        prefills[way] = partial(_predicted, base, aux, predictor, sinks, window, look)
    # As many tokens as an exact prefill computes at the same cost.
    exact_macs = partial(prompt_macs, base.config, 0)
    keep = max(1, bisect_right(range(1, context + 1), costs[PREDICTED], key=exact_macs))
    costs = {TRUNCATED: costs[PREDICTED], **costs, "after repair": exact}
    prefills[TRUNCATED] = _truncated(base, keep)
    prefills["after repair"] = partial(
        _repaired, base, aux, predictor, options.sinks, options.window
    )
    return [
        Way(name=way, predictor=name, prefill=prefills[way], flops_ratio=macs / exact)
        for way, macs in costs.items()
    ]


def _predicted_macs(
    base: DecoderConfig,
    aux: DecoderConfig,
    predictor: Predictor,
    num_tokens: int,
    *,
    sinks: int,
    window: int,
    look: float,
) -> float:
    """Multiplications of a prompt whose middle is predicted."""
    middle = num_tokens - window
    exact_rows = [(0, sinks), (middle, num_tokens)]
    if look:  # at tokens that are on the average in the middle, and the last rows again
        num_looked = round(look * (middle - sinks))
        first_looked = (sinks + middle - num_looked) // 2
        exact_rows += [
            (first_looked, first_looked + num_looked),
            (num_tokens - min(window, ROWS_AGAIN), num_tokens),
        ]
    first = predictor.first_layer
    macs = sum(prompt_macs(base, *rows, first_layer=first) for rows in exact_rows)
    macs += predictor.num_macs(base, sinks, middle)
    if predictor.kind == "self":
        return macs + prompt_macs(base, 0, num_tokens, last_layer=predictor.depth)
    return macs + prompt_macs(aux, 0, middle, last_layer=predictor.depth)


def _exact(decoder: Decoder, ids: list[int]) -> Prefilled:
    """All of the context, exactly."""
    view = ArrayView()
    hidden = run(decoder, ids, view)
    return Prefilled(decoder, view, hidden[-1:], len(ids))


def _truncated(decoder: Decoder, keep: int) -> Prefill:
    """The last `keep` tokens of the context, as if there were no others."""
    return lambda ids: _exact(decoder, ids[-keep:])


def _predicted(
    base: Decoder,
    aux: Decoder,
    predictor: Predictor,
    sinks: int,
    window: int,
    look: float,
    ids: list[int],
) -> Prefilled:
    """The middle predicted."""
    text = predicted_context(base, aux, predictor, ids, sinks=sinks, window=window, look=look)
    return Prefilled(base, text.view, text.rows[-1:], len(ids))


def _repaired(
    base: Decoder, aux: Decoder, predictor: Predictor, sinks: int, window: int, ids: list[int]
) -> Prefilled:
    """What repair makes of that: exact KV, from hidden states at the first predicted layer."""
    first = predictor.first_layer
    view = _predicted(base, aux, predictor, sinks, window, 0.0, ids).view
    entering = base.embed(mx.array(ids, dtype=mx.uint32))
    if first:
        entering = run(base, ids, ArrayView(), last_layer=first)
    for start in range(sinks, len(ids), _REPAIR_ROWS):
        rows = entering[start : start + _REPAIR_ROWS]
        view.offset = start
        batch = PackedBatch([Segment(view, rows.shape[0])])
        hidden = base.run_layers(rows, batch, first_layer=first)
    return Prefilled(base, view, hidden[-1:], len(ids))
