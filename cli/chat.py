"""`edgekv chat`: one answer, or a conversation."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from edgekv.cli.options import DEFAULT_MODEL, MODEL_HELP, fetching
from edgekv.config import SamplingParams
from edgekv.errors import ConfigError, PromptEmpty, RequestError

if TYPE_CHECKING:
    from edgekv.runtime import Runtime

STDIN_BYTES_MAX = 16 << 20  # no model's context is near; a device file must not fill the memory

_DEFAULTS = SamplingParams()


def chat(
    prompt: Annotated[
        str | None, typer.Argument(help="Answer this and exit; piped stdin is added to it.")
    ] = None,
    model: Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP)] = DEFAULT_MODEL,
    system: Annotated[
        str | None, typer.Option("--system", "-s", help="System prompt: instructions to follow.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Stop after this many tokens (default: context's end).")
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token.")
    ] = _DEFAULTS.temperature,
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest; 0: all.")] = _DEFAULTS.top_k,
    top_p: Annotated[
        float, typer.Option(help="Keep the likeliest tokens up to this probability.")
    ] = _DEFAULTS.top_p,
    min_p: Annotated[
        float, typer.Option(help="Drop tokens under this fraction of the likeliest.")
    ] = _DEFAULTS.min_p,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: avoid tokens that occurred.")
    ] = _DEFAULTS.repetition_penalty,
    seed: Annotated[
        int | None, typer.Option(help="Same seed, same text (default: random).")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Stop before this text; may be repeated.")
    ] = None,
    pool_gib: Annotated[
        float | None, typer.Option(help="Hard budget of KV memory (default: the device's).")
    ] = None,
    no_history: Annotated[
        bool, typer.Option("--no-history", help="Neither read nor keep what is typed.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print text, finish_reason and stats as one object.")
    ] = False,
) -> None:
    """Chat with a model; with a prompt or piped stdin, answer once.

    Ctrl-C stops a reply. In the conversation /? lists the commands.
    """
    sampling = SamplingParams(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        max_tokens=max_tokens,
        stop=tuple(stop or ()),
    )
    text = one_shot_text(prompt)
    if text is None and as_json:
        raise ConfigError("--json needs a prompt", hint="pass it as an argument or on stdin")
    from edgekv.cli.reply import check_text

    for field, value in (("the prompt", text), ("the system prompt", system)):
        check_text(field, value or "")
    with _open(model, pool_gib) as runtime:
        if text is None:
            _converse(runtime, sampling, system, keeps_history=not no_history)
        else:
            _answer_once(runtime, text, sampling, system, as_json=as_json)


def one_shot_text(prompt: str | None) -> str | None:
    """The argument and what is piped in; None if a conversation is wanted.

    Raises:
        PromptEmpty: There is a pipe or an argument, but no text.
        RequestError: stdin is not UTF-8, or too long.
    """
    closed = sys.stdin is None
    on_terminal = not closed and sys.stdin.isatty()
    if prompt is None and on_terminal:
        return None
    piped = "" if closed or on_terminal else _read_stdin()
    text = "\n\n".join([part for part in (prompt or "", piped) if part.strip()])
    if not text:
        raise PromptEmpty("the prompt is empty", hint='try edgekv chat "Hello"')
    return text


def _read_stdin() -> str:
    data = sys.stdin.buffer.read(STDIN_BYTES_MAX + 1)
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


@contextmanager
def _open(model: str, pool_gib: float | None) -> Iterator["Runtime"]:
    with fetching() as progress:
        progress.announce(f"loading {model} …")
        from edgekv.runtime import Runtime

        runtime = Runtime.open(model, pool_gib=pool_gib, progress=progress)
    with runtime:
        yield runtime


def _answer_once(
    runtime: "Runtime", text: str, sampling: SamplingParams, system: str | None, *, as_json: bool
) -> None:
    from edgekv.cli.render import stats_line
    from edgekv.cli.reply import remark, say, stream_reply

    session = runtime.app("chat").session(system=system)
    reply = stream_reply(session, text, sampling, show=not as_json)
    if as_json:
        stats = reply.stats.to_dict()
        print(
            json.dumps({"text": reply.text, "finish_reason": reply.finish_reason, "stats": stats})
        )
    remark(reply, sampling)
    if sys.stderr.isatty():
        say(stats_line(reply.stats))
    if reply.finish_reason == "cancelled":
        raise typer.Exit(130)


def _converse(
    runtime: "Runtime", sampling: SamplingParams, system: str | None, *, keeps_history: bool
) -> None:
    from prompt_toolkit.history import InMemoryHistory
    from prompt_toolkit.output.defaults import create_output

    from edgekv.cli.history import open_history
    from edgekv.cli.prompt import ChatPrompt
    from edgekv.cli.repl import Repl
    from edgekv.cli.reply import say

    history, warning = open_history() if keeps_history else (InMemoryHistory(), "")
    if warning:
        say(warning)
    prompt = ChatPrompt(history, create_output(always_prefer_tty=True))
    Repl(runtime, prompt, sampling=sampling, system=system).run()
