"""A conversation as tokens: every turn extends the tokens of the turn before.

What the model generated is kept as the ids it generated. Encoding its text anew could give other
ids, and then all KV behind the first difference would be computed again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from edgekv.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class ChatMessage:
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
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
        rendered = tokenizer.render_chat(
            [{"role": m.role, "content": m.content} for m in messages],
            add_generation_prompt=text is not None,
        )
        spoken = self.spoken
        if spoken is not None and rendered.startswith(spoken.text):
            rest = encode_safely(tokenizer, rendered[len(spoken.text) :], messages)
            return Prompt(text=rendered, ids=(*spoken.ids, *rest))
        return Prompt(text=rendered, ids=tuple(encode_safely(tokenizer, rendered, messages)))

    def after(self, text: str, prompt: Prompt, reply: str, reply_ids: Sequence[int] | None) -> "Conversation":
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


def encode_safely(
    tokenizer: Tokenizer, rendered: str, messages: Sequence[ChatMessage]
) -> list[int]:
    """Encode rendered chat; special tokens count only where the template wrote them.

    A message that holds the text of a special token ("<|im_end|>") must not end its own turn, so
    such messages are encoded apart, as plain text.
    """
    suspects = {m.content for m in messages if _holds_special(tokenizer, m.content)}
    pieces = [(rendered, True)]
    for content in sorted(suspects, key=len, reverse=True):
        pieces = [
            piece
            for text, from_template in pieces
            for piece in (_split(text, content) if from_template else [(text, False)])
        ]
    return [
        token
        for text, from_template in pieces
        if text
        for token in tokenizer.encode(
            text, add_special_tokens=False, parse_special=from_template
        )
    ]


def _holds_special(tokenizer: Tokenizer, text: str) -> bool:
    plain = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
    return plain != tokenizer.encode(text, add_special_tokens=False, parse_special=True)


def _split(text: str, content: str) -> list[tuple[str, bool]]:
    pieces: list[tuple[str, bool]] = []
    for i, part in enumerate(text.split(content)):
        if i:
            pieces.append((content, False))
        pieces.append((part, True))
    return pieces
