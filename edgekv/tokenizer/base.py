"""The tokenizer of one model, whatever file format it came in."""

import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from edgekv.config import SamplingParams, check_kind
from edgekv.errors import ChatTemplateError, ConfigError, RequestError
from edgekv.tokenizer.answer_text import IncrementalDetokenizer
from edgekv.tokenizer.backends import Backend
from edgekv.tokenizer.chat_template import (
    ChatInputs,
    ChatTemplate,
    Span,
    content_text,
    mark_spelled,
    unmark,
)
from edgekv.tokenizer.ends import ends_by_text
from edgekv.tokenizer.vocabulary import Vocabulary
from edgekv.tokenizer.whole_text import WholeText


@dataclass(frozen=True, kw_only=True)
class RenderedChat:
    """A conversation as one text, and where messages in it spell out control tokens."""

    text: str
    tainted: Sequence[Span] = ()  # see `WholeText.encode`


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokenizer:
    """Text to token ids and back. Immutable; many threads may use it at once."""

    backend: Backend
    vocabulary: Vocabulary
    bos_id: int | None  # begins a text
    eos_ids: frozenset[int]  # after which an answer is over
    prefix_ids: tuple[int, ...]  # what `encode` puts before the text; mostly BOS or ()
    chat_template: ChatTemplate | None  # what the model's conversations are written by
    templates: Mapping[str, ChatTemplate] = field(default_factory=dict)  # all it has, by name
    fingerprint: str  # xxh3-128 in hex over what turns text into ids; equal in every process
    sampling: SamplingParams  # what the model's makers say
    warnings: tuple[str, ...]  # what of its files is damaged and not used, for the user

    @property
    def vocab_size(self) -> int:
        """Largest id + 1. The model may have more rows of logits than that."""
        return len(self.vocabulary.tokens)

    def encode(
        self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True
    ) -> list[int]:
        """Token ids of `text`.

        Args:
            text: Any Unicode text.
            add_special_tokens: Begin with BOS where the model wants it and the text does not
                already begin with it. Pass False for a rendered chat: templates write their own.
            parse_special: "<|im_end|>" in the text is that control token. Pass False for text that
                nobody vouches for: it then stays the plain characters, and cannot end a turn.

        Raises:
            RequestError: The text holds a lone surrogate, so it is no Unicode text.
            ConfigError: It is no text.
        """
        _check_unicode(text)
        tainted = [] if parse_special else self._texts.spelled(text)
        ids = self._texts.encode(text, tainted=tainted)
        if add_special_tokens and tuple(ids[: len(self.prefix_ids)]) != self.prefix_ids:
            return [*self.prefix_ids, *ids]
        return ids

    @cached_property
    def _texts(self) -> WholeText:
        """Of texts; the hidden tokens are control tokens."""
        return WholeText(self.backend, self.vocabulary.hidden_tokens)

    @cached_property
    def _chats(self) -> WholeText:
        """Of conversations; so are, white space apart, added tokens that the template writes.

        That is what transformers' `sanitize_control_tokens` guards.
        """
        control = dict(self.vocabulary.hidden_tokens)
        if self.chat_template is not None:
            written = self.chat_template.written
            for token_id in self.vocabulary.literal_ids:
                token = self.vocabulary.tokens[token_id]
                if token and token in written and not token.isspace():
                    control[token] = token_id
        return WholeText(self.backend, control)

    def spell(self, ids: Sequence[int]) -> str:
        """What `ids` are in the middle of a text: control tokens too, and no space taken away."""
        return b"".join(map(self.vocabulary.spelled_bytes, ids)).decode("utf-8", "replace")

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`; invalid UTF-8 becomes U+FFFD, an id without a token nothing.

        Raises:
            ConfigError: They are no whole numbers.
        """
        vocabulary = self.vocabulary
        spell = vocabulary.token_bytes if skip_special_tokens else vocabulary.spelled_bytes
        try:
            numbers = [operator.index(token_id) for token_id in ids]
        except TypeError:
            raise ConfigError.of("ids", ids, "token ids: whole numbers") from None
        text = b"".join(map(spell, numbers)).decode("utf-8", "replace")
        return text.removeprefix(" ") if vocabulary.leading_space else text

    def detokenizer(self, spelled: frozenset[int] = frozenset()) -> IncrementalDetokenizer:
        """A fresh detokenizer for one answer, which shows these control tokens."""
        return IncrementalDetokenizer(self.vocabulary, spelled)

    def with_template(self, name: str | None) -> "Tokenizer":
        """The same with another of the model's templates; None is the one for plain chat.

        Raises:
            ConfigError: It has none of this name.
        """
        if name is None:
            return self
        if name not in self.templates:
            names = ", ".join(sorted(self.templates)) or "none: the model has no chat template"
            raise ConfigError.of("chat_template", name, names)
        return replace(self, chat_template=self.templates[name])

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> RenderedChat:
        r"""The conversation as the model was trained to read it.

        Without a template it is `System: ...\n\nUser: ...\n\nAssistant:`, behind the text of BOS if
        the model wants it; tools and calls are then not in it.

        Args:
            messages: `role` and `content`, and what else the template reads, as JSON values:
                `tool_calls`, `tool_call_id`, `reasoning_content`.
            tools: What the model may call, as JSON values that the template writes its own way.
            add_generation_prompt: Whether to open the assistant's turn.
            variables: Further values that the template may read, such as `enable_thinking`.

        Raises:
            ChatTemplateError: The template is malformed or refused these messages.
            RequestError: A text in them holds a lone surrogate.
        """
        inputs = ChatInputs.of(messages, tools, variables)
        for _, text in inputs.texts:
            _check_unicode(text)
        inputs, marks = mark_spelled(inputs, self._spelled)
        chat = self._render(inputs, add_generation_prompt)
        chat, tainted = unmark(chat, marks, self._chats.spelled)
        return RenderedChat(text=chat, tainted=tainted)

    def _spelled(self, own: bool, text: str) -> Sequence[Span]:
        """What a text must not forge; the model itself says what templates look for in answers.

        They cut answers at "</think>", and what they strip there must be next to it.
        """
        return (self._texts if own else self._chats).spelled(text)

    def _render(self, inputs: ChatInputs, add_generation_prompt: bool) -> str:
        if self.chat_template is not None:
            return self.chat_template.render(
                inputs.messages,
                tools=inputs.tools,
                add_generation_prompt=add_generation_prompt,
                variables=inputs.variables,
            )
        if self.templates:
            raise ChatTemplateError(
                f"the model has several chat templates: {', '.join(sorted(self.templates))}",
                hint="choose one: --chat-template NAME (in a program "
                "RuntimeConfig(chat_template=NAME))",
            )
        prefix = self.spell(self.prefix_ids)
        turns = [f"{m['role'].capitalize()}: {content_text(m['content'])}" for m in inputs.messages]
        turns += ["Assistant:"] if add_generation_prompt else []
        return prefix + "\n\n".join(turns)

    def encode_chat(self, chat: RenderedChat, *, after: int = 0) -> list[int]:
        """Ids of a rendered conversation, in which no message can forge a control token.

        Equal to those of its text as a whole, unless a message spells out a control token: its
        characters then stay text, so that a quoted document cannot end the turn it is quoted in.
        Of what is before character `after` the caller has ids; only those of the rest are returned.

        Raises:
            RequestError: The template itself holds a lone surrogate.
        """
        _check_unicode(chat.text)
        return self._chats.encode(chat.text, tainted=chat.tainted, after=after)


def _check_unicode(text: str) -> None:
    check_kind("text", text, str)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the text is not valid Unicode: lone surrogate at character {error.start}",
            hint="decode the input as UTF-8 with errors='replace'",
        ) from error


def end_ids(vocabulary: Vocabulary) -> frozenset[int]:
    """Ids of the control tokens that are known by their text to end an answer."""
    hidden = vocabulary.hidden_tokens
    return frozenset(hidden[token] for token in ends_by_text(hidden))


def fingerprint_of(content: object) -> str:
    """xxh3-128 in hex of plain values, written as canonical JSON."""
    import xxhash

    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(text.encode("ascii"))
