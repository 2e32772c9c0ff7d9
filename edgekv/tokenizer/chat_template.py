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
# The one for plain chat, where a model has several.
DEFAULT_TEMPLATE = "default"
# Of which characters something is: [start, end).
Span = tuple[int, int]
# Marks are made of private-use characters: no template tests for them, and trimming leaves them.
_LEFT, _RIGHT, _FILL = "\ue000", "\ue001", "\ue002"


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
            return self._compiled.render(variables, num_messages=len(messages))

    @property
    def written(self) -> str:
        """All that the template itself may write: its text and the constants in its code.

        Raises ChatTemplateError: It is malformed.
        """
        return self._compiled.written

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


def chosen_template(named: Mapping[str, ChatTemplate]) -> ChatTemplate | None:
    """The template for plain chat, of those by name: "default", or else the only one."""
    only = next(iter(named.values())) if len(named) == 1 else None
    return named.get(DEFAULT_TEMPLATE, only)


def check_messages(messages: Sequence[Mapping[str, str]]) -> None:
    """Raise ChatTemplateError where a message is no mapping to text with `role` and `content`."""
    for index, message in enumerate(messages):
        whole = isinstance(message, Mapping) and {"role", "content"} <= message.keys()
        if not whole or not all(isinstance(text, str) for text in message.values()):
            raise ChatTemplateError(
                f"message {index} is no mapping of 'role' and 'content' to text",
                hint='messages look like {"role": "user", "content": "Hello"}',
            )


def mark_spelled(
    messages: Sequence[Mapping[str, str]], spelled: Callable[[str, str], Sequence[Span]]
) -> tuple[Sequence[Mapping[str, str]], Sequence[str]]:
    """Mark what messages spell out of control tokens: where, says `spelled` of a role and a text.

    Returns:
        The conversation with a mark before and another behind each such token, and the two marks,
        which no message holds; the messages themselves and () if there is no such token.
    """
    texts = [text for message in messages for text in message.values()]
    if not any(spelled(m["role"], text) for m in messages for text in m.values()):
        return messages, ()
    runs = re.findall(f"{_FILL}+", "\n".join(texts))
    fill = _FILL * (1 + max(map(len, runs), default=0))
    marks = _LEFT + fill + _RIGHT, _RIGHT + fill + _LEFT

    def marked(role: str, text: str) -> str:
        parts, known = [], 0
        for start, end in spelled(role, text):
            parts += [text[known:start], marks[0], text[start:end], marks[1]]
            known = end
        return "".join([*parts, text[known:]])

    return [{k: marked(m["role"], text) for k, text in m.items()} for m in messages], marks


def unmark(
    text: str, marks: Sequence[str], spelled: Callable[[str], Sequence[Span]]
) -> tuple[str, list[Span]]:
    """A rendered conversation without its marks, and what no control token may overlap.

    That is what stands between two marks. A template may also have cut a message at a token, so
    that one mark is left: then it is that place, across which nothing may be joined into a token.
    """
    if not marks:
        return text, []
    parts: list[str] = []
    tainted: list[Span] = []
    length, opened = 0, False
    # A capturing split alternates: text, mark, text, ..., text.
    for index, part in enumerate(re.split(f"({marks[0]}|{marks[1]})", text)):
        if index % 2 == 0:
            parts.append(part)
            length += len(part)
        elif opened and part == marks[1] and spelled(parts[-1]) == [(0, len(parts[-1]))]:
            tainted[-1] = length - len(parts[-1]), length
            opened = False
        else:
            tainted.append((length, length))
            opened = part == marks[0]
    return "".join(parts), tainted
