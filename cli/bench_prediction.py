"""`edgekv bench quality`, `repair` and `humaneval`: what predicted KV costs."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgekv.cli.bench_run import Json, Lengths, Model, Pairs, run_bench
from edgekv.cli.options import (
    DEFAULT_MODEL,
    MODEL_HELP,
    Aux,
    Predictor,
    given_options,
    numbers,
)
from edgekv.cli.progress import DownloadProgress
from edgekv.config import PredictionOptions
from edgekv.errors import ConfigError

if TYPE_CHECKING:
    from edgekv.bench.report import Row, Watch


_CONTEXT = "384"
_CONTEXTS = "256,512,1024,2048"
_OF_CHATS, _OF_TEXTS = {"corrected_max"}, {"continuation", "plot"}


def quality(
    command: typer.Context,
    base: Annotated[str, typer.Option("--base", "-m", help=MODEL_HELP)] = DEFAULT_MODEL,
    predictor: Annotated[
        list[str] | None,
        typer.Option(help="A file, or the name of one that comes with edgekv; may be repeated."),
    ] = None,
    aux: Annotated[
        str | None, typer.Option(help="The predictors' auxiliary; alone, measure only that.")
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="A UTF-8 file; may be repeated. Python's own sources if none."),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Measure answers to chats about the text, as people ask.")
    ] = False,
    context: Annotated[
        str | None,
        typer.Option(
            help=f"Tokens that are prefilled  [{_CONTEXT}]; with --chat lengths of the passages, "
            f"separated by commas  [{_CONTEXTS}]."
        ),
    ] = None,
    continuation: Annotated[int, typer.Option(help="Tokens forced through behind them.")] = 128,
    samples: Annotated[
        int, typer.Option(help="Pieces of text; with --chat of each kind and length.")
    ] = 16,
    corrected_max: Annotated[
        float, typer.Option(help="With --chat: part of the answers that may be corrected.")
    ] = PredictionOptions.corrected_max,
    sinks: Annotated[int, typer.Option(help="First tokens, always computed.")] = 4,
    window: Annotated[int, typer.Option(help="Last tokens, always computed.")] = 32,
    json: Json = None,
    plot: Annotated[
        Path | None, typer.Option(help="Write quality against FLOPs and time to this picture.")
    ] = None,
) -> None:
    """What predicted KV costs in quality, beside exact, truncated and missing context.

    text: the continuation is what follows. copy: it repeats a passage that ended
    180 tokens back (recall).
    nll: nats a token; agree: likeliest tokens as with exact KV. needle: a code stated in the first
    tenth and asked for at the end, and its NLL. FLOPs: of the prefill, to exact. ms: of the
    prefill, to the first logits. recovered: of the loss against truncation at equal FLOPs.

    --chat: greedy answers of 64 tokens at most, over exact KV, and over predicted KV and confirmed,
    in turn; each file is a kind of text. early: answers that began before exact KV was there;
    ahead: tokens that were shown by then, a mean over these, and over all. corrected: answers of
    which exact KV said something else; erased: characters taken back, to those that stay. agree:
    first 16 tokens over predicted KV, with exact KV; first: the first. differ: answers that are not
    what exact KV says, ties those that part at equally likely tokens. seen: first text; sooner:
    exact TTFT to that, where it came early, and of all. certain: first text that stays. whole: all
    of the answer; ratio: ours to exact.
    """
    _check_part(command, chat=chat)
    contexts = numbers("context", context or (_CONTEXTS if chat else _CONTEXT))
    texts = tuple(text or ())
    if chat:
        prediction = PredictionOptions(
            aux=aux, sinks=sinks, window=window, corrected_max=corrected_max
        )
        _quality_of_chats(base, predictor, contexts, samples, texts, prediction, json)
        return
    from edgekv.bench.prediction.quality import plot_rows, print_rows, run_quality
    from edgekv.bench.prediction.quality_text import QualityOptions
    from edgekv.bench.prediction.quality_ways import open_subjects

    if len(contexts) > 1:
        raise ConfigError.of("context", context, "one number, but with --chat")
    options = QualityOptions(
        context=contexts[0],
        continuation=continuation,
        samples=samples,
        sinks=sinks,
        window=window,
        texts=texts,
    )

    def measure(progress: DownloadProgress, watch: "Watch") -> "list[Row]":
        opened, subjects = open_subjects(base, predictor or (), aux, progress)
        return run_quality(opened, subjects, options, watch)

    run_bench(base, measure, print_rows, json=json, plot=plot, draw=plot_rows)


def _quality_of_chats(
    base: str,
    predictors: list[str] | None,
    contexts: list[int],
    samples: int,
    texts: tuple[Path, ...],
    prediction: PredictionOptions,
    json: Path | None,
) -> None:
    from edgekv.bench.prediction.chat import ChatOptions, run_chat
    from edgekv.bench.prediction.chat_figures import print_chat, wrong_answers

    options = ChatOptions(
        contexts=tuple(contexts), samples=samples, texts=texts, prediction=prediction
    )
    measure = partial(run_chat, base, predictors or [None], options)
    run_bench(base, measure, print_chat, json=json, wrong=wrong_answers)


def _check_part(command: typer.Context, *, chat: bool) -> None:
    """Refuse what would be ignored."""
    foreign = _OF_TEXTS if chat else _OF_CHATS
    ignored = [option for name, option in given_options(command).items() if name in foreign]
    if ignored:
        raise ConfigError(
            f"{', '.join(ignored)} cannot apply {'with' if chat else 'without'} --chat",
            hint="leave it out" if len(ignored) == 1 else "leave them out",
        )


def repair(
    prompt_tokens: Lengths = "512",
    new_tokens: Annotated[int, typer.Option(help="Tokens of every answer.")] = 128,
    reps: Pairs = 6,
    model: Model = DEFAULT_MODEL,
    predictor: Predictor = None,
    aux: Aux = None,
    mode: Annotated[str, typer.Option("--repair", help="idle or eager.")] = "idle",
    json: Json = None,
) -> None:
    """What repairing predicted KV behind an answer costs that answer.

    caught up: answers that were all exact before their end. behind: how many of an answer's own
    tokens had to be replaced until then, at most. agreement: of the tokens said before that, the
    part that exact KV would have said. tok/s: of the whole answer. ratio: to an answer's over exact
    KV, run in turn, median over pairs; least: of the worst pair.
    """
    from edgekv.bench.prediction.repair import print_repair, run_repair
    from edgekv.bench.workload import Workload

    lengths = numbers("prompt-tokens", prompt_tokens)
    workloads = [Workload(lengths=(n,), new_tokens=new_tokens, reps=reps) for n in lengths]

    measure = partial(run_repair, model, workloads, predictor=predictor, aux=aux, repair=mode)
    run_bench(model, measure, print_repair, json=json)


def humaneval(
    base: Annotated[str, typer.Option("--base", "-m", help=MODEL_HELP)] = DEFAULT_MODEL,
    predictor: Predictor = None,
    aux: Aux = None,
    problems: Annotated[int, typer.Option(help="The first so many.")] = 40,
    new_tokens: Annotated[int, typer.Option(help="Of an answer, at most.")] = 200,
    sessions: Annotated[int, typer.Option(help="That decode together.")] = 8,
    answers: Annotated[
        Path | None, typer.Option(help="Keep answers in this file, and go on with those in it.")
    ] = None,
    json: Json = None,
) -> None:
    """Functions written over exact, confirmed and predicted KV, and run: HumanEval.

    Runs what a model wrote, in processes that are no sandbox; needs edgekv[bench]. confirmed:
    predicted and repaired behind the answer, must be as exact. predicted: approximate, neither
    confirmed nor repaired. auxiliary alone: exact, of that model. as exact: the same answers.
    first 16: of exact's first tokens the part before the first that differs. predicted, behind it:
    tokens of a prompt.
    """
    from edgekv.bench.prediction.humaneval import (
        Options,
        print_humaneval,
        run_humaneval,
        wrong_functions,
    )

    options = Options(
        problems=problems,
        new_tokens=new_tokens,
        sessions=sessions,
        prediction=PredictionOptions(predictor=predictor, aux=aux),
        answers=answers,
    )
    measure = partial(run_humaneval, base, options)
    run_bench(base, measure, print_humaneval, json=json, wrong=wrong_functions)
