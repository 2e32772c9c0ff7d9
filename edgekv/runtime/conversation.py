"""A conversation as tokens, and as text on disk.

Every turn extends the tokens of the turn before. What the model generated is kept as the ids it
generated: encoding its text anew could give other ids, and then all KV behind the first difference
would be computed again. A named session leaves this on disk, beside its KV:

    {"version": 1, "digest": "…", "messages": [{"role": "user", "content": "…"}, …],
     "spoken": {"text": "…", "ids": [1, 2, …]} or null}

The digest is xxh3-64 of the compact JSON of [messages, spoken]. All is ASCII, so that no string of
Python's fails to be written. What cannot be read back costs as little as possible: without
`spoken` the messages are encoded anew and perhaps some KV is computed again; without the messages
the session starts afresh. Both are said, and neither is an error.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import xxhash

from edgekv.errors import ConfigError
from edgekv.tokenizer import Tokenizer

Role = Literal["system", "user", "assistant"]

VERSION = 1
ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True, kw_only=True)
class ChatMessage:
    """One message of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A conversation rendered by the chat template, and its token ids."""

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages so far and, where it is known, how the last turn reads as tokens.

    Immutable: a turn that fails leaves no trace.
    """

    messages: tuple[ChatMessage, ...] = ()
    spoken: Prompt | None = None

    @classmethod
    def begin(cls, system: str | None) -> "Conversation":
        """A conversation in which nothing was said."""
        if system is None:
            return cls()
        return cls(messages=(ChatMessage(role="system", content=system),))

    @property
    def system(self) -> str | None:
        """The system prompt; None if there is none."""
        return next((m.content for m in self.messages[:1] if m.role == "system"), None)

    def prompt(self, tokenizer: Tokenizer, text: str | None) -> Prompt:
        """The tokens to answer: all messages, and the user's `text` unless it is None."""
        messages = self.messages
        if text is not None:
            messages += (ChatMessage(role="user", content=text),)
        chat = _plain(messages)
        answer = text is not None
        rendered = tokenizer.render_chat(chat, add_generation_prompt=answer)
        spoken = self.spoken or Prompt(text="", ids=())
        known = _num_begun(rendered.text, spoken.text, tokenizer)
        rest = tokenizer.encode_chat(rendered, after=known)
        return Prompt(text=rendered.text, ids=(*(spoken.ids if known else ()), *rest))

    def after(self, text: str, prompt: Prompt, reply: str, said: Prompt | None) -> "Conversation":
        """The conversation once `text` was answered, of which `prompt` was made.

        `said` is the reply as tokens, and what they spell; None where that is not `reply`.
        """
        messages = (
            *self.messages,
            ChatMessage(role="user", content=text),
            ChatMessage(role="assistant", content=reply),
        )
        spoken = None
        if said is not None:
            spoken = Prompt(text=prompt.text + said.text, ids=(*prompt.ids, *said.ids))
        return replace(self, messages=messages, spoken=spoken)


def _num_begun(rendered: str, spoken: str, tokenizer: Tokenizer) -> int:
    """With how many characters of a rendering the tokens begin that were spoken; 0 for none.

    Where decoding takes a space away from an answer, its tokens have one that its text has not.
    Some templates write that space, others do not.
    """
    if rendered.startswith(spoken):
        return len(spoken)
    if tokenizer.vocabulary.leading_space:
        pairs = enumerate(zip(rendered, spoken, strict=False))
        at = next((at for at, (ours, theirs) in pairs if ours != theirs), len(rendered))
        behind = spoken[at + 1 :]
        if spoken[at : at + 1] == " " and behind.strip() and rendered.startswith(behind, at):
            return len(spoken) - 1
    return 0


def opening(name: str, system: str | None, stored: Conversation) -> Conversation:
    """The conversation that session `name` begins with, where one of this name was stored.

    A system prompt of None takes the stored one; where something was said under another one than
    is asked for, that is an error.
    """
    if all(message.role == "system" for message in stored.messages):
        return stored if system is None else Conversation.begin(system)
    if system is not None and system != stored.system:
        raise ConfigError(
            f"session {name!r} was begun with another system prompt",
            hint="leave the system prompt away, or use another name",
        )
    return stored


# --- on disk ---


def dump(conversation: Conversation) -> str:
    """The conversation as JSON text."""
    messages = _plain(conversation.messages)
    said = conversation.spoken
    spoken = None if said is None else {"text": said.text, "ids": said.ids}
    digest = _digest(messages, spoken)
    return _compact({"version": VERSION, "digest": digest, "messages": messages, "spoken": spoken})


def load(text: str, *, vocab_size: int) -> tuple[Conversation, str]:
    """The conversation that `dump` made this text of, and what of it could not be read, or "".

    Token ids from `vocab_size` on are not of this model.
    """
    fields = _fields(text)
    messages = _messages(fields.get("messages"))
    if messages is None:
        return Conversation(), "its messages cannot be read; it starts afresh"
    spoken, is_whole = None, fields.get("version") == VERSION
    is_whole &= fields.get("digest") == _digest(fields["messages"], fields.get("spoken"))
    if is_whole and fields.get("spoken") is not None:
        spoken = _spoken(fields["spoken"], vocab_size)
        is_whole = spoken is not None
    damage = "" if is_whole else "its tokens cannot be read; they are made anew of the messages"
    return Conversation(messages=messages, spoken=spoken), damage


def stored_messages(text: str | None) -> tuple[ChatMessage, ...] | None:
    """The messages of a stored conversation; None if they cannot be read."""
    return () if text is None else _messages(_fields(text).get("messages"))


def _plain(messages: Sequence[ChatMessage]) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in messages]


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


def _messages(value: Any) -> tuple[ChatMessage, ...] | None:
    messages = []
    for item in value if isinstance(value, list) else [None]:
        match item:
            case {"role": role, "content": str(content)} if role in ROLES:
                messages.append(ChatMessage(role=role, content=content))
            case _:
                return None
    return tuple(messages)


def _spoken(value: Any, vocab_size: int) -> Prompt | None:
    match value:
        case {"text": str(text), "ids": list(ids)}:
            if all(type(token) is int and 0 <= token < vocab_size for token in ids):
                return Prompt(text=text, ids=tuple(ids))
    return None
