"""A model's own way of writing a conversation down, in which no message can forge structure."""

import datetime
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from edgekv.errors import ChatTemplateError

if TYPE_CHECKING:
    from edgekv.tokenizer.sandbox import CompiledTemplate

# Real templates have up to 30k characters.
SOURCE_CHARS_MAX = 1 << 18
# A private-use character: no template tests for it, and trimming leaves it alone.
_MARK = "\ue000"


class ChatTemplate:
    """A Jinja chat template, run in a sandbox with bounds on its work and its output.

    Templates come with downloaded models, so they are input, not code of ours. The dialect is that
    of Hugging Face transformers: trimmed blocks, loop controls, `raise_exception`, `strftime_now`,
    `tojson` that keeps non-ASCII, `{% generation %}`. Compiled at first use. Thread-safe. `origin`,
    the file it came from, is for messages; `special_tokens` are those that it may name.
    """

    def __init__(
        self,
        source: str,
        *,
        origin: str,
        special_tokens: Mapping[str, str] | None = None,
        now: Callable[[], datetime.datetime] = datetime.datetime.now,
    ) -> None:
        self.source = source
        self.origin = origin
        self._special_tokens = dict(special_tokens or {})
        self._now = now
        self._lock = threading.Lock()

    def render(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> str:
        """The conversation as one text, perhaps with the words that open the assistant's turn.

        Raises:
            ChatTemplateError: The template is malformed, refused these messages, or ran too long.
        """
        variables = {
            **self._special_tokens,
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
        }
        with self._lock:
            return self._compiled.render(variables)

    @cached_property
    def _compiled(self) -> "CompiledTemplate":
        if len(self.source) > SOURCE_CHARS_MAX:
            raise ChatTemplateError(
                f"{self.origin}: the chat template has {len(self.source)} characters",
                hint=f"at most {SOURCE_CHARS_MAX} are allowed",
            )
        # Jinja takes 40 ms to import, which only a process that chats should pay.
        from edgekv.tokenizer.sandbox import CompiledTemplate

        return CompiledTemplate(self.source, origin=self.origin, now=self._now)


def check_messages(messages: Sequence[Mapping[str, str]]) -> None:
    """Raise ChatTemplateError where a message is no mapping to text with `role` and `content`."""
    for index, message in enumerate(messages):
        whole = isinstance(message, Mapping) and {"role", "content"} <= message.keys()
        if not whole or not all(isinstance(text, str) for text in message.values()):
            raise ChatTemplateError(
                f"message {index} is no mapping of 'role' and 'content' to text",
                hint='messages look like {"role": "user", "content": "Hello"}',
            )


def mark_forgeries(
    messages: Sequence[Mapping[str, str]], control: re.Pattern[str]
) -> tuple[Sequence[Mapping[str, str]], str]:
    """Break up what matches `control`, the text of any control token, inside of messages.

    Returns:
        The conversation with a mark behind the first character of each such token, and the mark,
        which no message holds; the messages themselves and "" if there is no such token.
    """
    texts = [text for message in messages for text in message.values()]
    if not any(map(control.search, texts)):
        return messages, ""
    runs = re.findall(f"{_MARK}+", "\n".join(texts))
    mark = _MARK * (1 + max(map(len, runs), default=0))

    def break_up(text: str) -> str:
        return control.sub(lambda match: match[0][0] + mark + match[0][1:], text)

    return [{k: break_up(text) for k, text in message.items()} for message in messages], mark
