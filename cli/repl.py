"""The interactive chat."""

from typing import TYPE_CHECKING

from edgekv import __version__
from edgekv.cli.commands import Command, Message, UnknownCommand, help_text, unknown_text
from edgekv.cli.prompt import ChatPrompt
from edgekv.cli.render import error_text, stats_line
from edgekv.cli.reply import check_text, remark, say, stream_reply
from edgekv.cli.tty import ignore_typing
from edgekv.config import SamplingParams
from edgekv.errors import EdgeKVError, EngineFailed, RuntimeClosed

if TYPE_CHECKING:
    from edgekv.runtime import Runtime


class Repl:
    """One conversation at a time on a terminal. Owned by the main thread."""

    def __init__(
        self,
        runtime: "Runtime",
        prompt: ChatPrompt,
        *,
        sampling: SamplingParams,
        system: str | None,
    ) -> None:
        self._runtime = runtime
        self._prompt = prompt
        self._sampling = sampling
        self._system = system
        self._shows_stats = True
        self._app = runtime.app("chat")
        self._session = self._app.session(system=system)

    def run(self) -> None:
        """Read and answer until Ctrl-D or /exit.

        Raises:
            EngineFailed: The engine stopped; nothing more can be answered.
        """
        context = f"context {self._runtime.context_max} tokens"
        say(f"edgekv {__version__} · {self._runtime.model_name} · {context} · /? for help")
        while True:
            try:
                line = self._prompt.read()
            except KeyboardInterrupt:
                say("Use Ctrl-D or /exit to exit.")
                continue
            except EOFError:
                return
            if line == Command("/exit", ""):
                return
            self._do(line)

    def _do(self, line: Message | Command | UnknownCommand) -> None:
        try:
            match line:
                case Message(text):
                    if text:
                        self._answer(text)
                case Command(name, argument):
                    self._command(name, argument)
                case UnknownCommand(name):
                    say(unknown_text(name))
        except (EngineFailed, RuntimeClosed):
            raise
        except EdgeKVError as error:
            say(error_text(str(error), error.hint))
        except KeyboardInterrupt:  # the second one, of an impatient user
            say("(stopped)")

    def _answer(self, text: str) -> None:
        check_text("the prompt", text)
        with ignore_typing():
            reply = stream_reply(self._session, text, self._sampling)
        remark(reply, self._sampling)
        if self._shows_stats:
            say(stats_line(reply.stats))
        say()

    def _command(self, name: str, argument: str) -> None:
        if argument and name != "/system":
            say(f"{name} takes no argument.")
            return
        match name:
            case "/?":
                say(help_text())
            case "/clear":
                self._session.clear()
                say("New conversation.")
            case "/stats":
                self._shows_stats = not self._shows_stats
                say(f"Figures after replies are {'on' if self._shows_stats else 'off'}.")
            case "/system" if argument:
                self._restart(check_text("the system prompt", argument))
            case "/system":
                say(self._system or "No system prompt.")

    def _restart(self, system: str) -> None:
        session = self._app.session(system=system)
        self._session.close()
        self._session, self._system = session, system
        say("New conversation.")
