"""`bench quality`: what predicted KV costs in quality, beside what else the same time could buy.

A context is prefilled in one way or another, then a continuation is forced through the base model
token by token. `text_*`: the continuation is what follows in the text. `copy_*`: it repeats a
passage that ended 180 tokens before the context's end: long-range recall. `needle`: a fact stated
in the first tenth is asked for at the end.

* **nll**: negative log-likelihood of the continuation, nats a token.
* **agree**: share of its positions at which the likeliest token is the one that exact KV says;
  first8 of the first eight alone.
* **flops_ratio**: multiplications of the prefill, relative to exact.
* **gap_recovered**: 1 - (nll - exact) / (truncated - exact).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np

from edgekv.bench.report import Row
from edgekv.config import check_int
from edgekv.errors import ConfigError
from edgekv.models.attention import Segment
from edgekv.models.cache import Progress
from edgekv.models.decoder import Decoder, PackedBatch
from edgekv.models.open_model import open_model
from edgekv.predict.artifact import check_made_for, load_predictor
from edgekv.predict.corpus import held_out_files
from edgekv.predict.flops import predicted_macs, prompt_macs
from edgekv.predict.forward import ArrayView, predicted_context, run
from edgekv.predict.predictor import Predictor
from edgekv.predict.prune import PREFIX, open_auxiliary
from edgekv.predict.shipped import find_predictor
from edgekv.tokenizer import Tokenizer

COPY_BACK = 180  # tokens between the repeated passage and the context's end
FIRST = 8
_NEEDLE = "The secret code is {}. Remember the code. "
_QUESTION = "\nWhat was said above: the secret code is"
_SPREAD = 7  # samples are taken from a file this many contexts apart, at most

Watch = Callable[[str, int, int], None]  # what runs, samples done, samples in all


@dataclass(frozen=True, kw_only=True)
class QualityOptions:
    """What is measured.

    Attributes:
        context: Tokens that are prefilled.
        continuation: Tokens that are forced through behind them.
        samples: Pieces of text.
        sinks: See `PredictionOptions`.
        window: See `PredictionOptions`.
        texts: Files that the pieces come from; () takes sources of the standard library that the
            default corpus of `edgekv fit` leaves out.
    """

    context: int = 384
    continuation: int = 128
    samples: int = 16
    sinks: int = 4
    window: int = 32
    texts: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        check_int("continuation", self.continuation, FIRST, 1 << 16)
        check_int("context", self.context, COPY_BACK + self.continuation, 1 << 20)
        check_int("samples", self.samples, 1, 1 << 16)
        check_int("sinks", self.sinks, 0, self.context // 2)
        check_int("window", self.window, 1, self.context // 2)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The models under measurement; `aux` is the base itself for kind "self", or None."""

    base: Decoder
    aux: Decoder | None
    predictor: Predictor | None
    tokenizer: Tokenizer


def open_subject(
    base: str, predictor: str | None, aux: str | None, progress: Progress | None = None
) -> tuple[Subject, str]:
    """Load what is measured; and the predictor's name.

    Raises:
        ModelError: A model or predictor cannot be had, or they do not fit together.
        ConfigError: The predictor needs an auxiliary model.
    """
    model = open_model(base, progress=progress)
    other = None if aux is None else open_auxiliary(aux, model, progress=progress)
    if predictor is None and other is not None:
        return Subject(
            base=model.decoder, aux=other.decoder, predictor=None, tokenizer=model.tokenizer
        ), ""
    file = find_predictor(base, predictor)
    loaded, info = load_predictor(file, model.decoder.weights.final_norm.dtype)
    auxiliary = model
    if loaded.kind == "aux":
        if other is None and info.aux.startswith(PREFIX):
            other = open_auxiliary(info.aux, model)
        if other is None:
            raise ConfigError(f"{file} needs its auxiliary model", hint=f"pass --aux {info.aux}")
        auxiliary = other
    check_made_for(
        info,
        file,
        base=model.fingerprint,
        aux=auxiliary.fingerprint,
        tokenizer=model.tokenizer.fingerprint,
    )
    subject = Subject(
        base=model.decoder,
        aux=auxiliary.decoder,
        predictor=loaded,
        tokenizer=model.tokenizer,
    )
    return subject, file.name


@dataclass(frozen=True)
class Prefilled:
    """KV of a context, and the hidden state of its last token `(1, hidden)`."""

    decoder: Decoder
    view: ArrayView
    last: mx.array
    num_tokens: int

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Of every token of a continuation, `(T, vocab)`, as it is forced through."""
        view = self.view.copy()
        view.offset = self.num_tokens
        rows = self.last
        if len(token_ids) > 1:
            rows = mx.concatenate([rows, run(self.decoder, list(token_ids[:-1]), view)])
        return np.array(self.decoder.logits(rows).astype(mx.float32))


Prefill = Callable[[list[int]], Prefilled]


@dataclass
class _Score:
    nll: list[float] = field(default_factory=list)
    agree: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)

    def add(self, logits: np.ndarray, exact: np.ndarray, ids: Sequence[int]) -> None:
        top = logits.max(axis=-1, keepdims=True)
        logs = logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))
        self.nll.append(float(-logs[np.arange(len(ids)), ids].mean()))
        same = logits.argmax(axis=-1) == exact.argmax(axis=-1)
        self.agree.append(float(same.mean()))
        self.first.append(float(same[:FIRST].mean()))


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


def predicted_prefill(subject: Subject, sinks: int, window: int) -> Prefill:
    """The middle predicted."""
    aux, predictor = subject.aux, subject.predictor
    assert aux is not None
    assert predictor is not None

    def prefill(ids: list[int]) -> Prefilled:
        view, rows = predicted_context(
            subject.base, aux, predictor, ids, sinks=sinks, window=window
        )
        return Prefilled(subject.base, view, rows[-1:], len(ids))

    return prefill


def repaired_prefill(subject: Subject, sinks: int, window: int) -> Prefill:
    """Predicted first, then every token's KV replaced as the engine does it."""
    predicted = predicted_prefill(subject, sinks, window)
    base, predictor = subject.base, subject.predictor
    assert predictor is not None

    def prefill(ids: list[int]) -> Prefilled:
        view = predicted(ids).view
        view.offset = 0
        hidden = base.embed(mx.array(ids, dtype=mx.uint32))
        first = predictor.first_layer
        if first:
            lower = ArrayView()
            hidden = run(base, ids, lower, last_layer=first)
        batch = PackedBatch([Segment(view, len(ids))])
        hidden = base.run_layers(hidden, batch, first_layer=first)
        return Prefilled(base, view, hidden[-1:], len(ids))

    return prefill


def prefills(subject: Subject, options: QualityOptions) -> dict[str, tuple[Prefill, float]]:
    """What is compared: by name, how the context is prefilled and at which part of exact FLOPs."""
    base, context = subject.base, options.context
    exact = prompt_macs(base.config, 0, context)
    found: dict[str, tuple[Prefill, float]] = {"exact": (exact_prefill(base), 1.0)}
    if subject.predictor is None or subject.aux is None:
        if subject.aux is not None:
            alone = prompt_macs(subject.aux.config, 0, context) / exact
            found["auxiliary alone"] = (exact_prefill(subject.aux), alone)
        found["no context"] = (truncated_prefill(base, 1), 0.0)
        return found
    aux, predictor = subject.aux, subject.predictor

    def share(sinks: int, window: int) -> float:
        return (
            predicted_macs(base.config, aux.config, predictor, context, sinks=sinks, window=window)
            / exact
        )

    ends = (options.sinks, options.window)
    if predictor.kind == "aux":
        alone = prompt_macs(aux.config, 0, context) / exact
        found["auxiliary alone"] = (exact_prefill(aux), alone)
    found["no context"] = (truncated_prefill(base, 1), 0.0)
    keep = _same_cost(subject.base, context, share(*ends) * exact)
    found["truncated"] = (truncated_prefill(base, keep), share(*ends))
    for name, sinks, window in (
        ("predicted, no sinks, no window", 0, 1),
        ("predicted, sinks", options.sinks, 1),
        ("predicted, sinks + window", *ends),
    ):
        found[name] = (predicted_prefill(subject, sinks, window), share(sinks, window))
    found["after repair"] = (repaired_prefill(subject, *ends), 1.0)
    return found


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


def run_quality(
    subject: Subject,
    model: str,
    predictor: str,
    options: QualityOptions,
    watch: Watch | None = None,
    *,
    only: Sequence[str] = (),
) -> list[Row]:
    """Measure; one row for each way to prefill.

    Args:
        subject: The models.
        model: The base's name.
        predictor: The predictor's name.
        options: What is measured.
        watch: Told after every sample.
        only: Names of ways to prefill, "exact" among them; () measures all.

    Raises:
        ConfigError: The files hold too little text.
    """
    ways = prefills(subject, options)
    ways = {name: way for name, way in ways.items() if not only or name in only}
    texts = {name: _Score() for name in ways}
    copies = {name: _Score() for name in ways}
    needles: dict[str, list[float]] = {name: [] for name in ways}
    pieces = sample_texts(subject.tokenizer, options)
    for number, piece in enumerate(pieces):
        context, following = piece[: options.context], piece[options.context :]
        start = options.context - COPY_BACK - options.continuation
        repeated = context[start : start + options.continuation]
        needle, question, answer = _needle(subject.tokenizer, context, number)
        exact_text = exact_copy = None
        for name, (prefill, _) in ways.items():
            prefilled = prefill(context)
            text, copy = prefilled.logits(following), prefilled.logits(repeated)
            exact_text = text if exact_text is None else exact_text
            exact_copy = copy if exact_copy is None else exact_copy
            texts[name].add(text, exact_text, following)
            copies[name].add(copy, exact_copy, repeated)
            logits = prefill([*needle, *question]).logits(answer)
            needles[name].append(float((logits.argmax(axis=-1) == answer).all()))
            mx.clear_cache()
        if watch is not None:
            watch("quality", number + 1, len(pieces))
    rows = []
    for name, (_, share) in ways.items():
        rows.append(
            {
                "scenario": "quality",
                "model": model,
                "predictor": predictor,
                "prefill": name,
                "context": options.context,
                "continuation": options.continuation,
                "samples": len(pieces),
                "text_nll": float(np.mean(texts[name].nll)),
                "text_agree": float(np.mean(texts[name].agree)),
                "first8_agree": float(np.mean(texts[name].first)),
                "copy_nll": float(np.mean(copies[name].nll)),
                "copy_agree": float(np.mean(copies[name].agree)),
                "needle": float(np.mean(needles[name])),
                "flops_ratio": share,
            }
        )
    _add_gaps(rows)
    return rows


def _add_gaps(rows: list[Row]) -> None:
    by_name = {row["prefill"]: row for row in rows}
    exact = by_name["exact"]
    for row in rows:
        for kind in ("text", "copy"):
            for key, baseline in (
                (f"{kind}_gap_recovered", "truncated"),
                (f"{kind}_gap_recovered_vs_aux", "auxiliary alone"),
            ):
                row[key] = None
                if baseline in by_name:
                    gap = by_name[baseline][f"{kind}_nll"] - exact[f"{kind}_nll"]
                    if gap > 0:
                        row[key] = 1 - (row[f"{kind}_nll"] - exact[f"{kind}_nll"]) / gap


def _needle(
    tokenizer: Tokenizer, context: list[int], number: int
) -> tuple[list[int], list[int], list[int]]:
    """The context with a fact in its first tenth, a question, and the answer's tokens."""
    code = f" {(7919 * (number + 1)) % 9000 + 1000}"
    fact = tokenizer.encode(_NEEDLE.format(code.strip()), add_special_tokens=False)
    question = tokenizer.encode(_QUESTION, add_special_tokens=False)
    answer = tokenizer.encode(code, add_special_tokens=False)
    at = len(context) // 20
    filled = [*context[:at], *fact, *context[at + len(fact) : len(context) - len(question)]]
    return filled, list(question), list(answer)


def sample_texts(tokenizer: Tokenizer, options: QualityOptions) -> list[list[int]]:
    """Pieces of text, `context + continuation` tokens each, from as many files as there are.

    Raises:
        ConfigError: The files hold too little text.
    """
    files = held_out_files(options.texts)
    length = options.context + options.continuation
    encoded = {}
    pieces: list[list[int]] = []
    for round_ in range(options.samples):
        for path in files:
            if path not in encoded:
                encoded[path] = list(tokenizer.encode(path.read_text(errors="replace")))
            ids = encoded[path]
            places = len(ids) // length
            step = max(1, min(_SPREAD, places // max(1, -(-options.samples // len(files)))))
            start = round_ * step * length
            if start + length <= len(ids):
                pieces.append(ids[start : start + length])
            if len(pieces) == options.samples:
                return pieces
    if not pieces:
        raise ConfigError.of("text", ", ".join(map(str, files)), f"longer than {length} tokens")
    return pieces
