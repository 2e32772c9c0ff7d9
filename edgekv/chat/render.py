"""A conversation as the chat template writes it."""

from collections.abc import Sequence
from dataclasses import dataclass

from edgekv.chat.values import ChatMessage, Tool
from edgekv.tokenizer import Tokenizer
from edgekv.tokenizer.base import RenderedChat


@dataclass(frozen=True, kw_only=True)
class Scribe:
    """How a conversation is written: by which template, with which tools, thinking or not."""

    tokenizer: Tokenizer
    tools: tuple[Tool, ...] = ()
    thinking: bool | None = None
    tools_prompt: str = ""

    def write(
        self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool
    ) -> RenderedChat:
        """The conversation as text. Raises as `Tokenizer.render_chat` does."""
        plain = [{"role": m.role, "content": m.content} for m in messages]
        return self.tokenizer.render_chat(plain, add_generation_prompt=add_generation_prompt)
