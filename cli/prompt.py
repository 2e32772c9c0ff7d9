"""The line editor of the chat: keys, pasting, multi-line messages."""

from prompt_toolkit import PromptSession
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import History
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.key_binding.key_processor import KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.output import Output

from edgekv.cli.commands import Command, Message, UnknownCommand, needs_more, opens_typed, parse


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

    def read(self) -> Message | Command | UnknownCommand:
        """Wait for the next line.

        Raises:
            KeyboardInterrupt: Ctrl-C with nothing typed.
            EOFError: Ctrl-D with nothing typed.
        """
        self._literal = False
        text = self._session.prompt()
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
