"""The `edgekv` command: its subcommands, and the one shape of its errors."""

import logging
import signal
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from edgekv import __version__
from edgekv.cli.apps import apps_app
from edgekv.cli.bench import bench_app
from edgekv.cli.chat import chat
from edgekv.cli.doctor import doctor
from edgekv.cli.fit import fit
from edgekv.cli.launch import follow, launch
from edgekv.cli.models import models_app, pull
from edgekv.cli.progress import SayWarnings, say
from edgekv.cli.ps import ps
from edgekv.cli.render import error_text
from edgekv.cli.serve import serve
from edgekv.cli.sessions import sessions_app
from edgekv.cli.signals import ended_by_signals, exit_code
from edgekv.cli.streams import drop_stdout, lost_output, secure_streams
from edgekv.errors import EdgeKVError
from edgekv.ranks.launched import end_with_launcher, launched

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
app.command()(serve)
app.command()(launch)
app.command()(ps)
app.command()(pull)
app.command()(doctor)
app.command()(fit)
app.add_typer(models_app, name="models")
app.add_typer(apps_app, name="apps")
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
        130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP.
    """
    secure_streams()
    logging.getLogger("edgekv").handlers = [SayWarnings()]
    with ended_by_signals() as came:
        code = _run(arguments, came)
    if came:
        lost_output()  # the window may be gone
        return exit_code(came[0])
    return code


def _run(arguments: Sequence[str] | None, came: Sequence[int]) -> int:
    try:
        code = _command(arguments, came)
        sys.stdout.flush()
    except EdgeKVError as error:
        return _fail(str(error), error.hint, error.exit_code)
    except _UsageError as error:
        return _fail_usage(error)
    except (KeyboardInterrupt, typer.Abort):
        return exit_code(signal.SIGINT)
    except SystemExit:
        if not came:
            raise
        return exit_code(came[0])
    except BrokenPipeError:
        drop_stdout()
        return 1
    except OSError as error:  # what nobody foresaw
        if (reason := lost_output()) is not None:
            return _fail(f"stdout takes no data: {reason}", "look at where it leads", 1)
        return _fail(str(error), "check the disk's free space and permissions", 1)
    return code if isinstance(code, int) else 0


def _command(arguments: Sequence[str] | None, came: Sequence[int]) -> object:
    """The command, or, on a rank that others lead, its part of theirs."""
    if (mine := launched()) is not None:
        end_with_launcher(mine, came)
        if mine.rank > 0:
            return follow(mine)
    return app(arguments, prog_name="edgekv", standalone_mode=False)


def _fail(message: str, hint: str, exit_code: int) -> int:
    say(error_text(message, hint))
    return exit_code


def _fail_usage(error: Exception) -> int:
    message: str = error.format_message()  # type: ignore[attr-defined]
    context = getattr(error, "ctx", None)
    if context and message == context.get_help():  # a group of commands, and none was named
        say(message)
        return 2
    message = message[:1].lower() + message[1:].rstrip(".")
    command = context.command_path if context else "edgekv"
    hint = f"{command} --help lists what is possible"
    if hasattr(error, "option_name") and _takes_words(context):
        hint += "; what is no option but begins with - goes behind --"
    return _fail(message, hint, 2)


def _takes_words(context: typer.Context | None) -> bool:
    """Whether a command takes words that are no options."""
    parameters = context.command.params if context else ()
    return any(parameter.param_type_name == "argument" for parameter in parameters)


if __name__ == "__main__":
    sys.exit(main())
