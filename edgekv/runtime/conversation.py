"""A conversation as tokens: every turn extends the tokens of the turn before.

What the model generated is kept as the ids it generated. Encoding its text anew could give other
ids, and then all KV behind the first difference would be computed again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from edgekv.tokenizer import Tokenizer

Role = Literal["system", "user", "assistant"]


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

    def prompt(self, tokenizer: Tokenizer, text: str | None) -> Prompt:
        """The tokens to answer: all messages, and the user's `text` unless it is None."""
        messages = self.messages
        if text is not None:
            messages += (ChatMessage(role="user", content=text),)
        chat = [{"role": m.role, "content": m.content} for m in messages]
        answer = text is not None
        rendered = tokenizer.render_chat(chat, add_generation_prompt=answer)
        spoken = self.spoken
        if spoken is None or not rendered.startswith(spoken.text):
            spoken = Prompt(text="", ids=())
        rest = tokenizer.encode_chat(chat, add_generation_prompt=answer, after=spoken.text)
        return Prompt(text=rendered, ids=(*spoken.ids, *rest))

    def after(
        self, text: str, prompt: Prompt, reply: str, reply_ids: Sequence[int] | None
    ) -> "Conversation":
        """The conversation once `text` was answered.

        Args:
            text: What the user said.
            prompt: What `prompt` returned for it.
            reply: The answer's text.
            reply_ids: Its tokens, or None where they do not spell exactly `reply`.
        """
        messages = (
            *self.messages,
            ChatMessage(role="user", content=text),
            ChatMessage(role="assistant", content=reply),
        )
        spoken = None
        if reply_ids is not None:
            spoken = Prompt(text=prompt.text + reply, ids=(*prompt.ids, *reply_ids))
        return replace(self, messages=messages, spoken=spoken)
