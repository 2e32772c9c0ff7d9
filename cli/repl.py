"""The interactive chat."""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgekv import __version__
from edgekv.cli.progress import ignore_typing, say
from edgekv.cli.prompt import COMMANDS, ChatPrompt, Command, help_text, unknown_text
from edgekv.cli.render import error_text, one_line, stats_line
from edgekv.cli.reply import check_text, remark, stream_reply, warn
from edgekv.cli.sessions import brief
from edgekv.config import PREFILL_MODES, SamplingParams, check_choice
from edgekv.errors import EdgeKVError, EngineFailed, PredictorNotFound, RuntimeClosed

if TYPE_CHECKING:
    from edgekv.client import Connection
    from edgekv.runtime import Runtime, Session


@dataclass
class Repl:
    """One conversation at a time on a terminal. Owned by the main thread.

    `session` is the one to begin with; `has_name`, whether the user gave it its name.
    """

    runtime: "Runtime | Connection"
    session: "Session"
    prompt: ChatPrompt
    has_name: bool
    sampling: SamplingParams

    def __post_init__(self) -> None:
        self._app = self.session.app
        self._unnamed = None if self.has_name else self.session
        self._shows_stats = True
        self._warned = ""

    def run(self) -> "Session":
        """Read and answer until Ctrl-D or /exit; returns the session that is left."""
        context = f"context {self.runtime.context_max} tokens"
        say(f"edgekv {__version__} · {self.runtime.model_name} · {context} · /? for help")
        if self.session is not self._unnamed:
            self._arrive()
        while True:
            try:
                line = self.prompt.read()
            except KeyboardInterrupt:
                say("Use Ctrl-D or /exit to exit.")
                continue
            except EOFError:
                line = Command("/exit", "")
            if line == Command("/exit", ""):
                return self.session
            self._do(line)

    def _do(self, line: str | Command) -> None:
        try:
            match line:
                case Command(name, argument) if name in COMMANDS:
                    self._command(name, argument)
                case Command(name):
                    say(unknown_text(name))
                case text if text:
                    self._answer(text)
        except (EngineFailed, RuntimeClosed):
            raise
        except EdgeKVError as error:
            say(error_text(str(error), error.hint))
        except KeyboardInterrupt:  # the second one, of an impatient user
            say("(stopped)")

    def _answer(self, text: str) -> None:
        check_text("the prompt", text)
        with ignore_typing():
            reply = stream_reply(self.session, text, self.sampling)
        remark(reply, self.sampling)
        if self._shows_stats:
            say(stats_line(reply.stats))
        self._warn()
        say()

    def _warn(self) -> None:
        """Say once what went wrong with what is kept."""
        if self.session.warning != self._warned:
            self._warned = self.session.warning
            warn(self.session)

    def _command(self, name: str, argument: str) -> None:
        if argument and name not in ("/system", "/switch", "/prefill"):
            say(f"{name} takes no argument.")
            return
        match name:
            case "/?":
                say(help_text())
            case "/clear":
                self._begin(None)
            case "/stats":
                self._shows_stats = not self._shows_stats
                say(f"Figures after replies are {'on' if self._shows_stats else 'off'}.")
            case "/system" if argument:
                self._begin(check_text("the system prompt", argument))
            case "/system":
                say(self.session.system or "No system prompt.")
            case "/prefill":
                self._prefill(argument)
            case "/sessions":
                self._list()
            case "/switch":
                self._switch(check_text("the name", argument))

    def _begin(self, system: str | None) -> None:
        """Start anew, with another system prompt if one is given."""
        had_messages = len(self.session.messages) > 1
        self.session.clear(system=system)
        gone = self.session.kept and had_messages
        say("New conversation; the one that was kept is gone." if gone else "New conversation.")

    def _prefill(self, mode: str) -> None:
        if mode:
            check_choice("prefill", mode, PREFILL_MODES)
            if mode != "exact" and not self.runtime.predicts:
                raise PredictorNotFound(
                    f"there is no KV predictor for {self.runtime.model_name}",
                    hint="edgekv fit makes one; begin with --predictor FILE",
                )
            self._app.prefill = mode  # type: ignore[assignment]
        say(f"Prefill: {self._app.prefill or self.runtime.prefill}.")

    def _list(self) -> None:
        sessions = self._app.sessions()
        for line in brief(sessions, self.session.name, time.time()):
            say(line)
        if not sessions:
            say("No conversation is kept; /switch NAME begins one.")

    def _switch(self, name: str) -> None:
        """Go to another conversation; the one that is left stays as it is."""
        if name:
            self.session = self._app.session(name)
        else:
            self._unnamed = self._unnamed or self._app.session()
            self.session = self._unnamed
        self._arrive()

    def _arrive(self) -> None:
        """Say where one is, and how far it got."""
        unnamed = self.session is self._unnamed
        where = "Session without a name" if unnamed else f"Session {self.session.name}"
        number = len(self.session.messages)
        messages = f"{number} message{'' if number == 1 else 's'}"
        say(one_line(f"{where}{'' if self.session.kept else ', not kept'}: {messages}."))
        self._warn()
