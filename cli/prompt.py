"""The chat's prompt: what is typed or pasted, what it means, and what is kept of it."""

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.key_binding.key_processor import KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.output import Output

from edgekv.cli.progress import say
from edgekv.errors import ConfigError
from edgekv.server.keys import state_dir

QUOTE = '"""'

COMMANDS = {
    "/?": "show this list (also /help)",
    "/system": "start anew with the instructions that follow; alone, show them",
    "/clear": "start a new conversation",
    "/sessions": "list the conversations that are kept",
    "/switch": "go to the one whose name follows, old or new; alone, to the one without a name",
    "/prefill": "exact, predict or auto: whether KV of long prompts is predicted; alone, show it",
    "/stats": "turn the figures after each reply on or off",
    "/exit": "leave (also /quit, /bye or Ctrl-D)",
}
_ALIASES = {"/help": "/?", "/quit": "/exit", "/bye": "/exit"}

_TYPED_OPENING = re.compile(rf"\s*(?:{QUOTE}|/\S+[ \t])")

_HISTORY_BYTES_MAX = 4 << 20


@dataclass(frozen=True)
class Command:
    """A line that begins with a slash: its name, perhaps none of `COMMANDS`, and what follows."""

    name: str
    argument: str


def parse(text: str, *, literal: bool = False) -> str | Command:
    """Read one submitted buffer: a command, or a message to the model, "" if there is none.

    Only a single line that begins with a slash is a command; bare words never are. Text between
    triple quotes is a message without the quotes. In literal text, which was pasted, neither slash
    nor quotes mean anything.
    """
    stripped = text.strip()
    if literal:
        return stripped
    if stripped.startswith(QUOTE):
        return stripped.removeprefix(QUOTE).removesuffix(QUOTE).strip("\n")
    if not stripped.startswith("/") or "\n" in stripped:
        return stripped
    name, *argument = stripped.split(maxsplit=1)
    return Command(_ALIASES.get(name, name), "".join(argument))


def needs_more(text: str) -> bool:
    """Whether Enter continues the buffer: triple quotes are open."""
    stripped = text.strip()
    if not stripped.startswith(QUOTE):
        return False
    return len(stripped) < 2 * len(QUOTE) or not stripped.endswith(QUOTE)


def opens_typed(text_before_paste: str) -> bool:
    """Whether a paste here lands inside quotes, or in the argument of a command, typed by hand."""
    return _TYPED_OPENING.match(text_before_paste) is not None


def help_text() -> str:
    """The list of commands and keys, a line each."""
    keys = {
        QUOTE: "begin and end a message of several lines",
        "Alt-Enter": "new line",
        "Ctrl-C": "stop a reply, or clear the line",
    }
    return "\n".join(f"  {name:<10} {what}" for name, what in (COMMANDS | keys).items())


def unknown_text(name: str) -> str:
    """What is said of a command that does not exist."""
    known = ", ".join(COMMANDS)
    return f"{name} is not a command; there are {known}. Put text in {QUOTE} to send it as it is."


class ChatPrompt:
    """Reads one message or command at a time.

    Owned by the main thread. Pasted text is literal: it never runs a command, in the same buffer
    or in the next one.
    """

    def __init__(self, history: History, output: Output | None = None) -> None:
        self._literal = False
        self._session: PromptSession[str] = PromptSession(
            ">>> ",
            multiline=True,
            prompt_continuation="... ",
            history=history,
            key_bindings=self._key_bindings(),
            enable_suspend=True,
            output=output,
        )
        self._session.default_buffer.on_text_changed += self._on_text_changed

    def read(self) -> str | Command:
        """Wait for the next line.

        Raises:
            KeyboardInterrupt: Ctrl-C with nothing typed.
            EOFError: Ctrl-D with nothing typed.
        """
        self._literal = False
        # Else a signal that comes in a callback of the event loop is taken for a failure of that:
        # somebody is to press Enter, and the terminal stays raw.
        text = self._session.prompt(set_exception_handler=False)
        return parse(text, literal=self._literal)

    def _on_text_changed(self, buffer: Buffer) -> None:
        if not buffer.text:
            self._literal = False

    def _note_paste(self, buffer: Buffer) -> None:
        if not opens_typed(buffer.document.text_before_cursor):
            self._literal = True

    def _key_bindings(self) -> KeyBindings:
        keys = KeyBindings()
        typing = has_focus(DEFAULT_BUFFER)

        @keys.add("enter", filter=typing)
        def _enter(event: KeyPressEvent) -> None:
            buffer = event.current_buffer
            if _more_keys_came_along(event):
                self._note_paste(buffer)
                buffer.newline(copy_margin=False)
            elif not self._literal and needs_more(buffer.text):
                buffer.newline(copy_margin=False)
            else:
                buffer.validate_and_handle()

        @keys.add("escape", "enter", filter=typing)
        def _newline(event: KeyPressEvent) -> None:
            event.current_buffer.newline(copy_margin=False)

        @keys.add(Keys.BracketedPaste, filter=typing)
        def _paste(event: KeyPressEvent) -> None:
            self._note_paste(event.current_buffer)
            data = event.data.replace("\r\n", "\n").replace("\r", "\n")
            event.current_buffer.insert_text(data)

        @keys.add("c-c", filter=typing)
        def _clear(event: KeyPressEvent) -> None:
            if event.current_buffer.text:
                event.current_buffer.reset()
            else:
                event.app.exit(exception=KeyboardInterrupt(), style="class:aborting")

        return keys


def _more_keys_came_along(event: KeyPressEvent) -> bool:
    """Whether Enter came in one read with what follows it, as no hand can type.

    That is a paste on a terminal without bracketed paste. The terminal's own answer to a question
    about the cursor does not count.
    """
    return any(press.key != Keys.CPRResponse for press in event.key_processor.input_queue)


class PrivateHistory(FileHistory):
    """A history file that cannot end the conversation."""

    def store_string(self, string: str) -> None:
        """Append to the file; where that fails (disk full) the line stays in memory."""
        with contextlib.suppress(OSError):
            super().store_string(string)


def open_history(path: Path | None = None) -> History:
    """The history at `path` (default: the user's state folder).

    A file that cannot be opened gives a history that lives in memory only, and a warning.
    """
    try:
        path = path or state_dir() / "chat_history"
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.fchmod(fd, 0o600)  # it may be older than this rule
        finally:
            os.close(fd)
        _trim(path)
    except (OSError, ConfigError) as error:  # the latter where there is no home folder
        say(f"warning: history is not kept: {error}")
        return InMemoryHistory()
    return PrivateHistory(path)


def _trim(path: Path) -> None:
    """Drop the oldest entries of a file over the limit, down to half of it."""
    if path.stat().st_size <= _HISTORY_BYTES_MAX:
        return
    tail = path.read_bytes()[-_HISTORY_BYTES_MAX // 2 :]
    start = tail.find(b"\n# ")  # entries begin with a line that holds their time
    with path.open("r+b") as file:
        file.write(tail[start:] if start >= 0 else b"")
        file.truncate()
