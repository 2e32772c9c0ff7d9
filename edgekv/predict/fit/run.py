"""What `edgekv fit` does, from models and text to a predictor's file.

A predictor begins in sums over text (`closed_form`), or as it was (`further`), and may be trained.
What was summed up and trained is saved beside the file; the same call goes on from there.
"""

import itertools
from dataclasses import dataclass, replace
from functools import partial

import mlx.core as mx
from xxhash import xxh3_128_hexdigest

from edgekv.models.cache import Progress
from edgekv.models.open_model import OpenModel, open_model
from edgekv.predict.artifact import PredictorInfo, as_saved, save_predictor
from edgekv.predict.fit.checkpoint import Autosave, remove_partial
from edgekv.predict.fit.closed_form import Fit, check_memory, is_held_out
from edgekv.predict.fit.finetune import Finetune
from edgekv.predict.fit.options import PIECE_TOKENS, TRAINING, FitOptions, Watch
from edgekv.predict.fit.shapes import block_shapes
from edgekv.predict.fit.trial import Trial
from edgekv.predict.opening import open_pair, open_predictor
from edgekv.predict.predictor import Predictor
from edgekv.predict.prune import PREFIX, fraction_of, open_auxiliary, source_layer
from edgekv.predict.shipped import find_predictor
from edgekv.predict.tensor_file import check_writable
from edgekv.tokenizer import Tokenizer

_TRAINING_TOKENS = 1024  # of a piece
_HELD_OUT = 8  # pieces that the predictor's quality is measured on


def _nobody(what: str, done: int, total: int) -> None:
    del what, done, total


def run_fit(
    options: FitOptions, *, progress: Progress | None = None, watch: Watch = _nobody
) -> PredictorInfo:
    """Fit a predictor and write its file.

    What was summed up is saved every two minutes beside the file; the same call goes on from there
    after an interruption.

    Raises:
        ConfigError: The file cannot be written, a text is not there or too short, the models have
            fewer layers than is asked for, or what another call left unfinished stands in the way.
        PredictorCorrupt: The training diverged, or `start` is no whole predictor.
        ModelError: A model cannot be had.
        PredictorMismatch: The models have different tokenizers.
        OSError: The disk is full.
    """
    check_writable(options.out, beside=TRAINING)
    options.corpus.check()
    begin = closed_form if options.start is None else further
    start = begin(options, progress, watch)
    predictor, info = start.predictor, start.info
    trial = Trial(base=start.base.decoder, aux=start.aux.decoder)
    pieces = options.corpus.pieces(start.base.tokenizer, PIECE_TOKENS, held_out=True, repeats=False)
    held = list(itertools.islice(pieces, _HELD_OUT))
    quality = info.quality
    if options.finetune:
        before = trial.quality(predictor, held)
        quality = {f"{name}_before_training": value for name, value in before.items()}
        predictor = _finetune(start, trial, options, watch)
        info = replace(info, finetune_steps=info.finetune_steps + options.finetune)
    quality = quality | trial.quality(as_saved(predictor), held)
    info = replace(info, quality=quality)
    save_predictor(options.out, predictor, info)
    if options.finetune:
        remove_partial(options.trained, start.training_key(options))
    if options.start is None:
        remove_partial(options.partial, start.key)
    return info


@dataclass(frozen=True, kw_only=True)
class Start:
    """A predictor before it is trained.

    Attributes:
        base: Whose KV is predicted.
        aux: From whose pass.
        predictor: As it is.
        info: What it was made of.
        key: Names what it came from: all that sums depend on, but how many tokens they are of.
    """

    base: OpenModel
    aux: OpenModel
    predictor: Predictor
    info: PredictorInfo
    key: str

    def training_key(self, options: FitOptions) -> str:
        """Names all that a training depends on."""
        fitted = "" if options.start is not None else f" {options.num_tokens} {options.rank}"
        return f"{self.key}{fitted} {options.finetune}"


def further(options: FitOptions, progress: Progress | None, watch: Watch) -> Start:
    """The predictor that is trained further."""
    del watch
    base = open_model(options.base, progress=progress)
    aux = None
    if options.aux is not None:
        aux = open_auxiliary(options.aux, base, progress=progress)
    file = find_predictor(base.name, options.start, base.fingerprint)
    opened = open_predictor(base, file, aux, dtype=mx.float32)  # to be trained
    corpus = opened.info.corpus
    if options.corpus.name != corpus:
        corpus += f"; then {options.corpus.name}"
    return Start(
        base=base,
        aux=opened.aux,
        predictor=opened.predictor,
        info=replace(opened.info, corpus=corpus),
        key=f"{xxh3_128_hexdigest(file.read_bytes())} {options.corpus.key()}",
    )


def closed_form(options: FitOptions, progress: Progress | None, watch: Watch) -> Start:
    """A predictor from sums over text."""
    base, aux = open_pair(options.base, options.aux, progress=progress)
    depth = options.self_depth or aux.decoder.config.num_layers
    source = None
    if options.aux is not None and options.aux.startswith(PREFIX):
        source = partial(source_layer, fraction_of(options.aux))
    shapes = block_shapes(options.kind, depth, base.decoder.config, options.features, source)
    check_memory(shapes, base.decoder.config, aux.decoder.config)
    fit = Fit(base.decoder, aux.decoder, options.kind, depth, shapes)
    key = (
        f"{base.fingerprint} {aux.fingerprint} {options.features} {fit.kind} {depth} "
        f"{options.corpus.key()}"
    )
    _gather(fit, key, base.tokenizer, options, watch)
    watch("solving", 0, len(shapes))
    solved = fit.solve(options.rank, lambda num_solved: watch("solving", num_solved, len(shapes)))
    info = _info(options, depth, base, aux, fit.num_tokens, solved.r2_mean)
    return Start(base=base, aux=aux, predictor=solved.predictor, info=info, key=key)


def _info(
    options: FitOptions,
    depth: int,
    base: OpenModel,
    aux: OpenModel,
    num_tokens: int,
    r2_mean: float,
) -> PredictorInfo:
    paper = options.features.features == "paper"
    return PredictorInfo(
        kind=options.kind,
        depth=depth,
        features=options.features.features,
        neighbours=0 if paper else options.features.neighbours,
        rank=options.rank,
        base=base.name,
        base_fingerprint=base.fingerprint,
        aux="" if options.aux is None else aux.name,
        aux_fingerprint=aux.fingerprint,
        tokenizer_fingerprint=base.tokenizer.fingerprint,
        corpus=options.corpus.name,
        num_tokens=num_tokens,
        quality={"held_out_r2": r2_mean},
    )


def _gather(fit: Fit, key: str, tokenizer: Tokenizer, options: FitOptions, watch: Watch) -> None:
    """Run the text through the models, from where an interrupted call ended."""
    fit.resume(options.partial, key)
    done = fit.num_pieces
    autosave = Autosave(lambda: fit.save(options.partial, key))
    streams = [options.corpus.pieces(tokenizer, PIECE_TOKENS, held_out=h) for h in (False, True)]
    for number in range(-(-options.num_tokens // PIECE_TOKENS)):
        piece = next(streams[is_held_out(number)])
        if number < done:
            continue
        fit.add(piece)
        autosave.note(lambda: watch("running text", fit.num_tokens, options.num_tokens))
    if options.finetune:
        fit.save(options.partial, key)  # that may take hours, and be interrupted


def _finetune(start: Start, trial: Trial, options: FitOptions, watch: Watch) -> Predictor:
    """Go on by gradient, from where an interrupted call ended."""
    before = start.info.finetune_steps
    training = Finetune(trial, start.predictor, options.finetune, before)
    path, key = options.trained, start.training_key(options)
    training.resume(path, key)
    pieces = options.corpus.pieces(start.base.tokenizer, _TRAINING_TOKENS, repeats=False)
    autosave = Autosave(lambda: training.save(path, key))

    def step_done(step: int, loss: float) -> None:
        autosave.note(lambda: watch(f"training (loss {loss:.3f})", step, options.finetune))

    return training.train(itertools.islice(pieces, before + training.step, None), step_done)
