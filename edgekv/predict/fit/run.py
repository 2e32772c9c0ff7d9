"""From models and text to a predictor's file: what `edgekv fit` does."""

import itertools
from dataclasses import replace

from edgekv.models.cache import Progress
from edgekv.predict.artifact import PredictorInfo, as_saved, save_predictor
from edgekv.predict.fit.checkpoint import Autosave
from edgekv.predict.fit.finetune import Finetune, FinetuneOptions
from edgekv.predict.fit.options import PIECE_TOKENS, FitOptions, Watch
from edgekv.predict.fit.start import Start, closed_form, further
from edgekv.predict.fit.trial import Trial
from edgekv.predict.predictor import Predictor

_TRAINING_TOKENS = 1024  # of a piece
_HELD_OUT = 8  # pieces that the predictor's quality is measured on


def run_fit(
    options: FitOptions, *, progress: Progress | None = None, watch: Watch | None = None
) -> PredictorInfo:
    """Fit a predictor and write its file.

    What was summed up is saved every two minutes beside the file; the same call goes on from there
    after an interruption.

    Raises:
        ConfigError: An option is out of range, the text too short, or what another call left
            unfinished stands in the way.
        PredictorCorrupt: The training diverged, or `start` is no whole predictor.
        ModelError: A model cannot be had.
        PredictorMismatch: The models have different tokenizers.
        OSError: The file cannot be written.
    """
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
    # What this call did not go on from is of another, unfinished.
    if options.finetune:
        options.trained.unlink(missing_ok=True)
    if options.start is None:
        options.partial.unlink(missing_ok=True)
    return info


def _finetune(start: Start, trial: Trial, options: FitOptions, watch: Watch | None) -> Predictor:
    """Go on by gradient, from where an interrupted call ended."""
    before = start.info.finetune_steps
    training = Finetune(
        trial, start.predictor, FinetuneOptions(steps=options.finetune, before=before)
    )
    path, key = options.trained, f"{start.key} {options.finetune}"
    training.resume(path, key)
    pieces = options.corpus.pieces(start.base.tokenizer, _TRAINING_TOKENS, repeats=False)
    autosave = Autosave(lambda: training.save(path, key))

    def step_done(step: int, loss: float) -> None:
        what = f"training (loss {loss:.3f})"
        autosave.note(lambda: watch and watch(what, step, options.finetune))

    return training.train(itertools.islice(pieces, before + training.step, None), step_done)
