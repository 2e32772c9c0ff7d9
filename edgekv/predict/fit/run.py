"""What `edgekv fit` is asked for, and what it does, from models and text to a predictor's file.

A predictor begins in sums over text (`closed_form`), or as it was (`further`), and may be trained.
What was summed up and trained is saved beside the file; the same call goes on from there.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
from xxhash import xxh3_128_hexdigest

from edgekv.config import GIB, check_float, check_int
from edgekv.device import give_back_freed_pages, profile
from edgekv.errors import ConfigError
from edgekv.models.cache import Progress
from edgekv.models.open_model import OpenModel, open_model
from edgekv.predict.artifact import PredictorInfo, as_saved, save_predictor
from edgekv.predict.fit.calibrate import calibrate
from edgekv.predict.fit.chats import chat_prompts
from edgekv.predict.fit.checkpoint import Autosave, remove_partial
from edgekv.predict.fit.closed_form import Fit, is_held_out
from edgekv.predict.fit.corpus import Corpus, text_files
from edgekv.predict.fit.finetune import Finetune, Piece
from edgekv.predict.fit.passes import MemoryPlan
from edgekv.predict.fit.shapes import FeatureOptions, block_shapes, usual_rank
from edgekv.predict.fit.thin import ThinOptions, check_shape, fit_thin, kept_bytes
from edgekv.predict.fit.trial import Trial
from edgekv.predict.opening import open_pair, open_predictor
from edgekv.predict.predictor import Kind, Predictor
from edgekv.predict.prune import fraction_of, open_auxiliary
from edgekv.predict.shipped import find_predictor
from edgekv.predict.tensor_file import SUFFIX, check_writable
from edgekv.predict.thin import check_thinnable
from edgekv.tokenizer import Tokenizer

Watch = Callable[[str, int, int], None]  # what happens, how much is done, of how much

# What an interrupted call leaves beside its output: sums over text, and what a training came to.
PARTIAL, TRAINING = f".partial{SUFFIX}", f".training{SUFFIX}"
_NUM_TOKENS = 200_000
_PIECE_TOKENS = 512
_TRAINING_TOKENS = 1024  # of a piece
_LONG_EVERY, _LONG_TOKENS = 4, 2048  # so many texts, one is that long
_HELD_OUT = 8  # pieces that the predictor's quality is measured on
_ANSWERS = 128
_CHAT_EXTRA = 128  # tokens of a training's chat that its passage leaves to all else, about
_CHAT_TOKENS = 1024  # of a passage that a chat is about, at most
_MEMORY_SHARE = 0.5  # of the device's memory, by default
_OTHER_BYTES = GIB // 2  # what is neither weights nor sums: Python, and activations of a piece


@dataclass(frozen=True, kw_only=True)
class FitOptions:
    """What is fitted to which models and text: values, which look at no file."""

    base: str  # whose KV is predicted
    out: Path
    # The auxiliary model, or `prune:FRACTION` of the base; None fits kind "self".
    aux: str | None = None
    # A predictor to train further, a file or the name of one that comes with edgekv; what it is
    # says the file, and no closed form is fitted.
    start: str | None = None
    self_depth: int | None = None  # kind "self": how many of the base's first layers run
    thin: ThinOptions | None = None  # of the others, thin layers instead of maps
    features: FeatureOptions = field(default_factory=FeatureOptions)
    rank: int | None = None  # of the factors; 0 for full rank, None as `shapes.usual_rank` says
    num_tokens: int = _NUM_TOKENS
    corpus: Corpus = field(default_factory=Corpus)
    # That all of it may take, models and Python too; more makes fewer passes over the text. By
    # default half of what the device has.
    memory_gib: float | None = None
    finetune: int = 0  # gradient steps behind the closed form
    # Part of these that are about chats' prompts, and the base's own answers to them.
    chat_share: float = 0.0
    calibrate: int = _ANSWERS  # answers that say how sure is sure enough

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
        elif self.thin is not None:
            raise ConfigError(
                "thin layers are the base's own, behind its first ones",
                hint="pass --self-depth LAYERS, or leave --thin out",
            )
        if self.thin is not None and (self.features, self.rank) != (FeatureOptions(), None):
            raise ConfigError(
                "thin layers look at no features and have no rank",
                hint="leave these out, or --thin",
            )
        if self.rank is not None:
            check_int("rank", self.rank, 0, 1 << 16)
        check_int("finetune", self.finetune, 0, 1 << 24)
        check_float("chat-share", self.chat_share, 0.0, 1.0)
        check_int("calibrate", self.calibrate, 0, 1 << 16)
        check_int("tokens", self.num_tokens, 32 * _PIECE_TOKENS, 1 << 40)
        if self.memory_gib is not None:
            check_float("memory-gib", self.memory_gib, 0.0, float(1 << 20))

    def _check_start(self) -> None:
        fitted = (self.self_depth, self.features, self.rank, self.num_tokens, self.memory_gib)
        if (*fitted, self.thin) != (None, FeatureOptions(), None, _NUM_TOKENS, None, None):
            raise ConfigError(
                "a predictor that is trained further keeps its depth, features and rank, or thin "
                "layers, and is not fitted to tokens again",
                hint="leave them out, or --from",
            )
        if not self.finetune and not self.calibrate:
            raise ConfigError(
                "nothing would change", hint="pass --finetune STEPS or --calibrate ANSWERS"
            )

    @property
    def num_pieces(self) -> int:
        """Of text that is fitted to."""
        return -(-self.num_tokens // _PIECE_TOKENS)

    @property
    def memory_bytes(self) -> int:
        """That all of it may take."""
        if self.memory_gib is None:
            return int(_MEMORY_SHARE * profile().memory_bytes)
        return int(self.memory_gib * GIB)

    @property
    def training_key(self) -> str:
        """Names what is trained, beside what it begins in."""
        return f"{self.finetune} {self.chat_share}" if self.chat_share else str(self.finetune)

    def beside(self, what: str) -> Path:
        """Where an interrupted call leaves `PARTIAL` or `TRAINING`."""
        return self.out.with_name(self.out.name + what)


class Start(NamedTuple):
    """A predictor before it is trained, and its models."""

    base: OpenModel
    aux: OpenModel
    predictor: Predictor
    info: PredictorInfo
    key: str  # names all that it came from
    training_key: str  # names all that a training depends on


def run_fit(options: FitOptions, watch: Watch, progress: Progress | None = None) -> PredictorInfo:
    """Fit a predictor and write its file.

    Raises:
        ConfigError: The file cannot be written, a text is not there or too short, the models have
            fewer layers than is asked for, or what another call left unfinished stands in the way.
        PredictorCorrupt: The training diverged, or `start` is no whole predictor.
        ModelError: A model cannot be had.
        PredictorMismatch: The models have different tokenizers.
        OSError: The disk is full.
    """
    check_writable(options.out, beside=TRAINING)
    text_files(options.corpus.texts)
    begin = closed_form if options.thin is None else thin
    if options.start is not None:
        begin = further
    start = begin(options, watch, progress)
    predictor, info, quality = start.predictor, start.info, start.info.quality
    trial = Trial(base=start.base.decoder, aux=start.aux.decoder)
    tokenizer = start.base.tokenizer
    pieces = options.corpus.pieces(tokenizer, _PIECE_TOKENS, held_out=True, repeats=False)
    held = list(itertools.islice(pieces, _HELD_OUT))

    def measured(done: int) -> None:
        watch("measuring", done, len(held))

    if options.finetune:
        before = trial.quality(predictor, held, measured)
        quality = {f"{name}_before_training": value for name, value in before.items()}
        predictor = _finetune(start, trial, options, watch)
        steps = info.finetune_steps + options.finetune
        info = replace(info.uncalibrated(), finetune_steps=steps)
    predictor = as_saved(predictor)
    info = replace(info, quality=quality | trial.quality(predictor, held, measured))
    if options.calibrate:
        info = _calibrated(info, trial, predictor, tokenizer, options, watch)
    save_predictor(options.out, predictor, info)
    if options.finetune:
        remove_partial(options.beside(TRAINING), start.training_key)
    if options.start is None:
        remove_partial(options.beside(PARTIAL), start.key)
    return info


def _calibrated(
    info: PredictorInfo,
    trial: Trial,
    predictor: Predictor,
    tokenizer: Tokenizer,
    options: FitOptions,
    watch: Watch,
) -> PredictorInfo:
    """With how sure is sure enough, on text that was not fitted on."""
    num_tokens = min(_CHAT_TOKENS, trial.base.config.context_max // 2)
    pieces = options.corpus.pieces(tokenizer, num_tokens, held_out=True, repeats=False)
    chats = itertools.islice(pieces, options.calibrate)
    gate = calibrate(
        trial,
        predictor,
        tokenizer,
        chats,
        lambda done: watch("calibrating", done, options.calibrate),
    )
    return replace(info, num_answers=gate.num_answers, critical=list(map(list, gate.critical)))


def further(options: FitOptions, watch: Watch, progress: Progress | None) -> Start:
    """The predictor that is trained further."""
    del watch
    base = open_model(options.base, progress=progress)
    aux = None if options.aux is None else open_auxiliary(options.aux, base, progress=progress)
    file = find_predictor(base.name, options.start, base.fingerprint)
    predictor, info, aux = open_predictor(base, file, aux, dtype=mx.float32)  # to be trained
    if options.finetune and options.corpus.name != info.corpus:
        info = replace(info, corpus=f"{info.corpus}; then {options.corpus.name}")
    key = f"{xxh3_128_hexdigest(file.read_bytes())} {options.corpus.key()}"
    return Start(base, aux, predictor, info, key, training_key=f"{key} {options.training_key}")


def closed_form(options: FitOptions, watch: Watch, progress: Progress | None) -> Start:
    """A predictor from sums over text."""
    base, aux = open_pair(options.base, options.aux, progress=progress)
    kind: Kind = "self" if options.aux is None else "aux"
    depth = options.self_depth or aux.decoder.config.num_layers
    features, fraction = options.features, fraction_of(options.aux)
    shapes = block_shapes(kind, depth, base.decoder.config, features, fraction)
    if aux is not base:
        aux = replace(aux, decoder=aux.decoder.without_head())  # nobody asks for its logits
    configs = (base.decoder.config, aux.decoder.config)
    rank = usual_rank(shapes, *configs) if options.rank is None else options.rank or None
    passes = MemoryPlan(shapes, *configs, rank).passes(_room(options))
    models = f"{base.fingerprint} {aux.fingerprint} {features} {kind} {depth}"
    key = f"{models} {options.corpus.key()} {options.num_tokens} {rank} {passes}"
    fit = Fit(base.decoder, aux.decoder, kind, depth, shapes, rank=rank, passes=passes)
    _gather(fit, key, base.tokenizer, options, watch)
    predictor, r2 = fit.predictor()
    info = PredictorInfo(
        kind=kind,
        depth=depth,
        features=features.features,
        neighbours=0 if features.features == "paper" else features.neighbours,
        rank=rank,
        base=base.name,
        base_fingerprint=base.fingerprint,
        aux="" if options.aux is None else aux.name,
        aux_fingerprint=aux.fingerprint,
        tokenizer_fingerprint=base.tokenizer.fingerprint,
        corpus=options.corpus.name,
        num_tokens=options.num_pieces * _PIECE_TOKENS,
        quality={"held_out_r2": r2},
    )
    return Start(base, aux, predictor, info, key, f"{key} {options.training_key}")


def thin(options: FitOptions, watch: Watch, progress: Progress | None) -> Start:
    """A predictor of thin layers, each fitted behind the others."""
    assert options.thin is not None
    assert options.self_depth is not None
    base, _ = open_pair(options.base, None, progress=progress)
    last = base.decoder.config.num_layers - 1
    if options.self_depth > last:
        raise ConfigError.of("self-depth", options.self_depth, f"from 1 to {last}")
    check_thinnable(base.decoder, options.self_depth, base.name)
    check_shape(base.decoder, options.self_depth, options.thin)
    needed = kept_bytes(base.decoder, options.num_pieces * _PIECE_TOKENS)
    if needed > (room := _room(options)):
        raise ConfigError(
            f"what {options.num_tokens} tokens are between two layers takes {needed / GIB:.1f} GiB "
            f"beside the model; there are {max(0, room) / GIB:.1f}",
            hint="pass fewer --tokens or a larger --memory-gib",
        )
    pieces = options.corpus.pieces(base.tokenizer, _PIECE_TOKENS)
    predictor = fit_thin(
        base.decoder,
        options.self_depth,
        options.thin,
        list(itertools.islice(pieces, options.num_pieces)),
        watch,
    )
    info = PredictorInfo(
        kind="self",
        depth=options.self_depth,
        features="thin",
        neighbours=0,
        rank=None,
        base=base.name,
        base_fingerprint=base.fingerprint,
        aux_fingerprint=base.fingerprint,
        tokenizer_fingerprint=base.tokenizer.fingerprint,
        corpus=options.corpus.name,
        num_tokens=options.num_pieces * _PIECE_TOKENS,
    )
    key = f"{base.fingerprint} {options.thin} {options.self_depth} {options.corpus.key()}"
    key = f"{key} {options.num_tokens}"
    return Start(base, base, predictor, info, key, f"{key} {options.training_key}")


def _room(options: FitOptions) -> int:
    """Bytes for sums, and what solves them."""
    give_back_freed_pages()  # of the files that were read
    return options.memory_bytes - _OTHER_BYTES - mx.get_active_memory()


def _gather(fit: Fit, key: str, tokenizer: Tokenizer, options: FitOptions, watch: Watch) -> None:
    """Run the text through the models, pass by pass, from where an interrupted call ended."""
    path = options.beside(PARTIAL)
    fit.resume(path, key)
    autosave = Autosave(lambda: fit.save(path, key))
    while not fit.is_done:
        done = fit.num_pieces
        streams = [
            options.corpus.pieces(tokenizer, _PIECE_TOKENS, held_out=h) for h in (False, True)
        ]
        for number in range(options.num_pieces):
            piece = next(streams[is_held_out(number)])
            if number < done:
                continue
            fit.add(piece)
            autosave.note(lambda: watch("running text", *fit.progress(options.num_tokens)))
        give_back_freed_pages()
        fit.end_pass(lambda *solved: autosave.note(lambda: watch("solving", *solved)))
        give_back_freed_pages()
    if options.finetune:
        fit.save(path, key)  # that may take hours, and be interrupted


def _training_pieces(base: OpenModel, options: FitOptions) -> Iterator[Piece]:
    """Text, and chats about text in between."""
    tokenizer, share = base.tokenizer, options.chat_share
    longest = base.decoder.config.context_max
    texts, longer = (
        options.corpus.pieces(tokenizer, min(length, longest), repeats=False)
        for length in (_TRAINING_TOKENS, _LONG_TOKENS)
    )
    passages = options.corpus.pieces(tokenizer, _TRAINING_TOKENS - _CHAT_EXTRA, repeats=False)
    chats = chat_prompts(tokenizer, passages, shortest=_CHAT_EXTRA)
    num_texts = 0
    for number in itertools.count():
        if int((number + 1) * share) > int(number * share):
            yield Piece(next(chats), is_prompt=True)
        else:
            num_texts += 1
            yield Piece(next(texts if num_texts % _LONG_EVERY else longer))


def _finetune(start: Start, trial: Trial, options: FitOptions, watch: Watch) -> Predictor:
    """Go on by gradient, from where an interrupted call ended."""
    before = start.info.finetune_steps
    training = Finetune(trial, start.predictor, options.finetune, before)
    path, key = options.beside(TRAINING), start.training_key
    training.resume(path, key)
    pieces = _training_pieces(start.base, options)
    autosave = Autosave(lambda: training.save(path, key))

    def step_done(step: int, loss: float) -> None:
        autosave.note(lambda: watch(f"training (loss {loss:.3f})", step, options.finetune))

    return training.train(itertools.islice(pieces, before + training.step, None), step_done)
