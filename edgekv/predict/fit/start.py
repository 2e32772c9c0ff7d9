"""Where a predictor begins, before it is trained: in sums over text, or as it was."""

from dataclasses import dataclass, replace
from functools import partial

import mlx.core as mx
from xxhash import xxh3_128_hexdigest

from edgekv.models.cache import Progress
from edgekv.models.open_model import OpenModel, open_model
from edgekv.predict.artifact import PredictorInfo
from edgekv.predict.fit.checkpoint import Autosave
from edgekv.predict.fit.closed_form import Fit, check_memory, is_held_out
from edgekv.predict.fit.options import PIECE_TOKENS, FitOptions, Watch
from edgekv.predict.fit.shapes import block_shapes
from edgekv.predict.opening import open_pair, open_predictor
from edgekv.predict.predictor import Predictor
from edgekv.predict.prune import PREFIX, fraction_of, open_auxiliary, source_layer
from edgekv.predict.shipped import find_predictor
from edgekv.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Start:
    """A predictor before it is trained.

    Attributes:
        base: Whose KV is predicted.
        aux: From whose pass.
        predictor: As it is.
        info: What it was made of.
        key: Of all that a training depends on, but how many steps it takes.
    """

    base: OpenModel
    aux: OpenModel
    predictor: Predictor
    info: PredictorInfo
    key: str


def further(options: FitOptions, progress: Progress | None, watch: Watch | None) -> Start:
    """The predictor that is trained further."""
    del watch
    base = open_model(options.base, progress=progress)
    aux = None
    if options.aux is not None:
        aux = open_auxiliary(options.aux, base, progress=progress)
    file = find_predictor(base.name, options.start, base.fingerprint)
    opened = open_predictor(base, file, aux, dtype=mx.float32)  # to be trained
    corpus = opened.info.corpus
    if options.corpus_name != corpus:
        corpus += f"; then {options.corpus_name}"
    return Start(
        base=base,
        aux=opened.aux,
        predictor=opened.predictor,
        info=replace(opened.info, corpus=corpus),
        key=f"{xxh3_128_hexdigest(file.read_bytes())} {options.text_key}",
    )


def closed_form(options: FitOptions, progress: Progress | None, watch: Watch | None) -> Start:
    """A predictor from sums over text."""
    base, aux = open_pair(options.base, options.aux, progress=progress)
    depth = options.self_depth or aux.decoder.config.num_layers
    source = None
    if options.aux is not None and options.aux.startswith(PREFIX):
        source = partial(source_layer, fraction_of(options.aux))
    shapes = block_shapes(options.kind, depth, base.decoder.config, options.features, source)
    check_memory(shapes, base.decoder.config, aux.decoder.config)
    fit = Fit(base.decoder, aux.decoder, options.kind, depth, shapes)
    key = _key(options, fit, base, aux)
    _gather(fit, key, base.tokenizer, options, watch)
    if watch is not None:
        watch("solving", 0, len(shapes))
    solved = fit.solve(options.rank, lambda n: watch and watch("solving", n, len(shapes)))
    info = _info(options, depth, base, aux)
    quality = {"held_out_r2": solved.r2_mean}
    return Start(
        base=base,
        aux=aux,
        predictor=solved.predictor,
        info=replace(info, num_tokens=fit.num_tokens, quality=quality),
        key=f"{key} {options.num_tokens} {options.rank}",
    )


def _info(options: FitOptions, depth: int, base: OpenModel, aux: OpenModel) -> PredictorInfo:
    """What is known before anything is fitted."""
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
        corpus=options.corpus_name,
        num_tokens=0,
        quality={},
    )


def _key(options: FitOptions, fit: Fit, base: OpenModel, aux: OpenModel) -> str:
    """Of all that sums depend on, but how many tokens they are of."""
    return (
        f"{base.fingerprint} {aux.fingerprint} {options.features} {fit.kind} {fit.depth} "
        f"{options.text_key}"
    )


def _gather(
    fit: Fit, key: str, tokenizer: Tokenizer, options: FitOptions, watch: Watch | None
) -> None:
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
        autosave.note(lambda: watch and watch("running text", fit.num_tokens, options.num_tokens))
    if options.finetune:
        fit.save(options.partial, key)  # that may take hours, and be interrupted
