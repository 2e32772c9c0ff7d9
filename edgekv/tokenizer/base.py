"""The tokenizer of one model, whatever file format it came in."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgekv.config import SamplingParams
from edgekv.errors import ChatTemplateError, RequestError
from edgekv.tokenizer.answer_text import IncrementalDetokenizer
from edgekv.tokenizer.backends import Backend
from edgekv.tokenizer.chat_template import ChatTemplate, check_messages, mark_forgeries
from edgekv.tokenizer.ends import ends_by_text
from edgekv.tokenizer.vocabulary import Vocabulary


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokenizer:
    """Text to token ids and back. Immutable; many threads may use it at once."""

    backend: Backend
    vocabulary: Vocabulary
    bos_id: int | None  # begins a text
    eos_ids: frozenset[int]  # after which an answer is over
    prefix_ids: tuple[int, ...]  # what `encode` puts before the text; mostly BOS or ()
    chat_template: ChatTemplate | None  # the model's own
    fingerprint: str  # xxh3-128 in hex over everything above; equal in every process
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
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the text is not valid Unicode: lone surrogate at character {error.start}",
                hint="decode the input as UTF-8 with errors='replace'",
            ) from error
        ids = self.backend.encode(text, parse_special=parse_special)
        if add_special_tokens and tuple(ids[: len(self.prefix_ids)]) != self.prefix_ids:
            return [*self.prefix_ids, *ids]
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`; invalid UTF-8 becomes U+FFFD, an id without a token nothing."""
        vocabulary = self.vocabulary
        spell = vocabulary.token_bytes if skip_special_tokens else vocabulary.spelled_bytes
        text = b"".join(map(spell, ids)).decode("utf-8", "replace")
        return text.removeprefix(" ") if vocabulary.leading_space else text

    def detokenizer(self) -> IncrementalDetokenizer:
        """A fresh detokenizer for one answer."""
        return IncrementalDetokenizer(self.vocabulary)

    def render_chat(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> str:
        r"""The conversation as the model was trained to read it.

        Encode the result with `add_special_tokens=False`, or use `encode_chat`. Without a template
        it is `System: ...\n\nUser: ...\n\nAssistant:`, behind the text of BOS if it wants one.

        Raises:
            ChatTemplateError: The template is malformed or refused these messages.
        """
        check_messages(messages)
        if self.chat_template is not None:
            return self.chat_template.render(messages, add_generation_prompt=add_generation_prompt)
        prefix = b"".join(map(self.vocabulary.spelled_bytes, self.prefix_ids)).decode()
        turns = [f"{message['role'].capitalize()}: {message['content']}" for message in messages]
        turns += ["Assistant:"] if add_generation_prompt else []
        return prefix + "\n\n".join(turns)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool = True,
        after: str = "",
    ) -> list[int]:
        """Ids of the rendered conversation, in which no message can forge a control token.

        Equal to encoding `render_chat`'s result, unless a message spells out a control token: its
        characters then stay text, so that a quoted document cannot end the turn it is quoted in.
        `after` is what that result begins with and the caller has as ids already; only the rest is
        encoded.

        Raises:
            ChatTemplateError: See `render_chat`.
            RequestError: A message holds a lone surrogate.
        """
        check_messages(messages)
        control = self.vocabulary.hidden_pattern
        marked, mark = mark_forgeries(messages, control)
        text = self.render_chat(marked, add_generation_prompt=add_generation_prompt)
        if not text.replace(mark, "").startswith(after):
            raise ChatTemplateError(
                "the chat template writes a conversation differently when a message is marked",
                hint="it decides by the text of messages; use another template",
            )
        if not mark:
            return self.encode(text[len(after) :], add_special_tokens=False)
        ids: list[int] = []
        skip = len(after)
        # A capturing split alternates: text, control token, text, ..., text.
        for index, marked_part in enumerate(control.split(text)):
            part = marked_part.replace(mark, "")
            rest, skip = part[skip:], max(0, skip - len(part))
            if index % 2 and rest == part:
                ids.append(self.vocabulary.hidden_tokens[part])
            else:
                ids += self.encode(rest, add_special_tokens=False, parse_special=False)
        return ids


def end_ids(vocabulary: Vocabulary) -> frozenset[int]:
    """Ids of the control tokens that are known by their text to end an answer."""
    hidden = vocabulary.hidden_tokens
    return frozenset(hidden[token] for token in ends_by_text(hidden))


def fingerprint_of(content: object) -> str:
    """xxh3-128 in hex of plain values, written as canonical JSON."""
    import xxhash

    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(text.encode("ascii"))
