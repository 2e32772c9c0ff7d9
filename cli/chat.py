"""`edgekv chat`: one answer, or a conversation."""

import json
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from edgekv.cli.join import CHAT_APP, join
from edgekv.cli.options import DEFAULT_MODEL, MODEL_HELP, Aux, Predictor, fetching
from edgekv.cli.progress import say
from edgekv.cli.render import one_line, stats_line
from edgekv.cli.reply import check_text, remark, stream_reply, warn
from edgekv.cli.streams import read_stdin
from edgekv.config import PredictionOptions, RuntimeConfig, SamplingParams, StoreOptions
from edgekv.errors import (
    ConfigError,
    ModelError,
    PredictorCorrupt,
    PredictorMismatch,
    PromptEmpty,
    RequestError,
    StoreBusy,
    StoreError,
)
from edgekv.ranks.launched import launched

if TYPE_CHECKING:
    from edgekv.client import Connection
    from edgekv.runtime import Runtime, Session

STDIN_BYTES_MAX = 16 << 20  # no model's context is near; a device file must not fill the memory
STDIN_PATIENCE_S = 2.0  # before it is said what is waited for
ANSWER_TOKENS_MAX = 2048  # a greedy answer may repeat itself for ever

_Disk = Literal["needed", "welcome", "unused"]

_BEGIN_HINT = "begin one with edgekv chat --session NAME"

_Prompt = Annotated[
    str | None, typer.Argument(help="Answer this and exit; piped stdin is added to it.")
]
_Model = Annotated[
    str | None, typer.Option("--model", "-m", help=f"{MODEL_HELP}  [{DEFAULT_MODEL}]")
]
_Name = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="Keep the conversation under NAME; go on with it if it is there."
    ),
]
_Continue = Annotated[
    bool, typer.Option("--continue", "-c", help="Go on with the session that was used last.")
]
_System = Annotated[
    str | None, typer.Option("--system", "-s", help="System prompt: instructions to follow.")
]
_MaxTokens = Annotated[int, typer.Option(help="Cut an answer after this many tokens.")]
_Temperature = Annotated[
    float | None, typer.Option(help="0 takes the likeliest token (default: the model's).")
]
_TopK = Annotated[int | None, typer.Option(help="Keep the k likeliest; 0: all.")]
_TopP = Annotated[
    float | None, typer.Option(help="Keep the likeliest tokens up to this probability.")
]
_MinP = Annotated[
    float | None, typer.Option(help="Drop tokens under this fraction of the likeliest.")
]
_RepetitionPenalty = Annotated[
    float | None, typer.Option(help="Above 1: avoid tokens that occurred.")
]
_Seed = Annotated[int | None, typer.Option(help="Same seed, same text (default: random).")]
_Stop = Annotated[list[str] | None, typer.Option(help="Stop before this text; may be repeated.")]
_ChatTemplate = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Which of the model's chat templates (default: its own)."),
]
_PoolGib = Annotated[
    float | None, typer.Option(help="Hard budget of KV memory (default: the device's).")
]
_Prefill = Annotated[
    str | None,
    typer.Option(
        help="exact (default), predict (fill the KV of long prompts by prediction: first words "
        "sooner) or auto (predict where exact would be slow)."
    ),
]
_Local = Annotated[
    bool,
    typer.Option(
        "--local",
        help="Load the model here, also where a daemon runs that serves it; so do --pool-gib, "
        "--predictor, --aux and --chat-template.",
    ),
]
_NoHistory = Annotated[
    bool, typer.Option("--no-history", help="Neither read nor keep what is typed.")
]
_Json = Annotated[
    bool, typer.Option("--json", help="Print text, finish_reason and stats as one object.")
]


def chat(
    prompt: _Prompt = None,
    model: _Model = None,
    session: _Name = None,
    resume: _Continue = False,
    system: _System = None,
    max_tokens: _MaxTokens = ANSWER_TOKENS_MAX,
    temperature: _Temperature = None,
    top_k: _TopK = None,
    top_p: _TopP = None,
    min_p: _MinP = None,
    repetition_penalty: _RepetitionPenalty = None,
    seed: _Seed = None,
    stop: _Stop = None,
    chat_template: _ChatTemplate = None,
    pool_gib: _PoolGib = None,
    prefill: _Prefill = None,
    predictor: Predictor = None,
    aux: Aux = None,
    local: _Local = False,
    no_history: _NoHistory = False,
    as_json: _Json = False,
) -> None:
    """Chat with a model; with a prompt or piped stdin, answer once.

    Ctrl-C stops a reply. In the conversation /? lists the commands. What is said is kept only in a
    session with a name; edgekv sessions lists them. Where edgekv serve runs with the model that is
    asked for, the chat joins it.
    """
    sampling = _sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        max_tokens=max_tokens,
        stop=tuple(stop) if stop else None,
    )
    prediction = _prediction(prefill or "exact", predictor, aux)
    text = one_shot_text(prompt)
    _check_asked(text, system, session, resume=resume, as_json=as_json)
    if resume and model is None:
        model = last_model()
    has_name = resume or session is not None
    # One answer without a name needs no disk, and leaves the store to who does.
    disk: _Disk = "needed" if has_name else "welcome" if text is None else "unused"
    offers = text is None and not prediction.wanted
    config = RuntimeConfig(prediction=prediction, chat_template=chat_template)
    local = (
        local
        or launched() is not None
        or any(o is not None for o in (pool_gib, predictor, aux, chat_template))
    )
    joined = None if local else join(model, prefill)
    with joined or _open(model or DEFAULT_MODEL, pool_gib, disk, config, offers=offers) as runtime:
        talk = open_session(runtime, session, system, resume=resume)
        code = 0
        if text is None:
            talk = _converse(runtime, talk, sampling, has_name=has_name, no_history=no_history)
        else:
            code = _answer_once(talk, text, sampling, as_json=as_json)
    warn(talk)  # now that all is written, or is not
    raise typer.Exit(code)


def _check_asked(
    text: str | None, system: str | None, session: str | None, *, resume: bool, as_json: bool
) -> None:
    """Make sure that what is asked for goes together, and is text. Raises EdgeKVError."""
    if text is None and as_json:
        raise ConfigError("--json needs a prompt", hint="pass it as an argument or on stdin")
    for field, value in (("prompt", text), ("system prompt", system), ("session name", session)):
        check_text(f"the {field}", value or "")
    if session is not None and resume:
        raise ConfigError(
            "--session and --continue exclude each other", hint="--session NAME goes on, too"
        )


def _sampling(**options: Any) -> SamplingParams:
    """What the user said; the rest is as usual."""
    return SamplingParams(**{name: value for name, value in options.items() if value is not None})


def _prediction(prefill: str, predictor: str | None, aux: str | None) -> PredictionOptions:
    prediction = PredictionOptions(
        prefill=prefill,  # type: ignore[arg-type]  # it checks
        predictor=predictor,
        aux=aux,
    )
    if aux is not None and not prediction.wanted:
        raise ConfigError(
            "--aux is a predictor's auxiliary model", hint="add --prefill predict or --predictor"
        )
    return prediction


def last_model() -> str:
    """The model of the chat that was used last, whichever that was."""
    from edgekv.cli.sessions import stored_sessions

    stored = stored_sessions(app=CHAT_APP, model=None)
    kept = [one for one in stored if one.session.conversation is not None]
    if not kept:
        raise ConfigError("there is no session to go on with", hint=_BEGIN_HINT)
    return max(kept, key=lambda one: one.session.used_s).store.model


def open_session(
    runtime: "Runtime | Connection", name: str | None, system: str | None, *, resume: bool
) -> "Session":
    """The session of this name, the one used last, or one without a name."""
    app = runtime.app(CHAT_APP)
    if (resume or name is not None) and not runtime.keeps_sessions:
        raise StoreBusy(
            "another process has the sessions of this model",
            hint="close it, or chat without a name",
        )
    if resume:
        name = next((info.name for info in app.sessions() if info.is_begun), None)
        if name is None:
            raise ConfigError("there is no session of this model to go on with", hint=_BEGIN_HINT)
    return app.session(name, system=system)


def one_shot_text(prompt: str | None) -> str | None:
    """The argument and what is piped in; None if a conversation is wanted."""
    on_terminal = sys.stdin.isatty()
    if prompt is None and on_terminal:
        return None
    piped = "" if on_terminal else _read_stdin()
    text = "\n\n".join([part for part in (prompt or "", piped) if part.strip()])
    if not text:
        raise PromptEmpty("the prompt is empty", hint='try edgekv chat "Hello"')
    return text


def _read_stdin() -> str:
    # A pipe that was inherited may stay open for ever.
    waiting = "reading stdin, which is part of the prompt, until it ends; < /dev/null leaves it out"
    patience = threading.Timer(STDIN_PATIENCE_S, say, [waiting])
    patience.daemon = True
    patience.start()
    try:
        data = read_stdin(STDIN_BYTES_MAX)
    except OSError as error:
        raise RequestError(
            f"stdin cannot be read: {error.strerror or error}", hint="< /dev/null leaves it out"
        ) from None
    finally:
        patience.cancel()
        patience.join()  # one that is just writing would hold stderr when the process ends
    if len(data) > STDIN_BYTES_MAX:
        raise RequestError(
            f"stdin is longer than {STDIN_BYTES_MAX >> 20} MiB", hint="pipe in a part of it"
        )
    try:
        return data.decode().rstrip("\n")  # what `echo` adds is no part of the prompt
    except UnicodeDecodeError as error:
        raise RequestError(
            f"stdin is not valid UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}",
            hint="convert it first, for example with iconv -f latin1 -t utf-8",
        ) from None


def _open(
    model: str,
    pool_gib: float | None,
    disk: _Disk,
    config: RuntimeConfig,
    *,
    offers: bool = False,
) -> "Runtime":
    """A runtime; with `offers`, one that could predict if there is a predictor and it is sound."""
    with fetching(model if config.prediction.aux is None else None) as progress:
        progress.announce(f"loading {model} …")
        from edgekv.runtime import Runtime

        while True:
            store = StoreOptions(disk_bytes=0) if disk == "unused" else StoreOptions()
            try:
                prediction = config.prediction
                if offers:
                    prediction = replace(prediction, predictor=known_predictor(model))
                opened = replace(config, store=store, prediction=prediction)
                return Runtime.open(model, pool_gib=pool_gib, config=opened, progress=progress)
            except StoreError as error:
                if disk != "welcome":
                    raise
                say(f"warning: {one_line(str(error))}; nothing goes to disk")
                disk = "unused"
            except (PredictorCorrupt, PredictorMismatch) as error:
                if not offers:
                    raise
                say(f"warning: {one_line(str(error))}; there is no /prefill predict")
                offers = False


def known_predictor(model: str) -> str | None:
    """Name of the first predictor that comes with edgekv for a model, for /prefill."""
    from edgekv.models.fingerprint import weights_fingerprint
    from edgekv.models.hub import resolve
    from edgekv.predict.shipped import shipped_predictors

    known = shipped_predictors(model)
    if not known:  # perhaps under another name
        with suppress(ModelError):  # what is wrong with it says who opens it
            known = shipped_predictors(model, weights_fingerprint(resolve(model, offline=True)))
    return known[0].name if known else None


def _answer_once(session: "Session", text: str, sampling: SamplingParams, *, as_json: bool) -> int:
    """Print one answer; returns the exit code."""
    reply = stream_reply(session, text, sampling, show=not as_json)
    if as_json:
        answer = {"text": reply.text, "finish_reason": reply.finish_reason}
        print(json.dumps({**answer, "stats": reply.stats.to_dict()}))
    remark(reply, sampling)
    if sys.stderr.isatty():
        say(stats_line(reply.stats))
    return 130 if reply.finish_reason == "cancelled" else 0


def _converse(
    runtime: "Runtime | Connection",
    session: "Session",
    sampling: SamplingParams,
    *,
    has_name: bool,
    no_history: bool,
) -> "Session":
    """Talk until the user leaves; returns the session that was left."""
    from prompt_toolkit.history import InMemoryHistory
    from prompt_toolkit.output.defaults import create_output

    from edgekv.cli.prompt import ChatPrompt, open_history
    from edgekv.cli.repl import Repl

    history = InMemoryHistory() if no_history else open_history()
    prompt = ChatPrompt(history, create_output(always_prefer_tty=True))
    return Repl(runtime, session, prompt, has_name, sampling).run()
