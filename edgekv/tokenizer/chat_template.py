"""A model's own way of writing a conversation down, in which no message can forge structure."""

import datetime
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from edgekv.errors import ChatTemplateError

if TYPE_CHECKING:
    from edgekv.tokenizer.sandbox import CompiledTemplate

# Real templates have up to 30k characters.
SOURCE_CHARS_MAX = 1 << 18
# The one for plain chat, where a model has several.
DEFAULT_TEMPLATE = "default"
# Of which characters something is: [start, end).
Span = tuple[int, int]
# Tools' schemas nest a dozen levels.
DEPTH_MAX = 100
# Marks are made of private-use characters: no template tests for them, and trimming leaves them.
_LEFT, _RIGHT, _FILL = "\ue000", "\ue001", "\ue002"
# SmolLM3's template has two kinds, of which the other is for code that calls them.
_TOOLS = ("tools", "xml_tools")
# In what the model itself says, templates look for tokens that others must not forge.
_OWN_WORDS = frozenset({"content", "reasoning_content", "reasoning", "thinking"})


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
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation as one text, perhaps with the words that open the assistant's turn.

        Args:
            messages: With `role` and `content`, and whatever else the template reads.
            tools: What it tells the model that it may call, as JSON values.
            add_generation_prompt: Whether to open the assistant's turn.
            variables: What else it may read, such as `enable_thinking`.

        Raises:
            ChatTemplateError: The template is malformed, refused these messages, or ran too long.
        """
        given = {
            **(variables or {}),
            **self._special_tokens,
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
            **dict.fromkeys(_TOOLS, tools),
            "documents": None,
        }
        with self._lock:
            return self._compiled.render(given, num_messages=len(messages))

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


@dataclass(frozen=True, kw_only=True)
class ChatInputs:
    """What a template is given: plain JSON values, of which nobody else has a reference."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    variables: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None,
        variables: Mapping[str, Any] | None,
    ) -> "ChatInputs":
        """A copy. Raises ChatTemplateError: something in it is not what a template can read."""
        for index, message in enumerate(messages):
            if not isinstance(message, Mapping) or not _is_message(message):
                raise ChatTemplateError(
                    f"message {index} is no mapping of 'role' and 'content' to text",
                    hint='messages look like {"role": "user", "content": "Hello"}',
                )
        return cls(
            messages=[_plain(m, f"message {index}") for index, m in enumerate(messages)],
            tools=None if tools is None else _plain(tools, "the list of tools"),
            variables=_plain(variables or {}, "the template's variables"),
        )

    def mapped(self, change: Callable[[bool, str], str]) -> "ChatInputs":
        """With every text changed, keys too; `change` is told which are the model's own words."""
        return ChatInputs(
            messages=[
                {
                    change(False, key): _mapped(
                        value, change, key in _OWN_WORDS and message["role"] == "assistant"
                    )
                    for key, value in message.items()
                }
                for message in self.messages
            ],
            tools=_mapped(self.tools, change),
            variables=_mapped(self.variables, change),
        )

    @cached_property
    def texts(self) -> set[tuple[bool, str]]:
        """Every text, keys too, and whether it is the model's own words."""
        found: set[tuple[bool, str]] = set()

        def note(own: bool, text: str) -> str:
            found.add((own, text))
            return text

        self.mapped(note)
        return found


def content_text(content: str | Sequence[Any] | None) -> str:
    """A message's content as one text; of blocks, those that have text."""
    if content is None or isinstance(content, str):
        return content or ""
    blocks = [block.get("text", "") if isinstance(block, Mapping) else block for block in content]
    return "".join(text for text in blocks if isinstance(text, str))


def _is_message(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    is_content = isinstance(content, str | list | tuple)
    # Templates of a few models tell a call by this.
    is_content |= "content" in message and content is None and bool(message.get("tool_calls"))
    return is_content and isinstance(message.get("role"), str)


def _plain(value: Any, what: str, depth: int = 0) -> Any:
    """A copy of a JSON value, which `what` names in an error."""
    if depth > DEPTH_MAX:
        raise ChatTemplateError(f"{what} is nested more than {DEPTH_MAX} levels deep")
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, what, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, what, depth + 1) for item in value]
    if value is None or isinstance(value, str | int | float):
        return value
    raise ChatTemplateError(
        f"{what} holds {type(value).__name__}, which is no JSON",
        hint="pass texts, numbers, true, false, null, lists and mappings of texts to them",
    )


def _mapped(value: Any, change: Callable[[bool, str], str], own: bool = False) -> Any:
    if isinstance(value, str):
        return change(own, value)
    if isinstance(value, list):
        return [_mapped(item, change, own) for item in value]
    if isinstance(value, dict):
        return {change(own, key): _mapped(item, change, own) for key, item in value.items()}
    return value


def mark_spelled(
    inputs: ChatInputs, spelled: Callable[[bool, str], Sequence[Span]]
) -> tuple[ChatInputs, Sequence[str]]:
    """Mark what texts spell out of control tokens.

    Args:
        inputs: What the template is to read.
        spelled: Says where a text does so, and is told whether it is the model's own words.

    Returns:
        The same with a mark before and another behind each such token, and the two marks, which
        no text holds; the inputs themselves and () if there is no such token.
    """
    if not any(spelled(own, text) for own, text in inputs.texts):
        return inputs, ()
    runs = re.finditer(f"(?:{_escaped(_FILL)})+", "\n".join(text for _, text in inputs.texts))
    num_fill = 1 + max((len(re.findall(_escaped(_FILL), run[0])) for run in runs), default=0)
    marks = _LEFT + _FILL * num_fill + _RIGHT, _RIGHT + _FILL * num_fill + _LEFT

    def marked(own: bool, text: str) -> str:
        parts, known = [], 0
        for start, end in spelled(own, text):
            parts += [text[known:start], marks[0], text[start:end], marks[1]]
            known = end
        return "".join([*parts, text[known:]])

    return inputs.mapped(marked), marks


def _escaped(character: str) -> str:
    """A pattern of a mark's character as it is, and as JSON in ASCII or Python's repr have it.

    Where one of these was written into the other, there are more backslashes.
    """
    return rf"(?:{character}|\\+u{ord(character):04x})"


def unmark(
    text: str, marks: Sequence[str], spelled: Callable[[str], Sequence[Span]]
) -> tuple[str, list[Span]]:
    """A rendered conversation without its marks, and what no control token may overlap.

    That is what stands between two marks. A template may also have cut a text at a token, so that
    one mark is left: then it is that place, across which nothing may be joined into a token.
    """
    if not marks:
        return text, []
    left, fill, right = map(_escaped, (_LEFT, _FILL, _RIGHT))
    num_fill = len(marks[0]) - 2
    parts: list[str] = []
    tainted: list[Span] = []
    length, opened = 0, False
    # A capturing split alternates: text, mark, text, ..., text.
    pattern = f"({left}{fill}{{{num_fill}}}{right}|{right}{fill}{{{num_fill}}}{left})"
    for index, part in enumerate(re.split(pattern, text)):
        if index % 2 == 0:
            parts.append(part)
            length += len(part)
            continue
        opens = re.match(left, part) is not None
        if opened and not opens and spelled(parts[-1]) == [(0, len(parts[-1]))]:
            tainted[-1] = length - len(parts[-1]), length
            opened = False
        else:
            tainted.append((length, length))
            opened = opens
    return "".join(parts), tainted
