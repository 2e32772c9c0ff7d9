"""A conversation as tokens, and as text on disk.

Every turn extends the tokens of the turn before. What the model generated is kept as the ids it
generated: encoding its text anew could give other ids, and then all KV behind the first difference
would be computed again. A named session leaves this on disk, beside its KV:

    {"version": 1, "digest": "…", "messages": [{"role": "user", "content": "…"}, …],
     "spoken": {"text": "…", "ids": [1, 2, …]} or null, "marks": [[1, 9, 12, 4], …], "tools": […],
     "effort": "high"}

The digest is xxh3-64 of the compact JSON of [messages, spoken], or, where there are any of the
others, [messages, spoken, {tools, marks, effort}]. All is ASCII, so that no string of
Python's fails to be written. What cannot be read back costs as little as possible: without
`spoken` the messages are encoded anew and perhaps some KV is computed again; without the messages
the session starts afresh. Both are said, and neither is an error.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import xxhash

from edgekv.chat.normal import same_message
from edgekv.chat.render import render
from edgekv.chat.values import ROLES, ChatMessage, Tool, ToolCall
from edgekv.errors import ChatTemplateError, ConfigError
from edgekv.runtime.splicing import behind_answer
from edgekv.tokenizer import RenderedChat, Tokenizer

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A conversation rendered by the chat template, and its token ids.

    Attributes:
        text: All of it.
        ids: Its tokens.
        num_asked: How many of them stand before the generation prompt, which opens the answer; 0
            if it has none, or one that cannot be told from the rest.
    """

    text: str
    ids: tuple[int, ...]
    num_asked: int = 0


@dataclass(frozen=True, kw_only=True)
class Mark:
    """Where an answer ends in what was spoken.

    Attributes:
        num_messages: Messages that it answered.
        num_asked: Characters of what was spoken in front of it.
        num_chars: And with it.
        num_ids: Tokens of that.
    """

    num_messages: int
    num_asked: int
    num_chars: int
    num_ids: int


@dataclass(frozen=True, kw_only=True)
class Scribe:
    """How a conversation is written: in which tokens, with which tools, thinking or not.

    See `edgekv.chat.render`, whose arguments these are.
    """

    tokenizer: Tokenizer
    tools: tuple[Tool, ...] = ()
    thinking: bool | None = None
    effort: str = ""
    tools_prompt: str = ""

    def write(
        self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool
    ) -> RenderedChat:
        """The conversation as text. Raises ChatTemplateError, RequestError."""
        return render(
            self.tokenizer,
            messages,
            self.tools,
            add_generation_prompt=add_generation_prompt,
            thinking=self.thinking,
            effort=self.effort,
            tools_prompt=self.tools_prompt,
        )


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages so far and, where it is known, how they read as tokens.

    Immutable: a turn that fails leaves no trace.

    Attributes:
        messages: What was said.
        tools: What could be called.
        spoken: All up to the last answer as tokens, those of answers as they were generated.
        marks: The answers in there.
        effort: With which it was thought.
    """

    messages: tuple[ChatMessage, ...] = ()
    tools: tuple[Tool, ...] = ()
    spoken: Prompt | None = None
    marks: tuple[Mark, ...] = ()
    effort: str = ""

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

    def with_user(self, text: str | None) -> tuple[ChatMessage, ...]:
        """All messages, and the user's `text` unless it is None."""
        return self.messages if text is None else (*self.messages, user_says(text))

    def prompt(self, tokenizer: Tokenizer, text: str | None) -> Prompt:
        """The tokens to answer: all messages, and the user's `text` unless it is None."""
        scribe = Scribe(tokenizer=tokenizer)
        return self.prompt_of(scribe, self.with_user(text), answer=text is not None)

    def prompt_of(
        self, scribe: Scribe, messages: Sequence[ChatMessage], *, answer: bool = True
    ) -> Prompt:
        """The tokens of any conversation, as far as they are the same with those spoken here.

        Args:
            scribe: How it is written, and which tools there are.
            messages: All of it: perhaps this one, gone on with, in other words of the client's.
            answer: Whether it is to be answered.

        Raises:
            ChatTemplateError, RequestError: See `Tokenizer.render_chat`.
        """
        prompt = self._prompt_of(scribe, messages, answer)
        opening = _generation_prompt(scribe.tokenizer, scribe.thinking) if answer else ""
        return replace(prompt, num_asked=_num_in_front(prompt, opening, scribe.tokenizer))

    def _prompt_of(self, scribe: Scribe, messages: Sequence[ChatMessage], answer: bool) -> Prompt:
        rendered = scribe.write(messages, add_generation_prompt=answer)
        spoken, tokenizer = self.spoken, scribe.tokenizer
        if spoken is not None:
            known = _num_begun(rendered.text, spoken.text, tokenizer)
            if known:
                rest = tokenizer.encode_chat(rendered, after=known)
                return Prompt(text=rendered.text, ids=(*spoken.ids, *rest))
            mark = self.answered(messages, scribe.tools)
            if (
                mark is not None
                and scribe.effort == self.effort
                and (spliced := self._spliced(scribe, messages, mark, answer))
            ):
                return spliced
        return Prompt(text=rendered.text, ids=tuple(tokenizer.encode_chat(rendered)))

    def answered(self, messages: Sequence[ChatMessage], tools: Sequence[Tool]) -> Mark | None:
        """The last answer of ours that other messages hold, behind the same ones as here."""
        if tuple(tools) != self.tools:
            return None
        num_same = self.num_same(messages)
        for mark in reversed(self.marks):
            at = mark.num_messages
            if at < num_same:  # and so is the answer to them
                return mark
        return None

    def num_same(self, messages: Sequence[ChatMessage]) -> int:
        """So many of the first messages are those of another conversation."""
        num_same = 0
        for ours, theirs in zip(self.messages, messages, strict=False):
            if not same_message(ours, theirs):
                break
            num_same += 1
        return num_same

    def _spliced(
        self, scribe: Scribe, messages: Sequence[ChatMessage], mark: Mark, answer: bool
    ) -> Prompt | None:
        """What was spoken up to an answer, and what the template writes behind such a one.

        The answer's tokens stay those that were generated, whatever of it came back or a template
        writes of old ones (some leave out what was thought). None where that cannot be told.
        """
        spoken, at = self.spoken, mark.num_messages
        assert spoken is not None
        # A new question has templates leave out thoughts that they wrote when it was asked.
        known = [replace(message, reasoning="") for message in self.messages[:at]]
        behind = behind_answer(
            lambda said, asks: scribe.write(said, add_generation_prompt=asks),
            scribe.tokenizer,
            known,
            messages[at:],
            answer=answer,
        )
        if behind is None:
            return None
        said = spoken.text[mark.num_asked : mark.num_chars]
        tainted = [(a + len(said), b + len(said)) for a, b in behind.tainted]
        chat = RenderedChat(text=said + behind.text, tainted=tainted)
        rest = scribe.tokenizer.encode_chat(chat, after=len(said))
        text = spoken.text[: mark.num_chars] + behind.text
        return Prompt(text=text, ids=(*spoken.ids[: mark.num_ids], *rest))

    def after(
        self,
        messages: Sequence[ChatMessage],
        prompt: Prompt,
        answer: ChatMessage,
        said: Prompt | None,
        tools: tuple[Tool, ...] = (),
        effort: str = "",
    ) -> "Conversation":
        """The conversation once `messages`, of which `prompt` was made here, were answered.

        `said` is the answer as tokens, and what they spell; None where that is not the answer.
        """
        spoken, num_held = None, len(self.marks)  # of one that holds all before it hold
        while num_held and not self._holds(self.marks[num_held - 1], messages, prompt):
            num_held -= 1
        marks = self.marks[:num_held]
        if said is not None:
            spoken = Prompt(text=prompt.text + said.text, ids=(*prompt.ids, *said.ids))
            marks += (
                Mark(
                    num_messages=len(messages),
                    num_asked=len(prompt.text),
                    num_chars=len(spoken.text),
                    num_ids=len(spoken.ids),
                ),
            )
        return Conversation(
            messages=(*messages, answer),
            tools=tools,
            spoken=spoken,
            marks=marks if spoken is not None else (),
            effort=effort,
        )

    def _holds(self, mark: Mark, messages: Sequence[ChatMessage], prompt: Prompt) -> bool:
        """Whether a prompt begins with what was spoken up to an answer."""
        assert self.spoken is not None
        at, spoken = mark.num_ids, self.spoken
        same_text = prompt.text.startswith(spoken.text[: mark.num_chars])
        return (
            len(messages) > mark.num_messages and same_text and prompt.ids[:at] == spoken.ids[:at]
        )


def user_says(text: str) -> ChatMessage:
    """A user's message."""
    return ChatMessage(role="user", content=text)


@lru_cache(maxsize=4)
def _generation_prompt(tokenizer: Tokenizer, thinking: bool | None) -> str:
    """What a template writes to open an answer; "" where it does so otherwise than at the end."""
    scribe = Scribe(tokenizer=tokenizer, thinking=thinking)
    try:
        asked, opened = (
            scribe.write([user_says("?")], add_generation_prompt=answer).text
            for answer in (False, True)
        )
    except ChatTemplateError:
        return ""
    return opened.removeprefix(asked) if opened.startswith(asked) else ""


def _num_in_front(prompt: Prompt, end: str, tokenizer: Tokenizer) -> int:
    """How many of a prompt's tokens are in front of what it ends with; 0 if it does not."""
    if not end or not prompt.text.endswith(end):
        return 0
    for count in range(1, min(len(end), len(prompt.ids)) + 1):
        if len(tokenizer.spell(prompt.ids[-count:])) >= len(end):
            return len(prompt.ids) - count
    return 0


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
    messages = [_plain(message) for message in conversation.messages]
    said = conversation.spoken
    spoken = None if said is None else {"text": said.text, "ids": said.ids}
    more: dict[str, Any] = {}
    if conversation.tools:
        more["tools"] = [_plain(tool) for tool in conversation.tools]
    if conversation.marks:
        more["marks"] = [list(_values(mark)) for mark in conversation.marks]
    if conversation.effort:
        more["effort"] = conversation.effort
    digest = _digest(messages, spoken, more)
    stored = {"version": VERSION, "digest": digest, "messages": messages, "spoken": spoken}
    return _compact(stored | more)


def load(text: str, *, vocab_size: int) -> tuple[Conversation, str]:
    """The conversation that `dump` made this text of, and what of it could not be read, or "".

    Token ids from `vocab_size` on are not of this model.
    """
    found = _fields(text)
    messages = _messages(found.get("messages"))
    if messages is None:
        return Conversation(), "its messages cannot be read; it starts afresh"
    spoken, is_whole = None, found.get("version") == VERSION
    more: dict[str, Any] = {name: found[name] for name in _MORE if name in found}
    is_whole &= found.get("digest") == _digest(found["messages"], found.get("spoken"), more)
    if is_whole and found.get("spoken") is not None:
        spoken = _spoken(found["spoken"], vocab_size)
        is_whole = spoken is not None
    damage = "" if is_whole else "its tokens cannot be read; they are made anew of the messages"
    if not is_whole:
        return Conversation(messages=messages), damage
    tools = tuple(Tool(**tool) for tool in more.get("tools", ()))
    marks = tuple(Mark(**_named(Mark, mark)) for mark in more.get("marks", ()))
    known = Conversation(
        messages=messages,
        tools=tools,
        spoken=spoken,
        marks=marks,
        effort=str(more.get("effort", "")),
    )
    return known, damage


def stored_messages(text: str | None) -> tuple[ChatMessage, ...] | None:
    """The messages of a stored conversation; None if they cannot be read."""
    return () if text is None else _messages(_fields(text).get("messages"))


def _plain(value: ChatMessage | Tool | ToolCall) -> dict[str, Any]:
    """Its fields; of a message only those that say something."""
    plain = dict(zip((field.name for field in fields(value)), _values(value), strict=True))
    if not isinstance(value, ChatMessage):
        return plain
    plain["tool_calls"] = [_plain(call) for call in value.tool_calls]
    return {name: v for name, v in plain.items() if v or name == "content"}


_MORE = ("tools", "marks", "effort")  # fields that a conversation may lack


def _values(value: Any) -> list[Any]:
    return [getattr(value, field.name) for field in fields(value)]


def _named(kind: Any, values: Sequence[Any]) -> dict[str, Any]:
    return {field.name: value for field, value in zip(fields(kind), values, strict=True)}


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _digest(messages: object, spoken: object, more: Mapping[str, Any]) -> str:
    content = [messages, spoken, *([more] if more else [])]
    return xxhash.xxh3_64_hexdigest(_compact(content).encode())


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
            case {"role": role, "content": str(content), **more} if role in ROLES:
                texts = {name: v for name, v in more.items() if name in _TEXTS and type(v) is str}
                calls = _calls(more.get("tool_calls"))
                messages.append(ChatMessage(role=role, content=content, tool_calls=calls, **texts))
            case _:
                return None
    return tuple(messages)


_TEXTS = ("reasoning", "call_id", "name")


def _calls(value: Any) -> tuple[ToolCall, ...]:
    calls = []
    for item in value if isinstance(value, list) else ():
        match item:
            case {"call_id": str(call_id), "name": str(name), "arguments": str(arguments)}:
                calls.append(ToolCall(call_id=call_id, name=name, arguments=arguments))
    return tuple(calls)


def _spoken(value: Any, vocab_size: int) -> Prompt | None:
    match value:
        case {"text": str(text), "ids": list(ids)}:
            if all(type(token) is int and 0 <= token < vocab_size for token in ids):
                return Prompt(text=text, ids=tuple(ids))
    return None
