"""From models and text to a predictor's file: what `edgekv fit` does."""

import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from xxhash import xxh3_128_hexdigest

from edgekv.config import check_float, check_int
from edgekv.errors import ConfigError, PredictorMismatch
from edgekv.models.cache import Progress
from edgekv.models.open_model import OpenModel, open_model
from edgekv.predict.artifact import PredictorInfo, save_predictor
from edgekv.predict.corpus import STDLIB, Corpus, corpus_files
from edgekv.predict.finetune import Finetune, FinetuneOptions
from edgekv.predict.fit import Fit, check_memory, is_held_out
from edgekv.predict.opening import open_predictor
from edgekv.predict.predictor import Kind, Predictor
from edgekv.predict.prune import PREFIX, fraction_of, open_auxiliary, source_layer
from edgekv.predict.shapes import FeatureOptions, block_shapes
from edgekv.predict.shipped import find_predictor
from edgekv.predict.trial import Trial
from edgekv.tokenizer import Tokenizer

PIECE_TOKENS = 512
_TRAINING_TOKENS = 1024  # of a piece
SAVE_EVERY_S = 120.0
_HELD_OUT = 8  # pieces that the predictor's quality is measured on
Watch = Callable[[str, int, int], None]  # what happens, how much is done, of how much


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """What is fitted, to what.

    Attributes:
        base: Whose KV is predicted.
        out: The file to write.
        aux: The auxiliary model, or `prune:FRACTION` of the base; None fits kind "self".
        start: A predictor to train further, a file or the name of one that comes with edgekv;
            what it is says the file, and no closed form is fitted.
        self_depth: Kind "self": how many of the base's first layers run.
        features: What is looked at.
        rank: Of the factors; None for full rank.
        num_tokens: Of text.
        texts: UTF-8 files; () takes the standard library.
        stdlib_share: Part of the text that comes from the standard library all the same.
        finetune: Gradient steps behind the closed form.
    """

    base: str
    out: Path
    aux: str | None = None
    start: str | None = None
    self_depth: int | None = None
    features: FeatureOptions = field(default_factory=FeatureOptions)
    rank: int | None = 512
    num_tokens: int = 200_000
    texts: tuple[Path, ...] = ()
    stdlib_share: float = 0.0
    finetune: int = 0

    def __post_init__(self) -> None:
        if self.start is not None:
            self._check_start()
        elif (self.aux is None) == (self.self_depth is None):
            raise ConfigError(
                "a predictor has one auxiliary",
                hint="pass either --aux MODEL or --self-depth LAYERS",
            )
        if self.self_depth is not None:
            check_int("self-depth", self.self_depth, 1, 1 << 12)
        if self.rank is not None:
            check_int("rank", self.rank, 1, 1 << 16)
        check_float("stdlib-share", self.stdlib_share, 0.0, 1.0)
        corpus_files(self.texts)
        check_int("finetune", self.finetune, 0, 1 << 24)
        check_int("tokens", self.num_tokens, 32 * PIECE_TOKENS, 1 << 40)
        if self.out.is_dir() or not self.out.parent.is_dir():
            raise ConfigError.of("out", str(self.out), "a file in a folder that exists")

    def _check_start(self) -> None:
        if self.self_depth is not None:
            raise ConfigError(
                "a predictor that is trained further has its depth",
                hint="leave out --self-depth, or --from",
            )
        if not self.finetune:
            raise ConfigError("training further takes steps", hint="pass --finetune STEPS")

    @property
    def corpus(self) -> Corpus:
        """What is fitted on."""
        return Corpus(texts=self.texts, stdlib_share=self.stdlib_share)

    @property
    def corpus_name(self) -> str:
        """What is fitted on, in words."""
        names = [path.name for path in self.texts]
        if self.stdlib_share or not names:
            names.append(STDLIB)
        return ", ".join(names)

    @property
    def kind(self) -> Kind:
        """See `Predictor`."""
        return "self" if self.aux is None else "aux"


def run_fit(
    options: FitOptions, *, progress: Progress | None = None, watch: Watch | None = None
) -> PredictorInfo:
    """Fit a predictor and write its file.

    What was summed up is saved every two minutes beside the file; the same call goes on from there
    after an interruption.

    Raises:
        ConfigError: An option is out of range, or the text too short.
        ModelError: A model cannot be had.
        PredictorMismatch: The models have different tokenizers.
        OSError: The file cannot be written.
    """
    begin = _closed_form if options.start is None else _further
    start = begin(options, progress, watch)
    base, predictor, info = start.base, start.predictor, start.info
    trial = Trial(base=base.decoder, aux=start.aux.decoder)
    if options.finetune:
        predictor = _finetune(start, trial, options, watch)
        steps = info.finetune_steps + options.finetune
        info = replace(info, finetune_steps=steps, quality={})
    pieces = options.corpus.pieces(base.tokenizer, PIECE_TOKENS, held_out=True, repeats=False)
    held = list(itertools.islice(pieces, _HELD_OUT))
    info = replace(info, quality=info.quality | trial.quality(predictor, held))
    save_predictor(options.out, predictor, info)
    for left in (_trained(options.out), _partial(options.out)):
        left.unlink(missing_ok=True)
    return info


@dataclass(frozen=True, kw_only=True)
class _Start:
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


def _further(options: FitOptions, progress: Progress | None, watch: Watch | None) -> _Start:
    """The predictor that is trained further."""
    del watch
    base = open_model(options.base, progress=progress)
    aux = None
    if options.aux is not None:
        aux = open_auxiliary(options.aux, base, progress=progress)
    file = find_predictor(base.name, options.start)
    opened = open_predictor(base, file, aux)
    corpus = opened.info.corpus
    if options.corpus_name != corpus:
        corpus += f"; then {options.corpus_name}"
    return _Start(
        base=base,
        aux=opened.aux,
        predictor=opened.predictor,
        info=replace(opened.info, corpus=corpus),
        key=f"{xxh3_128_hexdigest(file.read_bytes())} {_text_key(options)}",
    )


def _closed_form(options: FitOptions, progress: Progress | None, watch: Watch | None) -> _Start:
    """A predictor from sums over text."""
    base, aux = _open(options, progress)
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
    return _Start(
        base=base,
        aux=aux,
        predictor=solved.predictor,
        info=replace(info, num_tokens=fit.num_tokens, quality=quality),
        key=f"{key} {options.num_tokens} {options.rank}",
    )


def _open(options: FitOptions, progress: Progress | None) -> tuple[OpenModel, OpenModel]:
    """The base and its auxiliary."""
    base = open_model(options.base, progress=progress)
    if options.aux is None:
        return base, base
    aux = open_auxiliary(options.aux, base, progress=progress)
    if aux.tokenizer.fingerprint != base.tokenizer.fingerprint:
        raise PredictorMismatch(
            f"the tokenizer of {base.name} has fingerprint {base.tokenizer.fingerprint}, that of "
            f"{aux.name} {aux.tokenizer.fingerprint}",
            hint="an auxiliary must have the base's tokenizer",
        )
    return base, aux


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


def _finetune(start: _Start, trial: Trial, options: FitOptions, watch: Watch | None) -> Predictor:
    """Go on by gradient, from where an interrupted call ended."""
    training = Finetune(trial, start.predictor, FinetuneOptions(steps=options.finetune))
    path, key = _trained(options.out), f"{start.key} {options.finetune}"
    training.resume(path, key)
    pieces = options.corpus.pieces(start.base.tokenizer, _TRAINING_TOKENS, repeats=False)
    saved_s = time.monotonic()

    def step_done(step: int, loss: float) -> None:
        nonlocal saved_s
        if watch is not None:
            watch(f"training (loss {loss:.3f})", step, options.finetune)
        if time.monotonic() - saved_s > SAVE_EVERY_S:
            training.save(path, key)
            saved_s = time.monotonic()

    return training.train(itertools.islice(pieces, training.step, None), step_done)


def _trained(out: Path) -> Path:
    return out.with_name(f"{out.name}.training.safetensors")


def _key(options: FitOptions, fit: Fit, base: OpenModel, aux: OpenModel) -> str:
    """Of all that sums depend on, but how many tokens they are of."""
    return (
        f"{base.fingerprint} {aux.fingerprint} {options.features} {fit.kind} {fit.depth} "
        f"{_text_key(options)}"
    )


def _text_key(options: FitOptions) -> str:
    """Of the text."""
    stats = [(path.resolve(), path.stat()) for path in options.texts]
    texts = [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    return f"{texts} {options.stdlib_share} {sys.version}"


def _gather(
    fit: Fit, key: str, tokenizer: Tokenizer, options: FitOptions, watch: Watch | None
) -> None:
    """Run the text through the models, from where an interrupted call ended."""
    partial = _partial(options.out)
    fit.resume(partial, key)
    done = fit.num_pieces
    saved_s = time.monotonic()
    streams = [options.corpus.pieces(tokenizer, PIECE_TOKENS, held_out=h) for h in (False, True)]
    for number in range(-(-options.num_tokens // PIECE_TOKENS)):
        piece = next(streams[is_held_out(number)])
        if number < done:
            continue
        fit.add(piece)
        if watch is not None:
            watch("running text", fit.num_tokens, options.num_tokens)
        if time.monotonic() - saved_s > SAVE_EVERY_S:
            fit.save(partial, key)
            saved_s = time.monotonic()
    if options.finetune:
        fit.save(partial, key)  # that may take hours, and be interrupted


def _partial(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial.safetensors")
