"""Conversations as text: what a named session leaves on disk beside its KV.

    {"version": 1, "digest": "…", "messages": [{"role": "user", "content": "…"}, …],
     "spoken": {"text": "…", "ids": [1, 2, …]} or null}

The digest is xxh3-64 of the compact JSON of [messages, spoken]. All is ASCII, so that no string of
Python's fails to be written. What cannot be read back costs as little as possible: without
`spoken` the messages are encoded anew and perhaps some KV is computed again; without the messages
the session starts afresh. Both are counted and said, and neither is an error.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import xxhash

from edgekv.errors import ConfigError
from edgekv.runtime.conversation import ChatMessage, Conversation, Prompt, Role

VERSION = 1
ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A conversation that was stored, and what of it could not be read: "" if it is whole."""

    conversation: Conversation
    damage: str = ""


def dump(conversation: Conversation) -> str:
    """The conversation as JSON text."""
    messages = [{"role": m.role, "content": m.content} for m in conversation.messages]
    said = conversation.spoken
    spoken = None if said is None else {"text": said.text, "ids": list(said.ids)}
    return _compact(
        {
            "version": VERSION,
            "digest": _digest(messages, spoken),
            "messages": messages,
            "spoken": spoken,
        }
    )


def load(text: str, *, vocab_size: int) -> Loaded:
    """The conversation that `dump` made this text of, or what is left of it.

    Args:
        text: What the store gave back.
        vocab_size: Token ids are below it, or not of this model.
    """
    fields = _fields(text)
    messages = _messages(fields.get("messages"))
    if messages is None:
        return Loaded(
            conversation=Conversation(), damage="its messages cannot be read; it starts afresh"
        )
    damage = "its tokens cannot be read; they are made anew of the messages"
    silent = Conversation(messages=messages)
    if fields.get("version") != VERSION:
        return Loaded(conversation=silent, damage=damage)
    if fields.get("digest") != _digest(fields["messages"], fields.get("spoken")):
        return Loaded(conversation=silent, damage=damage)
    if fields["spoken"] is None:
        return Loaded(conversation=silent)
    spoken = _spoken(fields["spoken"], vocab_size)
    if spoken is None:
        return Loaded(conversation=silent, damage=damage)
    return Loaded(conversation=Conversation(messages=messages, spoken=spoken))


def stored_messages(text: str | None) -> tuple[ChatMessage, ...] | None:
    """The messages of a stored conversation; None if they cannot be read."""
    return () if text is None else _messages(_fields(text).get("messages"))


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _digest(messages: object, spoken: object) -> str:
    return xxhash.xxh3_64_hexdigest(_compact([messages, spoken]).encode())


def _fields(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _messages(value: object) -> tuple[ChatMessage, ...] | None:
    if not isinstance(value, list):
        return None
    messages = []
    for item in value:
        if not isinstance(item, dict):
            return None
        role, content = item.get("role"), item.get("content")
        if role not in ROLES or not isinstance(content, str):
            return None
        messages.append(ChatMessage(role=role, content=content))
    return tuple(messages)


def _spoken(value: object, vocab_size: int) -> Prompt | None:
    if not isinstance(value, dict):
        return None
    text, ids = value.get("text"), value.get("ids")
    if not isinstance(text, str) or not isinstance(ids, list):
        return None
    if not all(type(token) is int and 0 <= token < vocab_size for token in ids):
        return None
    return Prompt(text=text, ids=tuple(ids))


def opening(name: str, system: str | None, stored: Conversation) -> Conversation:
    """The conversation that a session begins with.

    Args:
        name: The session's name, for the error.
        system: The system prompt that is asked for; None takes the stored one.
        stored: What was kept of an earlier session of this name.

    Raises:
        ConfigError: Something was said under another system prompt.
    """
    if all(message.role == "system" for message in stored.messages):
        return stored if system is None else with_system(system)
    if system is not None and system != system_of(stored):
        raise ConfigError(
            f"session {name!r} was begun with another system prompt",
            hint="leave the system prompt away, or use another name",
        )
    return stored


def with_system(system: str | None) -> Conversation:
    """A conversation in which nothing was said."""
    if system is None:
        return Conversation()
    return Conversation(messages=(ChatMessage(role="system", content=system),))


def system_of(conversation: Conversation) -> str | None:
    """The system prompt; None if there is none."""
    first: Sequence[ChatMessage] = conversation.messages[:1]
    return next((m.content for m in first if m.role == "system"), None)
