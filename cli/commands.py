"""What a line typed at the chat prompt means. Pure: text in, a value out."""

import re
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Message:
    """Text for the model; empty text means that there is nothing to do."""

    text: str


@dataclass(frozen=True)
class Command:
    """A key of `COMMANDS` and what follows it."""

    name: str
    argument: str


@dataclass(frozen=True)
class UnknownCommand:
    """A line that looks like a command and is none."""

    name: str


def parse(text: str, *, literal: bool = False) -> Message | Command | UnknownCommand:
    """Read one submitted buffer.

    Only a single line that begins with a slash is a command; bare words never are. Text between
    triple quotes is a message without the quotes.

    Args:
        text: The buffer.
        literal: The text was pasted, so neither slash nor quotes mean anything.
    """
    if literal:
        return Message(text.strip())
    stripped = text.strip()
    if stripped.startswith(QUOTE):
        return Message(stripped.removeprefix(QUOTE).removesuffix(QUOTE).strip("\n"))
    if not stripped.startswith("/") or "\n" in stripped:
        return Message(stripped)
    typed, *argument = stripped.split(maxsplit=1)
    name = _ALIASES.get(typed, typed)
    if name not in COMMANDS:
        return UnknownCommand(typed)
    return Command(name, "".join(argument))


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
