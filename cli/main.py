"""The `edgekv` command: its subcommands, and the one shape of its errors."""

import contextlib
import io
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from edgekv import __version__
from edgekv.cli.bench import bench_app
from edgekv.cli.chat import chat
from edgekv.cli.doctor import doctor
from edgekv.cli.fit import fit
from edgekv.cli.models import models, pull
from edgekv.cli.render import error_text
from edgekv.cli.sessions import sessions_app
from edgekv.errors import EdgeKVError

_INTERRUPTED = 130  # 128 + SIGINT, as shells report it

# Typer has its own copy of click or not, depending on its version; this name is in both.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]

# Without Rich: drawing a help page with it takes 0.1 s of the 0.3 s that --help may take.
app = typer.Typer(
    name="edgekv",
    help="One local LLM runtime that every app on a Mac can share.",
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(chat)
app.command()(pull)
app.command()(models)
app.command()(doctor)
app.command()(fit)
app.add_typer(sessions_app, name="sessions")
app.add_typer(bench_app, name="bench")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"edgekv {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; `arguments` follow the program's name, None takes the process's own.

    Returns:
        The exit code: 0, an error's own (1, or 2 if the user can cure it by asking otherwise),
        or 130 after Ctrl-C.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an odd locale costs characters, not the answer
    try:
        code = app(arguments, prog_name="edgekv", standalone_mode=False)
        sys.stdout.flush()
    except EdgeKVError as error:
        return _fail(str(error), error.hint, error.exit_code)
    except _UsageError as error:
        return _fail_usage(error)
    except (KeyboardInterrupt, typer.Abort):
        return _INTERRUPTED
    except BrokenPipeError:
        _drop_stdout()
        return 1
    except OSError as error:  # what nobody foresaw of the disk; stdout's own included
        _drop_stdout()
        return _fail(str(error), "check the disk's free space and permissions", 1)
    return code if isinstance(code, int) else 0


def _fail(message: str, hint: str, exit_code: int) -> int:
    with contextlib.suppress(BrokenPipeError):
        print(error_text(message, hint), file=sys.stderr)
    return exit_code


def _fail_usage(error: Exception) -> int:
    message: str = error.format_message()  # type: ignore[attr-defined]
    context = getattr(error, "ctx", None)
    if context and message == context.get_help():  # a group of commands, and none was named
        print(message, file=sys.stderr)
        return 2
    message = message[:1].lower() + message[1:].rstrip(".")
    command = context.command_path if context else "edgekv"
    return _fail(message, f"{command} --help lists what is possible", 2)


def _drop_stdout() -> None:
    """Nobody takes what stdout still holds: let the flush at exit succeed."""
    with contextlib.suppress(OSError):  # a stdout without a descriptor has nothing to lose
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
