"""`edgekv fit`: fit a KV predictor to a model."""

import json
import math
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgekv.cli.options import DEFAULT_MODEL, MODEL_HELP, Json, fetching, given_options
from edgekv.cli.progress import DownloadProgress, Eta, stop_request
from edgekv.clock import MonotonicClock
from edgekv.config import PredictionOptions
from edgekv.errors import ConfigError

if TYPE_CHECKING:
    from edgekv.predict.artifact import PredictorInfo
    from edgekv.predict.fit.run import Watch
    from edgekv.predict.fit.thin import ThinOptions

_OF_AN_IMPORT = {"from_corenet", "out", "base", "aux", "prune", "as_json"}


_Out = Annotated[Path, typer.Option("--out", "-o", help="The predictor's file to write.")]
_Base = Annotated[str, typer.Option(help=f"Whose KV is predicted. {MODEL_HELP}")]
_Auxiliary = Annotated[
    str | None, typer.Option(help="A smaller model with the same tokenizer to predict from.")
]
_SelfDepth = Annotated[
    int | None, typer.Option(help="Or predict from the base's own first layers: how many.")
]
_Prune = Annotated[
    str | None,
    typer.Option(help="Or from an auxiliary cut out of the base: 0.25, 0.5 or 0.75 of it."),
]
_Start = Annotated[
    str | None,
    typer.Option("--from", help="Or train this one further: a file or a name; its shape stays"),
]
_Thin = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Of the other layers, thin ones instead of maps: how many, the first ones, keep "
        "heads of their attention.",
    ),
]
_Heads = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Query heads of each attention that --thin keeps: those whose output a linear map "
        "of the row knows least.",
        show_default="all",
    ),
]
_Neurons = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Of each MLP, that thin layers keep: those whose output is largest.",
        show_default="128",
    ),
]
_Features = Annotated[
    str, typer.Option(help="What is looked at: all, mapped (one layer and its like) or paper.")
]
_Neighbours = Annotated[int, typer.Option(help="Previous tokens that are looked at too.")]
_NeighbourDepths = Annotated[int, typer.Option(help="At how many depths.")]
_Rank = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Of the factors; 0 for full rank.",
        show_default="512, or as much as 4% of the base's work allows",
    ),
]
_Tokens = Annotated[int, typer.Option(help="Of text to fit on.")]
_Text = Annotated[
    list[Path] | None,
    typer.Option(help="A UTF-8 file; may be repeated. Python's standard library if none."),
]
_StdlibShare = Annotated[
    float, typer.Option(help="Part of the text that is code of the standard library.")
]
_MemoryGib = Annotated[
    float | None,
    typer.Option(
        help="All that it may take, models too; less makes more passes over the text. By default "
        "half of what the device has."
    ),
]
_Finetune = Annotated[int, typer.Option(help="Gradient steps behind that; slow, and resumable.")]
_ChatShare = Annotated[
    float, typer.Option(help="Part of these that are on chats, with the model's own answers.")
]
_Calibrate = Annotated[
    int, typer.Option(help="Answers to chats about held-out text that say how sure is sure enough.")
]
_FromCorenet = Annotated[
    Path | None,
    typer.Option(help="Import this KV-prediction checkpoint of apple/corenet; fit nothing."),
]


def fit(
    context: typer.Context,
    out: _Out,
    base: _Base = DEFAULT_MODEL,
    aux: _Auxiliary = None,
    self_depth: _SelfDepth = None,
    prune: _Prune = None,
    start: _Start = None,
    thin: _Thin = None,
    heads: _Heads = None,
    neurons: _Neurons = None,
    features: _Features = "all",
    neighbours: _Neighbours = 2,
    neighbour_depths: _NeighbourDepths = 1,
    rank: _Rank = None,
    tokens: _Tokens = 200_000,
    text: _Text = None,
    stdlib_share: _StdlibShare = 0.0,
    memory_gib: _MemoryGib = None,
    finetune: _Finetune = 0,
    chat_share: _ChatShare = 0.0,
    calibrate: _Calibrate = 128,
    from_corenet: _FromCorenet = None,
    as_json: Json = False,
) -> None:
    """Fit a KV predictor: a pass over text and no gradients, minutes on a laptop.

    Interrupted, the same command goes on where it was; thin layers are fitted anew, a training of
    them goes on.
    """
    if aux is not None and prune is not None:
        raise ConfigError("--aux and --prune exclude each other", hint="pass one of them")
    auxiliary = aux if prune is None else f"prune:{prune}"
    if from_corenet is not None:
        _check_import(context)
        _import(from_corenet, out, base, auxiliary, as_json=as_json)
        return
    with _watching(resumes=thin is None) as (progress, watch):
        progress.announce(f"loading {base} …", at_once=True)
        from edgekv.predict.fit.corpus import Corpus
        from edgekv.predict.fit.run import FitOptions, run_fit
        from edgekv.predict.fit.shapes import FeatureOptions

        options = FitOptions(
            base=base,
            out=out,
            aux=auxiliary,
            start=start,
            self_depth=self_depth,
            thin=_thin_options(thin, heads, neurons),
            features=FeatureOptions(
                features=features,  # type: ignore[arg-type]  # it checks
                neighbours=neighbours,
                neighbour_depths=neighbour_depths,
            ),
            rank=rank,
            num_tokens=tokens,
            corpus=Corpus(texts=tuple(text or ()), stdlib_share=stdlib_share),
            memory_gib=memory_gib,
            finetune=finetune,
            chat_share=chat_share,
            calibrate=calibrate,
        )
        info = run_fit(options, progress=progress, watch=watch)
    if as_json:
        print(json.dumps({"path": str(out), **asdict(info)}))
    else:
        print(_told(out, info, was_trained=finetune > 0))


def _thin_options(thin: int | None, heads: int | None, neurons: int | None) -> "ThinOptions | None":
    from edgekv.predict.fit.thin import ThinOptions

    options = {"heads": heads, "neurons": neurons}
    given = {name: value for name, value in options.items() if value is not None}
    if thin is not None:
        return ThinOptions(attending=thin, **given)
    for name in given:
        raise ConfigError(f"--{name} is about thin layers", hint="pass --thin LAYERS too")
    return None


def _told(out: Path, info: "PredictorInfo", *, was_trained: bool) -> str:
    """What came out, on one line."""
    figures = (
        f"{info.quality['text_kl']:.3f} nats a token from exact, "
        f"{info.quality['copy_kl']:.3f} where it repeats itself"
    )
    if was_trained:
        figures += (
            f" (before training {info.quality['text_kl_before_training']:.3f} and "
            f"{info.quality['copy_kl_before_training']:.3f})"
        )
    return (
        f"{out}: {info.kind}, depth {info.depth}, {info.num_tokens} tokens of {info.corpus}; "
        f"on held-out text {figures}; {_shown_ahead(info)}"
    )


def _shown_ahead(info: "PredictorInfo") -> str:
    """How sure is sure enough."""
    if not info.num_answers:
        return "not calibrated, so nothing is shown ahead of exact KV"
    corrected_max = PredictionOptions().corrected_max
    certain_min = info.gate.threshold(corrected_max, len(info.critical) - 1)
    if math.isinf(certain_min):
        return (
            f"{info.num_answers} answers are too few to tell when {corrected_max:.0%} would be "
            "corrected, so nothing is shown ahead of exact KV"
        )
    return (
        f"by {info.num_answers} answers, tokens are shown ahead of exact KV from a certainty of "
        f"{certain_min:.1f} on, for {corrected_max:.0%} corrected"
    )


@contextmanager
def _watching(*, resumes: bool) -> "Iterator[tuple[DownloadProgress, Watch]]":
    """Shows how far a fit is, and ends it at Ctrl-C between two pieces, where all can be saved."""
    etas, clock = dict[str, Eta](), MonotonicClock()
    stops: list[threading.Event] = []
    try:
        with fetching() as progress, ExitStack() as stack:

            def watch(what: str, done: int, total: int) -> None:
                if not stops:  # until something is done there is nothing to save
                    stops.append(stack.enter_context(stop_request()))
                if stops[0].is_set():
                    raise KeyboardInterrupt
                name = what.partition(" (")[0]
                is_new = name not in etas
                left = etas.setdefault(name, Eta()).left(done, total, clock.now_ms())
                progress.watch(what, done, total, left, at_once=is_new)

            yield progress, watch
    except KeyboardInterrupt:
        if any(stop.is_set() for stop in stops):
            how = "goes on from here" if resumes else "fits thin layers anew"
            print(f"stopped; the same command {how}", file=sys.stderr)
        raise


def _check_import(context: typer.Context) -> None:
    """Refuse what would be ignored."""
    given = [opt for name, opt in given_options(context).items() if name not in _OF_AN_IMPORT]
    if given:
        raise ConfigError(
            f"--from-corenet fits nothing, so {', '.join(given)} cannot apply",
            hint="leave it out" if len(given) == 1 else "leave them out",
        )


def _import(checkpoint: Path, out: Path, base: str, aux: str | None, *, as_json: bool) -> None:
    from edgekv.predict.fit.corenet import import_corenet

    if aux is None:
        raise ConfigError(
            "--from-corenet needs the auxiliary's shape", hint="pass --aux MODEL or --prune PART"
        )
    if not checkpoint.is_file():
        raise ConfigError.of("from-corenet", str(checkpoint), "a file")
    with fetching() as progress:
        info = import_corenet(checkpoint, out, base=base, aux=aux, progress=progress)
    if as_json:
        print(json.dumps({"path": str(out), **asdict(info)}))
    else:
        print(f"{out}: {info.kind}, depth {info.depth}; its auxiliary is {info.aux}")
