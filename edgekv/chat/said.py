"""What programs say to a model: a text of the user, messages, or messages as plain dicts."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from edgekv.chat.typed import refusals
from edgekv.chat.values import ROLES, ChatMessage, Completion
from edgekv.config import check_choice, check_kind
from edgekv.errors import ConfigError, PromptEmpty

Said = str | Sequence[ChatMessage | Mapping[str, Any]]
_NAMES = frozenset(field.name for field in fields(ChatMessage))


def messages_of(said: Said, field: str) -> tuple[ChatMessage, ...]:
    """As messages; a text is the user's.

    Raises:
        ConfigError: It is none of that; the error names `field`.
        PromptEmpty: There is nothing.
    """
    if isinstance(said, str):
        if not said.strip():
            raise PromptEmpty("the prompt is empty", hint="say something")
        return (ChatMessage(role="user", content=said),)
    given: object = said
    if not isinstance(given, Sequence) or isinstance(given, bytes | bytearray):
        raise ConfigError.of(field, said, "a string or a list of messages")
    if not said:
        raise PromptEmpty("there are no messages", hint="say something")
    return tuple(_message(one, f"{field}[{index}]") for index, one in enumerate(said))


def completion_of(asked: Completion | Said) -> Completion:
    """As a completion: of messages, one in which nothing else is said. See `messages_of`."""
    if isinstance(asked, Completion):
        return asked
    return Completion(messages=messages_of(asked, "asked"))


def _message(said: object, field: str) -> ChatMessage:
    if isinstance(said, ChatMessage):
        check_choice(f"{field}.role", said.role, ROLES)
        check_kind(f"{field}.content", said.content, str)
        return said
    if not isinstance(said, Mapping):
        raise ConfigError.of(field, said, "a ChatMessage, or a dict of one's fields")
    if unknown := sorted(set(said) - _NAMES):
        raise ConfigError(
            f"{field} has {', '.join(map(repr, unknown))}",
            hint=f"a message has {', '.join(sorted(_NAMES))}",
        )
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(ChatMessage).validate_python(dict(said))
    except ValidationError as error:
        raise ConfigError(f"{field} is no message: {refusals(error)}") from None
