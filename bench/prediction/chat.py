"""`bench quality --chat`: answers that are predicted and confirmed, as people get them.

Prompts are passages of several kinds of text, each with a task (`edgekv.predict.fit.chats`). A
runtime answers each greedily over exact KV and over predicted KV in turn, which goes first in turn
too, in fresh sessions of apps of their own and without a store. Agreement is measured before, for
no answer of a runtime shows what over predicted KV comes behind the first token that must wait.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import mlx.core as mx

from edgekv.bench.figures import Stopwatch
from edgekv.bench.prediction.chat_figures import Answer, Pair, chat_rows
from edgekv.bench.prediction.quality_text import stretches
from edgekv.bench.prediction.quality_ways import Subject, open_subjects
from edgekv.bench.report import Reporter, Row, Watch, unwatched
from edgekv.bench.speed.measure import WARM_UPS
from edgekv.bench.speed.ours import open_runtime
from edgekv.bench.workload import Workload, whole
from edgekv.config import PredictionOptions, PrefillMode, Sampling, check_int
from edgekv.errors import ConfigError
from edgekv.kv.session_kv import common_prefix
from edgekv.models.cache import Progress
from edgekv.models.open_model import OpenModel
from edgekv.predict.artifact import read_info
from edgekv.predict.fit.calibrate import AheadAnswer, answer_ahead
from edgekv.predict.fit.chats import chat_prompts
from edgekv.predict.fit.corpus import text_files
from edgekv.predict.gate import ASKED_AGAIN, TOKENS_MAX
from edgekv.predict.shipped import find_predictor
from edgekv.runtime import Runtime
from edgekv.tokenizer import Tokenizer

NEW_TOKENS = 64  # of an answer, at most
TIE = 1e-4  # nats: tokens closer than this may change places with the shape of a step
_LIKELY = 8  # tokens that may be part of a tie
_SOURCES = "Python's sources"
_MODES: tuple[PrefillMode, PrefillMode] = ("exact", "predict")


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """What is measured."""

    contexts: tuple[int, ...] = (256, 512, 1024, 2048)  # tokens of the passages
    samples: int = 16  # of each length, of each kind, as far as its text reaches
    # Files, of a kind each; () takes the sources that `QualityOptions` takes.
    texts: tuple[Path, ...] = ()
    # How it is predicted and shown; the predictors are named elsewhere.
    prediction: PredictionOptions = field(default_factory=PredictionOptions)

    def __post_init__(self) -> None:
        check_int("samples", self.samples, 1, 1 << 16)
        shortest = 2 * (self.prediction.sinks + self.prediction.window)
        for context in self.contexts:
            check_int("context", context, shortest, 1 << 20)


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A prompt, and what its passage is."""

    kind: str
    context: int
    token_ids: list[int]


def run_chat(
    model: str,
    predictors: Sequence[str | None],
    options: ChatOptions,
    *,
    progress: Progress | None = None,
    watch: Watch = unwatched,
) -> list[Row]:
    """Measure; rows of each predictor, of which the first is about all prompts.

    Raises:
        ConfigError: The files hold too little text, or a prompt is longer than the model's context.
        ModelError: A model or predictor cannot be had, or they do not fit together.
    """
    base, subjects = open_subjects(model, predictors, options.prediction.aux, progress)
    files = [find_predictor(base.name, name, base.fingerprint) for name in predictors]
    chats = chats_about(base.tokenizer, options)
    _check_fits(base, chats)
    ahead = [_agreement(base, subject, chats, options, watch) for subject in subjects]
    names = [subject.name for subject in subjects]
    del base, subjects  # each runtime loads the model for itself
    rows = []
    for name, file, answers in zip(names, files, ahead, strict=True):
        prediction = replace(options.prediction, predictor=file)
        certain_min = read_info(file).gate.threshold(prediction.corrected_max, len(ASKED_AGAIN))
        shared = {
            "scenario": "quality chat",
            "model": model,
            "predictor": name,
            "corrected_max": prediction.corrected_max,
            "certain_min": certain_min if certain_min < float("inf") else None,
            "new_tokens": NEW_TOKENS,
        }
        longest = max(len(chat.token_ids) for chat in chats)
        workload = Workload(lengths=(longest,), new_tokens=NEW_TOKENS, reps=1)
        with open_runtime(model, [workload], progress=progress, prediction=prediction) as runtime:
            pairs = _pairs(runtime, chats, answers, Reporter(watch, f"{name}, answers", len(chats)))
        rows += [shared | row for row in chat_rows(pairs)]
    return rows


def chats_about(tokenizer: Tokenizer, options: ChatOptions) -> list[Chat]:
    """Prompts about passages that share no text, all lengths and kinds in turn.

    Raises:
        ConfigError: A file holds less than one passage of each length.
    """
    texts = text_files(options.texts, held_out=True)
    kinds = {_SOURCES: texts}
    if options.texts:
        alike = len({path.name for path in texts}) < len(texts)
        kinds = {str(path) if alike else path.name: [path] for path in texts}
    ends = list(itertools.accumulate(options.contexts, initial=0))
    by_round: list[list[Chat]] = [[] for _ in range(options.samples)]
    for number, (kind, files) in enumerate(kinds.items()):
        found = stretches(tokenizer, files, ends[-1], options.samples)
        pieces = [ids[start:end] for ids in found for start, end in itertools.pairwise(ends)]
        prompts = chat_prompts(tokenizer, pieces, shortest=None, seed=number)
        for index, (piece, ids) in enumerate(zip(pieces, prompts, strict=True)):
            chat = Chat(kind=kind, context=len(piece), token_ids=ids)
            by_round[index // len(options.contexts)].append(chat)
    return [chat for chats in by_round for chat in chats]


def _check_fits(base: OpenModel, chats: Sequence[Chat]) -> None:
    longest = max(len(chat.token_ids) for chat in chats)
    context_max = base.decoder.config.context_max
    if longest + NEW_TOKENS > context_max:
        raise ConfigError(
            f"a prompt of {longest} tokens and an answer of {NEW_TOKENS} exceed the model's "
            f"context of {context_max} tokens",
            hint="ask for a shorter --context",
        )


def _agreement(
    base: OpenModel, subject: Subject, chats: Sequence[Chat], options: ChatOptions, watch: Watch
) -> list[AheadAnswer]:
    """What is said over predicted KV behind the exact answer's tokens, and whether it is these."""
    assert subject.predictor is not None
    report, found = Reporter(watch, f"{subject.name}, agreement", len(chats)), []
    for chat in chats:
        answer = answer_ahead(
            base.decoder,
            subject.aux,
            subject.predictor,
            chat.token_ids,
            sinks=options.prediction.sinks,
            window=options.prediction.window,
            look=options.prediction.look,
            num_tokens=TOKENS_MAX,
            eos_ids=base.tokenizer.eos_ids,
        )
        found.append(answer)
        mx.clear_cache()  # else it keeps buffers of every length
        report.turn_done()
    return found


def _pairs(
    runtime: Runtime, chats: Sequence[Chat], ahead: Sequence[AheadAnswer], report: Reporter
) -> list[Pair]:
    """Every prompt asked in both ways."""
    for chat, mode in itertools.product(chats[:WARM_UPS], _MODES):
        _answer(runtime, chat.token_ids, mode)
    pairs = []
    for number, (chat, said) in enumerate(zip(chats, ahead, strict=True)):
        answers = {
            mode: _answer(runtime, chat.token_ids, mode)
            for mode in _MODES[:: 1 if number % 2 else -1]
        }
        pair = Pair(
            kind=chat.kind,
            context=chat.context,
            exact=answers["exact"],
            predicted=answers["predict"],
            agreed=said.askings[0].agreed,
            certain=said.askings[0].certain,
        )
        if pair.differs:
            ids = (pair.exact.token_ids, pair.predicted.token_ids)
            pair = replace(pair, is_tie=is_tie(runtime, chat.token_ids, ids))
        pairs.append(pair)
        report.turn_done()
    return pairs


def _answer(runtime: Runtime, token_ids: Sequence[int], mode: PrefillMode) -> Answer:
    """Ask, in an app that has no KV, and read as a terminal would."""
    app = runtime.app("bench")
    sampling = Sampling(max_tokens=NEW_TOKENS)
    began_early, num_retracted = False, 0
    with app.session() as session:
        stopwatch = Stopwatch()
        with session.submit_ids(token_ids, sampling, prefill=mode) as stream:
            for delta in stream:
                began_early |= delta.provisional
                num_retracted += delta.retract
        whole_ms = stopwatch.ms()
    app.close()
    reply = stream.reply
    assert reply is not None
    assert reply.stats.num_cached_tokens == 0, "a prompt was cached"
    return Answer(
        text=reply.text,
        token_ids=reply.token_ids,
        stats=reply.stats,
        whole_ms=whole_ms,
        began_early=began_early,
        num_retracted_chars=num_retracted,
    )


def is_tie(
    runtime: Runtime, prompt_ids: Sequence[int], answers: tuple[Sequence[int], Sequence[int]]
) -> bool:
    """Whether exact KV finds the first tokens that differ equally likely."""
    both = [list(answer) for answer in answers]
    at = common_prefix(*both)
    nexts = [set(ids[at : at + 1]) or runtime.tokenizer.eos_ids for ids in both]
    sampling = Sampling(max_tokens=1, ignore_eos=True, logprobs=_LIKELY)
    with runtime.app("ties").session() as session:
        reply = whole(session.submit_ids([*prompt_ids, *both[0][:at]], sampling))
    likely = dict(reply.logprobs[0].top)
    ours, theirs = (max(likely.get(i, float("-inf")) for i in ids) for ids in nexts)
    return nexts[0] != nexts[1] and abs(ours - theirs) <= TIE
