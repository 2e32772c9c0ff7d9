"""An answer's text to events."""

from edgekv.chat.events import Event, TextDelta, TokenLogprob
from edgekv.chat.values import ChatMessage


class AnswerParser:
    """Of one answer."""

    def __init__(self) -> None:
        self._text = ""
        self.cut = False

    def push(self, text: str, logprobs: tuple[TokenLogprob, ...] = ()) -> list[Event]:
        """More text."""
        self._text += text
        return [TextDelta(text=text, logprobs=logprobs)] if text or logprobs else []

    def end(self) -> list[Event]:
        """What is left."""
        return []

    @property
    def message(self) -> ChatMessage:
        """All of it."""
        return ChatMessage(role="assistant", content=self._text)
